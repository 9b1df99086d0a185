"""OpenAI's own Python client on the real model: answers in a given form, and calls of tools.

The forms are forced, so that even a tiny model keeps them; what it writes into them is its own.
"""

import json
from typing import Any, Literal

import pytest
from mesh_process import MeshUp
from openai import OpenAI, pydantic_function_tool
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam
from pydantic import BaseModel, Field

pytestmark = [pytest.mark.model, pytest.mark.timeout(420)]

ENDS = {"0": -100, "2": -100}
"""A bias against SmolLM2's tokens that end an answer."""


class City(BaseModel):
    name: str = Field(max_length=12)
    kind: Literal["village", "town", "city"]
    seaside: bool


class Weather(BaseModel):
    """Tells the weather of a city."""

    city: str = Field(max_length=10)
    unit: Literal["celsius", "fahrenheit"]


def tool(name: str, **properties: Any) -> ChatCompletionFunctionToolParam:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            },
        },
    }


WEATHER = tool(
    "get_weather",
    city={"type": "string", "maxLength": 10},
    unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
)
CLOCK = tool("get_time", zone={"type": "string", "enum": ["UTC", "CET"]})
ASK: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "How is the weather in Paris?"}
]


def check(name: str, arguments: str) -> None:
    """Arguments match the schema of their function."""
    values = json.loads(arguments)
    if name == "get_time":
        assert list(values) == ["zone"]
        assert values["zone"] in ("UTC", "CET")
    else:
        assert name == "get_weather"
        assert set(values) == {"city", "unit"}
        assert len(values["city"]) <= 10
        assert values["unit"] in ("celsius", "fahrenheit")


class TestForms:
    def test_parse_gives_an_object_of_the_class(self, client: OpenAI, mesh_system: MeshUp):
        answer = client.chat.completions.parse(
            model=mesh_system.model,
            messages=[{"role": "user", "content": "Tell me of Venice."}],
            response_format=City,
            seed=3,
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, City)
        assert City.model_validate_json(choice.message.content or "") == choice.message.parsed

    def test_a_stream_of_a_form_ends_as_an_object(self, client: OpenAI, mesh_system: MeshUp):
        with client.chat.completions.stream(
            model=mesh_system.model,
            messages=[{"role": "user", "content": "Tell me of Venice."}],
            response_format=City,
            seed=4,
        ) as stream:
            deltas = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion()
        assert len(deltas) > 4
        assert isinstance(final.choices[0].message.parsed, City)
        assert "".join(deltas) == final.choices[0].message.content

    def test_a_schema_is_kept_by_every_choice(self, client: OpenAI, mesh_system: MeshUp):
        answer = client.chat.completions.create(
            model=mesh_system.model,
            messages=[{"role": "user", "content": "Three numbers, please."}],
            response_format={
                "type": "json_schema",
                "json_schema": {
                    "name": "numbers",
                    "strict": True,
                    "schema": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 1, "maximum": 99},
                        "minItems": 3,
                        "maxItems": 3,
                    },
                },
            },
            n=3,
            seed=1,
            temperature=1.5,
        )
        for choice in answer.choices:
            numbers = json.loads(choice.message.content or "")
            assert len(numbers) == 3
            assert all(isinstance(number, int) and 1 <= number <= 99 for number in numbers)

    def test_a_json_object_is_one(self, client: OpenAI, mesh_system: MeshUp):
        shown: list[ChatCompletionMessageParam] = []
        for city in ("Paris", "Rome"):
            shown.append({"role": "user", "content": city})
            shown.append({"role": "assistant", "content": json.dumps({"city": city})})
        (choice,) = client.chat.completions.create(
            model=mesh_system.model,
            messages=[*shown, {"role": "user", "content": "Berlin"}],
            response_format={"type": "json_object"},
            temperature=0,
            max_tokens=60,
        ).choices
        assert choice.finish_reason == "stop"
        assert isinstance(json.loads(choice.message.content or ""), dict)


class TestTools:
    def test_a_named_function_is_called(self, client: OpenAI, mesh_system: MeshUp):
        for wanted in ("get_weather", "get_time"):
            (choice,) = client.chat.completions.create(
                model=mesh_system.model,
                messages=ASK,
                tools=[WEATHER, CLOCK],
                tool_choice={"type": "function", "function": {"name": wanted}},
                temperature=0,
                max_tokens=120,
            ).choices
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            (call,) = choice.message.tool_calls or ()
            assert call.type == "function"
            assert call.id.startswith("call_")
            assert call.function.name == wanted
            check(wanted, call.function.arguments)

    def test_some_function_is_called_where_one_is_required(
        self, client: OpenAI, mesh_system: MeshUp
    ):
        (choice,) = client.chat.completions.create(
            model=mesh_system.model,
            messages=ASK,
            tools=[WEATHER, CLOCK],
            tool_choice="required",
            parallel_tool_calls=False,
            seed=2,
            max_tokens=120,
        ).choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        check(call.function.name, call.function.arguments)

    def test_calls_are_parallel_unless_forbidden(self, client: OpenAI, mesh_system: MeshUp):
        """A model that may not end its answer goes on calling, if it may."""
        many, one = (
            client.chat.completions.create(
                model=mesh_system.model,
                messages=ASK,
                tools=[CLOCK],
                tool_choice="required",
                parallel_tool_calls=parallel,
                logit_bias=ENDS,
                temperature=0,
                max_tokens=100,
            ).choices[0]
            for parallel in (True, False)
        )
        calls = many.message.tool_calls or []
        assert many.finish_reason == "length"
        assert len(calls) > 1
        assert len({call.id for call in calls}) == len(calls)
        for call in calls[:-1]:
            assert call.type == "function"
            check(call.function.name, call.function.arguments)
        assert one.finish_reason == "tool_calls"
        assert len(one.message.tool_calls or ()) == 1

    @pytest.mark.parametrize("choice", ["auto", "none"])
    def test_plain_words_stay_words(
        self, client: OpenAI, mesh_system: MeshUp, choice: Literal["auto", "none"]
    ):
        (answer,) = client.chat.completions.create(
            model=mesh_system.model,
            messages=[{"role": "user", "content": "Say hello."}],
            tools=[WEATHER],
            tool_choice=choice,
            temperature=0,
            max_tokens=16,
        ).choices
        assert answer.message.content
        assert not answer.message.tool_calls
        assert answer.finish_reason in ("stop", "length")

    def test_streamed_arguments_join_to_json(self, client: OpenAI, mesh_system: MeshUp):
        # A user of its own: what other tests' answers left in the n-gram memory would draft this
        # one, and a step that accepts all of it makes one piece.
        chunks = list(
            client.chat.completions.create(
                model=mesh_system.model,
                messages=ASK,
                tools=[WEATHER],
                tool_choice="required",
                parallel_tool_calls=False,
                temperature=0,
                max_tokens=120,
                stream=True,
                user="reads arguments as they come",
            )
        )
        pieces = [
            piece
            for chunk in chunks
            for choice in chunk.choices
            for piece in choice.delta.tool_calls or ()
        ]
        assert len(pieces) > 1
        first, *others = pieces
        assert first.id is not None
        assert first.function is not None
        assert first.function.name == "get_weather"
        assert all(piece.index == 0 and piece.id is None for piece in others)
        check("get_weather", "".join(p.function.arguments or "" for p in pieces if p.function))
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert not any(choice.delta.content for chunk in chunks for choice in chunk.choices)

    def test_parse_gives_arguments_of_the_class(self, client: OpenAI, mesh_system: MeshUp):
        (choice,) = client.chat.completions.parse(
            model=mesh_system.model,
            messages=ASK,
            tools=[pydantic_function_tool(Weather)],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=120,
        ).choices
        (call,) = choice.message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Weather)

    def test_results_go_back_to_the_model(self, client: OpenAI, mesh_system: MeshUp):
        called = client.chat.completions.create(
            model=mesh_system.model,
            messages=ASK,
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            temperature=0,
            max_tokens=120,
        )
        message = called.choices[0].message
        (call,) = message.tool_calls or ()
        answers = [
            client.chat.completions.create(
                model=mesh_system.model,
                messages=[
                    *ASK,
                    message,
                    {"role": "tool", "tool_call_id": call.id, "content": result},
                ],
                tools=[WEATHER],
                tool_choice="none",
                temperature=0,
                max_tokens=16,
            )
            for result in ("sunny, 21 degrees", "sunny, 21 degrees and a strong wind from the sea")
        ]
        assert all(answer.choices[0].message.content for answer in answers)
        short, long = (answer.usage.prompt_tokens for answer in answers if answer.usage)
        assert short < long
