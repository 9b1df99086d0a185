"""Streams that their worker hands back, as one that drains does."""

import asyncio

import pytest
from test_router_resuming import failed, two

from shared.protocol import Accepted

pytestmark = pytest.mark.nats


async def handed_back(job, *meanwhile):
    """Offer the attempt, and go on until it is taken."""
    await job.send(job.handback())
    for text in meanwhile:
        await job.send(job.delta(text))


def draining(said, meanwhile, other):
    """Scripts of a worker that hands its attempts back, and of the others."""

    async def script(job):
        if job.request.resume:
            await other(job)
            return
        await job.accept()
        await job.send(*(job.delta(text) for text in said))
        await handed_back(job, *meanwhile)

    return script


async def takes(job):
    await job.accept()
    await job.send(job.delta("!"), job.done(), job.end())


async def test_a_stream_that_is_handed_back_goes_on_elsewhere(
    router, http, start_worker, chat, unique
):
    workers = await two(start_worker, draining(("Hel", "lo"), ("XX", "YY"), takes))

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    message = answer.json()["choices"][0]["message"]["content"]
    (first,) = [job for w in workers for job in w.jobs if not job.request.resume]
    (second,) = [job for w in workers for job in w.jobs if job.request.resume]
    # What the first said before it was asked elsewhere may count, what it said later does not.
    known = len(second.request.resume[0].tokens)
    assert message == "".join(("Hel", "lo", "XX", "YY")[:known]) + "!"
    assert known >= 2
    assert second.worker is not first.worker
    await asyncio.wait_for(first.cancelled.wait(), 5)
    metrics = (await http.get(f"{router.url}/metrics")).text
    assert f'mesh_resumes_total{{model="{unique}",reason="handed_back"}} 1.0' in metrics


async def refuses(job):
    await job.send(job.busy("draining"))


async def queues(job):
    await job.send(Accepted(job.attempt, job.worker.name, 1))


async def hangs(job):
    pass


@pytest.mark.parametrize("other", [refuses, queues, hangs])
async def test_where_nobody_takes_it_at_once_it_stays_and_nothing_is_lost(
    router, http, start_worker, chat, other
):
    async def script(job):
        if job.request.resume:
            await other(job)
            asked.set()
            return
        await job.accept()
        await job.send(job.delta("Hel"))
        await handed_back(job, "lo", " you")
        await asked.wait()
        await job.send(job.delta("!"), job.done(), job.end())

    asked = asyncio.Event()
    workers = await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hello you!"
    assert "resumed" not in answer.json()["timings"]
    (second,) = [job for w in workers for job in w.jobs if job.request.resume]
    if other is queues:
        await asyncio.wait_for(second.cancelled.wait(), 5)


@pytest.mark.parametrize("alone", [True, False])
async def test_without_a_free_slot_elsewhere_an_offer_is_not_taken(
    start_router, http, start_worker, chat, alone
):
    router = await start_router(resumes=0 if not alone else 3)

    async def script(job):
        await job.accept()
        await job.send(job.delta("Hel"))
        await handed_back(job, "lo")
        await job.send(job.delta("!"), job.done(), job.end())

    workers = [await start_worker(script)]
    if not alone:
        workers.append(await start_worker(script, name="worker-2"))

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hello!"
    assert sum(len(worker.jobs) for worker in workers) == 1


async def test_a_worker_that_dies_while_it_hands_back_is_a_loss(router, http, start_worker, chat):
    async def script(job):
        if not job.request.resume:
            await job.accept()
            await job.send(job.delta("Hel"))
            await handed_back(job)
            await failed(job)
        elif len([j for w in workers for j in w.jobs]) == 2:
            await refuses(job)
        else:
            await takes(job)

    workers = []
    workers += await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hel!"


async def test_a_client_that_leaves_during_a_handover_frees_both_workers(
    router, http, start_worker, chat, eventually
):
    async def script(job):
        if not job.request.resume:
            await job.accept()
            await job.send(job.delta("Hel"))
            await handed_back(job)
        else:
            asked.set()
            await leave.wait()
            await job.accept()

    asked, leave = asyncio.Event(), asyncio.Event()
    workers = await two(start_worker, script)
    request = asyncio.create_task(
        http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    )
    await asyncio.wait_for(asked.wait(), 5)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await eventually(router.idle)
    leave.set()

    for job in [job for w in workers for job in w.jobs]:
        await asyncio.wait_for(job.cancelled.wait(), 5)
    await eventually(lambda: len(router.dispatcher.inbox) == 0)
