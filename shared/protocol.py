"""What travels for a request: the request itself, frames back, cancellations.

All of it is msgpack; beats are in `shared.presence`. Structs on the token path are array-like:
fields may only be appended, never reordered. Decoders ignore what they do not know, so that
versions can be mixed during an upgrade.

Life of a request. The router publishes a `Generate` or `Embed` with a reply subject of its own
inbox. The worker answers `Accepted` (naming itself, for cancellation) or `Busy`. Then come `Delta`
frames, one `Done` a choice, and one `End`; or a single `Fail` at any point. A message on a reply
subject holds a list of frames of any of that router's requests. Frames name their attempt, a random
63-bit number known only to the router and the chosen worker.
"""

from typing import Any, Literal

import msgspec

from shared import bounds
from shared.decoding import decoded
from shared.prompt import ChatInput, Message, TextInput, TokenInput, Tool, ToolCall, ToolChoice

__all__ = (
    "VERSION",
    "Accepted",
    "Busy",
    "Cancel",
    "ChatInput",
    "Chunk",
    "Constraint",
    "Delta",
    "Done",
    "Embed",
    "EmbedResult",
    "End",
    "Fail",
    "Frame",
    "Generate",
    "Had",
    "Handback",
    "Message",
    "Priority",
    "Reading",
    "Request",
    "Resumed",
    "Sampling",
    "TextInput",
    "Timings",
    "TokenInput",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "ToolDelta",
    "Usage",
    "decode_cancel",
    "decode_chunk",
    "decode_frames",
    "decode_request",
    "encode",
)

VERSION = "1"
"""Value of the `Mesh-Version` header; a worker refuses a request of another major version."""


Priority = Literal["interactive", "batch"]
"""`batch` may wait for those that are `interactive`."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a token is drawn. The draw of token i depends on (seed, choice, i) and nothing else."""

    seed: int
    temperature: bounds.Temperature = 1.0
    top_p: bounds.Probability = 1.0
    top_k: bounds.Count = 0
    """0: off."""
    min_p: bounds.Probability = 0.0
    repeat_penalty: bounds.Positive = 1.0
    presence_penalty: bounds.Number = 0.0
    frequency_penalty: bounds.Number = 0.0
    logit_bias: dict[int, bounds.Bias] = {}
    ignore_eos: bool = False


class Constraint(msgspec.Struct, frozen=True):
    """What the output must match; `value` is a JSON schema, a regex, or a Lark grammar as text."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    value: str = ""
    param: str = "response_format"
    """The field of the request that asked for it, which an error names."""


class Resumed(msgspec.Struct, frozen=True, array_like=True):
    """What earlier attempts brought of one choice, text and all, to its router.

    The worker takes the tokens as if it had drawn them, tells nothing of them, and goes on at the
    next index. What the earlier worker had sampled but held back (part of a character, of a stop
    string, of a tool call) follows from the tokens, and comes with those that complete it.
    """

    tokens: tuple[bounds.Token, ...] = ()
    """Empty for a choice that is done."""
    done: int = -1
    """Tokens of the choice, if its `Done` has come; else -1."""


class Had(msgspec.Struct, frozen=True, array_like=True):
    """What the client has of one choice, from a connection that it has lost."""

    count: bounds.Count = 0
    """So many tokens, with all the text that they made certain."""
    check: bounds.Count = 0
    """Of their ids (`shared.token_check`)."""
    whole: bool = False
    """And the text that only the end made certain: nothing but the end may follow."""
    done: bool = False
    """And why it ended."""


class Reading(msgspec.Struct, frozen=True, omit_defaults=True):
    """The client may lose its connection and go on reading on another one.

    Its worker keeps the tokens for a while. When the request comes again with `had`, it tells the
    tokens that the client has without their text, so that the router knows them, and goes on as it
    would have; a worker that has not kept them generates them once more, and compares.
    """

    key: int
    """Under which, and the owner, the tokens are kept: 63 random bits that only the client knows.
    """
    had: tuple[Had, ...] = ()
    """One a choice; empty: the answer begins."""
    worker: str = ""
    """Who had the answer when the client lost it: routers ask there first."""


class Generate(msgspec.Struct, frozen=True, tag="generate", omit_defaults=True):
    """One generation request, free of any dialect."""

    id: str
    """X-Request-Id."""
    attempt: int
    """Random, 63 bits, secret between this router and the worker that takes it."""
    model: str
    input: ChatInput | TextInput | TokenInput
    sampling: Sampling
    deadline: bounds.UnixTime
    """Unix time in seconds after which nobody wants the answer."""
    max_tokens: bounds.Count | None = None
    """Per choice; None: whatever the context leaves."""
    n: bounds.Choices = 1
    stop: tuple[bounds.Stop, ...] = ()
    logprobs: bounds.Listed | None = None
    """None: off; k: the chosen token's and the k most likely ones'."""
    constraint: Constraint | None = None
    user: str = ""
    owner: str = ""
    """Whose request it is, as a hash of API key and user; empty: nobody's. What is kept across
    requests for speculation is kept apart by it, and those who wait take turns by it."""
    traceparent: str = ""
    body_size: bounds.Count = 0
    """Set only in the head of a request whose body follows in chunks: its bytes in all."""
    resume: tuple[Resumed, ...] = ()
    """Empty at first; else one a choice."""
    reading: Reading | None = None
    """None: the answer is lost with the client's connection."""
    priority: Priority = "interactive"


class Embed(msgspec.Struct, frozen=True, tag="embed", omit_defaults=True):
    """Embeddings of one or more inputs."""

    id: str
    attempt: int
    model: str
    inputs: tuple[TextInput | TokenInput, ...]
    deadline: bounds.UnixTime
    dimensions: int | None = None
    user: str = ""
    traceparent: str = ""
    body_size: bounds.Count = 0
    owner: str = ""
    """As in `Generate`."""
    priority: Priority = "interactive"


Request = Generate | Embed


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A piece of an encoded request whose head announced `body_size` > 0; `index` from 0."""

    attempt: int
    index: int
    data: bytes


class Cancel(msgspec.Struct, frozen=True, array_like=True):
    """The clients of these attempts have left."""

    attempts: tuple[int, ...]


class Accepted(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="a"):
    """The worker has taken the attempt: it runs, or waits as number `position` in the queue."""

    attempt: int
    worker: bounds.Name
    position: bounds.Count = 0


class Busy(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="b"):
    """The worker does not take it; nothing was kept. `retry_after` is a guess in seconds."""

    attempt: int
    worker: bounds.Name
    retry_after: bounds.Wait = 1.0
    reason: str = "full"
    """`full`, `late` (the queue is longer than the request's time), `draining`, `unknown_model`."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token with its natural log probability; `text` is lossy UTF-8, `data` the exact bytes."""

    token: int
    logprob: float
    text: str
    data: bytes
    top: tuple["TokenLogprob", ...] = ()


class ToolDelta(msgspec.Struct, frozen=True, array_like=True):
    """A piece of tool call number `index`; `id` and `name` come with its first piece only."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="d"):
    """New tokens of one choice.

    `first` is the index of `tokens[0]` in the choice's output. Text may lag behind tokens (a
    character or a stop string may span them), so `text` can be empty, and is empty while a tool
    call is being written. What the tokens make certain comes with them; what only the end of the
    answer makes certain comes in one more frame, without tokens, before `Done`.
    """

    attempt: int
    choice: int
    first: int
    tokens: tuple[bounds.Token, ...]
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    tools: tuple[ToolDelta, ...] = ()
    reasoning: str = ""


class Done(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="o"):
    """A choice is complete after `count` tokens; `stopped_by` is the stop string that ended it."""

    attempt: int
    choice: int
    count: int
    reason: Literal["stop", "length", "tool_calls"]
    stopped_by: str = ""


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Tokens; `cached` are those of the prompt whose KV was reused."""

    prompt: bounds.Count
    completion: bounds.Count
    cached: bounds.Count = 0
    drafted: bounds.Count = 0
    accepted: bounds.Count = 0


class Timings(msgspec.Struct, frozen=True, array_like=True):
    """Milliseconds on the worker; of a resumed answer, on the worker that ended it."""

    queue_ms: bounds.Amount
    prefill_ms: bounds.Amount
    decode_ms: bounds.Amount
    replayed: bounds.Count = 0
    """Tokens of the answer that earlier attempts had brought, in which no time of these went."""
    resumed: int = 0
    """How often the answer went on on another attempt; told by the router."""


class End(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="e"):
    """The last frame of a generation."""

    attempt: int
    usage: Usage
    timings: Timings


class EmbedResult(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="v"):
    """The last frame of an embedding: per input little-endian float32s, unit length."""

    attempt: int
    vectors: tuple[bytes, ...]
    usage: Usage


class Fail(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="f"):
    """The attempt ends without an answer; `code` is one of `shared.errors`."""

    attempt: int
    code: str
    message: str
    param: str | None = None
    retry_after: int | None = None
    lost: bool = False
    """Nothing is wrong with the request: another attempt may bring it to its end."""


class Handback(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="h"):
    """The worker lets the model go: the router may take the attempt elsewhere, and cancel it here.

    An offer, made again every second: until it is taken the attempt goes on as if nothing were.
    """

    attempt: int


Frame = Accepted | Busy | Delta | Done | End | EmbedResult | Fail | Handback


_encoder = msgspec.msgpack.Encoder()
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Generate | Embed)
_frames = msgspec.msgpack.Decoder(
    tuple[Accepted | Busy | Delta | Done | End | EmbedResult | Fail | Handback, ...]
)
_cancel = msgspec.msgpack.Decoder(Cancel)
_chunk = msgspec.msgpack.Decoder(Chunk)


def encode(value: Any) -> bytes:
    """Encode a request, a list of frames, a chunk or a cancellation as msgpack."""
    return _encoder.encode(value)


def decode_request(data: bytes) -> Request:
    """Decode a request.

    Raises:
        msgspec.DecodeError: not msgpack, or (ValidationError) not a request.
    """
    return decoded(_request, data)


def decode_frames(data: bytes) -> tuple[Frame, ...]:
    """Decode the list of frames that one message holds; raises as `decode_request`."""
    return decoded(_frames, data)


def decode_cancel(data: bytes) -> Cancel:
    """Decode a cancellation; raises as `decode_request`."""
    return decoded(_cancel, data)


def decode_chunk(data: bytes) -> Chunk:
    """Decode a chunk of a large body; raises as `decode_request`."""
    return decoded(_chunk, data)
