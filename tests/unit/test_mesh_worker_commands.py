"""`mesh worker calibrate` on top of a process that is played here."""

import json
import sys

import pytest

import mesh.worker_commands
from mesh.cli import main

REPORT = {
    "calibration": {
        "threads": 1,
        "prefill_threads": 3,
        "poll": 1000,
        "step_seconds": [[1, 0.01], [4, 0.02]],
        "prefill_row_seconds": 0.002,
        "thread_seconds": [[1, 0.01], [2, 0.0098]],
    },
    "source": "measured",
}
GOOD = f"print('progress 0.5'); print('done ' + {json.dumps(json.dumps(REPORT))})"


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


@pytest.fixture
def played(monkeypatch):
    """Put a Python script in the place of the process; returns the command lines asked for."""
    asked: list[list[str]] = []
    real = mesh.worker_commands._command

    def play(script: str) -> list[list[str]]:
        def command(*arguments, **options):
            asked.append(real(*arguments, **options))
            return [sys.executable, "-c", script]

        monkeypatch.setattr(mesh.worker_commands, "_command", command)
        return asked

    return play


def test_costs_are_shown_as_a_table(played, gguf, capsys):
    asked = played(GOOD)

    assert main(["worker", "calibrate", str(gguf), "--threads", "2", "--fresh"]) == 0

    shown = capsys.readouterr().out
    assert "threads 1 for a row alone, 3 for several; prefill 500 tokens/s" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["1", "10.00", "10.00", "100"] in rows
    assert ["4", "20.00", "5.00", "200"] in rows
    assert ["2", "9.80", "102"] in rows
    assert asked[0][1:] == [
        *("-P", "-m", "worker.engine.calibrate", "--threads", "2", "--fresh", "--", str(gguf))
    ]


def test_json_is_the_whole_report(played, gguf, capsys):
    played(GOOD)

    assert main(["worker", "calibrate", str(gguf), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == REPORT


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.exit('x\\ntiny.gguf: not a model')", "mesh: tiny.gguf: not a model\n"),
        ("import os; os._exit(3)", "mesh: the calibration ended with exit code 3\n"),
        ("print('progress 1')", "mesh: the calibration ended with exit code 0\n"),
    ],
)
def test_a_failure_is_one_line(played, gguf, capsys, script, words):
    played(script)

    assert main(["worker", "calibrate", str(gguf)]) == 1
    assert capsys.readouterr() == ("", words)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no-such-file.gguf"], 1, "does not exist"),
        (["hf:owner/repo:file.gguf"], 1, "only a file of this host"),
        (["tiny.gguf", "--threads", "0"], 2, "threads"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(gguf, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(gguf.parent)

    assert main(["worker", "calibrate", *arguments]) == code
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.count("\n") == 1
    assert words in errors
