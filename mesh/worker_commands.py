"""`mesh worker`: what concerns the engine on this host alone, without a mesh.

The work is done by a process of the worker package, which has llama.cpp; what it prints is
described in `worker.engine.calibrate`.
"""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from mesh.errors import CommandError
from mesh.following import follow, worker_module
from mesh.models import resolve

__all__ = ("app",)

app = App(name="worker", help="Measure the engine of this host.")

_SOURCES = {
    "measured": "measured now, and kept",
    "cached": "measured before; --fresh measures again",
    "disturbed": "measured now, but not kept, since other processes kept the cores busy",
    "nominal": "not measured: MESH_CALIBRATE is off",
}


class _Calibration(msgspec.Struct, frozen=True):
    """As `worker.engine.calibration.Calibration`."""

    threads: int
    prefill_threads: int
    poll: int
    step_seconds: tuple[tuple[int, float], ...]
    prefill_row_seconds: float
    thread_seconds: tuple[tuple[int, float], ...]


class _Report(msgspec.Struct, frozen=True):
    calibration: _Calibration
    source: str


@app.command
def calibrate(
    model: str,
    /,
    *,
    threads: Annotated[int | None, Parameter(validator=Number(gte=1), show_default=False)] = None,
    fresh: Annotated[bool, Parameter(negative=())] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Show what steps of a model cost on this host, and with how many threads.

    A worker does the same when it loads a model, and keeps the result.

    Parameters
    ----------
    model
        Path of a GGUF file, or the name of the model that comes along.
    threads
        Threads to measure with. Without it, the fewest that are as fast as the cores but one.
    fresh
        Measure, even if that has been done before.
    as_json
        Print JSON.
    """
    (file,) = resolve([model], Path())
    if not Path(file.file).is_file():
        raise CommandError(f"{model}: only a file of this host can be measured; download it first")
    report = _run(_command(file.file, threads, fresh=fresh), file.name)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        _print(report, file.name, Console(highlight=False))


def _command(path: str, threads: int | None, *, fresh: bool) -> list[str]:
    command = worker_module("worker.engine.calibrate", needs="llama_cpp")
    command += ["--threads", str(threads)] if threads else []
    return [*command, *(["--fresh"] if fresh else []), "--", path]


def _run(command: list[str], name: str) -> _Report:
    """Run the process, with a progress bar on a terminal.

    Raises:
        CommandError: it failed; the message is its own last line.
    """
    work = follow(command, f"measuring {name}", Console(stderr=True, highlight=False))
    if work.code or not work.result:
        raise CommandError(work.words or f"the calibration ended with exit code {work.code}")
    return msgspec.json.decode(work.result, type=_Report)


def _print(report: _Report, name: str, console: Console) -> None:
    found = report.calibration
    console.print(f"{name}: {_SOURCES[report.source]}", markup=False, soft_wrap=True)
    console.print(
        f"threads {found.threads} for a row alone, {found.prefill_threads} for several; prefill "
        f"{1 / found.prefill_row_seconds:,.0f} tokens/s; a waiting thread spins "
        f"{found.poll if found.poll >= 0 else 'an unknown number of'} rounds",
        markup=False,
        soft_wrap=True,
    )
    steps = _table("rows", "ms a step", "ms a row", "tokens/s")
    for rows, seconds in found.step_seconds:
        steps.add_row(
            str(rows),
            f"{seconds * 1e3:.2f}",
            f"{seconds * 1e3 / rows:.2f}",
            f"{rows / seconds:,.0f}",
        )
    console.print(steps)
    if len(found.thread_seconds) > 1:
        tried = _table("threads", "ms a row alone", "tokens/s")
        for threads, seconds in found.thread_seconds:
            tried.add_row(str(threads), f"{seconds * 1e3:.2f}", f"{1 / seconds:,.0f}")
        console.print(tried)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table
