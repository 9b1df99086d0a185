"""The planner: what it may never do, and what it does with hosts and models that people have."""

from itertools import combinations, permutations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.model_shape import Layer, ModelShape, Scales, Size
from shared.partition import Host, deal, reach
from shared.partners import MOST, choose_partners, holds
from shared.planning import LEAST_CELLS, Plan, Wanted, plan

MIB = 2**20


def shape_of(count: int = 12, **changes: object) -> ModelShape:
    made = ModelShape(
        name="m",
        architecture="llama",
        layers=(Layer(10 * MIB, 1024),) * count,
        embedding=20 * MIB,
        output=1024,
        width=512,
        feed_forward=1024,
        heads=8,
        vocabulary=1000,
        context=4096,
    )
    return msgspec.structs.replace(made, **changes)


layer = st.builds(Layer, st.integers(1, 40 * MIB), st.integers(0, 4096))
shapes = st.builds(shape_of).flatmap(
    lambda made: st.builds(
        lambda layers, embedding, output, period: msgspec.structs.replace(
            made, layers=tuple(layers), embedding=embedding, output=output, period=period
        ),
        st.lists(layer, min_size=1, max_size=12),
        st.integers(0, 60 * MIB),
        st.integers(0, 60 * MIB),
        st.integers(1, 3),
    )
)


@st.composite
def host_sets(draw: st.DrawFn, most: int = 5) -> list[Host]:
    count = draw(st.integers(0, most))
    return [
        Host(
            f"h{number}",
            draw(st.integers(1, 300)) * MIB,
            draw(st.sampled_from((0.0, 0.001, 0.02, 0.07, 0.1))),
            draw(st.sampled_from((0.5, 1.0, 3.0))),
        )
        for number in range(count)
    ]


def check_stages(made: Plan, shape: ModelShape, hosts: list[Host]) -> None:
    by_name = {host.name: host for host in hosts}
    scales = Scales(shape, Size(made.cells, made.step))
    ends = [0]
    for stage in made.stages:
        assert stage.start == ends[-1] < stage.stop
        assert stage.start % shape.period == 0
        assert stage.memory == scales.memory(stage.start, stage.stop, head=stage.head)
        assert stage.memory <= by_name[stage.host].memory
        ends.append(stage.stop)
    assert ends[-1] == len(shape.layers)
    assert [stage.head for stage in made.stages] == [False] * (len(made.stages) - 1) + [True]
    assert len({stage.host for stage in made.stages}) == len(made.stages)
    assert max(stage.share for stage in made.stages) == pytest.approx(1.0)


ALIKE = [Host("h0", MIB, 0.0, 1.0), Host("h1", MIB, 0.0, 1.0)]


@example(shape_of(layers=(Layer(1, 0),), embedding=0, output=0), ALIKE)
@given(shapes, host_sets())
def test_what_is_planned_fits_is_whole_and_the_same_for_all(shape: ModelShape, hosts: list[Host]):
    made = plan(shape, hosts)
    assert plan(shape, hosts[::-1]) == made
    assert {one.host for one in made.left_out} | {one.host for one in made.stages} == {
        host.name for host in hosts
    }
    assert all(host.rtt <= 0.08 for host in hosts if host.name in {s.host for s in made.stages})
    assert made.reasons
    if made.kind == "refused":
        assert not made.stages
        return
    assert made.kind == ("single" if len(made.stages) == 1 else "pipeline")
    assert min(LEAST_CELLS, 4096) <= made.cells <= 8 * 4096
    check_stages(made, shape, hosts)


def feasible(scales: Scales, hosts: tuple[Host, ...]) -> bool:
    """By trying every order, each host taking as much as it can."""
    count = len(scales.shape.layers)
    for order in permutations(hosts):
        at = 0
        for host in order[:-1]:
            at = reach(scales, host.memory, at)
        if scales.memory(at, count, head=True) <= order[-1].memory:
            return True
    return False


@given(shapes, host_sets(4))
def test_no_fewer_hosts_would_do_and_no_nearer_ones(shape: ModelShape, hosts: list[Host]):
    scales = Scales(shape, Size(256, 32))
    stages = choose_partners(scales, hosts)
    sets = [
        chosen
        for count in range(1, len(hosts) + 1)
        for chosen in combinations(hosts, count)
        if feasible(scales, chosen)
    ]
    assert bool(stages) == bool(sets)
    if stages is None:
        return
    fewest = min(map(len, sets))
    assert len(stages) == fewest
    rtts = {host.name: host.rtt for host in hosts}
    nearest = min(sum(host.rtt for host in one) for one in sets if len(one) == fewest)
    assert sum(rtts[stage.host] for stage in stages) == pytest.approx(nearest, abs=0.001)
    assert holds(scales, [host for host in hosts if host.name in {s.host for s in stages}])


@given(shapes, host_sets(3).filter(bool))
def test_no_other_cuts_make_the_slowest_stage_faster(shape: ModelShape, hosts: list[Host]):
    scales = Scales(shape, Size(256, 32))
    count, period = len(shape.layers), shape.period
    stages = deal(scales, hosts)
    best = None
    for cuts in combinations(range(period, count, period), len(hosts) - 1):
        ends = (0, *cuts, count)
        spans = list(zip(ends, ends[1:], hosts, strict=False))
        parts = [(a, b, host, host is hosts[-1]) for a, b, host in spans]
        if all(scales.memory(a, b, head=head) <= host.memory for a, b, host, head in parts):
            took = max(scales.work(a, b, head=head) / host.speed for a, b, host, head in parts)
            best = took if best is None else min(best, took)
    if best is None:
        assert stages is None
        return
    assert stages is not None
    speed = {host.name: host.speed for host in hosts}
    took = max(scales.work(s.start, s.stop, head=s.head) / speed[s.host] for s in stages)
    assert took == pytest.approx(best)


def test_many_hosts_are_looked_at_in_time():
    hosts = [Host(f"h{number:03}", 40 * MIB, number / 10_000) for number in range(300)]
    made = plan(shape_of(80), hosts)
    assert made.kind == "pipeline"
    assert len(made.stages) > MOST
    check_stages(made, shape_of(80), hosts)


def test_layers_are_dealt_by_speed():
    hosts = [Host("fast", 120 * MIB, speed=2.0), Host("slow", 120 * MIB, speed=1.0)]
    stages = choose_partners(Scales(shape_of(), Size(512, 32)), hosts)
    assert stages is not None
    counts = {stage.host: stage.stop - stage.start for stage in stages}
    assert counts["fast"] > counts["slow"]


def test_the_nearer_of_two_that_would_do_is_taken_and_those_too_far_are_not():
    hosts = [
        Host("a", 90 * MIB, 0.03),
        Host("b", 90 * MIB, 0.01),
        Host("c", 90 * MIB, 0.02),
        Host("d", 500 * MIB, 0.09),
    ]
    made = plan(shape_of(), hosts)
    assert {stage.host for stage in made.stages} == {"b", "c"}
    assert {one.host: one.reason for one in made.left_out} == {
        "a": "2 hosts are enough",
        "d": "90 ms away, more than 80 ms",
    }


def test_what_is_left_goes_to_cells_and_wide_steps():
    tight = plan(shape_of(), [Host("a", 75 * MIB), Host("b", 75 * MIB)])
    roomy = plan(shape_of(), [Host("a", 130 * MIB), Host("b", 130 * MIB)])
    assert (tight.kind, roomy.kind) == ("pipeline", "pipeline")
    assert tight.cells < roomy.cells
    assert tight.step <= roomy.step


def test_a_model_that_cannot_be_split_is_refused_by_its_architecture():
    made = plan(shape_of(architecture="mamba"), [Host("a", 90 * MIB), Host("b", 90 * MIB)])
    assert made.kind == "refused"
    assert "'mamba'" in made.reasons[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embedding": 100 * MIB}, "embedding, output and the last layers are not split"),
        ({"layers": (Layer(120 * MIB, 1), Layer(1, 1))}, "a layer is not split"),
        ({"layers": (Layer(30 * MIB, 1),) * 12}, "all 2 hosts together have 180.0 MiB"),
    ],
)
def test_a_refusal_says_what_is_missing(changes: dict[str, object], words: str):
    made = plan(shape_of(**changes), [Host("a", 90 * MIB), Host("b", 90 * MIB)])
    assert made.kind == "refused"
    assert words in made.reasons[1]


def test_no_host_is_a_refusal_too():
    assert plan(shape_of(), []).reasons == ("there is no host near enough",)
    assert plan(shape_of(), [Host("a", 900 * MIB, 0.2)]).kind == "refused"


def test_shards_only_where_they_are_allowed():
    shape = shape_of(
        architecture="dbrx",
        layers=(Layer(80 * MIB, 1024, 72 * MIB),) * 4,
        experts=8,
        experts_used=2,
    )
    hosts = [Host(name, 250 * MIB) for name in "abc"]
    refused = plan(shape, hosts)
    assert refused.kind == "refused"
    assert "with shards allowed" in refused.better[0]
    made = plan(shape, hosts, Wanted(shards=True))
    assert made.kind == "shards"
    assert made.shards is not None
    assert made.shards.memory <= 250 * MIB
    assert made.shards.experts * len(made.replicas) >= 8


def test_a_model_without_layers_is_no_model():
    with pytest.raises(ValueError, match="no layers"):
        plan(shape_of(0), [])
    with pytest.raises(ValueError, match="same name"):
        choose_partners(Scales(shape_of(), Size(1)), [Host("a", 1), Host("a", 2)])
