"""Why a request went where it went, and what `auto` stands for."""

import pytest

from router.automatic import choose_model
from router.fleet import Fleet
from shared.presence import Beat, LoadableModel, ModelState

pytestmark = pytest.mark.nats

ASK = {"X-Mesh-Explain": "1"}


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_tell_worker_reason_candidates_distance_and_wait(
    router, http, start_worker, chat, stream
):
    for number in (1, 2):
        await start_worker(name=f"worker-{number}")

    answer = await http.post(
        f"{router.url}/v1/chat/completions", json=chat(stream=stream), headers=ASK
    )

    assert answer.status_code == 200
    assert answer.headers["x-mesh-worker"] in ("worker-1", "worker-2")
    assert answer.headers["x-mesh-reason"] == "affinity"
    assert answer.headers["x-mesh-candidates"] == "2"
    assert 0 <= float(answer.headers["x-mesh-rtt-ms"]) < 80
    assert float(answer.headers["x-mesh-queue-ms"]) >= (0 if stream else 1)


async def test_one_worker_is_reached_through_the_group(router, http, start_worker, chat):
    await start_worker()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(), headers=ASK)

    assert answer.headers["x-mesh-worker"] == "worker-1"
    assert answer.headers["x-mesh-reason"] == "queue_group"
    assert answer.headers["x-mesh-candidates"] == "1"


async def test_embeddings_have_no_conversation(router, http, start_worker, unique):
    await start_worker(name="worker-1", free=1)
    await start_worker(name="worker-2", free=3)

    answer = await http.post(
        f"{router.url}/v1/embeddings", json={"model": unique, "input": "hi"}, headers=ASK
    )

    assert answer.headers["x-mesh-worker"] == "worker-2"
    assert answer.headers["x-mesh-reason"] == "least_loaded"


@pytest.mark.parametrize("asked", [{}, {"X-Mesh-Explain": "0"}])
async def test_who_does_not_ask_is_not_told(router, http, start_worker, chat, asked):
    await start_worker()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(), headers=asked)

    assert [name for name in answer.headers if name.startswith("x-mesh")] == []


async def test_a_place_in_the_workers_queue_is_told(router, http, start_worker, chat):
    async def queue(job):
        from shared.protocol import Accepted

        await job.send(Accepted(job.attempt, job.worker.name, 3))
        await job.send(job.delta("hi"), job.done(), job.end())

    await start_worker(queue)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(), headers=ASK)

    assert answer.headers["x-mesh-queue-position"] == "3"


async def test_auto_is_answered_by_a_model_that_is_served(router, http, start_worker, unique):
    await start_worker()
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}

    chat = await http.post(f"{router.url}/v1/chat/completions", json=body)
    text = await http.post(f"{router.url}/v1/completions", json={"model": "auto", "prompt": "hi"})
    vector = await http.post(f"{router.url}/v1/embeddings", json={"model": "auto", "input": "hi"})

    # Other tests' models may still be remembered, but none of them is served.
    assert [answer.status_code for answer in (chat, text, vector)] == [200, 200, 200]
    assert {answer.json()["model"] for answer in (chat, text, vector)} == {unique}


async def test_auto_without_any_worker_is_503(router, http):
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}

    assert (await http.post(f"{router.url}/v1/chat/completions", json=body)).status_code == 503


# The rules of `auto`


def fleet(*workers: tuple[str, tuple[ModelState, ...], tuple[LoadableModel, ...]]) -> Fleet:
    made = Fleet()
    for name, models, able in workers:
        made.observe(Beat(name, "ready", 1, models, able=able), 0.0)
    return made


def served(name: str, size: int, free: int = 4, **more) -> ModelState:
    state = {"state": "ready", "slots": 4, "context": 4096} | more
    return ModelState(name, size=size, free=free, **state)


def able(name: str, size: int, **more) -> LoadableModel:
    return LoadableModel(name, size, 4096, 4, size, 1, **more)


@pytest.mark.parametrize(
    ("models", "loadable", "wanted", "question"),
    [
        ((served("s", 1), served("l", 9)), (), "l", {}),
        ((served("s", 1), served("l", 9, free=0)), (), "s", {}),
        ((served("s", 1, free=0), served("l", 9, free=0)), (), "l", {}),
        ((served("a", 5, free=1), served("b", 5, free=3)), (), "b", {}),
        ((served("b", 5), served("a", 5)), (), "a", {}),
        ((served("s", 1), served("l", 9, context=512)), (), "s", {"tokens": 1000}),
        ((served("s", 1), served("l", 9, embeddings=False)), (), "s", {"embeddings": True}),
        ((served("l", 9, embeddings=False),), (), "auto", {"embeddings": True}),
        ((served("s", 1), served("l", 9, state="loading", free=0)), (able("x", 99),), "s", {}),
        ((served("l", 9, state="loading", free=0),), (able("x", 99),), "l", {}),
        ((served("f", 9, state="failed", free=0),), (able("x", 9), able("y", 8)), "y", {}),
        ((), (), "auto", {}),
        ((served("auto", 1), served("l", 9)), (), "auto", {}),
    ],
)
def test_auto_chooses_by_the_stated_rules(models, loadable, wanted, question):
    assert choose_model(fleet(("w", models, loadable)), **question) == wanted
