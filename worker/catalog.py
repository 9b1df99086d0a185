"""The models a worker may serve: the GGUF files of a folder, and what `models.toml` says of them.

    [models."smol/135m:instruct"]
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"   # or "hf:owner/repo:file.gguf"
    aliases = ["smol"]
    context = 4096
    slots = 8
    draft = "smol-q4"        # a model of this file, a file beside it, or "none"
    speculation = "auto"     # or "ngram" (no draft model), or "off"
    batch_invariant = "auto" # or "on", or "off"

A file that no entry names is known by its name without `.gguf`. Of a split model the first part
stands for all. Nothing is opened here but `models.toml` and the templates it names.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from shared.command_line import Refused
from worker.hub import PREFIX, HubError, HubSource, parse_source
from worker.link import BatchInvariance

__all__ = (
    "Catalog",
    "CatalogError",
    "ModelOptions",
    "ModelSource",
    "Speculation",
    "read_catalog",
)

TOML = "models.toml"
NO_DRAFT = "none"

Speculation = Literal["auto", "ngram", "off"]
"""`auto`: draft model and n-gram lookup; `ngram`: lookup alone."""

_LATER_PART = re.compile(r".+-(?P<number>\d{5})-of-\d{5}\.gguf")
_FIRST_PART = re.compile(r"(?P<stem>.+)-00001-of-\d{5}")

_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class CatalogError(Refused):
    """The folder, `models.toml` or a name is wrong; the message is one line."""


class ModelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `models.toml`; what is None falls back to the command line."""

    file: str
    aliases: tuple[str, ...] = ()
    context: _AtLeastOne | None = None
    slots: _AtLeastOne | None = None
    threads: _AtLeastOne | None = None
    gpu_layers: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    step_tokens: _AtLeastOne | None = None
    embeddings: bool = True
    chat_template: str = ""
    """Jinja text that replaces the model's own template."""
    chat_template_file: str = ""
    """The same from a file beside `models.toml`."""
    draft: str = ""
    """Name of a model of the catalog, a file beside `models.toml`, or `none`; empty: what is found
    among the files at hand."""
    speculation: Speculation | None = None
    batch_invariant: BatchInvariance | None = None


class ModelSource(msgspec.Struct, frozen=True):
    """A model by its name: where its file is, and how to serve it."""

    name: str
    file: Path | HubSource
    options: ModelOptions
    draft: Path | HubSource | None = None
    """The draft that the operator chose."""
    candidates: tuple[Path, ...] = ()
    """Files among which a draft may be found where none was chosen."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.options.aliases)


class Catalog(msgspec.Struct, frozen=True):
    """What is there, by name."""

    folder: Path
    models: dict[str, ModelSource]

    def choose(self, wanted: tuple[str, ...]) -> tuple[ModelSource, ...]:
        """The models of these names, aliases, paths or `hf:` sources; all if none is given.

        Raises:
            CatalogError: a name is not there (the message lists what is), or nothing is at all.
        """
        if not wanted:
            if not self.models:
                raise CatalogError(f"no model in {self.folder}: no *.gguf file and no {TOML} entry")
            return tuple(self._with_candidates(source) for source in self.models.values())
        chosen: dict[str, ModelSource] = {}
        for text in wanted:
            source = self._find(text)
            chosen.setdefault(source.name, self._with_candidates(source))
        _refuse_twins(chosen.values(), "--model")
        return tuple(chosen.values())

    def _with_candidates(self, source: ModelSource) -> ModelSource:
        """The model with the files that might draft for it: the catalog's, and those beside it."""
        if source.options.draft:
            return source
        files = [other.file for other in self.models.values() if isinstance(other.file, Path)]
        own = source.file.resolve() if isinstance(source.file, Path) else None
        if isinstance(source.file, Path):
            files += _models_in(source.file.parent)
        others = {file.resolve(): file for file in files}
        return msgspec.structs.replace(
            source, candidates=tuple(file for path, file in others.items() if path != own)
        )

    def _find(self, text: str) -> ModelSource:
        for source in self.models.values():
            if text in source.names:
                return source
        if text.startswith(PREFIX):
            try:
                remote = parse_source(text)
            except HubError as error:
                raise CatalogError(str(error)) from None
            return ModelSource(remote.name, remote, ModelOptions(file=text))
        if text.endswith(".gguf"):
            for path in (self.folder / text, Path(text)):
                if path.is_file():
                    return self._of_path(path)
        there = ", ".join(self.models) or "nothing"
        raise CatalogError(f"no model {text!r} in {self.folder}; there is: {there}")

    def _of_path(self, path: Path) -> ModelSource:
        for source in self.models.values():
            if isinstance(source.file, Path) and source.file.resolve() == path.resolve():
                return source
        return _plain(path)


def read_catalog(folder: Path) -> Catalog:
    """List the models of a folder.

    Raises:
        CatalogError: the folder is missing, or `models.toml` is wrong (the message names the key).
    """
    if not folder.is_dir():
        raise CatalogError(f"models folder {folder} is not there")
    models: dict[str, ModelSource] = {}
    for source in _declared(folder):
        models[source.name] = source
    declared = {s.file.resolve() for s in models.values() if isinstance(s.file, Path)}
    for path in _models_in(folder):
        if path.resolve() not in declared:
            models.setdefault(_plain(path).name, _plain(path))
    _refuse_twins(models.values(), TOML)
    paired = {name: _with_draft(folder, source, models) for name, source in models.items()}
    return Catalog(folder, paired)


def _models_in(folder: Path) -> list[Path]:
    """The GGUF files of a folder, without the later parts of split models."""
    return [
        path
        for path in sorted(folder.glob("*.gguf"))
        if (later := _LATER_PART.fullmatch(path.name)) is None or int(later["number"]) == 1
    ]


def _with_draft(folder: Path, source: ModelSource, models: dict[str, ModelSource]) -> ModelSource:
    wanted = source.options.draft
    if wanted in ("", NO_DRAFT):
        return source
    named = next((other.file for other in models.values() if wanted in other.names), None)
    where = f'{folder / TOML}: models."{source.name}".draft'
    if named is None and not (folder / wanted).is_file():
        raise CatalogError(
            f"{where}: no model and no file {wanted!r}; wanted the name of a model, "
            f'a file beside {TOML}, or "{NO_DRAFT}"'
        )
    file = folder / wanted if named is None else named
    if file == source.file:
        raise CatalogError(f"{where}: {wanted!r} is the model itself")
    return msgspec.structs.replace(source, draft=file)


def _plain(path: Path) -> ModelSource:
    first = _FIRST_PART.fullmatch(path.stem)
    return ModelSource(first["stem"] if first else path.stem, path, ModelOptions(file=path.name))


def _declared(folder: Path) -> list[ModelSource]:
    path = folder / TOML
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogError(f"{path}: {error}") from None
    tables = data.pop("models", {})
    if data:
        raise CatalogError(f'{path}: {next(iter(data))}: unknown key; wanted [models."name"]')
    if not isinstance(tables, dict):
        raise CatalogError(f'{path}: models: wanted tables [models."name"]')
    return [_entry(path, name, table) for name, table in tables.items()]


def _entry(path: Path, name: str, table: Any) -> ModelSource:
    where = f'{path}: models."{name}"'
    if not name:
        raise CatalogError(f"{where}: a name must not be empty")
    try:
        options = msgspec.convert(table, ModelOptions)
    except msgspec.ValidationError as error:
        what, _, at = str(error).partition(" - at `$")
        raise CatalogError(f"{where}{at.rstrip('`')}: {what}") from None
    if "" in options.aliases:
        raise CatalogError(f"{where}.aliases: a name must not be empty")
    if options.chat_template_file:
        options = _with_template(path, where, options)
    if options.file.startswith(PREFIX):
        try:
            return ModelSource(name, parse_source(options.file), options)
        except HubError as error:
            raise CatalogError(f"{where}.file: {error}") from None
    return ModelSource(name, path.parent / options.file, options)


def _with_template(path: Path, where: str, options: ModelOptions) -> ModelOptions:
    if options.chat_template:
        raise CatalogError(f"{where}.chat_template_file: chat_template is given as well")
    try:
        text = (path.parent / options.chat_template_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise CatalogError(
            f"{where}.chat_template_file: {options.chat_template_file}: {reason}"
        ) from None
    return msgspec.structs.replace(options, chat_template=text, chat_template_file="")


def _refuse_twins(sources: Any, where: str) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        for name in source.names:
            if seen.setdefault(name, source.name) != source.name or source.names.count(name) > 1:
                raise CatalogError(f"{where}: the name {name!r} is given to two models")
