"""Conversations in the form chat templates expect, made to fit what a template knows of.

Where a template ignores tools they are described in the system prompt, and calls and their results
are written into ordinary turns, all in the Hermes form that `worker.engine.tools` reads back.
"""

import hashlib
import json
from typing import Any

import msgspec

from shared.protocol import Message, Tool
from worker.engine.tools.families import TOOL_CALL, TOOL_CALL_END

__all__ = ("Abilities", "Turn", "adapt", "call_turn", "openai_tools", "openai_turns")

Turn = dict[str, Any]
"""A message as OpenAI's API and Hugging Face's templates have it."""

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Abilities(msgspec.Struct, frozen=True):
    """What a template knows of."""

    system: bool
    developer: bool
    tools: bool
    """It describes tools to the model."""
    calls: bool
    """It shows the calls of earlier answers, in the form of the tools it describes."""
    text_arguments: bool
    """It wants a call's arguments as JSON text, not as an object."""
    nine_letter_ids: bool
    """It refuses ids of calls that are not, or not at least, nine letters and digits (Mistral)."""


def call_turn(call_id: str, name: str, arguments: dict[str, Any] | str) -> Turn:
    """An assistant's turn that is one call."""
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def openai_tools(tools: tuple[Tool, ...]) -> list[dict[str, Any]]:
    """Tools as OpenAI's API has them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": _parsed(tool.parameters or "{}"),
            },
        }
        for tool in tools
    ]


def openai_turns(messages: tuple[Message, ...]) -> list[Turn]:
    """Messages as OpenAI's API has them, but for the arguments of calls, which are objects.

    Keys that do not apply are absent: templates ask whether they are there.
    """
    turns: list[Turn] = []
    for message in messages:
        turn: Turn = {"role": message.role, "content": message.content}
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": _parsed(call.arguments)},
                }
                for call in message.tool_calls
            ]
        turns.append(turn)
    return turns


def adapt(turns: list[Turn], tools: list[dict[str, Any]], abilities: Abilities) -> list[Turn]:
    """The conversation in terms that the template knows."""
    if not abilities.developer:
        turns = [_as_system(turn) for turn in turns]
    _name_results(turns)
    if not abilities.calls:
        turns = _calls_in_words(turns)
    else:
        for call in (call for turn in turns for call in turn.get("tool_calls", ())):
            if abilities.text_arguments and not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = _dumps(call["function"]["arguments"])
        if abilities.nine_letter_ids:
            _shorten_ids(turns)
    if tools and not abilities.tools:
        turns = _with_system(turns, _tools_in_words(tools))
    if not abilities.system:
        turns = _without_system(turns)
    return turns


def _parsed(text: str) -> Any:
    """The JSON value of the text; text that is not JSON (a call cut off, say) stays as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_system(turn: Turn) -> Turn:
    return {**turn, "role": "system"} if turn["role"] == "developer" else turn


def _name_results(turns: list[Turn]) -> None:
    """Give results of calls the name of their function, which some templates print."""
    names: dict[str, str] = {}
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if turn["role"] == "tool" and "name" not in turn:
            name = names.get(turn.get("tool_call_id", ""))
            if name is not None:
                turn["name"] = name


def _shorten_ids(turns: list[Turn]) -> None:
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            call["id"] = _nine_letters(call["id"])
        if "tool_call_id" in turn:
            turn["tool_call_id"] = _nine_letters(turn["tool_call_id"])


def _nine_letters(call_id: str) -> str:
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    number = int.from_bytes(hashlib.blake2b(call_id.encode(), digest_size=8).digest())
    letters = []
    for _ in range(9):
        number, letter = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)


def _calls_in_words(turns: list[Turn]) -> list[Turn]:
    out: list[Turn] = []
    answering = False
    for turn in turns:
        if turn["role"] == "tool":
            text = f"<tool_response>\n{turn['content']}\n</tool_response>"
            # Results of parallel calls are one turn, as users and models take turns.
            if answering:
                out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n{text}"}
            else:
                out.append({"role": "user", "content": text})
            answering = True
            continue
        answering = False
        if "tool_calls" in turn:
            parts = [turn["content"]] if turn["content"] else []
            parts += [
                f"{TOOL_CALL}\n{_dumps(call['function'])}\n{TOOL_CALL_END}"
                for call in turn["tool_calls"]
            ]
            turn = {"role": "assistant", "content": "\n".join(parts)}
        out.append(turn)
    return out


def _tools_in_words(tools: list[dict[str, Any]]) -> str:
    listed = "\n".join(_dumps(tool["function"]) for tool in tools)
    return (
        "You can call functions to help with the user's request. These are their names, purposes "
        "and JSON schemas of their parameters:\n"
        f"<tools>\n{listed}\n</tools>\n"
        "To call a function, answer with its name and arguments in this form, one block per call:\n"
        f"{TOOL_CALL}\n"
        '{"name": "the function\'s name", "arguments": {"a parameter": "its value"}}\n'
        f"{TOOL_CALL_END}\n"
        "The results will follow. If no function helps, answer in plain words."
    )


def _with_system(turns: list[Turn], text: str) -> list[Turn]:
    if turns and turns[0]["role"] == "system":
        first = turns[0]
        joined = f"{first['content']}\n\n{text}" if first["content"] else text
        return [{**first, "content": joined}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _without_system(turns: list[Turn]) -> list[Turn]:
    """Put what the system turns say before the next user turn."""
    out: list[Turn] = []
    said: list[str] = []
    for turn in turns:
        if turn["role"] == "system":
            said.append(turn["content"])
        elif said and turn["role"] == "user":
            out.append({**turn, "content": "\n\n".join([*said, turn["content"]])})
            said = []
        else:
            out.append(turn)
    if said:
        out.append({"role": "user", "content": "\n\n".join(said)})
    return out
