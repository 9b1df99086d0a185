"""Who may write and read which bucket, tried against a real server by identities that do not keep
to the rules; and what JetStream, which answers on any reply subject, can be made to say.
"""

from typing import Any

import msgspec
import pytest

from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable
from shared.kv import DEMAND, MODELS, ROLES, WORKERS, Bucket, Entry, Kv

pytestmark = pytest.mark.nats

BUCKETS = {bucket.name: bucket for bucket in (DEMAND, ROLES, WORKERS, MODELS)}
WRITERS = {
    DEMAND.name: ("router-2", "{}.router-2"),
    ROLES.name: ("worker-2", "{}.0"),
    WORKERS.name: ("worker-2", "worker-2"),
    MODELS.name: ("mesh-1", "{}"),
}
"""Who may write a bucket, and under which key."""


@pytest.fixture
async def mesh(connect: Any) -> Bus:
    bus = await connect("mesh-1")
    await Kv(bus).make(*BUCKETS.values())
    return bus


@pytest.mark.parametrize(
    ("name", "bucket", "key", "allowed"),
    [
        ("router-1", DEMAND, "{}.router-1", True),
        ("router-1", DEMAND, "{}.router-2", False),
        ("router-1", DEMAND, "{}", False),
        ("router-1", ROLES, "{}.0", False),
        ("router-1", WORKERS, "worker-1", False),
        ("router-1", MODELS, "{}", False),
        ("worker-1", DEMAND, "{}.router-1", False),
        ("worker-1", DEMAND, "{}.worker-1", False),
        ("worker-1", ROLES, "{}.0", True),
        ("worker-1", ROLES, "{}", False),
        ("worker-1", WORKERS, "worker-1", True),
        ("worker-1", WORKERS, "worker-2", False),
        ("worker-1", MODELS, "{}", False),
        ("mesh-1", DEMAND, "{}.router-1", False),
        ("mesh-1", ROLES, "{}.0", False),
        ("mesh-1", WORKERS, "worker-1", False),
        ("mesh-1", MODELS, "{}", True),
    ],
)
async def test_each_writes_only_what_is_its_own(
    connect: Any,
    mesh: Bus,
    unique: str,
    eventually: Any,
    name: str,
    bucket: Bucket,
    key: str,
    allowed: bool,
) -> None:
    key = key.format(unique)
    told: list[Entry] = []
    await Kv(mesh).follow(bucket, told.append)
    await mesh.barrier()
    bus = mesh if name == "mesh-1" else await connect(name)
    await Kv(bus).tell(bucket, key, unique.encode())
    await bus.barrier()
    # A bucket takes writes in their order, in its own time: once this one is told, that one was.
    who, its_own = WRITERS[bucket.name]
    other = mesh if who == "mesh-1" else await connect(who)
    last = f"{unique}-last"
    await Kv(other).tell(bucket, its_own.format(last), last.encode())
    await eventually(lambda: any(entry.value == last.encode() for entry in told))
    written = [entry.key for entry in told if entry.value == unique.encode()]
    assert written == ([key] if allowed else [])


@pytest.mark.parametrize("name", ["router-1", "worker-1", "mesh-1"])
async def test_everybody_hears_all_buckets(
    connect: Any, mesh: Bus, unique: str, eventually: Any, name: str
) -> None:
    bus = mesh if name == "mesh-1" else await connect(name)
    told: list[Entry] = []
    for bucket in BUCKETS.values():
        await Kv(bus).follow(bucket, told.append)
    await bus.barrier()
    router, worker = await connect("router-2"), await connect("worker-2")
    await Kv(router).put(DEMAND, f"{unique}.router-2", unique.encode())
    await Kv(worker).tell(ROLES, f"{unique}.1", unique.encode())
    await Kv(worker).tell(WORKERS, "worker-2", unique.encode())
    await Kv(mesh).put(MODELS, unique, unique.encode())
    wanted = {f"{unique}.router-2", f"{unique}.1", "worker-2", unique}
    await eventually(
        lambda: {entry.key for entry in told if entry.value == unique.encode()} == wanted
    )


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("router-1", {"mesh-demand", "mesh-roles", "mesh-workers", "mesh-models"}),
        ("mesh-1", {"mesh-demand", "mesh-roles", "mesh-workers", "mesh-models"}),
        ("worker-1", set()),
    ],
)
async def test_workers_have_no_bucket_read_out_to_a_subject_of_their_choice(
    connect: Any, mesh: Bus, name: str, readable: set[str]
) -> None:
    bus = mesh if name == "mesh-1" else await connect(name)
    found: set[str] = set()
    for bucket in BUCKETS.values():
        try:
            await Kv(bus, timeout=0.3).read(bucket)
        except BusUnavailable:
            continue
        found.add(bucket.name)
    assert found == readable


@pytest.mark.parametrize("name", ["router-1", "worker-1", "mesh-1"])
async def test_nobody_deletes_changes_or_consumes_a_bucket(
    connect: Any, mesh: Bus, name: str, unique: str
) -> None:
    await Kv(mesh).put(MODELS, unique, b"kept")
    bus = mesh if name == "mesh-1" else await connect(name)
    answers: list[str] = []
    await bus.subscribe(f"{bus.inbox}.x", lambda message: answers.append(message.data.decode()))
    for bucket in BUCKETS:
        for call in (
            f"STREAM.DELETE.KV_{bucket}",
            f"STREAM.PURGE.KV_{bucket}",
            f"STREAM.UPDATE.KV_{bucket}",
            f"STREAM.INFO.KV_{bucket}",
            f"STREAM.MSG.GET.KV_{bucket}",
            f"STREAM.MSG.DELETE.KV_{bucket}",
            f"STREAM.SNAPSHOT.KV_{bucket}",
            f"CONSUMER.CREATE.KV_{bucket}",
            "STREAM.CREATE.of-my-own",
        ):
            await bus.publish(f"$JS.API.{call}", b"", reply=f"{bus.inbox}.x")
    await bus.barrier()
    await mesh.barrier()
    assert answers == []
    assert await Kv(mesh).get(MODELS, unique) is not None


async def test_a_worker_makes_no_bucket(connect: Any, mesh: Bus) -> None:
    """Whoever makes it says what it takes in, which might be the prompts."""
    with pytest.raises(BusUnavailable):
        await Kv(await connect("worker-1"), timeout=0.3).make(ROLES)


@pytest.mark.parametrize("empty", [False, True])
async def test_a_worker_cannot_make_jetstream_speak(
    connect: Any, mesh: Bus, unique: str, empty: bool
) -> None:
    """JetStream answers on whatever reply subject it is given, its own commands among them.

    Reading an absent key answers with an empty body, which is what deletes a bucket.
    """
    await Kv(mesh).put(MODELS, unique, b"kept")
    heard: list[BusMessage] = []
    router, worker = await connect("router-1"), await connect("worker-1")
    await router.subscribe(f"{router.inbox}.r.*", heard.append)
    await router.barrier()
    key = f"{unique}-absent" if empty else unique
    read = msgspec.json.encode({"last_by_subj": subjects.bucket_entry(MODELS.name, key)})
    for reply in (
        f"{router.inbox}.r.1",
        subjects.bucket_entry(MODELS.name, unique),
        *(
            f"$JS.API.{command}.KV_mesh-models"
            for command in ("STREAM.PURGE", "STREAM.UPDATE", "STREAM.MSG.DELETE", "STREAM.DELETE")
        ),
    ):
        for bucket in BUCKETS:
            await worker.publish(subjects.bucket_read(bucket), read, reply=reply)
        for written in (
            subjects.bucket_entry(ROLES.name, f"{unique}.0"),
            subjects.bucket_entry(WORKERS.name, "worker-1"),
        ):
            # Refused for its revision, and taken.
            await worker.publish(
                written, b"", reply=reply, headers={"Nats-Expected-Last-Subject-Sequence": "1"}
            )
            await worker.publish(written, b"", reply=reply)
    await worker.barrier()
    await Kv(mesh).put(MODELS, f"{unique}-last", b"")
    await router.barrier()
    kept = await Kv(mesh).get(MODELS, unique)
    assert kept is not None
    assert kept.value == b"kept"
    assert heard == []


@pytest.mark.parametrize("command", ["STREAM.PURGE", "STREAM.UPDATE", "STREAM.MSG.DELETE"])
async def test_an_acknowledgement_is_no_command(
    connect: Any, mesh: Bus, unique: str, command: str
) -> None:
    """Routers write buckets that answer; their answers must not be taken for orders either."""
    await Kv(mesh).put(MODELS, unique, b"kept")
    router = await connect("router-1")
    entry = subjects.bucket_entry(DEMAND.name, f"{unique}.router-1")
    await router.publish(entry, b"", reply=f"$JS.API.{command}.KV_mesh-models")
    await router.barrier()
    await Kv(router).put(DEMAND, f"{unique}.router-1", b"")
    assert await Kv(mesh).get(MODELS, unique) is not None


async def test_what_is_told_of_a_bucket_opens_no_reply_subject(
    connect: Any, mesh: Bus, unique: str, eventually: Any
) -> None:
    """A worker may answer what it receives; what workers write reaches workers."""
    router, one, other = [await connect(name) for name in ("router-1", "worker-1", "worker-2")]
    frames: list[bytes] = []
    await router.subscribe(f"{router.inbox}.r.*", lambda message: frames.append(message.data))
    told: list[str] = []
    for bucket in (ROLES, WORKERS):
        await other.subscribe(
            subjects.bucket_told(bucket.name), lambda message: told.append(message.reply)
        )
    await other.barrier()
    for subject in (
        subjects.bucket_entry(subjects.ROLES, f"{unique}.0"),
        subjects.bucket_entry(subjects.WORKERS, "worker-1"),
    ):
        await one.publish(subject, b"", reply=f"{router.inbox}.r.1")
    # Through a bucket it takes a moment longer than a barrier.
    await eventually(lambda: len(told) == 2)
    assert told == ["", ""]
    await other.publish(f"{router.inbox}.r.1", b"forged")
    await other.barrier()
    await router.barrier()
    assert frames == []
