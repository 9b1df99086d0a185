"""Scheduling: every decoding sequence gets its row, prefill fits the rest, progress is certain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.scheduler import (
    DECODE_ONLY_EVERY,
    LEAST_PREFILL,
    OLDEST_SHARE,
    REPLAY_ROWS,
    SURPRISE_EVERY,
    Left,
    Pace,
    Piece,
    plan,
    stretch,
)
from worker.engine.tiles import ahead, tiled

TILE = 64


def level(rows: float) -> float:
    """Seconds of a step: any number of rows costs the same."""
    return 0.01


def rising(rows: float) -> float:
    """As measured for SmolLM2 Q4_0 with two threads."""
    return 0.010 + 0.004 * rows


remaining = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@given(remaining, st.integers(1, 600))
def test_decoding_goes_first_and_prefill_gets_the_rest(left, budget):
    rows = plan(left, budget)

    decoding = left.count(1)
    assert all(rows[i] == 1 for i, count in enumerate(left) if count == 1)
    assert all(0 <= row <= count for row, count in zip(rows, left, strict=True))
    assert sum(rows) <= max(budget, decoding)


@given(remaining)
def test_with_the_budget_that_pace_gives_something_always_moves(left):
    budget = Pace(512, level).budget(left.count(1))

    assert sum(plan(left, budget)) > 0


@given(
    st.lists(st.tuples(st.integers(0, 32), st.integers(0, 512), st.floats(1e-6, 10)), max_size=20),
    st.integers(0, 32),
)
def test_the_budget_stays_within_its_bounds(measured, decoding):
    pace = Pace(512, level)
    for beside, rows, seconds in measured:
        pace.measured(beside, [Piece(rows, 0)], seconds)

    assert min(512, decoding + LEAST_PREFILL) <= pace.budget(decoding) <= 512


def test_a_slow_machine_gets_small_prefill_steps_beside_decoding():
    pace = Pace(512, level)
    for _ in range(30):
        pace.measured(0, [Piece(100, 0)], 1.0)

    assert pace.budget(4) == 4 + LEAST_PREFILL
    assert pace.budget(0) == 25


def test_decoding_and_prefill_together_fill_the_time_of_a_step():
    pace = Pace(512, level)
    for _ in range(30):
        pace.measured(4, (), 0.03)
        pace.measured(4, [Piece(100, 0)], 0.03 + 100 / 2000)

    assert pace.budget(4) == 4 + 100
    for _ in range(30):
        pace.measured(4, (), 0.05)
    assert pace.budget(4) == 4 + 60


def test_for_an_answer_that_goes_on_a_step_beside_decoding_is_as_long_as_without():
    pace = Pace(512, level)
    for _ in range(30):
        pace.measured(4, (), 0.03)
        pace.measured(4, [Piece(100, 0)], 0.03 + 100 / 2000)

    assert pace.budget(4) == 4 + 100
    assert abs(pace.budget(4, urgent=True) - (4 + 440)) <= 10
    assert pace.budget(0, urgent=True) == pace.budget(0)
    assert abs(pace.budget(0) - 500) <= 10


def test_a_step_that_looks_free_does_not_make_the_next_one_huge():
    pace = Pace(512, level)
    for _ in range(30):
        pace.measured(6, (), 0.04)
        pace.measured(6, [Piece(10, 0)], 0.04 + 0.04)
    usual = pace.budget(6) - 6
    pace.measured(6, [Piece(10, 0)], 0.04 + 1e-6)

    assert usual == 10
    assert pace.budget(6) - 6 <= usual * 1.5


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.0])
def test_prompts_that_always_wait_are_not_charged_with_decoding_that_grows(slower: float) -> None:
    """All of a crowd at once: each prompt that is done adds a row to all later steps."""
    pace = Pace(512, rising)
    waiting, decoding, steps = [26] * 200, 0, 0
    while waiting:
        left = [Left(1, 50, 1)] * decoding + [Left(rows, 26, rows) for rows in waiting]
        pieces = pace.plan(left)[decoding:]
        rows = sum(piece.rows for piece in pieces)
        seconds = (
            (slower * rising(decoding) if decoding else 0.0) + 0.01 * (rows > 0) + 0.003 * rows
        )
        pace.measured(decoding, [piece for piece in pieces if piece.rows], seconds)
        waiting = [had - piece.rows for had, piece in zip(waiting, pieces, strict=True)]
        decoding += waiting.count(0)
        waiting = [rows for rows in waiting if rows]
        steps += 1

    # 5,200 rows of 3 ms, in steps with an eighth of a second at least for them
    assert steps < 1.3 * 200 * 26 * 0.003 / 0.115


CROWD = [*[Left(1, 100, 1)] * 100, Left(5_000, 0, 5_000)]


def step(pace: Pace, decode: float) -> int:
    """Of a prompt beside a hundred that decode, the rows of a step that takes what it should."""
    *_, piece = pace.plan(CROWD)
    seconds = decode + (0.01 + 0.003 * piece.rows if piece.rows else 0.0)
    pace.measured(100, [piece] if piece.rows else [], seconds)
    return piece.rows


def test_what_decoding_takes_is_looked_at_again_however_many_prompts_wait() -> None:
    pace = Pace(512, rising)
    rows = [step(pace, 0.5) for _ in range(3 * (DECODE_ONLY_EVERY + 1))]

    first = rows.index(0)
    assert first <= DECODE_ONLY_EVERY
    without = [at for at, count in enumerate(rows) if not count]
    assert without[-2:] == [without[-1] - DECODE_ONLY_EVERY - 1, without[-1]]
    assert len(without) <= 4


@pytest.mark.parametrize("later", [0.3, 0.8])
def test_where_decoding_takes_another_time_at_once_prompts_are_not_charged(later: float) -> None:
    """As when the machine has others to serve, or has them no longer."""
    pace = Pace(512, rising)
    usual = [step(pace, 0.5) for _ in range(100)][-5:]
    for _ in range(4 * (SURPRISE_EVERY + 1)):
        step(pace, later)
    after = [step(pace, later) for _ in range(20)]

    assert usual == [80] * 5  # a quarter of a second
    fitting = (later / 2 - 0.01) / 0.003
    assert all(0.8 * fitting <= rows <= 1.2 * fitting for rows in after if rows)


def test_prompts_lengthen_no_step_by_more_than_a_step_may_take_for_them_alone() -> None:
    pace = Pace(512, rising)

    assert [step(pace, 2.0) for _ in range(100)][-3:] == [130] * 3  # 0.4 s


def test_where_decoding_alone_is_slow_a_prefill_may_lengthen_a_step_by_half():
    pace = Pace(512, level)
    for _ in range(30):
        pace.measured(32, (), 0.16)
        pace.measured(32, [Piece(16, 0)], 0.16 + 16 / 200)

    assert pace.budget(32) == 32 + 16


def pace_of(decode: float, row: float, wide_row: float) -> Pace:
    """Four that decode; seconds of such a step, and of rows in small pieces and in tiles."""
    pace = Pace(512, level, TILE)
    for _ in range(60):
        pace.measured(4, (), decode)
        for rows in (8, 24):
            pace.measured(4, [Piece(rows, 0)], decode + rows * row)
        pace.measured(0, [Piece(TILE, 0)], TILE * wide_row)
    return pace


def rows_of(pace: Pace, left: list[Left], *, urgent: bool = False) -> list[int]:
    return [piece.rows for piece in pace.plan(left, urgent=urgent)]


def prompt(rows: int, depth: int = 0, *, wide: bool = True) -> Left:
    """What is left of a message."""
    tiles = tiled(rows, TILE) if wide else 0
    return Left(rows, depth, tiles or rows, tiles > 0)


def beside_four(*prompts: Left) -> list[Left]:
    return [*[Left(1, 100, 1)] * 4, *prompts]


def test_the_more_waits_the_longer_a_step_may_take():
    pace = pace_of(decode=0.02, row=0.006, wide_row=0.004)

    # A short prompt has its few steps of 80 ms, a longer one steps of half its time.
    assert rows_of(pace, beside_four(prompt(20, 0))) == [1, 1, 1, 1, 10]
    assert 20 <= rows_of(pace, beside_four(prompt(50, 0)))[4] <= 23
    # What is long has tiles, as many as go into the longest step.
    assert rows_of(pace, beside_four(prompt(1000, 0)))[4] == TILE
    assert rows_of(pace_of(0.02, 0.002, 0.0011), beside_four(prompt(1000, 0)))[4] == 5 * TILE
    assert rows_of(pace, [prompt(1000, 0)]) == [TILE]


def test_a_short_rest_is_not_left_to_a_step_of_its_own():
    pace = pace_of(decode=0.02, row=0.006, wide_row=0.003)

    # 10 rows is what fits, and 8 more make do without another pass.
    assert rows_of(pace, beside_four(prompt(18, 0)))[4:] == [18]
    assert rows_of(pace, beside_four(prompt(9, 0), prompt(9, 0)))[4:] == [9, 9]
    assert rows_of(pace, beside_four(prompt(19, 0)))[4:] == [10]
    # Never more than a step can hold.
    assert pace.budget(500, [Piece(18, 0)]) == 512


def test_tiles_and_all_others_take_turns():
    pace = pace_of(decode=0.02, row=0.006, wide_row=0.004)
    left = beside_four(prompt(20, 0), prompt(1000, 0), prompt(500, 0))

    steps = [rows_of(pace, left) for _ in range(5)]
    # Of the oldest, and of the shortest.
    assert steps[0] == steps[4] == [0, 0, 0, 0, 0, TILE, 0]
    assert steps[2] == [0, 0, 0, 0, 0, 0, TILE]
    # A short one is done in its first step, since all steps are long now.
    assert steps[1] == steps[3] == [1, 1, 1, 1, 20, 0, 0]
    # With nobody beside, tiles have all steps.
    assert [rows_of(pace, [prompt(1000, 0)]) for _ in range(3)] == [[TILE]] * 3


def test_after_a_deep_prompt_the_next_has_more_tiles_at_once():
    pace = pace_of(decode=0.02, row=0.002, wide_row=0.0015)
    for depth in range(0, 6000, TILE):
        pace.measured(0, [Piece(TILE, depth)], TILE * (0.0015 + 2e-6 * depth))

    assert rows_of(pace, beside_four(prompt(900, 5900)))[4] == TILE
    assert rows_of(pace, [prompt(900, 0), prompt(900, 0)]) == [2 * TILE, 0]
    # Alone it keeps nobody, and has longer steps.
    assert rows_of(pace, [prompt(900, 0)]) == [4 * TILE]


def test_a_tile_is_never_broken_up_however_long_it_takes():
    pace = pace_of(decode=0.1, row=0.02, wide_row=0.01)

    assert rows_of(pace, beside_four(prompt(1000, 0))) == [0, 0, 0, 0, TILE]
    assert rows_of(pace, beside_four(prompt(1000, 0))) == [1, 1, 1, 1, 0]
    assert rows_of(pace, [prompt(1000, 0)]) == [TILE]


def test_where_tiles_are_not_wanted_no_piece_is_as_large_as_one():
    quick = pace_of(decode=0.002, row=0.0001, wide_row=0.0001)

    assert rows_of(quick, beside_four(prompt(1000, wide=False))) == [1, 1, 1, 1, TILE - 1]
    assert rows_of(quick, [prompt(1000, wide=False)]) == [TILE - 1]
    assert rows_of(quick, [prompt(TILE, wide=False)]) == [TILE - 2]


def test_a_message_ends_before_the_next_ones_tiles_begin():
    pace = pace_of(decode=0.002, row=0.0001, wide_row=0.0001)

    assert rows_of(pace, [Left(500, 300, 20)]) == [20]
    assert rows_of(pace, [Left(500, 300, 2 * TILE, wide=True)]) == [2 * TILE]


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(2, 70), st.integers(0, 5)), max_size=4),
            st.integers(2, 70),
            st.integers(0, 200),
        ),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.floats(1e-5, 0.05), min_size=1, max_size=5),
    st.integers(TILE, 600),
)
def test_which_rows_are_computed_in_tiles_depends_on_the_prompt_alone(prompts, seconds, most):
    """Whatever comes together, and however long steps take."""
    pace = Pace(most, level, TILE)
    spans, ends, sizes = [], [], []
    for parts, last, replayed in prompts:
        at, found = 0, []
        for small, tiles in parts:
            if tiles:
                found.append((at, at + tiles * TILE))
            at += tiles * TILE + small
        spans.append(tuple(found))
        ends.append(at + last)
        sizes.append(at + last + replayed)
    done = [0] * len(sizes)
    in_tiles: list[list[bool]] = [[] for _ in sizes]
    for step in range(10_000):
        if done == sizes:
            break
        here = [i for i, size in enumerate(sizes) if done[i] < size]
        left = []
        for i in here:
            rows = stretch(done[i], ends[i], sizes[i])
            following = ahead(spans[i], done[i], ends[i]) if done[i] < ends[i] else (rows, False)
            left.append(Left(rows, done[i], *following))
        pieces = pace.plan(left)
        assert 0 < sum(piece.rows for piece in pieces) <= max(most, len(here))
        several = [piece.rows for piece in pieces if piece.rows]
        for i, piece in zip(here, pieces, strict=True):
            if piece.rows >= TILE:
                assert len(several) == 1
                assert piece.rows % TILE == 0
            in_tiles[i] += [piece.rows >= TILE] * piece.rows
            done[i] += piece.rows
        deciding = sum(whole.rows == 1 for whole in left)
        pace.measured(deciding, [p for p in pieces if p.rows > 1], seconds[step % len(seconds)])
    assert done == sizes
    for found, wide, size in zip(in_tiles, spans, sizes, strict=True):
        assert found == [any(first <= at < end for first, end in wide) for at in range(size)]


def test_a_single_last_row_is_not_left_over():
    assert plan([33], 32) == [31]


@given(remaining, st.integers(1, 600))
def test_the_oldest_prefill_gets_its_share(left, budget):
    rows = plan(left, budget)
    free = budget - left.count(1)
    oldest = next((i for i, count in enumerate(left) if count > 1), None)

    if oldest is not None and free > 0:
        assert rows[oldest] >= min(left[oldest], free * OLDEST_SHARE) - 1


def test_a_short_prompt_does_not_wait_for_a_long_one():
    assert plan([1, 1, 1500, 20, 1400], 2 + 60) == [1, 1, 40, 20, 0]
    assert plan([1, 1500, 1400, 30], 1 + 40) == [1, 20, 0, 20]


@given(st.integers(1, 600), st.integers(0, 600))
def test_a_resumed_answer_is_computed_in_pieces_of_several_rows(prompt, replayed):
    cached, pieces = 0, []
    while cached < prompt + replayed:
        pieces.append(stretch(cached, prompt, prompt + replayed))
        cached += pieces[-1]

    assert pieces[0] == prompt
    assert sum(pieces[1:]) == replayed
    assert replayed == 1 or all(2 <= rows <= REPLAY_ROWS for rows in pieces[1:])


def test_no_row_of_a_replay_is_left_over():
    assert stretch(10, 10, 10 + 63) == 63
    assert stretch(10, 10, 10 + 64) == 62
    assert stretch(10 + 62, 10, 10 + 64) == 2
    assert stretch(10, 10, 10 + 65) == 63
