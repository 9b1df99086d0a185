"""Workers that fail before the first token: tried elsewhere, within a budget, then left alone."""

import time

import pytest
from scripted_worker import hello

from router.breakers import FAULTS_IN_A_ROW, LONGEST_REST

pytestmark = pytest.mark.nats

EXPLAIN = {"x-mesh-explain": "1"}


def error(answer):
    return answer.json()["error"]


def failing(code="internal_error", **more):
    async def script(job):
        await job.accept()
        await job.send(job.failure(code, "something broke", **more))

    return script


async def metric(http, router, name):
    text = (await http.get(f"{router.url}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


async def ask(http, router, body, **headers):
    return await http.post(
        f"{router.url}/v1/chat/completions", json=body, headers=EXPLAIN | headers
    )


@pytest.fixture
async def pair(router, start_worker):
    """One that fails each request, and a good one."""
    bad = await start_worker(failing(), name="worker-1")
    good = await start_worker(name="worker-2")
    return bad, good


async def until_bad_is_asked(http, router, chat, bad, times):
    """Conversations differ, so that some begin at the bad one; all are answered."""
    number = 0
    while len(bad.jobs) < times:
        number += 1
        answer = await ask(http, router, chat(f"question {number}"))
        assert answer.status_code == 200
        assert answer.headers["x-mesh-worker"] == "worker-2"
        assert number < 500


async def test_an_error_of_the_worker_is_tried_elsewhere(router, http, chat, pair):
    await until_bad_is_asked(http, router, chat, pair[0], 1)

    retries = await metric(http, router, "mesh_router_retries_total")
    assert retries == {
        'mesh_router_retries_total{outcome="made"}': 1,
        'mesh_router_retries_total{outcome="refused"}': 0,
    }


@pytest.mark.parametrize("code", ["invalid_value", "context_length_exceeded", "deadline_exceeded"])
async def test_what_is_no_fault_of_the_worker_is_not(router, http, start_worker, chat, code):
    workers = [await start_worker(failing(code), name=f"worker-{n}") for n in (1, 2)]

    for number in range(4 * FAULTS_IN_A_ROW):
        answer = await ask(http, router, chat(f"question {number}"))
        assert error(answer)["code"] == code

    assert sum(len(worker.jobs) for worker in workers) == 4 * FAULTS_IN_A_ROW
    assert router.dispatcher.breakers.states() == {}


async def test_an_error_of_the_only_worker_is_told_at_once(router, http, start_worker, chat):
    worker = await start_worker(failing())

    answer = await ask(http, router, chat())

    assert answer.status_code == 500
    assert len(worker.jobs) == 1


async def test_a_worker_that_fails_and_fails_is_left_alone_and_tried_again(
    router, http, chat, pair, monkeypatch
):
    monkeypatch.setattr("router.breakers.FIRST_REST", LONGEST_REST)
    bad, good = pair
    await until_bad_is_asked(http, router, chat, bad, FAULTS_IN_A_ROW)
    asked = len(bad.jobs)
    opened = await metric(http, router, "mesh_router_breaker")
    assert opened == {
        'mesh_router_breaker_open{worker="worker-1"}': 1,
        "mesh_router_breakers_opened_total": 1,
    }

    for number in range(30):
        answer = await ask(http, router, chat(f"another {number}"))
        assert answer.headers["x-mesh-worker"] == "worker-2"
        assert answer.headers["x-mesh-open-breakers"] == "1"
    assert len(bad.jobs) == asked

    bad.script = hello
    later = time.monotonic() + LONGEST_REST
    monkeypatch.setattr(router.dispatcher.breakers, "_clock", lambda: later)
    assert router.dispatcher.breakers.states() == {"worker-1": "half_open"}
    number = 0
    while len(bad.jobs) == asked:
        number += 1
        answer = await ask(http, router, chat(f"third {number}"))
        assert answer.status_code == 200
        assert number < 500
    assert "x-mesh-open-breakers" not in answer.headers
    assert answer.headers["x-mesh-worker"] == "worker-1"
    assert router.dispatcher.breakers.states() == {}
    assert good.jobs


async def test_nobody_is_refused_because_all_breakers_are_open(
    router, http, start_worker, chat, unique
):
    workers = [await start_worker(failing(), name=f"worker-{n}") for n in (1, 2)]
    number = 0
    while len(router.dispatcher.breakers.states()) < 2:
        number += 1
        answer = await ask(http, router, chat(f"question {number}"))
        assert answer.status_code == 500
        assert number < 500
    for worker in workers:
        worker.script = hello

    answer = await ask(http, router, chat())

    assert answer.status_code == 200


async def test_retries_have_a_budget_for_the_whole_router(
    start_router, http, start_worker, chat, monkeypatch
):
    monkeypatch.setattr("router.retrying.SAVED", 3.0)
    monkeypatch.setattr("router.retrying.FLOOR", 0.0)
    router = await start_router(retry_share=0.0)
    workers = [
        await start_worker(failing("worker_failed", lost=True), name=f"worker-{n}") for n in (1, 2)
    ]

    answers = [await ask(http, router, chat(f"question {number}")) for number in range(4)]

    assert {answer.status_code for answer in answers} == {502}
    assert "not tried again" in error(answers[-1])["message"]
    assert sum(len(worker.jobs) for worker in workers) == 4 + 3
    retries = await metric(http, router, "mesh_router_retries_total")
    assert retries['mesh_router_retries_total{outcome="refused"}'] == 3


async def test_an_answer_that_has_begun_goes_on_without_budget(
    start_router, http, start_worker, chat, monkeypatch
):
    monkeypatch.setattr("router.retrying.SAVED", 0.0)
    monkeypatch.setattr("router.retrying.FLOOR", 0.0)
    router = await start_router(retry_share=0.0)

    async def breaks(job):
        if job.request.resume:
            await hello(job)
            return
        await job.accept()
        await job.send(job.delta("Well, "))
        await job.send(job.failure("worker_failed", "the engine died", lost=True))

    for n in (1, 2):
        await start_worker(breaks, name=f"worker-{n}")

    answer = await ask(http, router, chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Well, Hello"


async def test_a_fleet_without_room_is_not_asked_in_full(
    router, http, start_worker, chat, monkeypatch
):
    monkeypatch.setattr("router.search.MOST_REFUSALS", 2)
    asked: list[str] = []

    async def full(job):
        asked.append(job.worker.name)
        await job.send(job.busy())

    for n in (1, 2, 3):
        await start_worker(full, name=f"worker-{n}")

    answer = await ask(http, router, chat())

    assert answer.status_code == 429
    assert len(asked) == len(set(asked)) == 2
