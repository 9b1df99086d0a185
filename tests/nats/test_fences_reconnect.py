"""Faults of nats-py 2.16 in finding a server again, which the bus fences: see test_fences.py."""

import asyncio
import os
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client, Server
from structlog.testing import capture_logs

from shared import subjects
from shared._nats_client import FencedClient, choose_server
from shared.bus import BusMessage, BusUnavailable

pytestmark = pytest.mark.nats


class TestReconnect:
    async def test_it_is_tried_for_ever_and_subscriptions_come_back(
        self,
        connect: Any,
        own_server: Any,
        eventually: Any,
        unique: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tries = 0

        def impatient(_: FencedClient, pool: list[Server], __: Any) -> tuple[Server, float]:
            nonlocal tries
            tries += 1
            return pool[0], 0.001

        monkeypatch.setattr(FencedClient, "next_server", impatient)
        async with own_server() as server:
            worker = await connect("worker-1", server=server)
            got: list[BusMessage] = []
            await worker.subscribe(subjects.infer(unique), got.append, queue="free")
            await worker.barrier()
            with capture_logs() as logs:
                os.kill(server.pid, signal.SIGKILL)
                await server.wait()
                await eventually(lambda: tries > 100)  # nats-py gives up after 60
        loud = [entry["event"] for entry in logs if entry["log_level"] != "debug"]
        assert loud == ["bus.disconnected"]
        assert not worker.connected
        assert not worker.closed.is_set()
        async with own_server(port=server.port) as server:
            await eventually(lambda: worker.connected)
            await worker.barrier()
            router = await connect("router-1", server=server)
            await router.publish(subjects.infer(unique), b"")
            await router.barrier()
            await worker.barrier()
            assert len(got) == 1

    async def test_a_subscription_left_while_away_does_not_come_back(
        self, connect: Any, own_server: Any, eventually: Any, unique: str
    ) -> None:
        async with own_server() as server:
            worker = await connect("worker-1", server=server)
            left = await worker.subscribe(subjects.infer(unique), lambda _: None, queue="free")
            await worker.barrier()
        await eventually(lambda: not worker.connected)
        await left.leave()
        async with own_server(port=server.port) as server:
            router = await connect("router-1", server=server)
            statuses: list[str] = []
            await router.subscribe(f"{router.inbox}.r.*", lambda m: statuses.append(m.status))
            await eventually(lambda: worker.connected)
            await worker.barrier()
            await router.publish(subjects.infer(unique), b"", reply=f"{router.inbox}.r.1")
            await router.barrier()
            assert statuses == ["503"]

    async def test_a_subscription_left_as_the_connection_breaks_does_not_come_back(
        self, connect: Any, own_server: Any, pause: Any, eventually: Any, unique: str
    ) -> None:
        """nats-py keeps it when the round trip of its drain fails, and renews it."""
        async with own_server() as server:
            worker = await connect("worker-1", server=server)
            left = await worker.subscribe(subjects.infer(unique), lambda _: None, queue="free")
            await worker.barrier()
            await pause(server)
            leaving = asyncio.create_task(left.leave())
            await asyncio.sleep(0.02)
            os.kill(server.pid, signal.SIGKILL)
            with capture_logs() as logs:
                await leaving
            assert [entry["event"] for entry in logs if entry["event"] == "bus.leave_unconfirmed"]
        async with own_server(port=server.port) as server:
            await eventually(lambda: worker.connected)
            await worker.barrier()
            router = await connect("router-1", server=server)
            with pytest.raises(BusUnavailable, match="nobody listens"):
                await router.request(subjects.infer(unique), b"", timeout=5)

    async def test_a_reader_that_dies_is_replaced(
        self, connect: Any, eventually: Any, unique: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        states: list[bool] = []
        worker = await connect("worker-1", on_state=states.append)
        got: list[BusMessage] = []
        await worker.subscribe(subjects.infer(unique), got.append, queue="free")

        async def broken() -> None:
            raise ZeroDivisionError("on purpose")

        monkeypatch.setattr(worker._client, "_process_pong", broken)
        with pytest.raises(BusUnavailable):
            await worker.barrier()
        monkeypatch.undo()
        await eventually(lambda: states == [True, False, True])
        await worker.barrier()
        router = await connect("router-1")
        await router.publish(subjects.infer(unique), b"")
        await router.barrier()
        await worker.barrier()
        assert len(got) == 1

    async def test_a_reconnect_that_fails_unforeseen_ends_the_bus(
        self, connect: Any, own_server: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with own_server() as server:
            bus = await connect("router-1", server=server)

            async def broken(_: Any) -> None:
                raise ZeroDivisionError("on purpose")

            monkeypatch.setattr(bus._client, "_connect_to_server", broken)
        async with asyncio.timeout(20):
            await bus.closed.wait()
        assert not bus.connected

    async def test_patience_is_set(self, connect: Any) -> None:
        """A half-open connection is noticed after 20 to 30 s, not after six minutes."""
        options = (await connect("router-1"))._client.options
        assert options["max_reconnect_attempts"] == -1
        assert options["ping_interval"] == 10
        assert options["max_outstanding_pings"] == 2
        assert options["name"] == "router-1"

    @given(st.lists(st.integers(0, 1000), min_size=1, max_size=5), st.floats(0, 1))
    def test_the_least_failed_server_is_tried_after_a_bounded_random_wait(
        self, failures: list[int], luck: float
    ) -> None:
        uri = Client._parse_server_uri("nats://127.0.0.1:4222")
        pool = [Server(uri=uri, reconnects=count) for count in failures]
        server, delay = choose_server(pool, lambda low, high: low + luck * (high - low))
        assert server is not None
        assert server.reconnects == min(failures)
        assert 0 < delay <= 3.0
        # Without a wait that is drawn, a thousand clients would return in the same instant.
        assert delay == pytest.approx(0.01 + luck * (min(3.0, 0.1 * 2 ** min(*failures, 5)) - 0.01))

    def test_no_server_at_all_is_no_error(self) -> None:
        """nats-py calls again without a pause when the choice raises."""
        assert choose_server([], lambda low, high: high) == (None, 3.0)
