"""What OpenAI's own Python client makes of refusals, time-outs and lost workers.

Each must be the exception class that programs written for OpenAI catch.
"""

import asyncio
import collections
import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from mesh_parts import MeshParts, eventually, running_parts
from mesh_process import MeshUp, clean_environment, mesh_command
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

HI: Any = [{"role": "user", "content": "Hi"}]
ENDLESS: dict[str, Any] = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}
"""An answer that takes longer than any test waits for it."""


NONSENSE = {"type": "nonsense"}
NO_VALUE_FITS = {"type": "object", "required": ["a"], "properties": {"a": False}}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    wanted = {"name": "impossible", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": wanted}}


class TestRefusals:
    @pytest.mark.parametrize(
        ("wrong", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "Hi"}, "messages"),
            ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
            ({"temperature": 2.1}, "temperature"),
            ({"temperature": "warm"}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"n": 9}, "n"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"tool_choice": "required"}, "tools"),
            (form(NONSENSE), "response_format"),
            (form(NO_VALUE_FITS), "response_format"),
            ({"response_format": {"type": "regex", "pattern": "(a"}}, "response_format"),
            ({"extra_body": {"guided_regex": "(a"}}, "guided_regex"),
        ],
    )
    def test_a_bad_field_is_a_bad_request_that_names_it(
        self, client: OpenAI, mesh_system: MeshUp, wrong: dict[str, Any], param: str
    ):
        asked = {"model": mesh_system.model, "messages": HI, "max_tokens": 4} | wrong
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asked)
        error = caught.value
        assert error.status_code == 400
        assert (error.param, error.code) == (param, "invalid_value")
        assert error.type == "invalid_request_error"
        assert error.request_id

    def test_a_long_prompt_exceeds_the_context(self, client: OpenAI, mesh_system: MeshUp):
        # 2 MiB: it reaches the worker in pieces and is refused there, by its tokens.
        words: Any = [{"role": "user", "content": "word " * (2 * 1024 * 1024 // 5)}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=mesh_system.model, messages=words)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"
        context = client.models.retrieve(mesh_system.model).to_dict()["meta"]["context"]
        assert f"{context} tokens" in caught.value.message

    def test_other_endpoints_refuse_alike(self, client: OpenAI, mesh_system: MeshUp):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=mesh_system.model, input="")
        assert caught.value.param == "input"
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=mesh_system.model, input="word " * 5000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=mesh_system.model, prompt="Hi", suffix="!")
        assert caught.value.param == "suffix"

    def test_an_unknown_model_is_not_found(self, client: OpenAI, mesh_system: MeshUp):
        for name in ("gpt-9", "some/other:model"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model=name, messages=HI)
            assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
            assert mesh_system.model in caught.value.message
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve(name)

    @pytest.mark.parametrize(("mebibytes", "limit"), [(9, 8 << 20), (33, 32 << 20)])
    def test_too_large_a_body_names_the_limit(
        self, client: OpenAI, mesh_system: MeshUp, mebibytes: int, limit: int
    ):
        huge: Any = [{"role": "user", "content": "x" * (mebibytes << 20)}]
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model=mesh_system.model, messages=huge)
        assert (caught.value.status_code, caught.value.code) == (413, "payload_too_large")
        assert str(limit) in caught.value.message

    def test_a_stream_is_refused_before_it_begins(self, client: OpenAI, mesh_system: MeshUp):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                model=mesh_system.model, messages=HI, stream=True, temperature=3
            )


def busy_slots(system: MeshUp) -> int:
    """As `mesh status` tells it."""
    done = subprocess.run(
        mesh_command("status", "--json", "--data-dir", str(system.data_dir)),
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=60,
        check=True,
    )
    (worker,) = json.loads(done.stdout)["workers"]
    (model,) = worker["models"]
    return model["slots"] - model["free"]


class TestLeaving:
    def until_busy(self, system: MeshUp, count: int) -> None:
        eventually(lambda: busy_slots(system) == count, system.story)

    def test_a_stream_closed_early_frees_its_slot(self, client: OpenAI, mesh_system: MeshUp):
        stream = client.chat.completions.create(
            model=mesh_system.model, messages=HI, stream=True, **ENDLESS
        )
        with stream:
            assert next(stream).choices
            self.until_busy(mesh_system, 1)
        self.until_busy(mesh_system, 0)

    def test_a_time_out_of_the_client_frees_its_slot(self, client: OpenAI, mesh_system: MeshUp):
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1).chat.completions.create(
                model=mesh_system.model, messages=HI, **ENDLESS
            )
        self.until_busy(mesh_system, 0)

    async def test_a_cancelled_task_frees_its_slot(self, mesh_system: MeshUp):
        async with AsyncOpenAI(
            base_url=mesh_system.base_url,
            api_key="none",
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(trust_env=False),
        ) as client:
            task = asyncio.create_task(
                client.chat.completions.create(model=mesh_system.model, messages=HI, **ENDLESS)
            )
            await asyncio.to_thread(self.until_busy, mesh_system, 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(self.until_busy, mesh_system, 0)

    def test_a_deadline_of_the_request_is_kept(self, client: OpenAI, mesh_system: MeshUp):
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(
                model=mesh_system.model,
                messages=HI,
                extra_headers={"X-Request-Timeout": "1"},
                **ENDLESS,
            )
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        self.until_busy(mesh_system, 0)


NAME = "house/tiny model:v1.gguf"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshParts]:
    """A worker with one slot and a queue of one, whose model has a name with a slash."""
    folder = tmp_path_factory.mktemp("narrow")
    settings = ("--threads", "1", "--slots", "1", "--queue", "1")
    with running_parts(folder, NAME, *settings) as parts:
        yield parts


@pytest.fixture
def patient(narrow: MeshParts) -> Iterator[OpenAI]:
    """A client as people have it, which tries again; the worker is ready."""
    with OpenAI(
        base_url=narrow.base_url,
        api_key="none",
        max_retries=30,
        http_client=DefaultHttpxClient(trust_env=False),
    ) as opened:
        eventually(lambda: is_served(opened), narrow.story)
        yield opened


def is_served(client: OpenAI) -> bool:
    try:
        found = client.models.retrieve(NAME)
    except (openai.APIConnectionError, openai.NotFoundError):
        return False
    return bool(found.to_dict()["meta"]["state"] == "ready")


def held(client: OpenAI) -> float:
    """Requests that the router has not answered."""
    text = client.get("/../metrics", cast_to=str)
    return sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("mesh_router_in_flight{")
    )


def in_use(parts: MeshParts) -> tuple[int, int]:
    """Slots that are taken, and requests that wait for one."""
    state = parts.model_state()
    return state["slots"] - state["free"], state["queued"]


class TestNarrow:
    def test_a_name_with_a_slash_is_a_name(self, patient: OpenAI):
        assert [model.id for model in patient.models.list()] == [NAME]
        assert patient.models.retrieve(NAME).id == NAME
        answer = patient.chat.completions.create(model=NAME, messages=HI, max_tokens=2)
        assert answer.model == NAME

    def test_a_full_queue_is_a_rate_limit(self, narrow: MeshParts, patient: OpenAI):
        impatient = patient.with_options(max_retries=0)
        answers: list[str | None] = []

        def wait_in_line(client: OpenAI) -> None:
            answer = client.chat.completions.create(model=NAME, messages=HI, max_tokens=2)
            answers.append(answer.choices[0].finish_reason)

        running = patient.chat.completions.create(model=NAME, messages=HI, stream=True, **ENDLESS)
        with running:
            assert next(running).choices
            waiting = threading.Thread(target=wait_in_line, args=(impatient,))
            waiting.start()
            eventually(lambda: held(patient) == 2, narrow.story)
            with pytest.raises(openai.RateLimitError) as caught:
                impatient.chat.completions.create(model=NAME, messages=HI, max_tokens=2)
            assert (caught.value.status_code, caught.value.code) == (429, "queue_full")
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
            trying_again = threading.Thread(target=wait_in_line, args=(patient,))
            trying_again.start()
        # The slot is free now: who waited is served, and so is who was refused and came again.
        for thread in (waiting, trying_again):
            thread.join(90)
            assert not thread.is_alive()
        assert len(answers) == 2

    def test_what_the_queue_leaves_no_time_for_is_told_so_and_not_computed(
        self, narrow: MeshParts, patient: OpenAI
    ):
        impatient = patient.with_options(max_retries=0)
        running = patient.chat.completions.create(model=NAME, messages=HI, stream=True, **ENDLESS)
        with running:
            assert next(running).choices
            eventually(lambda: in_use(narrow) == (1, 0), narrow.story)
            computed = narrow.model_state()["prompt_tokens"]
            with pytest.raises(openai.APIStatusError) as caught:
                impatient.chat.completions.create(
                    model=NAME, messages=HI, max_tokens=2, extra_headers={"X-Request-Timeout": "1"}
                )
            # Refused at once by how long answers took of late, or else when its time is over.
            told = (caught.value.status_code, caught.value.code)
            assert told in ((429, "queue_full"), (504, "deadline_exceeded"))
            # Its place in the queue is free while the other still runs.
            eventually(lambda: in_use(narrow) == (1, 0), narrow.story)
            assert narrow.model_state()["prompt_tokens"] == computed

    def test_without_a_worker_it_is_unavailable_until_one_comes(
        self, narrow: MeshParts, patient: OpenAI
    ):
        narrow.end_worker()
        with pytest.raises(openai.InternalServerError) as caught:
            patient.with_options(max_retries=0).chat.completions.create(model=NAME, messages=HI)
        assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        narrow.start_worker()
        answer = patient.chat.completions.create(model=NAME, messages=HI, max_tokens=2)
        assert answer.choices[0].message.role == "assistant"

    def test_an_engine_that_dies_is_replaced_and_the_answer_goes_on(
        self, narrow: MeshParts, patient: OpenAI
    ):
        asked: dict[str, Any] = {"model": NAME, "messages": HI, "max_tokens": 300, "seed": 1}
        asked["extra_body"] = {"ignore_eos": True, "timings": True}
        undisturbed = patient.chat.completions.create(**asked)
        pieces: list[str] = []
        with patient.chat.completions.create(stream=True, **asked) as stream:
            for chunk in stream:
                if not pieces:
                    narrow.engine.kill()
                pieces += [choice.delta.content or "" for choice in chunk.choices]
        assert "".join(pieces) == undisturbed.choices[0].message.content
        assert chunk.to_dict()["timings"]["resumed"] == 1  # type: ignore[index]

    def test_a_stream_that_nobody_can_go_on_with_is_an_error(
        self, narrow: MeshParts, patient: OpenAI
    ):
        stream = patient.chat.completions.create(model=NAME, messages=HI, stream=True, **ENDLESS)
        with stream:
            assert next(stream).choices
            narrow.kill_worker()
            with pytest.raises(openai.APIError) as caught:
                collections.deque(stream, maxlen=0)
        assert caught.value.code == "worker_failed"
        narrow.start_worker()
        answer = patient.chat.completions.create(model=NAME, messages=HI, max_tokens=2)
        assert answer.choices[0].message.role == "assistant"
