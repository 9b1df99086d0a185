"""Flags of `mesh-worker` that become settings, without anything being started."""

from pathlib import Path
from typing import Any

import pytest

import worker.cli
from worker.agent import AgentSettings
from worker.preparing import ServingSettings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[AgentSettings]:
    """Settings that the worker would have run with."""
    taken: list[AgentSettings] = []

    async def run(settings: AgentSettings, pinned: Any, roles: Any) -> None:
        taken.append(settings)

    monkeypatch.setattr(worker.cli, "_run", run)
    return taken


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m.gguf").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "pinned", "roles"),
    [([], [], ["m"]), (["--model", "m"], ["m"], []), (["--pin-all"], ["m"], [])],
)
def test_models_are_roles_unless_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    flags: list[str],
    pinned: list[str],
    roles: list[str],
) -> None:
    taken: list[list[str]] = []

    async def run(settings: AgentSettings, *sources: Any) -> None:
        taken.extend([model.name for model in models] for models in sources)

    monkeypatch.setattr(worker.cli, "_run", run)
    assert worker.cli.main(["--models", str(folder), *flags]) == 0
    assert taken == [pinned, roles]


def test_models_are_named_in_one_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.cli.main(["--models", str(folder), "--pin-all", "--model", "m"]) == 2
    assert capsys.readouterr().err == "mesh-worker: --pin-all and --model: wanted one of them\n"


def test_the_time_without_use(asked: list[AgentSettings], folder: Path) -> None:
    assert worker.cli.main(["--models", str(folder)]) == 0
    assert worker.cli.main(["--models", str(folder), "--idle-after", "3.5"]) == 0
    assert [settings.timing.idle_after for settings in asked] == [60.0, 3.5]


@pytest.mark.parametrize("wanted", ["auto", "ngram", "off"])
def test_speculation(asked: list[AgentSettings], folder: Path, wanted: str) -> None:
    assert worker.cli.main(["--models", str(folder), "--speculation", wanted]) == 0
    assert asked[0].serving.speculation == wanted


def test_speculation_is_on_unless_told_otherwise(asked: list[AgentSettings], folder: Path) -> None:
    assert worker.cli.main(["--models", str(folder)]) == 0
    assert asked[0].serving.speculation == "auto"


@pytest.mark.parametrize("wanted", ["auto", "on", "off"])
def test_batch_invariance(asked: list[AgentSettings], folder: Path, wanted: str) -> None:
    assert worker.cli.main(["--models", str(folder), "--batch-invariant", wanted]) == 0
    assert asked[0].serving.batch_invariant == wanted
    assert ServingSettings().batch_invariant == "auto"


@pytest.mark.parametrize(
    ("flag", "wrong", "right"),
    [("--speculation", "on", ("ngram", "off")), ("--batch-invariant", "yes", ("on", "off"))],
)
def test_what_they_may_be_is_told(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    wrong: str,
    right: tuple[str, str],
) -> None:
    assert worker.cli.main(["--models", str(folder), flag, wrong]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert all(word in told for word in ("mesh-worker: ", flag, *right))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], None),
        (["--prefix-memory", "0"], 0),
        (["--prefix-memory", "64MiB"], 64 << 20),
        (["--prefix-memory", "2gb"], 2 * 10**9),
    ],
)
def test_prefix_memory(
    asked: list[AgentSettings], folder: Path, flags: list[str], wanted: int | None
) -> None:
    assert worker.cli.main(["--models", str(folder), *flags]) == 0
    assert asked[0].serving.prefix_memory == wanted
    assert asked[0].memory == 0


@pytest.mark.parametrize("flag", ["--prefix-memory", "--memory"])
@pytest.mark.parametrize("wrong", ["much", "-1", "1.5.2GiB", "512MiBs"])
def test_what_is_no_size_is_told(
    asked: list[AgentSettings],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    wrong: str,
) -> None:
    assert worker.cli.main(["--models", str(folder), f"{flag}={wrong}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"mesh-worker: {flag}: ")
    assert all(word in told for word in (repr(wrong), "512M"))
    assert not asked
