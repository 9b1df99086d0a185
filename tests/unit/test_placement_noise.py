"""How many replicas a load wants, and that chance moves none."""

import math

import pytest

from loadtests.simulation.noise import NoisyModel
from shared.replicas import enough, spare


@pytest.mark.parametrize("seconds", [2, 8, 30])
@pytest.mark.parametrize("load", [1.3, 2.5, 5.6, 6.0, 12.8, 40, 200])
def test_steady_load_with_poisson_noise_changes_nothing(load: float, seconds: float):
    """Two hours after the first half hour, around loads at which one more is just wanted."""
    model = NoisyModel(load, seconds, f"{load} {seconds}")
    model.run(9000)
    settled = 1800
    # Chance may lift the load to one replica more once; what must not be is to and fro.
    assert [at for at in model.downs if at > settled] == []
    assert len([at for at in model.ups if at > settled]) <= 1


def test_noise_moves_a_model_less_than_once_in_five_hours_where_it_is_worst():
    """Answers of 30 s at a load of 2.5: half of one replica's slots is an ordinary deviation."""
    models = [NoisyModel(2.5, 30, f"worst {seed}") for seed in range(10)]
    for model in models:
        model.run(7200)
    assert sum(len(model.downs) for model in models) <= 4


def test_thresholds_are_apart_by_more_than_chance():
    for slots in (1, 4, 8, 32):
        for load in (0.1, 1, 5, 20, 100, 1000):
            raised = load + 4 * math.sqrt(load)
            assert spare(load, load, slots) >= enough(raised, load, slots)
            assert spare(load, load, slots) >= enough(load, load, slots)


@pytest.mark.parametrize(("load", "replicas"), [(0, 0), (5.6, 1), (5.7, 2), (8.1, 2), (71, 10)])
def test_square_root_staffing(load: float, replicas: int):
    assert enough(load, load, 8) == replicas


def test_full_slots_want_another_replica_before_the_load_is_sustained():
    assert enough(7.9, 0.5, 8) == 1
    assert enough(8.1, 0.5, 8) == 2
