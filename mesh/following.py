"""Running a process that does the work of a command, and following what it tells.

Such processes belong to the worker package. Each tells its progress on stdout, a line at a time,
and what is wrong in one line on stderr.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mesh.errors import CommandError

__all__ = ("Work", "follow", "worker_module")

_END_SECONDS = 5.0


def worker_module(name: str, *, needs: str = "worker") -> list[str]:
    """The beginning of a command line that runs a module of the worker's.

    Args:
        name: the module.
        needs: a package without which it is of no use.

    Raises:
        CommandError: that is not installed here.
    """
    if importlib.util.find_spec(needs) is None:
        what = "llama.cpp" if needs == "llama_cpp" else "the worker's part"
        raise CommandError(f"{what} is not installed; install mesh-inference[worker]")
    # -P: a folder called worker where the command is given must not be taken for the package.
    return [sys.executable, "-P", "-m", name]


class Work(NamedTuple):
    """What came of a process."""

    code: int
    """Its exit code."""
    words: str
    """The last that it said on stderr."""
    result: str
    """What it told after `done`; empty: nothing."""


def follow(
    command: Sequence[str],
    what: str,
    console: Console,
    *,
    unit: str = "",
    after: Callable[[int], None] = lambda pid: None,
) -> Work:
    """Run a process to its end, with a progress bar on a terminal.

    It tells `progress N COUNT`, `tensor N COUNT`, or `progress SHARE`, and `done RESULT`. Where
    this command ends early, it is ended with it.

    Args:
        command: its command line.
        what: it does.
        console: for the bar.
        unit: of its counts.
        after: told its pid when it has ended, however that came.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        *((TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),) if unit else ()),
        TimeElapsedColumn(),
    )
    # A session of its own: Ctrl-C is for this process, which ends the other.
    with (
        Progress(
            *columns, console=console, disable=not console.is_terminal, transient=True
        ) as shown,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child,
    ):
        try:
            result = _show(child.stdout or (), what, shown)
            said = child.stderr.read().splitlines() if child.stderr else []
            code = child.wait()
        except BaseException:
            _end(child)
            raise
        finally:
            after(child.pid)
    words = [line.strip() for line in said if line.strip()]
    return Work(code, words[-1] if words else "", result)


def _show(lines: Iterable[str], what: str, shown: Progress) -> str:
    result = ""
    task = shown.add_task(what, total=1.0)
    for line in lines:
        match line.split(maxsplit=1):
            case ["progress" | "tensor", told]:
                done, *count = told.split()
                if count:
                    shown.update(task, total=float(count[0]))
                shown.update(task, completed=float(done))
            case ["done", told]:
                result = told.strip()
    return result


def _end(child: "subprocess.Popen[str]") -> None:
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(_END_SECONDS)
        return
    child.kill()
