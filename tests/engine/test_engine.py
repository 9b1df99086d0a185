"""The engine process on the real model: what goes in over the link, what comes out."""

import asyncio
import json
import os
import re
import signal
import time

import numpy as np
import pytest
from asking import PERSON, frames_of, idle, request, text_of, tokens_of
from engine_driver import EngineDied, EngineDriver, new_attempt

from shared.protocol import (
    ChatInput,
    Constraint,
    Delta,
    Done,
    Embed,
    EmbedResult,
    End,
    Fail,
    Message,
    Sampling,
    TextInput,
    TokenInput,
    Tool,
    ToolChoice,
)

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]


async def test_an_answer_is_whole_and_accounted_for(engine):
    question = (
        "<|im_start|>user\nWhat is the capital of Germany?<|im_end|>\n<|im_start|>assistant\n"
    )
    frames = await frames_of(engine, request(input=TextInput(question)))

    deltas = [f for f in frames if isinstance(f, Delta)]
    assert text_of(frames) == "The capital of Germany is Berlin."
    assert [d.first for d in deltas if d.tokens] == list(range(len(tokens_of(frames))))
    done, end = frames[-2:]
    assert isinstance(done, Done)
    assert done.reason == "stop"
    assert done.count == len(tokens_of(frames))
    assert isinstance(end, End)
    assert end.usage.completion == done.count
    assert end.usage.prompt > 5


async def test_a_conversation_that_ended_between_others_is_not_computed_again(engine):
    """Its slot is wanted for one of the others, so that the busy ones are consecutive."""
    prompt = tuple(range(1000, 1200))
    tasks = []
    for wanted in (
        request("Tell me stories.", max_tokens=60),
        request(input=TokenInput(prompt), max_tokens=2),
        request("Tell me poems.", max_tokens=60),
    ):
        tasks.append(asyncio.create_task(frames_of(engine, wanted)))
        await asyncio.sleep(0.05)
    answer = tuple(tokens_of(await tasks[1]))
    await asyncio.sleep(0.3)
    again = await frames_of(engine, request(input=TokenInput((*prompt, *answer, 1, 2, 3))))
    await asyncio.gather(*tasks)

    assert again[-1].usage.cached >= len(prompt)


async def test_the_end_by_length_is_told(engine):
    frames = await frames_of(engine, request(max_tokens=5))

    done = next(f for f in frames if isinstance(f, Done))
    assert (done.reason, done.count) == ("length", 5)


async def test_company_does_not_change_an_answer(engine):
    topics = ["a lighthouse", "a train", "the moon", "bread", "a violin", "rain", "a fox"]
    alone = [tokens_of(await frames_of(engine, request(f"Write about {t}."))) for t in topics]
    together = await asyncio.gather(
        *(frames_of(engine, request(f"Write about {t}.")) for t in topics)
    )

    equal = sum(tokens_of(frames) == one for frames, one in zip(together, alone, strict=True))
    # llama.cpp rounds one row in another way than several, so a near tie may fall otherwise
    assert equal >= len(topics) - 1


async def test_a_seed_repeats_and_another_differs(engine):
    def sampled(seed):
        return request(sampling=Sampling(seed=seed, temperature=1.0), max_tokens=16)

    warm = await frames_of(engine, sampled(11))
    first = await frames_of(engine, sampled(11))
    again = await frames_of(engine, sampled(11))
    other = await frames_of(engine, sampled(12))

    assert tokens_of(first) == tokens_of(again)
    assert tokens_of(warm)[0] == tokens_of(first)[0]
    assert tokens_of(first) != tokens_of(other)


async def test_the_tokens_of_a_prompt_are_reused(engine):
    text = "The old harbour lies in the north. " * 12
    first = await frames_of(engine, request(text, max_tokens=4))
    second = await frames_of(engine, request(text, max_tokens=4))

    assert second[-1].usage.cached == second[-1].usage.prompt - 2
    assert tokens_of(first) == tokens_of(second)


async def test_choices_share_the_prompt_and_differ(engine):
    text = "Say something surprising about the ocean. " * 6
    frames = await frames_of(
        engine,
        request(text, n=6, max_tokens=12, sampling=Sampling(seed=3, temperature=1.2)),
    )

    assert len({text_of(frames, choice) for choice in range(6)}) >= 5
    assert sum(isinstance(f, Done) for f in frames) == 6
    assert frames[-1].usage.completion == sum(len(tokens_of(frames, c)) for c in range(6))


async def test_a_stop_string_across_tokens_ends_the_text_before_it(engine):
    whole = text_of(await frames_of(engine, request(max_tokens=24)))
    stop = whole[10:17]
    frames = await frames_of(engine, request(max_tokens=24, stop=(stop,)))

    assert text_of(frames) == whole[: whole.index(stop)]
    done = next(f for f in frames if isinstance(f, Done))
    assert (done.reason, done.stopped_by) == ("stop", stop)


async def test_logprobs_are_probabilities_of_what_was_chosen(engine):
    frames = await frames_of(engine, request(max_tokens=6, logprobs=4))

    for delta in (f for f in frames if isinstance(f, Delta) and f.tokens):
        (entry,) = delta.logprobs
        assert entry.token == delta.tokens[0]
        assert entry.top[0].token == entry.token  # greedy
        assert entry.top[0].logprob == entry.logprob
        values = [t.logprob for t in entry.top]
        assert values == sorted(values, reverse=True)
        assert len(values) == 4
        assert np.exp(values).sum() <= 1 + 1e-6


async def test_a_biased_token_is_never_or_always_chosen(engine):
    first = tokens_of(await frames_of(engine, request(max_tokens=1)))[0]
    banned = await frames_of(
        engine,
        request(max_tokens=8, sampling=Sampling(seed=1, temperature=0, logit_bias={first: -100.0})),
    )
    forced = await frames_of(
        engine,
        request(max_tokens=3, sampling=Sampling(seed=1, temperature=0, logit_bias={1000: 100.0})),
    )

    assert first not in tokens_of(banned)
    assert tokens_of(forced) == [1000, 1000, 1000]


async def test_ignore_eos_writes_to_the_limit(engine):
    frames = await frames_of(
        engine,
        request(
            "Say hi.", max_tokens=60, sampling=Sampling(seed=1, temperature=0, ignore_eos=True)
        ),
    )

    assert len(tokens_of(frames)) == 60


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_schema_is_kept_to(engine, temperature):
    frames = await frames_of(
        engine,
        request(
            "Describe a person as JSON.",
            max_tokens=80,
            constraint=Constraint("json_schema", PERSON),
            sampling=Sampling(seed=5, temperature=temperature),
        ),
    )

    value = json.loads(text_of(frames))
    assert set(value) == {"name", "age"}
    assert 0 <= value["age"] <= 120


async def test_a_regex_is_kept_to(engine):
    frames = await frames_of(
        engine, request("A date?", constraint=Constraint("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}"))
    )

    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", text_of(frames))


async def test_an_impossible_schema_is_refused_by_name(engine):
    (frame,) = await frames_of(
        engine, request(constraint=Constraint("json_schema", '{"type": "nonsense"}'))
    )

    assert isinstance(frame, Fail)
    assert frame.code == "invalid_value"
    assert frame.param == "response_format"


async def test_a_forced_tool_is_called(engine):
    tool = Tool(
        "get_weather",
        "Weather of a city",
        json.dumps(
            {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 30}},
                "required": ["city"],
                "additionalProperties": False,
            }
        ),
    )
    source = ChatInput(
        (Message("user", "Weather in Paris?"),),
        tools=(tool,),
        tool_choice=ToolChoice("named", "get_weather", parallel=False),
    )
    frames = await frames_of(engine, request(input=source, max_tokens=120))

    deltas = [t for f in frames if isinstance(f, Delta) for t in f.tools]
    assert deltas[0].name == "get_weather"
    assert deltas[0].id
    assert set(json.loads("".join(t.arguments for t in deltas))) == {"city"}
    assert next(f for f in frames if isinstance(f, Done)).reason == "tool_calls"


async def test_a_prompt_over_the_context_is_refused_with_both_numbers(engine):
    (frame,) = await frames_of(engine, request("word " * 2000))

    assert isinstance(frame, Fail)
    assert frame.code == "context_length_exceeded"
    assert "1024" in frame.message
    assert re.search(r"prompt has 20\d\d tokens", frame.message)


async def test_the_context_ends_an_answer_by_length(engine):
    prompt = tuple(range(1000, 1000 + 1015))
    frames = await frames_of(
        engine,
        request(
            input=TokenInput(prompt),
            max_tokens=500,
            sampling=Sampling(seed=1, temperature=0, ignore_eos=True),
        ),
    )

    done = next(f for f in frames if isinstance(f, Done))
    assert (done.reason, done.count) == ("length", 1024 - 1015)


async def test_tokens_outside_the_vocabulary_are_refused(engine):
    (frame,) = await frames_of(engine, request(input=TokenInput((5, 10**7))))

    assert isinstance(frame, Fail)
    assert frame.param == "prompt"


async def test_an_empty_prompt_is_refused(engine):
    (frame,) = await frames_of(engine, request(input=TextInput("")))

    assert isinstance(frame, Fail)
    assert frame.code == "invalid_value"


async def test_a_cancelled_request_frees_its_slot_for_the_next(engine):
    streams = [engine.submit(request(max_tokens=900)) for _ in range(4)]
    for stream in streams:
        await anext(stream)
    for stream in streams:
        await stream.aclose()
    frames = await frames_of(engine, request("Hello", max_tokens=2))
    await idle(engine)

    assert isinstance(frames[-1], End)


async def test_an_expired_request_is_told_so(engine):
    ignoring = Sampling(seed=1, temperature=0, ignore_eos=True)
    frames = await frames_of(
        engine, request(max_tokens=900, deadline=time.time() + 0.3, sampling=ignoring)
    )

    assert isinstance(frames[-1], Fail)
    assert frames[-1].code == "deadline_exceeded"


async def test_more_requests_than_slots_all_finish(engine):
    results = await asyncio.gather(
        *(frames_of(engine, request(f"Number {i}", max_tokens=3 + i)) for i in range(14))
    )

    assert all(isinstance(frames[-1], End) for frames in results)


async def test_embeddings_are_unit_vectors_that_tell_meaning(engine):
    texts = ("A cat sat on the mat.", "A kitten lay on the rug.", "Interest rates rose sharply.")
    wanted = Embed(
        id="e",
        attempt=new_attempt(),
        model="bench",
        inputs=tuple(TextInput(t) for t in texts),
        deadline=time.time() + 60,
    )
    running = asyncio.create_task(frames_of(engine, request(max_tokens=40)))
    (result,) = await frames_of(engine, wanted)
    await running

    assert isinstance(result, EmbedResult)
    cat, kitten, rates = (np.frombuffer(v, "<f4") for v in result.vectors)
    assert cat.size == 576
    assert np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)
    assert cat @ kitten > cat @ rates


async def test_an_embedding_does_not_depend_on_how_it_is_chunked(engine):
    long = "The quick brown fox jumps over the lazy dog. " * 60

    async def embed(**company):
        wanted = Embed(
            id="e",
            attempt=new_attempt(),
            model="bench",
            inputs=(TextInput(long),),
            deadline=time.time() + 60,
        )
        (result,) = await frames_of(engine, wanted)
        return np.frombuffer(result.vectors[0], "<f4")

    alone = await embed()
    running = asyncio.create_task(frames_of(engine, request(max_tokens=60)))
    beside = await embed()
    await running

    assert alone @ beside == pytest.approx(1, abs=1e-3)


async def _drain(stream) -> None:
    async for _ in stream:
        pass


async def test_a_killed_engine_is_noticed_by_all_it_served(q4_0):
    driver = EngineDriver(str(q4_0), slots=2, context=512, threads=1)
    await driver.start()
    try:
        stream = driver.submit(request(max_tokens=400))
        await anext(stream)
        os.kill(driver.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            await asyncio.wait_for(_drain(stream), 10)
    finally:
        await driver.stop()


async def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path):
    path = tmp_path / "not.gguf"
    path.write_bytes(b"this is not a model" * 100)
    driver = EngineDriver(str(path))

    with pytest.raises(EngineDied) as told:
        await driver.start()

    assert "not.gguf" in str(told.value)
    assert "\n" not in str(told.value)
