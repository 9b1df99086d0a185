"""The judge of near ties computes what the engine drew from, or its verdicts are worth nothing."""

import pytest
from asking import PERSON, frames_of, request, tokens_of

from loadtests.near_ties import Judge
from shared.protocol import ChatInput, Constraint, Message, Sampling, TextInput, Tool, ToolChoice
from worker.engine.draws import uniform
from worker.engine.sampling import choose

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

DRAWN = Sampling(seed=5, temperature=0.8)
TOOL = Tool("look_up", "Looks a word up", '{"type":"object","properties":{"word":{"enum":["a"]}}}')

ASKED = {
    "greedy": {},
    "drawn": {"sampling": DRAWN},
    "penalties": {
        "sampling": Sampling(
            seed=2, temperature=0.8, repeat_penalty=1.2, presence_penalty=0.6, frequency_penalty=0.4
        )
    },
    "schema": {"constraint": Constraint("json_schema", PERSON), "sampling": DRAWN},
    "tool": {
        "input": ChatInput(
            (Message("user", "Look it up."),), tools=(TOOL,), tool_choice=ToolChoice("required")
        ),
        "sampling": DRAWN,
    },
    "bare prompt": {"input": TextInput("Once upon a time")},
}


@pytest.fixture(scope="module")
def judge(q4_0):
    found = Judge(q4_0)
    yield found
    found.close()


@pytest.mark.parametrize("kind", ASKED)
async def test_the_judge_draws_the_tokens_that_the_engine_drew(engine, judge, kind):
    wanted = request(max_tokens=12, **ASKED[kind])
    tokens = tokens_of(await frames_of(engine, wanted))

    for index in (0, len(tokens) // 2, len(tokens) - 1):
        token = tokens[index]
        row = judge.row(wanted, tokens[:index])
        draw = uniform(wanted.sampling.seed, 0, index)
        own = choose(row, wanted.sampling, draw)
        assert judge.gap(wanted, tokens[:index], token, own) < 0.1


async def test_a_clear_choice_is_no_near_tie(engine, judge):
    question = (
        "<|im_start|>user\nWhat is the capital of Germany?<|im_end|>\n<|im_start|>assistant\n"
    )
    wanted = request(input=TextInput(question))
    tokens = tokens_of(await frames_of(engine, wanted))
    words = [judge.pieces[token].decode() for token in tokens]

    assert words[-2:] == [" Berlin", "."]
    assert judge.gap(wanted, tokens[:-2], tokens[-2], tokens[-1]) > 1
    assert judge.gap(wanted, tokens[:-2], tokens[-2], None) > 1
    assert judge.gap(wanted, tokens, None, tokens[-1]) > 1
