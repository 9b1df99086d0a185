"""What a running `mesh up` leaves in its data folder, so that the other commands find it.

The record holds NATS credentials and is readable by its owner only. A lock that lives exactly as
long as the process tells whether the record is stale; process ids, which are reused, cannot.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from mesh.errors import CommandError

__all__ = ("Running", "claim", "default_data_dir", "find", "publish")

_RECORD = "running.json"
_LOCK = "lock"


class Running(msgspec.Struct, frozen=True):
    """How to reach the system that `mesh up` runs."""

    pid: int
    started: float
    url: str
    """Base URL of the first router, ending in `/v1`."""
    nats: str
    """URL with the credentials of a command."""
    models: tuple[str, ...] = ()


def default_data_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder used unless another is named: `mesh` in the user's state folder."""
    state = environment.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "mesh"


@contextmanager
def claim(data_dir: Path) -> Iterator[None]:
    """Own the data folder, which is made if need be; the record vanishes at the end.

    Raises:
        CommandError: another `mesh up` owns it, or it cannot be made or written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(data_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise CommandError(f"cannot use the data folder {data_dir}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(
                f"a mesh runs already in {data_dir}; stop it, or choose another --data-dir"
            ) from None
        record = data_dir / _RECORD
        record.unlink(missing_ok=True)
        try:
            yield
        finally:
            record.unlink(missing_ok=True)
    finally:
        os.close(lock)


def publish(data_dir: Path, running: Running) -> None:
    """Write the record; only between entering and leaving `claim`."""
    draft = data_dir / f"{_RECORD}.new"
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(running)) + b"\n")
    draft.replace(data_dir / _RECORD)


def find(data_dir: Path) -> Running:
    """Read the record of the system that runs now.

    Raises:
        CommandError: none runs, it has died without cleaning up, or is only just starting.
    """
    try:
        data = (data_dir / _RECORD).read_bytes()
    except FileNotFoundError:
        raise CommandError(
            f"no mesh runs in {data_dir}; start one with `mesh up`, or name its NATS with --nats"
        ) from None
    except OSError as error:
        raise CommandError(f"cannot read {data_dir / _RECORD}: {error.strerror}") from error
    try:
        running = msgspec.json.decode(data, type=Running)
    except msgspec.DecodeError as error:
        raise CommandError(f"{data_dir / _RECORD} is damaged: {error}") from error
    if not _held(data_dir / _LOCK):
        raise CommandError(
            f"the mesh of {data_dir} (process {running.pid}) has ended without cleaning up; "
            "start it again with `mesh up`"
        )
    return running


def _held(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
