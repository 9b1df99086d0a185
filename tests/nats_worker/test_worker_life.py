"""An agent's beginning, its end, and NATS going away and coming back."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shared.broker import Identity, NatsServer
from shared.bus import Bus
from shared.protocol import Busy, End, Fail
from worker.agent import AgentFailed

pytestmark = pytest.mark.nats


async def test_draining_finishes_what_runs_and_takes_nothing_new(start, router):
    running = await start(slots=2)
    held = await router.ask("hold")
    long = await router.ask("tokens=3 every=0.1")
    await held.accepted()
    await long.accepted()
    running.agent.stop()
    await router.beat("worker-1", lambda b: b.state == "draining")
    await router.nobody()
    busy = await (await router.ask("tokens=1", worker="worker-1")).first()
    assert isinstance(busy, Busy)
    assert busy.reason == "draining"
    assert isinstance(await long.last(), End)
    assert not running.task.done()
    await router.cancel("worker-1", held.attempt)
    gone = await router.beat("worker-1", lambda b: b.state == "gone")
    assert gone.models == ()
    await running.task
    # Nobody listens at its own door any more.
    asked = await router.ask("tokens=1", worker="worker-1")
    await asked.until(lambda asked: asked.no_responders)


async def test_what_outlasts_the_grace_is_failed(start, router):
    running = await start(grace=0.2)
    held = await router.ask("hold")
    await held.accepted()
    running.agent.stop()
    last = await held.last()
    assert isinstance(last, Fail)
    assert last.code == "worker_failed"
    await running.task


async def test_a_second_stop_does_not_wait(start, router):
    running = await start(grace=1000.0)
    held = await router.ask("hold")
    await held.accepted()
    running.agent.stop()
    await router.beat("worker-1", lambda b: b.state == "draining")
    running.agent.stop()
    assert isinstance(await held.last(), Fail)
    await running.task


async def test_an_agent_can_be_stopped_while_it_loads(start, router):
    running = await start("slow", ready=False)
    await router.model("worker-1", lambda m: m.detail.startswith("loading"), name="slow")
    pid = running.agent.engine_pids["slow"]
    running.agent.stop()
    await running.task
    assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_one_bad_model_does_not_keep_the_others_from_being_served(
    start, router, tmp_path: Path, write_gguf: Callable[[Path], Path]
):
    folder = tmp_path / "worker-1"
    whole = write_gguf(folder / "whole.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[:-100])
    (folder / "text.gguf").write_text("I am no model")
    await start("tiny", "refused", ready=False)
    await router.model("worker-1", lambda m: m.state == "ready")
    states = {}
    for name in ("cut", "text", "refused"):
        states[name] = await router.model("worker-1", lambda m: m.state == "failed", name=name)
    assert "cut.gguf: truncated" in states["cut"].detail
    assert states["text"].detail == "text.gguf: not a GGUF file"
    assert states["refused"].detail == "the fake engine does not like this model"
    assert isinstance(await (await router.ask("tokens=1")).last(), End)
    await router.nobody("refused")


async def test_an_engine_that_dies_at_each_start_is_given_up(start, router):
    running = await start("crash", ready=False)
    with pytest.raises(AgentFailed, match=r"no model can be served: crash: .*GGML_ASSERT"):
        await running.task


async def test_a_model_that_does_not_fit_is_named_with_both_sizes(start, router):
    running = await start(memory=1000, ready=False)
    with pytest.raises(AgentFailed, match=r"tiny.gguf: needs at least .* of 1000 B are left"):
        await running.task


async def test_an_outage_of_nats_is_survived(
    start,
    router,
    tmp_path: Path,
    make_identities: Callable[..., list[Identity]],
    connect: Callable[..., object],
):
    server = NatsServer(identities=make_identities(), data_dir=tmp_path / "own")
    async with server:
        port = server.port
        bus = await connect("router-2", server=server)
        assert isinstance(bus, Bus)
        other = type(router)(bus)
        await other.open()
        running = await start(url=server.url_for("worker-1"), ready=False, slots=2)
        await other.model("worker-1", lambda m: m.state == "ready")
        lost = await other.ask("tokens=100000 every=0.05")
        await lost.until(lambda asked: len(asked.frames) > 2)
    # The engine goes on to speak into the void; its attempt is cancelled and its slot freed.
    again = NatsServer(identities=make_identities(), data_dir=tmp_path / "own", port=port)
    await asyncio.sleep(0.3)
    async with again:
        state = await other.model("worker-1", lambda m: m.state == "ready" and m.free == 2)
        assert state.restarts == 0
        assert isinstance(await (await other.ask("tokens=2")).last(), End)
        assert not lost.ended
        running.agent.stop()
        await running.task


async def test_what_was_asked_before_a_connection_was_lost_takes_no_later_answer_with_it(
    start, router, connect, tmp_path: Path, make_identities: Callable[..., list[Identity]]
):
    """A worker may publish only where requests of its present connection want their answers."""
    server = NatsServer(identities=make_identities(), data_dir=tmp_path / "own")
    async with server:
        other = type(router)(await connect("router-1", server=server))
        await other.open()
        await start(url=server.url_for("worker-1"), ready=False, slots=4)
        await other.model("worker-1", lambda model: model.free == 4)
        old = [await other.ask("tokens=400 every=0.05") for _ in range(2)]
        for asked in old:
            await asked.accepted()
    async with server:
        await other.beat("worker-1", lambda beat: beat.losses == 1)
        new = await other.ask("tokens=20 every=0.02")
        await new.last()
        assert new.text == "".join(f"t{number} " for number in range(20))
        await other.model("worker-1", lambda model: model.free == 4)
        assert not any(asked.ended for asked in old)


async def test_draining_works_without_nats(
    start, tmp_path: Path, make_identities: Callable[..., list[Identity]]
):
    server = NatsServer(identities=make_identities(), data_dir=tmp_path / "own")
    async with server:
        running = await start(url=server.url_for("worker-1"), ready=False)
        pid = await running.engine_pid()
    running.agent.stop()
    await running.task
    assert not psutil.pid_exists(pid)


async def test_an_agent_whose_nats_is_gone_for_good_says_so(start, monkeypatch):
    running = await start()
    # What sets it in earnest is the bus's business; here it only matters what follows.
    bus = running.agent._servings[0]._around.bus
    bus.closed.set()
    with pytest.raises(AgentFailed, match="closed for good"):
        await running.task


async def test_a_beat_tells_what_could_be_loaded_and_what_is_set_aside(start, router):
    await start("tiny", "other", memory=10**9)
    beat = await router.beat("worker-1", lambda b: bool(b.able))
    assert [model.name for model in beat.able] == ["other", "tiny"]
    assert beat.memory_budget == 10**9
    tiny = next(model for model in beat.models if model.name == "tiny")
    assert 0 < tiny.memory <= 10**9 // 2
    assert tiny.pinned
    assert tiny.last_use == 0.0
    asked = await router.ask("hold")
    await asked.accepted()
    used = await router.model("worker-1", lambda m: m.busy == 1)
    assert used.last_use >= used.since > 0
    await router.cancel("worker-1", asked.attempt)
    after = await router.model("worker-1", lambda m: m.busy == 0)
    assert (after.since, after.state) == (used.since, "ready")
