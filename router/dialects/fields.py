"""The types of fields that several dialects share: each range is written once, here."""

from random import getrandbits
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from shared.errors import InvalidRequest
from shared.protocol import Priority, Sampling

__all__ = (
    "LogitBias",
    "MaxTokens",
    "MinP",
    "ModelName",
    "Number",
    "Penalty",
    "RepeatPenalty",
    "Seed",
    "ServiceTier",
    "Stop",
    "StreamOptions",
    "Temperature",
    "Token",
    "TopK",
    "TopP",
    "priority_of",
    "refuse",
    "sampling",
    "stop_strings",
)

SEED_MASK = (1 << 63) - 1

ModelName = Annotated[
    str, Meta(min_length=1, max_length=256, description="a model's name, 1 to 256 characters long")
]
Temperature = Annotated[float, Meta(ge=0, le=2, description="a number from 0 to 2")]
TopP = Annotated[float, Meta(gt=0, le=1, description="a number above 0 and at most 1")]
TopK = Annotated[int, Meta(ge=0, le=1_000_000, description="an integer of at least 0 (0: off)")]
MinP = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
RepeatPenalty = Annotated[float, Meta(gt=0, le=100, description="a number above 0, at most 100")]
Penalty = Annotated[float, Meta(ge=-2, le=2, description="a number from -2 to 2")]
Number = Annotated[int, Meta(ge=1, le=8, description="an integer from 1 to 8")]
MaxTokens = Annotated[
    int, Meta(ge=1, le=2**31 - 1, description="an integer from 1 to 2147483647 (tokens)")
]
Seed = Annotated[int, Meta(description="an integer")]
Token = Annotated[int, Meta(ge=0, le=2**31 - 1, description="a token id, an integer of at least 0")]
BiasKey = Annotated[int, Meta(ge=0, le=999_999_999)]
LogitBias = Annotated[
    dict[BiasKey, Annotated[float, Meta(ge=-100, le=100, description="a number from -100 to 100")]],
    Meta(
        description="an object of token ids to numbers from -100 to 100",
        # msgspec checks the keys by their type, but does not describe them.
        extra_json_schema={"propertyNames": {"pattern": "^[0-9]{1,9}$"}},
    ),
]
StopString = Annotated[str, Meta(min_length=1, description="a string that is not empty")]
Stop = Annotated[
    str | Annotated[list[StopString], Meta(max_length=16)],
    Meta(description="a string or an array of at most 16 non-empty strings"),
]


ServiceTier = Annotated[
    str, Meta(max_length=64, description="a string; 'flex' asks for the priority 'batch'")
]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream tells beside the text."""

    include_usage: bool | None = None


def priority_of(priority: Priority | None, service_tier: str | None) -> Priority:
    """The request's priority; without one, OpenAI's cheap tier is batch and all others are not."""
    return priority or ("batch" if service_tier == "flex" else "interactive")


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; an empty string means none, as clients send it."""
    if not stop:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def sampling(
    *,
    seed: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repeat_penalty: float | None,
    presence_penalty: float | None,
    frequency_penalty: float | None,
    logit_bias: dict[int, float] | None,
    ignore_eos: bool | None,
) -> Sampling:
    """Fill in OpenAI's defaults; without a seed, a random one."""
    return Sampling(
        seed=getrandbits(63) if seed is None else seed & SEED_MASK,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=top_k or 0,
        min_p=min_p or 0.0,
        repeat_penalty=1.0 if repeat_penalty is None else repeat_penalty,
        presence_penalty=presence_penalty or 0.0,
        frequency_penalty=frequency_penalty or 0.0,
        logit_bias=logit_bias or {},
        ignore_eos=bool(ignore_eos),
    )


def refuse(field: str, value: Any, instead: str) -> None:
    """Refuse a known field that cannot be honoured; null, false and empty ones ask for nothing.

    Raises:
        InvalidRequest: the field asks for something.
    """
    if value:
        raise InvalidRequest(f"'{field}' is not supported: {instead}.", param=field)
