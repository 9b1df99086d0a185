import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mesh.fleet import Fleet
from mesh.readiness import judge
from mesh.tables import models_table, size_text, status_view
from shared.groups import SplitModel, StageState
from shared.presence import Beat, ModelState, RoleChange, RouterBeat, encode_beat


def model(name: str = "m", state: str = "ready", **more: Any) -> ModelState:
    return ModelState(name=name, state=state, **more)  # type: ignore[arg-type]


def beat(worker: str = "w1", sequence: int = 1, *models: ModelState, **more: Any) -> bytes:
    return encode_beat(
        Beat(**{"worker": worker, "state": "ready", "sequence": sequence, "models": models} | more)
    )


@given(st.permutations(range(6)))
def test_only_the_newest_beat_counts(order: list[int]) -> None:
    fleet = Fleet()
    for sequence in order:
        fleet.hear(beat("w1", sequence))
        fleet.hear_router(encode_beat(RouterBeat(router="r1", sequence=sequence)))
    assert fleet.workers["w1"].sequence == 5
    assert fleet.routers["r1"].sequence == 5


def test_a_process_started_again_counts_from_the_beginning() -> None:
    fleet = Fleet()
    fleet.hear(beat("w1", 900, started=1.0))
    fleet.hear(beat("w1", 1, started=2.0))
    assert fleet.workers["w1"].sequence == 1


def test_who_says_goodbye_is_forgotten() -> None:
    fleet = Fleet()
    fleet.hear(beat("w1", 1))
    fleet.hear(beat("w1", 2, state="gone"))
    fleet.hear_router(encode_beat(RouterBeat(router="r1", sequence=1)))
    fleet.hear_router(encode_beat(RouterBeat(router="r1", sequence=2, state="gone")))
    assert fleet.snapshot().workers == ()
    assert fleet.snapshot().routers == ()


def test_beats_of_another_language_are_counted() -> None:
    fleet = Fleet()
    fleet.hear(b"\xff")
    fleet.hear_router(b"{}")
    assert fleet.snapshot().unread == 2


def test_a_model_is_as_good_as_its_best_worker() -> None:
    fleet = Fleet()
    fleet.hear(beat("w2", 1, model(state="ready", context=4096, size=9, slots=4, free=1)))
    fleet.hear(beat("w1", 1, model(state="loading", context=0, detail="loading 3%")))
    fleet.hear(beat("w3", 1, model(state="ready", context=2048, embeddings=False)))
    (view,) = fleet.snapshot().models
    assert (view.state, view.context, view.size, view.embeddings) == ("ready", 2048, 9, True)
    assert [(w.worker, w.state, w.slots, w.free) for w in view.workers] == [
        ("w1", "loading", 0, 0),
        ("w2", "ready", 4, 1),
        ("w3", "ready", 0, 0),
    ]


def test_every_model_of_every_worker_is_judged() -> None:
    fleet = Fleet()
    fleet.hear(beat("w1", 1, model("a"), model("b", "failed", detail="no memory")))
    fleet.hear(beat("w2", 1, model("a", "loading")))
    loads = judge(fleet, ["w1", "w2", "w3"], ["a", "b"])
    assert loads.ready == (("w1", "a"),)
    assert loads.failed == (("w1", "b", "no memory"),)
    assert loads.pending == (("w2", "a"), ("w2", "b"), ("w3", "a"), ("w3", "b"))
    assert loads.served == ("a",)


def test_the_tables_show_what_was_heard() -> None:
    fleet = Fleet()
    fleet.hear(
        beat(
            "w1",
            1,
            model("smol", slots=16, free=12, queued=3, queue_limit=64, kv_used=0.5, context=8192),
            model("[red]odd", "failed", detail="too [large]"),
            started=100.0,
            memory_total=2 * 1024**3,
            memory_used=1024**3,
        )
    )
    fleet.hear(beat("w2", 1, state="standby"))
    fleet.hear_router(
        encode_beat(RouterBeat(router="r1", sequence=1, url="http://127.0.0.1:1", in_flight=7))
    )
    console = Console(width=250, no_color=True)
    with console.capture() as capture:
        console.print(status_view(fleet.snapshot(), now=100.0 + 3 * 3600 + 120))
        console.print(models_table(fleet.snapshot().models))
    text = capture.get()
    for words in (
        "4/16",
        "3/64",
        "50%",
        "failed too [large]",
        "[red]odd",
        "1.0 GiB of 2.0 GiB",
        "3 h 02 min",
        "standby",
        "http://127.0.0.1:1",
        "12/16",
        "8192",
    ):
        assert words in text


def test_what_speculation_and_reuse_bring_is_shown_where_there_is_any() -> None:
    fleet = Fleet()
    counts = {"drafted": 200, "accepted": 150, "gain": 1.4142}
    reuse = {"prompt_tokens": 1000, "cached_tokens": 620}
    by_position = {"drafted_at": (150, 50), "accepted_at": (130, 20)}
    fleet.hear(beat("w1", 1, model("smol", **counts, **reuse, **by_position)))
    fleet.hear(beat("w2", 1, model("smol")))
    console = Console(width=250, no_color=True)
    with console.capture() as capture:
        console.print(status_view(fleet.snapshot()))
    _, loads = capture.get().split("models ")
    head, busy, idle = (line.split() for line in loads.splitlines() if line.strip())

    assert head[-3:] == ["accepted", "gain", "cached"]
    assert busy[-3:] == ["75%", "1.41x", "62%"]
    assert idle[-2:] == ["0%", "0"]  # KV and tokens/s; nothing after them
    beats = json.loads(msgspec.json.encode(fleet.snapshot()))["workers"]
    (state,) = beats[0]["models"]
    assert state["drafted_at"] == [150, 50]
    assert state["accepted_at"] == [130, 20]


def test_sizes_are_for_people() -> None:
    assert size_text(0) == "-"
    assert size_text(94 * 1024**2) == "94 MiB"
    assert size_text(3 * 1024**3 // 2) == "1.5 GiB"


def split(missing: str = "") -> SplitModel:
    return SplitModel("a", "d", 100, 0, context=512, slots=1, missing=missing)


def judged(*beats: bytes) -> tuple[int, int, list[str]]:
    fleet = Fleet()
    for one in beats:
        fleet.hear(one)
    loads = judge(fleet, ["w1", "w2"], ["a"])
    return len(loads.pending), len(loads.ready), [reason for *_, reason in loads.failed]


def test_a_model_that_several_carry_is_ready_with_its_head() -> None:
    ready = beat("w1", 1, model("a"), parts=(split(),))
    loading = beat("w1", 1, model("a", "loading"), parts=(split(),))
    assert judged(ready, beat("w2", parts=(split(),))) == (0, 1, [])
    assert judged(loading, beat("w2", parts=(split(),))) == (2, 0, [])
    assert judged(ready) == (1, 1, [])


def test_a_model_that_they_cannot_carry_has_failed_with_all() -> None:
    alone = beat("w1", parts=(split("too large"),))
    assert judged(alone, beat("w2", parts=(split(),))) == (1, 0, ["too large"])
    assert judged(alone, beat("w2", parts=(split("too small"),))) == (
        0,
        0,
        ["too large", "too small"],
    )


def test_a_group_that_fails_is_waited_for_twice() -> None:
    def tired(times: int) -> bytes:
        changes = tuple(RoleChange(float(n), "a", "fail", f"lost {n}") for n in range(times))
        return beat("w1", parts=(split("lost"),), changes=changes)

    other = beat("w2", parts=(split("lost elsewhere"),))
    assert judged(tired(2), other) == (1, 0, ["lost elsewhere"])
    assert judged(tired(3), other) == (0, 0, ["lost 2", "lost elsewhere"])


def test_parts_are_shown_with_their_layers() -> None:
    stages = (StageState("g", "a", 0, 7, 40 * 2**20, "loading", "cutting 40%"),)
    head = (StageState("g", "a", 7, 9, 0, "ready"),)
    fleet = Fleet()
    fleet.hear(beat("w1", 1, model("a", memory=30 * 2**20), stages=head))
    fleet.hear(beat("w2", stages=stages))
    console = Console(width=250, no_color=True)
    with console.capture() as captured:
        console.print(status_view(fleet.snapshot()))
    rows = [line.split() for line in captured.get().splitlines()]
    assert ["a", "0-6", "w2", "loading", "cutting", "40%", "40", "MiB"] in rows
    assert ["a", "7-8+head", "w1", "ready", "30", "MiB"] in rows
