"""How the state of the system looks in a terminal."""

import math
import time
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mesh.fleet import ModelView, Snapshot
from shared.demand import HALF_LIFE, Demand
from shared.presence import Beat, RouterBeat

__all__ = ("demand_table", "models_table", "size_text", "status_view")

_COLOURS = {"ready": "green", "loading": "yellow", "draining": "yellow", "failed": "red"}
_SHOWN_CHANGES = 10
_GIB = 1024**3
_MIB = 1024**2


def size_text(size: int) -> str:
    """Bytes for people; 0 is unknown."""
    if size <= 0:
        return "-"
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"


def status_view(snapshot: Snapshot, *, now: float | None = None) -> RenderableType:
    """Routers, workers and what each worker does with each model."""
    moment = time.time() if now is None else now
    tables = (
        _routers(snapshot.routers, moment),
        _workers(snapshot.workers, moment),
        _loads(snapshot.workers),
    )
    parts: list[RenderableType] = [part for table in tables for part in (table, Text(""))]
    if any(worker.stages for worker in snapshot.workers):
        parts += [_stages(snapshot.workers), Text("")]
    if any(worker.changes for worker in snapshot.workers):
        parts += [_changes(snapshot.workers, moment), Text("")]
    return Group(*parts, *_advice(snapshot.workers))


def models_table(models: tuple[ModelView, ...]) -> Table:
    """A row for each model."""
    table = _table("models", "state", "context", "size", "slots free", "queued", "workers")
    for model in models:
        ready = [worker for worker in model.workers if worker.state == "ready"]
        table.add_row(
            Text(model.name),
            _state(model.state),
            str(model.context or "-"),
            size_text(model.size),
            f"{sum(worker.free for worker in ready)}/{sum(worker.slots for worker in ready)}",
            str(sum(worker.queued for worker in ready)),
            Text(", ".join(worker.worker for worker in model.workers)),
        )
    return table


def demand_table(
    demand: Mapping[str, Demand], holders: Mapping[str, Sequence[str]], now: float
) -> Table:
    """What is asked for, and who holds it; the most wanted first."""
    table = _table("demand", "waiting", "running", "load", "tok/s", "last use", "held by")
    ordered = sorted(demand, key=lambda m: (-demand[m].waiting, -demand[m].load, m))
    for model in ordered:
        one = demand[model]
        table.add_row(
            Text(model),
            Text(str(one.waiting), style="yellow" if one.waiting else "default"),
            str(one.running),
            f"{one.load:.1f}",
            f"{one.tokens * math.log(2) / HALF_LIFE:.0f}",
            _age(one.last_use, now),
            Text(", ".join(holders.get(model, ())) or "-"),
        )
    return table


def _routers(routers: tuple[RouterBeat, ...], now: float) -> Table:
    table = _table("routers", "state", "url", "in flight", "requests", "up")
    for router in routers:
        table.add_row(
            Text(router.router),
            _state(router.state),
            Text(router.url or "-"),
            str(router.in_flight),
            str(router.requests),
            _age(router.started, now),
        )
    return table


def _workers(workers: tuple[Beat, ...], now: float) -> Table:
    table = _table("workers", "state", "host", "memory", "version", "up")
    for worker in workers:
        memory = f"{size_text(worker.memory_used)} of {size_text(worker.memory_total)}"
        table.add_row(
            Text(worker.worker),
            _state(worker.state),
            Text(worker.host or "-"),
            Text(memory if worker.memory_total else "-"),
            Text(worker.version or "-"),
            _age(worker.started, now),
        )
    return table


def _loads(workers: tuple[Beat, ...]) -> Table:
    table = _table(
        "models", "worker", "state", "slots", "queued", "KV", "tok/s", "accepted", "gain", "cached"
    )
    for worker in workers:
        for model in worker.models:
            state = _state(model.state)
            if model.detail and model.state != "ready":
                state.append(f" {model.detail}", style="default")
            table.add_row(
                Text(model.name),
                Text(worker.worker),
                state,
                f"{model.slots - model.free}/{model.slots}",
                f"{model.queued}/{model.queue_limit}",
                f"{model.kv_used:.0%}",
                f"{model.tokens_per_second:.0f}",
                _part(model.accepted, model.drafted),
                f"{model.gain:.2f}x" if model.drafted else "",
                _part(model.cached_tokens, model.prompt_tokens),
            )
    return table


def _stages(workers: tuple[Beat, ...]) -> Table:
    """Who carries which layers of the models that several workers share."""
    table = _table("parts", "layers", "worker", "state", "memory")
    heads = {
        (worker.worker, model.name): model.memory for worker in workers for model in worker.models
    }
    every = [(stage, worker.worker) for worker in workers for stage in worker.stages]
    for stage, worker in sorted(every, key=lambda e: (e[0].model, e[0].group, e[0].start)):
        state = _state(stage.state)
        head = not stage.memory
        if stage.detail:
            state.append(f" {stage.detail}", style="default")
        table.add_row(
            Text(stage.model),
            f"{stage.start}-{stage.stop - 1}{'+head' if head else ''}",
            Text(worker),
            state,
            size_text(heads.get((worker, stage.model), 0) if head else stage.memory),
        )
    return table


def _changes(workers: tuple[Beat, ...], now: float) -> Table:
    """The last role changes of all workers, the newest first."""
    table = _table("role changes", "worker", "model", "ago", "reason")
    every = [(change, worker.worker) for worker in workers for change in worker.changes]
    for change, worker in sorted(every, key=lambda entry: -entry[0].at)[:_SHOWN_CHANGES]:
        table.add_row(
            Text(change.action),
            Text(worker),
            Text(change.model),
            _age(change.at, now),
            Text(change.reason),
        )
    return table


def _advice(workers: tuple[Beat, ...]) -> list[Text]:
    """What workers advise of models they serve, each advice once."""
    told = {
        f"{model.name}: {model.detail}": worker.worker
        for worker in reversed(workers)
        for model in worker.models
        if model.state == "ready" and model.detail
    }
    return [Text(f"! {worker}: {line}\n") for line, worker in reversed(told.items())]


def _part(count: int, of: int) -> str:
    return f"{count / of:.0%}" if of else ""


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, "default"))


def _age(started: float, now: float) -> Text:
    if started <= 0:
        return Text("-")
    seconds = max(0, int(now - started))
    if seconds < 3600:
        return Text(f"{seconds // 60}:{seconds % 60:02d}")
    return Text(f"{seconds // 3600} h {seconds % 3600 // 60:02d} min")
