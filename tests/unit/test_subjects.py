import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import subjects

names = st.text(min_size=1)
identities = st.from_regex(r"[A-Za-z0-9-]{1,64}", fullmatch=True)
SUBJECT_TOKEN = re.compile(r"[^\s.*>]+")
KV_KEY = re.compile(r"[-/_=.a-zA-Z0-9]+")


@given(names)
def test_every_name_survives_encoding(name: str) -> None:
    assert subjects.decode_token(subjects.encode_token(name)) == name


@given(names)
def test_a_token_is_legal_in_subjects_and_as_a_key(name: str) -> None:
    token = subjects.encode_token(name)
    assert SUBJECT_TOKEN.fullmatch(token)
    assert KV_KEY.fullmatch(token)
    assert "/" not in token


@given(names, names)
def test_different_names_have_different_tokens(one: str, other: str) -> None:
    assert (subjects.encode_token(one) == subjects.encode_token(other)) == (one == other)


@given(st.text(alphabet="=ABab09-_ .+x\x00é"))
def test_decoding_takes_only_what_encoding_makes(token: str) -> None:
    try:
        name = subjects.decode_token(token)
    except ValueError:
        return
    assert subjects.encode_token(name) == token


@pytest.mark.parametrize("token", ["", "=", "=4", "=4g", "=2f", "=41", "a.b", "=FF", "=+1", "é"])
def test_a_token_of_no_name_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        subjects.decode_token(token)


@pytest.mark.parametrize("name", ["", "\ud800"])
def test_a_name_without_a_token_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        subjects.encode_token(name)


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("hf:a/b:c.gguf", "hf=3Aa=2Fb=3Ac=2Egguf"),
        ("模", "=E6=A8=A1"),
    ],
)
def test_the_encoding_itself_is_fixed(name: str, token: str) -> None:
    """Routers and workers of different versions must agree on it."""
    assert subjects.encode_token(name) == token


@pytest.mark.parametrize("identity", ["", "a.b", "*", ">", "a b", "a_b", "x" * 65, "a\n", "é"])
def test_what_is_no_identity_is_refused(identity: str) -> None:
    with pytest.raises(ValueError, match="identity"):
        subjects.valid_identity(identity)


def covers(pattern: str, subject: str) -> bool:
    """NATS's own rule, for a pattern and a subject without wildcards."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(given) >= len(wanted) and covers(
            ".".join(wanted[:-1]), ".".join(given[: len(wanted) - 1])
        )
    return len(wanted) == len(given) and all(
        w in ("*", g) for w, g in zip(wanted, given, strict=True)
    )


@given(names, identities)
def test_each_subject_is_covered_by_its_own_pattern_only(model: str, identity: str) -> None:
    patterns = {
        subjects.INFER: subjects.infer(model),
        subjects.DIRECT: subjects.infer_direct(model, identity),
        subjects.BODIES: subjects.body(identity),
        subjects.CANCELS: subjects.cancel(identity),
        subjects.PINGS: subjects.ping(identity),
        subjects.BEATS: subjects.beat(identity),
        subjects.ROUTERS: subjects.router(identity),
        f"{subjects.inbox(identity)}.>": f"{subjects.inbox(identity)}.r.1",
    }
    for pattern in patterns:
        for owner, subject in patterns.items():
            assert covers(pattern, subject) == (pattern == owner)
            # The server lets `>` pass where `*` is granted: that must not reach further either.
            wider = re.sub(r"\*$", ">", pattern)
            assert covers(wider, subject) == (pattern == owner)


@given(names, identities, identities)
def test_a_worker_s_doors_are_its_own(model: str, worker: str, other: str) -> None:
    door = subjects.infer_direct(model, other)
    assert covers(subjects.doors(worker), door) == (worker == other)
