"""`/v1/chat/completions`: OpenAI's request, checked, as a dialect-free `Generate`."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from router.dialects import fields
from router.dialects.fields import refuse
from router.dialects.validation import decode_body
from shared.errors import InvalidRequest
from shared.protocol import (
    ChatInput,
    Constraint,
    Generate,
    Message,
    Priority,
    Tool,
    ToolCall,
    ToolChoice,
)

__all__ = ("ChatRequest", "chat_to_generate", "parse_chat")


class TextPart(msgspec.Struct, frozen=True):
    """A piece of text."""

    text: str
    # No tag: msgspec takes it as optional where there is nothing to tell apart.
    type: Literal["text"]


class AssistantTextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """A piece of text an assistant gave earlier."""

    text: str


class RefusalPart(msgspec.Struct, frozen=True, tag_field="type", tag="refusal"):
    """A refusal an assistant gave earlier."""

    refusal: str


TextContent = Annotated[
    str | list[TextPart], Meta(description="a string or an array of parts of type 'text'")
]
AssistantContent = Annotated[
    str | list[AssistantTextPart | RefusalPart],
    Meta(description="a string or an array of parts of type 'text' or 'refusal'"),
]


class SystemMessage(msgspec.Struct, frozen=True, tag_field="role", tag="system"):
    """Instructions."""

    content: TextContent
    name: str | None = None


class DeveloperMessage(msgspec.Struct, frozen=True, tag_field="role", tag="developer"):
    """Instructions, by the newer name."""

    content: TextContent
    name: str | None = None


class UserMessage(msgspec.Struct, frozen=True, tag_field="role", tag="user"):
    """What the user said."""

    content: TextContent
    name: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """The function an assistant called, its arguments as JSON text."""

    name: str
    arguments: str


class AssistantCall(msgspec.Struct, frozen=True):
    """A call an assistant made."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AssistantMessage(msgspec.Struct, frozen=True, tag_field="role", tag="assistant"):
    """What the model said or called."""

    content: AssistantContent | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[AssistantCall] | None = None


class ToolMessage(msgspec.Struct, frozen=True, tag_field="role", tag="tool"):
    """What a called function gave back."""

    content: TextContent
    tool_call_id: str
    name: str | None = None


AnyMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage

FunctionName = Annotated[
    str,
    Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$", description="1 to 64 letters, digits, '_', '.' or '-'"),
]
JsonObject = Annotated[dict[str, Any], Meta(description="a JSON schema, as an object")]


class FunctionSpec(msgspec.Struct, frozen=True):
    """A function the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool; only functions exist here."""

    function: FunctionSpec
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True):
    """A function by its name."""

    name: str


class NamedChoice(msgspec.Struct, frozen=True):
    """Force one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


class SchemaSpec(msgspec.Struct, frozen=True):
    """A JSON schema with a name."""

    name: str = "response"
    schema: JsonObject | UnsetType = UNSET
    description: str | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """No constraint."""


class ObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class SchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that matches a schema."""

    json_schema: SchemaSpec


class RegexFormat(msgspec.Struct, frozen=True, tag_field="type", tag="regex"):
    """Text that matches a regular expression."""

    pattern: str


ResponseFormat = TextFormat | ObjectFormat | SchemaFormat | RegexFormat


class ChatRequest(msgspec.Struct, frozen=True):
    """The body of `/v1/chat/completions`."""

    model: fields.ModelName
    messages: Annotated[
        list[AnyMessage], Meta(min_length=1, description="an array of at least one message")
    ]
    stream: bool | None = None
    stream_options: fields.StreamOptions | None = None
    n: fields.Number | None = None
    max_tokens: fields.MaxTokens | None = None
    max_completion_tokens: fields.MaxTokens | None = None
    temperature: fields.Temperature | None = None
    top_p: fields.TopP | None = None
    top_k: fields.TopK | None = None
    min_p: fields.MinP | None = None
    repeat_penalty: fields.RepeatPenalty | None = None
    presence_penalty: fields.Penalty | None = None
    frequency_penalty: fields.Penalty | None = None
    logit_bias: fields.LogitBias | None = None
    ignore_eos: bool | None = None
    seed: fields.Seed | None = None
    stop: fields.Stop | None = None
    logprobs: bool | None = None
    top_logprobs: (
        Annotated[int, Meta(ge=0, le=20, description="an integer from 0 to 20")] | None
    ) = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: (
        Annotated[
            Literal["auto", "none", "required"] | NamedChoice,
            Meta(description="'auto', 'none', 'required' or an object that names a function"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    priority: Priority | None = None
    service_tier: fields.ServiceTier | None = None
    audio: Any = None
    modalities: list[str] | None = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None


_decoder = msgspec.json.Decoder(ChatRequest)
_encode = msgspec.json.Encoder().encode


def parse_chat(body: bytes) -> ChatRequest:
    """Decode and check a body.

    Raises:
        InvalidRequest: naming the field at fault.
    """
    request = decode_body(_decoder, body)
    refuse("audio", request.audio, "only text is generated")
    refuse("functions", request.functions, "use 'tools'")
    refuse("function_call", request.function_call, "use 'tool_choice'")
    if request.web_search_options is not None:
        refuse("web_search_options", True, "nothing here searches the web")
    if request.modalities and request.modalities != ["text"]:
        refuse("modalities", True, 'it must be ["text"]')
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if request.chat_template_kwargs:
        try:
            msgspec.msgpack.encode(request.chat_template_kwargs)
        except OverflowError as error:
            raise InvalidRequest(
                "'chat_template_kwargs' must hold integers of at most 64 bits.",
                param="chat_template_kwargs",
            ) from error
    return request


def chat_to_generate(
    request: ChatRequest, *, id: str, attempt: int, deadline: float, traceparent: str = ""
) -> Generate:
    """Translate; the prompt is rendered by the worker with the model's own template.

    Raises:
        InvalidRequest: fields that contradict each other.
    """
    tools = _tools(request)
    return Generate(
        id=id,
        attempt=attempt,
        model=request.model,
        input=ChatInput(
            messages=tuple(_message(message) for message in request.messages),
            tools=tools,
            tool_choice=_tool_choice(request, tools),
            template_kwargs=request.chat_template_kwargs or {},
        ),
        sampling=fields.sampling(
            seed=request.seed,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repeat_penalty=request.repeat_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            ignore_eos=request.ignore_eos,
        ),
        deadline=deadline,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        n=request.n or 1,
        stop=fields.stop_strings(request.stop),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        constraint=constraint(request.response_format, request.guided_regex),
        user=request.user or "",
        priority=fields.priority_of(request.priority, request.service_tier),
        traceparent=traceparent,
    )


def constraint(wanted: ResponseFormat | None, guided_regex: str | None) -> Constraint | None:
    """What the output must match.

    Raises:
        InvalidRequest: two constraints at once, or a schema format without a schema.
    """
    if guided_regex:
        if not isinstance(wanted, TextFormat | None):
            raise InvalidRequest(
                "'guided_regex' and 'response_format' exclude each other.", param="guided_regex"
            )
        return Constraint("regex", guided_regex, "guided_regex")
    if isinstance(wanted, RegexFormat):
        return Constraint("regex", wanted.pattern)
    if isinstance(wanted, ObjectFormat):
        return Constraint("json_object")
    if isinstance(wanted, SchemaFormat):
        if wanted.json_schema.schema is UNSET:
            raise InvalidRequest(
                "Missing required field 'response_format.json_schema.schema'; "
                "it must be a JSON schema, as an object.",
                param="response_format.json_schema.schema",
            )
        return Constraint("json_schema", _encode(wanted.json_schema.schema).decode())
    return None


def _message(message: AnyMessage) -> Message:
    match message:
        case SystemMessage(content=content, name=name):
            return Message("system", _text(content), name)
        case DeveloperMessage(content=content, name=name):
            return Message("developer", _text(content), name)
        case UserMessage(content=content, name=name):
            return Message("user", _text(content), name)
        case ToolMessage(content=content, name=name, tool_call_id=call):
            return Message("tool", _text(content), name, tool_call_id=call)
        case AssistantMessage():
            return Message(
                "assistant",
                _text(message.content or message.refusal or ""),
                message.name,
                tuple(
                    ToolCall(call.id, call.function.name, call.function.arguments)
                    for call in message.tool_calls or ()
                ),
            )


def _text(content: str | list[TextPart] | list[AssistantTextPart | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(
        part.refusal if isinstance(part, RefusalPart) else part.text for part in content
    )


def _tools(request: ChatRequest) -> tuple[Tool, ...]:
    tools = tuple(
        Tool(
            name=spec.function.name,
            description=spec.function.description or "",
            parameters=_encode(spec.function.parameters or {}).decode(),
            strict=bool(spec.function.strict),
        )
        for spec in request.tools or ()
    )
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(
                f"'tools[{index}].function.name' must be unique, {name!r} is there already.",
                param=f"tools[{index}].function.name",
            )
    return tools


def _tool_choice(request: ChatRequest, tools: tuple[Tool, ...]) -> ToolChoice:
    choice = request.tool_choice
    parallel = request.parallel_tool_calls is not False
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        if all(tool.name != name for tool in tools):
            raise InvalidRequest(
                f"'tool_choice' must name one of the functions in 'tools'; {name!r} is not there.",
                param="tool_choice",
            )
        return ToolChoice("named", name, parallel)
    if choice == "required" and not tools:
        raise InvalidRequest("'tool_choice' is 'required', but 'tools' is empty.", param="tools")
    return ToolChoice(choice or "auto", "", parallel)
