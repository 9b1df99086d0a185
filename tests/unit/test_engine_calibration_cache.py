"""Kept calibrations: found again, never those of something else, never in the way."""

import os
import time
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from worker.cache_folder import cache_folder
from worker.engine.calibration import Asked, nominal
from worker.engine.calibration_cache import (
    CacheKey,
    cache_key,
    load,
    store,
    switched_off,
)

ASKED = Asked(cores=4)
FOUND = nominal(ASKED, 1000)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path


def key_of(model: Path, asked: Asked = ASKED) -> CacheKey:
    return cache_key(model, asked, gpu_layers=0, step_tokens=512, poll=1000, batch_invariant=False)


def test_what_is_stored_is_found_again(model, tmp_path):
    folder = tmp_path / "not yet" / "there"
    assert load(key_of(model), folder) is None
    store(key_of(model), FOUND, folder)

    assert load(key_of(model), folder) == FOUND
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_one_that_was_disturbed_is_of_use_for_minutes_and_only_where_it_will_do(model, tmp_path):
    key, better = key_of(model), msgspec.structs.replace(FOUND, threads=7)
    store(key, FOUND, tmp_path, disturbed=True)
    assert load(key, tmp_path) is None
    assert load(key, tmp_path, disturbed_within=60.0) == FOUND

    (kept,) = tmp_path.glob("*.disturbed.json")
    os.utime(kept, (time.time() - 61, time.time() - 61))
    assert load(key, tmp_path, disturbed_within=60.0) is None
    assert load(key, tmp_path, disturbed_within=90.0) == FOUND

    store(key, better, tmp_path)
    assert load(key, tmp_path, disturbed_within=90.0) == better


def test_another_file_or_wish_is_another_calibration(model, tmp_path):
    key = key_of(model)
    store(key, FOUND, tmp_path)
    assert load(key_of(model, Asked(cores=4, threads=2)), tmp_path) is None
    assert load(msgspec.structs.replace(key, cpu="another"), tmp_path) is None
    assert load(msgspec.structs.replace(key, batch_invariant=True), tmp_path) is None

    os.utime(model, ns=(1, 1))
    assert load(key_of(model), tmp_path) is None
    model.write_bytes(b"GGUF and more")
    assert load(key_of(model), tmp_path) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"threads": 3', b'"threads": 0'),
        lambda data: data.replace(b"tiny.gguf", b"other.gguf"),
        lambda data: b"\xff\xfe",
    ],
)
def test_a_spoilt_file_is_told_in_one_line_and_measured_anew(model, tmp_path, spoil):
    store(key_of(model), FOUND, tmp_path)
    (path,) = tmp_path.glob("*.json")
    before = path.read_bytes()
    path.write_bytes(spoil(before))
    assert path.read_bytes() != before

    with capture_logs() as lines:
        assert load(key_of(model), tmp_path) is None
    assert [line["event"] for line in lines] == ["calibration.unreadable"]
    assert lines[0]["path"] == str(path)

    store(key_of(model), FOUND, tmp_path)
    assert load(key_of(model), tmp_path) == FOUND


def test_a_folder_that_cannot_be_made_is_told_and_no_failure(model, tmp_path):
    (tmp_path / "file").write_text("in the way")

    with capture_logs() as lines:
        store(key_of(model), FOUND, tmp_path / "file" / "calibration")
        assert load(key_of(model), tmp_path / "file" / "calibration") is None
    assert lines[0]["event"] == "calibration.not_kept"


def test_the_folder_is_the_users_cache_unless_another_is_named(monkeypatch):
    monkeypatch.delenv("MESH_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/mesh")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/mesh")
    monkeypatch.setenv("MESH_CACHE_DIR", "/mine")
    assert cache_folder() == Path("/mine")


@pytest.mark.parametrize(
    ("value", "off"), [("off", True), ("OFF", True), ("on", False), ("", False)]
)
def test_measurements_can_be_switched_off(monkeypatch, value, off):
    monkeypatch.setenv("MESH_CALIBRATE", value)
    assert switched_off() is off
