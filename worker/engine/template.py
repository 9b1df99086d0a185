"""Chat templates: a conversation as the text a model was trained on.

A template is the model's own Jinja source and runs in a sandbox, with what Hugging Face's
transformers gives it. Templates differ in what they know of (tools, calls, system prompts); each is
tried once with a small conversation, and what it does not know is put into words it does.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import InvalidRequest
from shared.protocol import ChatInput
from worker.engine.conversation import Abilities, Turn, adapt, call_turn, openai_tools, openai_turns
from worker.engine.tools.families import ToolFamily, detect_family

__all__ = ("FALLBACK_TEMPLATE", "MAX_OUTPUT", "ChatTemplate")

MAX_OUTPUT = 16 * 1024 * 1024
"""Most characters of a rendered conversation."""

FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, for a model that brings no template."""

_NINE = re.compile(r"length\s*(!=|==|<)\s*9\b")
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks a model's own turns for training: no effect."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which repetition and powers cannot fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**":
            raise jinja2.TemplateRuntimeError("powers are not available in chat templates")
        for sequence, times in ((left, right), (right, left)):
            if (
                isinstance(times, int)
                and hasattr(sequence, "__len__")
                and len(sequence) * times > MAX_OUTPUT
            ):
                raise jinja2.TemplateRuntimeError("a repetition in the chat template is too long")
        return super().call_binop(context, operator, left, right)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One model's template.

    Raises:
        ValueError: the source is no Jinja template; the message names line and fault.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error
        self._special = {"bos_token": bos, "eos_token": eos}
        self.abilities = self._try_out(source)
        self.family: ToolFamily = detect_family(source) if self.abilities.tools else "hermes"
        """The form of tool calls that the rendered prompt leads the model to."""

    def render(self, chat: ChatInput) -> str:
        """Render a conversation, up to where the model's answer begins.

        Raises:
            InvalidRequest: the template refuses the conversation or fails on it, or it is too long.
        """
        reserved = sorted(_RESERVED & chat.template_kwargs.keys())
        if reserved:
            raise InvalidRequest(
                f"{', '.join(reserved)}: cannot be set for the template",
                param="chat_template_kwargs",
            )
        tools = [] if chat.tool_choice.mode == "none" else openai_tools(chat.tools)
        turns = adapt(openai_turns(chat.messages), tools, self.abilities)
        native_tools = tools if self.abilities.tools else []
        try:
            return self._render(turns, native_tools, chat.template_kwargs)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"chat template: {error}", param="messages") from error
        except Exception as error:
            # Templates are foreign programs: any operation in one may fail on any conversation.
            raise InvalidRequest(
                f"chat template: {type(error).__name__}: {error}", param="messages"
            ) from error

    def _render(
        self,
        turns: list[Turn],
        tools: list[dict[str, Any]],
        extra: Mapping[str, Any],
    ) -> str:
        parts: list[str] = []
        size = 0
        for part in self._template.generate(
            {
                **extra,
                **self._special,
                "messages": turns,
                "tools": tools or None,
                "add_generation_prompt": True,
            }
        ):
            size += len(part)
            if size > MAX_OUTPUT:
                raise jinja2.TemplateRuntimeError(
                    f"the conversation exceeds {MAX_OUTPUT} characters"
                )
            parts.append(part)
        return "".join(parts)

    def _shows(self, needle: str, turns: list[Turn], tools: list[dict[str, Any]]) -> bool:
        try:
            return needle in self._render(turns, tools, {})
        except Exception:
            # What a template refuses, it does not know.
            return False

    def _try_out(self, source: str) -> Abilities:
        user: Turn = {"role": "user", "content": "a question"}
        system: Turn = {"role": "system", "content": "needle-system"}
        tool = {
            "type": "function",
            "function": {
                "name": "needle_tool",
                "description": "a tool",
                "parameters": {"type": "object", "properties": {}},
            },
        }

        def calls(arguments: dict[str, Any] | str) -> list[Turn]:
            answer: Turn = {
                "role": "tool",
                "content": "needle-result",
                "tool_call_id": "abcdefghi",
                "name": "needle_tool",
            }
            return [user, call_turn("abcdefghi", "needle_tool", arguments), answer]

        # Python's repr of a dict, or a doubly encoded string, is not what a template means to show.
        needle = '"needle_key"'
        shows_tools = self._shows("needle_tool", [user], [tool])
        as_object = self._shows(needle, calls({"needle_key": 1}), [tool])
        as_text = self._shows(needle, calls('{"needle_key": 1}'), [tool])
        return Abilities(
            system=self._shows("needle-system", [system, user], []),
            developer="developer" in source,
            tools=shows_tools,
            calls=shows_tools and (as_object or as_text),
            text_arguments=as_text and not as_object,
            nine_letter_ids=_NINE.search(source) is not None,
        )
