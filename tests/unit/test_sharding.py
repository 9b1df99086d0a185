"""Dealing experts: each is somewhere, shards are alike in size, the hottest are everywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.sharding import ShardError, deal


@st.composite
def dealings(draw: st.DrawFn):
    experts = draw(st.integers(2, 24))
    layers = draw(st.integers(1, 4))
    mass = st.floats(0, 10, allow_nan=False)
    masses = draw(
        st.lists(
            st.lists(mass, min_size=experts, max_size=experts), min_size=layers, max_size=layers
        )
    )
    shards = draw(st.integers(2, experts))
    core = draw(st.integers(0, experts - shards))
    rest = experts - core
    overlap = draw(st.integers(0, rest - -(-rest // shards)))
    return masses, shards, core, overlap


@given(dealings())
def test_every_expert_is_on_a_shard_and_the_core_on_all(dealing):
    masses, shards, core, overlap = dealing
    made = deal(masses, shards, core=core, overlap=overlap)
    assert len(made) == shards
    assert made == deal(masses, shards, core=core, overlap=overlap)
    experts = len(masses[0])
    size = core + -(-(experts - core) // shards) + overlap
    for layer, mass in enumerate(masses):
        kept = [shard.experts[layer] for shard in made]
        assert {expert for mine in kept for expert in mine} == set(range(experts))
        assert all(list(mine) == sorted(set(mine)) and len(mine) == size for mine in kept)
        hottest = sorted(range(experts), key=lambda expert: (-mass[expert], expert))[:core]
        assert all(set(hottest) <= set(mine) for mine in kept)
    for shard in made:
        assert -1e-9 <= shard.least <= shard.coverage + 1e-9 <= 1 + 1e-6


@given(dealings())
def test_more_overlap_covers_more(dealing):
    masses, shards, core, overlap = dealing
    if not overlap:
        return
    less = deal(masses, shards, core=core, overlap=overlap - 1)
    more = deal(masses, shards, core=core, overlap=overlap)
    assert all(b.coverage >= a.coverage - 1e-9 for a, b in zip(less, more, strict=True))


def test_what_is_hot_is_shared_out_evenly():
    (first, second) = deal([[8, 7, 2, 1]], 2, core=0, overlap=0)
    assert first.experts == ((0, 3),)
    assert second.experts == ((1, 2),)
    assert (first.coverage, second.coverage) == (0.5, 0.5)


def test_ranking_counts():
    """By another ranking other experts are in the core, and less is covered."""
    masses = [[5, 1, 1, 1, 5, 1, 1, 1]]
    by_mass = deal(masses, 2, core=2, overlap=0)
    assert all({0, 4} <= set(shard.experts[0]) for shard in by_mass)
    assert min(shard.coverage for shard in by_mass) == 13 / 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shards": 1}, "shards: 1"),
        ({"shards": 9}, "shards: 9"),
        ({"core": 8}, "core: 8"),
        ({"core": -1}, "core: -1"),
        ({"core": 5, "shards": 4}, "3 experts are left"),
        ({"overlap": 5}, "overlap: 5; from 0 to 4"),
        ({"masses": []}, "there must be a layer"),
        ({"masses": [[1.0, 2.0], [1.0]]}, "as many experts"),
        ({"masses": [[1.0, -2.0] * 4]}, "below 0"),
    ],
)
def test_numbers_that_do_not_go_together_are_named(changes: dict, words: str):
    asked = {"masses": [[1.0] * 8], "shards": 2, "core": 0, "overlap": 0} | changes
    masses, shards = asked.pop("masses"), asked.pop("shards")
    with pytest.raises(ShardError, match=words):
        deal(masses, shards, **asked)
