"""Many standbys and one hot model, with a real bucket: as many take it up as are wanted, not more.

Each standby sees only itself, as if no beat had come through: then each believes that it is the one
who is meant, and nothing but the lease stands between them.
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from shared import subjects
from shared.broker import Identity, NatsServer
from shared.bus import Bus
from shared.demand import DemandEntry, encode_entry
from shared.kv import DEMAND, LEASE_SECONDS, MODELS, ROLES, WORKERS, Kv
from shared.leases import RENEW_SECONDS, LeaseKey, Leases
from shared.model_shape import ModelShape
from shared.presence import Beat, LoadableModel, ModelState, RoleChange
from shared.settings import SettingsAnnouncer, encode_settings
from shared.snapshot import ModelSettings
from worker.outlook import Outlook
from worker.roles import Roles

pytestmark = pytest.mark.nats

STANDBYS = 20
TRIALS = 100


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


class Standby:
    """A worker without engines: what it is told to start is ready at once."""

    def __init__(self, bus: Bus, models: list[str]) -> None:
        self.name = bus.identity
        self.bus = bus
        self.running: dict[str, float] = {}
        """Unix times since which models are ready."""
        self.started: list[str] = []
        self.changes: deque[RoleChange] = deque(maxlen=8)
        self.able = tuple(LoadableModel(name, 10, 1024, 4, 10, 0) for name in sorted(models))
        self.leases = Leases(
            Kv(bus),
            self.name,
            on_change=lambda: self.roles.poke(),
            on_lost=lambda key, holder: self.roles.lost(key, holder),
            clock=time.monotonic,
            wall=time.time,
        )
        self.outlook = Outlook(self.name, self.leases.table, on_demand=lambda: self.roles.poke())
        self.roles = Roles(
            self.name,
            self,
            self.outlook,
            self.leases,
            presence=self.presence,
            changes=self.changes,
        )

    async def open(self) -> None:
        await self.leases.open()
        await self.outlook.settings.open(self.bus)
        await Kv(self.bus).follow(DEMAND, self.outlook.hear_demand)
        await self.bus.barrier()

    def presence(self) -> Beat:
        models = tuple(
            ModelState(name, "ready", since=since, slots=4, memory=10)
            for name, since in self.running.items()
        )
        return Beat(self.name, "ready", 1, models, able=self.able, memory_budget=15)

    @property
    def shapes(self) -> dict[str, ModelShape]:
        """It holds whatever it takes up alone."""
        return {}

    def start(self, model: str) -> bool:
        self.started.append(model)
        self.running[model] = time.time()
        return True

    async def stop(self, model: str) -> None:
        del self.running[model]

    def is_pinned(self, model: str) -> bool:
        return False


class Fleet:
    def __init__(self, router: Bus, mesh: Bus, standbys: list[Standby]) -> None:
        self.router = Kv(router)
        self.mesh = Kv(mesh)
        self.standbys = standbys

    async def wish(self, model: str, waiting: int) -> None:
        now = time.time()
        since = now if waiting else 0.0
        entry = DemandEntry(
            model, "router-1", now, waiting=waiting, waiting_since=since, last_use=now
        )
        await self.router.put(DEMAND, subjects.demand_key(model, "router-1"), encode_entry(entry))

    async def forget(self, model: str) -> None:
        await self.router.delete(DEMAND, subjects.demand_key(model, "router-1"))

    def count(self, model: str) -> int:
        return sum(standby.started.count(model) for standby in self.standbys)

    def holders(self, model: str) -> set[tuple[str, int]]:
        return {
            (standby.name, key.number)
            for standby in self.standbys
            for key in standby.leases.held
            if key.model == model
        }

    async def settle(self) -> None:
        """All have decided at least twice on what they know now."""
        for _ in range(2):
            for standby in self.standbys:
                standby.roles.poke()
            await asyncio.sleep(0.1)


@pytest.fixture
async def fleet(
    tmp_path: Path, make_identities: Callable[..., list[Identity]]
) -> AsyncIterator[Fleet]:
    models = [f"hot-{number}" for number in range(TRIALS)]
    server = NatsServer(identities=make_identities(workers=STANDBYS), data_dir=tmp_path / "nats")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server)

        async def connect(name: str, kind: str) -> Bus:
            context = Bus.connect(server.url_for(name), identity=name, kind=kind)  # type: ignore[arg-type]
            return await stack.enter_async_context(context)

        router, mesh = await connect("router-1", "router"), await connect("mesh-1", "mesh")
        await Kv(router).make(DEMAND, ROLES, WORKERS, MODELS)
        standbys = [
            Standby(await connect(f"worker-{number}", "worker"), models)
            for number in range(1, STANDBYS + 1)
        ]
        for standby in standbys:
            await standby.open()
            # They have listened long enough; what they miss here they are meant to miss.
            standby.outlook._listening_since = float("-inf")
        tasks = [asyncio.create_task(SettingsAnnouncer(router).run())]
        tasks += [asyncio.create_task(standby.roles.run()) for standby in standbys]
        try:
            await until(lambda: all(standby.outlook.complete for standby in standbys))
            yield Fleet(router, mesh, standbys)
        finally:
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in done), done


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wanted", [pytest.param(1, marks=pytest.mark.slow), 3])
async def test_of_twenty_standbys_exactly_as_many_promote_as_are_wanted(
    fleet: Fleet, wanted: int
) -> None:
    for trial in range(TRIALS):
        draw = random.Random(trial)
        model = f"hot-{trial}"
        if wanted > 1:
            settings = ModelSettings(model, minimum=wanted)
            await fleet.mesh.put(MODELS, subjects.model_key(model), encode_settings(settings))
        else:
            await fleet.wish(model, waiting=draw.randint(1, 50))
        # Some look a little later, as hosts do.
        await asyncio.sleep(draw.uniform(0, 0.02))
        for standby in draw.sample(fleet.standbys, STANDBYS // 2):
            standby.roles.poke()
        await until(lambda: fleet.count(model) >= wanted)  # noqa: B023 - awaited at once
        await fleet.settle()
        assert fleet.count(model) == wanted, f"trial {trial}"
        holders = fleet.holders(model)
        assert {number for _, number in holders} == set(range(wanted))
        assert len({name for name, _ in holders}) == wanted
        await fleet.mesh.delete(MODELS, subjects.model_key(model))
        await fleet.forget(model)
        for standby in fleet.standbys:
            standby.running.clear()
            standby.roles.poke()
        await until(lambda: not fleet.holders(model))  # noqa: B023 - awaited at once


HOLDER = """
import asyncio, sys, time
from shared.bus import Bus
from shared.kv import Kv
from shared.leases import RENEW_SECONDS, LeaseKey, Leases
from shared.model_shape import ModelShape

async def main():
    async with Bus.connect(sys.argv[1], identity="worker-1", kind="worker") as bus:
        leases = Leases(
            Kv(bus),
            "worker-1",
            on_change=lambda: None,
            on_lost=lambda key, holder: None,
            clock=time.monotonic,
            wall=time.time,
        )
        await leases.open()
        print(await leases.claim(LeaseKey("hot-0", 0)), flush=True)
        while True:
            await leases.renew()
            await asyncio.sleep(RENEW_SECONDS)

asyncio.run(main())
"""


async def test_the_lease_of_a_killed_process_passes_on_within_its_time(
    nats_server: NatsServer, connect: Callable[..., object], unique: str
) -> None:
    router = await connect("router-1")  # type: ignore[misc]
    await Kv(router).make(ROLES)
    bus = await connect("worker-2")  # type: ignore[misc]
    leases = Leases(
        Kv(bus),
        "worker-2",
        on_change=lambda: None,
        on_lost=lambda key, holder: None,
        clock=time.monotonic,
        wall=time.time,
    )
    await leases.open()
    await bus.barrier()
    script = HOLDER.replace("hot-0", unique)
    holder = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        nats_server.url_for("worker-1"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        # Logged lines come first.
        while (line := await holder.stdout.readline()) and line != b"True\n":
            assert line != b"False\n"
        assert line
        key = LeaseKey(unique, 0)
        # It lives on beyond its time while it is renewed.
        started = time.monotonic()
        while time.monotonic() - started < LEASE_SECONDS + 2.0:
            assert not await leases.claim(key)
            await asyncio.sleep(0.5)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        await holder.wait()
    killed = time.monotonic()
    async with asyncio.timeout(60):
        while not await leases.claim(key):  # noqa: ASYNC110 - as a worker does
            await asyncio.sleep(0.25)
    passed = time.monotonic() - killed
    # From its last renewal on; a claim that comes before the server has looked for what is old
    # costs CONFIRM_SECONDS.
    assert LEASE_SECONDS - RENEW_SECONDS - 1.0 < passed < LEASE_SECONDS + 5.0
    assert leases.sure(key)
