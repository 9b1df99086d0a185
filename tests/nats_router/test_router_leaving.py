"""Clients that leave: the worker hears of it, whatever they waited for."""

import asyncio

import pytest
from scripted_worker import WAIT

pytestmark = pytest.mark.nats


@pytest.mark.parametrize("route", ["chat/completions", "completions", "embeddings"])
async def test_a_client_that_leaves_frees_the_worker(router, start_worker, unique, route, http):
    async def script(job):
        await job.accept()

    worker = await start_worker(script)
    body = {
        "model": unique,
        "messages": [{"role": "user", "content": "hi"}],
        "prompt": "hi",
        "input": "hi",
    }
    asked = asyncio.create_task(http.post(f"{router.url}/v1/{route}", json=body))
    job = await worker.job()
    asked.cancel()

    await asyncio.wait_for(job.cancelled.wait(), WAIT)


async def test_a_client_that_leaves_a_stream_frees_the_worker(
    router, http, start_worker, chat, eventually
):
    async def script(job):
        await job.accept()
        await job.send(job.delta("Hel"))

    worker = await start_worker(script)
    async with http.stream(
        "POST", f"{router.url}/v1/chat/completions", json=chat(stream=True)
    ) as answer:
        async for line in answer.aiter_lines():
            if "Hel" in line:
                break

    await asyncio.wait_for(worker.jobs[0].cancelled.wait(), WAIT)
    await eventually(router.idle)
    assert len(router.dispatcher.inbox) == 0


async def test_a_client_that_leaves_before_acceptance_still_frees_the_worker(
    router, http, start_worker, chat
):
    left = asyncio.Event()

    async def script(job):
        await left.wait()
        await job.accept()

    worker = await start_worker(script)
    asked = asyncio.create_task(http.post(f"{router.url}/v1/chat/completions", json=chat()))
    job = await worker.job()
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await asyncio.sleep(0.1)
    left.set()

    await asyncio.wait_for(job.cancelled.wait(), WAIT)


async def test_finished_requests_are_not_cancelled(router, http, start_worker, chat):
    worker = await start_worker()

    for stream in (False, True):
        await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=stream))
    await router.dispatcher.bus.barrier()
    await worker.bus.barrier()

    assert worker.cancels == []
