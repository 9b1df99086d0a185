"""Speculation on a real engine: the answers are those without it, only sooner.

The target is the small model with 32-bit weights and the draft is the same in Q4_0: several rows of
that target cost little more than one, so that drafting pays on any machine, and about one draft
token in ten is wrong.
"""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from asking import PERSON, STEADY_ENGINE, frames_of, idle, request, text_of, tokens_of
from engine_driver import EngineDriver

from loadtests.check_equality import Answer, compare
from loadtests.near_ties import Judge
from shared.assembly import Assembly
from shared.protocol import (
    ChatInput,
    Constraint,
    Delta,
    Done,
    End,
    Message,
    Sampling,
    TextInput,
    TokenInput,
    Tool,
    ToolChoice,
)
from worker.engine.speculation.candidates import POSITIONS

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

NEAR = 0.1
"""Logits; two runs may part where a token was so near to another."""
CONTEXT = 512
CODE = "Write a Python function that merges two sorted lists, with a docstring."
COPY = (
    "Repeat the following text word for word, and write nothing else.\n\n"
    "The harbour of Lindholm lies behind two long walls of grey stone. In the morning the boats "
    "come back with herring and cod, and the gulls follow them to the quay."
)
GREEDY = Sampling(seed=1, temperature=0)
DRAWN = Sampling(seed=5, temperature=0.8)
ENDLESS = Sampling(seed=1, temperature=0, ignore_eos=True)
WEATHER = Tool(
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
TOOLED = ChatInput(
    (Message("user", "Weather in Paris?"),),
    tools=(WEATHER,),
    tool_choice=ToolChoice("named", "get_weather", parallel=False),
)


@asynccontextmanager
async def started(target: Path, **options) -> AsyncIterator[EngineDriver]:
    driver = EngineDriver(
        str(target), slots=4, context=CONTEXT, threads=1, command=STEADY_ENGINE, **options
    )
    await driver.start()
    try:
        yield driver
    finally:
        await driver.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(f32: Path) -> AsyncIterator[EngineDriver]:
    async with started(f32, speculation="off") as driver:
        yield driver


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def speculating(f32: Path, q4_0: Path) -> AsyncIterator[EngineDriver]:
    async with started(f32, draft=str(q4_0)) as driver:
        yield driver
        assert driver.stats.accepted > 0, "nothing was drafted: these tests have shown nothing"


@pytest.fixture(scope="module")
def judge(f32: Path) -> Iterator[Judge]:
    found = Judge(f32, context=CONTEXT)
    yield found
    found.close()


def answer_of(frames, choices: int = 1) -> Answer:
    usage = frames[-1].usage
    written = tuple(tuple(tokens_of(frames, choice)) for choice in range(choices))
    return Answer(written, usage.drafted, usage.accepted)


def done_of(frames, choice: int = 0) -> Done:
    return next(f for f in frames if isinstance(f, Done) and f.choice == choice)


def again(wanted, **changes):
    """The same request for another engine: an attempt of its own."""
    fields = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
    for name in ("id", "attempt", "model"):
        del fields[name]
    return request(**{**fields, **changes})


def assert_same(wanted, without, with_it, judge: Judge) -> bool:
    """Equal, or parted at a near tie only; True if they are equal to the end."""
    assert isinstance(without[-1], End), without[-1]
    assert isinstance(with_it[-1], End), with_it[-1]
    differences = compare(wanted, answer_of(without, wanted.n), answer_of(with_it, wanted.n), judge)
    assert all(d.gap < NEAR for d in differences), differences
    if differences:
        return False
    for choice in range(wanted.n):
        assert text_of(with_it, choice) == text_of(without, choice)
        one, other = done_of(without, choice), done_of(with_it, choice)
        assert (one.reason, one.count, one.stopped_by) == (
            other.reason,
            other.count,
            other.stopped_by,
        )
    return True


KINDS = {
    "greedy": {"text": CODE},
    "copied": {"text": COPY},
    "drawn": {"text": CODE, "sampling": DRAWN},
    "schema": {"text": "A person as JSON.", "constraint": Constraint("json_schema", PERSON)},
    "schema drawn": {
        "text": "A person as JSON.",
        "constraint": Constraint("json_schema", PERSON),
        "sampling": DRAWN,
    },
    "regex": {
        "text": "A date?",
        "constraint": Constraint("regex", r"([0-9]{4}-[0-9]{2}-[0-9]{2}, ){4}"),
    },
    "tool": {"input": TOOLED},
    "tool drawn": {"input": TOOLED, "sampling": DRAWN},
    "repeat penalty": {
        "text": CODE,
        "sampling": Sampling(seed=1, temperature=0, repeat_penalty=1.2),
    },
    "presence and frequency": {
        "text": CODE,
        "sampling": Sampling(seed=2, temperature=0.8, presence_penalty=0.6, frequency_penalty=0.4),
    },
    "bias": {
        "text": CODE,
        "sampling": Sampling(seed=1, temperature=0, logit_bias={28: -100.0, 198: 2.0}),
    },
    "top p, top k, min p": {
        "text": CODE,
        "sampling": Sampling(seed=3, temperature=1.0, top_p=0.9, top_k=40, min_p=0.05),
    },
    "logprobs": {"text": CODE, "logprobs": 3},
    "choices": {"text": CODE, "n": 3, "sampling": DRAWN, "max_tokens": 24},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_is_the_one_without_speculation(plain, speculating, judge, kind):
    fields = dict(KINDS[kind])
    wanted = request(fields.pop("text", ""), **{"max_tokens": 48, **fields})
    without = await frames_of(plain, wanted)
    with_it = await frames_of(speculating, again(wanted))

    assert_same(wanted, without, with_it, judge)
    assert without[-1].usage.drafted == 0


async def test_a_natural_end_inside_a_draft_ends_the_answer(plain, speculating, judge):
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    wanted = request(input=TextInput(question))
    without = await frames_of(plain, wanted)
    with_it = await frames_of(speculating, again(wanted))

    assert text_of(with_it) == "The capital of France is Paris."
    assert done_of(with_it).reason == "stop"
    assert_same(wanted, without, with_it, judge)


async def test_a_stop_string_ends_the_text_before_it_wherever_it_lies(plain, speculating, judge):
    whole = text_of(await frames_of(plain, request(COPY, max_tokens=40)))
    for begin in range(20, 60, 7):
        wanted = request(COPY, max_tokens=40, stop=(whole[begin : begin + 5],))
        without = await frames_of(plain, wanted)
        with_it = await frames_of(speculating, again(wanted))

        assert done_of(without).stopped_by == wanted.stop[0]
        assert_same(wanted, without, with_it, judge)


async def test_logprobs_are_those_without_speculation(plain, speculating, judge):
    wanted = request(CODE, max_tokens=32, logprobs=2)
    without = await frames_of(plain, wanted)
    with_it = await frames_of(speculating, again(wanted))

    def entries(frames):
        return [e for f in frames if isinstance(f, Delta) for e in f.logprobs]

    assert [e.token for e in entries(with_it)] == tokens_of(with_it)
    assert all(e.top[0].token == e.token for e in entries(with_it))
    if assert_same(wanted, without, with_it, judge):
        for one, other in zip(entries(without), entries(with_it), strict=True):
            assert other.logprob == pytest.approx(one.logprob, abs=0.05)
            assert other.text == one.text


@pytest.mark.parametrize("sampling", [ENDLESS, DRAWN], ids=["greedy", "drawn"])
async def test_max_tokens_is_honoured_exactly(speculating, sampling):
    source = request(COPY).input
    results = await asyncio.gather(
        *(
            frames_of(speculating, request(input=source, max_tokens=limit, sampling=sampling))
            for limit in range(1, 13)
        )
    )

    for limit, frames in enumerate(results, 1):
        done = done_of(frames)
        assert done.count == len(tokens_of(frames)) == frames[-1].usage.completion
        assert (done.count, done.reason) == (limit, "length")


async def test_the_context_ends_an_answer_by_length(plain, speculating, judge):
    prompt = tuple(tokens_of(await frames_of(plain, request(CODE, max_tokens=60))))
    prompt = (prompt * 40)[: CONTEXT - 9]
    wanted = request(input=TokenInput(prompt), max_tokens=500, sampling=ENDLESS)
    without = await frames_of(plain, wanted)
    with_it = await frames_of(speculating, again(wanted))

    assert (done_of(with_it).reason, done_of(with_it).count) == ("length", 9)
    assert_same(wanted, without, with_it, judge)


async def test_tokens_come_once_and_without_a_gap(speculating):
    async def one(wanted) -> list[Delta]:
        frames = await frames_of(speculating, wanted)
        assembly = Assembly(wanted.attempt, wanted.n)
        assert {assembly.check(frame) for frame in frames} == {"take"}
        assert assembly.ended
        return [f for f in frames if isinstance(f, Delta)]

    deltas = await asyncio.gather(
        one(request(CODE, max_tokens=40, logprobs=1)),
        one(request(COPY, max_tokens=40)),
        one(request(CODE, max_tokens=20, n=3, sampling=DRAWN, logprobs=0)),
        one(request("A person as JSON.", constraint=Constraint("json_schema", PERSON))),
        one(request(input=TOOLED, max_tokens=40)),
    )

    for delta in (*deltas[0], *deltas[2]):
        assert len(delta.logprobs) == len(delta.tokens)


async def test_company_that_comes_and_goes_changes_no_answer(plain, speculating, judge):
    """More requests than slots, each of another length: slots are exchanged, drafts with them."""
    topics = ["a lighthouse", "a train", "the moon", "bread", "a violin", "rain", "a fox", "snow"]
    wanted = [
        request(f"Write a short text about {topic}.", max_tokens=9 + 11 * number % 40)
        for number, topic in enumerate(topics)
    ]
    without = [await frames_of(plain, one) for one in wanted]
    with_it = await asyncio.gather(*(frames_of(speculating, again(one)) for one in wanted))

    for one, left, right in zip(wanted, without, with_it, strict=True):
        assert_same(one, left, right, judge)
    await idle(speculating)


async def test_a_conversation_goes_on_after_an_answer_with_rejected_drafts(
    plain, speculating, judge
):
    """What a rejected draft left in the cache must not be taken for the conversation."""
    first = request("Tell me about the sea.", max_tokens=40, sampling=DRAWN)
    answer = await frames_of(speculating, first)
    turns = (
        *first.input.messages,
        Message("assistant", text_of(answer)),
        Message("user", "Say it in other words."),
    )
    wanted = request(input=ChatInput(turns), max_tokens=32)
    without = await frames_of(plain, wanted)
    with_it = await frames_of(speculating, again(wanted))

    assert with_it[-1].usage.cached >= answer[-1].usage.prompt - 2
    assert_same(wanted, without, with_it, judge)


async def test_a_client_that_leaves_in_the_middle_frees_its_slot(speculating):
    await idle(speculating)
    streams = [
        speculating.submit(request(CODE, max_tokens=900, sampling=ENDLESS)) for _ in range(4)
    ]
    for stream in streams:
        await anext(stream)
    for stream in streams[:3]:
        await stream.aclose()
    frames = await asyncio.gather(
        *(frames_of(speculating, request(COPY, max_tokens=12)) for _ in range(3))
    )
    await streams[3].aclose()
    await idle(speculating)

    assert all(isinstance(f[-1], End) for f in frames)
    assert speculating.stats.kv_used == 0


async def test_a_draft_model_drafts_where_nothing_repeats(f32, q4_0):
    """These answers repeat too little for lookup, but the draft knows nine of ten tokens."""
    asked = [request(f"Write a {name} function that adds two numbers.") for name in ("C", "Python")]
    async with started(f32, draft=str(q4_0)) as engine:
        ends = [(await frames_of(engine, again(one, max_tokens=80)))[-1] for one in asked]
    async with started(f32, speculation="ngram") as engine:
        alone = [(await frames_of(engine, again(one, max_tokens=80)))[-1] for one in asked]

    accepted, found = (sum(end.usage.accepted for end in each) for each in (ends, alone))
    assert accepted > found + 20


async def test_what_was_drafted_and_accepted_is_told(f32, q4_0):
    async with started(f32, draft=str(q4_0)) as engine:
        ends = [
            (await frames_of(engine, request(text, max_tokens=48)))[-1] for text in (CODE, COPY)
        ]
        stats = engine.stats

    assert all(end.usage.accepted <= end.usage.drafted for end in ends)
    assert all(end.usage.accepted < end.usage.completion for end in ends)
    assert stats.drafted == sum(end.usage.drafted for end in ends)
    assert stats.accepted == sum(end.usage.accepted for end in ends) > 0
    assert (sum(stats.drafted_at), sum(stats.accepted_at)) == (stats.drafted, stats.accepted)
    for counts in (stats.drafted_at, stats.accepted_at):
        assert len(counts) <= POSITIONS
        # the last position takes all beyond
        assert list(counts[: POSITIONS - 1]) == sorted(counts[: POSITIONS - 1], reverse=True)


async def test_a_draft_of_another_vocabulary_is_refused_and_the_model_served(
    f32, q4_0, tmp_path, plain, judge
):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(_renamed(q4_0.read_bytes(), "Ġwater", "Ġwaxer"))
    wanted = request(CODE, max_tokens=24)
    without = await frames_of(plain, wanted)
    async with started(f32, draft=str(wrong)) as engine:
        with_it = await frames_of(engine, again(wanted))
        advice = engine.ready.advice

    assert "waxer" in advice
    assert "draft" in advice
    assert_same(wanted, without, with_it, judge)


def _renamed(data: bytes, token: str, other: str) -> bytes:
    """A GGUF file's bytes with one token of the vocabulary spelt otherwise, of the same length."""

    def entry(text: str) -> bytes:
        spelt = text.encode()
        return struct.pack("<Q", len(spelt)) + spelt

    assert data.count(entry(token)) == 1
    assert len(entry(token)) == len(entry(other))
    return data.replace(entry(token), entry(other))
