"""`mesh verify` against endpoints that do everything right, or one thing wrong."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_endpoint import SmallEndpoint, running

from mesh.cli import main
from mesh.errors import CommandError
from mesh.verify.events import EventReader
from mesh.verify.finding import Fault
from mesh.verify.report import Report, Row
from mesh.verify.run import Wanted, all_checks, chosen, verify
from shared.command_line import Refused

NEVER = ("failover",)


async def report(endpoint: SmallEndpoint, *only: str, **settings: object) -> Report:
    async with running(endpoint) as url:
        wanted = Wanted(url, **({"timeout": 10.0, "burst": 8} | settings))
        return await verify(wanted, chosen(all_checks(wanted), only, () if only else NEVER))


def ended(found: Report, outcome: str) -> list[str]:
    return [row.name for row in found.checks if row.outcome == outcome]


@pytest.mark.parametrize("mesh", [False, True])
async def test_an_endpoint_that_does_everything_right_passes(mesh: bool) -> None:
    endpoint = SmallEndpoint(mesh=mesh)
    found = await report(endpoint)
    assert ended(found, "pass") == [row.name for row in found.checks], found
    assert len(found.checks) > 20
    assert found.model == "small"
    assert endpoint.in_flight == 0
    details = {row.name: row.detail for row in found.checks}
    assert details["overload.burst"] == "8 answered"
    assert ("given up" in details["cancel.stream"]) is mesh


async def test_who_is_told_when_to_come_again_is_no_failure() -> None:
    found = await report(SmallEndpoint(room=3, crowd=8), "overload")
    assert ended(found, "pass") == ["overload.burst", "overload.after"]
    assert found.checks[0].detail == "3 answered, 5 told to wait (429)"


@pytest.mark.parametrize(
    ("fault", "check", "reason"),
    [
        ("no [DONE]", "streaming.framing", "without [DONE]"),
        ("goes on after [DONE]", "streaming.framing", "goes on after [DONE]"),
        ("breaks off", "streaming.framing", "broke after"),
        ("breaks with an error", "streaming.framing", "ended with an error: the worker was lost"),
        ("one newline", "streaming.framing", "without an empty line"),
        ("text/plain", "streaming.framing", "content-type is 'text/plain'"),
        ("no role", "streaming.role", "roles: none"),
        ("role in every chunk", "streaming.role", "'assistant' in chunk 1"),
        ("no finish_reason", "streaming.finish", "0 chunks have a finish_reason"),
        ("no usage", "streaming.usage", "has no usage"),
        ("usage does not add up", "streaming.usage", "5 + 24 tokens are told as 30"),
        ("text is cut", "streaming.text", "from character"),
        ("text is cut", "streaming.completions", "from character"),
        ("role is robot", "conformance.chat", "robot"),
        ("no usage", "conformance.chat", "missing required field `usage`"),
        ("usage does not add up", "conformance.usage", "5 + 1 tokens are told as 7"),
        ("takes any temperature", "conformance.bad-value", "answered 200, not 400"),
        ("takes any temperature", "conformance.bad-stream", "answered 200, not 400"),
        ("no param", "conformance.missing-field", "param None, not 'messages'"),
        ("wrong error object", "conformance.unknown-model", "missing required field `error`"),
        ("every refusal is a 500", "conformance.not-json", "answered 500, not 400"),
        ("every refusal is a 500", "conformance.unknown-path", "answered 500, not 404"),
        ("hangs", "conformance.chat", "was not answered within 0.5 s"),
        ("hangs", "streaming.framing", "did not end within 0.5 s"),
        ("hangs", "overload.burst", "8 of 8 ended badly"),
        ("hangs after a client left", "cancel.stream", "was not answered within 0.5 s"),
    ],
)
async def test_what_is_wrong_fails_its_check(fault: str, check: str, reason: str) -> None:
    (row,) = (await report(SmallEndpoint(fault), check, timeout=0.5)).checks
    assert row.outcome == "fail"
    assert reason in row.detail


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500 when full", "5 of 8 ended badly; 5 of them: POST /chat/completions answered 500"),
        ("no Retry-After", "answered 429 without Retry-After"),
        ("wrong error object", "missing required field `error`"),
    ],
)
async def test_a_burst_must_end_well(fault: str, reason: str) -> None:
    (row,) = (await report(SmallEndpoint(fault, room=3, crowd=8), "overload.burst")).checks
    assert row.outcome == "fail"
    assert reason in row.detail


async def test_a_slot_that_is_not_freed_is_seen_in_the_metrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mesh.verify.cancel._FREE_WITHIN", 0.5)
    (row,) = (await report(SmallEndpoint("slot not freed", mesh=True), "cancel.stream")).checks
    assert row.outcome == "fail"
    assert "/metrics: 1 in flight 0.5 s after the client left, 0 before" in row.detail


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process that may be ended."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("check", "outcome", "reason"),
    [
        ("failover.drain", "pass", "8 of 8 whole, 8 with the same text"),
        ("failover.kill", "skipped", "none tells that it was on this process"),
    ],
)
async def test_a_process_is_ended_in_the_middle_of_streams(
    victim: subprocess.Popen[bytes], check: str, outcome: str, reason: str
) -> None:
    number = "drain_pid" if check == "failover.drain" else "kill_pid"
    found = await report(SmallEndpoint(), check, **{number: victim.pid})
    (row,) = found.checks
    assert (row.outcome, reason in row.detail) == (outcome, True), row
    wanted = signal.SIGTERM if check == "failover.drain" else signal.SIGKILL
    assert victim.wait(10) == -wanted


class Failing(SmallEndpoint):
    """Its streams go wrong after the two undisturbed rounds of eight."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self._later = fault
        self._streams = 0

    def _events(self, text: bool, words: list[str], with_usage: bool) -> list[str]:
        self._streams += 1
        if self._streams > 16:
            self.fault = self._later
        return super()._events(text, words, with_usage)


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        ("breaks with an error", "pass", "8 ended with an error event"),
        ("no [DONE]", "fail", "without [DONE]"),
        ("breaks off", "fail", "broke after"),
        ("text is cut", "fail", "8 of 8 streams say something else"),
    ],
)
async def test_streams_whose_process_is_killed(
    victim: subprocess.Popen[bytes], fault: str, outcome: str, reason: str
) -> None:
    found = await report(Failing(fault), "failover.kill", kill_pid=victim.pid)
    (row,) = found.checks
    assert row.outcome == outcome, row
    assert reason in row.detail


async def test_failover_is_skipped_unless_a_process_is_named() -> None:
    found = await report(SmallEndpoint(), "failover")
    assert ended(found, "skipped") == ["failover.drain", "failover.kill"]
    assert "--kill-pid" in found.checks[1].detail


async def test_an_endpoint_that_lists_no_model_needs_one_named() -> None:
    class Empty(SmallEndpoint):
        def _card(self) -> dict[str, object]:
            return {"name": "small"}

    with pytest.raises(CommandError, match="--model"):
        await report(Empty(), "conformance")


def test_checks_are_chosen_by_name_and_by_group() -> None:
    checks = all_checks(Wanted("http://h/v1"))
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    some = chosen(checks, ("streaming", "cancel.whole"), ("streaming.role",))
    assert {check.group for check in some} == {"streaming", "cancel"}
    assert "streaming.role" not in {check.name for check in some}
    assert chosen(checks, (), ()) == checks
    with pytest.raises(Refused, match=r"'streams' is no check.*conformance, streaming"):
        chosen(checks, ("streams",), ())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["127.0.0.1:9337"], "wanted http://HOST:PORT/v1"),
        (["http://127.0.0.1:99999/v1"], "not a URL"),
        (["http://127.0.0.1:9/v1", "--only", "speed"], "'speed' is no check"),
        (["http://127.0.0.1:9/v1", "--only", "cancel", "--skip", "cancel"], "no check to run"),
        (["http://127.0.0.1:9/v1", "--timeout", "0"], "--timeout"),
        (["http://127.0.0.1:9/v1", "--kill-pid", "4000000"], "--kill-pid 4000000: no such process"),
        (["http://127.0.0.1:9/v1", "--drain-pid", str(os.getpid())], "mesh verify itself"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("mesh: ")
    assert told.count("\n") == 1
    assert reason in told


@pytest.mark.parametrize("path", ["/v1", "/v1/", "", "/"])
def test_nobody_there_is_one_line_and_1(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    # An address without a path is the base URL's.
    assert main(["verify", f"http://127.0.0.1:9{path}"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert "http://127.0.0.1:9/v1: GET /models: " in told.err


@pytest.mark.parametrize(("outcome", "code"), [("pass", 0), ("fail", 1), ("skipped", 0)])
def test_the_report_and_the_exit_code(
    outcome: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = Row("cancel.whole", "so is an answer", outcome, 0.25, "the reason")  # type: ignore[arg-type]

    async def found(*_: object) -> Report:
        return Report("http://h/v1", "small", (row,))

    monkeypatch.setattr("mesh.verify.run.verify", found)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["verify", "http://h/v1"]) == code
    table = capsys.readouterr().out
    for word in ("cancel.whole", outcome, "0.25", "so is an answer: the reason", "with small"):
        assert word in table
    assert main(["verify", "http://h/v1", "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["checks"][0]["outcome"] == outcome
    assert printed["checks"][0]["detail"] == "the reason"


@given(
    st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]))),
    st.lists(st.integers(0, 200)),
)
def test_events_are_the_same_however_the_bytes_are_cut(texts: list[str], cuts: list[int]) -> None:
    stream = "".join(f": ping\n\ndata: {text}\r\n\r\n" for text in texts).encode()
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = EventReader()
    found = [
        data for start, end in itertools.pairwise(places) for data in reader.feed(stream[start:end])
    ]
    reader.end()
    assert found == texts


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"data: a\n", "in the middle of an event"),
        (b"data: a", "in the middle of an event"),
        (b"hello\n\n", "no field of an event"),
        (b'{"error": 1}\n\n', "no field of an event"),
        (b"data: \xff\n\n", "not UTF-8"),
    ],
)
def test_what_is_no_stream_of_events_is_a_fault(stream: bytes, reason: str) -> None:
    def read() -> None:
        reader = EventReader()
        reader.feed(stream)
        reader.end()

    with pytest.raises(Fault, match=reason):
        read()
