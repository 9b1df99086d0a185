import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import CommandError
from mesh.models import DEFAULT_MODEL, ModelFile, models_toml, resolve

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny.Q4_0.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def test_without_a_wish_the_default_model_is_found_in_its_package(tmp_path: Path) -> None:
    (model,) = resolve((), tmp_path)
    assert model.name == DEFAULT_MODEL
    assert Path(model.file).is_absolute()
    assert Path(model.file).read_bytes()[:4] == b"GGUF"
    assert resolve([DEFAULT_MODEL.lower()], tmp_path) == (model,)


def test_a_path_is_known_by_its_file_name(gguf: Path, tmp_path: Path) -> None:
    assert resolve([str(gguf)], tmp_path) == (ModelFile("Tiny.Q4_0", str(gguf)),)


def test_a_relative_path_becomes_absolute(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(gguf.parent)
    assert resolve([gguf.name], tmp_path / "none") == (ModelFile("Tiny.Q4_0", str(gguf)),)


def test_a_name_is_looked_for_in_the_folder(gguf: Path) -> None:
    assert resolve(["Tiny.Q4_0"], gguf.parent) == (ModelFile("Tiny.Q4_0", str(gguf)),)


def test_the_first_part_stands_for_a_split_model(tmp_path: Path) -> None:
    path = tmp_path / "big-00001-of-00003.gguf"
    path.write_bytes(b"GGUF")
    assert resolve([str(path)], tmp_path)[0].name == "big"


def test_hub_files_are_left_to_the_worker(tmp_path: Path) -> None:
    wish = "hf:owner/repo:folder/Some.Q4_K.gguf@main"
    assert resolve([wish], tmp_path) == (ModelFile("Some.Q4_K", wish),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "does not exist"), (b"", "not a GGUF"), (b"PK\x03\x04", "not a GGUF")],
)
def test_a_bad_file_is_named_with_the_reason(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError, match=reason) as caught:
        resolve([str(path)], tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="cannot be read"):
        resolve([f"{tmp_path}/"], tmp_path)


def test_an_unknown_name_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"gpt-9.*no such file") as caught:
        resolve(["gpt-9"], tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert DEFAULT_MODEL in str(caught.value)


def test_two_models_of_one_name_are_refused(gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / gguf.name).write_bytes(b"GGUF")
    with pytest.raises(CommandError, match=r"two models have the name 'Tiny\.Q4_0'"):
        resolve([str(gguf), str(other / gguf.name)], tmp_path)


@given(st.dictionaries(texts, texts, max_size=5))
def test_models_toml_reads_back_as_written(files: dict[str, str]) -> None:
    text = models_toml([ModelFile(name, file) for name, file in files.items()])
    entries = tomllib.loads(text).get("models", {})
    assert entries == {name: {"file": file} for name, file in files.items()}
