import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.broker_config import Identity, permissions, quote, render, render_users

names = st.from_regex(r"[A-Za-z0-9-]{1,64}", fullmatch=True)
kinds = st.sampled_from(["router", "worker", "mesh"])


@given(kinds, names)
def test_no_identity_is_granted_all_of_anything_that_holds_prompts_or_answers(
    kind: str, name: str
) -> None:
    grant = permissions(Identity(name, kind, "p"))  # type: ignore[arg-type]
    inboxes = [item for item in grant.subscribe if item.startswith(("_INBOX", "*", ">"))]
    assert inboxes == [f"_INBOX_{name}.>"]
    # Requests to the queue are dealt, never overheard.
    assert [item for item in grant.subscribe if ".infer." in item] == (
        ["mesh.v1.infer.* free"] if kind == "worker" else []
    )
    # An empty list would mean "everything" to the server.
    assert grant.subscribe
    assert grant.publish


@given(st.text())
def test_a_quoted_value_reads_back_or_is_refused(text: str) -> None:
    try:
        quoted = quote(text)
    except ValueError:
        assert not text.isprintable()
        return
    assert quoted[0] == quoted[-1] == '"'
    inner = quoted[1:-1]
    assert inner.replace('\\"', "").replace("\\\\", "").count('"') == 0
    assert inner.replace("\\\\", "\0").replace('\\"', '"').replace("\0", "\\") == text


@pytest.mark.parametrize("password", ["", "a\nb", 'a"\x00', "tab\t"])
def test_a_password_the_file_could_not_hold_is_refused(password: str) -> None:
    with pytest.raises(ValueError, match=r"empty|printable"):
        render_users([Identity("router-1", "router", password)])


@pytest.mark.parametrize("name", ["", "a.b", "*", 'a"', "a b"])
def test_a_name_that_is_no_identity_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="identity"):
        render_users([Identity(name, "worker", "p")])


def test_two_users_of_one_name_are_refused() -> None:
    """They would share an inbox."""
    twice = [Identity("a", "worker", "p"), Identity("a", "router", "q")]
    with pytest.raises(ValueError, match="different names"):
        render(twice, port=0, store_dir="x")


def test_what_was_not_asked_for_is_not_there() -> None:
    text = render([], port=0, store_dir="x")
    assert "port: -1" in text
    assert "http" not in text
    assert "ports_file_dir" not in text
    assert 'http: "127.0.0.1:8222"' in render([], port=1, store_dir="x", http_port=8222)
