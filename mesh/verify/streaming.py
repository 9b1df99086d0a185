"""Streams are server-sent events in OpenAI's order, and say what the whole answer says."""

from mesh.verify.check import Check
from mesh.verify.conformance import COUNT
from mesh.verify.endpoint import CHAT, TEXT, Endpoint, chat_body, data_of, text_body
from mesh.verify.finding import Failed, Fault, Finding, Passed, Skipped
from mesh.verify.objects import ChatChunk, ChatCompletion, Completion, CompletionChunk, read

__all__ = ("CHECKS",)

_TOKENS = 24
_TRIES = 2
"""A near tie of two tokens may fall otherwise where other requests are computed beside."""


async def framing(endpoint: Endpoint) -> Finding:
    """Events of `data:` and an empty line, of one id, the last of them `[DONE]`."""
    streamed = await endpoint.stream(CHAT, chat_body(endpoint.model, COUNT, _TOKENS))
    chunks = [read(data, ChatChunk, "an event of the stream") for data in data_of(streamed)]
    if streamed.content_type.partition(";")[0].strip() != "text/event-stream":
        return Failed(f"content-type is {streamed.content_type!r}, not 'text/event-stream'")
    if len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) != 1:
        return Failed("id, created or model change within the stream")
    return Passed(f"{len(chunks)} chunks and [DONE]")


async def role(endpoint: Endpoint) -> Finding:
    """The role comes once, with the first chunk."""
    roles = [
        (place, choice.delta.role)
        for place, chunk in enumerate(await _chat(endpoint))
        for choice in chunk.choices
        if choice.delta.role is not None
    ]
    if roles != [(0, "assistant")]:
        said = ", ".join(f"{name!r} in chunk {place}" for place, name in roles)
        return Failed(f"roles: {said or 'none'}; wanted 'assistant', in chunk 0 only")
    return Passed("in the first chunk")


async def finish(endpoint: Endpoint) -> Finding:
    """A finish_reason comes once, behind all the text."""
    reasons: list[str] = []
    for chunk in await _chat(endpoint):
        if reasons and chunk.text:
            return Failed(f"text comes behind finish_reason {reasons[0]}")
        reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
    if len(reasons) != 1:
        return Failed(f"{len(reasons)} chunks have a finish_reason; wanted one")
    return Passed(reasons[0])


async def usage(endpoint: Endpoint) -> Finding:
    """With include_usage the last chunk has it, and no choices; else no chunk has."""
    asked = await _chat(endpoint, stream_options={"include_usage": True})
    plain = await _chat(endpoint)
    last = asked[-1]
    if last.usage is None or last.choices:
        return Failed("include_usage: the last chunk before [DONE] has no usage, or has choices")
    if sum(chunk.usage is not None for chunk in asked) != 1:
        return Failed("include_usage: more than one chunk has a usage")
    used = last.usage
    if used.prompt_tokens + used.completion_tokens != used.total_tokens:
        return Failed(
            f"include_usage: {used.prompt_tokens} + {used.completion_tokens} tokens are told as "
            f"{used.total_tokens}"
        )
    whole = await _answer(endpoint)
    if whole.usage.prompt_tokens != used.prompt_tokens:
        return Failed(
            f"the prompt has {used.prompt_tokens} tokens in a stream, "
            f"{whole.usage.prompt_tokens} in a whole answer"
        )
    if any(chunk.usage is not None for chunk in plain):
        return Failed("a chunk has a usage without include_usage")
    return Passed(f"{used.prompt_tokens} + {used.completion_tokens} tokens")


async def text(endpoint: Endpoint) -> Finding:
    """The pieces make the whole answer, at temperature 0 with the same seed."""
    for _ in range(_TRIES):
        streamed = "".join(chunk.text for chunk in await _chat(endpoint))
        whole = (await _answer(endpoint)).text
        if streamed == whole:
            return Passed(f"{len(whole)} characters")
    return Failed(_difference(streamed, whole))


async def completions(endpoint: Endpoint) -> Finding:
    """The same for a text that is gone on with."""
    asked = text_body(endpoint.model, "One, two, three,", _TOKENS)
    for _ in range(_TRIES):
        reply = await endpoint.post(TEXT, asked)
        if reply.status in (404, 405, 501):
            return Skipped(f"the endpoint has no {TEXT} for this model ({reply.status})")
        whole = reply.ok(Completion).text
        data = data_of(await endpoint.stream(TEXT, asked))
        chunks = [read(piece, CompletionChunk, "an event of the stream") for piece in data]
        streamed = "".join(chunk.text for chunk in chunks)
        if streamed == whole:
            return Passed(f"{len(whole)} characters")
    return Failed(_difference(streamed, whole))


async def _chat(endpoint: Endpoint, **more: object) -> list[ChatChunk]:
    asked = chat_body(endpoint.model, COUNT, _TOKENS, **more)
    data = data_of(await endpoint.stream(CHAT, asked))
    if not data:
        raise Fault("the stream has no event but [DONE]")
    return [read(piece, ChatChunk, "an event of the stream") for piece in data]


async def _answer(endpoint: Endpoint) -> ChatCompletion:
    asked = chat_body(endpoint.model, COUNT, _TOKENS)
    return (await endpoint.post(CHAT, asked)).ok(ChatCompletion)


def _difference(streamed: str, whole: str) -> str:
    pairs = zip(streamed, whole, strict=False)
    place = next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(streamed), len(whole))
    )
    return (
        f"the stream says other than the whole answer from character {place} on: "
        f"{streamed[place:][:30]!r}, not {whole[place:][:30]!r}"
    )


CHECKS = (
    Check("streaming.framing", "events are framed, of one id, and end with [DONE]", framing),
    Check("streaming.role", "the role comes once, first", role),
    Check("streaming.finish", "a finish_reason comes once, last", finish),
    Check("streaming.usage", "usage comes if it is asked for", usage),
    Check("streaming.text", "a stream says what the whole answer says", text),
    Check("streaming.completions", "the same for completions", completions),
)
