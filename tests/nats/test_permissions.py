"""Who may do what, tried against a real server by identities that do not keep to the rules.

Everybody here is free to send any protocol line: only the server's permissions stand between.
"""

from typing import Any

import pytest
from structlog.testing import capture_logs

from shared import subjects
from shared.bus import Bus, BusMessage

pytestmark = pytest.mark.nats

MODEL = "a/model:1.0"


class Ears:
    """What a bus overhears on subscriptions that it tries to make."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.heard: list[bytes] = []

    async def try_on(self, *tries: str) -> None:
        """Try subscriptions, each `subject` or `subject queue`."""
        for item in tries:
            subject, _, queue = item.partition(" ")
            await self.bus.subscribe(subject, self._take, queue=queue)
        await self.bus.barrier()

    def _take(self, message: BusMessage) -> None:
        self.heard.append(message.data)


async def settle(*buses: Bus) -> None:
    """Twice: an answer to what arrives in the first round is on its way in the second."""
    for _ in range(2):
        for bus in buses:
            await bus.barrier()


async def test_a_worker_serves_and_streams_thousands_of_frames(connect: Any, unique: str) -> None:
    """The default of `allow_responses` is one message; an answer has many."""
    router, worker = await connect("router-1"), await connect("worker-1")
    frames: list[bytes] = []
    requests: list[BusMessage] = []
    await router.subscribe(f"{router.inbox}.r.*", lambda message: frames.append(message.data))
    await worker.subscribe(subjects.infer(unique), requests.append, queue=subjects.FREE)
    await worker.subscribe(subjects.infer_direct(MODEL, "worker-1"), requests.append)
    await worker.subscribe(subjects.doors("worker-1"), requests.append)
    for subject in (subjects.body, subjects.cancel, subjects.ping):
        await worker.subscribe(subject("worker-1"), requests.append)
    await worker.barrier()
    sent = [
        subjects.infer(unique),
        subjects.infer_direct(MODEL, "worker-1"),
        subjects.body("worker-1"),
        subjects.cancel("worker-1"),
        subjects.ping("worker-1"),
    ]
    for subject in sent:
        await router.publish(subject, b"", reply=f"{router.inbox}.r.7")
    await settle(router, worker)
    assert {message.subject for message in requests} == set(sent)
    for number in range(3000):
        await worker.publish(requests[0].reply, b"%d" % number)
    await settle(worker, router)
    assert frames == [b"%d" % number for number in range(3000)]


async def test_beats_are_seen_by_routers_and_observers(connect: Any) -> None:
    worker, router, observer = [await connect(n) for n in ("worker-1", "router-1", "mesh-1")]
    ears = [Ears(router), Ears(observer)]
    for listener in ears:
        await listener.try_on(subjects.BEATS, subjects.ROUTERS)
    await worker.publish(subjects.beat("worker-1"), b"worker's")
    await settle(worker)
    await router.publish(subjects.router("router-1"), b"router's")
    await settle(router, observer)
    assert [listener.heard for listener in ears] == [[b"worker's", b"router's"]] * 2


async def test_an_observer_pings(connect: Any) -> None:
    observer, worker = await connect("mesh-1"), await connect("worker-1")
    pings: list[BusMessage] = []
    await worker.subscribe(subjects.ping("worker-1"), pings.append)
    await worker.barrier()
    await observer.publish(subjects.ping("worker-1"), b"?", reply=f"{observer.inbox}.q.1")
    await settle(observer, worker)
    assert [ping.data for ping in pings] == [b"?"]


@pytest.mark.parametrize("spy", ["worker-2", "mesh-1", "router-2"])
async def test_nobody_reads_another_s_prompts(connect: Any, spy: str) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    door = subjects.infer_direct(MODEL, "worker-1")
    prompts: list[BusMessage] = []
    for subject in (door, subjects.body("worker-1"), subjects.cancel("worker-1")):
        await worker.subscribe(subject, prompts.append)
    await worker.barrier()
    ears = Ears(await connect(spy))
    tries = [
        door,
        subjects.doors("worker-1"),
        subjects.DIRECT,
        "mesh.v1.direct.>",
        "mesh.v1.direct.worker-1.>",
        "mesh.v1.infer.>",
        subjects.BODIES,
        "mesh.v1.body.>",
        subjects.body("worker-1"),
        subjects.CANCELS,
        subjects.cancel("worker-1"),
        "mesh.v1.>",
        "mesh.>",
        "*.>",
        "*.*.*.*",
        "*.*.*.*.*",
        ">",
    ]
    await ears.try_on(*tries, *[f"{subject} {subjects.FREE}" for subject in tries])
    for subject in (door, subjects.body("worker-1"), subjects.cancel("worker-1")):
        await router.publish(subject, b"secret")
    await settle(router, worker, ears.bus)
    assert len(prompts) == 3
    assert ears.heard == []


async def test_a_worker_shares_the_queue_but_cannot_listen_beside_it(
    connect: Any, unique: str
) -> None:
    """A plain subscription would see every request, not only those dealt to this worker."""
    router, worker = await connect("router-1"), await connect("worker-1")
    served: list[bytes] = []
    await worker.subscribe(
        subjects.infer(unique), lambda message: served.append(message.data), queue=subjects.FREE
    )
    await worker.barrier()
    ears = Ears(await connect("worker-2"))
    await ears.try_on(
        subjects.infer(unique),
        subjects.INFER,
        "mesh.v1.infer.>",
        f"{subjects.infer(unique)} other",
        f"{subjects.INFER} other",
        f"{subjects.INFER} *",
        f"{subjects.INFER} >",
    )
    for number in range(100):
        await router.publish(subjects.infer(unique), b"%d" % number)
    await settle(router, worker, ears.bus)
    assert len(served) == 100
    assert ears.heard == []


@pytest.mark.parametrize("spy", ["worker-2", "mesh-1", "router-2"])
async def test_nobody_reads_another_s_answers(connect: Any, spy: str) -> None:
    router, worker = await connect("router-1"), await connect("worker-1")
    asked: list[BusMessage] = []
    frames: list[bytes] = []
    await worker.subscribe(subjects.infer_direct(MODEL, "worker-1"), asked.append)
    await router.subscribe(f"{router.inbox}.r.*", lambda message: frames.append(message.data))
    await settle(worker, router)
    ears = Ears(await connect(spy))
    tries = [f"{router.inbox}.r.1", f"{router.inbox}.*.*", f"{router.inbox}.>", "*.r.*", "*.>", ">"]
    await ears.try_on(*tries, *[f"{subject} {subjects.FREE}" for subject in tries])
    await router.publish(subjects.infer_direct(MODEL, "worker-1"), b"", reply=f"{router.inbox}.r.1")
    await settle(router, worker)
    await worker.publish(asked[0].reply, b"secret")
    await settle(worker, router, ears.bus)
    assert frames == [b"secret"]
    assert ears.heard == []


@pytest.mark.parametrize("forger", ["worker-2", "mesh-1", "router-2"])
async def test_nobody_forges_another_s_tokens(connect: Any, forger: str) -> None:
    """Only who was sent a request may publish on its reply subject, and on no other."""
    router, worker, bad = [await connect(name) for name in ("router-1", "worker-1", forger)]
    asked: list[BusMessage] = []
    frames: list[tuple[str, bytes]] = []
    await worker.subscribe(subjects.infer_direct(MODEL, "worker-1"), asked.append)
    await router.subscribe(
        f"{router.inbox}.>", lambda message: frames.append((message.subject, message.data))
    )
    await settle(worker, router)
    await router.publish(subjects.infer_direct(MODEL, "worker-1"), b"", reply=f"{router.inbox}.r.1")
    await settle(router, worker)
    for subject in (f"{router.inbox}.r.1", f"{router.inbox}.r.2", f"{router.inbox}.q.1"):
        await bad.publish(subject, b"forged")
    await worker.publish(f"{router.inbox}.r.2", b"beside the request")
    await worker.publish(asked[0].reply, b"genuine")
    await settle(bad, worker, router)
    assert frames == [(f"{router.inbox}.r.1", b"genuine")]


async def test_a_reply_subject_cannot_be_planted_through_a_beat(connect: Any) -> None:
    """Whoever receives a message may answer it, so that workers must not reach each other."""
    router, one, other = [await connect(name) for name in ("router-1", "worker-1", "worker-2")]
    frames: list[bytes] = []
    await router.subscribe(f"{router.inbox}.r.*", lambda message: frames.append(message.data))
    planted: list[BusMessage] = []
    for subject in (subjects.BEATS, subjects.beat("worker-1"), subjects.ping("worker-2")):
        await other.subscribe(subject, planted.append)
    await settle(router, other)
    for subject in (subjects.beat("worker-1"), subjects.ping("worker-2"), other.inbox + ".x"):
        await one.publish(subject, b"", reply=f"{router.inbox}.r.1")
    await settle(one, other)
    assert planted == []
    await other.publish(f"{router.inbox}.r.1", b"forged")
    await settle(other, router)
    assert frames == []


@pytest.mark.parametrize("forger", ["worker-2", "mesh-1", "router-2"])
async def test_nobody_beats_in_another_s_name(connect: Any, forger: str) -> None:
    router, bad = await connect("router-1"), await connect(forger)
    ears = Ears(router)
    await ears.try_on(subjects.BEATS, subjects.ROUTERS)
    for subject in (subjects.beat("worker-1"), subjects.router("router-1"), subjects.beat("new")):
        await bad.publish(subject, b"forged")
    await settle(bad, router)
    assert ears.heard == []


async def test_a_router_s_credentials_cannot_serve(connect: Any, unique: str) -> None:
    ears = Ears(await connect("router-2"))
    tries = [
        subjects.infer(unique),
        subjects.INFER,
        "mesh.v1.infer.>",
        subjects.DIRECT,
        subjects.infer_direct(unique, "router-2"),
        subjects.doors("router-2"),
        "mesh.v1.>",
        ">",
    ]
    await ears.try_on(*tries, *[f"{subject} {subjects.FREE}" for subject in tries])
    router = await connect("router-1")
    statuses: list[str] = []
    await router.subscribe(f"{router.inbox}.r.*", lambda message: statuses.append(message.status))
    await router.publish(subjects.infer(unique), b"secret", reply=f"{router.inbox}.r.1")
    await settle(router, ears.bus)
    assert ears.heard == []
    # To the server there is nobody: the refused subscriptions do not count as interest.
    assert statuses == ["503"]


@pytest.mark.parametrize("sender", ["worker-2", "mesh-1"])
async def test_only_routers_send_work(connect: Any, sender: str, unique: str) -> None:
    worker, bad = await connect("worker-1"), await connect(sender)
    ears = Ears(worker)
    await ears.try_on(
        f"{subjects.infer(unique)} {subjects.FREE}",
        subjects.infer_direct(MODEL, "worker-1"),
        subjects.body("worker-1"),
        subjects.cancel("worker-1"),
    )
    for subject in (
        subjects.infer(unique),
        subjects.infer_direct(MODEL, "worker-1"),
        subjects.body("worker-1"),
        subjects.cancel("worker-1"),
    ):
        await bad.publish(subject, b"not from a router")
    await settle(bad, worker)
    assert ears.heard == []


@pytest.mark.parametrize("name", ["router-1", "worker-1", "mesh-1"])
async def test_nobody_reaches_jetstream_at_large_or_the_server_s_own_subjects(
    connect: Any, name: str
) -> None:
    bus = await connect(name)
    answers: list[BusMessage] = []
    await bus.subscribe(f"{bus.inbox}.x", answers.append)
    for subject in ("$JS.API.INFO", "$JS.API.STREAM.NAMES", "$SYS.REQ.SERVER.PING", "$SRV.PING"):
        await bus.publish(subject, b"", reply=f"{bus.inbox}.x")
    ears = Ears(bus)
    await ears.try_on("$SYS.>", "$JS.>", "$KV.>", "_INBOX.>")
    await settle(bus)
    assert answers == []
    assert ears.heard == []


async def test_a_refusal_is_logged_and_the_connection_goes_on(connect: Any) -> None:
    bus = await connect("worker-1")
    with capture_logs() as logs:
        await bus.publish("mesh.v1.elsewhere", b"")
        await bus.subscribe("mesh.v1.elsewhere", lambda _: None)
        await bus.barrier()
    errors = [entry["error"] for entry in logs if entry["event"] == "bus.error"]
    assert ["publish" in error for error in errors] == [True, False]
    assert all("permissions violation" in error for error in errors)
    assert bus.connected
