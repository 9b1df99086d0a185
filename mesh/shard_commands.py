"""`mesh shard`: what a mixture's experts are used for, and smaller models with some of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mesh.errors import CommandError
from mesh.following import Work, follow, worker_module
from mesh.models import resolve
from shared.command_line import Refused
from shared.shard_analysis import Analysis, read_analysis
from shared.sharding import Shard, ShardError, deal
from shared.sizes import format_size

__all__ = ("app",)

app = App(name="shard", help="Measure a mixture's experts, and cut it into shards.")

_REFUSED = 2
_SHADES = " ░▒▓█"
_HOT = 2.0
"""Times the mean mass of which an expert is shown with the darkest shade."""


class _Score(msgspec.Struct, frozen=True):
    """As `worker.engine.text_score.Score`."""

    perplexity: float
    error: float
    counted: int
    tokens: int
    masses: tuple[tuple[float, ...], ...] = ()


class _Found(msgspec.Struct, frozen=True):
    """As `worker.engine.analyze.Found`."""

    size: int
    score: _Score


class _Made(msgspec.Struct, frozen=True):
    """As `worker.shards.Made`."""

    path: str
    size: int
    written: bool


@app.command
def analyze(
    model: str,
    /,
    *,
    text: Path,
    out: Annotated[Path | None, Parameter(show_default=False)] = None,
    ctx: Annotated[int, Parameter(validator=Number(gte=8))] = 512,
    pieces: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    threads: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
) -> None:
    """Measure perplexity over a text, and what each layer's router gives to each expert.

    Works for any model: without experts, and for a shard, perplexity is what it is for.

    Parameters
    ----------
    model
        Path of a GGUF file, or SmolLM2-135M-Instruct.
    text
        A text of the kind that the model is to be used for; half a megabyte is plenty.
    out
        File for what is found. Without it, MODEL.experts.json here.
    ctx
        Tokens of a piece of the text; the second half of each counts.
    pieces
        Pieces at most; 0: the whole text.
    threads
        Threads to compute with; 0: all cores.
    """
    (file,) = resolve((model,), Path())
    path = _local(file.file)
    command = worker_module("worker.engine.analyze", needs="llama_cpp")
    command += ["--text", str(text), "--ctx", str(ctx), "--pieces", str(pieces)]
    console = Console(stderr=True, highlight=False)
    work = follow(
        [*command, "--threads", str(threads), str(path)], f"reading {text.name}", console,
        unit="pieces",
    )  # fmt: skip
    told = msgspec.json.decode(_result(work), type=_Found)
    score = told.score
    target = out or Path(f"{file.name}.experts.json")
    found = Analysis(
        model=file.name,
        size=told.size,
        text=text.name,
        context=ctx,
        tokens=score.tokens,
        counted=score.counted,
        perplexity=score.perplexity,
        error=score.error,
        masses=score.masses,
    )
    try:
        target.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    except OSError as error:
        raise Refused(f"--out {target}: {error.strerror or error}") from None
    shown = Console(highlight=False)
    shown.print(analysis_view(found))
    shown.print(f"kept in {target}", markup=False, soft_wrap=True)


@app.command
def build(
    model: str,
    analysis: Path,
    /,
    *,
    shards: Annotated[int, Parameter(validator=Number(gte=2))],
    core: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    overlap: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    floor: Annotated[float, Parameter(validator=Number(gte=0, lte=1))] = 0.5,
    out: Annotated[Path | None, Parameter(show_default=False)] = None,
) -> None:
    """Write shards: complete models, each with some of the experts, every expert on at least one.

    A shard's quality is less than the model's: `mesh shard analyze` on it shows by how much.

    Parameters
    ----------
    model
        Path of a GGUF file.
    analysis
        What `mesh shard analyze` kept of this model.
    shards
        How many.
    core
        Experts of a layer, the hottest, that every shard has.
    overlap
        Experts of a layer that each shard has beyond those dealt to it.
    floor
        Gate mass that each shard must cover at least, 0 to 1, in the mean over the layers.
    out
        Folder for them. Without it, the model's.
    """
    (file,) = resolve((model,), Path())
    path = _local(file.file)
    try:
        dealt = deal(read_analysis(analysis).masses, shards, core=core, overlap=overlap)
    except ShardError as error:
        raise Refused(str(error)) from None
    shown = Console(highlight=False)
    poorest = min(shard.coverage for shard in dealt)
    if poorest < floor:
        shown.print(shards_view(dealt, ()))
        raise Refused(
            f"a shard would cover {poorest:.1%} of the gate mass, less than --floor {floor:g}; "
            "more --core or --overlap, or fewer --shards, cover more"
        )
    command = [*worker_module("worker.shards"), "--analysis", str(analysis)]
    for name, value in (("shards", shards), ("core", core), ("overlap", overlap)):
        command += [f"--{name}", str(value)]
    command += ["--out", str(out or path.parent), str(path)]
    console = Console(stderr=True, highlight=False)
    work = follow(command, f"cutting {file.name}", console, unit="bytes")
    made = msgspec.json.decode(_result(work), type=tuple[_Made, ...])
    shown.print(shards_view(dealt, made))


def _local(file: str) -> Path:
    path = Path(file)
    if not path.is_file():
        raise CommandError(f"{file}: wanted a file of this host; download it first")
    return path


def _result(work: Work) -> str:
    """What a process came to.

    Raises:
        Refused: it was asked for wrongly.
        CommandError: it failed.
    """
    if work.code or not work.result:
        words = work.words or f"the process ended with exit code {work.code}"
        raise (Refused if work.code == _REFUSED else CommandError)(words)
    return work.result


def analysis_view(found: Analysis) -> RenderableType:
    """Perplexity, and a row of shades for each layer: the darker, the more an expert is used."""
    head = Text(f"{found.model}: perplexity {found.perplexity:.4f} +/- {found.error:.4f}")
    head.append(f" over {found.counted:,} tokens of {found.text}, pieces of {found.context}")
    if not found.masses:
        return Group(head, Text("it has no experts"))
    rows: list[RenderableType] = [head, Text("")]
    for layer, masses in enumerate(found.masses):
        mean = sum(masses) / len(masses)
        line = Text(f"{layer:4} ")
        for mass in masses:
            shade = min(len(_SHADES) - 1, int(mass / mean / _HOT * len(_SHADES)))
            line.append(_SHADES[shade])
        line.append(f"  most {max(masses):.1%}, least {min(masses):.1%}")
        rows.append(line)
    experts = len(found.masses[0])
    rows.append(Text(f"layers down, {experts} experts across; an equal share is {1 / experts:.1%}"))
    return Group(*rows)


def shards_view(dealt: Sequence[Shard], made: Sequence[_Made]) -> RenderableType:
    """What each shard has, and where it is."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("shard", "experts a layer", "gate mass", "poorest layer", "size", "file"):
        table.add_column(column, overflow="fold")
    for number, shard in enumerate(dealt):
        file = made[number] if number < len(made) else None
        table.add_row(
            f"{number + 1}/{len(dealt)}",
            str(len(shard.experts[0])),
            f"{shard.coverage:.1%}",
            f"{shard.least:.1%}",
            format_size(file.size) if file else "-",
            Text(file.path if file.written else f"{file.path} (was there)") if file else "-",
        )
    return table
