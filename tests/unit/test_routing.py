"""The choice among a model's workers: distance first, then the conversation, then the load."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.distance import Distances
from shared.hash_ring import Ring, hash_key
from shared.routing import QUEUE_BOUND, Pool, Routing

NEAR, FAR = 0.001, 0.2
KEYS = [hash_key(b"%d" % number) for number in range(1000)]


def distances(**rtts):
    known = Distances()
    for worker, rtt in rtts.items():
        if rtt is not None:
            known.observe(worker, rtt)
    return known


def pool(loads, *, slots=8, routing=None, rtts=None, contexts=None):
    known = distances(**(rtts if rtts is not None else dict.fromkeys(loads, NEAR)))
    made = Pool(known, routing)
    for worker, load in loads.items():
        made.update(worker, slots=slots, load=load, context=(contexts or {}).get(worker, 0))
    return made


def key_of(ring_workers, owner):
    """A key that belongs to `owner`."""
    ring = Ring(ring_workers)
    return next(key for key in KEYS if ring.owner(key) == owner)


keys = st.integers(min_value=0, max_value=2**64 - 1)
fleets = st.dictionaries(
    st.sampled_from([f"w{number}" for number in range(12)]),
    st.tuples(st.integers(1, 16), st.integers(0, 40)),
    min_size=1,
)


def made_of(fleet, routing=None):
    made = Pool(distances(**dict.fromkeys(fleet, NEAR)), routing)
    for worker, (slots, load) in fleet.items():
        made.update(worker, slots=slots, load=load)
    return made


def test_nobody_is_nobody_and_one_is_the_only_one():
    assert Pool(Distances()).choose(1) is None
    choice = pool({"a": 99}).choose(1)
    assert (choice.worker, choice.reason, choice.candidates) == ("a", "only", 1)
    assert pool({"a": 0}).choose(1, refused={"a"}) is None


@given(fleets, keys, st.integers(0, 2**63))
def test_views_that_are_equal_choose_alike_in_whatever_order_they_were_learnt(fleet, key, draw):
    one = made_of(fleet)
    other = made_of(dict(reversed(list(fleet.items()))))

    assert one.choose(key, draw=draw) == other.choose(key, draw=draw)
    assert one.choose(draw=draw) == other.choose(draw=draw)


@given(fleets, keys)
def test_somebody_is_always_found_and_is_below_its_limit(fleet, key):
    made = made_of(fleet)
    choice = made.choose(key)
    slots, load = fleet[choice.worker]
    total = sum(load for _, load in fleet.values())
    share = (total + 1) * slots / sum(slots for slots, _ in fleet.values())

    if len(fleet) > 1:
        assert choice.reason in ("affinity", "spill")
        free = any(load < slots for slots, load in fleet.values())
        bound = 1.75 if free else QUEUE_BOUND
        assert load < math.ceil(bound * share) or (free and 4 * load < 3 * slots)


@given(fleets, keys)
def test_no_conversation_waits_while_a_slot_is_free(fleet, key):
    choice = made_of(fleet).choose(key)
    slots, load = fleet[choice.worker]

    if len(fleet) > 1 and any(load < slots for slots, load in fleet.values()):
        assert load < slots


@given(fleets, keys, st.data())
def test_who_has_refused_is_not_asked_again_and_all_others_are(fleet, key, data):
    made = made_of(fleet)
    keyed = data.draw(st.booleans())
    refused = set()
    while (choice := made.choose(key if keyed else None, refused=refused)) is not None:
        assert choice.worker not in refused
        refused.add(choice.worker)
    assert refused == set(fleet)


@given(fleets, st.integers(0, 2**63))
def test_without_a_conversation_the_least_loaded_takes_it(fleet, draw):
    choice = made_of(fleet).choose(draw=draw)
    slots, load = fleet[choice.worker]

    assert (load + 1) / slots == min((load + 1) / slots for slots, load in fleet.values())


def test_equals_share_what_has_no_conversation():
    made = pool(dict.fromkeys("abcd", 3))
    counts = Counter(made.choose(draw=draw).worker for draw in range(400))

    assert counts == dict.fromkeys("abcd", 100)


def test_among_equals_the_nearest():
    made = pool({"a": 2, "b": 2, "c": 1}, rtts={"a": 0.05, "b": 0.002, "c": 0.06})
    assert made.choose(draw=7).worker == "c"
    made.update("c", slots=8, load=2)
    assert {made.choose(draw=draw).worker for draw in range(9)} == {"b"}


def test_a_conversation_stays_until_its_worker_is_at_its_limit_and_comes_back():
    made = pool(dict.fromkeys("abcd", 0))
    key = key_of("abcd", "c")
    second = list(Ring("abcd").walk(key))[1]
    reasons = []
    for _ in range(7):
        choice = made.choose(key)
        reasons.append((choice.worker, choice.reason))
        made.placed(choice.worker)
    # three quarters of its slots are always its own to fill
    assert reasons == [("c", "affinity")] * 6 + [(second, "spill")]
    made.ended("c")
    assert made.choose(key).worker == "c"


def test_where_all_are_full_a_conversation_waits_for_its_own_worker_only_if_it_is_not_much_longer():
    made = pool(dict.fromkeys("abcd", 10))
    key = key_of("abcd", "a")
    made.update("a", slots=8, load=12)
    assert made.choose(key).worker == "a"
    made.update("a", slots=8, load=15)
    assert made.choose(key).reason == "spill"


def test_where_all_are_full_one_that_has_only_begun_goes_to_the_least_loaded():
    made = pool({"a": 9, "b": 9, "c": 8, "d": 9})
    key = key_of("abcd", "a")
    assert made.choose(key).worker == "a"
    choice = made.choose(key, begun=True)
    assert (choice.worker, choice.reason) == ("c", "least_loaded")
    made.update("d", slots=8, load=7)
    # room is where it is, and not with the least loaded
    assert made.choose(key, begun=True).worker == "d"
    made.update("a", slots=8, load=5)
    assert made.choose(key, begun=True).reason == "affinity"


def test_room_is_a_free_slot():
    made = pool({"a": 8, "b": 7})
    assert not made.has_room("a")
    assert made.has_room("b")
    assert not made.has_room("nobody")
    made.placed("b")
    assert not made.has_room("b")


def test_a_refusal_counts_as_full_until_the_next_beat():
    made = pool(dict.fromkeys("abcd", 0))
    key = key_of("abcd", "a")
    made.full("a")
    assert made.choose(key).worker != "a"
    made.update("a", slots=8, load=0)
    assert made.choose(key).worker == "a"


def test_own_requests_are_not_counted_twice():
    made = pool(dict.fromkeys("ab", 0), slots=4)
    for _ in range(3):
        made.placed("a")
    made.update("a", slots=4, load=3)
    assert made.free == 5
    made.update("a", slots=4, load=4)
    assert made.free == 4
    made.ended("a", 3)
    assert made.free == 7


def test_a_worker_that_came_back_owes_nothing():
    made = pool({"a": 0, "b": 0})
    made.placed("a")
    made.remove("a")
    made.update("a", slots=8, load=0)
    made.ended("a")
    assert made.free == 16


# Distance


def test_only_the_near_count_while_there_is_one():
    rtts = {"a": NEAR, "b": NEAR, "far": FAR, "unknown": None}
    made = pool({"a": 50, "b": 50, "far": 0, "unknown": 0}, rtts=rtts)

    chosen = {made.choose(hash_key(b"%d" % n)).worker for n in range(100)}
    assert chosen == {"a", "b"}
    assert made.choose(refused={"a", "b"}) is None
    assert not made.all_eligible
    assert made.eligible == ("a", "b")


def test_the_unknown_count_while_nobody_is_known_to_be_near():
    made = pool({"far": 0, "unknown": 0}, rtts={"far": FAR, "unknown": None})
    assert made.choose(5).worker == "unknown"


def test_a_worker_alone_beyond_the_cap_is_used_only_if_configured():
    assert pool({"far": 0}, rtts={"far": FAR}).choose(5) is None
    choice = pool({"far": 0}, rtts={"far": FAR}, routing=Routing(far=True)).choose(5)
    assert (choice.worker, choice.reason) == ("far", "only")


def test_of_those_beyond_the_cap_the_nearest_with_room():
    rtts = {"a": 0.3, "b": 0.2, "c": 0.9}
    made = pool({"a": 0, "b": 0, "c": 0}, rtts=rtts, routing=Routing(far=True))
    assert {made.choose(key).worker for key in range(50)} == {"b"}
    assert made.choose(1).reason == "nearest"
    made.update("b", slots=8, load=8)
    assert made.choose(1).worker == "a"


def test_a_change_of_reach_is_followed_at_once():
    known = distances(a=NEAR, b=NEAR)
    made = Pool(known)
    for worker in "ab":
        made.update(worker, slots=4, load=0)
    key = key_of("ab", "a")
    assert made.choose(key).worker == "a"
    for _ in range(4):
        known.observe("a", 0.12)
    assert made.choose(key).worker == "b"
    for _ in range(2):
        known.observe("a", NEAR)
    assert made.choose(key).worker == "a"


# Context


def test_a_long_request_goes_where_it_fits():
    made = pool(
        {"small": 0, "large": 3, "other": 3}, contexts={"small": 512, "large": 4096, "other": 4096}
    )
    chosen = {made.choose(hash_key(b"%d" % n), tokens=1000).worker for n in range(50)}
    assert chosen == {"large", "other"}
    assert made.choose(tokens=1000).worker != "small"
    assert made.choose(tokens=10).worker == "small"


def test_one_that_fits_nowhere_goes_to_the_largest_which_will_say_so():
    made = pool({"small": 0, "large": 9}, contexts={"small": 512, "large": 1024})
    assert made.choose(3, tokens=5000).worker == "large"


def test_a_context_that_is_unknown_is_taken_to_be_enough():
    made = pool({"small": 0, "open": 3}, contexts={"small": 512, "open": 0})
    assert made.choose(3, tokens=5000).worker == "open"


# Moving


@pytest.mark.parametrize("count", [4, 10])
def test_a_leaver_moves_only_its_share_whatever_the_load(count):
    workers = [f"w{number}" for number in range(count)]
    made = pool(dict.fromkeys(workers, 2))
    places = [hash_key(b"%d" % number) for number in range(4000)]
    before = {key: made.choose(key).worker for key in places}
    made.remove(workers[3])
    moved = sum(made.choose(key).worker != before[key] for key in places)

    assert moved / len(places) <= 1 / count + 0.05


def test_a_bound_of_one_is_refused():
    with pytest.raises(ValueError, match="load_bound"):
        Routing(load_bound=1.0)


class PoolMachine(RuleBasedStateMachine):
    """Sums that are kept up to date equal sums that are made anew."""

    workers = st.sampled_from("abcdef")

    def __init__(self):
        super().__init__()
        self.known = Distances()
        self.pool = Pool(self.known, Routing(far=True))

    @rule(worker=workers, slots=st.integers(1, 8), load=st.integers(0, 20))
    def beat(self, worker, slots, load):
        self.pool.update(worker, slots=slots, load=load)

    @rule(worker=workers, rtt=st.sampled_from([0.001, 0.07, 0.1, 5.0]))
    def ping(self, worker, rtt):
        self.known.observe(worker, rtt)

    @rule(worker=workers)
    def leave(self, worker):
        self.pool.remove(worker)

    @rule(worker=workers)
    def refuse(self, worker):
        self.pool.full(worker)

    @rule(key=keys, slots=st.integers(1, 3))
    def place(self, key, slots):
        choice = self.pool.choose(key)
        if choice is not None:
            self.pool.placed(choice.worker, slots)

    @rule(worker=workers, slots=st.integers(1, 3))
    def end(self, worker, slots):
        self.pool.ended(worker, slots)

    @invariant()
    def sums_hold(self):
        self.pool._refresh()
        members = self.pool._eligible.values()
        assert self.pool._load == sum(m.load for m in members)
        assert self.pool.free == sum(max(0, m.slots - m.load) for m in members)
        assert all(m.own >= 0 and m.others >= 0 for m in members)

    @invariant()
    def nobody_is_put_before_a_nearer(self):
        reaches = {worker: self.known.reach(worker) for worker in "abcdef" if worker in self.pool}
        if "near" in reaches.values():
            assert {reaches[worker] for worker in self.pool.eligible} == {"near"}


TestPoolMachine = PoolMachine.TestCase
