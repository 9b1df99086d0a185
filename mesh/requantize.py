"""`mesh models requantize`: runs the process that does it, and shows how far it is.

The process belongs to the worker package, which has llama.cpp; its output is described in
`worker.engine.requantize`.
"""

import subprocess
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mesh.errors import CommandError
from mesh.parts import requantize_command
from shared.command_line import Refused
from shared.sizes import format_size

__all__ = ("run",)

_REFUSED = 2
"""Exit code of the process when it was asked for something wrong."""
_END_SECONDS = 5.0


def run(source: Path, target: Path, file_type: str, *, force: bool, console: Console) -> None:
    """Write `source` as `file_type` to `target`, with a progress bar on a terminal.

    Ctrl-C, or whatever else ends it early, leaves nothing behind.

    Raises:
        Refused: the type is unknown, or the target must not be written.
        CommandError: the source is no model, or llama.cpp could not.
    """
    command = requantize_command(source, target, file_type, force=force)
    # A session of its own: Ctrl-C is for this process, which passes it on.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as child:
        try:
            size = _follow(child, f"{source.name} to {file_type}", console)
            words = child.stderr.read().strip() if child.stderr else ""
            code = child.wait()
        except BaseException:
            _end(child)
            raise
        finally:
            # The process removes it itself unless it was killed.
            target.with_name(f".{target.name}.{child.pid}.partial").unlink(missing_ok=True)
    if code:
        reason = words.splitlines()[-1] if words else f"the process ended with {code}"
        raise (Refused if code == _REFUSED else CommandError)(reason)
    console.print(f"{target}: {format_size(size)}", soft_wrap=True, markup=False)


def _follow(child: "subprocess.Popen[str]", what: str, console: Console) -> int:
    """Show progress until the process closes its output; returns the bytes written."""
    size = 0
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.completed}/{task.total} tensors"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as shown:
        task: TaskID | None = None
        for line in child.stdout or ():
            match line.split():
                case ["tensor", number, count]:
                    if task is None:
                        task = shown.add_task(what, total=int(count))
                    shown.update(task, completed=int(number) - 1)
                case ["done", written]:
                    size = int(written)
    return size


def _end(child: "subprocess.Popen[str]") -> None:
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(_END_SECONDS)
        return
    child.kill()
