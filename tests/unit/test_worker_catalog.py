"""What a models folder holds, and what is said when `models.toml` is wrong."""

from pathlib import Path

import pytest

from worker.catalog import CatalogError, read_catalog
from worker.hub import HubSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.gguf", "b.Q4_0.gguf", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def declare(folder: Path, text: str) -> None:
    (folder / "models.toml").write_text(text)


def test_files_are_known_by_their_names(folder: Path):
    assert list(read_catalog(folder).models) == ["a", "b.Q4_0"]


def test_only_the_first_part_of_a_split_model_is_shown(folder: Path):
    for number in (1, 2, 3):
        (folder / f"big-{number:05d}-of-00003.gguf").touch()
    models = read_catalog(folder).models
    assert list(models) == ["a", "b.Q4_0", "big"]
    assert models["big"].file == folder / "big-00001-of-00003.gguf"


def test_a_name_of_one_s_own_replaces_the_file_s(folder: Path):
    (folder / "t.jinja").write_text("{{ x }}")
    declare(
        folder,
        '[models."org/a:q4"]\nfile = "a.gguf"\naliases = ["small"]\ncontext = 64\nslots = 2\n'
        'chat_template_file = "t.jinja"\n[models.far]\nfile = "hf:o/r:sub/x.gguf"\n',
    )
    catalog = read_catalog(folder)
    assert list(catalog.models) == ["org/a:q4", "far", "b.Q4_0"]
    model = catalog.models["org/a:q4"]
    assert model.names == ("org/a:q4", "small")
    assert (model.options.context, model.options.slots) == (64, 2)
    assert model.options.chat_template == "{{ x }}"
    assert catalog.models["far"].file == HubSource("o/r", "sub/x.gguf")


def test_choosing(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    declare(folder, '[models.x]\nfile = "a.gguf"\naliases = ["y"]\n')
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "c.gguf"
    elsewhere.touch()
    catalog = read_catalog(folder)
    assert [m.name for m in catalog.choose(())] == ["x", "b.Q4_0"]
    for wanted in ("x", "y", "a.gguf", str(folder / "a.gguf")):
        assert [m.name for m in catalog.choose((wanted,))] == ["x"]
    assert [m.name for m in catalog.choose(("x", "y"))] == ["x"]
    assert catalog.choose((str(elsewhere),))[0].file == elsewhere
    assert catalog.choose(("hf:o/r:m.Q4.gguf",))[0].name == "m.Q4"
    with pytest.raises(CatalogError, match=r"no model 'z' in .*; there is: x, b\.Q4_0$"):
        catalog.choose(("z",))
    with pytest.raises(CatalogError, match=r"wanted hf:owner/repo:file\.gguf"):
        catalog.choose(("hf:o/r",))


def test_a_draft_is_a_model_a_file_or_none(folder: Path):
    (folder / "drafts").mkdir()
    (folder / "drafts" / "d.gguf").touch()
    declare(
        folder,
        '[models.x]\nfile = "a.gguf"\ndraft = "y2"\n'
        '[models.y]\nfile = "hf:o/r:y.gguf"\naliases = ["y2"]\ndraft = "drafts/d.gguf"\n'
        '[models.z]\nfile = "hf:o/r:z.gguf"\ndraft = "none"\nspeculation = "ngram"\n'
        'batch_invariant = "on"\n',
    )
    chosen = {model.name: model for model in read_catalog(folder).choose(())}
    assert chosen["x"].draft == HubSource("o/r", "y.gguf")
    assert chosen["y"].draft == folder / "drafts/d.gguf"
    assert chosen["z"].draft is None
    assert chosen["z"].options.speculation == "ngram"
    assert [chosen[name].options.batch_invariant for name in "xz"] == [None, "on"]
    assert [chosen[name].candidates for name in "xyz"] == [(), (), ()]


def test_a_draft_is_looked_for_in_the_folder_and_beside_the_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("c.gguf", "d.gguf", "e-00001-of-00002.gguf", "e-00002-of-00002.gguf"):
        (elsewhere / name).touch()
    declare(folder, '[models.x]\nfile = "a.gguf"\n[models.far]\nfile = "hf:o/r:x.gguf"\n')
    catalog = read_catalog(folder)

    def found(text: str) -> list[str]:
        (model,) = catalog.choose((text,))
        return sorted(path.name for path in model.candidates)

    assert found("x") == ["b.Q4_0.gguf"]
    assert found("b.Q4_0") == ["a.gguf"]
    assert found("far") == ["a.gguf", "b.Q4_0.gguf"]
    first = "e-00001-of-00002.gguf"
    assert found(str(elsewhere / "c.gguf")) == ["a.gguf", "b.Q4_0.gguf", "d.gguf", first]
    assert len(catalog.choose(())[0].candidates) == 1


def test_two_models_of_one_name_are_refused(folder: Path):
    declare(folder, '[models.x]\nfile = "a.gguf"\naliases = ["b.Q4_0"]\n')
    with pytest.raises(CatalogError, match=r"'b\.Q4_0' is given to two models"):
        read_catalog(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models.x]\nfile = 3", r'models\."x"\.file: Expected `str`, got `int`'),
        ("[models.x]\nslots = 2", r'models\."x": .*missing required field `file`'),
        ('[models.x]\nfile = "a"\nslots = 0', r'models\."x"\.slots: Expected `int` >= 1'),
        ('[models.x]\nfile = "a"\nslotz = 1', r'models\."x": .*unknown field `slotz`'),
        ('[models.x]\nfile = "hf:nonsense"', r'models\."x"\.file: .*wanted hf:owner/repo'),
        ('[models.x]\nfile = "a"\naliases = [""]', r'models\."x"\.aliases: '),
        ('[models.x]\nfile = "a"\naliases = ["x"]', "'x' is given to two models"),
        (
            '[models.x]\nfile = "a"\nchat_template_file = "none"',
            r'models\."x"\.chat_template_file: none: No such file',
        ),
        (
            '[models.x]\nfile = "a"\nchat_template = "x"\nchat_template_file = "none"',
            r'models\."x"\.chat_template_file: chat_template is given as well',
        ),
        (
            '[models.x]\nfile = "a.gguf"\ndraft = "q"',
            r'models\."x"\.draft: no model and no file \'q\'; wanted .*or "none"$',
        ),
        (
            '[models.x]\nfile = "a.gguf"\naliases = ["b"]\ndraft = "b"',
            r'models\."x"\.draft: \'b\' is the model itself',
        ),
        ('[models.x]\nfile = "a"\nspeculation = "on"', r'models\."x"\.speculation: '),
        ("[model.x]\n", "model: unknown key"),
        ("models = 1\n", "models: wanted tables"),
        ("models.x = 1\n", r'models\."x": Expected `object`'),
        ("[models.x\n", "line 1"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, text: str, words: str):
    declare(folder, text)
    with pytest.raises(CatalogError, match=words) as caught:
        read_catalog(folder)
    assert "models.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_and_an_empty_one(tmp_path: Path):
    with pytest.raises(CatalogError, match="is not there"):
        read_catalog(tmp_path / "none")
    with pytest.raises(CatalogError, match="no model in"):
        read_catalog(tmp_path).choose(())
