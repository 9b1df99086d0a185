"""The link between the agent and one engine process: a Unix socket with length-prefixed msgpack.

The agent starts `python -m worker.engine` with one end of a socketpair as a file descriptor and the
encoded `EngineConfig` as its first message. All that one engine step emits arrives as one `Step`,
with the frames for each router already encoded, so that the agent only relays bytes.
"""

import struct
from typing import Any, Literal

import msgspec

__all__ = (
    "LENGTH",
    "MOST_CONTEXT",
    "BatchInvariance",
    "CancelAttempts",
    "EngineConfig",
    "EngineStats",
    "Failed",
    "FromEngine",
    "Join",
    "Loading",
    "Mail",
    "Ready",
    "RingOver",
    "RingPlace",
    "Step",
    "Stop",
    "Submit",
    "ToEngine",
    "decode_from_engine",
    "decode_to_engine",
    "pack",
)

LENGTH = struct.Struct("<I")
"""Prefix of every message: its length in bytes."""

MOST_CONTEXT = 4096
"""Tokens a sequence gets by default at most, however long the model was trained."""

BatchInvariance = Literal["auto", "on", "off"]
"""Whether logits are to be the same in any company; `auto`: where the weights have 32 bits."""


class RingPlace(msgspec.Struct, frozen=True):
    """Where an engine stands in a ring of stages (`shared.pipeline`)."""

    group: str
    """Names this life of the ring; one token of a subject."""
    workers: tuple[str, ...]
    """Of all stages in their order; the last one is the head."""
    index: int
    """This one's."""
    nats: str
    """URL of the server with the ring user's name and password: a secret."""
    identity: str
    """That user."""
    half: bool = False
    """Send activations with 16 bits a number, not 32."""
    timeout: float = 10.0
    """Seconds after which a stage that does not answer is lost."""

    @property
    def head(self) -> bool:
        """Whether this is the last stage."""
        return self.index == len(self.workers) - 1

    def __repr__(self) -> str:
        return f"RingPlace({self.group!r}, {self.workers!r}, {self.index})"


class EngineConfig(msgspec.Struct, frozen=True, tag="config"):
    """Everything an engine process needs to load and serve one model."""

    path: str
    model: str
    worker: str
    slots: int = 8
    context: int = 0
    """Tokens one sequence may use; 0: what the model was trained with, at most 4096."""
    threads: int = 0
    """Threads for decode; 0: the cores this process may use, one left to the rest if it can be."""
    prefill_threads: int = 0
    """0: as `threads`."""
    gpu_layers: int | None = 0
    """Negative: all; None: as many as fit into what GPUs have free."""
    step_tokens: int = 512
    """Most tokens in one decode call."""
    kv_tokens: int = 0
    """Cells of the KV cache, all sequences together; 0: slots x context, at most what
    `memory_limit` leaves."""
    memory_limit: int = 0
    """Bytes; 0: none."""
    chat_template: str = ""
    """Overrides the model's own Jinja template."""
    embeddings: bool = True
    draft: str = ""
    """Path of the draft model; empty: none."""
    speculation: Literal["auto", "ngram", "off"] = "auto"
    """`auto`: draft model and n-gram lookup; `ngram`: lookup alone."""
    batch_invariant: BatchInvariance = "auto"
    ngram_memory: int = 1 << 20
    """Tokens kept across requests for n-gram lookup; 0: only a request's own are searched."""
    prefix_memory: int = 0
    """Bytes of host memory for the KV of retired sequences whose slots were needed; 0: none."""
    ring: RingPlace | None = None
    """Of a stage, whose file `path` is; None: the whole model."""


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """A request as it came off the wire; frames go to `reply`."""

    reply: str
    request: bytes
    received: float
    """time.time() at arrival, from which queue time is counted."""


class CancelAttempts(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Free the slots of these attempts at the end of the running step."""

    attempts: tuple[int, ...]


class Join(msgspec.Struct, frozen=True, array_like=True, tag="j"):
    """Take part in another ring, with empty caches; the one that it is in is over, or is to be.

    What was submitted before is nobody's any more, and nothing is told of it.
    """

    place: RingPlace


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="x"):
    """End the process; what runs is abandoned (the agent drains before)."""


ToEngine = EngineConfig | Submit | CancelAttempts | Join | Stop


class Loading(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """Progress of the load, 0 to 1."""

    progress: float


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """The model has generated a real token. `context` and `slots` are what was really set up."""

    context: int
    slots: int
    threads: int
    description: str = ""
    load_seconds: float = 0.0
    embeddings: bool = True
    advice: str = ""
    group: str = ""
    """The ring that it is ready for; empty: the engine is not part of one."""


class Mail(msgspec.Struct, frozen=True, array_like=True):
    """Encoded frames for one router, to be published on `reply`."""

    reply: str
    frames: bytes


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Load after a step. Counters are cumulative since the start of the process."""

    running: int
    waiting: int
    kv_used: float
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    preemptions: int = 0
    drafted_at: tuple[int, ...] = ()
    """Draft tokens verified, by their position in the draft."""
    accepted_at: tuple[int, ...] = ()
    gain: float = 1.0
    """Tokens/s of the steps that speculated over what the same sequences would have had without."""


class Step(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """What one step emitted, and the attempts that are over (their slots are free).

    The load is told when an attempt ends, and now and then.
    """

    mail: tuple[Mail, ...]
    ended: tuple[int, ...]
    stats: EngineStats | None = None
    started: tuple[int, ...] = ()
    """Attempts that wait no more: they have a slot."""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """The model cannot be served; one clear line. The process exits after it."""

    message: str


class RingOver(msgspec.Struct, frozen=True, array_like=True, tag="o"):
    """The engine's ring is over; what is loaded stays so, and waits for `Join` or `Stop`."""

    group: str
    reason: str


FromEngine = Loading | Ready | Step | RingOver | Failed

_to_engine: msgspec.msgpack.Decoder[Submit | CancelAttempts | Join | Stop] = (
    msgspec.msgpack.Decoder(Submit | CancelAttempts | Join | Stop)
)
_config = msgspec.msgpack.Decoder(EngineConfig)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(
    Loading | Ready | Step | RingOver | Failed
)
_encoder = msgspec.msgpack.Encoder()


def pack(message: Any) -> bytes:
    """Encode a message with its length before it."""
    data = _encoder.encode(message)
    return LENGTH.pack(len(data)) + data


def decode_config(data: bytes) -> EngineConfig:
    """Decode the first message an engine gets; raises msgspec.DecodeError."""
    return _config.decode(data)


def decode_to_engine(data: bytes) -> Submit | CancelAttempts | Join | Stop:
    """Decode one message from the agent, without its length; raises msgspec.DecodeError."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Decode one message from an engine, without its length; raises msgspec.DecodeError."""
    return _from_engine.decode(data)
