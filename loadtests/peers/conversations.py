"""Part "conversations": more conversations than slots, and how much of each is still known.

Conversations take their turns round robin, as many at once as there are slots. A turn could reuse
what the turn before it left: its prompt and its answer. How much of that was reused is counted by
what each system says of itself in `usage.prompt_tokens_details.cached_tokens`.
"""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from loadtests.figures import markdown
from loadtests.http_reply import Reply
from loadtests.peers.asking import PartFailed, ask_all, cached_tokens, chat, milliseconds
from loadtests.peers.systems import System
from loadtests.peers.texts import Message, Texts, assistant, user

__all__ = (
    "ConversationsRow",
    "Talk",
    "conversations_table",
    "measure_conversations",
    "possible_tokens",
)

ANSWER_TOKENS = 32

now = time.monotonic


class ConversationsRow(msgspec.Struct, frozen=True, tag_field="part", tag="conversations"):
    """One system over all turns."""

    system: str
    conversations: int
    turns: int
    slots: int
    prompt_tokens: int
    """Of all turns."""
    possible_tokens: int
    """Of them, those that an earlier turn of the same conversation had computed."""
    hit_tokens: int
    """Of those, the ones that were not computed again."""
    later_p50: float
    """Milliseconds from sending to the end, of turns after the first."""
    seconds: float


def possible_tokens(before: int, answered: int, prompt: int) -> int:
    """Tokens of a prompt that the turn before left in a KV cache, at most.

    The last token of an answer of `answered` tokens is drawn but never computed, and of the new
    prompt at least one token is computed for its logits.
    """
    return max(0, min(before + answered - 1, prompt - 1))


class Talk:
    """One conversation, and what became of its turns."""

    def __init__(self, texts: Texts) -> None:
        self.messages: list[Message] = [texts.document(40)]
        self.prompt = self.possible = self.hit = 0
        self.later: list[float] = []
        self._texts = texts
        self._before = self._answered = 0

    def ask(self) -> list[Message]:
        """Say something; returns the whole conversation."""
        self.messages.append(user(self._texts.task()))
        return self.messages

    def take(self, reply: Reply) -> None:
        """Take the answer into the conversation and count what was reused for it."""
        body: dict[str, Any] = msgspec.json.decode(reply.text)
        usage = reply.usage
        prompt = int(usage["prompt_tokens"])
        if self._before:
            possible = possible_tokens(self._before, self._answered, prompt)
            self.possible += possible
            # templates begin alike for all: what is shared with others is not counted
            self.hit += min(possible, cached_tokens(reply))
            self.later.append(reply.total)
        self.prompt += prompt
        self._before, self._answered = prompt, int(usage["completion_tokens"])
        self.messages.append(assistant(body["choices"][0]["message"]["content"] or ""))


async def measure_conversations(
    systems: Sequence[System], *, conversations: int, turns: int, slots: int
) -> AsyncIterator[ConversationsRow]:
    """Let each system in turn hold all conversations; each answers in its own words.

    Raises:
        PartFailed: a request failed.
    """
    for system in systems:
        talks = [Talk(Texts(seed=5000 + number)) for number in range(conversations)]
        started = now()
        for _ in range(turns):
            requests = [
                chat(system, talk.ask(), ANSWER_TOKENS, ignore_eos=False, stream=False)
                for talk in talks
            ]
            replies = await ask_all(system, requests, at_once=slots)
            for talk, reply in zip(talks, replies, strict=True):
                talk.take(reply)
        later = [seconds for talk in talks for seconds in talk.later]
        if not later:
            raise PartFailed("conversations: at least two turns are needed to reuse anything")
        yield ConversationsRow(
            system=system.name,
            conversations=conversations,
            turns=turns,
            slots=slots,
            prompt_tokens=sum(talk.prompt for talk in talks),
            possible_tokens=sum(talk.possible for talk in talks),
            hit_tokens=sum(talk.hit for talk in talks),
            later_p50=milliseconds(later, 0.5),
            seconds=now() - started,
        )


def conversations_table(rows: Sequence[ConversationsRow]) -> str:
    """One line a system."""
    heads = (
        "system",
        "conversations x turns, slots",
        "prompt tokens",
        "could be reused",
        "were reused",
        "hit / possible",
        "later turn p50, ms",
        "all, s",
    )
    return markdown(
        heads,
        [
            (
                row.system,
                f"{row.conversations} x {row.turns}, {row.slots}",
                f"{row.prompt_tokens:,}",
                f"{row.possible_tokens:,}",
                f"{row.hit_tokens:,}",
                f"{row.hit_tokens / max(1, row.possible_tokens):.3f}",
                f"{row.later_p50:.0f}",
                f"{row.seconds:.1f}",
            )
            for row in rows
        ],
    )
