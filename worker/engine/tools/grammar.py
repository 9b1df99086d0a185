"""Grammars that force valid tool calls, in llguidance's dialect of Lark.

A rule named `…marker` with a string as its body stands for a special token where the vocabulary has
one of that text; `worker.engine.constraint` puts it in. Forced calls look exactly as the chat
templates write them, so that a model finds itself on known ground.
"""

import json
import re
from typing import Any

from shared.errors import InvalidRequest
from shared.protocol import Constraint, Tool, ToolChoice
from worker.engine.tools.families import (
    MISTRAL_ARGS,
    MISTRAL_CALLS,
    PYTHON_TAG,
    TOOL_CALL,
    TOOL_CALL_END,
    ToolFamily,
)

__all__ = ("MAX_CALLS", "WHITESPACE", "bind_markers", "tool_constraint")

MAX_CALLS = 8
"""Most calls in one answer that a grammar allows: small models would go on for ever."""

WHITESPACE = r" |\n {0,20}"
"""White space in JSON, at most once at each place: one blank, or a new line and its indent. Without
a bound, small models write blanks until the length limit."""

_MARKER = re.compile(r'^(\w*marker)(\[lazy\])?:( TEXT)? ("(?:[^"\\]|\\.)*")$', re.MULTILINE)

_FRAMES: dict[ToolFamily, tuple[str, str, str]] = {
    # What a call is after its marker, what another one is, what ends them all.
    "hermes": ("one", '"\\n" open_marker one', ""),
    "llama3": ("call", '"; " call', ""),
    "mistral": ('"[" call', '", " call', '"]"'),
    "mistral_args": ("call", "open_marker call", ""),
}
_OPEN: dict[ToolFamily, str] = {
    "hermes": TOOL_CALL,
    "llama3": PYTHON_TAG,
    "mistral": MISTRAL_CALLS,
    "mistral_args": MISTRAL_CALLS,
}


def tool_constraint(
    family: ToolFamily, tools: tuple[Tool, ...], choice: ToolChoice
) -> Constraint | None:
    """The constraint that a request's tool choice puts on the output, if any.

    `named` forces one call, `required` one or, if `parallel`, more. `auto` leaves the
    text free; if a tool is strict, whatever begins a call must become a valid one.

    Raises:
        InvalidRequest: the named tool is not there, or a tool's parameters are no JSON schema.
    """
    if choice.mode == "named":
        tools = tuple(tool for tool in tools if tool.name == choice.name)
        if not tools:
            raise InvalidRequest(f"tools has no function {choice.name!r}", param="tool_choice")
    elif choice.mode == "required" and not tools:
        raise InvalidRequest("tool_choice 'required' needs tools", param="tool_choice")
    forced = choice.mode in ("named", "required")
    if not forced and not (choice.mode == "auto" and any(tool.strict for tool in tools)):
        return None
    more = MAX_CALLS - 1 if choice.parallel and choice.mode != "named" else 0
    lines = ["%llguidance {}"]
    lines += _start(family, forced)
    first, other, last = _FRAMES[family]
    lines.append(f"calls: {first} {f'({other}){{0,{more}}}' if more else ''} {last}")
    if family != "llama3":
        lines.append(f"open_marker: {json.dumps(_OPEN[family])}")
    if family == "hermes":
        lines.append(r'one: "\n" call "\n" end_marker')
        lines.append(f"end_marker: {json.dumps(TOOL_CALL_END)}")
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    if family == "mistral_args":
        lines.append(f"args_marker: {json.dumps(MISTRAL_ARGS)}")
    for i, tool in enumerate(tools):
        lines.append(f"call_{i}: {_call(family, tool.name, i)}")
        lines.append(f"args_{i}: %json {json.dumps(_schema(tool))}")
    return Constraint("lark", "\n".join(lines) + "\n", "tools")


def _start(family: ToolFamily, forced: bool) -> list[str]:
    if forced:
        return ["start: calls" if family == "llama3" else "start: open_marker calls"]
    opening = f"text_marker[lazy]: TEXT {json.dumps(_OPEN[family])}"
    if family != "llama3":
        return ["start: TEXT | text_marker calls", opening, "TEXT: /(?s:.*)/"]
    # Llama needs no marker: a text that begins with `{` is a call.
    return [
        "start: PLAIN? | calls | text_marker calls",
        opening,
        r"TEXT: /(\s*[^\s{](?s:.*))?/",
        r"PLAIN: /\s*[^\s{](?s:.*)/",
    ]


def _call(family: ToolFamily, name: str, number: int) -> str:
    if family == "mistral_args":
        return f"{json.dumps(name)} args_marker args_{number}"
    key = "parameters" if family == "llama3" else "arguments"
    head = f'{{"name": {json.dumps(name)}, "{key}": '
    return f'{json.dumps(head)} args_{number} "}}"'


def _schema(tool: Tool) -> dict[str, Any]:
    try:
        schema = json.loads(tool.parameters or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"parameters of function {tool.name!r} are not JSON: {error}", param="tools"
        ) from error
    if not isinstance(schema, dict):
        raise InvalidRequest(
            f"parameters of function {tool.name!r} are not a JSON schema object", param="tools"
        )
    if not schema:
        # As in OpenAI's API: no parameters means a function that takes none.
        schema = {"properties": {}, "additionalProperties": False}
    # Only a strict tool asks for its schema to be honoured in full or refused.
    guidance = {"whitespace_pattern": WHITESPACE, "lenient": not tool.strict}
    return {"type": "object", **schema, "x-guidance": guidance}


def bind_markers(lark: str, special: dict[str, int]) -> str:
    """Put special tokens in place of the markers that the vocabulary has as such."""

    def bind(match: re.Match[str]) -> str:
        rule, _, text, literal = match.groups()
        token = special.get(json.loads(literal))
        return match.group() if token is None else f"{rule}:{text or ''} <[{token}]>"

    return _MARKER.sub(bind, lark)
