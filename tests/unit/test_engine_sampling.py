"""Sampling against plain definitions, and draws that depend on nothing but their index."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shared.protocol import Sampling
from worker.engine.draws import uniform
from worker.engine.sampling import REPEAT_WINDOW, Sampler, choose, log_probabilities, most_likely

rows = arrays(np.float32, 50, elements=st.floats(-20, 20, width=32))
draws = st.floats(0, 1, exclude_max=True)


@given(rows, draws)
def test_temperature_zero_takes_the_best(row, draw):
    assert choose(row, Sampling(seed=1, temperature=0), draw) == int(np.argmax(row))


@given(rows, draws, st.integers(1, 50))
def test_top_k_stays_among_the_k_best(row, draw, k):
    token = choose(row, Sampling(seed=1, top_k=k), draw)

    assert np.sum(row > row[token]) < k


@given(rows, draws, st.floats(0.01, 1), st.floats(0.2, 2))
def test_top_p_stays_within_the_smallest_set_that_holds_the_mass(row, draw, p, temperature):
    token = choose(row, Sampling(seed=1, top_p=p, temperature=temperature), draw)

    weights = np.exp((row.astype(float) - row.max()) / temperature)
    # Logits may differ by so little that their weights do not.
    better = weights[weights > weights[token] * (1 + 1e-9)].sum()
    assert better <= p * weights.sum() + 1e-6


@given(rows, draws, st.floats(0.01, 1))
def test_min_p_keeps_nothing_below_its_share_of_the_best(row, draw, min_p):
    token = choose(row, Sampling(seed=1, min_p=min_p), draw)

    assert math.exp(float(row[token] - row.max())) >= min_p * (1 - 1e-4)


def test_the_frequencies_are_those_of_the_softmax():
    row = np.array([2.0, 1.0, 0.0, -1.0, -50.0], dtype=np.float32)
    count = 20_000
    seen = np.bincount(
        [choose(row, Sampling(seed=3), uniform(3, 0, i)) for i in range(count)], minlength=5
    )

    expected = np.exp(log_probabilities(row)) * count
    assert np.all(np.abs(seen - expected) < 5 * np.sqrt(expected + 1))


@given(st.integers(0, 2**63 - 1), st.integers(0, 7), st.integers(0, 10_000))
def test_a_draw_is_a_function_of_seed_choice_and_index(seed, choice, index):
    value = uniform(seed, choice, index)

    assert 0 <= value < 1
    assert value == uniform(seed, choice, index)
    assert value != uniform(seed, choice, index + 1)
    assert value != uniform(seed, choice + 1, index)


def test_penalties_follow_their_definitions():
    params = Sampling(seed=0, repeat_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(params, [1], frozenset())
    sampler.accept(2)
    sampler.accept(2)
    row = np.array([1.0, 1.0, 1.0, -1.0], dtype=np.float32)
    sampler.adjust(row)

    assert row.tolist() == pytest.approx([1.0, 0.5, 0.5 - 0.5 - 2 * 0.25, -1.0])


def test_repetition_is_forgotten_after_its_window():
    sampler = Sampler(Sampling(seed=0, repeat_penalty=2.0), [1], frozenset())
    for _ in range(REPEAT_WINDOW):
        sampler.accept(0)
    row = np.array([1.0, 1.0], dtype=np.float32)
    sampler.adjust(row)

    assert row.tolist() == [0.5, 1.0]


def test_bias_and_ignore_eos_forbid_tokens():
    params = Sampling(seed=0, temperature=0, logit_bias={0: -100.0}, ignore_eos=True)
    sampler = Sampler(params, [], frozenset({1}))
    row = np.array([9.0, 8.0, 1.0], dtype=np.float32)
    sampler.adjust(row)

    assert choose(row, params, 0.0) == 2


@settings(max_examples=50)
@given(rows, st.integers(0, 20))
def test_the_most_likely_come_best_first(row, count):
    logprobs = log_probabilities(row)
    picked = most_likely(logprobs, count)

    assert len(picked) == count
    assert [logprobs[t] for t in picked] == sorted(logprobs, reverse=True)[:count]
    assert np.exp(logprobs).sum() == pytest.approx(1.0)
