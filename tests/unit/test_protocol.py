import inspect
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import presence, protocol
from shared.presence import Beat, LoadableModel, RouterBeat
from shared.protocol import Accepted, Cancel, Chunk, Delta, Embed, Fail, Generate, Usage

_FRAMES = (
    protocol.Accepted,
    protocol.Busy,
    protocol.Delta,
    protocol.Done,
    protocol.End,
    protocol.EmbedResult,
    protocol.Fail,
    protocol.Handback,
)
_STRUCTS = [
    value
    for module in (protocol, presence)
    for _, value in inspect.getmembers(module, inspect.isclass)
    if issubclass(value, msgspec.Struct)
]

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def values(node: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Any value of a type, as msgspec itself describes the type."""
    match node:
        case msgspec.inspect.StructType():
            return st.builds(
                node.cls, **{field.name: values(field.type, depth + 1) for field in node.fields}
            )
        case msgspec.inspect.UnionType():
            return st.one_of([values(kind, depth) for kind in node.types])
        case msgspec.inspect.VarTupleType():
            # A token's alternatives are tokens again; two levels are all that occurs.
            size = 0 if depth > 5 else 3
            item = st.nothing() if depth > 5 else values(node.item_type, depth + 1)
            return st.lists(item, max_size=size).map(tuple)
        case msgspec.inspect.DictType():
            return st.dictionaries(
                values(node.key_type, depth), values(node.value_type, depth), max_size=3
            )
        case msgspec.inspect.LiteralType():
            return st.sampled_from(node.values)
        case msgspec.inspect.AnyType():
            return plain
        case msgspec.inspect.IntType():
            return st.integers(_or(node.ge, -(2**63)), _or(node.le, 2**63 - 1))
        case msgspec.inspect.FloatType():
            least, above = _or(node.gt, node.ge), node.gt is not None
            return st.floats(least, node.le, exclude_min=above, allow_nan=False)
        case msgspec.inspect.StrType():
            if node.pattern is not None:
                return st.from_regex(node.pattern)
            return st.text(min_size=node.min_length or 0)
    leaves: dict[type, st.SearchStrategy[Any]] = {
        msgspec.inspect.BytesType: st.binary(),
        msgspec.inspect.BoolType: st.booleans(),
        msgspec.inspect.NoneType: st.none(),
    }
    return leaves[type(node)]


def _or(bound: Any, otherwise: Any) -> Any:
    return otherwise if bound is None else bound


def any_of(kind: Any) -> st.SearchStrategy[Any]:
    return values(msgspec.inspect.type_info(kind))


@pytest.mark.parametrize("kind", _STRUCTS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_struct_survives_its_round_trip(kind: type[msgspec.Struct], data: Any) -> None:
    value = data.draw(any_of(kind))
    assert msgspec.msgpack.decode(protocol.encode(value), type=kind) == value


@given(any_of(Generate | Embed))
def test_requests_survive_the_wire(request: Any) -> None:
    assert protocol.decode_request(protocol.encode(request)) == request


@given(st.lists(st.one_of([any_of(kind) for kind in _FRAMES]), max_size=4))
def test_a_message_of_mixed_frames_survives_the_wire(frames: list[Any]) -> None:
    assert protocol.decode_frames(protocol.encode(frames)) == tuple(frames)


@given(any_of(Cancel), any_of(Chunk))
def test_cancels_and_chunks_survive_the_wire(cancel: Cancel, chunk: Chunk) -> None:
    assert protocol.decode_cancel(protocol.encode(cancel)) == cancel
    assert protocol.decode_chunk(protocol.encode(chunk)) == chunk


@given(any_of(Beat), any_of(RouterBeat))
def test_beats_survive_the_wire_as_json(worker: Beat, router: RouterBeat) -> None:
    sent = presence.encode_beat(worker)
    assert isinstance(msgspec.json.decode(sent), dict)
    if _finite(worker):
        assert presence.decode_beat(sent) == worker
    if _finite(router):
        assert presence.decode_router_beat(presence.encode_beat(router)) == router


def _finite(value: Any) -> bool:
    """JSON knows no infinity."""
    if isinstance(value, msgspec.Struct):
        return all(_finite(inner) for inner in msgspec.structs.astuple(value))
    if isinstance(value, tuple):
        return all(_finite(inner) for inner in value)
    return not isinstance(value, float) or abs(value) != float("inf")


def test_a_model_that_could_be_loaded_takes_little_of_a_beat() -> None:
    model = LoadableModel("SmolLM2-135M-Instruct", 10**9, 4096, 8, 10**8, 1_700_000_000)
    one, two = (len(presence.encode_beat(Beat("w", "ready", 1, able=(model,) * n))) for n in (1, 2))
    assert two - one < 90


@pytest.mark.parametrize(
    "decode",
    [
        protocol.decode_request,
        protocol.decode_frames,
        protocol.decode_cancel,
        protocol.decode_chunk,
        presence.decode_beat,
        presence.decode_router_beat,
    ],
)
@given(data=st.binary() | plain.map(msgspec.msgpack.encode))
def test_what_is_no_message_raises_decode_error_and_nothing_else(decode: Any, data: bytes) -> None:
    try:
        decode(data)
    except msgspec.DecodeError:
        return
    # What passes is a message: it encodes to something that decodes again.
    again = presence.encode_beat if "beat" in decode.__name__ else protocol.encode
    assert decode(again(decode(data))) == decode(data)


DEEP = b"\x91" * 100_000 + b"\x90"


@pytest.mark.parametrize(
    ("decode", "data"),
    [
        (protocol.decode_frames, b"\x91\x93\xa1h\x01" + DEEP),
        (protocol.decode_request, b"\x81\xa1x" + DEEP),
        (protocol.decode_cancel, b"\x92\x91\x01" + DEEP),
        (protocol.decode_chunk, b"\x94\x01\x00\xc4\x00" + DEEP),
        (presence.decode_beat, b'{"x":' + b"[" * 100_000),
    ],
)
def test_what_is_nested_too_deeply_is_no_message(decode: Any, data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(data)


@pytest.mark.parametrize("data", [b"\x91\x92\xa1\xff\x01", b"\x91\x93\xa1a\x01\xa2\xc3\x28"])
def test_text_that_is_not_utf_8_is_no_message(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        protocol.decode_frames(data)
    with pytest.raises(msgspec.DecodeError):
        protocol.decode_request(b"\x81" + data[2:])


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "frame",
    [
        ["a", 1, "worker.1"],
        ["a", 1, "worker-1\r\nx: y"],
        ["a", 1, ""],
        ["b", 1, "worker-1", NAN],
        ["b", 1, "worker-1", INFINITY],
        ["d", 1, 0, 0, [2**31], ""],
        ["d", 1, 0, 0, [-1], ""],
        ["e", 1, [-1, 0], [0.0, 0.0, 0.0]],
        ["e", 1, [2**60, 0], [0.0, 0.0, 0.0]],
        ["e", 1, [1, 1], [NAN, 0.0, 0.0]],
        ["e", 1, [1, 1], [0.0, INFINITY, 0.0]],
    ],
    ids=str,
)
def test_what_no_honest_worker_says_is_refused(frame: list[Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        protocol.decode_frames(protocol.encode([frame]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"deadline": NAN},
        {"deadline": INFINITY},
        {"n": 0},
        {"n": 10**9},
        {"body_size": -1},
        {"logprobs": 2**31},
        {"stop": [""]},
        {"sampling": {"seed": 1, "temperature": NAN}},
        {"sampling": {"seed": 1, "top_p": 2.0}},
        {"sampling": {"seed": 1, "repeat_penalty": 0.0}},
        {"sampling": {"seed": 1, "logit_bias": {1: INFINITY}}},
        {"resume": [[[2**31]]]},
    ],
    ids=str,
)
def test_what_no_honest_router_asks_for_is_refused(wrong: dict[str, Any]) -> None:
    asked = {"type": "generate", "id": "r", "attempt": 1, "model": "m", "deadline": 1.0}
    asked |= {"input": {"type": "text", "text": "x"}, "sampling": {"seed": 1}}
    assert isinstance(protocol.decode_request(protocol.encode(asked)), Generate)
    with pytest.raises(msgspec.ValidationError):
        protocol.decode_request(protocol.encode(asked | wrong))


@pytest.mark.parametrize("kind", _FRAMES, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_fields_appended_by_a_later_version_are_ignored(kind: Any, data: Any) -> None:
    frame = data.draw(any_of(kind))
    raw = msgspec.msgpack.decode(protocol.encode([frame]))
    later = [[*raw[0], "of a later version", {"x": 1}]]
    assert protocol.decode_frames(msgspec.msgpack.encode(later)) == (frame,)


def test_fields_missing_from_an_earlier_version_get_their_defaults() -> None:
    old = msgspec.msgpack.encode([["a", 7, "worker-1"], ["d", 7, 0, 3, [5, 6]], ["f", 7, "c", "m"]])
    assert protocol.decode_frames(old) == (
        Accepted(7, "worker-1"),
        Delta(7, 0, 3, (5, 6)),
        Fail(7, "c", "m"),
    )


@given(any_of(Generate | Embed))
def test_unknown_fields_of_a_request_are_ignored(request: Any) -> None:
    raw = msgspec.msgpack.decode(protocol.encode(request), strict=False)
    raw["of_a_later_version"] = [1, 2]
    assert protocol.decode_request(msgspec.msgpack.encode(raw)) == request


def test_a_token_frame_is_small() -> None:
    """Array-like: the names of fields do not travel with every token."""
    assert len(protocol.encode([Delta(2**62, 0, 100, (12345,), " word")])) < 32
    assert len(protocol.encode(Usage(1, 2))) < 8
