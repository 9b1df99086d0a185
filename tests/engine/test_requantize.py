"""Writing models in other formats: the process, and `mesh models requantize` on top of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import mesh.following
from loadtests.stack import smollm2
from mesh.cli import main
from worker.engine.requantize import FILE_TYPES, RequantizeError, WrongRequest, requantize
from worker.gguf_header import GgufError, read_header

pytestmark = pytest.mark.model

Q4_0, Q8_0 = 2, 8


def test_the_whole_model_comes_out_in_the_other_format(tmp_path: Path):
    told: list[tuple[int, int]] = []
    target = tmp_path / "small.gguf"
    size = requantize(
        smollm2(), target, "q4_0", tell=lambda number, count: told.append((number, count))
    )
    before, after = read_header(smollm2()), read_header(target)
    assert size == target.stat().st_size == after.size < before.size
    assert list(after.layer_bytes) == [Q4_0]
    assert after.parameters == before.parameters
    assert (after.vocabulary, after.special_tokens) == (before.vocabulary, before.special_tokens)
    assert told == [(n, before.tensors) for n in range(1, before.tensors + 1)]
    assert os.listdir(tmp_path) == ["small.gguf"]


def test_a_short_name_stands_for_the_middle_one(tmp_path: Path):
    requantize(smollm2(), tmp_path / "m.gguf", "Q4_K")
    assert read_header(tmp_path / "m.gguf").file_type == FILE_TYPES["Q4_K_M"] == 15


def test_what_must_not_be_written_is_not(tmp_path: Path):
    source = tmp_path / "m.gguf"
    source.symlink_to(smollm2())
    (tmp_path / "there.gguf").write_text("mine")
    for target, words in (
        (tmp_path / "there.gguf", "is there already; --force replaces it"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x.gguf", "the folder .*/no is not there"),
        (smollm2(), "is the source itself"),
    ):
        with pytest.raises(WrongRequest, match=words):
            requantize(source, target, "Q8_0", force=target == smollm2())
    assert (tmp_path / "there.gguf").read_text() == "mine"
    requantize(source, tmp_path / "there.gguf", "Q8_0", force=True)
    assert list(read_header(tmp_path / "there.gguf").layer_bytes) == [Q8_0]


def test_a_target_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    long = tmp_path / ("x" * 250)
    with pytest.raises(RequantizeError, match=r": File name too long$"):
        requantize(smollm2(), long, "Q4_0")
    assert os.listdir(tmp_path) == []


def test_what_llama_cpp_cannot_take_is_said_in_its_words(tmp_path: Path):
    source = tmp_path / "odd.gguf"
    data = smollm2().read_bytes()
    source.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lxxma", 1))
    with pytest.raises(RequantizeError, match=r"^odd\.gguf: .*lxxma") as caught:
        requantize(source, tmp_path / "x.gguf", "Q4_0")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["odd.gguf"]


def test_no_model(tmp_path: Path):
    with pytest.raises(GgufError, match="No such file"):
        requantize(tmp_path / "none.gguf", tmp_path / "x.gguf", "Q4_0")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["models", "requantize", str(smollm2()), str(tmp_path / "m.gguf")]
    assert main([*command, "--type", "Q4_0"]) == 0
    told = capsys.readouterr()
    assert told.err == f"{tmp_path / 'm.gguf'}: 87.5 MiB\n"
    assert os.listdir(tmp_path) == ["m.gguf"]
    assert main([*command, "--type", "Q4_0"]) == 2
    assert main([*command, "--type", "Q4_0", "--force"]) == 0


@pytest.mark.parametrize(
    ("source", "file_type", "code", "words"),
    [
        ("m.gguf", "Q9", 2, "--type Q9: wanted one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16"),
        ("none.gguf", "Q4_0", 1, "none.gguf: No such file"),
        ("notes.txt", "Q4_0", 1, "notes.txt: not a GGUF file"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    file_type: str,
    code: int,
    words: str,
):
    (tmp_path / "notes.txt").write_text("no model")
    command = ["models", "requantize", str(tmp_path / source), str(tmp_path / "x.gguf")]
    assert main([*command, "--type", file_type]) == code
    told = capsys.readouterr().err
    assert told.startswith(f"mesh: {words}")
    assert told.count("\n") == 1
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_settings_of_other_commands_do_not_stand_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MESH_CONFIG", "")  # so that what `main` sets is undone
    config = tmp_path / "mesh.toml"
    config.write_text('nats = "nats://h:1"\n[up]\nport = 1\n[models]\nnats = "nats://h:2"\n')
    command = ["models", "requantize", str(tmp_path / "none.gguf"), str(tmp_path / "x.gguf")]
    assert main([*command, "--type", "Q4_0", "--config", str(config)]) == 1


@pytest.fixture
def _heard() -> Iterator[None]:
    """SIGINT reaches what is started: a shell's background jobs, and theirs, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
@pytest.mark.parametrize("program", ["mesh.cli", "worker.engine.requantize"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path: Path, program: str, number: signal.Signals):
    # F32 takes long enough to be interrupted: half a gigabyte is written.
    target = tmp_path / "m.gguf"
    words = ["models", "requantize"] if program == "mesh.cli" else []
    command = [sys.executable, "-m", program, *words, str(smollm2()), str(target)]
    with subprocess.Popen([*command, "--type", "F32"], stdout=subprocess.PIPE) as process:
        wait_for(lambda: partials(tmp_path))
        process.send_signal(number)
        # Read to its end, which comes when the process that writes is gone as well.
        process.communicate(timeout=60)
    assert process.returncode != 0
    wait_for(lambda: os.listdir(tmp_path) == [])


def test_killed_it_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[int] = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        process = popen(*arguments, **options)
        started.append(process.pid)
        wait_for(lambda: partials(tmp_path))
        process.kill()
        return process

    monkeypatch.setattr(mesh.following.subprocess, "Popen", start)
    command = ["models", "requantize", str(smollm2()), str(tmp_path / "m.gguf")]
    assert main([*command, "--type", "F32"]) == 1
    assert len(started) == 1
    assert os.listdir(tmp_path) == []


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".m.gguf.*.partial") if path.stat().st_size]


def wait_for(condition) -> None:
    """Until it is so; the bound only keeps a broken test from hanging."""
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)
