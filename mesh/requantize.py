"""`mesh models requantize`: runs the process that does it, and shows how far it is.

The process belongs to the worker package, which has llama.cpp; its output is described in
`worker.engine.requantize`.
"""

from pathlib import Path

from rich.console import Console

from mesh.errors import CommandError
from mesh.following import follow
from mesh.parts import requantize_command
from shared.command_line import Refused
from shared.sizes import format_size

__all__ = ("run",)

_REFUSED = 2
"""Exit code of the process when it was asked for something wrong."""


def run(source: Path, target: Path, file_type: str, *, force: bool, console: Console) -> None:
    """Write `source` as `file_type` to `target`, with a progress bar on a terminal.

    Ctrl-C, or whatever else ends it early, leaves nothing behind.

    Raises:
        Refused: the type is unknown, or the target must not be written.
        CommandError: the source is no model, or llama.cpp could not.
    """
    command = requantize_command(source, target, file_type, force=force)

    def after(pid: int) -> None:
        # The process removes it itself unless it was killed.
        target.with_name(f".{target.name}.{pid}.partial").unlink(missing_ok=True)

    work = follow(command, f"{source.name} to {file_type}", console, unit="tensors", after=after)
    if work.code:
        reason = work.words or f"the process ended with {work.code}"
        raise (Refused if work.code == _REFUSED else CommandError)(reason)
    console.print(f"{target}: {format_size(int(work.result))}", soft_wrap=True, markup=False)
