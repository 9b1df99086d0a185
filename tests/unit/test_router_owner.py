"""The owner of a request: the same for the same key and user, another for any others."""

import re

from hypothesis import given
from hypothesis import strategies as st

from router.owner import bearer_key, owner_of

keys = st.binary(max_size=12)
users = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(keys, users, keys, users)
def test_owners_are_equal_exactly_when_key_and_user_are(key, user, other_key, other_user):
    same = (key, user) == (other_key, other_user)

    assert (owner_of(key, user) == owner_of(other_key, other_user)) == same


@given(st.text("ab1", max_size=6), st.integers(0, 6))
def test_key_and_user_are_not_run_together(text, cut):
    key, user = text[:cut], text[cut:]
    moved = text[: cut + 1], text[cut + 1 :]

    if (key, user) != moved:
        assert owner_of(key.encode(), user) != owner_of(moved[0].encode(), moved[1])


@given(keys, users)
def test_an_owner_is_sixteen_hex_digits_or_nobody(key, user):
    owner = owner_of(key, user)

    assert re.fullmatch("[0-9a-f]{16}" if key or user else "", owner)


def test_only_a_bearers_key_counts():
    assert bearer_key(b"Bearer sk-1") == b"sk-1"
    assert bearer_key(b"bearer  sk-1 ") == b"sk-1"
    assert bearer_key(b"Bearer") == b""
    assert bearer_key(b"Basic dXNlcjpwYXNz") == b""
