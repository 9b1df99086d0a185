"""Conversations go where their prompt is cached, and routers agree on it without a word."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any

import pytest

from loadtests.token_emitter import Emitter
from loadtests.token_worker import TokenWorker
from router.server import Serving
from shared.broker import Identity, NatsServer
from shared.bus import Bus
from tests.serving import serving

pytestmark = pytest.mark.nats

WORKERS = 4
CONVERSATIONS = 64
TURNS = 8


@pytest.fixture(scope="module")
def wide_server(
    tmp_path_factory: pytest.TempPathFactory, make_identities: Callable[..., list[Identity]]
) -> Iterator[NatsServer]:
    """A server with users for more workers than the usual one has."""
    server = NatsServer(
        identities=make_identities(workers=WORKERS), data_dir=tmp_path_factory.mktemp("wide")
    )
    with serving(server):
        yield server


@pytest.fixture
async def workers(wide_server: NatsServer, unique: str) -> AsyncIterator[dict[str, asyncio.Event]]:
    """Token workers, by name, each with what ends it."""
    stops: dict[str, asyncio.Event] = {}
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        for number in range(1, WORKERS + 1):
            name = f"worker-{number}"
            bus = Bus.connect(wide_server.url_for(name), identity=name, kind="worker")
            emitter = Emitter(name, interval=0.002, slots=8)
            stops[name] = asyncio.Event()
            worker = TokenWorker(await stack.enter_async_context(bus), unique, emitter)
            tasks.create_task(worker.run(stops[name]))
        yield stops
        for stop in stops.values():
            stop.set()


@pytest.fixture
async def routers(
    start_router: Callable[..., Awaitable[Serving]],
    wide_server: NatsServer,
    workers: dict[str, asyncio.Event],
    unique: str,
    eventually: Callable[..., Awaitable[None]],
) -> list[Serving]:
    """Two routers that share nothing and know all workers."""
    started = [await start_router(f"router-{n}", server=wide_server) for n in (1, 2)]
    for router in started:
        await eventually(
            lambda router=router: (
                (pool := router.dispatcher.fleet.pool(unique)) is not None
                and pool.candidates == WORKERS
                and all(router.dispatcher.distances.reach(name) == "near" for name in workers)
            )
        )
    return started


@pytest.fixture
def turn(http: Any, unique: str) -> Callable[..., Awaitable[str]]:
    """Ask one turn of a conversation; returns the worker that answered."""

    async def ask(router: Serving, conversation: str, number: int = 0, **more: Any) -> str:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"This is {conversation}."},
        ]
        for past in range(number):
            messages += [
                {"role": "assistant", "content": f"answer {past}"},
                {"role": "user", "content": f"question {past}"},
            ]
        answer = await http.post(
            f"{router.url}/v1/chat/completions",
            json={"model": unique, "messages": messages, "max_tokens": 3} | more,
            headers={"X-Mesh-Explain": "1"},
        )
        assert answer.status_code == 200, answer.text
        return answer.headers["x-mesh-worker"]

    return ask


async def test_turns_stay_together_through_alternating_routers_and_load_is_even(routers, turn):
    homes: list[list[str]] = []
    # As many at once as there are slots: then nobody is above its bound for long.
    gate = asyncio.Semaphore(16)

    async def talk(number: int) -> None:
        home = []
        for past in range(TURNS):
            async with gate:
                home.append(await turn(routers[past % 2], f"conversation {number}", past))
        homes.append(home)

    await asyncio.gather(*(talk(number) for number in range(CONVERSATIONS)))
    loads = Counter(worker for home in homes for worker in home)
    moved = sum(here != there for home in homes for here, there in pairwise(home))

    assert set(loads) == {f"worker-{n}" for n in range(1, WORKERS + 1)}
    assert max(loads.values()) < 2 * loads.total() / WORKERS
    # Only those that spilt moved, there and back.
    assert moved <= 0.05 * CONVERSATIONS * (TURNS - 1)


async def test_one_that_leaves_moves_no_more_than_its_share(
    routers, workers, turn, eventually, unique
):
    names = [f"conversation {number}" for number in range(200)]
    before = {name: await turn(routers[0], name) for name in names}
    assert before == {name: await turn(routers[1], name, 1) for name in names}

    workers["worker-3"].set()
    for router in routers:
        await eventually(lambda router=router: router.dispatcher.fleet.pool(unique).candidates == 3)
    after = {name: await turn(routers[number % 2], name, 2) for number, name in enumerate(names)}
    moved = {name for name in names if after[name] != before[name]}

    assert moved == {name for name in names if before[name] == "worker-3"}
    assert len(moved) / len(names) <= 1 / WORKERS + 0.05


async def test_what_the_client_calls_a_conversation_counts_more_than_its_words(routers, turn):
    together = {
        await turn(routers[n % 2], f"question {n}", prompt_cache_key="mine") for n in range(12)
    }
    apart = {
        await turn(routers[n % 2], f"question {n}", prompt_cache_key=f"{n}") for n in range(12)
    }

    assert len(together) == 1
    assert len(apart) > 1


async def test_users_do_not_share_a_conversation_by_its_name(routers, turn):
    found = {
        await turn(routers[0], "the same", prompt_cache_key="mine", user=f"user {n}")
        for n in range(12)
    }

    assert len(found) > 1
