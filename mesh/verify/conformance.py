"""Whole answers and refusals are OpenAI's objects, with the right status."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from mesh.verify.check import Check
from mesh.verify.endpoint import CHAT, TEXT, Endpoint, chat_body, text_body
from mesh.verify.finding import Failed, Finding, Passed, Skipped
from mesh.verify.objects import ChatCompletion, Completion, Model, Usage

__all__ = ("CHECKS",)

COUNT = "Count from one to a hundred, in words."
_TOKENS = 8


async def models(endpoint: Endpoint) -> Finding:
    """`/models` lists the model, and `/models/NAME` tells of it."""
    listed = [model.id for model in (await endpoint.models()).data]
    # A name may be an alias, which is not listed.
    path = f"/models/{quote(endpoint.model, safe='/')}"
    found = (await endpoint.get(path)).ok(Model)
    if found.id not in listed:
        return Failed(f"GET {path} tells of {found.id!r}, which GET /models does not list")
    return Passed(f"{len(listed)} listed")


async def chat(endpoint: Endpoint) -> Finding:
    """A chat is answered with one choice that says something."""
    answer = (await endpoint.post(CHAT, chat_body(endpoint.model, COUNT, _TOKENS))).ok(
        ChatCompletion
    )
    return _one_choice(len(answer.choices), answer.text, answer.reason)


async def completions(endpoint: Endpoint) -> Finding:
    """A text is gone on with."""
    reply = await endpoint.post(TEXT, text_body(endpoint.model, "One, two, three,", _TOKENS))
    if reply.status in (404, 405, 501):
        return Skipped(f"the endpoint has no {TEXT} for this model ({reply.status})")
    answer = reply.ok(Completion)
    return _one_choice(len(answer.choices), answer.text, answer.reason)


async def usage(endpoint: Endpoint) -> Finding:
    """The tokens of an answer are counted, and no more than were asked for."""
    counted: list[Usage] = []
    for tokens in (1, _TOKENS):
        asked = chat_body(endpoint.model, COUNT, tokens)
        answer = (await endpoint.post(CHAT, asked)).ok(ChatCompletion)
        used = answer.usage
        counted.append(used)
        if used.prompt_tokens + used.completion_tokens != used.total_tokens:
            return Failed(
                f"usage: {used.prompt_tokens} + {used.completion_tokens} tokens are told as "
                f"{used.total_tokens}"
            )
        if used.prompt_tokens < 1 or not 1 <= used.completion_tokens <= tokens:
            return Failed(
                f"usage: {used.prompt_tokens} tokens of prompt and {used.completion_tokens} of an "
                f"answer of at most {tokens}"
            )
        if answer.reason == "length" and used.completion_tokens != tokens:
            return Failed(
                f"finish_reason is length after {used.completion_tokens} of {tokens} tokens"
            )
    if counted[0].prompt_tokens != counted[1].prompt_tokens:
        return Failed(
            f"usage: the same prompt has {counted[0].prompt_tokens} tokens, then "
            f"{counted[1].prompt_tokens}"
        )
    return Passed(f"{counted[1].prompt_tokens} + {counted[1].completion_tokens} tokens")


async def unknown_model(endpoint: Endpoint) -> Finding:
    """A model that is not served is a 404."""
    asked = chat_body("no-such-model-of-mesh-verify", COUNT, 1)
    error = (await endpoint.post(CHAT, asked)).refusal(404)
    if error.param not in (None, "model"):
        return Failed(f"an unknown model: param is {error.param!r}, not 'model'")
    return Passed(_words(error.code))


async def bad_value(endpoint: Endpoint) -> Finding:
    """A field out of its range is a 400 that names it."""
    return await _named(
        endpoint, chat_body(endpoint.model, COUNT, 1) | {"temperature": 5}, "temperature"
    )


async def bad_type(endpoint: Endpoint) -> Finding:
    """A field of another type is a 400 that names it."""
    return await _named(
        endpoint, chat_body(endpoint.model, COUNT, 1) | {"max_tokens": "many"}, "max_tokens"
    )


async def missing_field(endpoint: Endpoint) -> Finding:
    """A chat without messages is a 400 that names them."""
    return await _named(endpoint, {"model": endpoint.model}, "messages")


async def bad_stream(endpoint: Endpoint) -> Finding:
    """A stream that cannot be is refused with a status, before it begins."""
    asked = chat_body(endpoint.model, COUNT, 1) | {"temperature": 5, "stream": True}
    return await _named(endpoint, asked, "temperature")


async def not_json(endpoint: Endpoint) -> Finding:
    """A body that is not JSON is a 400."""
    return Passed(_words((await endpoint.post(CHAT, b'{"model": ')).refusal(400).code))


async def unknown_path(endpoint: Endpoint) -> Finding:
    """A path that is not there is a 404."""
    return Passed(_words((await endpoint.get("/no-such-path")).refusal(404).code))


async def _named(endpoint: Endpoint, asked: Mapping[str, Any], param: str) -> Finding:
    error = (await endpoint.post(CHAT, asked)).refusal(400)
    if error.param != param:
        return Failed(f"the 400 has param {error.param!r}, not {param!r}: {error.message}")
    return Passed(_words(error.code))


def _words(code: str | None) -> str:
    return code or "no code"


def _one_choice(count: int, text: str, reason: str) -> Finding:
    if count != 1:
        return Failed(f"{count} choices; 1 was asked for")
    if not text:
        return Failed(f"the answer is empty (finish_reason {reason})")
    return Passed(f"finish_reason {reason}")


CHECKS = (
    Check("conformance.models", "the model is listed", models),
    Check("conformance.chat", "a chat is answered", chat),
    Check("conformance.completions", "a text is gone on with", completions),
    Check("conformance.usage", "tokens are counted, at most max_tokens", usage),
    Check("conformance.unknown-model", "an unknown model is a 404", unknown_model),
    Check("conformance.bad-value", "a value out of range is a 400 with its param", bad_value),
    Check("conformance.bad-type", "a wrong type is a 400 with its param", bad_type),
    Check("conformance.missing-field", "missing messages are a 400 with param", missing_field),
    Check("conformance.bad-stream", "a bad stream is refused before it begins", bad_stream),
    Check("conformance.not-json", "a body that is not JSON is a 400", not_json),
    Check("conformance.unknown-path", "an unknown path is a 404", unknown_path),
)
