"""Requests with an Idempotency-Key: done once, for all who send them."""

import asyncio

import pytest
from scripted_worker import WAIT, hello

from router.server import serving
from router.settings import Settings

pytestmark = pytest.mark.nats

KEY = {"idempotency-key": "key-1"}


def error(answer):
    return answer.json()["error"]


class Gate:
    """A script whose answers wait in their middle."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, job) -> None:
        await job.accept()
        await job.send(job.delta("Hel"))
        await self.open.wait()
        await job.send(job.delta("lo"), job.done(), job.end())


@pytest.fixture
def ask(router, http):
    def post(body, headers=KEY, path="chat/completions"):
        return http.post(f"{router.url}/v1/{path}", json=body, headers=headers)

    return post


@pytest.fixture
def counted(router, http):
    async def count(outcome):
        text = (await http.get(f"{router.url}/metrics")).text
        name = f'mesh_router_repeats_total{{outcome="{outcome}"}} '
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        return float(line.removeprefix(name))

    return count


def content(stream):
    """What the events of a stream say."""
    return [line for line in stream.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_answer_is_repeated_word_for_word(
    start_worker, chat, ask, counted, stream
):
    worker = await start_worker()

    first = await ask(chat(stream=stream))
    again = await ask(chat(stream=stream), KEY | {"x-request-id": "mine"})

    assert (first.status_code, again.status_code) == (200, 200)
    assert again.content == first.content
    assert len(worker.jobs) == 1
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["x-request-id"] == "mine"
    assert again.headers["content-type"] == first.headers["content-type"]
    assert await counted("repeated") == 1


async def test_a_running_answer_is_joined(start_worker, chat, ask, counted):
    gate = Gate()
    worker = await start_worker(gate)

    asking = [asyncio.create_task(ask(chat())) for _ in range(5)]
    await worker.job()
    while await counted("joined") < 4:
        assert not any(asked.done() for asked in asking)
    gate.open.set()
    answers = await asyncio.gather(*asking)

    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {"Hello"}
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["x-request-id"] for answer in answers}) == 5
    assert len(worker.jobs) == 1


async def test_a_stream_joined_late_comes_from_its_beginning(router, http, start_worker, chat):
    gate = Gate()
    worker = await start_worker(gate)
    url = f"{router.url}/v1/chat/completions"
    body = chat(stream=True)

    async with http.stream("POST", url, json=body, headers=KEY) as first:
        lines = first.aiter_lines()
        seen = [line async for line in until_said(lines, "Hel")]
        async with http.stream("POST", url, json=body, headers=KEY) as second:
            others = second.aiter_lines()
            assert [line async for line in until_said(others, "Hel")] == seen
            gate.open.set()
            rest = [line async for line in lines]
            assert [line async for line in others] == rest

    assert rest[-2] == "data: [DONE]"
    assert len(worker.jobs) == 1


async def until_said(lines, word):
    async for line in lines:
        yield line
        if word in line:
            return


async def test_an_answer_goes_on_for_a_client_that_comes_back(router, http, start_worker, chat):
    gate = Gate()
    worker = await start_worker(gate)
    url = f"{router.url}/v1/chat/completions"

    async with http.stream("POST", url, json=chat(stream=True), headers=KEY) as first:
        assert [line async for line in until_said(first.aiter_lines(), "Hel")]
    job = await worker.job()
    gate.open.set()
    again = await http.post(url, json=chat(stream=True), headers=KEY)

    assert content(again.text)[-1] == "data: [DONE]"
    assert '"content":"Hel"' in again.text
    assert len(worker.jobs) == 1
    assert not job.cancelled.is_set()


async def test_an_answer_that_nobody_comes_back_for_frees_its_worker(
    router, http, start_worker, chat, monkeypatch
):
    monkeypatch.setattr("router.repeating.LINGER", 0.2)
    worker = await start_worker(Gate())
    url = f"{router.url}/v1/chat/completions"

    async with http.stream("POST", url, json=chat(stream=True), headers=KEY) as first:
        assert [line async for line in until_said(first.aiter_lines(), "Hel")]
    job = await worker.job()
    await asyncio.wait_for(job.cancelled.wait(), WAIT)

    worker.script = hello
    again = await http.post(url, json=chat(stream=True), headers=KEY)
    assert content(again.text)[-1] == "data: [DONE]"
    assert "idempotent-replayed" not in again.headers
    assert len(worker.jobs) == 2


async def test_one_of_two_readers_may_leave(router, http, start_worker, chat, monkeypatch):
    monkeypatch.setattr("router.repeating.LINGER", 0.0)
    gate = Gate()
    worker = await start_worker(gate)
    url = f"{router.url}/v1/chat/completions"
    body = chat(stream=True)

    async with http.stream("POST", url, json=body, headers=KEY) as stays:
        lines = stays.aiter_lines()
        assert [line async for line in until_said(lines, "Hel")]
        async with http.stream("POST", url, json=body, headers=KEY) as leaves:
            assert [line async for line in until_said(leaves.aiter_lines(), "Hel")]
        await asyncio.sleep(0.2)
        gate.open.set()
        assert [line async for line in lines][-2] == "data: [DONE]"

    assert not worker.jobs[0].cancelled.is_set()


@pytest.mark.parametrize("running", [True, False])
async def test_the_key_of_another_request_is_422(start_worker, chat, ask, counted, running):
    gate = Gate()
    worker = await start_worker(gate)
    first = asyncio.create_task(ask(chat("one")))
    await worker.job()
    if not running:
        gate.open.set()
        await first

    answer = await ask(chat("another"))
    gate.open.set()

    assert answer.status_code == 422
    assert error(answer)["code"] == "idempotency_key_reused"
    assert error(answer)["type"] == "invalid_request_error"
    assert (await first).status_code == 200
    assert len(worker.jobs) == 1
    assert await counted("reused") == 1


async def test_the_same_key_of_another_api_key_is_another_key(start_worker, chat, ask):
    worker = await start_worker()

    for name in ("a", "b"):
        answer = await ask(chat(f"of {name}"), KEY | {"authorization": f"Bearer {name}"})
        assert answer.status_code == 200

    assert len(worker.jobs) == 2


async def test_a_failed_request_is_not_remembered(start_worker, chat, ask):
    async def fails(job):
        await job.accept()
        await job.send(job.failure("invalid_value", "no", param="prompt"))

    worker = await start_worker(fails)
    first = await ask(chat())
    worker.script = hello
    again = await ask(chat())

    assert (first.status_code, again.status_code) == (400, 200)
    assert len(worker.jobs) == 2


async def test_a_stream_that_broke_is_not_remembered(start_router, http, start_worker, chat):
    router = await start_router(resumes=0)

    async def breaks(job):
        await job.accept()
        await job.send(job.delta("Hel"))
        await job.send(job.failure("worker_failed", "the engine died", lost=True))

    worker = await start_worker(breaks)
    url = f"{router.url}/v1/chat/completions"
    first = await http.post(url, json=chat(stream=True), headers=KEY)
    worker.script = hello
    again = await http.post(url, json=chat(stream=True), headers=KEY)

    assert "worker_failed" in content(first.text)[-1]
    assert content(again.text)[-1] == "data: [DONE]"


async def test_a_bad_request_is_told_each_time(start_worker, chat, ask):
    await start_worker()

    answers = [await ask(chat(temperature=9)) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [400, 400]
    assert (await ask(chat())).status_code == 200


@pytest.mark.parametrize("value", ["", "two words", "x" * 256, "\u00e9".encode("latin-1")])
async def test_a_key_that_is_none_is_400(start_worker, chat, ask, value):
    answer = await ask(chat(), {"idempotency-key": value})

    assert answer.status_code == 400
    assert error(answer)["param"] == "Idempotency-Key"


async def test_embeddings_are_repeated_too(start_worker, unique, ask):
    worker = await start_worker()
    body = {"model": unique, "input": ["a", "b"]}

    first, again = [await ask(body, path="embeddings") for _ in range(2)]

    assert first.status_code == 200
    assert again.content == first.content
    assert len(worker.jobs) == 1


async def test_after_its_time_it_is_done_again(start_router, http, start_worker, chat):
    router = await start_router(idempotency_seconds=0.2)
    worker = await start_worker()
    url = f"{router.url}/v1/chat/completions"

    await http.post(url, json=chat(), headers=KEY)
    await asyncio.sleep(0.3)
    await http.post(url, json=chat(), headers=KEY)

    assert len(worker.jobs) == 2


async def test_a_stream_that_cannot_be_kept_says_so(start_router, http, start_worker, chat):
    router = await start_router(idempotency_memory=8 * 4096)
    worker = await start_worker(lambda job: job.speak(*["x" * 500] * 40))
    url = f"{router.url}/v1/chat/completions"

    answer = await http.post(url, json=chat(stream=True), headers=KEY)
    again = await http.post(url, json=chat(stream=True))

    assert "answer_too_large" in content(answer.text)[-1]
    assert content(again.text)[-1] == "data: [DONE]"
    assert len(worker.jobs) == 2


async def test_a_whole_answer_that_cannot_be_kept_is_given_once(
    start_router, http, start_worker, chat
):
    router = await start_router(idempotency_memory=8 * 4096)
    worker = await start_worker(lambda job: job.speak("x" * 5000))
    url = f"{router.url}/v1/chat/completions"

    answers = [await http.post(url, json=chat(), headers=KEY) for _ in range(2)]

    assert [len(a.json()["choices"][0]["message"]["content"]) for a in answers] == [5000, 5000]
    assert len(worker.jobs) == 2


async def test_without_memory_the_header_is_ignored(start_router, http, start_worker, chat):
    router = await start_router(idempotency_memory=0)
    worker = await start_worker()

    for _ in range(2):
        answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(), headers=KEY)
        assert answer.status_code == 200

    assert len(worker.jobs) == 2


async def test_a_router_that_ends_frees_the_worker_of_an_answer_that_nobody_reads(
    nats_server, http, start_worker, chat, unique, eventually
):
    worker = await start_worker(Gate())
    settings = Settings(nats=nats_server.url_for("router-2"), name="router-2", port=0, grace=1.0)
    async with serving(settings) as router:
        await eventually(lambda: router.dispatcher.fleet.pool(unique) is not None)
        url = f"{router.url}/v1/chat/completions"
        async with http.stream("POST", url, json=chat(stream=True), headers=KEY) as first:
            assert [line async for line in until_said(first.aiter_lines(), "Hel")]
        await eventually(router.idle)

    job = await worker.job()
    await asyncio.wait_for(job.cancelled.wait(), WAIT)
