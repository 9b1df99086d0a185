"""What a request gives a model to go on: messages and tools, a text, or tokens."""

from typing import Any, Literal

import msgspec

from shared import bounds

__all__ = (
    "ChatInput",
    "Message",
    "TextInput",
    "TokenInput",
    "Tool",
    "ToolCall",
    "ToolChoice",
)


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call an assistant message made; `arguments` is JSON text, as in OpenAI's API."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function the model may call; `parameters` is a JSON schema as JSON text."""

    name: str
    description: str = ""
    parameters: str = "{}"
    strict: bool = False


class ToolChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """`named` forces the function `name`; `required` forces any."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""
    parallel: bool = True


class ChatInput(msgspec.Struct, frozen=True, tag="chat", omit_defaults=True):
    """A conversation, to be rendered by the model's own chat template on the worker."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    template_kwargs: dict[str, Any] = {}


class TextInput(msgspec.Struct, frozen=True, tag="text"):
    """A bare prompt."""

    text: str


class TokenInput(msgspec.Struct, frozen=True, tag="tokens"):
    """A prompt that is tokenized already."""

    tokens: tuple[bounds.Token, ...]
