"""Standby workers as processes, with the real model under two names: demand shifts, nobody is told
what to serve, and no request fails.
"""

import asyncio
import json
import random
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mesh_parts import MeshParts
from openai import DefaultHttpxClient, OpenAI

from shared import subjects
from shared.broker import Identity, NatsServer
from shared.bus import Bus, BusMessage
from shared.kv import ROLES, Entry, Kv
from shared.presence import Beat, decode_beat
from worker.catalog import read_catalog
from worker.loadable import survey
from worker.preparing import ServingSettings

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

A, B = "org/alpha:135m", "org/beta:135m"
WORKERS = ("worker-1", "worker-2")
WAIT = 120.0


class Watcher:
    """Hears all beats and leases, in a thread of its own."""

    def __init__(self, url: str) -> None:
        self.beats: list[tuple[float, Beat]] = []
        self.leases: list[tuple[float, Entry]] = []
        self._url = url
        self._ready = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()))

    def __enter__(self) -> "Watcher":
        self._thread.start()
        assert self._ready.wait(WAIT)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    async def _listen(self) -> None:
        async with Bus.connect(self._url, identity="mesh-1", kind="mesh") as bus:
            await bus.subscribe(subjects.BEATS, self._hear)
            await Kv(bus).follow(ROLES, lambda entry: self.leases.append((time.time(), entry)))
            await bus.barrier()
            self._ready.set()
            await asyncio.to_thread(self._over.wait)

    def _hear(self, message: BusMessage) -> None:
        self.beats.append((time.time(), decode_beat(message.data)))

    def last(self, worker: str) -> Beat | None:
        return next((beat for _, beat in reversed(self.beats) if beat.worker == worker), None)

    def changes(self, action: str) -> list[tuple[str, str, float, str]]:
        """(model, worker, unix time, reason) of all role changes of a kind, by time."""
        found = {
            (change.at, change.model, beat.worker, change.reason)
            for _, beat in list(self.beats)
            for change in beat.changes
            if change.action == action
        }
        return [(model, worker, at, reason) for at, model, worker, reason in sorted(found)]

    def until(self, holds: Any, story: Any) -> None:
        deadline = time.monotonic() + WAIT
        while not holds():
            assert time.monotonic() < deadline, story()
            time.sleep(0.05)


class Standbys(MeshParts):
    """Two standbys that could each hold both models, and a router."""

    def prepare(self) -> None:
        models = self._folder / "models"
        toml = (models / "models.toml").read_text()
        file = json.loads(toml.partition("file = ")[2].splitlines()[0])
        entries = [f'[models."{name}"]\nfile = {json.dumps(file)}\n' for name in (A, B)]
        (models / "models.toml").write_text("".join(entries))
        settings = ServingSettings(slots=4, context=512, prefix_memory=0, speculation="ngram")
        able = survey(read_catalog(models).choose(()), settings, 1 << 40).whole
        self.memory = 2 * max(model.memory for model in able) + (1 << 20)

    def start_standby(self, name: str) -> None:
        self._start(
            "mesh-worker",
            name,
            *("--models", str(self._folder / "models"), "--memory", str(self.memory)),
            *("--slots", "4", "--ctx", "512", "--threads", "1", "--speculation", "ngram"),
            *("--prefix-memory", "0", *self._arguments),
        )

    def kill(self, name: str) -> None:
        """As when the host loses power; its engines die with it."""
        key = "mesh-worker" if name == WORKERS[0] else f"mesh-worker {name}"
        process = self._processes.pop(key)
        process.kill()
        process.wait()


@pytest.fixture
def parts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Standbys]:
    names = {"router-1": "router", "mesh-1": "mesh"} | dict.fromkeys(WORKERS, "worker")
    identities = [
        Identity(name, kind, secrets.token_hex(16))  # type: ignore[arg-type]
        for name, kind in names.items()
    ]
    server = NatsServer(identities=identities, data_dir=tmp_path / "nats")
    with asyncio.Runner() as runner:
        runner.run(server.__aenter__())
        try:
            parts = Standbys(tmp_path, server, A, "--idle-after", str(request.param))
            parts.prepare()
            try:
                parts.start_router()
                for name in WORKERS:
                    parts.start_standby(name)
                yield parts
            finally:
                parts.clear_away()
        finally:
            runner.run(server.__aexit__(None, None, None))


def ask(parts: Standbys, model: str) -> str:
    with OpenAI(
        base_url=parts.base_url,
        api_key="not looked at",
        max_retries=0,
        timeout=WAIT,
        http_client=DefaultHttpxClient(trust_env=False),
    ) as client:
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Count to five."}],
            max_tokens=12,
            temperature=0,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def standby(watcher: Watcher) -> bool:
    beats = [watcher.last(name) for name in WORKERS]
    return all(beat is not None and beat.able and not beat.models for beat in beats)


def shift(parts: Standbys, idle: float) -> None:
    """The heart of both tests; `idle` is the time that the workers were given."""
    with Watcher(parts._nats.url_for("mesh-1")) as watcher:
        watcher.until(lambda: standby(watcher), parts.story)
        # What the workers have to hear before they decide is told within these seconds.
        time.sleep(7.0)
        first = time.time()
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: ask(parts, A), range(6)))
        assert all(answers)
        ((model, holder, at, reason),) = watcher.changes("promote")
        assert (model, "waiting" in reason) == (A, True)
        # Which is when the decision was made; the loading comes after it.
        assert first - 0.1 <= at <= first + 5.0
        ready = next(
            when
            for when, beat in watcher.beats
            if any(state.name == A and state.state == "ready" for state in beat.models)
        )
        print(f"decided after {at - first:.2f} s, loaded {ready - at:.2f} s later")
        used_last = time.time()
        second = time.time()
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: ask(parts, B), range(6)))
        assert all(answers)
        promoted = watcher.changes("promote")
        assert [model for model, *_ in promoted] == [A, B]
        assert second - 0.1 <= promoted[1][2] <= second + 5.0
        watcher.until(lambda: watcher.changes("demote"), parts.story)
        (model, worker, at, reason) = watcher.changes("demote")[0]
        assert (model, worker) == (A, holder)
        assert "idle" in reason
        print(f"let go {at - used_last:.2f} s after its last use, told {idle:g} s")
        # The last use is when the last answer ended, as the router told it.
        assert used_last + idle - 1.5 <= at <= used_last + idle + 2.5
        watcher.until(lambda: standby(watcher), parts.story)
        assert [model for model, *_ in watcher.changes("demote")] == [A, B]
        assert watcher.changes("fail") == watcher.changes("lost") == []
        # From zero again.
        assert ask(parts, A)
        assert [model for model, *_ in watcher.changes("promote")] == [A, B, A]


@pytest.mark.parametrize("parts", [6.0], indirect=True)
def test_demand_shifts_from_one_model_to_another(parts: Standbys) -> None:
    shift(parts, 6.0)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [60.0], indirect=True)
def test_an_idle_model_is_let_go_after_a_minute(parts: Standbys) -> None:
    shift(parts, 60.0)


@pytest.mark.parametrize("parts", [3600.0], indirect=True)
def test_the_role_of_a_killed_worker_is_taken_up_by_another(parts: Standbys) -> None:
    with Watcher(parts._nats.url_for("mesh-1")) as watcher:
        watcher.until(lambda: standby(watcher), parts.story)
        time.sleep(7.0)
        assert ask(parts, A)
        ((_, holder, _, _),) = watcher.changes("promote")
        parts.kill(holder)
        killed = time.time()
        # It is held until the lease has run out and the other has loaded the model.
        assert ask(parts, A)
        (_, (model, worker, at, _)) = watcher.changes("promote")
        assert (model, {holder, worker}) == (A, set(WORKERS))
        assert at <= killed + 15.0


STEADY_SECONDS = 600.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("parts", [60.0], indirect=True)
def test_steady_load_changes_no_role(parts: Standbys) -> None:
    """Two models, Poisson arrivals, ten minutes: what was taken up at the beginning stays."""
    with Watcher(parts._nats.url_for("mesh-1")) as watcher, ThreadPoolExecutor(32) as pool:
        watcher.until(lambda: standby(watcher), parts.story)
        time.sleep(7.0)
        draw = random.Random(4)
        asked = [pool.submit(ask, parts, model) for model in (A, B)]
        started = time.monotonic()
        while time.monotonic() - started < STEADY_SECONDS:
            time.sleep(draw.expovariate(1.0))
            asked.append(pool.submit(ask, parts, A if draw.random() < 0.7 else B))
        assert all(answer.result() for answer in asked)
        assert sorted(model for model, *_ in watcher.changes("promote")) == [A, B]
        assert not any(watcher.changes(kind) for kind in ("demote", "lost", "fail"))
