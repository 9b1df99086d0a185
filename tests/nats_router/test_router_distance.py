"""Distance, measured on the path of the tokens: who is far gets nothing while a nearer serves."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from loadtests.token_emitter import Emitter
from loadtests.token_worker import TokenWorker
from loadtests.wire_proxy import WireProxy
from router.server import Serving
from shared.broker import Identity, NatsServer
from shared.bus import Bus
from shared.distance import CAP
from tests.serving import serving

pytestmark = pytest.mark.nats

ROUND_TRIPS = (0.001, 0.020, 0.070, 0.120)


@pytest.fixture(scope="module")
def wide_server(
    tmp_path_factory: pytest.TempPathFactory, make_identities: Callable[..., list[Identity]]
) -> Iterator[NatsServer]:
    """A server with users for more workers than the usual one has."""
    server = NatsServer(
        identities=make_identities(workers=4), data_dir=tmp_path_factory.mktemp("wide")
    )
    with serving(server):
        yield server


Far = Callable[..., Awaitable[WireProxy]]


@pytest.fixture
async def far_worker(wide_server: NatsServer, unique: str) -> AsyncIterator[Far]:
    """Start a token worker at a distance: `proxy = await far_worker("worker-1", 0.02)`."""
    async with AsyncExitStack() as stack:

        async def start(name: str, rtt: float, slots: int = 8) -> WireProxy:
            proxy = await stack.enter_async_context(WireProxy(rtt).running())
            url = proxy.url(wide_server.url_for(name))
            bus = await stack.enter_async_context(Bus.connect(url, identity=name, kind="worker"))
            stop = asyncio.Event()
            worker = TokenWorker(bus, unique, Emitter(name, interval=0.0, slots=slots))
            running = asyncio.create_task(worker.run(stop))

            async def end() -> None:
                stop.set()
                await running

            stack.push_async_callback(end)
            return proxy

        yield start


@pytest.fixture
async def near_router(start_router: Callable[..., Any], wide_server: NatsServer) -> Serving:
    return await start_router(server=wide_server)


@pytest.fixture
def ask(http: Any, unique: str) -> Callable[..., Any]:
    """Ask one question of its own, and tell how it was answered."""
    numbers = iter(range(10**9))

    async def one(router: Serving) -> Any:
        body = {
            "model": unique,
            "max_tokens": 1,
            "messages": [{"role": "user", "content": f"question {next(numbers)}"}],
        }
        return await http.post(
            f"{router.url}/v1/chat/completions", json=body, headers={"X-Mesh-Explain": "1"}
        )

    return one


async def asked(ask: Any, router: Serving, count: int) -> Counter[str]:
    answers = [await ask(router) for _ in range(count)]
    assert {answer.status_code for answer in answers} == {200}
    return Counter(answer.headers["x-mesh-worker"] for answer in answers)


def reaches(router: Serving) -> dict[str, str]:
    distances = router.dispatcher.distances
    return {f"worker-{n}": distances.reach(f"worker-{n}") for n in range(1, 5)}


async def test_traffic_goes_to_the_near_and_follows_when_ways_change(
    near_router, far_worker, ask, eventually
):
    proxies = [
        await far_worker(f"worker-{number}", rtt) for number, rtt in enumerate(ROUND_TRIPS, 1)
    ]
    as_they_are = {"worker-1": "near", "worker-2": "near", "worker-3": "near", "worker-4": "far"}
    await eventually(lambda: reaches(near_router) == as_they_are)

    before = await asked(ask, near_router, 120)
    # 70 ms and what the machine adds lies close below the cap: it may serve or not.
    assert set(before) <= {"worker-1", "worker-2", "worker-3"}
    assert {"worker-1", "worker-2"} <= set(before)

    for proxy, rtt in zip(proxies, reversed(ROUND_TRIPS), strict=True):
        proxy.rtt = rtt
    changed = time.monotonic()
    await eventually(
        lambda: (
            reaches(near_router)["worker-1"] == "far" and reaches(near_router)["worker-4"] == "near"
        )
    )
    print(f"followed after {time.monotonic() - changed:.1f} s")

    after = await asked(ask, near_router, 120)
    assert "worker-1" not in after
    assert {"worker-3", "worker-4"} <= set(after)


async def test_the_distance_is_told_and_is_that_of_the_way(
    near_router, far_worker, ask, eventually
):
    await far_worker("worker-2", 0.050)
    await eventually(lambda: reaches(near_router)["worker-2"] == "near")

    answer = await ask(near_router)

    assert answer.headers["x-mesh-worker"] == "worker-2"
    assert 50 <= float(answer.headers["x-mesh-rtt-ms"]) < CAP * 1000


async def test_the_queue_group_is_no_way_round_the_cap(near_router, far_worker, ask, eventually):
    """The near one is full all the time: its door is closed, and the far one's group is open."""
    await far_worker("worker-1", 0.001, slots=0)
    await far_worker("worker-4", 0.120)
    await eventually(
        lambda: (
            reaches(near_router)["worker-1"] == "near" and reaches(near_router)["worker-4"] == "far"
        )
    )

    answers = [await ask(near_router) for _ in range(20)]

    assert {answer.status_code for answer in answers} == {429}


async def test_alone_beyond_the_cap_a_worker_is_refused(near_router, far_worker, ask, eventually):
    await far_worker("worker-4", 0.120)
    await eventually(lambda: reaches(near_router)["worker-4"] == "far")

    answer = await ask(near_router)

    assert answer.status_code == 503
    assert "80 ms" in answer.json()["error"]["message"]
    # It failed on its first placing, and tells what there is to tell: nobody was asked.
    assert answer.headers["x-mesh-candidates"] == "0"
    assert "x-mesh-queue-ms" in answer.headers
    assert "x-mesh-reason" not in answer.headers


async def test_alone_beyond_the_cap_a_worker_is_used_if_configured(
    start_router, wide_server, far_worker, ask, eventually
):
    router = await start_router(server=wide_server, far=True)
    await far_worker("worker-4", 0.120)
    await eventually(lambda: reaches(router)["worker-4"] == "far")

    assert await asked(ask, router, 3) == {"worker-4": 3}

    await far_worker("worker-1", 0.001)
    await eventually(lambda: reaches(router)["worker-1"] == "near")
    assert await asked(ask, router, 10) == {"worker-1": 10}


async def test_a_worker_that_answers_no_pings_any_more_is_left_for_those_that_do(
    near_router, far_worker, ask, eventually
):
    stuck = await far_worker("worker-1", 0.001)
    await far_worker("worker-2", 0.001)
    await eventually(lambda: list(reaches(near_router).values())[:2] == ["near", "near"])
    # Beats come on, late by a second: it is alive, and as far as the moon.
    stuck.rtt = 2.5
    await eventually(lambda: reaches(near_router)["worker-1"] != "near")

    assert await asked(ask, near_router, 20) == {"worker-2": 20}
