"""Pings: whose answer is whose, what counts as missing, and what is our own fault."""

import asyncio
import time

import pytest

from router import pings
from router.pings import Pings
from shared import subjects
from shared.bus import BusMessage, BusUnavailable
from shared.distance import Distances


class Subscription:
    async def leave(self):
        pass


class FakeBus:
    """Keeps what is published; answers when told."""

    inbox = "_INBOX_router-1"

    def __init__(self):
        self.sent = []
        self.away = False
        self.callback = None

    async def publish(self, subject, data, *, reply=""):
        if self.away:
            raise BusUnavailable("NATS is away")
        self.sent.append((subject, data, reply))

    async def subscribe(self, subject, callback):
        self.subject, self.callback = subject, callback
        return Subscription()

    def answer(self, number, status=""):
        _, data, reply = self.sent[number]
        self.callback(BusMessage(reply, "", b"" if status else data, None, status))


async def until(condition):
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


@pytest.fixture
def bus():
    return FakeBus()


@pytest.fixture
def distances():
    return Distances()


@pytest.fixture
def workers():
    return ["a", "b"]


@pytest.fixture
def unheard():
    return []


@pytest.fixture
async def pinging(bus, distances, workers, unheard, monkeypatch):
    monkeypatch.setattr(pings, "INTERVAL", 0.05)
    monkeypatch.setattr(pings, "TICK", 0.05)
    made = Pings(bus, distances, lambda: workers, unheard.append)
    running = asyncio.create_task(made.run())
    await until(lambda: len(bus.sent) >= 2)
    yield made
    running.cancel()


async def test_answers_come_on_one_subject_and_count_for_whose_number_they_bear(
    pinging, bus, distances
):
    assert [subject for subject, _, _ in bus.sent[:2]] == [subjects.ping("a"), subjects.ping("b")]
    assert {f"{reply.rpartition('.')[0]}.*" for _, _, reply in bus.sent} == {bus.subject}
    assert len({reply for _, _, reply in bus.sent[:2]}) == 2
    assert len({data for _, data, _ in bus.sent[:2]}) == 2
    bus.answer(1)

    assert distances.reach("a") == "unknown"
    assert distances.rtt("b") < 1.0


async def test_an_answer_counts_once_and_a_made_up_one_never(pinging, bus, distances):
    bus.answer(0)
    version, mean = distances.version, distances.rtt("a")
    bus.answer(0)
    bus.callback(BusMessage(bus.subject, "", b"12345678"))
    bus.callback(BusMessage(bus.subject, "", b""))
    bus.answer(1, status="503")

    assert (distances.version, distances.rtt("a")) == (version, mean)
    assert distances.reach("b") == "unknown"


async def test_who_has_answered_before_and_is_not_connected_is_told_of(pinging, bus, unheard):
    bus.answer(0)
    bus.answer(1, status="503")
    assert unheard == []
    at = len(bus.sent)
    await until(lambda: len(bus.sent) >= at + 2)
    sent = {subject: number for number, (subject, _, _) in enumerate(bus.sent)}

    bus.answer(sent[subjects.ping("a")], status="408")
    bus.callback(BusMessage(f"{bus.inbox}.p.nobody", "", b"", None, "503"))
    assert unheard == []
    bus.answer(sent[subjects.ping("b")], status="503")
    bus.answer(sent[subjects.ping("a")], status="503")
    assert unheard == ["a"]


async def test_a_place_is_free_again_when_its_worker_has_left(pinging, bus, workers):
    workers.remove("a")
    await asyncio.sleep(0.15)
    workers.append("c")
    pinging.met("c")
    await until(lambda: bus.sent[-1][0] == subjects.ping("c"))

    assert bus.sent[-1][2] == bus.sent[0][2]


async def test_an_answer_that_does_not_come_is_missed(pinging, bus, distances, monkeypatch):
    missed = []
    monkeypatch.setattr(distances, "miss", lambda worker, seconds: missed.append(worker))
    bus.answer(0)
    await until(lambda: "b" in missed)


async def test_what_was_never_sent_is_not_missed(pinging, bus, distances, monkeypatch):
    bus.away = True
    await until(lambda: not pinging._out)
    missed = []
    monkeypatch.setattr(distances, "miss", lambda worker, seconds: missed.append(worker))
    await asyncio.sleep(0.2)

    assert missed == []


async def test_a_worker_that_left_is_not_pinged(pinging, bus, workers):
    workers.remove("b")
    await asyncio.sleep(0.12)
    bus.sent.clear()
    await asyncio.sleep(0.2)

    assert {subject for subject, _, _ in bus.sent} == {subjects.ping("a")}


async def test_a_new_worker_is_pinged_at_once(bus, distances, workers):
    made = Pings(bus, distances, lambda: workers, print)
    running = asyncio.create_task(made.run())
    await until(lambda: len(bus.sent) >= 2)
    workers.append("c")
    made.met("c")
    await until(lambda: len(bus.sent) >= 3)
    running.cancel()

    assert bus.sent[2][0] == subjects.ping("c")


async def test_a_stall_of_our_own_makes_nobody_far(pinging, bus, distances):
    bus.answer(0)
    for _ in range(6):
        count = len(bus.sent)
        await until(lambda count=count: len(bus.sent) >= count + 2)
        # All that comes meanwhile is read only later.
        time.sleep(0.15)  # noqa: ASYNC251
        for number in range(count, len(bus.sent)):
            bus.answer(number)

    assert distances.reach("a") == "near"
    assert distances.reach("b") == "unknown"


async def test_short_round_trips_are_believed_in_a_stall_too(pinging, bus, distances):
    pinging._stalled_at = time.monotonic() + 100
    bus.answer(0)

    # unless this machine took 20 ms for it
    assert distances.reach("a") in ("near", "unknown")
    assert distances.rtt("a") is None or distances.rtt("a") < 0.02


async def test_many_workers_take_turns(bus, distances, monkeypatch):
    names = [f"w{number}" for number in range(120)]
    made = Pings(bus, distances, lambda: names, print)
    now = time.monotonic()
    await made._round(now)
    assert len(bus.sent) == 50
    await made._round(now + 0.25)
    await made._round(now + 0.5)

    assert len({subject for subject, _, _ in bus.sent}) == 120
    await made._round(now + 0.75)
    assert len(bus.sent) == 120
