"""Answers that outlive their workers: lost, silent, failed, and what is told when it cannot be."""

import asyncio

import pytest
from test_router_streaming import events

from router.fleet import EXPIRY
from shared.protocol import Embed, Resumed

pytestmark = pytest.mark.nats


async def gone(job):
    job.worker.beating = False
    await job.worker.beat("gone")


async def silent(job):
    job.worker.beating = False


async def stalled(job):
    pass


async def failed(job):
    await job.send(job.failure("worker_failed", "the engine was killed", lost=True))


async def gap(job):
    job.delta("lost on the way")
    await job.send(job.delta("and another"))


async def anew(job):
    job.worker.beating = False
    await job.worker.beat(started=2.0)


async def reconnected(job):
    job.worker.beating = False
    await job.worker.beat(losses=1)


LOSSES = {
    "lost": gone,
    "stalled": stalled,
    "failed": failed,
    "gap": gap,
}


def until(loss, *said, rest=("!",)):
    """A script: first attempts say something and are lost, others say the rest."""

    async def script(job):
        await job.accept()
        if job.request.resume:
            await job.send(*(job.delta(text) for text in rest), job.done(), job.end())
        else:
            await job.send(*(job.delta(text) for text in said))
            await loss(job)

    return script


async def two(start_worker, script, **state):
    return [await start_worker(script, name=f"worker-{number}", **state) for number in (1, 2)]


def text_of(chunks):
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


@pytest.mark.parametrize("reason", LOSSES)
async def test_a_stream_goes_on_elsewhere(start_router, http, start_worker, chat, reason):
    router = await start_router(stall_timeout=0.4)
    workers = await two(start_worker, until(LOSSES[reason], "Hel", "lo", rest=(" you", "!")))

    answer = await http.post(
        f"{router.url}/v1/chat/completions",
        json=chat(stream=True, stream_options={"include_usage": True}),
    )
    *chunks, done = events(answer.text)

    assert done == "[DONE]"
    assert text_of(chunks) == "Hello you!"
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert chunks[-1]["timings"]["resumed"] == 1
    assert len({chunk["id"] for chunk in chunks}) == 1
    jobs = [job for worker in workers for job in worker.jobs]
    (first,) = [job for job in jobs if not job.request.resume]
    (second,) = [job for job in jobs if job.request.resume]
    assert second.request.resume == (Resumed((0, 1)),)
    assert second.attempt != first.attempt
    assert second.request.sampling == first.request.sampling
    assert second.request.id == first.request.id
    if reason != "gap":
        assert second.worker is not first.worker
    metrics = (await http.get(f"{router.url}/metrics")).text
    assert f'mesh_resumes_total{{model="{first.request.model}",reason="{reason}"}} 1.0' in metrics


@pytest.mark.parametrize("loss", [silent, anew, reconnected])
async def test_a_worker_that_falls_silent_or_begins_anew_is_left(
    router, http, start_worker, chat, loss
):
    workers = await two(start_worker, until(loss, "Hel"))

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hel!"
    assert [len(worker.jobs) for worker in workers] == [1, 1]


async def test_a_worker_without_a_connection_is_left_before_its_beats_are_missed(
    start_router, http, start_worker, chat
):
    router = await start_router()

    async def cut(job):
        for subscription in job.worker._subscriptions:
            await subscription.leave()

    # It beats on, so that only its silence to pings can tell.
    workers = await two(start_worker, until(cut, "Hel"))
    await asyncio.sleep(EXPIRY + 0.2)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hel!"
    assert [len(worker.jobs) for worker in workers] == [1, 1]


async def test_the_only_worker_may_lose_its_connection_for_a_moment(
    start_router, http, start_worker, chat
):
    router = await start_router()

    async def cut(job):
        for subscription in job.worker._subscriptions:
            await subscription.leave()
        await asyncio.sleep(1.5)
        await job.send(job.delta("lo"), job.done(), job.end())

    worker = await start_worker(until(cut, "Hel"))
    await asyncio.sleep(EXPIRY + 0.2)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
    assert len(worker.jobs) == 1


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
async def test_whole_answers_are_told_too(router, http, start_worker, unique, route):
    await two(start_worker, until(failed, "Hel"))
    body = {"model": unique, "messages": [{"role": "user", "content": "x"}], "prompt": "x"}

    answer = await http.post(f"{router.url}/v1/{route}", json=body)

    (choice,) = answer.json()["choices"]
    assert (choice.get("text") or choice["message"]["content"]) == "Hel!"
    timings = answer.json()["timings"]
    assert timings["resumed"] == 1


async def test_what_was_not_resumed_does_not_say_so(router, http, start_worker, chat):
    await start_worker()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert "resumed" not in answer.json()["timings"]


async def test_late_frames_of_the_old_attempt_are_dropped(router, http, start_worker, chat):
    old = []

    async def script(job):
        await job.accept()
        if not job.request.resume:
            await job.send(job.delta("Hel"))
            old.append(job)
            await failed(job)
            return
        (late,) = old
        await job.send(job.delta("lo"))
        await late.send(late.delta("XX"), late.delta("YY"), late.done(), late.end())
        await job.worker.bus.publish(job.reply, b"\x90")
        await job.send(job.delta("!"), job.done(), job.end())

    await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hello!"


async def test_each_choice_goes_on_where_it_was_and_what_is_done_stays_done(
    router, http, start_worker, chat
):
    async def script(job):
        await job.accept()
        if not job.request.resume:
            await job.send(job.delta("a", 0), job.delta("x", 1), job.delta("y", 1))
            await job.send(job.done(1))
            await failed(job)
        else:
            await job.send(job.delta("b", 0), job.done(0), job.done(2), job.end())

    workers = await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(n=3))

    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert texts == ["ab", "xy", ""]
    (second,) = [job for w in workers for job in w.jobs if job.request.resume]
    assert second.request.resume == (Resumed((0,)), Resumed(done=2), Resumed())
    assert answer.json()["usage"]["completion_tokens"] == 4


async def test_text_after_the_last_token_is_not_told_twice(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        if not job.request.resume:
            await job.send(job.delta("Hel"), job.delta("lo", tokens=0))
            await failed(job)
        else:
            await job.send(job.delta("lo", tokens=0), job.done(), job.end())

    await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hello"


async def test_a_loss_before_the_first_token_is_a_try_elsewhere(
    router, http, start_worker, chat, unique
):
    seen = []

    async def script(job):
        seen.append(job)
        await job.accept()
        if len(seen) % 2:
            await failed(job)
        elif isinstance(job.request, Embed):
            await job.send(job.vectors(b"\0\0\x80?"))
        else:
            assert job.request.resume == ()
            await job.send(job.delta("fine"), job.done(), job.end())

    await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())
    vectors = await http.post(f"{router.url}/v1/embeddings", json={"model": unique, "input": "hi"})

    assert answer.json()["choices"][0]["message"]["content"] == "fine"
    assert "resumed" not in answer.json()["timings"]
    assert vectors.json()["data"][0]["embedding"] == [1.0]
    assert len(seen) == 4


async def test_the_deadline_ends_a_resumed_answer_too(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        if not job.request.resume:
            await job.send(job.delta("Hel"))
            await failed(job)

    workers = await two(start_worker, script)

    answer = await http.post(
        f"{router.url}/v1/chat/completions",
        json=chat(stream=True),
        headers={"x-request-timeout": "0.8"},
    )

    assert events(answer.text)[-1]["error"]["code"] == "deadline_exceeded"
    (second,) = [job for w in workers for job in w.jobs if job.request.resume]
    await asyncio.wait_for(second.cancelled.wait(), 5)


async def test_a_long_answer_is_resumed_in_chunks(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        if not job.request.resume:
            await job.send(job.delta("x", tokens=200_000))
            await failed(job)
        else:
            await job.send(job.delta("!"), job.done(), job.end())

    workers = await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "x!"
    (second,) = [job for w in workers for job in w.jobs if job.request.resume]
    assert len(second.request.resume[0].tokens) == 200_000


async def test_a_worker_that_cannot_resume_begins_anew_and_nothing_comes_twice(
    router, http, start_worker, chat
):
    """One of an older version: it says all again, from the first token on."""

    async def script(job):
        job._counts.clear()
        await job.accept()
        if not job.request.resume:
            await job.send(job.delta("Hel"), job.delta("lo"))
            await failed(job)
        else:
            await job.send(*(job.delta(text) for text in ("Hel", "lo", "!")), job.done())
            await job.send(job.end())

    await two(start_worker, script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hello!"
