"""Servers of a test's own."""

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from shared.broker import Identity, NatsServer


@pytest.fixture
def pause(eventually: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Stop a server in the sense of SIGSTOP, and return when every thread of it stands still."""

    def state(stat: Path) -> str:
        return stat.read_text().rpartition(")")[2].split()[0]

    async def stop(server: NatsServer) -> None:
        os.kill(server.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{server.pid}/task")
        await eventually(lambda: {state(stat) for stat in tasks.glob("*/stat")} == {"T"})

    return stop


@pytest.fixture
def own_server(
    tmp_path: Path, make_identities: Callable[..., list[Identity]]
) -> Callable[..., NatsServer]:
    """Make servers of one data folder, for the test to enter, and to kill and restart at will."""

    def make(**options: Any) -> NatsServer:
        return NatsServer(identities=make_identities(), data_dir=tmp_path / "nats", **options)

    return make
