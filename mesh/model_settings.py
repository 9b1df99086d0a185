"""`mesh models set`: how many replicas of a model there may be, where, and who goes first."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from cyclopts.validators import Number
from rich.console import Console

from mesh.errors import CommandError
from mesh.fleet import Snapshot
from mesh.listening import listen
from mesh.running import find
from shared import subjects
from shared.bus import Bus
from shared.command_line import Refused, identity
from shared.kv import MODELS, Conflict, Entry, Kv
from shared.settings import decode_settings, encode_settings
from shared.snapshot import ModelSettings

__all__ = ("canonical", "change", "register", "words")

_Count = Annotated[int | None, Parameter(validator=Number(gte=0), show_default=False)]
_TRIES = 5


def register(models: App, folder: Callable[[Path | None], Path]) -> None:
    """Add the command to `mesh models`; `folder` finds the data folder that is meant."""

    @models.command(name="set")
    def set_model(
        model: str,
        /,
        *,
        minimum: Annotated[_Count, Parameter(name="--min")] = None,
        maximum: Annotated[_Count, Parameter(name="--max")] = None,
        priority: Annotated[int | None, Parameter(show_default=False)] = None,
        pin: Annotated[
            tuple[str, ...] | None, Parameter(negative_iterable="", show_default=False)
        ] = None,
        unpin: Annotated[bool, Parameter(negative=())] = False,
        clear: Annotated[bool, Parameter(negative=())] = False,
        nats: Annotated[str, Parameter(show_default=False)] = "",
        data_dir: Annotated[Path | None, Parameter(show_default=False)] = None,
    ) -> None:
        """Set how many replicas of a model there may be; what is not named stays as it is.

        Standby workers act on it within seconds. Without flags, what is set is shown.

        Parameters
        ----------
        model
            Name of the model.
        minimum
            Replicas kept even while nobody asks for the model; 0 is usual.
        maximum
            Replicas at most; 0: as many as demand asks for.
        priority
            Models of a higher one may take the room of idle models of a lower one.
        pin
            Worker that always holds the model, if it can. May be repeated; replaces those before.
        unpin
            Pin it to no worker.
        clear
            Forget all that was set.
        nats
            The system's NATS server. Without it, that of the running `mesh up`.
        data_dir
            The data folder of that `mesh up`.
        """
        if unpin and pin:
            raise Refused("--pin and --unpin: wanted one of them")
        wanted = {
            name: value
            for name, value in (
                ("minimum", minimum),
                ("maximum", maximum),
                ("priority", priority),
                ("pinned", () if unpin else pin),
            )
            if value is not None
        }
        if clear and wanted:
            raise Refused("--clear: wanted without other settings")
        url = nats or find(folder(data_dir)).nats
        console = Console(highlight=False, markup=False, soft_wrap=True)
        settings, known = asyncio.run(
            _set(url, model, lambda before: None if clear else change(before, wanted), bool(wanted))
        )
        console.print(words(settings))
        if not known:
            console.print(f"no worker tells of a model {model!r} yet")


def change(before: ModelSettings, wanted: Mapping[str, object]) -> ModelSettings:
    """The settings with some of them replaced.

    Raises:
        Refused: they contradict each other, or name what is no worker.
    """
    after = msgspec.structs.replace(before, **wanted)
    if after.maximum and after.minimum > after.maximum:
        raise Refused(
            f"--min {after.minimum} is more than --max {after.maximum}; wanted at most as many"
        )
    for worker in after.pinned:
        try:
            subjects.valid_identity(worker)
        except ValueError as error:
            raise Refused(f"--pin: {error}") from None
    return after


def canonical(snapshot: Snapshot, model: str) -> tuple[str, bool]:
    """The own name of a model that may be named by an alias, and whether any worker knows it."""
    for beat in snapshot.workers:
        for able in beat.able:
            if model == able.name or model in able.aliases:
                return able.name, True
    for beat in snapshot.workers:
        for state in beat.models:
            if model == state.name:
                return state.alias_of or state.name, True
    return model, False


def words(settings: ModelSettings) -> str:
    """What is set, in one line."""
    pinned = ", ".join(settings.pinned) or "no worker"
    return (
        f"{settings.model}: at least {settings.minimum}, "
        f"at most {settings.maximum or 'as many as demand asks for'}, "
        f"priority {settings.priority}, pinned to {pinned}"
    )


async def _set(
    url: str,
    model: str,
    make: Callable[[ModelSettings], ModelSettings | None],
    writes: bool,
) -> tuple[ModelSettings, bool]:
    """Read, change, and write as long as nobody else does meanwhile."""
    if not model:
        raise Refused("the model's name must not be empty")
    name, known = canonical(await listen(url), model)
    async with Bus.connect(url, identity=identity("mesh", url), kind="mesh") as bus:
        kv = Kv(bus)
        await kv.make(MODELS)
        key = subjects.model_key(name)
        for _ in range(_TRIES):
            entry = await kv.get(MODELS, key)
            before = _read(name, entry)
            after = make(before)
            try:
                if after is None:
                    if entry is not None:
                        await kv.delete(MODELS, key, entry.revision)
                    return ModelSettings(name), known
                if writes:
                    await _write(kv, key, after, entry)
                return after, known
            except Conflict:
                continue
    raise CommandError(f"{name}: others are changing it at the same time; try again")


async def _write(kv: Kv, key: str, settings: ModelSettings, entry: Entry | None) -> None:
    data = encode_settings(settings)
    try:
        await kv.update(MODELS, key, data, entry.revision if entry else 0)
    except Conflict as conflict:
        # A deletion that is still remembered has a revision, too.
        if entry is not None or await kv.get(MODELS, key) is not None:
            raise
        await kv.update(MODELS, key, data, conflict.revision)


def _read(name: str, entry: Entry | None) -> ModelSettings:
    if entry is None or entry.value is None:
        return ModelSettings(name)
    try:
        return msgspec.structs.replace(decode_settings(entry.value), model=name)
    except msgspec.DecodeError:
        # What cannot be read is in force nowhere.
        return ModelSettings(name)
