"""`mesh plan`: what a person gives it, and what is printed."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from mesh.cli import main
from mesh.plan import read_hosts
from shared.command_line import Refused
from shared.partition import Host

LAYERS = 6


def write_model(path: Path, *, architecture: str = "llama", layers: int = LAYERS) -> Path:
    """Layers of 4 MiB each, and an embedding of 1 MiB."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(4096)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(512)
    writer.add_vocab_size(1024)
    writer.add_tensor("token_embd.weight", np.zeros((1024, 256), dtype=np.float32))
    for layer in range(layers):
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", np.zeros((4096, 256), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(256, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_hosts(path: Path, *memories: str) -> Path:
    path.write_text(
        "".join(
            f'[[worker]]\nname = "w{number}"\nmemory = "{memory}"\nrtt_ms = {number}\n'
            for number, memory in enumerate(memories, 1)
        )
    )
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "six.gguf")


def test_a_model_that_fits_nowhere_alone_is_split(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hosts = write_hosts(tmp_path / "hosts.toml", "20MiB", "20MiB", "20MiB")
    assert main(["plan", str(model), "--workers", str(hosts), "--slots", "1"]) == 0
    shown = capsys.readouterr().out
    assert "six (llama, 6 layers, 25.0 MiB): in 2 stages" in shown
    assert "█" in shown
    assert "not w3 (20.0 MiB): 2 hosts are enough" in shown
    assert "no host holds it alone" in shown


def test_the_plan_as_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hosts = write_hosts(tmp_path / "hosts.toml", "20MiB", "20MiB")
    assert main(["plan", str(model), "--workers", str(hosts), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "pipeline"
    assert [stage["stop"] for stage in told["stages"]][-1] == LAYERS


def test_one_that_cannot_be_served_ends_with_1(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hosts = write_hosts(tmp_path / "hosts.toml", "6MiB", "6MiB")
    assert main(["plan", str(model), "--workers", str(hosts)]) == 1
    assert "cannot be served" in capsys.readouterr().out
    other = write_model(tmp_path / "other.gguf", architecture="mamba")
    hosts = write_hosts(tmp_path / "hosts.toml", "20MiB", "20MiB")
    assert main(["plan", str(other), "--workers", str(hosts)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "its architecture is 'mamba', which has not been shown to work" in shown


def test_one_that_fits_is_served_whole(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hosts = write_hosts(tmp_path / "hosts.toml", "1GiB", "20MiB", "2GiB")
    assert main(["plan", str(model), "--workers", str(hosts)]) == 0
    shown = capsys.readouterr().out
    assert "on one worker" in shown
    assert "2 hosts could have a copy" in shown


def test_the_head_of_a_split_model_has_its_draft_where_there_is_room(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    draft = str(write_model(tmp_path / "one.gguf", layers=1))

    def shown(*memories: str) -> list[str]:
        hosts = write_hosts(tmp_path / "hosts.toml", *memories)
        command = ["plan", str(model), "--draft", draft, "--workers", str(hosts), "--slots", "1"]
        assert main(command) == 0
        return capsys.readouterr().out.splitlines()

    roomy = shown("28MiB", "28MiB")
    (row,) = (line for line in roomy if " draft  " in line)
    (head,) = (line for line in roomy if "+head" in line)
    assert row.split()[0] == head.split()[0]
    assert "█" in row
    assert any("has room for the draft model" in line for line in roomy)

    tight = shown("18MiB", "18MiB")
    assert not any(" draft  " in line for line in tight)
    assert any("no room for the draft model" in line for line in tight)

    alone = shown("64MiB")
    assert any(line.startswith("w1") and " draft  " in line for line in alone)


def test_what_cannot_draft_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hosts = write_hosts(tmp_path / "hosts.toml", "20MiB", "20MiB")
    large = write_model(tmp_path / "four.gguf", layers=4)
    for draft, words in (
        (large, "four.gguf cannot draft for six.gguf: wanted"),
        (tmp_path / "none.gguf", "none.gguf"),
        ("hf:a/b:c.gguf", "on the hub"),
    ):
        assert main(["plan", str(model), "--draft", str(draft), "--workers", str(hosts)]) != 0
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1
    assert main(["plan", str(model), "--draft", str(large), "--shards"]) != 0
    assert capsys.readouterr().err.count("--draft is of no use with --shards") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing required field `worker`"),
        ("worker = []", "length >= 1"),
        ('[[worker]]\nname = "a"', "missing required field `memory`"),
        ('[[worker]]\nname = "a"\nmemory = "lots"', "memory of 'a': 'lots' is no size"),
        ('[[worker]]\nname = "a"\nmemory = 0', "memory of 'a'"),
        ('[[worker]]\nname = "a"\nmemory = "1GB"\nrtt = 3', "unknown field `rtt`"),
        ('[[worker]]\nname = "a"\nmemory = "1GB"\nrtt_ms = -1', ">= 0"),
        ('[[worker]]\nname = "a"\nmemory = "1GB"\n' * 2, "two workers have the name 'a'"),
        ("worker", "Expected '=' after a key"),
    ],
)
def test_a_file_of_workers_that_will_not_do(tmp_path: Path, text: str, words: str):
    path = tmp_path / "hosts.toml"
    path.write_text(text)
    with pytest.raises(Refused) as caught:
        read_hosts(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_what_a_file_of_workers_says(tmp_path: Path):
    path = tmp_path / "hosts.toml"
    path.write_text('[[worker]]\nname = "a"\nmemory = "1GiB"\nrtt_ms = 2.5\nspeed = 3')
    assert read_hosts(path) == [Host("a", 2**30, 0.0025, 3.0)]


def test_what_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hosts = write_hosts(tmp_path / "hosts.toml", "1GiB")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    assert main(["plan", str(broken), "--workers", str(hosts)]) != 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "broken.gguf" in told
    assert main(["plan", "hf:a/b:c.gguf", "--workers", str(hosts)]) != 0
    assert "on the hub" in capsys.readouterr().err
    assert main(["plan", str(broken), "--workers", str(tmp_path / "none.toml")]) != 0
