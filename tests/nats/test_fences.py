"""The faults of nats-py 2.16 that the bus fences.

Where a fault shows every time, the test shows it on nats-py itself first: when an upgrade fails
there, the fence can go.
"""

import asyncio
import os
import signal
from typing import Any
from urllib.parse import unquote, urlsplit

import nats
import pytest
from nats.aio.client import Client
from structlog.testing import capture_logs

from shared import subjects
from shared.broker import NatsServer
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.errors import PayloadTooLarge

pytestmark = pytest.mark.nats


async def raw(server: NatsServer, name: str, **options: Any) -> Client:
    """nats-py as it comes, but for the inbox that the permissions ask for."""

    async def quiet(_: Exception) -> None:
        return

    url = urlsplit(server.url_for(name))
    return await nats.connect(
        f"nats://{url.hostname}:{url.port}",
        user=unquote(url.username or ""),
        password=unquote(url.password or ""),
        inbox_prefix=subjects.inbox(name),
        error_cb=quiet,
        **options,
    )


class TestOversize:
    """The server answers a violation of its limits by closing; nats-py then never reconnects."""

    async def test_nats_py_closes_for_good(
        self, nats_server: NatsServer, eventually: Any, unique: str
    ) -> None:
        client = await raw(nats_server, "router-1")
        await client.publish(
            subjects.infer(unique), bytes(client.max_payload), headers={"Mesh-Version": "1"}
        )
        await eventually(lambda: client.is_closed)

    @pytest.mark.parametrize("value", ["1", "x" * 1000, "é" * 1000])
    async def test_headers_count(self, connect: Any, unique: str, value: str) -> None:
        router = await connect("router-1")
        with pytest.raises(PayloadTooLarge):
            await router.publish(
                subjects.infer(unique), bytes(router.max_payload - 20), headers={"Long": value}
            )
        await router.barrier()
        assert router.connected

    async def test_the_last_byte_beside_a_header_passes(self, connect: Any, unique: str) -> None:
        router, worker = await connect("router-1"), await connect("worker-1")
        got: list[int] = []
        await worker.subscribe(
            subjects.infer(unique), lambda message: got.append(len(message.data)), queue="free"
        )
        await worker.barrier()
        block = len(b"NATS/1.0\r\nMesh-Version: 1\r\n\r\n")
        size = router.max_payload - block
        with pytest.raises(PayloadTooLarge):
            await router.publish(
                subjects.infer(unique), bytes(size + 1), headers={"Mesh-Version": "1"}
            )
        await router.publish(subjects.infer(unique), bytes(size), headers={"Mesh-Version": "1"})
        await router.barrier(timeout=10)
        await worker.barrier(timeout=10)
        assert got == [size]

    async def test_a_client_s_endless_model_name_cannot_cut_the_router(self, connect: Any) -> None:
        router = await connect("router-1")
        reply = f"{router.inbox}.r.1"
        longest = "m" * (4000 - len(subjects.INFER[:-1]) - len(reply))
        await router.publish(subjects.infer(longest), b"", reply=reply)
        await router.barrier()
        for name in (longest + "m", "/" * 1500, "é" * 100_000):
            with pytest.raises(PayloadTooLarge, match="subject"):
                await router.publish(subjects.infer(name), b"", reply=reply)
            await router.barrier()
        with pytest.raises(PayloadTooLarge, match="subject"):
            await router.subscribe(f"{router.inbox}.{'x' * 5000}", lambda _: None)
        assert router.connected


class TestDisconnected:
    """What is published while NATS is away must not surface later: it would burn a GPU."""

    async def test_nats_py_keeps_and_delivers_later(
        self, own_server: Any, eventually: Any, unique: str
    ) -> None:
        async with own_server() as server:
            worker = await raw(
                server, "worker-1", reconnect_time_wait=0.01, max_reconnect_attempts=-1
            )
            # The worker is back long before: else its absence could hide the late message.
            router = await raw(
                server, "router-1", reconnect_to_server_handler=lambda pool, _: (pool[0], 1.0)
            )
            got: list[bytes] = []

            async def take(message: Any) -> None:
                got.append(message.data)

            await worker.subscribe(subjects.infer(unique), queue="free", cb=take)
            await worker.flush()
        await eventually(lambda: not router.is_connected and not worker.is_connected)
        await router.publish(subjects.infer(unique), b"stale")
        async with own_server(port=server.port):
            await eventually(lambda: got == [b"stale"])
            await router.close()
            await worker.close()

    async def test_a_publish_fails_at_once_and_is_not_kept(
        self, connect: Any, own_server: Any, eventually: Any, unique: str
    ) -> None:
        states: list[bool] = []
        async with own_server() as server:
            router = await connect("router-1", server=server, on_state=states.append)
            worker = await connect("worker-1", server=server)
            got: list[bytes] = []
            await worker.subscribe(
                subjects.infer(unique), lambda message: got.append(message.data), queue="free"
            )
            await worker.barrier()
        await eventually(lambda: states == [True, False])
        for _ in range(10):
            with pytest.raises(BusUnavailable, match="away"):
                await router.publish(subjects.infer(unique), b"stale")
        with pytest.raises(BusUnavailable, match="away"):
            await router.barrier()
        with pytest.raises(BusUnavailable, match="away"):
            await router.request(subjects.ping("worker-1"), b"", timeout=60)
        async with own_server(port=server.port):
            await eventually(lambda: states == [True, False, True] and worker.connected)
            await worker.barrier()
            await router.publish(subjects.infer(unique), b"fresh")
            await router.barrier()
            await worker.barrier()
            assert got == [b"fresh"]

    async def test_what_had_not_left_when_the_connection_broke_is_dropped(
        self, connect: Any, own_server: Any, pause: Any, eventually: Any, unique: str
    ) -> None:
        states: list[bool] = []
        async with own_server() as server:
            router = await connect("router-1", server=server, on_state=states.append)
            await pause(server)
            # More than the socket takes, so that the rest waits in the client.
            for _ in range(6):
                await router.publish(subjects.infer(unique), bytes(2**20))
                await asyncio.sleep(0.01)
            for _ in range(3):
                await router.publish(subjects.infer(unique), b"stale")
            assert router._client.pending_data_size > 0
            waiting = asyncio.create_task(router.barrier(timeout=60))
            await asyncio.sleep(0)
            os.kill(server.pid, signal.SIGKILL)
            await eventually(lambda: states == [True, False])
            assert router._client.pending_data_size == 0
            assert router._client._pending == []
            with pytest.raises(BusUnavailable, match="broke"):
                await waiting


class TestAbandonedPong:
    """Somebody who no longer waits for a PONG must not cost the connection its reader."""

    async def test_nats_py_goes_deaf(self, own_server: Any, pause: Any, eventually: Any) -> None:
        async with own_server() as server:
            client = await raw(server, "router-1")
            await pause(server)
            with pytest.raises(nats.errors.FlushTimeoutError):
                await client.flush(timeout=0.05)
            os.kill(server.pid, signal.SIGCONT)
            await eventually(lambda: client._reading_task.done())
            assert client.is_connected
            await client.close()

    async def test_the_bus_goes_on(
        self, connect: Any, own_server: Any, pause: Any, unique: str
    ) -> None:
        async with own_server() as server:
            router = await connect("router-1", server=server)
            worker = await connect("worker-1", server=server)
            got: list[BusMessage] = []
            await worker.subscribe(subjects.infer(unique), got.append, queue="free")
            await worker.barrier()
            await pause(server)
            with pytest.raises(BusUnavailable, match=r"did not answer within 0\.05 s"):
                await worker.barrier(timeout=0.05)
            cancelled = asyncio.create_task(worker.barrier(timeout=60))
            await asyncio.sleep(0.02)
            cancelled.cancel()
            # nats-py's own flush, which a reconnect uses, cancels the future of its PONG.
            with pytest.raises(nats.errors.FlushTimeoutError):
                await worker._client.flush(timeout=0.05)
            os.kill(server.pid, signal.SIGCONT)
            await worker.barrier()
            await router.publish(subjects.infer(unique), b"")
            await router.barrier()
            await worker.barrier()
            assert len(got) == 1


class TestClosed:
    async def test_closed_for_good_is_told(self, nats_server: NatsServer, eventually: Any) -> None:
        """After an error that nats-py takes as final; the bus must not look alive then."""
        states: list[bool] = []
        async with Bus.connect(
            nats_server.url_for("router-1"),
            identity="router-1",
            kind="router",
            on_state=states.append,
        ) as bus:
            await bus._client.publish(
                subjects.infer("x"), bytes(bus.max_payload), headers={"Mesh-Version": "1"}
            )
            with capture_logs() as logs:
                async with asyncio.timeout(20):
                    await bus.closed.wait()
            assert not bus.connected
            assert states == [True, False]
            with pytest.raises(BusUnavailable):
                await bus.publish(subjects.infer("x"), b"")
        closed = [entry for entry in logs if entry["event"] == "bus.closed"]
        assert "maximum payload" in closed[0]["error"]

    async def test_closing_ends_the_tries_to_reconnect(
        self, own_server: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Python 3.11's wait_for drops a cancellation that comes with a result; nats-py goes on."""
        tries = 0

        async def deaf(_: Any) -> None:
            nonlocal tries
            tries += 1
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                if tries < 1000 and not lost:
                    lost.append(True)
                else:
                    raise
            raise ConnectionRefusedError

        lost: list[bool] = []
        async with own_server() as server:
            context = Bus.connect(server.url_for("router-1"), identity="router-1", kind="router")
            bus = await context.__aenter__()
            monkeypatch.setattr(bus._client, "_connect_to_server", deaf)
        await eventually(lambda: tries > 0)
        trying = bus._client._reconnection_task
        assert trying is not None
        # In the middle of a try, where the cancellation gets lost.
        before = tries
        await eventually(lambda: tries > before)
        await context.__aexit__(None, None, None)
        assert trying.done()
        assert bus._client.is_closed
        assert bus.closed.is_set()

    async def test_closing_does_not_hang_on_a_dead_server(
        self, own_server: Any, pause: Any, unique: str
    ) -> None:
        async with own_server() as server:
            async with Bus.connect(
                server.url_for("router-1"), identity="router-1", kind="router"
            ) as bus:
                await pause(server)
                for _ in range(3):
                    await bus.publish(subjects.infer(unique), bytes(2**20))
                    await asyncio.sleep(0.01)
            assert bus.closed.is_set()
            os.kill(server.pid, signal.SIGCONT)
