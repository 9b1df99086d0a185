"""Requests through a real broker to an agent and its engine process."""

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from shared.protocol import (
    Accepted,
    Busy,
    Embed,
    EmbedResult,
    End,
    Fail,
    Generate,
    Sampling,
    TextInput,
    encode,
)

pytestmark = pytest.mark.nats


async def test_a_request_is_accepted_at_once_and_answered_in_order(start, router):
    await start()
    asked = await router.ask("tokens=5")
    await asked.last()
    assert isinstance(asked.frames[0], Accepted)
    assert asked.frames[0] == Accepted(asked.attempt, "worker-1", 0)
    assert isinstance(asked.frames[-1], End)
    assert asked.text == "t0 t1 t2 t3 t4 "


async def test_embeddings_pass_too(start, router):
    await start()
    request = Embed("r", 7, "tiny", (TextInput("a"), TextInput("b")), time.time() + 60)
    asked = await router.send(encode(request), 7, "tiny")
    last = await asked.last()
    assert isinstance(last, EmbedResult)
    assert len(last.vectors) == 2


async def test_beats_tell_of_the_model(start, router):
    await start(slots=3, queue=2)
    held = await router.ask("hold")
    await held.accepted()
    state = await router.model("worker-1", lambda m: m.free == 2)
    assert (state.state, state.slots, state.queued, state.queue_limit) == ("ready", 3, 0, 2)
    assert state.context == 2048
    assert state.size > 0
    assert state.created > 0
    await (await router.ask("tokens=2")).last()
    state = await router.model("worker-1", lambda m: m.drafted > 0)
    assert (state.drafted, state.accepted, state.gain) == (7, 5, 1.5)
    assert (state.drafted_at, state.accepted_at) == ((4, 3), (4, 1))
    assert (state.cached_tokens, state.prompt_tokens) == (4, 10)
    beat = await router.beat("worker-1", lambda b: True)
    assert beat.state == "ready"
    assert 0 < beat.memory_used < beat.memory_total


async def test_an_alias_is_a_name_like_any_other(start, router, tmp_path: Path, write_gguf):
    folder = tmp_path / "worker-1"
    write_gguf(folder / "tiny.gguf")
    (folder / "models.toml").write_text(
        '[models."org/tiny:q4"]\nfile = "tiny.gguf"\naliases = ["small"]\nslots = 2\n'
    )
    await start("tiny", ready=False)
    await router.model("worker-1", lambda m: m.state == "ready", name="org/tiny:q4")
    for name in ("small", "org/tiny:q4"):
        assert isinstance(await (await router.ask("tokens=1", model=name)).last(), End)


async def test_a_full_worker_leaves_the_group_and_joins_again(start, router):
    await start(slots=2, queue=4)
    held = [await router.ask("hold") for _ in range(2)]
    for asked in held:
        assert (await asked.accepted()).position == 0
    await router.nobody()
    # Its own door still takes requests, which wait.
    waiting = await router.ask("tokens=1", worker="worker-1")
    assert (await waiting.accepted()).position == 1
    await router.cancel("worker-1", held[0].attempt)
    assert isinstance(await waiting.last(), End)
    await router.somebody()


async def test_a_full_queue_answers_busy(start, router):
    await start(slots=1, queue=1)
    await (await router.ask("hold")).accepted()
    assert (await (await router.ask("hold", worker="worker-1")).accepted()).position == 1
    busy = await (await router.ask("hold", worker="worker-1")).first()
    assert isinstance(busy, Busy)
    assert busy.reason == "full"
    assert busy.worker == "worker-1"
    assert busy.retry_after > 0


async def test_batch_and_one_owner_leave_room_in_the_queue_for_others(start, router):
    await start(slots=1, queue=8)
    await (await router.ask("hold", worker="worker-1", owner="a")).accepted()

    async def taken(count: int, **fields: str) -> int:
        asked = [await router.ask("hold", worker="worker-1", **fields) for _ in range(count)]
        return sum([isinstance(await one.first(), Accepted) for one in asked])

    assert await taken(8, owner="b", priority="batch") == 4
    assert await taken(8, owner="b") == 2
    assert await taken(8, owner="c") == 2


async def test_a_refused_attempt_may_come_again(start, router):
    await start(slots=1, queue=0)
    held = await router.ask("hold")
    await held.accepted()
    asked = await router.ask("tokens=1", worker="worker-1")
    assert isinstance(await asked.first(), Busy)
    await router.cancel("worker-1", held.attempt)
    await router.model("worker-1", lambda m: m.free == 1)
    asked.frames.clear()
    again = await router.ask("tokens=1", worker="worker-1", attempt=asked.attempt)
    assert isinstance(await again.last(), End)


async def test_a_doubled_request_is_run_once(start, router):
    await start(slots=2)
    held = await router.ask("tokens=3 every=0.05", attempt=5)
    await router.ask("tokens=3 every=0.05", attempt=5, worker="worker-1")
    await held.last()
    # Ask for something else: what the double might have caused has come before it.
    await (await router.ask("tokens=1")).last()
    kinds = [type(frame).__name__ for frame in held.frames]
    assert kinds == ["Accepted", "Delta", "Delta", "Delta", "Done", "End"]
    assert (await router.model("worker-1", lambda m: True)).free == 2


async def test_many_choices_take_many_slots(start, router):
    await start(slots=4, queue=4)
    asked = await router.ask("hold", n=3)
    await asked.accepted()
    assert (await router.model("worker-1", lambda m: m.free < 4)).free == 1


async def test_cancel_frees_the_slot(start, router):
    await start(slots=1)
    held = await router.ask("hold")
    await held.until(lambda asked: len(asked.frames) == 2)
    await router.nobody()
    await router.cancel("worker-1", held.attempt)
    await router.somebody()
    assert (await router.model("worker-1", lambda m: True)).free == 1
    assert not held.ended


async def test_an_attempt_cancelled_before_it_came_is_not_run(start, router):
    await start(slots=1)
    await router.cancel("worker-1", 99)
    await router.bus.barrier()
    asked = await router.ask("tokens=1", attempt=99)
    other = await router.ask("tokens=1")
    await other.last()
    assert asked.frames == []


async def test_malformed_cancels_and_chunks_do_no_harm(start, router):
    await start()
    await router.bus.publish("mesh.v1.cancel.worker-1", b"\xc1")
    await router.bus.publish("mesh.v1.body.worker-1", b"nonsense")
    assert isinstance(await (await router.ask("tokens=1")).last(), End)


async def test_a_ping_is_echoed(start, router):
    await start()
    answer = await router.bus.request("mesh.v1.ping.worker-1", b"now", timeout=10)
    assert answer.data == b"now"


@pytest.mark.parametrize("version", ["2", "", "0.9"])
async def test_another_version_is_refused(start, router, version: str):
    await start()
    last = await (await router.ask("tokens=1", version=version)).last()
    assert isinstance(last, Fail)
    assert last.code == "unavailable"
    assert "version" in last.message


async def test_a_minor_version_is_not(start, router):
    await start()
    assert isinstance(await (await router.ask("tokens=1", version="1.7")).last(), End)


async def test_a_deadline_that_has_passed(start, router):
    await start()
    last = await (await router.ask("tokens=1", deadline=time.time() - 5)).last()
    assert isinstance(last, Fail)
    assert last.code == "deadline_exceeded"


async def test_a_malformed_request_is_told_if_its_attempt_can_be_read(start, router):
    await start()
    asked = await router.send(encode({"type": "generate", "attempt": 11, "n": "x"}), 11, "tiny")
    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.code == "invalid_value"


async def test_a_request_that_cannot_be_read_at_all_does_no_harm(start, router):
    await start()
    asked = await router.send(b"\xc1\xc1", 12, "tiny")
    assert isinstance(await (await router.ask("tokens=1")).last(), End)
    assert asked.frames == []


async def test_a_request_for_another_model_is_passed_on(start, router):
    await start("tiny", "other")
    request = Generate("r", 13, "other", TextInput("tokens=1"), Sampling(seed=1), time.time() + 60)
    asked = await router.send(encode(request), 13, "tiny")
    last = await asked.last()
    assert isinstance(last, Busy)
    assert last.reason == "unknown_model"


async def test_frames_of_a_step_too_large_for_one_message_are_divided(start, router):
    await start()
    asked = await router.ask("bulk=9437184")
    assert isinstance(await asked.last(), End)
    assert len(asked.text) == 9437184


async def test_a_frame_too_large_for_any_message_fails_its_attempt_alone(start, router):
    await start(slots=1)
    asked = await router.ask("bulk=9437184 single")
    last = await asked.last()
    assert isinstance(last, Fail)
    assert last.code == "payload_too_large"
    assert isinstance(await (await router.ask("tokens=1", worker="worker-1")).last(), End)


async def test_a_killed_engine_fails_what_it_held_and_comes_back(start, router):
    running = await start(slots=2, queue=2)
    held = [await router.ask("hold", worker="worker-1") for _ in range(3)]
    for asked in held:
        await asked.accepted()
    first = await running.engine_pid()
    os.kill(first, signal.SIGKILL)
    for asked in held:
        last = await asked.last()
        assert isinstance(last, Fail)
        assert last.code == "worker_failed"
        assert "SIGKILL" in last.message
    await router.model("worker-1", lambda m: m.state == "ready" and m.restarts == 1)
    assert await running.engine_pid() != first
    again = await router.ask("tokens=2")
    assert isinstance(await again.last(), End)
    assert (await router.model("worker-1", lambda m: True)).free == 2


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("abort", "SIGABRT: fake.cpp:1: GGML_ASSERT(n > 0) failed"),
        ("exit", "exit code 7"),
        ("garbage", "cannot be read"),
    ],
)
async def test_an_engine_that_dies_by_itself_says_why(start, router, prompt: str, words: str):
    await start()
    last = await (await router.ask(prompt)).last()
    assert isinstance(last, Fail)
    assert last.code == "worker_failed"
    assert words in last.message
    await router.model("worker-1", lambda m: m.state == "ready" and m.restarts == 1)
    assert isinstance(await (await router.ask("tokens=1")).last(), End)


async def test_while_the_engine_is_away_nobody_answers(start, router):
    running = await start()
    os.kill(await running.engine_pid(), signal.SIGKILL)
    await router.nobody()
    await router.model("worker-1", lambda m: m.state == "ready" and m.restarts == 1)
    await router.somebody()


async def test_no_engine_outlives_its_agent(start, router):
    running = await start()
    pid = await running.engine_pid()
    running.agent.stop()
    await running.task
    assert not psutil.pid_exists(pid)


async def test_two_models_are_served_side_by_side(start, router):
    await start("tiny", "other", slots=1)
    held = await router.ask("hold")
    await held.accepted()
    await router.nobody("tiny")
    assert isinstance(await (await router.ask("tokens=1", model="other")).last(), End)


async def test_slots_are_all_free_after_a_storm(start, router):
    await start(slots=4, queue=100)
    prompts = ["tokens=1", "tokens=3 every=0.001", "hold", "tokens=2"]
    asked = [await router.ask(prompts[i % 4], worker="worker-1") for i in range(60)]
    await asyncio.gather(*(a.accepted() for a in asked))
    await router.cancel("worker-1", *(a.attempt for i, a in enumerate(asked) if i % 4 == 2))
    for number, attempt in enumerate(asked):
        if number % 4 != 2:
            assert isinstance(await attempt.last(), End)
    state = await router.model("worker-1", lambda m: m.free == 4)
    assert state.queued == 0
