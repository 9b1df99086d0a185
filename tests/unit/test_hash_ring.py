"""The ring: all agree, few move, and the shares are even."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.hash_ring import Ring, hash_key, load_limit

names = st.sets(st.text(min_size=1, max_size=20), min_size=1, max_size=24)
keys = st.lists(st.integers(min_value=0, max_value=2**64 - 1), min_size=1, max_size=60)


@given(names, keys, st.randoms())
def test_the_order_in_which_workers_were_met_does_not_matter(workers, places, random):
    shuffled = list(workers)
    random.shuffle(shuffled)
    one, other = Ring(sorted(workers)), Ring(shuffled + shuffled)

    assert [one.owner(key) for key in places] == [other.owner(key) for key in places]
    assert list(one.walk(places[0])) == list(other.walk(places[0]))


@given(names, keys, st.data())
def test_only_the_keys_of_one_that_leaves_move(workers, places, data):
    leaver = data.draw(st.sampled_from(sorted(workers)))
    before, after = Ring(workers), Ring(workers - {leaver})
    for key in places:
        if before.owner(key) != leaver:
            assert after.owner(key) == before.owner(key)
        elif len(workers) > 1:
            # and they go to the one that they would have spilt to
            assert after.owner(key) == list(before.walk(key))[1]


@given(names, keys)
def test_a_walk_begins_at_the_owner_and_meets_everybody_once(workers, places):
    ring = Ring(workers)
    for key in places:
        walk = list(ring.walk(key))
        assert walk[0] == ring.owner(key)
        assert sorted(walk) == sorted(workers)


@given(names, keys, st.floats(min_value=1.01, max_value=2.0))
def test_with_bounded_loads_everybody_finds_a_place_below_the_bound(workers, places, bound):
    ring = Ring(workers)
    loads = Counter()
    for key in places:
        limit = load_limit(bound, loads.total(), 1, len(workers))
        placed = ring.place(key, lambda name, limit=limit: loads[name] < limit)
        assert placed is not None
        loads[placed[0]] += 1
    assert max(loads.values()) <= load_limit(bound, len(places) - 1, 1, len(workers))


@given(names, keys)
def test_nobody_who_takes_is_nobody(workers, places):
    assert Ring(workers).place(places[0], lambda _: False) is None


@pytest.mark.parametrize("count", [2, 4, 16])
def test_shares_are_even_and_a_leaver_moves_its_own(count):
    workers = [f"worker-{number}" for number in range(count)]
    places = [hash_key(b"conversation %d" % number) for number in range(8000)]
    ring = Ring(workers)
    owners = {key: ring.owner(key) for key in places}
    shares = Counter(owners.values())

    assert max(shares.values()) < 1.3 * len(places) / count
    smaller = Ring(workers[1:])
    moved = sum(smaller.owner(key) != owners[key] for key in places)
    assert moved == shares[workers[0]]
    assert moved / len(places) <= 1 / count + 0.05


def test_hashes_are_the_same_in_every_process_and_version():
    assert hash_key(b"conversation") == 5441765083879496455
    assert Ring(["a", "b", "c"]).owner(hash_key(b"x")) == "b"


def test_an_empty_ring_has_no_owner():
    with pytest.raises(LookupError):
        Ring([]).owner(1)
    assert Ring([]).place(1, lambda _: True) is None
    assert list(Ring([]).walk(1)) == []


def test_one_point_beyond_the_last_is_the_first():
    ring = Ring(["a", "b"])

    assert ring.owner(2**64 - 1) == ring.owner(0)
