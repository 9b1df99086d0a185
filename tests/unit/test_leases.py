"""Leases against a bucket that is played: any order of claims, delays, losses and deaths."""

import asyncio
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kv import LEASE_SECONDS, Bucket, Entry
from shared.leases import Lease, LeaseKey, Leases, LeaseTable

KEY = LeaseKey("a/b:c", 0)


class PlayedBucket:
    """The roles bucket as the server keeps it: compare-and-set, forgetting by its own clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.revision = 0
        self.kept: dict[str, tuple[Entry, float]] = {}
        self.coming: deque[tuple[str, bytes | None, int | None]] = deque()
        self.told: list[deque[Entry]] = []

    def expected(self, key: str) -> int:
        kept = self.kept.get(key)
        return kept[0].revision if kept and self.now - kept[1] < LEASE_SECONDS else 0

    def take(self) -> None:
        """Decide about the next write that arrives."""
        key, value, expected = self.coming.popleft()
        if expected is not None and expected != self.expected(key):
            return
        self.revision += 1
        entry = Entry(key, value, self.revision)
        self.kept[key] = (entry, self.now)
        for queue in self.told:
            queue.append(entry)


class PlayedKv:
    def __init__(self, bucket: PlayedBucket) -> None:
        self.bucket = bucket
        self.queue: deque[Entry] = deque()
        bucket.told.append(self.queue)
        self.callback: Callable[[Entry], None] = lambda _: None

    async def follow(self, bucket: Bucket, take: Callable[[Entry], None]) -> None:
        self.callback = take

    async def tell(
        self, bucket: Bucket, key: str, value: bytes | None, revision: int | None = None
    ) -> None:
        self.bucket.coming.append((key, value, revision))

    def hear(self) -> None:
        self.callback(self.queue.popleft())


class Worker:
    def __init__(self, name: str, bucket: PlayedBucket) -> None:
        self.kv = PlayedKv(bucket)
        self.lost: list[tuple[LeaseKey, str]] = []
        self.changes = 0
        self.leases = Leases(
            self.kv,  # type: ignore[arg-type]
            name,
            on_change=self.changed,
            on_lost=lambda key, holder: self.lost.append((key, holder)),
            clock=lambda: bucket.now,
            # Hosts' clocks may say what they like.
            wall=lambda: 1000.0 * (hash(name) % 1000) + bucket.now,
        )

    def changed(self) -> None:
        self.changes += 1

    def claim(self) -> "asyncio.Task[bool]":
        return asyncio.create_task(self.leases.claim(KEY))


async def settle(bucket: PlayedBucket, *workers: Worker) -> None:
    """Everything that is on its way arrives."""
    for _ in range(3):
        await asyncio.sleep(0)
    while bucket.coming:
        bucket.take()
    for worker in workers:
        while worker.kv.queue:
            worker.kv.hear()
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.fixture
async def two() -> tuple[PlayedBucket, Worker, Worker]:
    bucket = PlayedBucket()
    workers = Worker("worker-1", bucket), Worker("worker-2", bucket)
    for worker in workers:
        await worker.leases.open()
    return bucket, *workers


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "renew", "release", "take", "take", "hear", "hear", "lose"]),
        st.integers(0, 2),
        st.sampled_from([0.0, 0.0, 0.1, 1.0, LEASE_SECONDS / 2, LEASE_SECONDS]),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_never_are_two_workers_sure_of_one_lease(steps: list[tuple[str, int, float]]) -> None:
    async def play() -> None:
        bucket = PlayedBucket()
        workers = [Worker(f"worker-{number}", bucket) for number in range(3)]
        for worker in workers:
            await worker.leases.open()
        tasks = []
        for what, number, passed in steps:
            worker = workers[number]
            if what == "claim":
                tasks.append(worker.claim())
                await asyncio.sleep(0)
            elif what == "renew":
                await worker.leases.renew()
            elif what == "release":
                await worker.leases.release(KEY)
            elif what == "take" and bucket.coming:
                bucket.take()
            elif what == "hear" and worker.kv.queue:
                worker.kv.hear()
                await asyncio.sleep(0)
            elif what == "lose" and worker.kv.queue:
                worker.kv.queue.popleft()
            bucket.now += passed
            sure = [w for w in workers if w.leases.sure(KEY)]
            assert len(sure) <= 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(play())


async def test_one_claims_and_the_other_sees_it(two):
    bucket, one, other = two
    claims = one.claim(), other.claim()
    await settle(bucket, one, other)
    assert [claim.result() for claim in claims] == [True, False]
    assert one.leases.held == {KEY}
    assert one.leases.sure(KEY)
    assert other.leases.held == frozenset()
    holder = other.leases.table.holder(KEY, bucket.now)
    assert holder is not None
    assert holder.worker == "worker-1"
    # Whoever sees a live lease does not even try.
    assert await other.leases.claim(KEY) is False
    assert not bucket.coming


async def test_renewed_it_stays_and_is_no_news(two):
    bucket, one, other = two
    claim = one.claim()
    await settle(bucket, one, other)
    assert claim.result()
    changes = other.changes
    for _ in range(10):
        bucket.now += LEASE_SECONDS / 2
        await one.leases.renew()
        await settle(bucket, one, other)
        assert one.leases.sure(KEY)
        assert [key for key, _ in other.leases.table.live(bucket.now)] == [KEY]
    assert other.changes == changes
    assert one.leases.mark(KEY.model, "ready")
    assert not one.leases.mark(KEY.model, "ready")
    await one.leases.renew()
    await settle(bucket, one, other)
    assert other.changes == changes + 1
    holder = other.leases.table.holder(KEY, bucket.now)
    assert holder is not None
    assert holder.state == "ready"


async def test_released_it_can_be_claimed_at_once_also_by_who_knows_nothing_of_it(two):
    bucket, one, other = two
    claim = one.claim()
    await settle(bucket, one, other)
    await one.leases.release(KEY)
    await settle(bucket, one, other)
    assert one.leases.held == frozenset()
    again = other.claim()
    await settle(bucket, one, other)
    assert claim.result()
    assert again.result()
    assert one.lost == []


async def test_what_nobody_renews_passes_on_after_its_time(two):
    bucket, one, other = two
    claim = one.claim()
    await settle(bucket, one, other)
    assert claim.result()
    bucket.now += LEASE_SECONDS - 0.001
    assert await other.leases.claim(KEY) is False
    bucket.now += 0.002
    again = other.claim()
    await settle(bucket, other)
    assert again.result()
    # The former holder comes back, and hears of it.
    await one.leases.renew()
    await settle(bucket, one, other)
    assert one.lost == [(KEY, "worker-2")]
    assert one.leases.held == frozenset()
    assert other.leases.sure(KEY)


async def test_a_holder_that_was_cut_off_keeps_what_nobody_else_claimed(two):
    bucket, one, other = two
    claim = one.claim()
    await settle(bucket, one, other)
    assert claim.result()
    bucket.now += 3 * LEASE_SECONDS
    assert not one.leases.sure(KEY)
    one.leases.reconnected()
    await one.leases.renew()
    await settle(bucket, one, other)
    assert one.leases.sure(KEY)
    assert one.lost == []


async def test_a_bucket_made_anew_counts_from_the_beginning(two):
    bucket, one, other = two
    claim = one.claim()
    await settle(bucket, one, other)
    for _ in range(5):
        await one.leases.renew()
        await settle(bucket, one, other)
    bucket.kept.clear()
    bucket.revision = 0
    bucket.now += LEASE_SECONDS
    for worker in (one, other):
        worker.leases.reconnected()
    await one.leases.renew()
    await settle(bucket, one, other)
    assert claim.result()
    assert one.leases.sure(KEY)
    holder = other.leases.table.holder(KEY, bucket.now)
    assert holder is not None
    assert holder.worker == "worker-1"


async def test_a_process_does_not_take_its_forerunner_s_lease_for_its_own(two):
    bucket, one, _ = two
    claim = one.claim()
    await settle(bucket, one)
    assert claim.result()
    bucket.now += 1.0
    again = Worker("worker-1", bucket)
    await again.leases.open()
    second = again.claim()
    await one.leases.renew()
    await settle(bucket, one, again)
    assert second.result() is False
    assert again.leases.held == frozenset()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a=2Fb=3Ac.0", b"no lease"),
        ("a=2Fb=3Ac.0", b"{}"),
        ("a=2Fb=3Ac", b'{"worker":"w","since":1.0,"renewed":1.0}'),
        ("a=2Fb=3Ac.-1", b'{"worker":"w","since":1.0,"renewed":1.0}'),
        ("a=2Fb=3Ac.00", b'{"worker":"w","since":1.0,"renewed":1.0}'),
        ("a/b.0", b'{"worker":"w","since":1.0,"renewed":1.0}'),
    ],
)
def test_what_is_no_lease_is_ignored(key: str, value: bytes) -> None:
    table = LeaseTable()
    assert table.hear(Entry(key, value, 1), 0.0) is None
    assert list(table.live(0.0)) == []


def test_an_older_write_does_not_replace_a_newer() -> None:
    table = LeaseTable()
    assert table.hear(Entry(KEY.key, b'{"worker":"b","since":2.0,"renewed":2.0}', 2), 0.0)
    assert table.hear(Entry(KEY.key, b'{"worker":"a","since":1.0,"renewed":1.0}', 1), 0.0) is None
    assert table.holder(KEY, 0.0) == Lease("b", 2.0, 2.0)
