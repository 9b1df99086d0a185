"""Which conversation a request belongs to, and roughly how long its prompt is.

A conversation is known by what stays the same from turn to turn: `prompt_cache_key` where the
client gives one, else how its prompt begins. All routers must come to the same key, and requests of
different owners never share one on purpose: nobody can push another's conversations onto one
worker by guessing a name.
"""

from shared.hash_ring import hash_key
from shared.protocol import ChatInput, Embed, Generate, Request, TokenInput

__all__ = ("BYTES_PER_TOKEN", "conversation_key", "has_begun", "rough_tokens")

PART = 512
"""Characters of a message's start, and as many of its end, that tell it from others."""
BEGINNING = 256
"""Characters or tokens of a bare prompt: it may be a conversation that grows."""
BYTES_PER_TOKEN = 4


def conversation_key(request: Request, cache_key: str = "") -> int | None:
    """The request's place on the ring; None: nothing of it will be asked again."""
    if isinstance(request, Embed):
        return None
    return hash_key(f"{request.owner}\0{cache_key or _beginning(request)}".encode())


def has_begun(request: Request) -> bool:
    """Whether nothing was answered in this conversation yet, as far as can be told."""
    if isinstance(request, Embed) or not isinstance(request.input, ChatInput):
        return True
    return all(message.role != "assistant" for message in request.input.messages)


def rough_tokens(request: Request) -> int:
    """The length of the prompt in tokens, exact for tokens, else by the usual 4 letters a token."""
    if isinstance(request, Embed):
        return max(
            len(given.tokens)
            if isinstance(given, TokenInput)
            else len(given.text) // BYTES_PER_TOKEN
            for given in request.inputs
        )
    prompt = request.input
    if isinstance(prompt, TokenInput):
        return len(prompt.tokens)
    if isinstance(prompt, ChatInput):
        return sum(len(message.content) for message in prompt.messages) // BYTES_PER_TOKEN
    return len(prompt.text) // BYTES_PER_TOKEN


def _beginning(request: Generate) -> str:
    prompt = request.input
    if isinstance(prompt, TokenInput):
        return ",".join(map(str, prompt.tokens[:BEGINNING]))
    if not isinstance(prompt, ChatInput):
        return prompt.text[:BEGINNING]
    parts: list[str] = []
    for message in prompt.messages:
        content = message.content
        if len(content) > 2 * PART:
            content = f"{len(content)} {content[:PART]}{content[-PART:]}"
        parts.append(f"{message.role}\0{content}")
        if message.role == "user":
            break
    return "\0".join(parts)
