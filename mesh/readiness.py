"""When a system that is being started can be used, and what it does until then."""

import asyncio
from collections.abc import Callable, Sequence

import httpx
import msgspec

from mesh.errors import CommandError
from mesh.fleet import Fleet
from shared.presence import ModelState

__all__ = ("Loads", "judge", "wait_for_models", "wait_for_routers")

_LOOK_EVERY = 0.1
_FIRST_BEAT = 60.0
_ROUTER_START = 60.0
_TRIES = 3
"""Failures after which a model that several carry is given up."""


class Loads(msgspec.Struct, frozen=True):
    """How far the models are: pairs of worker and model."""

    pending: tuple[tuple[str, str], ...]
    ready: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str, str], ...]
    """With the reason."""

    @property
    def served(self) -> tuple[str, ...]:
        """Models that some worker serves."""
        return tuple(dict.fromkeys(model for _, model in self.ready))


def judge(fleet: Fleet, workers: Sequence[str], models: Sequence[str]) -> Loads:
    """Sort every model of every worker by how far it is.

    A model that they carry together counts once, with the worker that has the head.
    """
    pending: list[tuple[str, str]] = []
    ready: list[tuple[str, str]] = []
    failed: list[tuple[str, str, str]] = []
    for worker in workers:
        for model in models:
            state = fleet.model_state(worker, model)
            if state is not None and state.state == "ready":
                ready.append((worker, model))
            elif state is not None and state.state == "failed":
                failed.append((worker, model, state.detail))
            elif fleet.part(worker, model) is None:
                pending.append((worker, model))
            elif not fleet.served(model):
                reason = _refusal(fleet, worker, model)
                if reason:
                    failed.append((worker, model, reason))
                else:
                    pending.append((worker, model))
    return Loads(pending=tuple(pending), ready=tuple(ready), failed=tuple(failed))


def _refusal(fleet: Fleet, worker: str, model: str) -> str:
    """Why it is no use to wait until a model comes about that many carry; empty: it is."""
    failures = fleet.failures(worker, model)
    if len(failures) >= _TRIES:
        return failures[-1]
    part = fleet.part(worker, model)
    return part.missing if part is not None and not failures else ""


async def wait_for_models(
    fleet: Fleet,
    workers: Sequence[str],
    models: Sequence[str],
    tell: Callable[[str, ModelState], None],
) -> Loads:
    """Wait until every worker has every model ready or has given it up, telling each change.

    However long a load takes, a worker beats meanwhile; silence is what is given up on.

    Raises:
        CommandError: no model can be served, or a worker never said anything.
    """
    told: dict[tuple[str, str], ModelState] = {}
    clock = asyncio.get_running_loop().time
    silent_until = clock() + _FIRST_BEAT
    while True:
        for worker in workers:
            for model in models:
                state = fleet.model_state(worker, model)
                if state is not None and told.get((worker, model)) != state:
                    told[worker, model] = state
                    tell(worker, state)
        loads = judge(fleet, workers, models)
        if not loads.pending:
            if not loads.ready:
                worker, model, reason = loads.failed[0]
                raise CommandError(f"{worker} cannot serve {model}: {reason}")
            return loads
        missing = [worker for worker in workers if worker not in fleet.workers]
        if missing and clock() > silent_until:
            raise CommandError(f"{missing[0]} has said nothing for {_FIRST_BEAT:g} s")
        await asyncio.sleep(_LOOK_EVERY)


async def wait_for_routers(urls: Sequence[str], models: Sequence[str]) -> None:
    """Wait until every router answers and lists every model.

    Raises:
        CommandError: they do not within a minute.
    """
    wanted = set(models)
    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
        clock = asyncio.get_running_loop().time
        deadline = clock() + _ROUTER_START
        for url in urls:
            while reason := await _reason_to_wait(client, url, wanted):
                if clock() > deadline:
                    raise CommandError(f"the router at {url} is not ready: {reason}")
                await asyncio.sleep(_LOOK_EVERY)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: tuple[_Model, ...]


async def _reason_to_wait(client: httpx.AsyncClient, url: str, wanted: set[str]) -> str:
    root = url.removesuffix("/v1")
    try:
        ready = await client.get(f"{root}/readyz")
        listed = await client.get(f"{url}/models")
    except httpx.TransportError as error:
        return str(error) or type(error).__name__
    if ready.status_code != httpx.codes.OK:
        return f"/readyz answers {ready.status_code}"
    if listed.status_code != httpx.codes.OK:
        return f"/v1/models answers {listed.status_code}"
    try:
        known = {model.id for model in msgspec.json.decode(listed.content, type=_Models).data}
    except msgspec.DecodeError as error:
        return f"/v1/models answers something else: {error}"
    missing = sorted(wanted - known)
    return f"it does not know {missing[0]}" if missing else ""
