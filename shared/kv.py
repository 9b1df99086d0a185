"""JetStream's key-value buckets: the fleet's common memory. Never on a request's path.

A bucket is a stream with one message a key, as `nats kv` knows it. Readers need no watcher: the
server tells every write on a plain subject (`Kv.follow`), also right after a reconnect. Writing
with a revision is compare-and-set. Every call ends within its timeout.

JetStream answers to any reply subject, in the name of the server: an answer sent to one of its own
commands would delete a bucket (tried). Workers, who are trusted least, may therefore read no bucket
and write only such as do not acknowledge; `shared.broker_config` grants accordingly.
"""

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from shared import subjects
from shared.bus import Bus, BusMessage, BusUnavailable, Subscription

__all__ = (
    "DEMAND",
    "LEASE_SECONDS",
    "MODELS",
    "ROLES",
    "WORKERS",
    "Bucket",
    "Conflict",
    "Entry",
    "Kv",
)

TIMEOUT = 5.0
"""Seconds; a cluster that has lost a stream's leader takes 4.5 s to choose another."""

_PAGE = 500
"""Entries asked for at a time when a bucket is read."""
_DELETED = ("DEL", "PURGE")
_OPERATION = "KV-Operation"
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_TTL = "Nats-TTL"
_SEQUENCE = "Nats-Sequence"
_WRONG_REVISION = 10071
_NAME_IN_USE = 10058
_NOT_CLUSTERED = 10074
_NO_PEERS = 10005
"""Too few servers, or some of them away."""
_TOMBSTONE_SECONDS = 5

_DELETION = {_OPERATION: "DEL", _TTL: f"{_TOMBSTONE_SECONDS}s"}

_log = structlog.get_logger()


class Bucket(msgspec.Struct, frozen=True):
    """A bucket as it is made."""

    name: str
    ttl: float
    """Seconds after which an entry that was not written again is gone; 0: never."""
    largest: int
    """Bytes of all entries; writes beyond are refused."""
    answers: bool = True
    """Whether a write is acknowledged. Else whoever writes learns of it by following."""


LEASE_SECONDS = 10.0
"""How long a lease lasts that is not renewed: the server forgets it then, by its own clock."""

DEMAND = Bucket(subjects.DEMAND, ttl=900.0, largest=16 << 20)
ROLES = Bucket(subjects.ROLES, ttl=LEASE_SECONDS, largest=8 << 20, answers=False)
WORKERS = Bucket(subjects.WORKERS, ttl=300.0, largest=64 << 20, answers=False)
MODELS = Bucket(subjects.MODELS, ttl=0.0, largest=8 << 20)


class Entry(msgspec.Struct, frozen=True):
    """A key as it was written."""

    key: str
    value: bytes | None
    """None: it was deleted."""
    revision: int


class Conflict(Exception):
    """Another revision is there than was expected; `revision` is it, 0 if the key is absent."""

    def __init__(self, key: str, revision: int) -> None:
        super().__init__(f"{key}: revision {revision} is there")
        self.revision = revision


class _Refusal(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    error: _Refusal | None = None


_ack = msgspec.json.Decoder(_Ack)


class Kv:
    """The buckets as one bus may use them; all raise BusUnavailable when NATS does not answer."""

    def __init__(self, bus: Bus, *, timeout: float = TIMEOUT) -> None:
        self._bus = bus
        self._timeout = timeout
        self._pages = 0

    async def make(self, *buckets: Bucket) -> None:
        """Make those buckets that are not there; one that is there stays as it is.

        In a cluster three servers hold a bucket. Where fewer are there, one holds it, from then on.
        """
        for bucket in buckets:
            for replicas in (3, 1):
                refusal = await self._make(bucket, replicas)
                if refusal is None:
                    break
                if refusal.err_code == _NAME_IN_USE:
                    _log.debug("kv.bucket_differs", bucket=bucket.name)
                    break
                if replicas == 1 or refusal.err_code not in (_NOT_CLUSTERED, _NO_PEERS):
                    raise BusUnavailable(f"bucket {bucket.name}: {refusal.description}")
                if refusal.err_code == _NO_PEERS:
                    _log.warning("kv.bucket_on_one_server", bucket=bucket.name)

    async def get(self, bucket: Bucket, key: str) -> Entry | None:
        """Read one key; None if it is absent or deleted."""
        subject = subjects.bucket_entry(bucket.name, key)
        answer = await self._request(
            bucket,
            subjects.bucket_read(bucket.name),
            msgspec.json.encode({"last_by_subj": subject}),
        )
        if answer.status == "404":
            return None
        entry = _entry(bucket, answer, (answer.headers or {}).get("Nats-Subject", ""))
        return None if entry is None or entry.value is None else entry

    async def read(self, bucket: Bucket) -> list[Entry]:
        """Read all keys, the deleted ones too while they are remembered.

        A key that is written meanwhile may come twice, the later one last.
        """
        entries: list[Entry] = []
        first = 1
        while first:
            page, first = await self._page(bucket, first)
            entries += page
        return entries

    async def put(self, bucket: Bucket, key: str, value: bytes) -> int:
        """Write a key whatever was there; returns the revision."""
        return await self._write(bucket, key, value, {})

    async def tell(
        self, bucket: Bucket, key: str, value: bytes | None, revision: int | None = None
    ) -> None:
        """Write, or delete with None, without an answer; those who follow see whether it was taken.

        With a revision it is taken only if that is the last one; 0: if the key is absent.
        """
        headers = dict(_DELETION) if value is None else {}
        if revision is not None:
            headers[_EXPECTED] = str(revision)
        subject = subjects.bucket_entry(bucket.name, key)
        await self._bus.publish(subject, value or b"", headers=headers or None)

    async def create(self, bucket: Bucket, key: str, value: bytes) -> int:
        """Write a key that is absent.

        Raises:
            Conflict: it is there, or its deletion is still remembered.
        """
        return await self.update(bucket, key, value, 0)

    async def update(self, bucket: Bucket, key: str, value: bytes, revision: int) -> int:
        """Write a key whose revision is known; raises Conflict if it is another by now."""
        return await self._write(bucket, key, value, {_EXPECTED: str(revision)})

    async def delete(self, bucket: Bucket, key: str, revision: int | None = None) -> int:
        """Delete a key, if a revision is given only that one; raises Conflict.

        The deletion is a revision of its own, forgotten after some seconds.
        """
        headers = dict(_DELETION)
        if revision is not None:
            headers[_EXPECTED] = str(revision)
        return await self._write(bucket, key, b"", headers)

    async def follow(self, bucket: Bucket, take: Callable[[Entry], object]) -> Subscription:
        """Have `take` called with each write from now on, as long as the connection stands.

        After a reconnect it goes on by itself; what was written meanwhile is not told again.
        """

        prefix = subjects.bucket_told(bucket.name, "")

        def told(message: BusMessage) -> None:
            entry = _entry(bucket, message, message.subject, prefix)
            if entry is not None:
                take(entry)

        return await self._bus.subscribe(subjects.bucket_told(bucket.name), told)

    async def _make(self, bucket: Bucket, replicas: int) -> _Refusal | None:
        everything = subjects.bucket_entry(bucket.name, ">")
        config = {
            "name": f"KV_{bucket.name}",
            "subjects": [everything],
            "max_msgs_per_subject": 1,
            "max_bytes": bucket.largest,
            "max_age": int(bucket.ttl * 1e9),
            "duplicate_window": int(min(bucket.ttl or 120.0, 120.0) * 1e9),
            # A server that restarts forgets a bucket in memory, and that there was one.
            "storage": "file",
            "discard": "new",
            "num_replicas": replicas,
            "no_ack": not bucket.answers,
            # No key may be purged: an answer sent to that command would be obeyed.
            "deny_purge": True,
            "allow_direct": True,
            "allow_msg_ttl": True,
            "deny_delete": True,
            "republish": {"src": everything, "dest": subjects.bucket_told(bucket.name)},
        }
        answer = await self._request(
            bucket, subjects.bucket_create(bucket.name), msgspec.json.encode(config)
        )
        return _decode_ack(bucket, answer).error

    async def _write(self, bucket: Bucket, key: str, value: bytes, headers: dict[str, str]) -> int:
        answer = await self._request(
            bucket, subjects.bucket_entry(bucket.name, key), value, headers or None
        )
        ack = _decode_ack(bucket, answer)
        if ack.error is None:
            return ack.seq
        if ack.error.err_code == _WRONG_REVISION:
            last = ack.error.description.rpartition(" ")[2]
            raise Conflict(key, int(last) if last.isdigit() else 0)
        raise BusUnavailable(f"bucket {bucket.name}: {ack.error.description}")

    async def _page(self, bucket: Bucket, first: int) -> tuple[list[Entry], int]:
        """Entries from sequence `first` on, and where the next page begins; 0: nowhere."""
        self._pages += 1
        inbox = f"{self._bus.inbox}.kv.{self._pages}"
        entries: list[Entry] = []
        over: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def take(message: BusMessage) -> None:
            if over.done():
                return
            headers = message.headers or {}
            if message.status == "204" and int(headers.get("Nats-Num-Pending", 0)):
                over.set_result(int(headers.get("Nats-Last-Sequence", 0)) + 1)
            elif message.status in ("204", "404"):
                over.set_result(0)
            elif message.status:
                over.set_exception(_missing(bucket, message))
            else:
                entry = _entry(bucket, message, headers.get("Nats-Subject", ""))
                if entry is not None:
                    entries.append(entry)

        asked = msgspec.json.encode(
            {
                "seq": first,
                "batch": _PAGE,
                "next_by_subj": subjects.bucket_entry(bucket.name, ">"),
            }
        )
        heard = await self._bus.subscribe(inbox, take)
        try:
            await self._bus.publish(subjects.bucket_read(bucket.name), asked, reply=inbox)
            async with asyncio.timeout(self._timeout):
                return entries, await over
        except TimeoutError:
            raise BusUnavailable(
                f"bucket {bucket.name} was not read within {self._timeout:g} s"
            ) from None
        finally:
            await heard.leave()

    async def _request(
        self, bucket: Bucket, subject: str, data: bytes, headers: dict[str, str] | None = None
    ) -> BusMessage:
        answer = await self._bus.request(subject, data, timeout=self._timeout, headers=headers)
        if answer.status not in ("", "404"):
            raise _missing(bucket, answer)
        return answer


def _entry(bucket: Bucket, message: BusMessage, subject: str, prefix: str = "") -> Entry | None:
    start = prefix or subjects.bucket_entry(bucket.name, "")
    headers = message.headers or {}
    sequence = headers.get(_SEQUENCE, "")
    if not subject.startswith(start) or not sequence.isdigit():
        _log.warning("kv.unreadable", bucket=bucket.name, subject=subject)
        return None
    deleted = headers.get(_OPERATION) in _DELETED
    return Entry(subject[len(start) :], None if deleted else message.data, int(sequence))


def _decode_ack(bucket: Bucket, answer: BusMessage) -> _Ack:
    try:
        return _ack.decode(answer.data)
    except msgspec.DecodeError as error:
        raise BusUnavailable(f"bucket {bucket.name}: unreadable answer: {error}") from None


def _missing(bucket: Bucket, answer: BusMessage) -> BusUnavailable:
    return BusUnavailable(f"bucket {bucket.name} cannot be read: status {answer.status}")
