"""From a models folder to the configuration of an engine: which draft, and what is said of it."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from tests.unit.tiny_gguf import write_tiny_gguf
from worker.catalog import read_catalog
from worker.gguf_header import estimate_memory, read_header
from worker.link import EngineConfig
from worker.memory_budget import MemoryBudget, NotEnoughMemory
from worker.preparing import ServingSettings, prepare

SETTINGS = ServingSettings(slots=2, context=256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_gguf(tmp_path / "big.gguf", width=2048)
    write_tiny_gguf(tmp_path / "small.gguf", width=128)
    write_tiny_gguf(tmp_path / "stranger.gguf", width=64, pre="other")
    return tmp_path


class Prepared:
    def __init__(self, config: EngineConfig, memory: int, logged: list) -> None:
        self.config = config
        self.memory = memory
        self.logged = logged

    @property
    def draft(self) -> str:
        return Path(self.config.draft).name


@pytest.fixture
def prepared(folder: Path) -> Callable:
    async def run(
        name: str = "big", settings: ServingSettings = SETTINGS, memory: int = 0
    ) -> Prepared:
        (source,) = read_catalog(folder).choose((name,))
        with structlog.testing.capture_logs() as logged:
            config, _, memory = await prepare(
                source,
                settings,
                worker="worker-1",
                budget=MemoryBudget(memory, 1),
                stopping=threading.Event(),
                tell=lambda _: None,
            )
        return Prepared(config, memory, logged)

    return run


async def test_a_draft_is_found_by_itself(prepared):
    result = await prepared()
    assert result.draft == "small.gguf"
    assert result.config.speculation == "auto"
    (line,) = result.logged
    assert (line["event"], line["draft"], line["found_by_itself"]) == (
        "draft.chosen",
        "small.gguf",
        True,
    )
    assert (await prepared("small")).draft == ""


@pytest.mark.parametrize("speculation", ["ngram", "off"])
async def test_none_is_looked_for_where_none_is_wanted(prepared, speculation: str):
    settings = ServingSettings(speculation=speculation)
    result = await prepared(settings=settings)
    assert (result.draft, result.config.speculation, result.logged) == ("", speculation, [])


@pytest.mark.parametrize(
    ("entry", "draft", "speculation"),
    [
        ('draft = "none"', "", "auto"),
        ('draft = "stranger"', "stranger.gguf", "auto"),
        ('draft = "stranger.gguf"', "stranger.gguf", "auto"),
        ('speculation = "off"', "", "off"),
    ],
)
async def test_the_entry_goes_before_what_is_found(
    folder: Path, prepared, entry: str, draft: str, speculation: str
):
    (folder / "models.toml").write_text(f'[models.x]\nfile = "big.gguf"\n{entry}\n')
    result = await prepared("x")
    assert (result.draft, result.config.speculation) == (draft, speculation)


async def test_a_broken_draft_costs_the_draft_alone(folder: Path, prepared):
    (folder / "bad.gguf").write_bytes(b"GGUF")
    (folder / "models.toml").write_text('[models.x]\nfile = "big.gguf"\ndraft = "bad.gguf"\n')
    result = await prepared("x")
    assert result.draft == ""
    assert [(line["event"], line["reason"]) for line in result.logged] == [
        ("draft.unusable", "bad.gguf: not a GGUF file")
    ]


async def test_memory_is_claimed_for_both_or_the_draft_is_left_out(folder: Path, prepared):
    big, small = (read_header(folder / f"{name}.gguf") for name in ("big", "small"))
    wish = estimate_memory(big, cells=2 * 256) * 5 // 4
    draft = estimate_memory(small, cells=2 * 256)
    result = await prepared(memory=wish + draft)
    assert (result.draft, result.config.memory_limit) == ("small.gguf", wish)
    assert result.memory == wish + draft
    tight = estimate_memory(big, cells=256)
    result = await prepared(memory=tight)
    assert (result.draft, result.config.memory_limit, result.memory) == ("", tight, tight)
    (line,) = result.logged
    assert (line["event"], line["model"], line["draft"]) == ("draft.left_out", "big", "small.gguf")
    assert "no memory" in line["reason"]
    with pytest.raises(NotEnoughMemory):
        await prepared(memory=tight - 1)


PREFIXES = 1 << 20


@pytest.mark.parametrize(
    ("asked", "beyond_wish", "wanted"),
    [
        (PREFIXES, 2 * PREFIXES, PREFIXES),
        (PREFIXES, PREFIXES // 2, PREFIXES // 2),
        (PREFIXES, 0, 0),
        (PREFIXES, -1000, 0),
        (0, 2 * PREFIXES, 0),
    ],
)
async def test_prefixes_get_what_the_model_leaves_of_its_memory(
    folder: Path, prepared, asked: int, beyond_wish: int, wanted: int
):
    settings = ServingSettings(slots=2, context=256, speculation="off", prefix_memory=asked)
    wish = estimate_memory(read_header(folder / "big.gguf"), cells=2 * 256) * 5 // 4
    config = (await prepared(settings=settings, memory=wish + beyond_wish)).config
    assert (config.prefix_memory, config.memory_limit) == (wanted, wish + min(0, beyond_wish))


async def test_a_model_may_be_batch_invariant_where_others_are_not(folder: Path, prepared):
    (folder / "models.toml").write_text(
        '[models.x]\nfile = "big.gguf"\nbatch_invariant = "on"\n[models.y]\nfile = "small.gguf"\n'
    )
    settings = ServingSettings(slots=2, context=256, batch_invariant="off")
    found = [(await prepared(name, settings)).config.batch_invariant for name in "xy"]
    assert found == ["on", "off"]


async def test_prefixes_get_all_they_wish_where_memory_is_unlimited(prepared):
    config = (await prepared()).config
    assert (config.prefix_memory, config.memory_limit) == (4 << 30, 0)


@pytest.mark.parametrize(("memory", "wanted"), [(8 << 30, 2 << 30), (64 << 30, 4 << 30)])
async def test_they_get_a_quarter_of_the_memory_if_nobody_says_otherwise(
    prepared, memory: int, wanted: int
):
    assert (await prepared(memory=memory)).config.prefix_memory == wanted


async def test_where_memory_is_unlimited_what_is_wished_for_is_set_aside(folder: Path, prepared):
    settings = ServingSettings(slots=2, context=256, speculation="off", prefix_memory=PREFIXES)
    wish = estimate_memory(read_header(folder / "big.gguf"), cells=2 * 256) * 5 // 4
    assert (await prepared(settings=settings)).memory == wish + PREFIXES


async def test_a_draft_goes_before_prefixes(folder: Path, prepared):
    write_tiny_gguf(folder / "middle.gguf", width=1024)
    (folder / "models.toml").write_text('[models.x]\nfile = "big.gguf"\ndraft = "middle.gguf"\n')
    big, middle = (read_header(folder / f"{name}.gguf") for name in ("big", "middle"))
    wish = estimate_memory(big, cells=2 * 256) * 5 // 4
    draft = estimate_memory(middle, cells=2 * 256)
    assert wish < 3 * draft  # what would be refused if prefixes were counted as the model's wish
    result = await prepared("x", memory=wish + draft + 1000)
    config = result.config
    assert (result.draft, config.memory_limit, config.prefix_memory) == ("middle.gguf", wish, 1000)
