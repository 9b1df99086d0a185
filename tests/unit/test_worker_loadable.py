"""What a worker says that it could load, from files and settings alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from shared.presence import LoadableModel
from tests.unit.tiny_gguf import write_tiny_gguf
from worker.catalog import read_catalog
from worker.gguf_header import estimate_memory, read_header
from worker.hub import HubSource
from worker.loadable import survey
from worker.preparing import ServingSettings

SETTINGS = ServingSettings(slots=2, context=256, prefix_memory=1 << 40)
PLENTY = 1 << 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_gguf(tmp_path / "small.gguf", width=128)
    write_tiny_gguf(tmp_path / "big.gguf", width=2048)
    return tmp_path


@pytest.fixture
def able(folder: Path) -> Callable[..., dict[str, LoadableModel]]:
    def run(settings: ServingSettings = SETTINGS, memory: int = PLENTY) -> dict[str, LoadableModel]:
        sources = read_catalog(folder).choose(())
        models = survey(sources, settings, memory).whole
        assert [model.name for model in models] == sorted(model.name for model in models)
        return {model.name: model for model in models}

    return run


def wish(folder: Path, name: str, cells: int = 512) -> int:
    return estimate_memory(read_header(folder / f"{name}.gguf"), cells=cells) * 5 // 4


def test_memory_is_the_model_its_draft_and_a_part_for_prefixes(folder: Path, able):
    draft = estimate_memory(read_header(folder / "small.gguf"), cells=512)
    engine = wish(folder, "big") + draft
    models = able()
    assert models["big"].memory == engine + engine // 4
    assert models["small"].memory == wish(folder, "small") * 5 // 4
    without = able(ServingSettings(slots=2, context=256, prefix_memory=0, speculation="off"))
    assert without["big"].memory == wish(folder, "big")


def test_a_model_is_told_with_what_it_would_be_served_with(folder: Path, able):
    (folder / "models.toml").write_text(
        '[models."a/b:c"]\nfile = "big.gguf"\naliases = ["c"]\nslots = 3\ncontext = 100\n'
        "embeddings = false\n"
    )
    model = able()["a/b:c"]
    file = folder / "big.gguf"
    assert (model.slots, model.context, model.aliases) == (3, 100, ("c",))
    assert (model.size, model.created) == (file.stat().st_size, int(file.stat().st_mtime))
    assert not model.embeddings


def test_a_model_that_wants_more_than_there_is_takes_all_of_it(folder: Path, able):
    least = estimate_memory(read_header(folder / "big.gguf"), cells=256)
    assert able(memory=least)["big"].memory == least


def test_what_cannot_be_loaded_is_not_told(folder: Path, able):
    (folder / "broken.gguf").write_bytes(b"GGUF")
    least = estimate_memory(read_header(folder / "big.gguf"), cells=256)
    with structlog.testing.capture_logs() as logged:
        assert list(able(memory=least - 1)) == ["small"]
    assert {line["model"] for line in logged if line["event"] == "model.not_loadable"} == {
        "big",
        "broken",
    }


def test_a_file_on_the_hub_is_told_once_it_has_been_fetched(folder: Path, tmp_path: Path, able):
    (folder / "models.toml").write_text('[models.far]\nfile = "hf:o/r:m.gguf"\n')
    settings = ServingSettings(slots=2, context=256, cache=tmp_path / "cache")
    assert "far" not in able(settings)
    # The layout of huggingface_hub's cache.
    repo = tmp_path / "cache" / "models--o--r"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    write_tiny_gguf(snapshot / "m.gguf", width=128)
    assert able(settings)["far"].size == (snapshot / "m.gguf").stat().st_size
    assert read_catalog(folder).models["far"].file == HubSource("o/r", "m.gguf")
