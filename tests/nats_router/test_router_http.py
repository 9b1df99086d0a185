"""Everything around the answers: models, probes, errors, ids, metrics, the other dialects."""

import base64
import json
import socket
import struct

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtests.metric_sums import metric_sums
from router.owner import owner_of
from shared.protocol import TokenLogprob, ToolDelta, encode

pytestmark = pytest.mark.nats

CHAT = "/v1/chat/completions"


def error(answer):
    return answer.json()["error"]


async def test_models_are_listed_and_found_by_name(sdk, start_worker, unique):
    await start_worker(created=1234)
    await start_worker(name="worker-2", model=f"{unique}/a/b:c.gguf")

    listed = [model async for model in sdk.models.list()]
    one = await sdk.models.retrieve(f"{unique}/a/b:c.gguf")

    assert {unique, f"{unique}/a/b:c.gguf"} <= {model.id for model in listed}
    assert one.id == f"{unique}/a/b:c.gguf"
    assert one.owned_by == "mesh"
    assert one.model_extra["meta"] == {
        "state": "ready",
        "workers": 1,
        "context": 512,
        "embeddings": True,
    }


@pytest.mark.parametrize("name", ["nope", "../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd"])
async def test_an_unknown_model_is_404_whatever_its_name(router, http, start_worker, name):
    await start_worker()

    answer = await http.get(f"{router.url}/v1/models/{name}")

    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert error(answer)["type"] == "invalid_request_error"


async def test_a_model_whose_workers_have_left_stays_listed(router, http, start_worker, unique):
    worker = await start_worker()
    await http.get(f"{router.url}/v1/models")
    await worker.leave()

    answer = await http.get(f"{router.url}/v1/models/{unique}")

    assert answer.json()["meta"]["state"] == "unavailable"
    assert answer.json()["meta"]["workers"] == 0


async def test_a_router_is_ready_once_it_has_had_time_to_hear_every_worker(
    router, http, eventually
):
    early = await http.get(f"{router.url}/readyz")
    live = await http.get(f"{router.url}/livez")
    await eventually(lambda: router.dispatcher.informed)
    late = await http.get(f"{router.url}/readyz")

    assert (early.status_code, live.status_code, late.status_code) == (503, 200, 200)
    assert "workers" in error(early)["message"]


async def test_a_router_that_drains_is_not_ready(router, http):
    router.dispatcher.draining = True

    assert (await http.get(f"{router.url}/readyz")).status_code == 503
    assert (await http.get(f"{router.url}/livez")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/etc/passwd", 404, "not_found"),
        ("GET", "/../../etc/passwd", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PATCH", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_wrong_paths_and_methods_have_openais_shape(router, http, method, path, status, code):
    answer = await http.request(method, f"{router.url}{path}")

    assert answer.status_code == status
    assert set(error(answer)) == {"message", "type", "param", "code"}
    assert error(answer)["code"] == code
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model":', b"{}", b"NaN", b"[" * 9999],
)
async def test_bodies_that_are_no_request_are_400(router, http, path, body):
    answer = await http.post(
        f"{router.url}{path}", content=body, headers={"content-type": "application/json"}
    )

    assert answer.status_code == 400
    assert error(answer)["type"] == "invalid_request_error"
    assert error(answer)["message"]


async def test_numbers_that_cannot_travel_are_400(router, http):
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "chat_template_kwargs": {"deep": [1 << 64]},
    }
    answer = await http.post(f"{router.url}{CHAT}", json=body)

    assert answer.status_code == 400
    assert error(answer)["param"] == "chat_template_kwargs"


async def test_a_body_of_another_kind_is_415(router, http):
    answer = await http.post(f"{router.url}{CHAT}", data={"model": "x"})

    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("given", "kept"),
    [("mine-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False)],
)
async def test_a_sane_request_id_is_kept_and_every_answer_has_one(router, http, given, kept):
    for path in ("/livez", "/nothing", "/v1/models"):
        headers = [(b"x-request-id", given.encode())]
        answer = await http.get(f"{router.url}{path}", headers=headers)

        identity = answer.headers["x-request-id"]
        assert (identity == given) if kept else identity.startswith("req-")


async def test_errors_become_the_official_clients_exceptions(sdk, start_worker, unique):
    failures = {
        "400": ("invalid_value", "bad schema", openai.BadRequestError),
        "429": ("queue_full", "full", openai.RateLimitError),
        "502": ("worker_failed", "died", openai.InternalServerError),
    }

    async def script(job):
        code, message, _ = failures[job.prompt]
        await job.accept()
        await job.send(job.failure(code, message, param="response_format"))

    await start_worker(script)

    for text, (code, message, kind) in failures.items():
        with pytest.raises(kind) as caught:
            await sdk.chat.completions.create(
                model=unique, messages=[{"role": "user", "content": text}]
            )
        assert caught.value.code == code
        assert message in caught.value.message
        assert caught.value.param == "response_format"
        assert caught.value.request_id.startswith("req-")
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(
            model="nope", messages=[{"role": "user", "content": "hi"}]
        )


async def test_an_unforeseen_fault_is_500_in_openais_shape(router, http, monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(router.dispatcher.fleet, "models", broken)

    answer = await http.get(f"{router.url}/v1/models")

    assert answer.status_code == 500
    assert error(answer)["type"] == "server_error"
    assert "ZeroDivision" not in answer.text


async def test_a_fault_in_rendering_ends_one_answer_and_hurts_no_other(
    router, http, start_worker, chat, monkeypatch
):
    from router.dialects.chat_answer import ChatStream

    def broken(*_):
        raise ZeroDivisionError

    worker = await start_worker()
    monkeypatch.setattr(ChatStream, "delta", broken)

    stream = await http.post(f"{router.url}{CHAT}", json=chat(stream=True))
    whole = await http.post(f"{router.url}{CHAT}", json=chat())

    assert stream.status_code == 500
    assert error(stream)["code"] == "internal_error"
    assert whole.status_code == 200
    assert len(worker.jobs) == 2


async def test_a_whole_chat_answer(sdk, start_worker, unique):
    entry = TokenLogprob(5, -0.5, "a", b"a", (TokenLogprob(5, -0.5, "a", b"a"),))

    async def script(job):
        await job.accept()
        await job.send(job.delta(reasoning="hm"))
        await job.send(job.delta("a", logprobs=(entry,)))
        await job.send(job.delta(tools=(ToolDelta(0, "c1", "f", "{"),)))
        await job.send(
            job.delta(tools=(ToolDelta(0, arguments="}"), ToolDelta(1, "c2", "g", "{}")))
        )
        await job.send(job.done(reason="tool_calls"), job.end())

    await start_worker(script)

    answer = await sdk.chat.completions.create(
        model=unique, messages=[{"role": "user", "content": "hi"}], logprobs=True
    )
    choice = answer.choices[0]

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "a"
    assert choice.message.model_extra["reasoning_content"] == "hm"
    assert [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [
        ("c1", "f", "{}"),
        ("c2", "g", "{}"),
    ]
    assert choice.logprobs.content[0].top_logprobs[0].token == "a"
    assert answer.usage.total_tokens == 11


async def test_a_streamed_completion(sdk, start_worker, unique):
    entry = TokenLogprob(5, -0.5, "Hel", b"Hel", (TokenLogprob(9, -0.75, "Hal", b"Hal"),))

    async def script(job):
        await job.accept()
        await job.send(job.delta("Hel", logprobs=(entry,)))
        await job.send(job.delta("lo", logprobs=(TokenLogprob(6, -1.0, "lo", b"lo"),)))
        await job.send(job.done(reason="length"), job.end())

    worker = await start_worker(script)

    stream = await sdk.completions.create(model=unique, prompt=[1, 2, 3], stream=True, logprobs=1)
    chunks = [chunk async for chunk in stream]

    assert worker.jobs[0].prompt == "1 2 3"
    assert worker.jobs[0].request.max_tokens == 16
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert chunks[0].choices[0].logprobs.top_logprobs == [{"Hal": -0.75}]
    assert chunks[1].choices[0].logprobs.text_offset == [3]
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_a_streamed_echo_comes_first_even_without_tokens(router, http, start_worker, unique):
    async def script(job):
        await job.speak(*([] if job.prompt == "b" else ["x"]))

    await start_worker(script)

    answer = await http.post(
        f"{router.url}/v1/completions",
        json={"model": unique, "prompt": ["a", "b"], "echo": True, "stream": True},
    )
    texts = {0: "", 1: ""}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            texts[choice["index"]] += choice["text"]

    assert texts == {0: "ax", 1: "b"}
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_embeddings_as_numbers_and_as_base64(sdk, router, http, start_worker, unique):
    vectors = [struct.pack("<2f", 0.6, -0.8), struct.pack("<2f", 1.0, 0.0)]

    async def script(job):
        await job.accept()
        await job.send(job.vectors(*vectors))

    worker = await start_worker(script)

    # The official client asks for base64 and decodes it.
    decoded = await sdk.embeddings.create(model=unique, input=["a", "b"], dimensions=2)
    plain = await http.post(
        f"{router.url}/v1/embeddings", json={"model": unique, "input": [[1, 2], [3]]}
    )
    coded = await http.post(
        f"{router.url}/v1/embeddings",
        json={"model": unique, "input": "a", "encoding_format": "base64"},
    )

    assert worker.jobs[0].request.dimensions == 2
    assert [item.embedding for item in decoded.data] == [
        pytest.approx([0.6, -0.8]),
        [1.0, 0.0],
    ]
    assert plain.json()["data"][1] == {"object": "embedding", "index": 1, "embedding": [1.0, 0.0]}
    assert base64.b64decode(coded.json()["data"][0]["embedding"]) == vectors[0]
    assert plain.json()["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


async def test_metrics_count_what_was_drafted_and_reused(router, http, start_worker, chat, unique):
    async def script(job):
        await job.accept()
        await job.send(job.delta("x", tokens=4), job.done(), job.end(drafted=5, accepted=2))

    await start_worker(script)
    await http.post(f"{router.url}{CHAT}", json=chat())
    await http.post(f"{router.url}{CHAT}", json=chat(stream=True))

    lines = (await http.get(f"{router.url}/metrics")).text.splitlines()

    assert f'mesh_drafted_tokens_total{{model="{unique}"}} 10.0' in lines
    assert f'mesh_accepted_tokens_total{{model="{unique}"}} 4.0' in lines
    assert f'mesh_cached_prompt_tokens_total{{model="{unique}"}} 6.0' in lines


async def test_the_worker_learns_whose_a_request_is_and_never_the_key(
    router, http, start_worker, chat, unique
):
    worker = await start_worker()
    key = {"Authorization": "Bearer sk-secret"}
    prompts = {"model": unique, "prompt": ["a", "b"], "user": "ann"}

    await http.post(f"{router.url}{CHAT}", json=chat())
    await http.post(f"{router.url}{CHAT}", json=chat(), headers=key)
    await http.post(f"{router.url}{CHAT}", json=chat(user="ann"), headers=key)
    await http.post(f"{router.url}/v1/completions", json=prompts, headers=key)

    owners = [job.request.owner for job in worker.jobs]
    assert owners == [
        "",
        owner_of(b"sk-secret", ""),
        *[owner_of(b"sk-secret", "ann")] * 3,
    ]
    assert all(b"sk-secret" not in encode(job.request) for job in worker.jobs)


async def test_metrics_count_by_served_names_only(router, http, start_worker, chat, unique):
    await start_worker()
    await http.post(f"{router.url}{CHAT}", json=chat())
    await http.post(f"{router.url}{CHAT}", json=chat(stream=True))
    for number in range(5):
        await http.post(f"{router.url}{CHAT}", json=chat() | {"model": f"made-up-{number}"})

    text = (await http.get(f"{router.url}/metrics")).text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name, **labels):
        return samples[(f"mesh_router_{name}", *sorted(labels.items()))]

    assert value("requests_total", model=unique, route=CHAT, status="200") == 2
    assert value("requests_total", model="unknown", route=CHAT, status="404") == 5
    assert value("tokens_total", model=unique, kind="completion") == 4
    assert value("tokens_total", model=unique, kind="cached") == 6
    assert value("inter_token_seconds_count", model=unique) == 2
    assert value("time_to_first_token_seconds_count", model=unique) == 2
    assert value("in_flight", model=unique) == 0
    assert "made-up" not in text


async def test_metrics_tell_tasks_and_what_the_process_holds(router, http, start_worker, chat):
    await start_worker()
    await http.post(f"{router.url}{CHAT}", json=chat())

    found = metric_sums((await http.get(f"{router.url}/metrics")).text)

    assert found["mesh_router_tasks"] >= 1
    assert "mesh_worker_tasks" in found
    assert found["process_open_fds"] > 3
    assert found["process_resident_memory_bytes"] > 1e6


async def test_accepted_sockets_do_not_delay_small_packets(router, http, start_worker, chat):
    """Nagle's algorithm would hold tokens back for 40 ms."""
    seen = []

    async def script(job):
        for task in router._server.server_state.connections:
            sock = task.transport.get_extra_info("socket")
            seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await job.speak("x")

    await start_worker(script)
    await http.post(f"{router.url}{CHAT}", json=chat())

    assert seen
    assert all(seen)
