"""What `mesh models set` makes of its flags."""

import pytest

from mesh.fleet import Snapshot
from mesh.model_settings import canonical, change, words
from shared.command_line import Refused
from shared.presence import Beat, LoadableModel, ModelState
from shared.settings import decode_settings, encode_settings
from shared.snapshot import ModelSettings


def test_what_is_not_named_stays() -> None:
    before = ModelSettings("m", minimum=1, maximum=3, priority=2, pinned=("worker-1",))
    assert change(before, {}) == before
    after = change(before, {"minimum": 2, "pinned": ()})
    assert after == ModelSettings("m", minimum=2, maximum=3, priority=2)


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ({"minimum": 4}, "--min 4 is more than --max 3; wanted at most as many"),
        ({"pinned": ("a b",)}, "--pin: identity 'a b': wanted 1 to 64 letters, digits or '-'"),
    ],
)
def test_what_cannot_be_is_refused(wanted: dict[str, object], line: str) -> None:
    with pytest.raises(Refused) as caught:
        change(ModelSettings("m", maximum=3), wanted)
    assert str(caught.value) == line


def test_no_maximum_is_no_bound() -> None:
    assert change(ModelSettings("m"), {"minimum": 4}).minimum == 4


def test_an_alias_is_set_by_the_model_s_own_name() -> None:
    able = LoadableModel("a/b:c", 1, 1, 1, 1, 1, aliases=("c",))
    pinned = ModelState("x-alias", "ready", alias_of="x")
    snapshot = Snapshot((Beat("w", "ready", 1, (pinned,), able=(able,)),), (), ())
    assert canonical(snapshot, "c") == ("a/b:c", True)
    assert canonical(snapshot, "a/b:c") == ("a/b:c", True)
    assert canonical(snapshot, "x-alias") == ("x", True)
    assert canonical(snapshot, "none") == ("none", False)


def test_it_is_told_in_one_line() -> None:
    assert words(ModelSettings("m")) == (
        "m: at least 0, at most as many as demand asks for, priority 0, pinned to no worker"
    )
    assert words(ModelSettings("m", 1, 3, 2, ("w-1", "w-2"))) == (
        "m: at least 1, at most 3, priority 2, pinned to w-1, w-2"
    )


def test_settings_are_json_and_read_back() -> None:
    settings = ModelSettings("m", 1, 3, 2, ("w-1",))
    assert decode_settings(encode_settings(settings)) == settings
