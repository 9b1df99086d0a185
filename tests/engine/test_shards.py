"""Perplexity, gate mass and shards of tiny models and the real one."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tiny_models import EXPERTS, TINY, VOCABULARY, write_tiny

from loadtests.stack import smollm2
from mesh.cli import main
from worker.engine.batch import Batch
from worker.engine.llama import Context, Model, silence
from worker.engine.text_score import ScoreError, score
from worker.gguf_file import GgufError, read_files
from worker.model_bytes import FileBytes
from worker.shard_cut import SHARDED, cut_shard
from worker.shards import build
from worker.stage_cut import ends_at

pytestmark = pytest.mark.model

MIXTURES = [name for name, tiny in TINY.items() if tiny.moe]
CONTEXT = 64


@pytest.fixture(autouse=True, scope="module")
def _backend() -> None:
    silence()


@pytest.fixture
def owner() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def loaded(path: Path, owner: ExitStack) -> Model:
    model = Model(str(path))
    owner.callback(model.close)
    return model


def tokens(count: int = 5 * CONTEXT) -> list[int]:
    return np.random.default_rng(4).integers(0, VOCABULARY, count).tolist()


def all_logits(model: Model, wanted: list[int]) -> np.ndarray:
    context = Context(
        model, slots=1, context=CONTEXT, step_tokens=CONTEXT, threads=1, prefill_threads=1
    )
    batch = Batch(CONTEXT)
    batch.fill(0, 0, wanted, 0)
    batch.output[: len(wanted)] = 1
    assert context.decode(batch, len(wanted)) == 0
    logits = context.logits(len(wanted)).copy()
    context.close()
    return logits


def test_perplexity_is_what_its_formula_says(tmp_path: Path, owner: ExitStack):
    model = loaded(write_tiny(tmp_path / "m.gguf", TINY["llama"]), owner)
    text = tokens()
    found = score(model, text, context=CONTEXT, most=3, threads=1)
    losses: list[float] = []
    for start in range(0, 3 * CONTEXT, CONTEXT):
        piece = text[start : start + CONTEXT]
        logits = all_logits(model, piece).astype(np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        counted = range(CONTEXT // 2, CONTEXT - 1)
        losses += [-np.log(chances[at, piece[at + 1]]) for at in counted]
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert (found.counted, found.tokens) == (len(losses), 3 * CONTEXT)
    assert found.masses == ()


def test_a_text_that_is_too_short_is_refused(tmp_path: Path, owner: ExitStack):
    model = loaded(write_tiny(tmp_path / "m.gguf", TINY["llama"]), owner)
    with pytest.raises(ScoreError, match="wanted at least 128"):
        score(model, tokens(100), context=CONTEXT, most=0, threads=1)
    with pytest.raises(ScoreError, match="even number"):
        score(model, tokens(), context=63, most=0, threads=1)


@pytest.mark.parametrize("name", MIXTURES)
def test_gate_mass_is_of_all_layers_and_experts(name: str, tmp_path: Path, owner: ExitStack):
    model = loaded(write_tiny(tmp_path / "m.gguf", TINY[name]), owner)
    masses = score(model, tokens(), context=CONTEXT, most=0, threads=1).masses
    assert len(masses) == TINY[name].layers
    assert all(len(layer) == EXPERTS for layer in masses)
    assert [sum(layer) for layer in masses] == pytest.approx([1.0] * len(masses))
    assert len({round(mass, 6) for layer in masses for mass in layer}) > EXPERTS


@pytest.mark.parametrize("name", MIXTURES)
def test_of_experts_that_are_alike_every_shard_is_the_whole(
    name: str, tmp_path: Path, owner: ExitStack
):
    """Which experts answer changes nothing then, but shows that all else of a shard is right."""
    path = write_tiny(tmp_path / "m.gguf", TINY[name], alike=True)
    whole = all_logits(loaded(path, owner), tokens(CONTEXT))
    analysis = write_analysis(path, tmp_path)
    made = build(
        path, analysis, tmp_path / "out", shards=2, core=1, overlap=0, tell=lambda *_: None
    )
    assert len(made) == 2
    for one in made:
        (header,) = read_files(Path(one.path))
        architecture = header.values["general.architecture"]
        assert header.values[f"{architecture}.expert_count"] == 3
        logits = all_logits(loaded(Path(one.path), owner), tokens(CONTEXT))
        assert float(np.abs(logits - whole).max()) < 1e-4


def write_analysis(path: Path, folder: Path) -> Path:
    layers = 6
    draw = np.random.default_rng(2)
    masses = draw.random((layers, EXPERTS))
    target = folder / "experts.json"
    target.write_text(
        json.dumps(
            {
                "model": "m",
                "size": path.stat().st_size,
                "text": "t",
                "context": CONTEXT,
                "tokens": 1,
                "counted": 1,
                "perplexity": 1.0,
                "error": 0.1,
                "masses": (masses / masses.sum(axis=1, keepdims=True)).tolist(),
            }
        )
    )
    return target


def test_a_shard_has_its_experts_and_no_others(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf", TINY["mixtral"])
    kept = [(0, 2), (1, 3), (0, 1), (2, 3), (0, 3), (1, 2)]
    source = FileBytes(path)
    parts = source.headers()
    plan = cut_shard(parts, source.values(ends_at(parts[0])), kept)
    whole = {tensor.name: tensor for tensor in parts[0].tensors}
    data = path.read_bytes()
    place = {piece.target: piece for piece in plan.pieces}
    assert len(place) == len(plan.pieces)
    up = whole["blk.1.ffn_up_exps.weight"]
    each = up.size // EXPERTS
    wanted = b"".join(data[up.offset + e * each : up.offset + (e + 1) * each] for e in kept[1])
    written = b"".join(
        data[piece.offset : piece.offset + piece.size] if piece.part >= 0 else bytes(piece.size)
        for piece in plan.pieces
    )
    assert wanted in written


def test_another_ranking_core_or_overlap_is_another_file(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf", TINY["mixtral"])
    analysis = write_analysis(path, tmp_path)

    def files(**changes: int) -> set[str]:
        asked = {"shards": 2, "core": 0, "overlap": 0} | changes
        made = build(path, analysis, tmp_path / "out", **asked, tell=lambda *_: None)
        return {one.path for one in made}

    first = files()
    assert files() == first
    assert files(core=1).isdisjoint(first)
    assert files(overlap=1).isdisjoint(first)
    found = json.loads(analysis.read_text())
    found["masses"] = [layer[::-1] for layer in found["masses"]]
    analysis.write_text(json.dumps(found))
    assert files() != first


def test_what_cannot_be_cut_is_named(tmp_path: Path):
    for name, words in (("llama", "it has no experts"), ("gemma2", "'gemma2' have not been")):
        source = FileBytes(write_tiny(tmp_path / f"{name}.gguf", TINY[name]))
        parts = source.headers()
        with pytest.raises(GgufError, match=words):
            cut_shard(parts, source.values(ends_at(parts[0])), [(0,)] * 6)
    assert {TINY[name].architecture for name in MIXTURES} == SHARDED


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "sea.txt"
    text.write_text("The sea is wide and deep, and ships cross it from harbour to harbour. " * 40)
    asked = ["shard", "analyze", str(smollm2()), "--text", str(text), "--ctx", "64"]
    assert main([*asked, "--pieces", "3", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "it has no experts" in shown

    path = write_tiny(tmp_path / "m.gguf", TINY["mixtral"])
    analysis = write_analysis(path, tmp_path)
    cutting = ["shard", "build", str(path), str(analysis), "--shards", "2"]
    assert main([*cutting, "--core", "1", "--floor", "0.4"]) == 0
    assert "1/2" in capsys.readouterr().out
    assert len(list(tmp_path.glob("m.shard-*.gguf"))) == 2
    assert main([*cutting, "--floor", "0.99"]) == 2
    assert "less than --floor 0.99" in capsys.readouterr().err
    assert main([*cutting, "--core", "4"]) == 2
    assert "core: 4" in capsys.readouterr().err
    assert main([*cutting[:3], str(text), "--shards", "2"]) == 2
    assert "no analysis" in capsys.readouterr().err
