"""Answers that were lost where there is nobody to go on at once: waited for, or given up."""

import asyncio

import msgspec
import pytest
from test_router_resuming import failed, gone, text_of, two, until
from test_router_streaming import events

pytestmark = pytest.mark.nats


@pytest.mark.parametrize("resumes", [0, 2])
async def test_there_is_an_end_to_going_on(start_router, http, start_worker, chat, resumes):
    router = await start_router(resumes=resumes)

    async def script(job):
        await job.accept()
        await job.send(job.delta("x"))
        await failed(job)

    workers = await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    seen = events(answer.text)

    assert seen[-1]["error"]["code"] == "worker_failed"
    assert "[DONE]" not in seen
    assert text_of(seen[:-1]) == "x" * (resumes + 1)
    assert sum(len(worker.jobs) for worker in workers) == resumes + 1
    assert len(router.dispatcher.inbox) == 0


async def test_where_nobody_is_left_the_stream_ends_with_an_error(router, http, start_worker, chat):
    await start_worker(until(gone, "Hel"))

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    seen = events(answer.text)

    assert text_of(seen[:-1]) == "Hel"
    error = seen[-1]["error"]
    assert error["code"] == "worker_failed"
    assert error["message"].startswith("The worker has left before the answer was complete. It ")


async def test_the_only_worker_may_go_on_after_its_engine_died(router, http, start_worker, chat):
    worker = await start_worker(until(failed, "Hel"))

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hel!"
    assert len(worker.jobs) == 2


async def test_a_full_worker_is_waited_for_and_the_client_is_told(
    start_router, http, start_worker, chat
):
    router = await start_router(ping_interval=0.2)
    first = await start_worker(until(gone, "Hel"), name="worker-1")

    async def full(job):
        if len(second.jobs) == 1:
            await job.send(job.busy())
        else:
            await until(gone)(job)

    second = await start_worker(full, name="worker-2", free=0)
    await second.group.leave()

    async def make_room():
        await second.job()
        await asyncio.sleep(0.7)
        second.state = msgspec.structs.replace(second.state, free=1)

    room = asyncio.create_task(make_room())
    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    await room
    *chunks, done = events(answer.text)

    assert done == "[DONE]"
    assert text_of(chunks) == "Hel!"
    assert ": mesh waiting for a worker" in answer.text or ": ping" in answer.text
    assert len(first.jobs) == 1
    assert len(second.jobs) == 2


async def test_a_model_that_is_being_loaded_is_waited_for(router, http, start_worker, chat):
    first = await start_worker(until(gone, "Hel"), name="worker-1")
    second = await start_worker(until(gone), name="worker-2", state="loading", free=0)
    await second.group.leave()

    async def load():
        await first.job()
        await asyncio.sleep(1.0)
        second.state = msgspec.structs.replace(second.state, state="ready", free=4)

    loading = asyncio.create_task(load())
    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    await loading
    *chunks, done = events(answer.text)

    assert done == "[DONE]"
    assert text_of(chunks) == "Hel!"
    assert ": mesh loading" in answer.text
