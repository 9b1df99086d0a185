"""Chat templates: the sandbox, and conversations made to fit what a template knows of."""

import json

import pytest

from shared.errors import InvalidRequest
from shared.protocol import ChatInput, Message, Tool, ToolCall, ToolChoice
from worker.engine.template import FALLBACK_TEMPLATE, MAX_OUTPUT, ChatTemplate

# Templates of our own, each with the traits of a family that matter here.
HERMES = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content }}
        {{- '</tool_response><|im_end|>\\n' }}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not (loop.first and tools and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
TEXT_ARGUMENTS = """\
{%- for tool in tools or [] %}{{ tool.function.name }};{%- endfor %}
{%- for m in messages %}
{{- '[' + m.role + ']' + m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}
{%- endfor %}"""
STRICT_IDS = """\
{{- bos_token }}
{%- for tool in tools or [] %}{{ tool.function | tojson }}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}
    {%- for c in m.tool_calls or [] %}
        {%- if c.id | length != 9 %}{{ raise_exception('nine letters!') }}{% endif %}
        {{- '[TOOL_CALLS]' + (c.function | tojson) + c.id + eos_token }}
    {%- endfor %}
    {%- if m.role == 'tool' %}{{- '[TOOL_RESULTS]' + m.tool_call_id + m.name }}{% endif %}
    {{- '[INST]' + m.content + '[/INST]' }}
{%- endfor %}"""

WEATHER = Tool("weather", "the weather", '{"type": "object", "properties": {"city": {}}}')
HISTORY = (
    Message("user", "Köln?"),
    Message("assistant", tool_calls=(ToolCall("call_1", "weather", '{"city": "Köln"}'),)),
    Message("tool", "rain", tool_call_id="call_1"),
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos="<s>", eos="</s>")


def test_the_fallback_is_chatml():
    chat = ChatInput((Message("system", "be brief"), Message("user", "a <b> & 'é'")))
    assert template(FALLBACK_TEMPLATE).render(chat) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\na <b> & 'é'<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_template_that_knows_tools_gets_objects():
    chat = template(HERMES)
    assert chat.family == "hermes"
    text = chat.render(ChatInput(HISTORY, tools=(WEATHER,)))
    tools = text.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert json.loads(tools) == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather",
            "parameters": {"type": "object", "properties": {"city": {}}},
        },
    }
    assert '{"name": "weather", "arguments": {"city": "Köln"}}' in text
    assert "<tool_response>rain</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_a_template_that_wants_text_arguments_gets_text():
    chat = template(TEXT_ARGUMENTS)
    assert chat.abilities.text_arguments
    text = chat.render(ChatInput(HISTORY, tools=(WEATHER,)))
    assert text == 'weather;[user]Köln?[assistant]weather {"city": "Köln"}[tool]rain'


def test_a_template_that_ignores_tools_gets_them_in_words():
    chat = template(FALLBACK_TEMPLATE)
    text = chat.render(ChatInput((Message("system", "be brief"), *HISTORY), tools=(WEATHER,)))
    system, user, assistant, answer, last = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nbe brief\n\nYou can call functions")
    listed = system.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert json.loads(listed)["name"] == "weather"
    assert user == "user\nKöln?<|im_end|>\n"
    assert assistant == (
        'assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
        "<|im_end|>\n"
    )
    assert answer == "user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
    assert last == "assistant\n"


def test_results_of_parallel_calls_are_one_turn_in_words():
    calls = (ToolCall("a", "weather", "{}"), ToolCall("b", "weather", "cut of"))
    turns = (
        Message("user", "both"),
        Message("assistant", "Let me see.", tool_calls=calls),
        Message("tool", "rain", tool_call_id="a"),
        Message("tool", "sun", tool_call_id="b"),
    )
    text = template(FALLBACK_TEMPLATE).render(ChatInput(turns))
    assert text.count("<|im_start|>user") == 2
    assert "rain\n</tool_response>\n<tool_response>\nsun" in text
    assert "assistant\nLet me see.\n<tool_call>" in text
    assert '"arguments": "cut of"' in text


def test_tool_choice_none_hides_the_tools():
    chat = ChatInput(
        (Message("user", "hi"),), tools=(WEATHER,), tool_choice=ToolChoice(mode="none")
    )
    assert "weather" not in template(FALLBACK_TEMPLATE).render(chat)
    assert "weather" not in template(HERMES).render(chat)


def test_ids_and_system_turns_are_made_to_fit():
    chat = template(STRICT_IDS)
    assert chat.family == "mistral"
    text = chat.render(ChatInput((Message("system", "be brief"), *HISTORY), tools=(WEATHER,)))
    assert "[INST]be brief\n\nKöln?[/INST]" in text
    call_id = text.partition("[TOOL_RESULTS]")[2].partition("weather")[0]
    assert len(call_id) == 9
    assert call_id.isalnum()
    assert f"{call_id}</s>" in text
    assert text == chat.render(
        ChatInput((Message("system", "be brief"), *HISTORY), tools=(WEATHER,))
    )


def test_developer_is_system_where_it_is_not_known():
    chat = ChatInput((Message("developer", "be brief"), Message("user", "hi")))
    assert "<|im_start|>system\nbe brief" in template(FALLBACK_TEMPLATE).render(chat)
    knows = "{% for m in messages %}{{ m.role }}/{% endfor %}{# developer #}"
    assert template(knows).render(chat) == "developer/user/"


def test_template_kwargs_reach_the_template():
    turns = (Message("user", "hi"),)
    quiet = ChatInput(turns, template_kwargs={"enable_thinking": False})
    assert template(HERMES).render(quiet).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(InvalidRequest, match="bos_token, messages") as caught:
        template(HERMES).render(
            ChatInput(turns, template_kwargs={"messages": [], "bos_token": "", "x": 1})
        )
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0].a.b.c }}", "no attribute 'a'"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{% set x = messages.append(1) %}", "safe"),
        ("{{ 9 ** 99999999 }}", "powers"),
        ("{{ 'x' * 99999999 }}", "repetition"),
        ("{% for i in range(99999999) %}x{% endfor %}", "range"),
        (
            "{% for i in range(999) %}{% for j in range(999) %}{{ 'x' * 999 }}"
            "{% endfor %}{% endfor %}",
            str(MAX_OUTPUT),
        ),
    ],
)
def test_what_fails_in_a_template_is_the_requests_error(source, message):
    # The guard keeps the fault out of the trial conversations.
    chat = template("{% if messages[0].content == 'go' %}" + source + "{% endif %}")
    assert chat.render(ChatInput((Message("user", "wait"),))) == ""
    with pytest.raises(InvalidRequest, match=message) as caught:
        chat.render(ChatInput((Message("user", "go"),)))
    assert caught.value.param == "messages"


def test_a_broken_template_names_its_line():
    with pytest.raises(ValueError, match="chat template, line 2: "):
        template("ok\n{% for %}")


def test_what_transformers_offers_is_there():
    source = (
        "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ {'b': '<é>', 'a': 1} | tojson }}"
        "{{ [1] | tojson(indent=2) }}"
    )
    text = template(source).render(ChatInput((Message("user", "hi"),)))
    assert text[4:] == '01{"b": "<é>", "a": 1}[\n  1\n]'
    assert text[:4].isdigit()
