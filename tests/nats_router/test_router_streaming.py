"""Streams as a client sees them, from the first byte to the last."""

import asyncio
import json
import socket
import time
from typing import Any

import pytest
from scripted_worker import WAIT

from router.fleet import EXPIRY
from shared.protocol import Accepted, TokenLogprob, ToolDelta

pytestmark = pytest.mark.nats


def events(text: str) -> list[Any]:
    """The events of a stream; `[DONE]` stays text."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def test_a_stream_is_read_by_the_official_client(sdk, start_worker, unique):
    await start_worker()

    stream = await sdk.chat.completions.create(
        model=unique,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]

    assert [c.choices[0].delta.content for c in chunks[:-1]] == ["", "Hel", "lo", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert chunks[-1].model_extra["timings"] == {
        "queue_ms": 1.0,
        "prefill_ms": 2.0,
        "decode_ms": 4.0,
        "tokens_per_second": 500.0,
    }
    assert {c.id for c in chunks} == {chunks[0].id}


async def test_without_usage_the_last_chunk_carries_the_timings(router, http, start_worker, chat):
    await start_worker()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    *chunks, done = events(answer.text)

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "timings" in chunks[-1]
    assert all("usage" not in chunk for chunk in chunks)


async def test_the_timings_tell_what_was_drafted(router, http, start_worker, chat, unique):
    async def script(job):
        await job.accept()
        await job.send(job.delta("x", tokens=4), job.done(), job.end(drafted=5, accepted=3))

    await start_worker(script)

    for path, body in (
        ("/v1/chat/completions", chat()),
        ("/v1/completions", {"model": unique, "prompt": "hi"}),
    ):
        whole = await http.post(f"{router.url}{path}", json=body)
        stream = await http.post(f"{router.url}{path}", json=body | {"stream": True})
        *_, last, _ = events(stream.text)
        for timings in (whole.json()["timings"], last["timings"]):
            assert (timings["draft_n"], timings["draft_n_accepted"]) == (5, 3)


async def test_every_choice_gets_its_own_role_text_and_end(router, http, start_worker, chat):
    await start_worker()

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True, n=3))
    *chunks, _ = events(answer.text)
    texts = ["", "", ""]
    roles, reasons = [], []
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles += [choice["index"]] * ("role" in choice["delta"])
        reasons += [choice["index"]] * (choice["finish_reason"] == "stop")

    assert texts == ["Hello"] * 3
    assert sorted(roles) == sorted(reasons) == [0, 1, 2]


async def test_text_of_any_kind_survives(router, http, start_worker, chat):
    text = 'a"b\\c\n\r\u2028é漢🎉\0</script>'

    async def script(job):
        await job.speak(*text)

    await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    pieces = [c["choices"][0]["delta"].get("content", "") for c in events(answer.text)[:-1]]

    assert "".join(pieces) == text


async def test_tools_logprobs_and_reasoning_are_streamed(sdk, start_worker, unique):
    top = TokenLogprob(6, float("-inf"), "x", b"x")
    entry = TokenLogprob(5, -0.25, "�", b"\xe6", (TokenLogprob(5, -0.25, "�", b"\xe6"), top))

    async def script(job):
        await job.accept()
        await job.send(job.delta(reasoning="hmm"))
        await job.send(job.delta("a", logprobs=(entry,)))
        await job.send(job.delta(tools=(ToolDelta(0, "call_1", "f", '{"a'),)))
        await job.send(job.delta(tools=(ToolDelta(0, arguments='":1}'),)))
        await job.send(job.done(reason="tool_calls"), job.end())

    await start_worker(script)

    stream = await sdk.chat.completions.create(
        model=unique,
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=2,
        stream=True,
    )
    _, reasoning, text, call, rest, last = [chunk async for chunk in stream]

    assert reasoning.choices[0].delta.model_extra["reasoning_content"] == "hmm"
    logprob = text.choices[0].logprobs.content[0]
    assert (logprob.token, logprob.logprob, logprob.bytes) == ("�", -0.25, [0xE6])
    assert [t.logprob for t in logprob.top_logprobs] == [-0.25, -9999.0]
    assert call.choices[0].delta.tool_calls[0].id == "call_1"
    assert call.choices[0].delta.tool_calls[0].function.name == "f"
    assert rest.choices[0].delta.tool_calls[0].function.arguments == '":1}'
    assert last.choices[0].finish_reason == "tool_calls"


async def test_a_failure_before_the_first_token_is_a_real_status(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        await job.send(
            job.failure("context_length_exceeded", "600 tokens, 512 fit", param="messages")
        )

    await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))

    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "600 tokens, 512 fit",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }


async def test_a_failure_in_mid_stream_is_an_event_and_the_end(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        await job.send(job.delta("Hel"))
        await job.send(job.failure("worker_failed", "the engine died"))

    await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    seen = events(answer.text)

    assert answer.status_code == 200
    assert seen[-1]["error"]["code"] == "worker_failed"
    assert "[DONE]" not in seen


async def test_a_lost_frame_ends_the_stream_and_frees_the_worker(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        await job.send(job.delta("one"))
        job.delta("lost")
        await job.send(job.delta("three"))

    worker = await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    seen = events(answer.text)

    assert "one" in answer.text
    assert "three" not in answer.text
    assert seen[-1]["error"]["code"] == "worker_failed"
    await asyncio.wait_for(worker.jobs[0].cancelled.wait(), WAIT)


async def test_doubled_and_foreign_frames_change_nothing(router, http, start_worker, chat):
    async def script(job):
        await job.accept()
        first = job.delta("Hel")
        await job.send(first, first)
        await job.send(job.delta("lo"), Accepted(1, "somebody"), first)
        await job.send(job.done(), job.end(), job.done())

    await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "Hello"


async def test_what_is_no_list_of_frames_is_ignored(router, http, start_worker, chat):
    async def script(job):
        await job.worker.bus.publish(job.reply, b"\xc1 not msgpack")
        await job.speak("fine")

    await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat())

    assert answer.json()["choices"][0]["message"]["content"] == "fine"


async def test_a_quiet_stream_says_that_it_lives(start_router, http, start_worker, chat):
    router = await start_router(ping_interval=0.2)

    async def script(job):
        await job.accept()
        await asyncio.sleep(0.8)
        await job.speak("late")

    await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))

    assert answer.text.startswith(": ping\n\n")
    assert events(answer.text)[-1] == "[DONE]"
    assert "late" in answer.text


async def test_frames_of_several_requests_may_ride_in_one_message(router, http, start_worker, chat):
    waiting = []

    async def script(job):
        await job.accept()
        waiting.append(job)
        if len(waiting) == 3:
            frames = [f for j in waiting for f in (j.delta(j.prompt), j.done(), j.end())]
            await waiting[1].send(*frames)

    await start_worker(script)

    answers = await asyncio.gather(
        *(
            http.post(f"{router.url}/v1/chat/completions", json=chat(text))
            for text in ("a", "b", "c")
        )
    )

    assert [a.json()["choices"][0]["message"]["content"] for a in answers] == ["a", "b", "c"]


async def test_a_slow_reader_gets_everything_and_holds_nobody_up(
    start_router, http, start_worker, chat
):
    """8 MB for one who does not read at first; another stream passes meanwhile."""
    piece = "x" * 20_000
    count = 400
    router = await start_router(held_limit=16_000_000)
    said = asyncio.Event()

    async def script(job):
        if job.prompt == "slow":
            await job.accept()
            for _ in range(count):
                await job.send(job.delta(piece))
            await job.send(job.done(), job.end())
            said.set()
        else:
            await job.speak("quick")

    worker = await start_worker(script)
    host, port = router.url.removeprefix("http://").split(":")
    # A small window, so that the kernel cannot swallow the whole answer.
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=slow, limit=4096)
    body = json.dumps(chat("slow", stream=True)).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    )
    try:
        await worker.job()
        await asyncio.wait_for(said.wait(), WAIT)
        answer = await http.post(f"{router.url}/v1/chat/completions", json=chat("fast"))
        assert answer.json()["choices"][0]["message"]["content"] == "quick"

        async with asyncio.timeout(WAIT):
            received = await reader.read(-1)
    finally:
        writer.close()
    assert received.count(b"xxxx") == count * len(piece) // 4
    assert received.rstrip(b"\r\n0").endswith(b"data: [DONE]")
    # Merged while it waited: far fewer events than tokens.
    assert received.count(b"data: ") < count / 2


async def test_a_reader_that_never_reads_is_cut_off(start_router, start_worker, chat, eventually):
    router = await start_router(held_limit=100_000, reader_timeout=0.5)

    async def script(job):
        await job.accept()
        while not job.cancelled.is_set():
            await job.send(job.delta("x" * 4000))
            await asyncio.sleep(0)

    worker = await start_worker(script)
    host, port = router.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    body = json.dumps(chat(stream=True)).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    try:
        job = await worker.job()
        await asyncio.wait_for(job.cancelled.wait(), WAIT)
        await eventually(lambda: len(router.dispatcher.inbox) == 0)
        await eventually(router.idle)
    finally:
        writer.close()


async def test_a_router_that_stood_still_does_not_blame_the_worker(
    http, router, start_worker, chat
):
    """As on a laptop that slept: the worker's beats are there, but not read yet."""

    async def script(job):
        await job.accept()
        await job.send(job.delta("Hel"))
        await asyncio.sleep(0.2)
        time.sleep(EXPIRY + 0.6)  # noqa: ASYNC251  holds up the router, which lives in this process
        await asyncio.sleep(0.4)
        await job.send(job.delta("lo"))
        await job.send(job.done(), job.end())

    await start_worker(script)

    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(stream=True))
    *chunks, done = events(answer.text)

    assert done == "[DONE]"
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == "Hello"
