"""OpenAI's own Python client on the whole system and the real model: text, vectors, models.

The model is tiny: what is checked is structure and sameness, never wisdom.
"""

import asyncio
import base64
import itertools
import struct
from collections.abc import Iterable
from math import sqrt

import pytest
from mesh_process import MeshUp
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAI
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

QUESTION = "What is a mesh network?"
END_OF_TURN = 2
"""SmolLM2's `<|im_end|>`."""
LETTER_A = 49


def say(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def joined(chunks: Iterable[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


class TestChat:
    def test_an_answer_has_all_its_parts(self, client: OpenAI, mesh_system: MeshUp):
        answer = client.chat.completions.create(
            model=mesh_system.model, messages=say(QUESTION), temperature=0, max_tokens=12
        )
        assert answer.id.startswith("chatcmpl-")
        assert answer.object == "chat.completion"
        assert answer.model == mesh_system.model
        assert answer.created > 1_700_000_000
        (choice,) = answer.choices
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert not choice.message.tool_calls
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        assert answer.usage.prompt_tokens > 0
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12

    def test_the_same_prompt_again_is_not_computed_again(self, client: OpenAI, mesh_system: MeshUp):
        long = say("Tell me of the sea, the wind and the ships. " * 8)
        answers = [
            client.chat.completions.create(model=mesh_system.model, messages=long, max_tokens=1)
            for _ in range(2)
        ]
        usage = answers[1].usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached is not None
        assert usage.prompt_tokens / 2 < cached < usage.prompt_tokens

    def test_every_kind_of_message_is_understood(self, client: OpenAI, mesh_system: MeshUp):
        answer = client.chat.completions.create(
            model=mesh_system.model,
            messages=[
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "Ada"},
                {"role": "assistant", "content": "Hello, Ada."},
                {"role": "user", "content": "Your turn."},
            ],
            max_completion_tokens=4,
        )
        assert answer.usage is not None
        assert 0 <= answer.usage.completion_tokens <= 4

    def test_choices_differ_and_have_their_indices(self, client: OpenAI, mesh_system: MeshUp):
        answer = client.chat.completions.create(
            model=mesh_system.model, messages=say(QUESTION), n=3, seed=5, max_tokens=10
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert len({choice.message.content for choice in answer.choices}) > 1
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 30

    def test_a_seed_tells_the_answer(self, client: OpenAI, mesh_system: MeshUp):
        first, again, other = (
            client.chat.completions.create(
                model=mesh_system.model, messages=say(QUESTION), seed=seed, max_tokens=12
            )
            .choices[0]
            .message.content
            for seed in (11, 11, 12)
        )
        assert first == again != other

    def test_a_stop_string_ends_the_answer_before_itself(self, client: OpenAI, mesh_system: MeshUp):
        asked = {
            "model": mesh_system.model,
            "messages": say(QUESTION),
            "temperature": 0,
            "max_tokens": 24,
        }
        whole = client.chat.completions.create(**asked).choices[0].message.content
        assert whole is not None
        # Across the border of two words, hence of two tokens.
        stop = whole[len(whole) // 2 :][:12]
        (cut,) = client.chat.completions.create(**asked, stop=["never said", stop]).choices
        assert cut.message.content == whole.partition(stop)[0] != whole
        assert cut.finish_reason == "stop"

    def test_logprobs_are_those_of_the_text(self, client: OpenAI, mesh_system: MeshUp):
        (choice,) = client.chat.completions.create(
            model=mesh_system.model,
            messages=say(QUESTION),
            temperature=0,
            max_tokens=8,
            logprobs=True,
            top_logprobs=3,
        ).choices
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 8
        spoken = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
        assert spoken.decode() == choice.message.content
        for token in choice.logprobs.content:
            likeliest = [top.logprob for top in token.top_logprobs]
            assert likeliest == sorted(likeliest, reverse=True)
            assert len(likeliest) == 3
            assert token.logprob == likeliest[0] <= 0

    def test_logit_bias_decides_the_tokens(self, client: OpenAI, mesh_system: MeshUp):
        (only_a,) = client.chat.completions.create(
            model=mesh_system.model,
            messages=say(QUESTION),
            max_tokens=6,
            logit_bias={str(LETTER_A): 100},
        ).choices
        assert only_a.message.content == "A" * 6
        (silent,) = client.chat.completions.create(
            model=mesh_system.model, messages=say(QUESTION), logit_bias={str(END_OF_TURN): 100}
        ).choices
        assert (silent.message.content, silent.finish_reason) == ("", "stop")

    def test_headers_name_the_request(self, client: OpenAI, mesh_system: MeshUp):
        raw = client.chat.completions.with_raw_response.create(
            model=mesh_system.model,
            messages=say("Hi"),
            max_tokens=2,
            extra_headers={"X-Request-Id": "a-name-of-mine"},
        )
        assert raw.headers["x-request-id"] == "a-name-of-mine"
        assert raw.parse().choices
        answer = client.chat.completions.create(
            model=mesh_system.model, messages=say("Hi"), max_tokens=2
        )
        assert answer._request_id


class TestStreams:
    def test_deltas_join_to_the_whole_answer(self, client: OpenAI, mesh_system: MeshUp):
        whole = client.chat.completions.create(
            model=mesh_system.model, messages=say(QUESTION), temperature=0, seed=1, max_tokens=16
        )
        chunks = list(
            client.chat.completions.create(
                model=mesh_system.model,
                messages=say(QUESTION),
                temperature=0,
                seed=1,
                max_tokens=16,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert joined(chunks) == whole.choices[0].message.content
        assert len(chunks) > 4
        assert chunks[0].choices[0].delta.role == "assistant"
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        *earlier, final = chunks
        assert [c.finish_reason for chunk in earlier for c in chunk.choices if c.finish_reason] == [
            "length"
        ]
        assert all(chunk.usage is None for chunk in earlier)
        assert final.choices == []
        assert final.usage is not None
        assert whole.usage is not None
        assert final.usage.total_tokens == whole.usage.total_tokens

    def test_without_being_asked_no_chunk_has_usage(self, client: OpenAI, mesh_system: MeshUp):
        chunks = list(
            client.chat.completions.create(
                model=mesh_system.model, messages=say(QUESTION), max_tokens=3, stream=True
            )
        )
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)

    def test_choices_are_streamed_side_by_side(self, client: OpenAI, mesh_system: MeshUp):
        asked = {"model": mesh_system.model, "messages": say(QUESTION), "n": 2, "max_tokens": 8}
        whole = client.chat.completions.create(**asked, seed=5)
        chunks = list(client.chat.completions.create(**asked, seed=5, stream=True))
        for choice in whole.choices:
            assert joined(chunks, choice.index) == choice.message.content

    def test_logprobs_come_with_the_deltas(self, client: OpenAI, mesh_system: MeshUp):
        chunks = list(
            client.chat.completions.create(
                model=mesh_system.model,
                messages=say(QUESTION),
                temperature=0,
                max_tokens=6,
                stream=True,
                logprobs=True,
                top_logprobs=1,
            )
        )
        told = [
            entry
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content or ()
        ]
        assert len(told) == 6
        assert b"".join(bytes(entry.bytes or ()) for entry in told).decode() == joined(chunks)

    def test_the_clients_own_gathering_of_events_works(self, client: OpenAI, mesh_system: MeshUp):
        with client.chat.completions.stream(
            model=mesh_system.model,
            messages=say(QUESTION),
            extra_body={"guided_regex": "(mesh ){4}"},
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert {"chunk", "content.delta", "content.done"} <= kinds
        assert final.choices[0].message.content == "mesh " * 4
        assert final.choices[0].finish_reason == "stop"


async def test_answers_at_the_same_time_do_not_mix(mesh_system: MeshUp):
    """More at once than there are slots, each made to answer with a word of its own."""
    async with AsyncOpenAI(
        base_url=mesh_system.base_url,
        api_key="none",
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    ) as client:

        async def ask(number: int) -> str:
            asked = {
                "model": mesh_system.model,
                "messages": say(f"Say anything, but number {number}."),
                "extra_body": {"guided_regex": f"answer-{number:03}"},
            }
            if number % 2:
                answer = await client.chat.completions.create(**asked)
                return answer.choices[0].message.content
            stream = await client.chat.completions.create(**asked, stream=True)
            return joined([chunk async for chunk in stream])

        answers = await asyncio.gather(*(ask(number) for number in range(12)))
    assert answers == [f"answer-{number:03}" for number in range(12)]


class TestCompletions:
    def test_text_goes_on(self, client: OpenAI, mesh_system: MeshUp):
        asked = {"model": mesh_system.model, "prompt": "The sea is", "temperature": 0}
        plain = client.completions.create(**asked, max_tokens=8)
        assert plain.object == "text_completion"
        assert plain.choices[0].finish_reason == "length"
        assert plain.choices[0].text
        echoed = client.completions.create(**asked, max_tokens=8, echo=True)
        assert echoed.choices[0].text == "The sea is" + plain.choices[0].text
        chunks = list(client.completions.create(**asked, max_tokens=8, stream=True))
        assert "".join(c.choices[0].text for c in chunks if c.choices) == plain.choices[0].text
        assert len(chunks) > 4

    def test_each_prompt_of_a_list_has_its_choices(self, client: OpenAI, mesh_system: MeshUp):
        prompts = ["The sea is", "One, two, three,"]
        asked = {"model": mesh_system.model, "temperature": 0, "max_tokens": 6}
        together = client.completions.create(**asked, prompt=prompts, n=2, echo=True)
        assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
        for choice, prompt in zip(
            together.choices, itertools.chain.from_iterable([p, p] for p in prompts), strict=True
        ):
            assert choice.text.startswith(prompt)
        assert together.usage is not None
        assert together.usage.completion_tokens == 24
        chunks = list(client.completions.create(**asked, prompt=prompts, stream=True))
        assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}

    def test_token_ids_are_a_prompt(self, client: OpenAI, mesh_system: MeshUp):
        asked = {"model": mesh_system.model, "max_tokens": 3, "temperature": 0}
        tokens = client.completions.create(**asked, prompt=[LETTER_A])
        assert (
            tokens.choices[0].text == client.completions.create(**asked, prompt="A").choices[0].text
        )

    def test_logprobs_in_the_older_form(self, client: OpenAI, mesh_system: MeshUp):
        (choice,) = client.completions.create(
            model=mesh_system.model, prompt="The sea is", temperature=0, max_tokens=4, logprobs=2
        ).choices
        told = choice.logprobs
        assert told is not None
        assert "".join(told.tokens or ()) == choice.text
        assert len(told.token_logprobs or ()) == len(told.top_logprobs or ()) == 4
        assert all(len(top) == 2 for top in told.top_logprobs or ())


class TestEmbeddings:
    TEXTS = ("The cat sits on the mat.", "A cat is sitting on a mat.", "Stock markets fell again.")

    def test_similar_texts_are_closer(self, client: OpenAI, mesh_system: MeshUp):
        answer = client.embeddings.create(
            model=mesh_system.model, input=list(self.TEXTS), encoding_format="float"
        )
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        assert answer.model == mesh_system.model
        assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
        cat, same, stocks = (entry.embedding for entry in answer.data)
        for vector in (cat, same, stocks):
            assert sqrt(dot(vector, vector)) == pytest.approx(1, abs=1e-5)
        assert dot(cat, same) > dot(cat, stocks)
        assert dot(cat, same) > dot(same, stocks)

    def test_the_clients_default_of_base64_is_the_same(self, client: OpenAI, mesh_system: MeshUp):
        asked = {"model": mesh_system.model, "input": self.TEXTS[0]}
        default = client.embeddings.create(**asked).data[0].embedding
        numbers = client.embeddings.create(**asked, encoding_format="float").data[0].embedding
        assert default == pytest.approx(numbers, abs=1e-6)
        text = client.embeddings.create(**asked, encoding_format="base64").data[0].embedding
        assert isinstance(text, str)
        packed = base64.b64decode(text)
        unpacked = struct.unpack(f"<{len(packed) // 4}f", packed)
        assert list(unpacked) == pytest.approx(numbers, abs=1e-6)

    def test_fewer_dimensions_keep_the_norm(self, client: OpenAI, mesh_system: MeshUp):
        vector = client.embeddings.create(
            model=mesh_system.model, input=self.TEXTS[0], dimensions=64
        ).data[0]
        assert len(vector.embedding) == 64
        assert sqrt(dot(vector.embedding, vector.embedding)) == pytest.approx(1, abs=1e-5)


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def test_models_are_listed_and_found(client: OpenAI, mesh_system: MeshUp):
    (listed,) = client.models.list()
    found = client.models.retrieve(mesh_system.model)
    assert listed.id == found.id == mesh_system.model
    assert found.object == "model"
    assert found.owned_by
