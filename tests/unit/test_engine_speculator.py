"""The speculator on a simulated machine: it gains where it can, and costs next to nothing where it
cannot."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_speculation import (
    F32,
    F32_ONE_CORE,
    FAIR,
    FLAT,
    GOOD,
    HOPELESS,
    OVERCONFIDENT,
    Q4_0,
    Q4_0_ONE_CORE,
    Simulation,
    babble,
    copied_text,
    new_text,
)

from worker.engine.slots import Slot
from worker.engine.speculation.candidates import POSITIONS, Candidate, Counters
from worker.engine.speculation.control import MOST_ROWS
from worker.engine.speculation.costs import StepCost
from worker.engine.speculation.speculator import Speculator

CHEAP = tuple((rows, seconds / 6) for rows, seconds in FLAT)
COUNTS = pytest.mark.parametrize("count", [1, 4, 16])
NOBODY = pytest.mark.parametrize("quality", [HOPELESS, OVERCONFIDENT])


# whole runs


@COUNTS
def test_good_and_cheap_drafts_gain(count):
    simulation = Simulation(count, quality=GOOD, target=FLAT, draft=CHEAP)

    assert simulation.run(4000 + 500 * count) >= 1.3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_good_draft_model_gains_on_two_cores(seed):
    assert Simulation(1, quality=GOOD, seed=seed).run(6000) >= 1.3


@COUNTS
@NOBODY
@pytest.mark.parametrize("tables", [(F32, Q4_0), (F32_ONE_CORE, Q4_0_ONE_CORE), (FLAT, CHEAP)])
def test_drafts_that_are_wrong_cost_next_to_nothing(count, quality, tables):
    target, draft = tables
    simulation = Simulation(count, quality=quality, target=target, draft=draft, misjudged=0.1)

    assert simulation.run(6000 + 2000 * count) >= 0.97


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("quality", [GOOD, FAIR])
@pytest.mark.parametrize("tables", [(F32, Q4_0), (F32_ONE_CORE, Q4_0_ONE_CORE)])
def test_a_draft_model_that_is_worth_it_only_just_costs_little(count, quality, tables):
    target, draft = tables
    simulation = Simulation(count, quality=quality, target=target, draft=draft, misjudged=0.1)

    # Where costs are misjudged by a tenth, a loss of a twentieth cannot be told from a gain.
    assert simulation.run(4000 + 1000 * count) >= 0.9


@pytest.mark.parametrize("quality", [GOOD, FAIR])
def test_a_machine_that_drifts_does_not_make_the_draft_model_look_cheap(quality):
    """It is not measured while it does not draft; what it cost before the drift is no more true."""

    def gain(seed: int) -> float:
        simulation = Simulation(4, quality=quality, prompt=50, length=64, seed=seed)
        for _ in range(10):
            simulation.machine.slowness = simulation.rng.choice((1.0, 1.6))
            simulation.run(simulation.rng.randrange(150, 900))
        return simulation.gain

    assert statistics.median(map(gain, range(5))) >= 0.99


@pytest.mark.parametrize("count", [1, 2])
def test_short_answers_do_not_pay_for_a_draft_model_that_reads_their_prompts(count):
    def gain(seed: int) -> float:
        simulation = Simulation(
            count,
            quality=FAIR,
            target=F32_ONE_CORE,
            draft=Q4_0_ONE_CORE,
            misjudged=0.1,
            prompt=60,
            length=40,
            seed=seed,
        )
        simulation.run(400 * count)
        return simulation.run(800 * count)

    assert statistics.median(map(gain, range(5))) >= 0.98


def test_short_answers_gain_where_the_target_has_read_their_prompts_for_the_draft_model():
    def gain(*, kin: bool, seed: int = 1) -> float:
        simulation = Simulation(
            1,
            quality=GOOD,
            target=F32_ONE_CORE,
            draft=Q4_0_ONE_CORE,
            kin=kin,
            prompt=60,
            length=40,
            seed=seed,
        )
        simulation.run(400)
        return simulation.run(4000)

    assert gain(kin=True) >= 1.25 > gain(kin=False) + 0.1


@COUNTS
def test_it_notices_that_drafts_become_bad_and_good_again(count):
    simulation = Simulation(count, quality=GOOD, target=FLAT, draft=CHEAP)
    tokens = 4000 + 2500 * count

    assert simulation.run(tokens) >= 1.3
    simulation.drafter.quality = HOPELESS
    assert simulation.run(tokens) >= 0.97
    simulation.drafter.quality = GOOD
    # it looks again when the longest pause is over
    simulation.run(3200 * count)
    assert simulation.run(tokens) >= 1.3


@pytest.mark.parametrize(("count", "least"), [(1, 1.8), (4, 1.2), (16, 0.97)])
@pytest.mark.parametrize("target", [F32, F32_ONE_CORE])
def test_text_that_repeats_the_prompt_gains_by_lookup(count, least, target):
    simulation = Simulation(count, text=copied_text, target=target, misjudged=0.1)

    assert simulation.run(4000 + 500 * count) >= least


@COUNTS
@pytest.mark.parametrize("target", [F32, F32_ONE_CORE, Q4_0])
def test_lookups_that_are_wrong_cost_next_to_nothing(count, target):
    simulation = Simulation(count, text=babble, target=target, misjudged=0.1)

    assert simulation.run(4000 + 500 * count) >= 0.97


@COUNTS
def test_a_machine_whose_speed_changes_does_not_mislead_it(count):
    simulation = Simulation(count, quality=HOPELESS)
    for slowness in (1.0, 1.5, 0.8, 2.0, 1.0):
        simulation.machine.slowness = slowness
        simulation.run(1000 + 300 * count)

    assert simulation.gain >= 0.95


@COUNTS
@pytest.mark.parametrize("text", [new_text, copied_text])
def test_counters_add_up(count, text):
    simulation = Simulation(count, text=text, quality=FAIR, target=FLAT, draft=CHEAP)
    drafted = accepted = 0
    for _ in range(400):
        simulation.step()
        for told in simulation.told:
            assert told.drafted <= len(told.draft)
            drafted += told.drafted
            accepted += min(told.drafted, told.accepted)

    counters = simulation.speculator.counters
    assert drafted == sum(counters.drafted) > 0
    assert accepted == sum(counters.accepted) > 0
    assert all(a <= d for a, d in zip(counters.accepted, counters.drafted, strict=True))
    # the last position takes all beyond
    assert counters.drafted[:-1] == sorted(counters.drafted[:-1], reverse=True)
    assert counters.accepted[:-1] == sorted(counters.accepted[:-1], reverse=True)
    assert counters.gain == round(counters.earned / counters.spent, 3)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda p: (max(p), min(p)))))
def test_counts_by_position(drafts):
    counters = Counters()
    for drafted, accepted in drafts:
        counters.count(drafted, accepted)

    for position in range(POSITIONS - 1):
        assert counters.drafted[position] == sum(d > position for d, _ in drafts)
        assert counters.accepted[position] == sum(a > position for _, a in drafts)
    assert sum(counters.drafted) == sum(d for d, _ in drafts)
    trimmed = counters.trimmed(counters.drafted)
    assert sum(trimmed) == sum(counters.drafted)
    assert not trimmed or trimmed[-1] > 0


def test_nothing_counted_is_no_gain_and_no_loss():
    assert Counters().gain == 1.0


# single steps

PROMPT = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 11, 12, 13, 14]
LONELY = [31, 32, 33, 34, 35, 36]


def still() -> float:
    """A clock for steps of which nobody asks how long they took."""
    return 0.0


def speculator(*, most_rows=512):
    return Speculator(StepCost(FLAT), drafter=None, memory=None, most_rows=most_rows)


def candidate(asked, prompt, index, *, room=100, allowed=len):
    slot = Slot(index)
    slot.tokens = list(prompt)
    return Candidate(asked.begin(prompt, ""), slot, room, lambda: None, allowed)


def test_a_prompt_that_repeats_itself_drafts_what_followed():
    asked = speculator()

    (draft,) = asked.propose([candidate(asked, PROMPT, 0)], still)

    assert draft
    assert draft == [15, 16, 17, 18, 19, 20, 11, 12, 13, 14][: len(draft)]


def test_padding_is_the_last_token_and_is_never_counted():
    asked = speculator()
    candidates = [candidate(asked, PROMPT, 0), candidate(asked, LONELY, 1)]

    real, padding = asked.propose(candidates, still)

    assert len(padding) == len(real) > 0
    assert padding == [LONELY[-1]] * len(padding)
    # the text happens to go on as it was padded
    assert asked.verified(0, 1, False, 0) == len(real)
    assert asked.verified(1, len(padding), False, 0) == 0
    assert sum(asked.counters.drafted) == len(real)
    assert sum(asked.counters.accepted) == 1
    chance = candidates[1].drafting.matches.mean
    assert chance == pytest.approx(0.5)


def test_a_draft_that_is_padded_counts_up_to_its_end_only():
    asked = speculator()
    candidates = [
        candidate(asked, PROMPT, 0),
        candidate(asked, PROMPT, 1, allowed=lambda tokens: min(2, len(tokens))),
    ]

    free, bound = asked.propose(candidates, still)

    assert len(free) == len(bound) > 2
    assert bound == [*free[:2], *[PROMPT[-1]] * (len(free) - 2)]
    assert asked.verified(1, len(bound), False, 0) == 2
    assert (sum(asked.counters.drafted), sum(asked.counters.accepted)) == (2, 2)


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_draft_ends_where_the_answer_must(room):
    asked = speculator()

    (draft,) = asked.propose([candidate(asked, PROMPT, 0, room=room)], still)

    assert len(draft) == room


def test_a_step_never_has_too_many_rows():
    asked = speculator(most_rows=8)
    candidates = [candidate(asked, PROMPT, index) for index in range(4)]

    drafts = asked.propose(candidates, still)
    assert len(candidates) + sum(map(len, drafts)) <= 8

    alone = speculator()
    (draft,) = alone.propose([candidate(alone, [7] * 200, 0, room=500)], still)
    assert 0 < len(draft) < MOST_ROWS


@pytest.mark.parametrize(
    ("plain", "longest"),
    [
        pytest.param(0.05, 0.1, id="a tenth of a second"),
        pytest.param(0.5, 0.75, id="half as long again as without"),
    ],
)
def test_a_step_with_drafts_does_not_become_long(plain, longest):
    cost = StepCost([(1, plain), (512, plain + 511 * plain / 25)])
    asked = Speculator(cost, drafter=None, memory=None, most_rows=512)

    (draft,) = asked.propose([candidate(asked, [7] * 200, 0, room=500)], still)

    assert draft
    assert cost.seconds(1 + len(draft)) <= longest < cost.seconds(MOST_ROWS)


def test_what_is_not_drafted_is_not_verified():
    asked = speculator()
    assert list(asked.propose([candidate(asked, LONELY, 0)], still)) == [[]]

    assert asked.verified(0, 0, False, 0) == 0
    asked.finished(1, 0.02, 1)
    assert sum(asked.counters.drafted) == 0
    assert asked.counters.spent == 0


def test_a_wrong_draft_lowers_the_chance_of_the_next_and_a_right_one_raises_it():
    asked = speculator()
    means = {}
    for hits in (0, 1):
        proposer = candidate(asked, PROMPT, 0)
        (draft,) = asked.propose([proposer], still)
        asked.verified(0, hits * len(draft), False, 0)
        means[hits] = proposer.drafting.matches.mean

    assert means[0] < 0.5 < means[1]


@pytest.mark.parametrize(("lag", "drafts"), [(0, True), (1, False), (2, True), (40, True)])
def test_a_draft_begins_with_two_rows_only_where_one_token_lacks(lag, drafts):
    # A second row is out of the question; what lags by more is caught up with before it drafts.
    dear = ((1, 0.001), (2, 0.4), (64, 0.401))
    simulation = Simulation(1, quality=GOOD, draft=dear, noise=0.0, prompt=60)
    simulation.drafter.lacks(0, lag)

    simulation.step()

    assert bool(simulation.told[0].draft) == drafts


def test_an_answer_that_ends_does_not_count_against_its_draft():
    asked = speculator()
    proposer = candidate(asked, PROMPT, 0)
    asked.propose([proposer], still)

    asked.verified(0, 1, True, 0)

    assert proposer.drafting.matches.mean > 0.5


def test_now_and_then_a_step_goes_without_drafts_so_that_its_cost_is_known():
    simulation = Simulation(1, text=copied_text, target=FLAT, length=10_000)
    plain = []
    measured = simulation.speculator.target.measured

    def listen(rows, seconds):
        plain.append(rows == 1)
        measured(rows, seconds)

    simulation.speculator.target.measured = listen
    for _ in range(2000):
        simulation.step()

    assert plain.count(True) >= 2000 // 130
