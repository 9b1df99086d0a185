"""Two workers as processes; one goes away in the middle of streams of every kind, none is lost."""

import asyncio
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from failover_streams import KINDS, Told, bodies, run
from mesh_parts import WAIT, MeshParts, eventually
from wires import Wires

from loadtests.figures import percentile
from loadtests.stack import smollm2, smollm2_f32, smollm2_q4_0
from shared.broker import Identity, NatsServer

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

MODEL = "pair"
WORKERS = ("worker-1", "worker-2")


class Pair(MeshParts):
    """A router and two workers that both serve the model."""

    # One has room for the streams of both: what is measured is not a queue.
    slots = 16

    def __init__(self, folder: Path, nats: NatsServer, model: str, file: Path | None) -> None:
        super().__init__(folder, nats, model, file=file)
        self._keys: dict[str, str] = {}
        self.wires = Wires(WORKERS)

    def nats_url(self, name: str) -> str:
        url = super().nats_url(name)
        return self.wires.url(name, url) if name in WORKERS else url

    def start(self, name: str) -> None:
        before = set(self._processes)
        self._start(
            "mesh-worker",
            name,
            *("--models", str(self._folder / "models"), "--pin-all", "--threads", "1"),
            *("--slots", str(self.slots), "--ctx", "1024"),
        )
        (self._keys[name],) = set(self._processes) - before

    def process(self, name: str) -> psutil.Process:
        return psutil.Process(self._processes[self._keys[name]].pid)

    def ended(self, name: str) -> int:
        """Wait for the worker's end; its exit code."""
        return self._processes.pop(self._keys[name]).wait(WAIT)

    def serving(self) -> int:
        try:
            models = httpx.get(f"{self.base_url}/models", trust_env=False).json()["data"]
        except httpx.HTTPError:
            return 0
        return sum(model["meta"]["workers"] for model in models if model["id"] == self.model)

    def until_both_serve(self) -> None:
        eventually(lambda: self.serving() == len(WORKERS), self.story, every=0.1)


@contextmanager
def running_pair(folder: Path, file: Path | None = None) -> Iterator[Pair]:
    identities = [Identity("router-1", "router", secrets.token_hex(16))]
    identities += [Identity(name, "worker", secrets.token_hex(16)) for name in WORKERS]
    server = NatsServer(identities=identities, data_dir=folder / "nats")
    with asyncio.Runner() as runner:
        runner.run(server.__aenter__())
        try:
            pair = Pair(folder, server, MODEL, file)
            with pair.wires.running():
                try:
                    pair.start_router()
                    for name in WORKERS:
                        pair.start(name)
                    pair.until_both_serve()
                    yield pair
                finally:
                    pair.clear_away()
        finally:
            runner.run(server.__aexit__(None, None, None))


def kill_worker(pair: Pair, name: str) -> None:
    """As when the host loses power; its engine dies with it."""
    pair.process(name).kill()


def kill_engine(pair: Pair, name: str) -> None:
    """As when llama.cpp aborts, or memory runs out."""
    for engine in pair.process(name).children():
        engine.kill()


def stop(pair: Pair, name: str) -> None:
    """It hangs, with its connections open."""
    worker = pair.process(name)
    for process in (*worker.children(), worker):
        process.suspend()


def cut_off(pair: Pair, name: str) -> None:
    """Its network is gone, and nobody is told."""
    pair.wires.cut(name)


def drain(pair: Pair, name: str) -> None:
    """As an operator ends it."""
    os.kill(pair.process(name).pid, signal.SIGTERM)


HOW: dict[str, Callable[[Pair, str], None]] = {
    "worker killed": kill_worker,
    "engine killed": kill_engine,
    "worker hangs": stop,
    "worker cut off": cut_off,
    "worker drains": drain,
}
LOSSES = ("worker killed", "engine killed", "worker hangs", "worker cut off")
"""Those that nobody wished for."""


def busiest(told: Sequence[Told]) -> str:
    """The worker that has most of the streams."""
    return max(WORKERS, key=lambda name: sum(t.worker == name and not t.whole for t in told))


def check(told: Sequence[Told], story: Callable[[], str]) -> None:
    """Every stream is whole and what was asked for."""
    for mine in told:
        assert mine.whole, f"{mine.kind}: {mine.error}\n{story()}"
        if mine.kind == "logprobs":
            assert len(mine.logprobs) == mine.usage["completion_tokens"]
            assert (
                b"".join(bytes(data) for _, data in mine.logprobs)
                .decode(errors="replace")
                .startswith(mine.text[:20])
            )
        if mine.reason != "length" and mine.kind == "schema":
            assert set(json.loads(mine.text)) == {"name", "tags"}
        if mine.reason == "tool_calls":
            assert all(json.loads(arguments) for _, _, arguments in mine.calls.values())


def disturbed(
    pair: Pair, asked: list[tuple[str, dict]], how: Callable[[Pair, str], None]
) -> tuple[list[Told], str]:
    """The streams, and the worker that went."""
    gone: list[str] = []

    def interfere(told: list[Told]) -> None:
        gone.append(busiest(told))
        how(pair, gone[0])

    return asyncio.run(run(pair.base_url, asked, interfere)), gone[0]


def test_streams_of_every_kind_outlive_their_worker(tmp_path: Path) -> None:
    with running_pair(tmp_path, smollm2_q4_0(tmp_path)) as pair:
        asked = [(kind, body) for kind in KINDS for body in bodies(MODEL, kind, 2, 70)]
        whole = asyncio.run(run(pair.base_url, asked))
        check(whole, pair.story)
        for how in ("worker killed", "worker drains"):
            told, gone = disturbed(pair, asked, HOW[how])
            check(told, pair.story)

            moved = [mine for mine in told if mine.resumed]
            equal = sum(a.said == b.said for a, b in zip(whole, told, strict=True))
            gaps = sorted(mine.longest_gap for mine in moved)
            print(f"{how}: {len(moved)} of {len(told)} resumed, {equal} equal, gaps {gaps}")
            assert moved
            assert {mine.worker for mine in moved} == {gone}
            # A near tie may fall otherwise in other company (tests/engine/test_engine_resume.py).
            assert equal >= len(told) - 2
            if how == "worker killed":
                bring_back(pair, gone, how)
            else:
                # Not after its answers, and not after the 30 s of its grace.
                assert pair.ended(gone) == 0


STREAMS = int(os.environ.get("MESH_CHAOS_STREAMS", "100"))
"""Of each kind."""

FORMATS: dict[str, Callable[[Path], Path]] = {
    "Q4_1": lambda _: smollm2(),
    "Q4_0": smollm2_q4_0,
    "F32": smollm2_f32,
}
"""Of the weights, each with kernels of its own that round in their own way."""


class Compared:
    """How the streams of one kind of loss compare with the undisturbed ones."""

    def __init__(self) -> None:
        self._rows = {kind: [0, 0, 0, 0] for kind in KINDS}
        self._gaps: list[float] = []
        self._parted: list[str] = []

    def take(self, whole: list[Told], control: list[Told], told: list[Told]) -> None:
        """One round's."""
        for one, other, mine in zip(whole, control, told, strict=True):
            row = self._rows[mine.kind]
            row[0] += 1
            row[1] += mine.resumed > 0
            row[2] += one.said == mine.said
            row[3] += one.said == other.said
            if mine.resumed:
                self._gaps.append(mine.longest_gap)
            if one.said != mine.said:
                self._parted.append(f"  {mine.kind}: {one.said} and {mine.said}")

    @property
    def equal(self) -> str:
        """So far, of all kinds."""
        rows = self._rows.values()
        return f"{sum(row[2] for row in rows)} of {sum(row[0] for row in rows)}"

    def report(self) -> str:
        lines = [f"  {kind:10} {row[0]:4} {row[1]:4} {row[2]:4} {row[3]:4}" for kind, row in self]
        shares = ", ".join(f"p{q} {percentile(self._gaps, q / 100):.2f} s" for q in (50, 95, 99))
        lines.append(f"  longest gap of a resumed stream: {shares}")
        return "\n".join([*lines, *self._parted])

    def __iter__(self) -> Iterator[tuple[str, list[int]]]:
        """Kinds, each with its streams, the resumed, the equal, and the equal in the control."""
        return iter(self._rows.items())


def bring_back(pair: Pair, gone: str, how: str) -> None:
    """Wait until both workers serve after a loss."""
    if HOW[how] is kill_worker:
        pair.ended(gone)
        pair.start(gone)
    elif HOW[how] is stop:
        for process in (pair.process(gone), *pair.process(gone).children()):
            process.resume()
    elif HOW[how] is cut_off:
        pair.wires.mend(gone)
    time.sleep(2.5)
    pair.until_both_serve()


@pytest.mark.chaos
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("form", FORMATS)
def test_a_hundred_streams_of_each_kind_outlive_their_workers(tmp_path: Path, form: str) -> None:
    """Prints, by loss and kind, how many were equal to the undisturbed ones, beside the control:
    the same streams undisturbed in other company.
    """
    each = 3
    with running_pair(tmp_path, FORMATS[form](tmp_path)) as pair:
        compared = {how: Compared() for how in LOSSES}
        everything = {kind: bodies(MODEL, kind, STREAMS, 70) for kind in KINDS}
        for start in range(0, STREAMS, each):
            asked = [(kind, body) for kind in KINDS for body in everything[kind][start:][:each]]
            whole = asyncio.run(run(pair.base_url, asked))
            control = asyncio.run(run(pair.base_url, list(reversed(asked))))[::-1]
            for streams in (whole, control):
                check(streams, pair.story)
            for how, rows in compared.items():
                told, gone = disturbed(pair, asked, HOW[how])
                check(told, pair.story)
                rows.take(whole, control, told)
                bring_back(pair, gone, how)
            equal = ", ".join(f"{how} {rows.equal}" for how, rows in compared.items())
            done = min(start + each, STREAMS)
            print(f"{form}: {done} of {STREAMS} streams of each kind; equal: {equal}")
        for how, rows in compared.items():
            print(f"\n{form}, {how}: kind, streams, resumed, equal, equal in the control")
            print(rows.report())
        for how, rows in compared.items():
            for kind, (count, _, equal, control_equal) in rows:
                assert equal >= min(0.98 * count, control_equal - 0.02 * count), (how, kind)
