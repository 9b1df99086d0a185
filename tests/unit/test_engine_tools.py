"""Tool calls out of streamed text: every family, any split, nothing lost."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import InvalidRequest
from shared.protocol import Tool, ToolChoice, ToolDelta
from worker.engine.tools import (
    ReasoningParser,
    ToolFamily,
    ToolParser,
    detect_family,
    reasoning_open,
    tool_constraint,
)
from worker.engine.tools.grammar import bind_markers

FAMILIES: tuple[ToolFamily, ...] = ("hermes", "llama3", "mistral", "mistral_args")
TOOLS = (Tool("get"), Tool("get_x"))
AUTO = ToolChoice()


def merge(deltas: list[ToolDelta]) -> dict[int, tuple[str, str, str]]:
    """Put pieces together, checking that id and name come first and once."""
    calls: dict[int, tuple[str, str, str]] = {}
    for delta in deltas:
        if delta.index in calls:
            assert not delta.id
            assert not delta.name
            call_id, name, arguments = calls[delta.index]
            calls[delta.index] = (call_id, name, arguments + delta.arguments)
        else:
            assert delta.index == len(calls)
            assert delta.id
            assert delta.name
            calls[delta.index] = (delta.id, delta.name, delta.arguments)
    return calls


def parse(family: ToolFamily, pieces: list[str], choice: ToolChoice = AUTO, salt: str = "s"):
    parser = ToolParser(family, TOOLS, choice, salt=salt)
    content, deltas = "", []
    for piece in pieces:
        text, found = parser.push(piece)
        content += text
        deltas += found
    text, found = parser.flush()
    calls = merge([*deltas, *found])
    assert parser.called == bool(calls)
    return content + text, [(name, arguments) for _, name, arguments in calls.values()]


def whole(family: ToolFamily, text: str, choice: ToolChoice = AUTO):
    return parse(family, [text], choice)


A = '{"city": "K\\"öl}n", "n": [1, {"x": "]"}]}'
B = "{}"
GET = f'{{"name": "get", "arguments": {A}}}'
GET_X = f'{{"name": "get_x", "arguments": {B}}}'
LLAMA = GET.replace("arguments", "parameters")
LLAMA_X = GET_X.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("family", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{GET}\n</tool_call>", "", [("get", A)]),
        (
            "hermes",
            f"Sure.\n<tool_call>{GET}</tool_call>\n<tool_call>\n{GET_X}\n</tool_call>\n",
            "Sure.\n",
            [("get", A), ("get_x", B)],
        ),
        ("hermes", f"<tool_call>{GET}</tool_call>\n so", "\n so", [("get", A)]),
        ("hermes", f"<tool_call>{GET}", "", [("get", A)]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "get"}', "", [("get", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "get"}</tool_call>', "", [("get", "{}")]),
        ("hermes", '<tool_call>{"name": "get", "arguments": null}', "", [("get", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [("get", '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"name": "get", "arguments": {"a": 1', "", [("get", '{"a": 1')]),
        ("llama3", LLAMA, "", [("get", A)]),
        ("llama3", f" <|python_tag|>{LLAMA}; {LLAMA_X}", "", [("get", A), ("get_x", B)]),
        ("llama3", f"{LLAMA};{LLAMA_X}\n", "", [("get", A), ("get_x", B)]),
        ("llama3", '{"type": "function", "name": "get", "parameters": {}}', "", [("get", "{}")]),
        ("llama3", f"As you like: {LLAMA}", f"As you like: {LLAMA}", []),
        ("llama3", f"Well<|python_tag|>{LLAMA}", "Well", [("get", A)]),
        ("mistral", f"[TOOL_CALLS][{GET}]", "", [("get", A)]),
        ("mistral", f"So [TOOL_CALLS] [{GET}, {GET_X}]", "So ", [("get", A), ("get_x", B)]),
        ("mistral_args", f"[TOOL_CALLS]get[ARGS]{A}", "", [("get", A)]),
        (
            "mistral_args",
            f"[TOOL_CALLS]get[ARGS]{A}[TOOL_CALLS]get_x[CALL_ID]abc123def[ARGS]{B}",
            "",
            [("get", A), ("get_x", B)],
        ),
        ("mistral", f"[TOOL_CALLS]get{A}", "", [("get", A)]),
    ],
)
def test_calls_are_found(family, text, content, calls):
    assert whole(family, text) == (content, calls)
    assert parse(family, list(text)) == (content, calls)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get", "arguments": "no"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get", "arguments": "{\\"a\\": \\"\\ud800\\"}"}'),
        ("hermes", '<tool_call>{"arguments": {"name": "get"}}</tool_call>'),
        ("hermes", "<tool_call>\nget(1)\n</tool_call> or <tool_"),
        ("hermes", '  <tool_call>{"na'),
        ("hermes", " \n "),
        ("llama3", ' {"city": "Köln"}'),
        ("llama3", '<|python_tag|>brave_search.call(query="x")'),
        ("llama3", " {"),
        ("mistral", "[TOOL_CALLS][]"),
        ("mistral", '[TOOL_CALLS][{"name": "unknown", "arguments": {}}]'),
        ("mistral", "[TOOL_CALLS]unknown[ARGS]{}"),
        ("mistral", "[TOOL_CALLS]get[ARGS] nothing"),
        ("mistral", "an array [TOOL_"),
    ],
)
def test_what_is_no_call_is_content_unchanged(family, text):
    assert whole(family, text) == (text, [])
    assert parse(family, list(text)) == (text, [])


def test_a_call_after_something_that_was_none():
    text = f"<tool_call>oh <tool_call>{GET}</tool_call>"
    assert whole("hermes", text) == ("<tool_call>oh ", [("get", A)])


PARTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *(GET, GET_X, LLAMA, A, B, "get", "get_x", "nope", '"name"', '"arguments"', '"parameters"'),
    *("{", "}", "[", "]", '"', "\\", ":", ",", ";", " ", "\n", "text", "null", "1", "<", "ö"),
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)
CUTS = st.lists(st.integers(0, 300), max_size=30)


def cut(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


@given(st.sampled_from(FAMILIES), TEXTS, CUTS, st.booleans())
@example("hermes", f"<tool_call>{GET}</tool_call>x", [3, 30, 60], True)
def test_any_split_gives_what_the_whole_gives(family, text, cuts, parallel):
    choice = ToolChoice(parallel=parallel)
    content, calls = whole(family, text, choice)
    assert parse(family, cut(text, cuts), choice) == (content, calls)
    assert len(calls) <= 1 or parallel
    if not calls:
        assert content == text


@given(st.sampled_from(FAMILIES), TEXTS)
def test_without_tools_everything_is_content(family, text):
    assert whole(family, text, ToolChoice(mode="none")) == (text, [])


def test_arguments_are_told_as_they_arrive():
    parser = ToolParser("hermes", TOOLS, AUTO, salt="s")
    assert parser.push('Hm <tool_call>\n{"name": "ge') == ("Hm ", ())
    assert not parser.called
    assert parser.push('t", "arguments": ') == ("", ())
    text, (first,) = parser.push('{"a": ')
    assert (text, first.index, first.name, first.arguments) == ("", 0, "get", '{"a": ')
    assert parser.called
    assert parser.push("[1, 2") == ("", (ToolDelta(0, arguments="[1, 2"),))
    assert parser.push("]}}\n</tool") == ("", (ToolDelta(0, arguments="]}"),))
    assert parser.push("_call>") == ("", ())
    assert parser.flush() == ("", ())


def test_ids_depend_on_salt_and_index_only():
    text = f"<tool_call>{GET}</tool_call><tool_call>{GET_X}</tool_call>"

    def ids(salt: str) -> list[str]:
        parser = ToolParser("hermes", TOOLS, AUTO, salt=salt)
        return [delta.id for delta in parser.push(text)[1]]

    assert ids("1-0") == ids("1-0")
    assert len({*ids("1-0"), *ids("1-1")}) == 4
    assert all(call_id.startswith("call_") for call_id in ids("1-0"))


def test_a_single_call_is_the_last():
    parser = ToolParser("hermes", TOOLS, ToolChoice(parallel=False), salt="s")
    parser.push(f"<tool_call>{GET}</tool_call")
    assert not parser.finished
    parser.push(">")
    assert parser.finished
    assert parser.push("<tool_call>")[0] == "<tool_call>"


@pytest.mark.parametrize(
    ("source", "family"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", "mistral_args"),
        ("{{ '<|start_header_id|>' }}{{ '<|python_tag|>' }}", "llama3"),
        ("{{ '<|start_header_id|>' }}{{ '\"parameters\": ' }}", "llama3"),
        ("{{ '<|im_start|>' }}", "hermes"),
    ],
)
def test_families_are_told_by_the_template(source, family):
    assert detect_family(source) == family


def test_constraints_are_made_where_a_call_is_forced_or_strict():
    strict = (Tool("get", strict=True),)
    assert tool_constraint("hermes", TOOLS, ToolChoice("none")) is None
    assert tool_constraint("hermes", TOOLS, ToolChoice("auto")) is None
    assert tool_constraint("hermes", (), ToolChoice("auto")) is None
    for tools, choice in (
        (strict, ToolChoice("auto")),
        (TOOLS, ToolChoice("required")),
        (TOOLS, ToolChoice("named", "get")),
    ):
        constraint = tool_constraint("hermes", tools, choice)
        assert constraint is not None
        assert constraint.kind == "lark"


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        (TOOLS, ToolChoice("named", "other"), "tool_choice"),
        ((), ToolChoice("required"), "tool_choice"),
        ((Tool("get", parameters="{"),), ToolChoice("required"), "tools"),
        ((Tool("get", parameters="[]"),), ToolChoice("required"), "tools"),
        ((Tool("get", parameters="[" * 100_000),), ToolChoice("required"), "tools"),
    ],
)
def test_impossible_choices_are_refused(tools, choice, param):
    with pytest.raises(InvalidRequest) as caught:
        tool_constraint("hermes", tools, choice)
    assert caught.value.param == param


def test_markers_become_special_tokens_where_the_vocabulary_has_them():
    lark = 'start: a_marker b\na_marker: "<t>"\nb: "<t>"\ntext_marker[lazy]: TEXT "<t>"\n'
    assert bind_markers(lark, {}) == lark
    assert bind_markers(lark, {"<t>": 7}) == (
        'start: a_marker b\na_marker: <[7]>\nb: "<t>"\ntext_marker: TEXT <[7]>\n'
    )


def test_a_tools_name_cannot_write_grammar():
    name = 'x"\nopen_marker: "<|im_end|>"\nstart: "MORE'
    constraint = tool_constraint("hermes", (Tool(name),), ToolChoice("required"))
    assert constraint is not None
    rules = [line.partition(":")[0] for line in constraint.value.splitlines()[1:]]
    assert len(rules) == len(set(rules))
    assert json.dumps(json.dumps(name))[1:-1] in constraint.value


def reason(pieces: list[str], *, opened: bool = False) -> tuple[str, str]:
    parser = ReasoningParser(opened=opened)
    content, thought = "", ""
    for text, more in [*(parser.push(piece) for piece in pieces), parser.flush()]:
        content += text
        thought += more
    return content, thought


@pytest.mark.parametrize(
    ("text", "opened", "content", "thought"),
    [
        ("<think>\nHm, so\n</think>\n\nFour.", False, "Four.", "Hm, so"),
        ("\n<think></think>Four.", False, "Four.", ""),
        ("Hm.\nSo.\n</think>\n\nFour.", True, "Four.", "Hm.\nSo."),
        ("<think>Hm.</think>Four.", True, "Four.", "Hm."),
        ("Four <think>really</think>.", False, "Four <think>really</think>.", ""),
        ("<think>cut of", False, "", "cut of"),
        ("<think>cut </thi", False, "", "cut </thi"),
        (" <thin", False, " <thin", ""),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_told_apart(text, opened, content, thought):
    assert reason([text], opened=opened) == (content, thought)
    assert reason(list(text), opened=opened) == (content, thought)


REASONS = st.lists(
    st.sampled_from(["<think>", "</think>", "<th", "ink>", "\n", " ", "so", "<", "/"]), max_size=12
)


@given(REASONS.map("".join), CUTS, st.booleans())
def test_reasoning_is_the_same_for_any_split(text, cuts, opened):
    assert reason(cut(text, cuts), opened=opened) == reason([text], opened=opened)


def test_an_open_thought_is_seen_in_the_prompt():
    assert reasoning_open("<|im_start|>assistant\n<think>\n")
    assert not reasoning_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
