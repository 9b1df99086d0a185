"""Requests that no honest router sends: each gets its answer or a reason, and the rest goes on.

The agent passes on whatever it can decode, so that the engine is the last to notice.
"""

import os
import random
import time

import msgspec
import pytest
from asking import PERSON, frames_of, idle, request, text_of

from shared.protocol import (
    ChatInput,
    Constraint,
    Embed,
    EmbedResult,
    End,
    Fail,
    Generate,
    Message,
    Resumed,
    Sampling,
    TextInput,
    TokenInput,
    Tool,
    ToolChoice,
    decode_request,
    encode,
)
from tests.mutations import Mutator

pytestmark = [
    pytest.mark.model,
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
]


def honest() -> list[Generate | Embed]:
    drawn = Sampling(7, 0.8, 0.9, 40, 0.05, 1.1, 0.5, 0.5, {300: -100.0})
    tool = Tool("f", "does it", '{"type":"object","properties":{"a":{"enum":["x"]}}}')
    turns = (Message("system", "be brief"), Message("user", "hi"))
    same = {"deadline": time.time() + 60}
    return [
        request(sampling=drawn, stop=("\n",), logprobs=2, max_tokens=6, **same),
        request(input=ChatInput(turns, (tool,), ToolChoice("required")), max_tokens=12, **same),
        request(constraint=Constraint("json_schema", PERSON), max_tokens=6, **same),
        request(constraint=Constraint("regex", "[a-f]+x"), max_tokens=6, n=2, **same),
        request(input=TokenInput((1, 200, 3000)), resume=(Resumed((400, 50)),), **same),
        request(input=TextInput("Once"), resume=(Resumed(done=3), Resumed((7,))), n=2, **same),
        Embed("e", 1, "bench", (TextInput("a"), TokenInput((1, 2))), time.time() + 60),
    ]


COUNT = 500


async def test_whatever_can_be_decoded_is_answered_or_refused(engine):
    seed = int(os.environ.get("MESH_CHAOS_SEED", random.randrange(10**6)))
    print(f"seed {seed}")
    mutator = Mutator(seed)
    usual = text_of(await frames_of(engine, request()))
    pid = engine.pid
    sent = refused = 0
    while sent < COUNT:
        data = mutator.mutate(encode(mutator.random.choice(honest())))
        try:
            wanted = decode_request(data)
        except msgspec.DecodeError:
            continue
        fields = {"attempt": mutator.random.getrandbits(63), "deadline": time.time() + 60}
        if isinstance(wanted, Generate):
            # What it says is not looked at here, only that it comes to an end.
            fields["max_tokens"] = min(wanted.max_tokens or 6, 6)
        frames = await frames_of(engine, msgspec.structs.replace(wanted, **fields))
        assert isinstance(frames[-1], End | EmbedResult | Fail), wanted
        refused += isinstance(frames[-1], Fail)
        sent += 1
    print(f"{sent} requests, {refused} refused")
    assert refused
    await idle(engine)
    assert engine.pid == pid
    assert text_of(await frames_of(engine, request())) == usual
