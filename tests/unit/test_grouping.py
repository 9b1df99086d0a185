"""Forming and ending groups: what is claimed, by whom, and when it is over."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.demand import Demand
from shared.grouping import JOIN_SECONDS, Proposal, ending, joined, missing, propose
from shared.groups import DraftNeeds, Group, Part, SplitModel, StageState
from shared.model_shape import GRAIN, Layer, ModelShape
from shared.placement import decide
from shared.snapshot import Holding, LeaseView, ModelSettings, Snapshot, WorkerView

MIB = 2**20
NOW = 1_000.0
SHAPE = ModelShape(
    name="big",
    architecture="llama",
    layers=(Layer(10 * MIB, 1024),) * 12,
    embedding=20 * MIB,
    output=1024,
    width=64,
    feed_forward=128,
    heads=2,
    vocabulary=1000,
    context=4096,
)
BIG = SplitModel("big", "d1", 140 * MIB, 0, context=2048, slots=4)


def worker(name: str, memory: int = 90, **more: object) -> WorkerView:
    view = WorkerView(name, memory * MIB, parts=(BIG,))
    return msgspec.structs.replace(view, **more)


def snapshot(*workers: WorkerView, **more: object) -> Snapshot:
    waiting = {"big": Demand(waiting=1, waiting_since=NOW - 1)}
    return msgspec.structs.replace(Snapshot(workers=workers, demand=waiting), **more)


def proposals(seen: Snapshot, last: Group | None = None) -> list[Proposal]:
    """What all workers would claim who see the same."""
    wants = decide(seen, NOW).wants
    before = {} if last is None else {"big": last}
    made = [
        propose(seen, wants, {"big": SHAPE}, worker=one.name, identity="abc", last=before)
        for one in seen.workers
    ]
    return [one for one in made if one is not None]


def test_one_of_those_that_are_needed_claims_for_all() -> None:
    (made,) = proposals(snapshot(worker("a"), worker("b"), worker("c")))
    assert made.model == "big"
    assert made.replica == 0
    assert made.reason == "1 waiting since 1.0 s"
    group = made.group
    assert len(group.parts) == 2
    assert (group.parts[0].start, group.head.stop) == (0, 12)
    assert group.digest == "d1"
    assert group.slots * group.context > 0
    assert group.context % GRAIN == 0


@pytest.mark.parametrize(
    ("why", "seen"),
    [
        ("nobody wants it", snapshot(worker("a"), worker("b"), demand={})),
        ("too little memory", snapshot(worker("a", 60), worker("b", 60))),
        ("one could hold it whole", snapshot(worker("a"), worker("b", 400, able={"big": MIB}))),
        (
            "it is claimed",
            snapshot(worker("a"), worker("b"), leases=(LeaseView("big", 0, "c", "loading"),)),
        ),
        (
            "the memory is in use",
            snapshot(worker("a"), worker("b", holds=(Holding("x", "ready", memory=50 * MIB),))),
        ),
        (
            "the memory is promised",
            snapshot(
                worker("a"),
                worker("b", stages=(StageState("g", "x", 0, 1, 50 * MIB, "loading"),)),
            ),
        ),
        ("one leaves", snapshot(worker("a"), worker("b", open=False))),
        ("one is too far", snapshot(worker("a"), worker("b", hop=0.2))),
        (
            "it is another file",
            snapshot(worker("a"), worker("b", parts=(msgspec.structs.replace(BIG, digest="d2"),))),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_nothing_is_claimed_where(why: str, seen: Snapshot) -> None:
    assert proposals(seen) == [], why


def test_what_an_operator_wants_always_is_claimed_without_demand() -> None:
    seen = snapshot(worker("a"), worker("b"), demand={}, settings={"big": ModelSettings("big", 1)})
    (made,) = proposals(seen)
    assert made.reason == "at least 1"


def test_who_has_failed_with_it_rests() -> None:
    workers = [worker("a"), worker("b")]
    (made,) = proposals(snapshot(*workers))
    resting = msgspec.structs.replace(BIG, missing="it failed")
    tired = [
        msgspec.structs.replace(one, parts=(resting,))
        if one.name == made.group.head.worker
        else one
        for one in workers
    ]
    assert proposals(snapshot(*tired)) == []


def test_one_worker_with_a_small_step_is_a_group_too() -> None:
    """Too small for the usual step, large enough for a narrow one."""
    (made,) = proposals(snapshot(worker("a", 150)))
    assert made.group.workers == ("a",)
    assert (made.group.head.start, made.group.head.stop) == (0, 12)


def drafting(*memory: int, draft: DraftNeeds) -> Snapshot:
    parts = (msgspec.structs.replace(BIG, draft=draft),)
    return snapshot(
        *(worker(name, m, parts=parts) for name, m in zip("abcd", memory, strict=False))
    )


def test_room_is_left_for_a_draft_model_at_the_head() -> None:
    draft = DraftNeeds(8 * MIB, 64, 4096)
    (plain,) = proposals(snapshot(worker("a", 100), worker("b", 100)))
    (made,) = proposals(drafting(100, 100, draft=draft))
    cells = made.group.slots * made.group.context
    assert made.group.head.memory + draft.memory(cells, made.group.step) <= 100 * MIB
    assert plain.group.head.memory + draft.memory(cells, made.group.step) > 100 * MIB
    assert [part.start for part in made.group.parts] == [part.start for part in plain.group.parts]


@given(
    memory=st.lists(st.integers(40, 140), min_size=2, max_size=4),
    weights=st.integers(0, 60),
    cell=st.integers(0, 4096),
    row=st.integers(0, 2**18),
)
def test_a_draft_model_costs_no_host_and_few_cells(
    memory: list[int], weights: int, cell: int, row: int
) -> None:
    draft = DraftNeeds(weights * MIB, cell, row)
    without = proposals(drafting(*memory, draft=DraftNeeds(0, 0, 0)))
    made = proposals(drafting(*memory, draft=draft))
    assert len(made) == len(without)
    for one, plain in zip(made, without, strict=True):
        assert one.group.workers == plain.group.workers
        cells, most = (p.group.slots * p.group.context for p in (one, plain))
        # Cells are dealt in whole grains to each slot.
        assert 4 * (cells + GRAIN * one.group.slots) >= 3 * most
        room = memory["abcd".index(one.group.head.worker)] * MIB - one.group.head.memory
        if one.group != plain.group:
            assert room >= draft.memory(cells, one.group.step)


@pytest.mark.parametrize("lost", ["a", "b", "c"])
def test_who_is_left_of_a_group_keeps_its_part(lost: str) -> None:
    """Its layers are loaded: the others take what is missing."""
    workers = [worker(name, 60) for name in "abcd"]
    (first,) = proposals(snapshot(*workers[:3]))
    assert len(first.group.parts) == 3
    (again,) = proposals(snapshot(*(one for one in workers if one.name != lost)), first.group)
    for before, after in zip(first.group.parts, again.group.parts, strict=True):
        wanted = "d" if before.worker == lost else before.worker
        assert after == msgspec.structs.replace(before, worker=wanted)


def test_a_group_of_other_cuts_is_formed_where_the_old_ones_do_not_fit() -> None:
    (first,) = proposals(snapshot(worker("a", 90), worker("b", 80)))
    # The one that is left cannot keep its part.
    (again,) = proposals(snapshot(worker("a", 75), worker("c", 100)), first.group)
    assert {part.worker for part in again.group.parts} == {"a", "c"}
    # Fewer hosts than before.
    (single,) = proposals(snapshot(worker("a", 90), worker("c", 150)), first.group)
    assert single.group.workers == ("c",)


def test_what_is_kept_of_a_group_stands_in_nobodys_way() -> None:
    kept = (StageState("", "x", 0, 1, 50 * MIB, "kept"),)
    assert len(proposals(snapshot(worker("a"), worker("b", stages=kept)))) == 1


def test_what_is_missing_is_told_without_regard_to_what_runs_now() -> None:
    busy = worker("a", holds=(Holding("x", "ready", memory=80 * MIB),))
    assert missing(snapshot(busy, worker("b")), BIG, SHAPE) == ""
    assert "no host holds it alone" in missing(snapshot(worker("b")), BIG, SHAPE)


@given(
    st.lists(
        st.tuples(
            st.integers(20, 200),
            st.integers(0, 60),
            st.sampled_from((0.0, 0.001, 0.03, 0.1)),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_all_who_see_the_same_choose_the_same_and_nothing_is_promised_twice(
    told: list[tuple[int, int, float, bool]],
) -> None:
    workers = [
        worker(
            f"w{number}",
            memory,
            hop=hop,
            open=is_open,
            holds=(Holding("x", "ready", memory=used * MIB),),
        )
        for number, (memory, used, hop, is_open) in enumerate(told)
    ]
    made = proposals(snapshot(*workers))
    assert len(made) <= 1
    for proposal in made:
        group = proposal.group
        free = {one.name: one.memory - sum(h.memory for h in one.holds) for one in workers}
        assert all(part.memory <= free[part.worker] for part in group.parts)
        assert proposals(snapshot(*reversed(workers))) == made


GROUP = Group(
    id="g",
    digest="d1",
    parts=(Part("a", 0, 5, MIB), Part("b", 5, 9, MIB), Part("me", 9, 12, MIB)),
    slots=1,
    context=512,
    step=32,
)


def carrying(name: str, state: str = "ready", group: str = "g", **more: object) -> WorkerView:
    return worker(name, stages=(StageState(group, "big", 0, 5, MIB, state, "why"),), **more)


@pytest.mark.parametrize(
    ("others", "age", "reason", "whole"),
    [
        ([carrying("a"), carrying("b")], 99.0, "", False),
        ([carrying("a", "loading"), carrying("b")], 99.0, "", False),
        ([carrying("a"), worker("b")], JOIN_SECONDS - 1, "", False),
        ([carrying("a"), worker("b")], JOIN_SECONDS + 1, "b has no part in it", False),
        ([carrying("a"), carrying("b", group="old")], 99.0, "b has no part in it", False),
        ([carrying("a"), carrying("b", "failed")], 1.0, "b: why", False),
        ([carrying("a")], 1.0, "b is gone", False),
        ([carrying("a", open=False), carrying("b")], 99.0, "a leaves", True),
        ([carrying("a", open=False)], 99.0, "b is gone", False),
    ],
)
def test_a_group_is_over_when_a_part_of_it_is(
    others: list[WorkerView], age: float, reason: str, whole: bool
) -> None:
    assert ending(GROUP, Snapshot((worker("me"), *others)), age) == (reason, whole)


def test_who_had_a_part_and_has_none_any_more_is_not_waited_for() -> None:
    """Its process was started anew, say."""
    before = Snapshot((worker("me"), carrying("a"), carrying("b", "loading")))
    known = joined(GROUP, before)
    assert known == {"a": 0.0, "b": 0.0}
    after = Snapshot((worker("me"), carrying("a"), worker("b")))
    assert ending(GROUP, after, 1.0, known) == ("b has no part in it", False)
    assert ending(GROUP, before, 1.0, known) == ("", False)
    anew = Snapshot((worker("me"), carrying("a"), carrying("b", started=9.0)))
    assert ending(GROUP, anew, 1.0, known) == ("b was started anew", False)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((Part("a", 0, 5, 1), Part("a", 5, 9, 1)), "two parts"),
        ((Part("a", 1, 5, 1),), "begin with layer 0"),
        ((Part("a", 0, 5, 1), Part("b", 6, 9, 1)), "follow each other"),
        ((Part("a", 0, 5, 1), Part("b", 5, 5, 1)), "each has one"),
        ((), "length >= 1"),
        ((Part("a.b", 0, 5, 1),), "regex"),
    ],
)
def test_a_group_that_makes_no_sense_is_not_decoded(parts: tuple[Part, ...], why: str) -> None:
    told = msgspec.to_builtins(GROUP) | {"parts": msgspec.to_builtins(parts)}
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(told, Group)
