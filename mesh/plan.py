"""`mesh plan`: what would run where, and why, before anything is loaded."""

import asyncio
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mesh.errors import CommandError
from mesh.models import resolve
from mesh.parts import shape_command
from mesh.running import find
from shared.command_line import Refused
from shared.groups import DraftNeeds
from shared.head_draft import CELLS, with_draft
from shared.model_shape import ModelShape
from shared.partition import Host
from shared.planning import Plan, Wanted, plan
from shared.sizes import format_size, parse_size

__all__ = ("read_hosts", "register", "view")

_READ_SECONDS = 60.0
_BAR = 16
_REFUSED = 1
"""Exit code where the model cannot be served."""

_WorkerName = Annotated[str, msgspec.Meta(min_length=1)]
_Above = Annotated[float, msgspec.Meta(gt=0)]
_NotBelow = Annotated[float, msgspec.Meta(ge=0)]


class _Worker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: _WorkerName
    memory: str | int
    rtt_ms: _NotBelow = 0.0
    speed: _Above = 1.0


class _Workers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    worker: Annotated[tuple[_Worker, ...], msgspec.Meta(min_length=1)]


def register(app: App, folder: Callable[[Path | None], Path]) -> None:
    """Add the command; `folder` gives the data folder that is meant."""

    @app.command(name="plan")
    def show_plan(
        model: str,
        /,
        *,
        draft: Annotated[str, Parameter(show_default=False)] = "",
        workers: Annotated[Path | None, Parameter(show_default=False)] = None,
        ctx: Annotated[int, Parameter(validator=Number(gte=1))] = 4096,
        slots: Annotated[int, Parameter(validator=Number(gte=1))] = 8,
        max_rtt: Annotated[float, Parameter(validator=Number(gt=0))] = 80.0,
        shards: Annotated[bool, Parameter(negative=())] = False,
        nats: Annotated[str, Parameter(show_default=False)] = "",
        data_dir: Annotated[Path | None, Parameter(show_default=False)] = None,
        as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    ) -> int:
        """Say on which workers a model would run, whole or in parts, and why. Loads nothing.

        Exit code 1: it cannot be served.

        Parameters
        ----------
        model
            Path of a GGUF file (of a split one, the first part), or SmolLM2-135M-Instruct.
        draft
            Path of a draft model's GGUF file, which the worker or the head of several is to have.
        workers
            TOML file with a table [[worker]] for each: name, memory ("24GiB"), rtt_ms (round trip
            to NATS), speed (of decoding, against the others). Without it, the workers that run.
        ctx
            Tokens of context that one sequence is to have.
        slots
            Sequences at once.
        max_rtt
            Milliseconds of round trip beyond which a worker is no partner.
        shards
            Let experts be left out, each worker keeping some: quality is lost.
        nats
            The system's NATS server. Without it, that of the running `mesh up`.
        data_dir
            The data folder of that `mesh up`.
        as_json
            Print JSON.
        """
        if draft and shards:
            raise Refused("--draft is of no use with --shards: each finds a draft model by itself")
        file, *drafts = resolve((model, draft) if draft else (model,), folder(data_dir))
        shape, needs = _shape(file.file, *(one.file for one in drafts))
        shape = msgspec.structs.replace(shape, name=file.name)
        hosts = read_hosts(workers) if workers else _running(nats or find(folder(data_dir)).nats)
        wanted = Wanted(context=ctx, slots=slots, cap=max_rtt / 1000, shards=shards)
        made, room = plan(shape, hosts, wanted), None
        if needs is not None and made.stages:
            made, room = _with_draft(made, shape, tuple(hosts), needs)
        if as_json:
            sys.stdout.write(msgspec.json.format(msgspec.json.encode(made)).decode() + "\n")
        else:
            shown = view(made, shape, hosts, measured=workers is not None, draft=room)
            Console(highlight=False).print(shown)
        return _REFUSED if made.kind == "refused" else 0


def _with_draft(
    made: Plan, shape: ModelShape, hosts: tuple[Host, ...], needs: DraftNeeds
) -> tuple[Plan, int | None]:
    """The plan with room for its draft model, where there is any, and that model's bytes."""
    smaller = with_draft(made, shape, hosts, needs)
    head = made.stages[-1].host
    if smaller is made:
        least = format_size(needs.memory(math.ceil(CELLS * made.cells), made.step // 2))
        reason = f"no room for the draft model at {head}: it takes {least}, for which at most a "
        reason += (
            "quarter of the cells, half the width of a step and a tenth of the time are given up"
        )
        return msgspec.structs.replace(made, reasons=(*made.reasons, reason)), None
    memory = needs.memory(smaller.cells, smaller.step)
    reason = f"{head} has room for the draft model: without it there would be {made.cells:,} cells "
    reason += f"and steps of {made.step} tokens"
    return msgspec.structs.replace(smaller, reasons=(*made.reasons, reason)), memory


def _shape(*files: str) -> tuple[ModelShape, DraftNeeds | None]:
    """A model's, and what its draft model takes if that is given too."""
    if any(file.startswith("hf:") for file in files):
        raise Refused(
            "MODEL and --draft must be files that are here; what is on the hub has no shape yet"
        )
    command = shape_command(*files)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_READ_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise CommandError(f"{files[0]} could not be read within {_READ_SECONDS:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise CommandError(lines[-1] if lines else f"{files[0]} could not be read")
    return msgspec.json.decode(done.stdout, type=tuple[ModelShape, DraftNeeds | None])


def read_hosts(path: Path) -> list[Host]:
    """Read a file of workers.

    Raises:
        Refused: it cannot be read, or something in it is wrong; the message names it.
    """
    try:
        data: Any = tomllib.loads(path.read_text("utf-8"))
        told = msgspec.convert(data, _Workers).worker
        hosts = [
            Host(one.name, _bytes(one), rtt=one.rtt_ms / 1000, speed=one.speed) for one in told
        ]
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, ValueError) as error:
        # msgspec's and tomllib's errors are ValueErrors too.
        raise Refused(f"{path}: {error}") from None
    names = [host.name for host in hosts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Refused(f"{path}: two workers have the name {twice!r}")
    return hosts


def _bytes(worker: _Worker) -> int:
    if isinstance(worker.memory, int) and worker.memory > 0:
        return worker.memory
    try:
        return parse_size(str(worker.memory))
    except ValueError as error:
        raise ValueError(f"memory of {worker.name!r}: {error}") from None


def _running(nats: str) -> list[Host]:
    """The workers that run, each with all its memory: what it serves now could make room."""
    from mesh.listening import listen

    beats = asyncio.run(listen(nats)).workers
    hosts = [
        Host(beat.worker, beat.memory_budget or beat.memory_total)
        for beat in beats
        if beat.state != "gone"
    ]
    if not hosts:
        raise CommandError("no worker runs; --workers FILE plans for those that might")
    return hosts


def view(
    made: Plan,
    shape: ModelShape,
    hosts: Sequence[Host],
    *,
    measured: bool,
    draft: int | None = None,
) -> RenderableType:
    """The plan as a person reads it.

    Args:
        made: the plan.
        shape: the model's.
        hosts: all that were looked at.
        measured: whether the hosts' round trips are known.
        draft: bytes that the draft model of the head takes; None: it has none.
    """
    parts: list[RenderableType] = [_headline(made, shape), Text("")]
    memory = {host.name: host.memory for host in hosts}
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("worker", "layers", "takes", "of", "memory", "time")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for stage in made.stages:
        head = "+head" if stage.head and len(made.stages) > 1 else ""
        table.add_row(
            Text(stage.host),
            f"{stage.start}-{stage.stop - 1}{head}",
            format_size(stage.memory),
            format_size(memory[stage.host]),
            _bar(stage.memory, memory[stage.host]),
            f"{stage.share:.0%}",
        )
    if draft is not None:
        head = made.stages[-1].host
        bar = _bar(draft, memory[head])
        table.add_row(Text(head), "draft", format_size(draft), format_size(memory[head]), bar, "")
    if made.shards is not None:
        for name in made.replicas:
            table.add_row(
                Text(name),
                f"{made.shards.experts} of {made.shards.of} experts",
                format_size(made.shards.memory),
                format_size(memory[name]),
                _bar(made.shards.memory, memory[name]),
                "",
            )
    if table.row_count:
        parts += [table, Text("")]
    parts += [Text(f"why: {reason}") for reason in made.reasons]
    parts += [Text(f"better: {advice}") for advice in made.better]
    parts += [
        Text(f"not {one.host} ({format_size(one.memory)}): {one.reason}", style="dim")
        for one in made.left_out
    ]
    if len(made.stages) > 1:
        parts.append(Text("time: of a stage for a token, against the slowest one's", style="dim"))
    if not measured and len(made.stages) > 1:
        parts.append(Text("round trips are not known here; --workers FILE can tell them"))
    return Group(*parts)


def _headline(made: Plan, shape: ModelShape) -> Text:
    what = f"{shape.name} ({shape.architecture}, {len(shape.layers)} layers, "
    what += f"{format_size(shape.weights)}): "
    if made.kind == "refused":
        return Text(what).append("cannot be served by these workers", style="bold red")
    words = {
        "single": "on one worker",
        "pipeline": f"in {len(made.stages)} stages",
        "shards": f"as shards on {len(made.replicas)} workers",
    }[made.kind]
    text = Text(what).append(words, style="bold green")
    text.append(f", {made.cells:,} cells of KV cache, steps of {made.step} tokens")
    if made.kind == "pipeline" and made.round_trip:
        text.append(f", {made.round_trip * 1000:.0f} ms round the ring")
    return text


def _bar(used: int, total: int) -> Text:
    filled = min(_BAR, round(_BAR * used / total))
    text = Text("█" * filled, style="cyan")
    return text.append("░" * (_BAR - filled), style="dim")
