"""How a request finds its worker, and what the client hears when none takes or keeps it."""

import asyncio
import json

import pytest
from scripted_worker import WAIT, hello

from shared.protocol import Accepted, ChatInput, Generate

pytestmark = pytest.mark.nats


def error(answer):
    return answer.json()["error"]


async def test_the_request_reaches_the_worker_whole(router, http, start_worker, chat):
    worker = await start_worker()

    answer = await http.post(
        f"{router.url}/v1/chat/completions",
        json=chat(
            "héllo",
            n=2,
            seed=-1,
            max_completion_tokens=9,
            stop="END",
            temperature=0,
            top_p=0.5,
            logit_bias={"3": -100},
            user="u",
        ),
        headers={"x-request-id": "mine-1", "traceparent": "00-a-b-01", "x-request-timeout": "60"},
    )
    job = await worker.job()
    request = job.request

    assert answer.headers["x-request-id"] == "mine-1"
    assert job.door == "group"
    assert isinstance(request, Generate)
    assert isinstance(request.input, ChatInput)
    assert job.prompt == "héllo"
    assert (request.id, request.traceparent, request.user) == ("mine-1", "00-a-b-01", "u")
    assert (request.n, request.max_tokens, request.stop) == (2, 9, ("END",))
    assert request.sampling.seed == 2**63 - 1
    assert (request.sampling.temperature, request.sampling.top_p) == (0.0, 0.5)
    assert request.sampling.logit_bias == {3: -100.0}


async def test_a_full_worker_outside_the_group_is_reached_by_its_own_door(
    router, http, start_worker, chat
):
    worker = await start_worker()
    await worker.group.leave()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 200
    assert [job.door for job in worker.jobs] == ["direct"]


@pytest.mark.parametrize("reason", ["full", "late"])
async def test_a_busy_worker_is_passed_over_for_the_next(router, http, start_worker, chat, reason):
    async def refuse(job):
        await job.send(job.busy(reason))

    first = await start_worker(refuse, name="worker-1")
    second = await start_worker(name="worker-2", free=0, queued=3)
    await second.group.leave()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())
    attempts = [job.attempt for job in first.jobs] + [job.attempt for job in second.jobs]

    assert answer.status_code == 200
    assert [job.door for job in second.jobs] == ["direct"]
    assert len(set(attempts)) == len(attempts)


async def test_a_queue_far_above_the_mean_is_passed_over(router, http, start_worker, chat):
    # whichever of the two the conversation belongs to
    long = await start_worker(name="worker-1", free=0, queued=9)
    short = await start_worker(name="worker-2", free=0, queued=1)
    await long.group.leave()
    await short.group.leave()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 200
    assert (len(long.jobs), len(short.jobs)) == (0, 1)


async def test_a_worker_that_has_a_queue_after_all_is_left_for_one_with_room(
    router, http, start_worker, chat
):
    async def queue(job):
        if job.worker.name == job.worker.group_of["full"]:
            await job.send(Accepted(job.attempt, job.worker.name, 2))
            await job.cancelled.wait()
        else:
            await hello(job)

    names = {"full": ""}
    workers = [await start_worker(queue, name=f"worker-{number}") for number in (1, 2)]
    for worker in workers:
        worker.group_of = names
    # Learn whose conversation it is, and have that one be full without having said so.
    first = await http.post(f"{router.url}/v1/chat/completions", json=chat())
    names["full"] = next(worker.name for worker in workers if worker.jobs)
    second = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    full, free = sorted(workers, key=lambda worker: worker.name != names["full"])
    assert (first.status_code, second.status_code) == (200, 200)
    assert (len(full.jobs), len(free.jobs)) == (2, 1)
    await asyncio.wait_for(full.jobs[1].cancelled.wait(), WAIT)


async def test_where_all_have_a_queue_it_waits_in_one(router, http, start_worker, chat):
    async def queue(job):
        await job.send(Accepted(job.attempt, job.worker.name, 1))
        await job.send(job.delta("hi"), job.done(), job.end())

    for number in (1, 2):
        await start_worker(queue, name=f"worker-{number}")

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", ["full", "late"])
async def test_all_busy_is_429_with_the_shortest_wait(
    router, http, start_worker, chat, stream, reason
):
    async def refuse(job):
        await job.send(job.busy(reason, 3.2 if job.worker.name == "worker-1" else 7.0))

    await start_worker(refuse, name="worker-1")
    await start_worker(refuse, name="worker-2")

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=stream))

    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "4"
    assert error(answer)["code"] == "queue_full"


async def test_a_worker_that_drains_counts_as_nobody(router, http, start_worker, chat):
    async def refuse(job):
        await job.send(job.busy(reason="draining"))

    await start_worker(refuse)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 503


async def test_an_unknown_model_is_404_and_tells_what_is_served(router, http, start_worker, unique):
    await start_worker()

    answer = await http.post(
        f"{router.url}/v1/chat/completions",
        json={"model": "no/such:model", "messages": [{"role": "user", "content": "hi"}]},
    )

    assert answer.status_code == 404
    assert error(answer)["code"] == "model_not_found"
    assert error(answer)["param"] == "model"
    assert unique in error(answer)["message"]


async def test_a_known_model_without_workers_is_503(router, http, start_worker, chat):
    worker = await start_worker()
    await http.get(f"{router.url}/v1/models")
    await worker.leave()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 503
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert error(answer)["code"] == "unavailable"


async def test_a_request_for_a_model_that_is_loading_is_held(
    router, http, start_worker, chat, eventually
):
    worker = await start_worker()
    await worker.group.leave()
    worker.beating = False
    await worker.beat("loading", model_state="loading")
    await worker.bus.barrier()
    asked = asyncio.create_task(http.post(f"{router.url}/v1/chat/completions", json=chat()))
    await eventually(lambda: len(router.dispatcher.waiting) == 1)
    await worker.beat()

    assert (await asked).status_code == 200


async def test_a_worker_that_falls_silent_fails_its_requests(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        await job.send(job.delta("Hel"))

    worker = await start_worker(script)
    worker.beating = False

    whole, stream = await asyncio.gather(
        http.post(f"{router.url}/v1/chat/completions", json=chat()),
        http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True)),
    )

    assert whole.status_code == 502
    assert error(whole)["code"] == "worker_failed"
    assert json.loads(stream.text.strip().rsplit("data: ")[-1])["error"]["code"] == "worker_failed"


async def test_a_worker_that_says_goodbye_fails_its_requests(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        await job.worker.beat("gone")

    worker = await start_worker(script)
    worker.beating = False

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 502


async def test_a_worker_that_never_answers_is_left_and_later_cancelled(
    start_router, http, start_worker, chat
):
    router = await start_router(accept_timeout=0.3)
    answered = asyncio.Event()

    async def deaf(job):
        await answered.wait()
        await job.accept()

    first = await start_worker(deaf, name="worker-1")
    # full, so that the conversation goes to the first even if it belongs to the second
    second = await start_worker(name="worker-2", free=0, queued=1)
    await second.group.leave()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())
    answered.set()

    assert answer.status_code == 200
    assert [job.door for job in second.jobs] == ["direct"]
    assert first.jobs
    for job in first.jobs:
        await asyncio.wait_for(job.cancelled.wait(), WAIT)


async def test_the_deadline_is_504_and_frees_the_worker(router, http, start_worker, chat):
    async def script(job):
        await job.accept()

    worker = await start_worker(script)

    answer = await http.post(
        f"{router.url}/v1/chat/completions", json=chat(), headers={"x-request-timeout": "0.3"}
    )

    assert answer.status_code == 504
    assert error(answer)["code"] == "deadline_exceeded"
    await asyncio.wait_for(worker.jobs[0].cancelled.wait(), WAIT)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "1e9"])
async def test_a_wrong_timeout_is_400(router, http, chat, value):
    answer = await http.post(
        f"{router.url}/v1/chat/completions", json=chat(), headers={"x-request-timeout": value}
    )

    assert answer.status_code == 400
    assert error(answer)["param"] == "X-Request-Timeout"


async def test_a_stall_in_mid_answer_is_noticed(start_router, http, start_worker, chat):
    router = await start_router(stall_timeout=0.3)

    async def script(job):
        await job.accept()
        await job.send(job.delta("Hel"))

    worker = await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.status_code == 502
    await asyncio.wait_for(worker.jobs[0].cancelled.wait(), WAIT)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_of_two_mebibytes_passes_in_chunks(router, http, start_worker, chat, stream):
    worker = await start_worker()
    prompt = "0123456789abcdef" * (2 * 1024 * 1024 // 16)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(prompt, stream=stream))

    assert answer.status_code == 200
    assert worker.jobs[0].prompt == prompt


async def test_a_request_beyond_nats_limit_is_413_that_names_it(router, http, start_worker, chat):
    worker = await start_worker()

    answer = await http.post(
        f"{router.url}/v1/chat/completions", json=chat("x" * (9 * 1024 * 1024))
    )

    assert answer.status_code == 413
    assert str(8 * 1024 * 1024) in error(answer)["message"]
    assert worker.jobs == []
    assert (await http.post(f"{router.url}/v1/chat/completions", json=chat())).status_code == 200


async def test_a_body_beyond_the_limit_is_413_that_names_it(start_router, http, chat):
    router = await start_router(max_body=1000)

    async def pieces():
        for _ in range(20):
            yield b"x" * 100

    known = await http.post(f"{router.url}/v1/chat/completions", json=chat("x" * 2000))
    unknown = await http.post(
        f"{router.url}/v1/chat/completions",
        content=pieces(),
        headers={"content-type": "application/json"},
    )

    for answer in (known, unknown):
        assert answer.status_code == 413
        assert "1000 bytes" in error(answer)["message"]


async def test_prompts_fan_out_and_one_failure_fails_all(router, http, start_worker, unique):
    async def script(job):
        if job.prompt == "bad":
            await job.accept()
            await job.send(job.failure("invalid_value", "no", param="prompt"))
        elif job.prompt == "hang":
            await job.accept()
        else:
            await hello(job)

    worker = await start_worker(script)

    good = await http.post(
        f"{router.url}/v1/completions",
        json={"model": unique, "prompt": ["a", "b"], "n": 2, "echo": True},
    )
    bad = await http.post(
        f"{router.url}/v1/completions", json={"model": unique, "prompt": ["hang", "bad"]}
    )

    assert [c["index"] for c in good.json()["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in good.json()["choices"]] == ["aHello", "aHello", "bHello", "bHello"]
    assert good.json()["usage"]["prompt_tokens"] == 14
    assert bad.status_code == 400
    hanging = next(job for job in worker.jobs if job.prompt == "hang")
    await asyncio.wait_for(hanging.cancelled.wait(), WAIT)
