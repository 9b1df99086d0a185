"""N-gram lookup alone, and its memory across requests: each owner's apart, or none."""

from pathlib import Path

import pytest
from asking import STEADY_ENGINE, frames_of, request, text_of, tokens_of
from engine_driver import EngineDriver

from shared.protocol import Frame, Generate

pytestmark = [pytest.mark.model]

FEW, MANY = 8, 24
"""Of 48 tokens, right in drafts: by chance, and where the answer was known."""


async def asked(target: Path, owners: list[str], wanted=None, **options) -> list[list[Frame]]:
    """The frames of one question, asked by one owner after another of one engine."""
    wanted = wanted or question
    engine = EngineDriver(
        str(target),
        slots=2,
        context=512,
        threads=1,
        speculation="ngram",
        command=STEADY_ENGINE,
        **options,
    )
    await engine.start()
    try:
        return [await frames_of(engine, wanted(owner)) for owner in owners]
    finally:
        await engine.stop()


def question(owner: str) -> Generate:
    """What is answered in 48 tokens that hardly repeat the prompt or themselves."""
    return request("Tell me about the sea.", owner=owner, max_tokens=48)


def known(frames: list[Frame]) -> bool:
    """The answer was there already, by how much of it was drafted rightly."""
    accepted = frames[-1].usage.accepted
    assert accepted <= FEW or accepted >= MANY
    return accepted >= MANY


async def test_what_an_owner_was_answered_drafts_for_nobody_else(f32):
    frames = await asked(f32, ["ann", "bob", "", "", "ann"])

    assert [known(one) for one in frames] == [False, False, False, False, True]
    assert tokens_of(frames[-1]) == tokens_of(frames[1])


async def test_an_owner_may_come_back_after_others(f32):
    frames = await asked(f32, ["ann", "bob", "eve", "bob", "ann"])

    assert [known(one) for one in frames] == [False, False, False, True, True]


async def test_nothing_is_kept_across_requests_where_the_memory_is_off(f32):
    frames = await asked(f32, ["ann", "ann"], ngram_memory=0)

    assert [known(one) for one in frames] == [False, False]


async def test_lookup_drafts_what_the_prompt_holds(f32):
    text = (
        "The harbour of Lindholm lies behind two long walls of grey stone. In the morning the "
        "boats come back with herring and cod, and the gulls follow them to the quay."
    )
    copy = f"Repeat the following text word for word, and write nothing else.\n\n{text}"
    (frames,) = await asked(f32, [""], wanted=lambda _: request(copy, max_tokens=48))

    assert text[:40] in text_of(frames)
    assert frames[-1].usage.accepted > 12
