"""Clients that lose their connection and read on through another router, over a real broker."""

import json

import pytest

from shared.protocol import Had, Resumed
from shared.token_check import extend_check

pytestmark = pytest.mark.nats

PIECES = ("Once", " upon", "", " a", " time", ".")
READABLE = {"X-Mesh-Resumable": "1"}


async def tells(job):
    """As an engine that has kept nothing: tokens that the client has come without their text."""
    reading = job.request.reading
    had = reading.had if reading is not None else ()
    await job.accept()
    for choice in range(job.request.n):
        mine = had[choice] if had else Had()
        if mine.done:
            continue
        before = job.request.resume[choice].tokens if job.request.resume else ()
        for index, piece in enumerate(PIECES):
            if index >= len(before):
                await job.send(job.delta(piece if index >= mine.count else "", choice))
        await job.send(job.done(choice))
    await job.send(job.end(completion=len(PIECES) * job.request.n))


async def read(http, url, body, *, most=None, route="chat/completions", **headers):
    """The events that come, at most so many; then the connection is cut."""
    events = []
    async with http.stream("POST", f"{url}/v1/{route}", json=body, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        mine = {}
        async for line in answer.aiter_lines():
            if line:
                name, _, value = line.partition(": ")
                mine[name] = value
                continue
            if "data" in mine:
                events.append(mine)
            mine = {}
            if len(events) == most:
                break
    return events


def text_of(events, choice=0):
    chunks = [json.loads(event["data"]) for event in events if event["data"] != "[DONE]"]
    mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice]
    return "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in mine)


async def test_without_being_asked_for_there_are_no_ids(router, http, start_worker, chat):
    worker = await start_worker(tells)
    events = await read(http, router.url, chat(stream=True))

    assert text_of(events) == "".join(PIECES)
    assert not any("id" in event for event in events)
    assert worker.jobs[0].request.reading is None


@pytest.mark.parametrize("most", range(1, 8))
async def test_a_stream_is_read_on_through_another_router(
    start_router, http, start_worker, chat, most
):
    first, second = await start_router("router-1"), await start_router("router-2")
    workers = [await start_worker(tells, name=f"worker-{number}") for number in (1, 2)]
    body = chat(stream=True, stream_options={"include_usage": True})

    had = await read(http, first.url, body, most=most, **READABLE)
    last = had[-1]["id"]
    rest = await read(http, second.url, body, **{"Last-Event-ID": last})

    assert text_of(had + rest) == "".join(PIECES)
    assert rest[-1] == {"data": "[DONE]"}
    assert all("id" in event for event in (had + rest)[:-1])
    assert len({event["id"] for event in (had + rest)[:-1]}) == len(had + rest) - 1
    chunks = [json.loads(event["data"]) for event in (had + rest)[:-1]]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert sum("role" in choice["delta"] for choice in choices) == 1
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]] == [
        len(PIECES)
    ]
    begun, again = sorted(
        (job.request for worker in workers for job in worker.jobs),
        key=lambda request: bool(request.reading.had),
    )
    assert begun.reading.key == again.reading.key
    assert begun.sampling == again.sampling
    (told,) = again.reading.had
    assert told.check == extend_check(0, range(told.count))
    assert text_of(had) == "".join(PIECES[: told.count])


async def test_the_worker_that_has_it_is_asked_first(start_router, http, start_worker, chat):
    router = await start_router()
    workers = [await start_worker(tells, name=f"worker-{number}") for number in (1, 2, 3)]
    asked = []
    for number in range(6):
        body = chat(f"conversation {number}", stream=True)
        had = await read(http, router.url, body, most=3, **READABLE)
        # Where its conversation has no claim on that worker any more, neither.
        answer = await http.post(
            f"{router.url}/v1/chat/completions",
            json=body,
            headers={"Last-Event-ID": had[-1]["id"], "X-Mesh-Explain": "1"},
        )
        asked.append(answer.headers["x-mesh-reason"])
        (began,) = [w for w in workers if any(not j.request.reading.had for j in w.jobs)]
        (went_on,) = [w for w in workers if any(j.request.reading.had for j in w.jobs)]
        assert began is went_on
        for worker in workers:
            worker.jobs.clear()
    assert set(asked) == {"had_it"}


async def test_where_that_worker_is_gone_another_goes_on(router, http, start_worker, chat):
    first = await start_worker(tells, name="worker-1")
    had = await read(http, router.url, chat(stream=True), most=3, **READABLE)
    await first.leave()
    second = await start_worker(tells, name="worker-2")
    rest = await read(http, router.url, chat(stream=True), **{"Last-Event-ID": had[-1]["id"]})

    assert text_of(had + rest) == "".join(PIECES)
    assert second.jobs[0].request.reading.had[0].count > 0
    assert second.jobs[0].request.reading.worker == ""


async def test_a_worker_lost_while_it_catches_up_is_gone_on_from(router, http, start_worker, chat):
    lost = []

    async def script(job):
        if job.request.reading.had and not lost:
            lost.append(job)
            await job.accept()
            await job.send(job.delta(), job.delta())
            await job.send(job.failure("worker_failed", "the engine was killed", lost=True))
        else:
            await tells(job)

    for number in (1, 2):
        await start_worker(script, name=f"worker-{number}")
    had = await read(http, router.url, chat(stream=True), most=5, **READABLE)
    rest = await read(http, router.url, chat(stream=True), **{"Last-Event-ID": had[-1]["id"]})

    assert lost
    assert text_of(had + rest) == "".join(PIECES)


@pytest.mark.parametrize("most", [4, 9, 14])
async def test_every_choice_and_every_prompt_is_read_on_from_where_it_is(
    router, http, start_worker, unique, most
):
    worker = await start_worker(tells)
    body = {
        "model": unique,
        "prompt": ["x", "y"],
        "n": 2,
        "stream": True,
        "echo": True,
        "seed": 3,
        "stream_options": {"include_usage": True},
    }
    had = await read(http, router.url, body, most=most, route="completions", **READABLE)
    last = {"Last-Event-ID": had[-1]["id"]}
    rest = await read(http, router.url, body, route="completions", **last)

    for choice in range(4):
        assert text_of(had + rest, choice) == "xy"[choice // 2] + "".join(PIECES)
    keys = {job.request.reading.key for job in worker.jobs}
    assert len(keys) == 2
    assert {job.request.sampling.seed for job in worker.jobs} == {3}
    again = [job.request for job in worker.jobs if job.request.reading.had]
    for request in again:
        done = [choice.done for choice in request.reading.had]
        assert [before.done >= 0 for before in request.resume or [Resumed()] * 2] == done
    usage = [json.loads(event["data"]).get("usage") for event in rest[:-1]]
    assert [told["completion_tokens"] for told in usage if told] == [4 * len(PIECES)]


async def test_whoever_has_all_but_the_end_is_told_the_end(router, http, start_worker, chat):
    worker = await start_worker(tells)
    whole = await read(http, router.url, chat(stream=True), **READABLE)
    rest = await read(http, router.url, chat(stream=True), **{"Last-Event-ID": whole[-2]["id"]})

    assert rest == [{"data": "[DONE]"}]
    assert worker.jobs[1].request.resume == (Resumed(done=len(PIECES)),)


async def test_what_cannot_go_on_is_a_clear_error(router, http, start_worker, chat):
    async def script(job):
        if job.request.reading.had:
            await job.accept()
            await job.send(job.failure("cannot_continue", "it came out different"))
        else:
            await tells(job)

    await start_worker(script)
    had = await read(http, router.url, chat(stream=True), most=3, **READABLE)
    answer = await http.post(
        f"{router.url}/v1/chat/completions",
        json=chat(stream=True),
        headers={"Last-Event-ID": had[-1]["id"]},
    )

    assert answer.status_code == 410
    assert answer.json()["error"]["code"] == "cannot_continue"


async def test_a_worker_that_knows_nothing_of_it_tells_nothing_twice(
    router, http, start_worker, chat
):
    async def script(job):
        await job.speak("Once", " upon", " a", " time")

    await start_worker(script)
    had = await read(http, router.url, chat(stream=True), most=3, **READABLE)
    answer = await http.post(
        f"{router.url}/v1/chat/completions",
        json=chat(stream=True),
        headers={"Last-Event-ID": had[-1]["id"]},
    )

    assert answer.status_code == 410
    assert answer.json()["error"]["code"] == "cannot_continue"


@pytest.mark.parametrize(
    ("change", "headers", "says"),
    [
        ({}, {"Last-Event-ID": "17"}, "must be the id of an event"),
        ({}, {"Last-Event-ID": ""}, "must be the id of an event"),
        ({"seed": 4}, {}, "of an answer to another request"),
        ({"stream": False}, {}, "'stream' must be true"),
        ({}, {"Authorization": "Bearer other"}, "of an answer to another request"),
    ],
)
async def test_an_id_that_is_not_of_this_request_is_refused_by_name(
    router, http, start_worker, chat, change, headers, says
):
    worker = await start_worker(tells)
    body = chat(stream=True)
    mine = {"Authorization": "Bearer mine"}
    had = await read(http, router.url, body, most=3, **READABLE, **mine)
    answer = await http.post(
        f"{router.url}/v1/chat/completions",
        json=body | change,
        headers=mine | {"Last-Event-ID": had[-1]["id"]} | headers,
    )

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "Last-Event-ID"
    assert says in error["message"]
    assert len(worker.jobs) == 1


async def test_the_model_is_not_chosen_anew(router, http, start_worker, chat, unique):
    await start_worker(tells, name="worker-1", model=f"{unique}-a")
    body = chat(stream=True) | {"model": "auto"}
    had = await read(http, router.url, body, most=3, **READABLE)
    other = await start_worker(tells, name="worker-2", model=f"{unique}-b", context=4096)
    rest = await read(http, router.url, body, **{"Last-Event-ID": had[-1]["id"]})

    assert text_of(had + rest) == "".join(PIECES)
    assert not other.jobs
    models = {json.loads(event["data"])["model"] for event in (had + rest)[:-1]}
    assert models == {f"{unique}-a"}


async def test_what_is_kept_under_a_key_is_not_what_reads_on(router, http, start_worker, chat):
    await start_worker(tells)
    key = {"Idempotency-Key": "one"}
    whole = await read(http, router.url, chat(stream=True), **READABLE, **key)
    last = {"Last-Event-ID": whole[3]["id"]}
    rest = await read(http, router.url, chat(stream=True), **last, **key)

    assert text_of(whole[:4] + rest) == text_of(whole)
    assert text_of(rest) != text_of(whole)
