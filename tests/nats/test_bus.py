"""What the bus promises, against a real server."""

import asyncio
import socket
import threading
from collections import Counter
from typing import Any

import pytest
import uvloop
from structlog.testing import capture_logs

from shared import subjects
from shared.broker import MAX_PAYLOAD, NatsServer
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.errors import PayloadTooLarge

pytestmark = pytest.mark.nats


async def test_a_message_arrives_as_it_was_sent(connect: Any, unique: str) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    got: list[BusMessage] = []
    await worker.subscribe(subjects.infer(unique), got.append, queue=subjects.FREE)
    await worker.barrier()
    headers = {"Mesh-Version": "1", "traceparent": "00-ab: cd-01"}
    await router.publish(
        subjects.infer(unique), b"\x00\r\nbody", reply=f"{router.inbox}.r.1", headers=headers
    )
    await router.publish(subjects.infer(unique), b"")
    await router.barrier()
    await worker.barrier()
    assert got == [
        BusMessage(subjects.infer(unique), f"{router.inbox}.r.1", b"\x00\r\nbody", headers, ""),
        BusMessage(subjects.infer(unique), "", b"", None, ""),
    ]


async def test_after_a_barrier_the_subscription_is_known_to_all(connect: Any, unique: str) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    got: list[BusMessage] = []
    for number in range(300):
        subject = subjects.infer(f"{unique}-{number}")
        await worker.subscribe(subject, got.append, queue=subjects.FREE)
        await worker.barrier()
        await router.publish(subject, b"")
    await router.barrier()
    await worker.barrier()
    assert len(got) == 300


async def test_a_barrier_is_one_even_behind_megabytes(connect: Any, unique: str) -> None:
    """The socket takes them in pieces; a PING that overtakes them would prove nothing."""
    router, worker = await connect("router-1"), await connect("worker-1")
    got: list[int] = []
    await worker.subscribe(
        subjects.infer(unique), lambda message: got.append(len(message.data)), queue=subjects.FREE
    )
    await worker.barrier()
    body = bytes(2**20)
    for _ in range(20):
        await router.publish(subjects.infer(unique), body)
    await router.barrier(timeout=10)
    await worker.barrier(timeout=10)
    assert got == [2**20] * 20


async def test_no_responders_name_the_slot(connect: Any, unique: str) -> None:
    router = await connect("router-1")
    got: list[BusMessage] = []
    await router.subscribe(f"{router.inbox}.r.*", got.append)
    await router.publish(subjects.infer(unique), b"x", reply=f"{router.inbox}.r.41")
    await router.barrier()
    assert [(m.subject, m.status, m.data) for m in got] == [(f"{router.inbox}.r.41", "503", b"")]


async def test_a_worker_that_left_the_group_is_no_responder(connect: Any, unique: str) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    statuses: list[str] = []
    await router.subscribe(f"{router.inbox}.r.*", lambda message: statuses.append(message.status))
    joined = await worker.subscribe(subjects.infer(unique), lambda _: None, queue=subjects.FREE)
    await worker.barrier()
    await router.publish(subjects.infer(unique), b"x", reply=f"{router.inbox}.r.1")
    await router.barrier()
    assert statuses == []
    await joined.leave()
    await router.publish(subjects.infer(unique), b"x", reply=f"{router.inbox}.r.1")
    await router.barrier()
    assert statuses == ["503"]


async def test_requests_are_answered_each_with_its_own(connect: Any) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    replies: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as group:

        def echo(message: BusMessage) -> None:
            replies.append(group.create_task(worker.publish(message.reply, message.data)))

        await worker.subscribe(subjects.ping("worker-1"), echo)
        await worker.barrier()
        asked = [
            router.request(subjects.ping("worker-1"), b"%d" % number, timeout=5)
            for number in range(50)
        ]
        answers = await asyncio.gather(*asked)
    assert [answer.data for answer in answers] == [b"%d" % number for number in range(50)]


async def test_a_request_to_nobody_fails_at_once_and_an_unanswered_one_in_time(
    connect: Any,
) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    with pytest.raises(BusUnavailable, match=r"nobody listens on mesh\.v1\.ping\.absent"):
        await router.request(subjects.ping("absent"), b"", timeout=60)
    await worker.subscribe(subjects.ping("worker-1"), lambda _: None)
    await worker.barrier()
    with pytest.raises(BusUnavailable, match=r"no answer on mesh.v1.ping.worker-1 within 0.1 s"):
        await router.request(subjects.ping("worker-1"), b"", timeout=0.1)


async def test_leaving_under_load_loses_nothing(connect: Any, unique: str) -> None:
    """Two members; each leaves and joins again over and over while the other stays."""
    router = await connect("router-1")
    workers = [await connect("worker-1"), await connect("worker-2")]
    got: Counter[bytes] = Counter()

    def take(message: BusMessage) -> None:
        got[message.data] += 1

    async def join(worker: Bus) -> Any:
        joined = await worker.subscribe(subjects.infer(unique), take, queue=subjects.FREE)
        await worker.barrier()
        return joined

    members = [await join(worker) for worker in workers]
    sent = 0
    stop = asyncio.Event()

    async def load() -> None:
        nonlocal sent
        while not stop.is_set():
            for _ in range(20):
                await router.publish(subjects.infer(unique), b"%d" % sent)
                sent += 1
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as group:
        group.create_task(load())
        turn = 0
        # Both, however fast the machine leaves or sends.
        while turn < 100 or sent < 2000:
            await members[turn % 2].leave()
            members[turn % 2] = await join(workers[turn % 2])
            turn += 1
        stop.set()
    await router.barrier()
    for worker in workers:
        await worker.barrier()
    assert got == {b"%d" % number: 1 for number in range(sent)}


async def test_what_a_slow_callback_is_sent_is_neither_dropped_nor_reordered(
    connect: Any, unique: str
) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    got: list[bytes] = []

    def slow(message: BusMessage) -> None:
        if len(got) % 1000 == 0:
            # Blocking on purpose, longer than the sender needs for hundreds of messages.
            threading.Event().wait(0.02)
        got.append(message.data)

    await worker.subscribe(subjects.infer(unique), slow, queue=subjects.FREE)
    await worker.barrier()
    for number in range(30_000):
        await router.publish(subjects.infer(unique), b"%d" % number)
    await router.barrier(timeout=30)
    await worker.barrier(timeout=30)
    assert got == [b"%d" % number for number in range(30_000)]


async def test_an_exception_in_a_callback_is_logged_and_ends_nothing(
    connect: Any, unique: str
) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    got: list[bytes] = []

    def fragile(message: BusMessage) -> None:
        if message.data == b"bad":
            raise ZeroDivisionError("on purpose")
        got.append(message.data)

    await worker.subscribe(subjects.infer(unique), fragile, queue=subjects.FREE)
    await worker.barrier()
    with capture_logs() as logs:
        for data in (b"1", b"bad", b"2"):
            await router.publish(subjects.infer(unique), data)
        await router.barrier()
        await worker.barrier()
    assert got == [b"1", b"2"]
    failures = [entry for entry in logs if entry["event"] == "bus.callback_failed"]
    assert [(f["subject"], f["log_level"]) for f in failures] == [(subjects.infer(unique), "error")]


async def test_eight_mebibytes_pass_and_one_more_byte_is_refused(connect: Any, unique: str) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    assert router.max_payload == MAX_PAYLOAD == 8 * 1024 * 1024
    got: list[bytes] = []
    await worker.subscribe(
        subjects.infer(unique), lambda message: got.append(message.data), queue=subjects.FREE
    )
    await worker.barrier()
    body = bytes(range(256)) * (MAX_PAYLOAD // 256)
    await router.publish(subjects.infer(unique), body)
    with pytest.raises(PayloadTooLarge, match=f"{MAX_PAYLOAD + 1} bytes.*{MAX_PAYLOAD} bytes"):
        await router.publish(subjects.infer(unique), body + b"x")
    await router.barrier(timeout=10)
    await worker.barrier(timeout=10)
    assert len(got) == 1
    assert got[0] == body


async def test_closing_sends_what_was_published(
    connect: Any, nats_server: NatsServer, unique: str
) -> None:
    worker = await connect("worker-1")
    got: list[BusMessage] = []
    await worker.subscribe(subjects.infer(unique), got.append, queue=subjects.FREE)
    await worker.barrier()
    url = nats_server.url_for("router-1")
    async with Bus.connect(url, identity="router-1", kind="router") as router:
        for _ in range(1000):
            await router.publish(subjects.infer(unique), bytes(1000))
    await worker.barrier()
    assert len(got) == 1000


async def test_the_state_is_told_from_the_first_connection_to_the_last(
    nats_server: NatsServer,
) -> None:
    states: list[bool] = []
    url = nats_server.url_for("router-1")
    async with Bus.connect(url, identity="router-1", kind="router", on_state=states.append) as bus:
        assert bus.connected
        assert not bus.closed.is_set()
        assert states == [True]
    assert not bus.connected
    assert bus.closed.is_set()
    assert states == [True, False]
    with pytest.raises(BusUnavailable):
        await bus.publish("x", b"")
    with pytest.raises(BusUnavailable):
        await bus.subscribe("x", lambda _: None)
    with pytest.raises(BusUnavailable):
        await bus.barrier()


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_small_messages_are_not_held_back(nats_server: NatsServer, factory: Any) -> None:
    async def nodelay() -> int:
        url = nats_server.url_for("router-1")
        async with Bus.connect(url, identity="router-1", kind="router") as bus:
            writer = bus._client._transport._bare_io_writer
            sock = writer.get_extra_info("socket")
            return int(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(nodelay())


class TestWrongUrls:
    """One clear line that names the server and never the password."""

    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("nats://router-1:s3cr3t@127.0.0.1:1", "nats://127.0.0.1:1: connection refused"),
            ("nats://router-1:s3cr3t@no-such-host.invalid", "no-such-host.invalid:4222: "),
            ("http://router-1:s3cr3t@127.0.0.1:1", "number 1 is wrong; wanted nats://HOST:PORT"),
            ("nats://router-1:s3cr3t@127.0.0.1:port", "number 1 is wrong"),
            ("nats://router-1:s3cr3t@127.0.0.1:99999", "number 1 is wrong"),
            ("nats://router-1:s3cr3t@", "number 1 is wrong"),
            ("nats://router-1:s3cr3t@127.0.0.1:1,nats://other:s3cr3t@127.0.0.1:2", "users"),
            ("", "NATS URL is empty"),
            (" , ", "NATS URL is empty"),
        ],
    )
    async def test_is_told_in_one_line(self, url: str, reason: str) -> None:
        with capture_logs() as logs, pytest.raises(BusUnavailable) as caught:
            async with Bus.connect(url, identity="router-1", kind="router", timeout=10):
                pass
        message = str(caught.value)
        assert reason in message
        assert "\n" not in message
        assert "s3cr3t" not in message + repr(logs)

    async def test_a_wrong_password_is_refused_at_once(self, nats_server: NatsServer) -> None:
        url = f"nats://router-1:s3cr3t@127.0.0.1:{nats_server.port}"
        with pytest.raises(BusUnavailable, match="user or password refused") as caught:
            async with Bus.connect(url, identity="router-1", kind="router", timeout=60):
                pass
        assert "s3cr3t" not in str(caught.value)

    @pytest.mark.parametrize("login", ["", "router-1@"])
    async def test_nobody_enters_without_a_password(
        self, nats_server: NatsServer, login: str
    ) -> None:
        url = f"nats://{login}127.0.0.1:{nats_server.port}"
        with pytest.raises(BusUnavailable, match="user or password refused"):
            async with Bus.connect(url, identity="router-1", kind="router"):
                pass

    @pytest.mark.parametrize(
        "says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"INFO {\r\n", None]
    )
    async def test_a_server_that_is_not_nats(self, says: bytes | None) -> None:
        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                if says is None:
                    await silent.wait()
                else:
                    writer.write(says)
            finally:
                writer.close()

        silent = asyncio.Event()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            with pytest.raises(BusUnavailable, match=f"NATS at nats://127.0.0.1:{port}: .+"):
                async with Bus.connect(
                    f"127.0.0.1:{port}", identity="router-1", kind="router", timeout=1
                ):
                    pass
        finally:
            silent.set()
            server.close()
            await server.wait_closed()

    async def test_one_reachable_server_of_several_is_enough(self, nats_server: NatsServer) -> None:
        """The login of one URL counts for all."""
        url = f"127.0.0.1:1,{nats_server.url_for('router-1')},nats://127.0.0.1:2"
        for _ in range(5):  # the order is drawn anew each time
            async with Bus.connect(url, identity="router-1", kind="router") as bus:
                await bus.barrier()

    @pytest.mark.parametrize("identity", ["", "a.b", "a b", ">"])
    async def test_an_identity_that_is_none(self, nats_server: NatsServer, identity: str) -> None:
        with pytest.raises(ValueError, match="identity"):
            async with Bus.connect(
                nats_server.url_for("router-1"), identity=identity, kind="router"
            ):
                pass
