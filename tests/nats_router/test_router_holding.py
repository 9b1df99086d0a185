"""Requests for a model that nobody serves yet: held until somebody does, and counted meanwhile."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from scripted_worker import WAIT

from loadtests.token_emitter import Emitter
from loadtests.token_worker import TokenWorker
from router import waiting
from shared import subjects
from shared.bus import Bus
from shared.presence import Beat, LoadableModel, ModelState, encode_beat

pytestmark = pytest.mark.nats


class Standby:
    """A worker that serves nothing, but tells what it could load."""

    def __init__(self, bus: Bus, model: str) -> None:
        self.bus = bus
        self.model = model
        self.state = ""
        self.detail = ""
        self._sequence = 0

    async def run(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(0.2)

    async def beat(self, state: Any = "standby") -> None:
        self._sequence += 1
        able = LoadableModel(self.model, 100, 512, 4, 80, 1, aliases=(f"{self.model}-alias",))
        models: tuple[ModelState, ...] = ()
        if self.state:
            models = (ModelState(self.model, self.state, detail=self.detail),)
        beat = Beat(self.bus.identity, state, self._sequence, models, started=1.0, able=(able,))
        await self.bus.publish(subjects.beat(self.bus.identity), encode_beat(beat))


@pytest.fixture
async def standby(
    router: Any, connect: Callable[..., Awaitable[Bus]], unique: str, eventually: Any
) -> AsyncIterator[Standby]:
    worker = Standby(await connect("worker-1"), unique)
    beating = asyncio.create_task(worker.run())
    await eventually(lambda: router.dispatcher.fleet.hopeful(unique))
    yield worker
    beating.cancel()
    await worker.beat("gone")
    await worker.bus.barrier()


@pytest.fixture
async def load(
    connect: Callable[..., Awaitable[Bus]], unique: str
) -> AsyncIterator[Callable[..., Awaitable[Emitter]]]:
    """Have the model served, by a worker that says no when its slots are taken."""
    stop = asyncio.Event()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:

        async def begin(slots: int = 4, model: str = unique) -> Emitter:
            emitter = Emitter("worker-2", interval=0.002, slots=slots)
            worker = TokenWorker(await connect("worker-2"), model, emitter)
            tasks.create_task(worker.run(stop))
            return emitter

        yield begin
        stop.set()
        stack.pop_all()


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


@pytest.fixture
def held(router: Any) -> Callable[[], int]:
    """How many wait."""
    return lambda: len(router.dispatcher.waiting)


async def test_fifty_at_once_wait_for_one_load_and_all_are_answered(
    router, http, chat, standby, held, load, eventually
):
    asked = [
        asyncio.create_task(
            http.post(
                f"{router.url}/v1/chat/completions",
                json=chat(f"question {number}", stream=number % 2 == 0, max_tokens=5),
            )
        )
        for number in range(50)
    ]
    await eventually(lambda: held() == 50)
    emitter = await load(slots=4)

    answers = await asyncio.gather(*asked)
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.text.rstrip().endswith("data: [DONE]") for answer in answers[::2])
    assert all(answer.json()["usage"]["completion_tokens"] == 5 for answer in answers[1::2])
    assert emitter.tokens == 250
    assert held() == 0


async def test_progress_is_told_in_comments(router, http, chat, standby, load, eventually):
    asked = asyncio.create_task(
        http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True, max_tokens=2))
    )
    seen: list[str] = []
    exchange = router.dispatcher.watched
    await eventually(lambda: len(exchange) == 1)
    (watched,) = exchange
    for state, detail in (("", ""), ("loading", "loading 40%"), ("loading", "loading 90%")):
        standby.state, standby.detail = state, detail
        wanted = detail or "waiting for a worker"
        await eventually(lambda wanted=wanted: wanted.encode() in watched._progress)
        seen.append(f": mesh {wanted}")
    await load()
    answer = await asked

    comments = [line for line in answer.text.splitlines() if line.startswith(":")]
    assert comments == seen
    assert "".join(
        event["choices"][0]["delta"].get("content") or "" for event in events(answer.text)[:-1]
    )


async def test_the_official_client_does_not_notice(sdk, standby, held, load, unique, eventually):
    stream = asyncio.create_task(
        sdk.chat.completions.create(
            model=unique, messages=[{"role": "user", "content": "hi"}], stream=True, max_tokens=3
        )
    )
    whole = asyncio.create_task(
        sdk.chat.completions.create(
            model=unique, messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
    )
    await eventually(lambda: held() == 2)
    standby.state, standby.detail = "loading", "loading 10%"
    # So long that comments come before the load.
    await asyncio.sleep(0.6)
    await load()

    chunks = [chunk async for chunk in await stream]
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert (await whole).usage.completion_tokens == 3


async def test_an_explanation_comes_later_where_the_stream_began_before(
    router, http, chat, standby, held, load, eventually
):
    asked = asyncio.create_task(
        http.post(
            f"{router.url}/v1/chat/completions",
            json=chat(stream=True, max_tokens=2),
            headers={"X-Mesh-Explain": "1"},
        )
    )
    await eventually(lambda: held() == 1)
    (watched,) = router.dispatcher.watched
    await eventually(lambda: watched._progress)
    await load()
    answer = await asked

    comments = [line for line in answer.text.splitlines() if line.startswith(":")]
    assert "x-mesh-worker" not in answer.headers
    assert comments[0] == ": mesh waiting for a worker"
    assert comments[1].startswith(": mesh worker=worker-2 reason=")
    assert " queue-ms=" in comments[1]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_holds(router, http, chat, standby, stream):
    answer = await http.post(
        f"{router.url}/v1/chat/completions",
        json=chat(stream=stream),
        headers={"x-request-timeout": "0.8"},
    )

    if stream:
        assert events(answer.text)[-1]["error"]["code"] == "deadline_exceeded"
    else:
        assert answer.status_code == 504
    assert len(router.dispatcher.waiting) == 0


@pytest.mark.parametrize("limit", ["held_per_model", "held_in_all"])
async def test_no_more_are_held_than_allowed(
    start_router, connect, http, chat, unique, limit, eventually
):
    router = await start_router(**{limit: 2})
    standby = Standby(await connect("worker-1"), unique)
    await standby.beat()
    await eventually(lambda: router.dispatcher.fleet.hopeful(unique))
    asked = [
        asyncio.create_task(
            http.post(
                f"{router.url}/v1/chat/completions",
                json=chat(),
                headers={"x-request-timeout": "1.5"},
            )
        )
        for _ in range(2)
    ]
    await eventually(lambda: len(router.dispatcher.waiting) == 2)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 503
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert {done.status_code for done in await asyncio.gather(*asked)} == {503, 504} - {503}


async def test_one_that_leaves_does_not_take_the_others_with_it(
    router, start_router, http, chat, standby, held, load, unique, eventually
):
    other = await start_router("router-2")

    def waiting() -> int:
        """As the other router reads it."""
        demand = other.dispatcher.board.demand().get(unique)
        return demand.waiting if demand else 0

    asked = [
        asyncio.create_task(http.post(f"{router.url}/v1/chat/completions", json=chat()))
        for _ in range(3)
    ]
    await eventually(lambda: held() == 3)
    await eventually(lambda: waiting() == 3)
    asked[0].cancel()
    await eventually(lambda: held() == 2)
    await eventually(lambda: waiting() == 2)
    await load()

    assert [answer.status_code for answer in await asyncio.gather(*asked[1:])] == [200, 200]
    await eventually(lambda: waiting() == 0)


async def test_routers_add_up_what_they_count_and_go_on_from_it(
    router, start_router, http, chat, start_worker, unique, eventually
):
    await start_worker()
    second = await start_router("router-2")
    for number in range(12):
        place = (router, second)[number % 2]
        await http.post(f"{place.url}/v1/chat/completions", json=chat())

    def requests(reader: Any) -> float:
        demand = reader.dispatcher.board.demand().get(unique)
        return demand.requests if demand else 0.0

    for reader in (router, second):
        # All twelve are told after 5 s at the latest, less what has decayed by then.
        await eventually(lambda reader=reader: 10.0 < requests(reader) <= 12.0)

    third = await start_router("router-1")
    await eventually(lambda: third.dispatcher.board._opened)
    account = third.dispatcher.demand.ledger.entry(unique, third.dispatcher.board._clock())
    assert 4.5 < account.requests <= 6.0


async def test_an_alias_is_held_and_counted_as_the_model_it_names(
    router, http, standby, held, load, unique, eventually
):
    asked = asyncio.create_task(
        http.post(
            f"{router.url}/v1/chat/completions",
            json={
                "model": f"{unique}-alias",
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 2,
            },
        )
    )
    await eventually(lambda: held() == 1)
    ledger = router.dispatcher.demand.ledger
    assert ledger.entry(unique, 0.0).waiting == 1
    assert ledger.entry(f"{unique}-alias", 0.0) is None
    await load(model=f"{unique}-alias")

    assert (await asked).status_code == 200
    assert ledger.entry(unique, 0.0).waiting == 0


async def test_looking_causes_no_load(router, http, standby, unique):
    listed = (await http.get(f"{router.url}/v1/models")).json()["data"]
    one = (await http.get(f"{router.url}/v1/models/{unique}")).json()
    for path in ("/metrics", "/livez", "/readyz"):
        await http.get(router.url + path)

    assert next(model for model in listed if model["id"] == unique) == one
    assert (one["meta"]["state"], one["meta"]["workers"], one["meta"]["context"]) == (
        "loadable",
        0,
        512,
    )
    assert router.dispatcher.demand.ledger.entry(unique, 0.0) is None


async def test_held_requests_are_a_metric(
    router, http, chat, standby, held, load, unique, eventually
):
    asked = asyncio.create_task(http.post(f"{router.url}/v1/chat/completions", json=chat()))
    await eventually(lambda: held() == 1)

    metrics = (await http.get(f"{router.url}/metrics")).text

    assert f'mesh_router_held{{model="{unique}"}} 1.0' in metrics
    await load()
    assert (await asked).status_code == 200


async def test_those_who_wait_in_vain_are_told(
    router, http, chat, standby, held, eventually, monkeypatch
):
    monkeypatch.setattr(waiting, "HOPELESS", 0.3)
    asked = asyncio.create_task(http.post(f"{router.url}/v1/chat/completions", json=chat()))
    await eventually(lambda: held() == 1)
    standby.state, standby.detail = "failed", "the file is broken"
    answer = await asyncio.wait_for(asked, WAIT)

    assert answer.status_code == 503
    assert "the file is broken" in answer.json()["error"]["message"]


async def test_a_model_that_is_served_but_full_is_not_waited_for(
    router, http, chat, standby, start_worker
):
    async def refuse(job: Any) -> None:
        await job.send(job.busy())

    await start_worker(refuse, name="worker-2")

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 429
