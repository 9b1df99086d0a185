"""The comparison with llama-server: what is counted, and what each system is told."""

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.bench_peers import (
    CONTEXTS,
    PARTS,
    SLOTS,
    Setting,
    main,
    plan_of,
    read_rows,
    report,
)
from loadtests.crowd import Crowd
from loadtests.http_client import Target
from loadtests.http_reply import Reply
from loadtests.peers import plot
from loadtests.peers.asking import (
    BURST,
    PartFailed,
    ask,
    ask_all,
    cached_tokens,
    chat,
    pauses,
    settle,
    try_all,
)
from loadtests.peers.conversations import ConversationsRow, Talk, possible_tokens
from loadtests.peers.mixed import SHORT_FOR_EACH_LONG, MixedRow, timetable
from loadtests.peers.prefix import PREFIX_TOKENS, STREAM_TOKENS, PrefixRow, prefix_row
from loadtests.peers.pressure import pressure_row, sizes
from loadtests.peers.systems import (
    OURS,
    Plan,
    System,
    catalog_text,
    low_port,
    server_arguments,
    worker_arguments,
)
from loadtests.peers.texts import Texts
from loadtests.peers.throughput import ThroughputRow, count_of, ratios

PLAN = Plan(
    model=Path("/models/target.gguf"),
    threads=2,
    slots=8,
    context=2048,
    peers=("split", "unified"),
    server=Path("/bin/llama-server"),
)


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def throughput(rep: int, system: str, rate: float, concurrent: int = 4) -> ThroughputRow:
    return ThroughputRow(rep, system, concurrent, rate, 20.0, 30.0, 5.0, 9.0, 1.5)


def reply(ttft: float = 0.1, *, cached: int = 0, prompt: int = 100, **more: Any) -> Reply:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return Reply(sent=1.0, first=1.0 + ttft, ended=2.0, usage=usage, **more)


# what the systems are told


def test_the_server_gets_the_context_of_all_slots_together() -> None:
    command = server_arguments(PLAN, "split", 23_456)
    assert command[0] == "/bin/llama-server"
    assert after(command, "--ctx-size") == str(8 * 2048)
    assert after(command, "--parallel") == "8"
    assert after(command, "--threads") == "2"
    assert (after(command, "--host"), after(command, "--port")) == ("127.0.0.1", "23456")
    assert "--no-kv-unified" in command
    assert "--model-draft" not in command


def test_the_worker_gets_the_context_of_one_slot() -> None:
    assert set(worker_arguments(PLAN)) >= {"--slots=8", "--threads=2", "--ctx=2048"}


def test_the_kv_cache_of_the_server_is_in_parts_or_one() -> None:
    assert "--kv-unified" in server_arguments(PLAN, "unified", 1)


def test_both_sides_are_given_the_draft() -> None:
    plan = msgspec.structs.replace(PLAN, draft=Path("/models/draft.gguf"))
    command = server_arguments(plan, "split", 1)
    assert after(command, "--model-draft") == "/models/draft.gguf"
    assert after(command, "--spec-type") == "draft-simple"
    models = tomllib.loads(catalog_text(plan))["models"]
    target = next(entry for entry in models.values() if entry["file"] == "/models/target.gguf")
    assert models[target["draft"]]["file"] == "/models/draft.gguf"


def test_further_arguments_come_last_so_that_they_win() -> None:
    plan = msgspec.structs.replace(
        PLAN, server_extra=("--threads", "1"), worker_extra=("--threads=1",)
    )
    assert server_arguments(plan, "split", 1)[-2:] == ["--threads", "1"]
    assert worker_arguments(plan)[-1] == "--threads=1"


def test_a_path_with_quotes_and_umlauts_stays_what_it_is() -> None:
    plan = msgspec.structs.replace(PLAN, model=Path('/models/"größe" \U0001f600.gguf'))
    (entry,) = tomllib.loads(catalog_text(plan))["models"].values()
    assert entry == {"file": '/models/"größe" \U0001f600.gguf'}


def test_ports_are_below_those_the_kernel_gives_out() -> None:
    assert all(1024 < low_port() < 32_768 for _ in range(20))


def test_each_part_has_room_for_what_it_asks() -> None:
    assert plan_of("throughput", PLAN, (1, 16)).slots == 16
    assert plan_of("mixed", PLAN, (1, 16)).slots == SLOTS
    assert plan_of("pressure", PLAN, (1,)).peers == ()
    assert CONTEXTS["prefix"] >= PREFIX_TOKENS + 100 + STREAM_TOKENS
    assert set(CONTEXTS) == set(PARTS)


# what is asked


def test_every_system_is_asked_the_same_and_never_twice() -> None:
    one, other = Texts(seed=4), Texts(seed=4)
    mine = [one.short() for _ in range(50)]
    assert mine == [other.short() for _ in range(50)]
    assert len({messages[0]["content"][:12] for messages in mine}) == 50


@given(tokens=st.integers(60, 4000), seed=st.integers(0, 9))
def test_a_document_is_about_as_long_as_wished(tokens: int, seed: int) -> None:
    words = Texts(seed).document(tokens)["content"].replace(".", " .").split()
    assert abs(len(words) - tokens) <= 24


def test_a_request_is_greedy_and_tells_its_usage() -> None:
    system = System("x", Target("http://127.0.0.1:1"), "bench", {})
    head, body = chat(system, Texts(1).short(), 32).split(b"\r\n\r\n", 1)
    asked = json.loads(body)
    assert b"POST /v1/chat/completions" in head
    assert asked["temperature"] == 0
    assert asked["ignore_eos"] is True
    assert asked["stream_options"] == {"include_usage": True}
    plain = json.loads(chat(system, [], 1, stream=False).split(b"\r\n\r\n", 1)[1])
    assert plain["stream"] is False
    assert "stream_options" not in plain


@given(spacing=st.floats(0.1, 30), longs=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_the_timetable_is_ordered_complete_and_ends_in_time(
    spacing: float, longs: int, seed: int
) -> None:
    arrivals = timetable(spacing, longs, seed)
    assert arrivals == timetable(spacing, longs, seed)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= spacing * longs
    kinds = [arrival.kind for arrival in arrivals]
    assert kinds.count("long") == longs
    assert kinds.count("short") == longs * SHORT_FOR_EACH_LONG


async def test_a_system_that_is_not_there_fails_the_part_by_its_name() -> None:
    system = System("nobody", Target(f"http://127.0.0.1:{low_port()}"), "bench", {})
    request = chat(system, [], 1)
    with pytest.raises(PartFailed, match="nobody: connect"):
        await ask(system, request)
    with pytest.raises(PartFailed, match="nobody"):
        await ask_all(system, [request] * 3, at_once=2)
    assert [r.error[:7] for r in await try_all(system, [request] * 3, at_once=2)] == ["connect"] * 3


async def test_a_crowd_that_fails_fails_the_part() -> None:
    system = System("nobody", Target(f"http://127.0.0.1:{low_port()}"), "bench", {})
    crowd = Crowd(system.target, lambda: chat(system, [], 1))
    crowd.grow(2)
    with pytest.raises(PartFailed, match="nobody: a stream failed: connect"):
        await settle(system, crowd)
    crowd.grow(0)


@pytest.mark.parametrize("flag", ["model", "draft", "server", "from_json"])
def test_a_file_that_is_not_there_is_named_with_its_flag(flag: str, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=rf"--{flag.replace('_', '-')}: there is no file .*/absent"
    ):
        main(**{flag: tmp_path / "absent"})


# what is counted


def test_tokens_of_one_step_are_no_pause() -> None:
    assert pauses([0.02, BURST / 5, BURST / 9, 0.03]) == [0.02, 0.03]


def test_reuse_is_read_from_the_usage_and_absent_means_none() -> None:
    assert cached_tokens(reply(cached=40)) == 40
    assert cached_tokens(Reply(0.0, usage={"prompt_tokens": 5})) == 0
    assert cached_tokens(Reply(0.0, usage={"prompt_tokens_details": None})) == 0


@given(*[st.integers(0, 5000)] * 3)
def test_what_could_be_reused_is_never_more_than_was_there_or_is_needed(
    before: int, answered: int, prompt: int
) -> None:
    possible = possible_tokens(before, answered, prompt)
    assert 0 <= possible <= max(0, before + answered - 1)
    assert possible <= max(0, prompt - 1)
    assert possible_tokens(before, answered, prompt + 1) >= possible


def answer(prompt: int, completion: int, cached: int) -> Reply:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    text = json.dumps({"choices": [{"message": {"role": "assistant", "content": "Yes."}}]})
    return Reply(sent=1.0, ended=1.5, usage=usage, text=text.encode())


def test_a_conversation_counts_from_its_second_turn_what_it_could_reuse_and_did() -> None:
    talk = Talk(Texts(seed=1))
    talk.ask()
    talk.take(answer(prompt=60, completion=20, cached=5))
    assert (talk.possible, talk.hit) == (0, 0)
    talk.ask()
    talk.take(answer(prompt=100, completion=10, cached=30))
    assert (talk.possible, talk.hit) == (79, 30)
    talk.ask()
    talk.take(answer(prompt=130, completion=10, cached=129))
    assert (talk.possible, talk.hit) == (79 + 109, 30 + 109)
    assert talk.prompt == 60 + 100 + 130
    assert [message["role"] for message in talk.messages] == ["system"] + ["user", "assistant"] * 3


def test_the_later_ones_are_held_against_the_one_that_computed_the_prefix() -> None:
    later = [reply(0.05, cached=90), reply(0.1, cached=90), reply(0.2, cached=60)]
    row = prefix_row(0, "x", "sequential", [1.0], later)
    assert (row.first, row.p50, row.p99) == pytest.approx((1000, 100, 200))
    assert row.share == pytest.approx(0.1)
    assert (row.prompt_tokens, row.cached_tokens) == (300, 240)


def test_without_a_first_the_soonest_is_it() -> None:
    row = prefix_row(0, "x", "cold", [], [reply(0.4), reply(0.2), reply(0.9)])
    assert (row.first, row.p50, row.p99) == pytest.approx((200, 400, 900))


def test_what_failed_under_pressure_is_counted_and_named() -> None:
    good = [reply(0.1 * n, timings={"queue_ms": 50.0 * n}) for n in (1, 2, 3)]
    row = pressure_row("long", [*good, Reply(0.0, error="HTTP 502")], died=1)
    assert (row.requests, row.completed, row.errors, row.died) == (4, 3, ("HTTP 502",), 1)
    assert row.unfairness == pytest.approx(1.5)
    assert (row.queue_p50, row.queue_most) == (100.0, 150.0)
    nothing = pressure_row("long", [Reply(0.0, error="HTTP 502")], died=0)
    assert (nothing.completed, nothing.wait_most) == (0, 0.0)
    with pytest.raises(ValueError, match="long"):
        pressure_row("long", [], died=0)


def test_the_longest_requests_do_not_fit_and_the_others_do() -> None:
    *smaller, largest = sizes(1024)
    assert largest.prompt + largest.answer > 1024
    assert all(size.prompt + size.answer < 1024 for size in smaller)


def test_a_ratio_is_taken_within_its_repetition() -> None:
    rows = [
        throughput(0, OURS, 100),
        throughput(0, "llama-server", 50),
        throughput(1, OURS, 300),
        throughput(1, "llama-server", 100),
        throughput(0, OURS, 999, concurrent=8),
        throughput(2, OURS, 500),
    ]
    assert ratios(rows, 4, "llama-server") == [2.0, 3.0]


def test_one_request_alone_decides_no_figure() -> None:
    assert count_of(1, rounds=1) == 4
    assert count_of(16, rounds=2) == 32


# what is shown


ROWS = [
    Setting("target.gguf", "draft.gguf", 2, "--poll 0", ""),
    throughput(0, OURS, 120),
    throughput(0, "llama-server", 100),
    throughput(0, OURS, 240, concurrent=8),
    throughput(0, "llama-server", 160, concurrent=8),
    MixedRow(0, OURS, 900.0, 50.0, 80.0, 1500.0, 9.0, 70.0, 90.0, 130.0),
    PrefixRow(0, OURS, "cold", 1000.0, 1100.0, 1200.0, 12_000, 10_500),
    ConversationsRow(OURS, 50, 10, 8, 100_000, 80_000, 60_000, 300.0, 120.0),
    pressure_row("long", [reply(), Reply(0.0, error="HTTP 502")], died=0),
]


def test_the_tables_are_made_of_the_rows_and_only_of_those() -> None:
    text = report(ROWS)
    assert "target.gguf, 2 thread(s), draft draft.gguf, llama-server with --poll 0" in text
    assert "| 4 | llama-server | 100 | 1.2 |" in text
    assert "| 8 | llama-server | 160 | 1.5 |" in text
    assert "0.750" in text
    assert "87.5" in text
    assert "1 of 2" in text
    assert "- long: HTTP 502" in text
    assert "Shared prefix" not in report(ROWS[:3])


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(msgspec.json.encode, ROWS)) + b"\n")
    assert read_rows(path) == ROWS
    path.write_text('{"part": "unheard"}\n')
    with pytest.raises(msgspec.ValidationError, match="unheard"):
        read_rows(path)


def test_a_line_of_the_plot_holds_medians_and_their_range() -> None:
    rows = [throughput(rep, OURS, rate) for rep, rate in enumerate((100, 130, 110))]
    (line,) = plot.lines_of(rows)
    assert (line.levels, line.medians) == ([4], [110])
    assert (line.below, line.above) == ([10], [20])


def test_the_same_figures_give_the_same_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="comes with the bench extra")
    rows = [row for row in ROWS if isinstance(row, ThroughputRow)]
    plot.draw(rows, "a model", tmp_path / "img" / "one.svg")
    plot.draw(rows, "a model", tmp_path / "two.svg")
    drawn = (tmp_path / "img" / "one.svg").read_text()
    assert drawn == (tmp_path / "two.svg").read_text()
    assert "llama-server" in drawn
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.draw([], "a model", tmp_path / "three.svg")
