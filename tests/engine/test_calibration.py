"""Calibration of the real model: kept, found again, apart when disturbed; and the process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import llama_cpp.llama_cpp as ll
import pytest

import worker.engine.calibrate
from loadtests.stack import smollm2
from worker.engine.calibrate import asked_of, calibrated
from worker.engine.llama import Context, Model, silence
from worker.engine.stepper import ContextStepper, run_queue_seconds, spin_rounds
from worker.link import EngineConfig

pytestmark = pytest.mark.model

PATH = str(smollm2())
CONFIG = EngineConfig(path=PATH, model="small", worker="test", step_tokens=64)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    silence()
    loaded = Model(PATH)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def context(model: Model) -> Iterator[Context]:
    made = Context(model, slots=2, context=512, step_tokens=64, threads=1, prefill_threads=1)
    yield made
    made.close()


def test_threads_are_set_apart_for_one_row_and_several(context):
    context.set_threads(3, 2)
    assert (ll.llama_n_threads(context.handle), ll.llama_n_threads_batch(context.handle)) == (3, 2)


def test_a_step_leaves_nothing_behind_and_a_prefill_does(context, model):
    stepper = ContextStepper(context, 64, model.vocab_size)
    assert stepper.prefill(20) > 0
    for rows in (1, 8, 64):
        assert stepper.step(rows) > 0
        assert ll.llama_memory_seq_pos_max(ll.llama_get_memory(context.handle), 0) == 19
    stepper.close()
    assert ll.llama_memory_seq_pos_max(ll.llama_get_memory(context.handle), 0) == -1


def test_where_the_cache_is_full_it_begins_anew(context, model):
    stepper = ContextStepper(context, 64, model.vocab_size)
    for _ in range(8):
        stepper.prefill(64)
    stepper.step(2)
    assert ll.llama_memory_seq_pos_max(ll.llama_get_memory(context.handle), 0) == -1
    stepper.close()


def test_a_calibration_is_measured_once_and_kept(context, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MESH_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MESH_CALIBRATE", raising=False)
    monkeypatch.setattr(worker.engine.calibrate, "run_queue_seconds", lambda: 0.0)
    told: list[float] = []

    first = calibrated(model, context, CONFIG, tell=told.append)
    assert first.source == "measured"
    assert told[-1] == 1.0
    limit = asked_of(CONFIG).limit
    assert 1 <= first.calibration.threads <= limit
    assert 1 <= first.calibration.prefill_threads <= limit
    assert first.calibration.step_seconds[0][0] == 1
    assert len(list(tmp_path.rglob("*.json"))) == 1

    again = calibrated(model, context, CONFIG)
    assert again.source == "cached"
    assert again.calibration == first.calibration


def test_what_others_disturbed_is_kept_for_those_who_start_anew_alone(
    context, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("MESH_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MESH_CALIBRATE", raising=False)
    waited = count(0, 100)
    monkeypatch.setattr(worker.engine.calibrate, "run_queue_seconds", lambda: next(waited))

    report = calibrated(model, context, CONFIG, fresh=True)

    assert report.source == "disturbed"
    assert report.calibration.seconds(1) > 0
    anew = calibrated(model, context, CONFIG, disturbed_within=60.0)
    assert (anew.source, anew.calibration) == ("cached", report.calibration)
    assert calibrated(model, context, CONFIG).source == "disturbed"


def test_waiting_for_a_core_is_counted_and_never_taken_back():
    before = run_queue_seconds()
    assert 0 <= before <= run_queue_seconds()


@pytest.mark.parametrize(("value", "rounds"), [("250", 250), ("", -1), ("INFINITY", -1)])
def test_spinning_is_what_the_environment_says(monkeypatch, value, rounds):
    monkeypatch.setenv("GOMP_SPINCOUNT", value)
    assert spin_rounds() == rounds


def calibrate(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MESH_", "GOMP_", "OMP_"))}
    return subprocess.run(
        [sys.executable, "-m", "worker.engine.calibrate", *arguments],
        capture_output=True,
        text=True,
        env=kept | settings,
        timeout=100,
    )


def test_switched_off_the_process_answers_without_measuring(tmp_path: Path):
    done = calibrate(PATH, "--threads", "2", MESH_CALIBRATE="off", MESH_CACHE_DIR=str(tmp_path))

    assert done.returncode == 0, done.stderr
    *progress, last = done.stdout.splitlines()
    assert progress
    assert all(line.startswith("progress 0.") for line in progress)
    report = json.loads(last.removeprefix("done "))
    assert report["source"] == "nominal"
    assert report["calibration"]["threads"] == 2
    assert report["calibration"]["poll"] == 1000
    assert list(tmp_path.rglob("*")) == []


def test_what_is_no_model_is_one_line(tmp_path: Path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    done = calibrate(str(path), MESH_CACHE_DIR=str(tmp_path))

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{path}: ")
