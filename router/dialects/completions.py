"""`/v1/completions`: the older dialect, whose body may hold many prompts, each text or tokens."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from router.dialects import fields
from router.dialects.chat import ResponseFormat, constraint
from router.dialects.fields import refuse
from router.dialects.validation import decode_body
from shared.errors import InvalidRequest
from shared.protocol import Generate, Priority, TextInput, TokenInput

__all__ = ("CompletionRequest", "completion_to_generates", "parse_completion", "prompts_of")

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default in this dialect."""
MOST_CHOICES = 128
"""Prompts times `n` in one request."""

TokenList = Annotated[list[fields.Token], Meta(min_length=1)]
Prompt = Annotated[
    str | Annotated[list[str | fields.Token | TokenList], Meta(min_length=1, max_length=1_048_576)],
    Meta(
        description="a string, an array of strings, an array of token ids, "
        "or an array of arrays of token ids"
    ),
]


class CompletionRequest(msgspec.Struct, frozen=True):
    """The body of `/v1/completions`."""

    model: fields.ModelName
    prompt: Prompt
    stream: bool | None = None
    stream_options: fields.StreamOptions | None = None
    n: fields.Number | None = None
    best_of: fields.Number | None = None
    max_tokens: fields.MaxTokens | None = None
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
    logprobs: Annotated[int, Meta(ge=0, le=5, description="an integer from 0 to 5")] | None = None
    echo: bool | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    priority: Priority | None = None
    service_tier: fields.ServiceTier | None = None


_decoder = msgspec.json.Decoder(CompletionRequest)


def parse_completion(body: bytes) -> CompletionRequest:
    """Decode and check a body.

    Raises:
        InvalidRequest: naming the field at fault.
    """
    request = decode_body(_decoder, body)
    refuse("suffix", request.suffix, "text is only generated after the prompt")
    if (request.best_of or 1) > (request.n or 1):
        raise InvalidRequest(
            "'best_of' is not supported: it must not be larger than 'n'.", param="best_of"
        )
    if request.echo:
        if request.logprobs is not None:
            raise InvalidRequest(
                "'echo' cannot be combined with 'logprobs': the prompt has none here.",
                param="echo",
            )
        if any(isinstance(prompt, TokenInput) for prompt in prompts_of(request)):
            raise InvalidRequest("'echo' needs a prompt of text, not of tokens.", param="echo")
    return request


def prompts_of(request: CompletionRequest) -> list[TextInput | TokenInput]:
    """The prompts, one a `Generate`.

    Raises:
        InvalidRequest: kinds are mixed, or there are too many.
    """
    prompts = inputs_of(request.prompt, "prompt")
    if len(prompts) * (request.n or 1) > MOST_CHOICES:
        raise InvalidRequest(
            f"'prompt': the number of prompts times 'n' must be at most {MOST_CHOICES}.",
            param="prompt",
        )
    return prompts


def inputs_of(value: str | list[str | int | list[int]], field: str) -> list[TextInput | TokenInput]:
    """Tell apart text, texts, tokens and lists of tokens.

    Raises:
        InvalidRequest: an array that mixes them.
    """
    if isinstance(value, str):
        return [TextInput(value)]
    kinds = {type(item) for item in value}
    if len(kinds) > 1:
        raise InvalidRequest(
            f"'{field}' must hold strings, or token ids, or arrays of token ids, not a mixture.",
            param=field,
        )
    if kinds == {int}:
        return [TokenInput(tuple(item for item in value if isinstance(item, int)))]
    return [
        TextInput(item) if isinstance(item, str) else TokenInput(tuple(item))
        for item in value
        if not isinstance(item, int)
    ]


def completion_to_generates(
    request: CompletionRequest, attempts: list[int], **origin: Any
) -> list[Generate]:
    """Translate: one `Generate` per prompt, all with the same seed.

    Raises:
        InvalidRequest: fields that contradict each other.
    """
    sampling = fields.sampling(
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
    )
    limit = constraint(request.response_format, request.guided_regex)
    return [
        Generate(
            attempt=attempt,
            model=request.model,
            input=prompt,
            sampling=sampling,
            max_tokens=request.max_tokens or DEFAULT_MAX_TOKENS,
            n=request.n or 1,
            stop=fields.stop_strings(request.stop),
            logprobs=request.logprobs,
            constraint=limit,
            user=request.user or "",
            priority=fields.priority_of(request.priority, request.service_tier),
            **origin,
        )
        for attempt, prompt in zip(attempts, prompts_of(request), strict=True)
    ]
