"""Making the file of a stage or a shard, once: what is there is used, what was begun goes on.

A file is named by all that made it (`Cut.digest`), so that one of other layers, another
model, or another version of the model is never taken for it. It is written beside under a name
that ends in `.partial`, and takes its own name when it is whole and its header can be read.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from worker.gguf_cut import Cut, Piece
from worker.gguf_file import GgufError, read_files
from worker.model_bytes import ModelBytes, SourceError
from worker.stage_cut import Wanted, cut, ends_at

__all__ = ("MadeFile", "drop_unused", "make_file", "make_stage")

UNUSED_SECONDS = 24 * 3600.0
"""How long a stage's file is kept at least since it was last asked for."""
KEPT_FILES = 8
"""Files of a model's stages that are kept however old they are."""

_ZEROS = bytes(2**16)
_DIGITS = 16
"""Of the digest that are in the name."""


class MadeFile:
    """What was made, and what it took."""

    __slots__ = ("fetched", "path", "plan")

    def __init__(self, path: Path, plan: Cut, fetched: int) -> None:
        self.path = path
        self.plan = plan
        self.fetched = fetched
        """Bytes of tensors that were read from the model now; what was there is not counted."""


def make_stage(
    source: ModelBytes, wanted: Wanted, folder: Path, *, progress: Callable[[int, int], None]
) -> MadeFile:
    """Make the file of a stage, or find it; see `make_file`.

    Raises:
        GgufError: the model has no such layers, or is damaged.
        SourceError: the model's bytes cannot be had, or the folder cannot be written.
    """
    parts = source.headers()
    plan = cut(parts, source.values(ends_at(parts[0])), wanted, identity=source.identity)
    part = f"{wanted.start}-{wanted.stop - 1}{'h' if wanted.head else ''}"
    return make_file(source, plan, folder, f"{source.name}.{part}", progress=progress)


def make_file(
    source: ModelBytes,
    plan: Cut,
    folder: Path,
    name: str,
    *,
    progress: Callable[[int, int], None],
) -> MadeFile:
    """Make a file of a model's bytes, or find it. Blocks; one process at a time makes a file.

    Args:
        source: the model.
        plan: what goes where.
        folder: where it is kept; made if it is not there.
        name: its name, but for the digest and the ending.
        progress: told the bytes that are written, and how many there will be. What it raises ends
            the work, and the next call goes on there.

    Raises:
        SourceError: the model's bytes cannot be had, or the folder cannot be written.
    """
    path = folder / f"{name}.{plan.digest[:_DIGITS]}.gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_name(f".{path.name}.lock")):
            if path.exists():
                # In use: see `drop_unused`. The time of writing stays, by which its calibration
                # is known.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
                progress(plan.size, plan.size)
                return MadeFile(path, plan, 0)
            partial = path.with_name(f".{path.name}.partial")
            fetched = _write(source, plan, partial, progress)
            _check(partial, plan)
            partial.replace(path)
    except OSError as error:
        raise SourceError(f"{error.filename or folder}: {error.strerror or error}") from error
    return MadeFile(path, plan, fetched)


def drop_unused(folder: Path, model: str, *, now: float) -> list[Path]:
    """Remove files of a model's stages that nobody has asked for of late, but for the newest.

    Groups are formed anew with other cuts, and each leaves a file. One that an engine has loaded
    may go: its pages stay until the engine ends.

    Args:
        folder: where they are.
        model: the model's name, as `make_stage` was given it.
        now: Unix time.

    Returns:
        What was removed.
    """
    named = re.compile(rf"{re.escape(model)}\.\d+-\d+h?\.[0-9a-f]{{{_DIGITS}}}\.gguf")
    found: list[tuple[float, Path]] = []
    for path in folder.glob("*.gguf"):
        # Another worker on this host may be removing the same.
        with suppress(FileNotFoundError):
            if named.fullmatch(path.name):
                found.append((path.stat().st_atime, path))
    found.sort(reverse=True)
    gone = [path for used, path in found[KEPT_FILES:] if now - used > UNUSED_SECONDS]
    for path in gone:
        path.unlink(missing_ok=True)
        path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
    return gone


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process makes this file."""
    with lock.open("a") as file:
        # Let go by closing it. It is left there: another may be waiting for this very file.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(
    source: ModelBytes, plan: Cut, partial: Path, progress: Callable[[int, int], None]
) -> int:
    """Write what the file lacks; returns the bytes that were read for it."""
    fetched = 0
    with partial.open("ab") as file:
        at = file.tell()
        if at < len(plan.header):
            file.truncate(0)
            file.write(plan.header)
            at = len(plan.header)
        for piece in plan.pieces:
            at += _fill(file.write, piece.target - at)
            for data in _rest(source, piece, at):
                file.write(data)
                at += len(data)
                fetched += len(data) if piece.part >= 0 else 0
                progress(at, plan.size)
        _fill(file.write, plan.size - at)
        file.flush()
        os.fsync(file.fileno())
    progress(plan.size, plan.size)
    return fetched


def _rest(source: ModelBytes, piece: Piece, at: int) -> Iterator[bytes]:
    """What is still to be written of a piece when the file has `at` bytes."""
    done = max(0, at - piece.target)
    if done >= piece.size:
        return
    if piece.part < 0:
        yield bytes(piece.size - done)
    else:
        yield from source.read(piece.part, piece.offset + done, piece.offset + piece.size)


def _fill(write: Callable[[bytes], int], count: int) -> int:
    """Write so many zeros, if any; returns how many."""
    left = max(0, count)
    while left:
        left -= write(_ZEROS[:left])
    return max(0, count)


def _check(partial: Path, plan: Cut) -> None:
    """See that the file is whole; one that is not is removed, so that the next call begins anew."""
    try:
        if partial.stat().st_size != plan.size:
            raise GgufError(f"it has {partial.stat().st_size} bytes, not {plan.size}")
        read_files(partial)
    except GgufError as error:
        partial.unlink()
        raise SourceError(f"the file came out broken and was removed: {error}") from error
