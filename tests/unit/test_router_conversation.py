"""What makes two requests turns of one conversation."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.conversation import conversation_key, has_begun, rough_tokens
from shared.protocol import (
    ChatInput,
    Embed,
    Generate,
    Message,
    Sampling,
    TextInput,
    TokenInput,
)

texts = st.text(max_size=2000)


def request(given_input, **more):
    return Generate(
        id="r",
        attempt=1,
        model="m",
        input=given_input,
        sampling=Sampling(seed=1),
        deadline=0.0,
        **more,
    )


def chat(*messages, **more):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return request(
        ChatInput(tuple(Message(roles[role], content) for role, content in messages)), **more
    )


@given(texts, texts, st.lists(st.tuples(st.sampled_from("ua"), texts), max_size=6))
def test_turns_have_the_key_of_the_first(system, user, rest):
    first = chat(("s", system), ("u", user))

    assert conversation_key(chat(("s", system), ("u", user), *rest)) == conversation_key(first)


@given(texts, texts)
def test_another_first_question_is_another_conversation(one, other):
    same = conversation_key(chat(("s", "x"), ("u", one))) == conversation_key(
        chat(("s", "x"), ("u", other))
    )

    assert same == (one == other) or len(one) == len(other) > 1024


@pytest.mark.parametrize(
    "other",
    [
        chat(("s", "y"), ("u", "hi")),
        chat(("u", "hi")),
        chat(("s", "xu"), ("u", "hi")),
        chat(("s", "x"), ("u", "hi"), owner="me"),
        chat(("s", "x" + 2000 * "a"), ("u", "hi")),
    ],
)
def test_system_message_and_owner_count(other):
    assert conversation_key(other) != conversation_key(chat(("s", "x"), ("u", "hi")))


def test_the_clients_own_name_counts_alone_and_for_its_owner():
    one = chat(("u", "one"), owner="me")
    other = chat(("u", "other"), owner="me")
    stranger = chat(("u", "one"), owner="you")

    assert conversation_key(one, "mine") == conversation_key(other, "mine")
    assert conversation_key(one, "mine") != conversation_key(one)
    assert conversation_key(one, "mine") != conversation_key(stranger, "mine")


def test_a_bare_prompt_that_grows_stays_one_conversation():
    start = "x" * 256
    assert conversation_key(request(TextInput(start))) == conversation_key(
        request(TextInput(start + " and more"))
    )
    tokens = tuple(range(256))
    assert conversation_key(request(TokenInput(tokens))) == conversation_key(
        request(TokenInput((*tokens, 1, 2)))
    )
    assert conversation_key(request(TokenInput((1, 2)))) != conversation_key(
        request(TokenInput((12,)))
    )


def test_the_model_does_not_count_so_that_aliases_meet():
    one = chat(("u", "hi"))

    assert conversation_key(one) == conversation_key(msgspec.structs.replace(one, model="alias"))


def test_embeddings_have_no_conversation():
    embed = Embed("r", 1, "m", (TextInput("12345678"), TokenInput((1, 2, 3))), 0.0)

    assert conversation_key(embed, "mine") is None
    assert rough_tokens(embed) == 3


def test_a_conversation_has_begun_until_something_was_answered():
    assert has_begun(chat(("s", "x"), ("u", "hi")))
    assert not has_begun(chat(("u", "hi"), ("a", "hello"), ("u", "and?")))
    assert has_begun(request(TextInput("hi")))
    assert has_begun(Embed("r", 1, "m", (TextInput("hi"),), 0.0))


def test_lengths_are_exact_for_tokens_and_a_guess_for_text():
    assert rough_tokens(request(TokenInput(tuple(range(77))))) == 77
    assert rough_tokens(request(TextInput("x" * 400))) == 100
    assert rough_tokens(chat(("s", "x" * 40), ("u", "x" * 40), ("a", "x" * 40))) == 30
