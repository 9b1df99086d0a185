"""`/v1/embeddings`: inputs as text or tokens, vectors as numbers or as base64 of float32s."""

import sys
from array import array
from base64 import b64encode
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from router.dialects import fields
from router.dialects.answer import Completed, encode
from router.dialects.completions import TokenList, inputs_of
from router.dialects.validation import decode_body
from shared.errors import InvalidRequest
from shared.protocol import Delta, Done, Embed, EmbedResult, Priority

__all__ = (
    "EmbeddingAnswer",
    "EmbeddingList",
    "EmbeddingRequest",
    "embedding_to_embed",
    "parse_embedding",
)

MOST_INPUTS = 2048

Text = Annotated[str, Meta(min_length=1, description="a string that is not empty")]
Input = Annotated[
    Text | Annotated[list[Text | fields.Token | TokenList], Meta(min_length=1)],
    Meta(
        description="a string, an array of strings, an array of token ids, "
        "or an array of arrays of token ids, none of them empty"
    ),
]


class EmbeddingRequest(msgspec.Struct, frozen=True):
    """The body of `/v1/embeddings`."""

    model: fields.ModelName
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: (
        Annotated[int, Meta(ge=1, le=65_536, description="an integer from 1 to 65536")] | None
    ) = None
    user: str | None = None
    priority: Priority | None = None
    service_tier: fields.ServiceTier | None = None


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """OpenAI's usage of embeddings."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(msgspec.Struct, frozen=True):
    """The vector of one input: numbers, or base64 of little-endian float32s."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(msgspec.Struct, frozen=True):
    """The answer of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


_decoder = msgspec.json.Decoder(EmbeddingRequest)


def parse_embedding(body: bytes) -> EmbeddingRequest:
    """Decode and check a body.

    Raises:
        InvalidRequest: naming the field at fault.
    """
    return decode_body(_decoder, body)


def embedding_to_embed(request: EmbeddingRequest, attempt: int, **origin: Any) -> Embed:
    """Translate.

    Raises:
        InvalidRequest: inputs of mixed kinds, or too many.
    """
    inputs = inputs_of(request.input, "input")
    if len(inputs) > MOST_INPUTS:
        raise InvalidRequest(
            f"'input' must hold at most {MOST_INPUTS} inputs, not {len(inputs)}.", param="input"
        )
    return Embed(
        attempt=attempt,
        model=request.model,
        inputs=tuple(inputs),
        dimensions=request.dimensions,
        user=request.user or "",
        priority=fields.priority_of(request.priority, request.service_tier),
        **origin,
    )


class EmbeddingAnswer:
    """Renders one list of embeddings."""

    def __init__(self, model: str, *, as_base64: bool) -> None:
        self._model = model
        self._render = _as_base64 if as_base64 else _as_numbers

    def delta(self, part: int, frame: Delta) -> bytes:
        """Nothing comes piecewise here."""
        return b""

    def done(self, part: int, frame: Done) -> bytes:
        """Nothing has choices here."""
        return b""

    def finish(self, ends: list[Completed]) -> bytes:
        """Render the answer."""
        vectors = [v for end in ends if isinstance(end, EmbedResult) for v in end.vectors]
        tokens = sum(end.usage.prompt for end in ends)
        return encode(
            EmbeddingList(
                object="list",
                data=[
                    EmbeddingObject("embedding", index, self._render(vector))
                    for index, vector in enumerate(vectors)
                ],
                model=self._model,
                usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
            )
        )


def _as_base64(vector: bytes) -> str:
    return b64encode(vector).decode()


def _as_numbers(vector: bytes) -> list[float]:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
