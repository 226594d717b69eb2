"""`agproxy serve --demo`: the whole chain without a key or a network, through the real openai package."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from conftest import HELLO, Serve, sdk
from pydantic import BaseModel

import antigravity_proxy as agproxy

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "clock")
]


@pytest.fixture
async def ai(demo_url: str, serve: Serve, request: pytest.FixtureRequest) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = demo_url
    if fault := getattr(request, "param", ""):
        served = await serve("--demo", "--port", "0", AGPROXY_DEMO_FAULT=fault)
        base_url = await served.wait_for(r"base URL +(\S+)")
    async with sdk(base_url) as client:
        yield client


async def test_chat_says_that_it_is_the_demo_and_thinks_in_its_own_field(ai: openai.AsyncOpenAI) -> None:
    raw = await ai.chat.completions.with_raw_response.create(**HELLO)
    message = raw.parse().choices[0].message
    assert message.content == "This is the demo of agproxy; no model was asked. You said: hi"
    assert message.model_extra is not None
    assert "thinks" in message.model_extra["reasoning_content"]
    assert raw.headers["X-Agproxy-Demo"] == "1"


async def test_a_stream_comes_in_pieces_with_usage(ai: openai.AsyncOpenAI) -> None:
    stream = await ai.chat.completions.create(**HELLO, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 5
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > 0


async def test_responses_take_input_and_instructions_into_account(ai: openai.AsyncOpenAI) -> None:
    answer = await ai.responses.create(model="gpt-4o", input="hi", instructions="Be brief.")
    assert "You said: hi" in answer.output_text
    assert "The instructions were: Be brief." in answer.output_text
    assert answer.output[0].content[0].text == answer.output_text  # type: ignore[union-attr]
    assert answer.model_extra is not None
    assert answer.model_extra["choices"][0]["message"]["content"] == answer.output_text


async def test_the_tools_that_the_prompt_names_are_called_and_their_results_read(ai: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "weather and clock, please"}]
    first = await ai.chat.completions.create(model="gpt-4o", messages=messages, tools=TOOLS)
    calls = first.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls if call.type == "function"] == ["weather", "clock"]
    messages += [
        first.choices[0].message,
        *({"role": "tool", "tool_call_id": call.id, "content": "42"} for call in calls),
    ]
    second = await ai.chat.completions.create(model="gpt-4o", messages=messages, tools=TOOLS)
    assert 'The tool clock answered: {"output": "42"}' in (second.choices[0].message.content or "")


class Person(BaseModel):
    name: str
    age: int
    tags: list[str]


async def test_a_schema_is_answered_with_json(ai: openai.AsyncOpenAI) -> None:
    answer = await ai.chat.completions.parse(**HELLO, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="hi", age=1, tags=["hi"])


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": ["null", "integer"], "minimum": 3}, 3),
        ({"type": "NUMBER", "maximum": 0.5}, 0.5),
        ({"enum": ["b", "a"]}, "b"),
        ({"const": None, "enum": [1]}, None),
        ({"type": "string", "format": "date"}, "2026-01-31"),
        ({"type": "boolean"}, True),
        ({"prefixItems": [{"type": "integer"}, {}], "type": "array"}, [1, "hi"]),
        ({"type": "array", "minItems": 2}, ["hi", "hi"]),
        ({"type": "array", "items": {"$ref": "#"}}, []),
        ({"oneOf": [{"$ref": "#"}, {"type": "null"}]}, None),
        (NODE | {"$defs": {"node": {"anyOf": [NODE, {"type": "null"}]}}}, {"next": None}),
    ],
)
def test_a_small_value_fits_a_schema(schema: Any, value: Any) -> None:
    assert agproxy.demo_value(schema, "hi") == value


def test_a_schema_without_an_end_has_no_value() -> None:
    with pytest.raises(LookupError):
        agproxy.demo_value(NODE | {"$defs": {"node": NODE}}, "hi")


async def test_a_large_file_reaches_the_demo(ai: openai.AsyncOpenAI) -> None:
    url = {"url": f"data:image/png;base64,{'A' * (3 << 20)}"}
    messages: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    answer = await ai.chat.completions.create(model="gpt-4o", messages=messages)
    assert "(and 1 file of image/png)" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize(
    "odd",
    [
        {"type": 5},
        {"type": "integer", "minimum": None},
        {"$ref": 5},
        {"enum": None},
        {"type": "array", "minItems": 10**9},
    ],
)
async def test_a_schema_that_is_none_is_refused_and_not_cut_off(ai: openai.AsyncOpenAI, odd: Any) -> None:
    function: Any = {"name": "f", "parameters": {"type": "object", "properties": {"x": odd}, "required": ["x"]}}
    tools: Any = [{"type": "function", "function": function}]
    with pytest.raises(openai.BadRequestError, match="The demo cannot read this request"):
        await ai.chat.completions.create(**HELLO, tools=tools, tool_choice="required")


async def test_no_vector_is_longer_than_gemini_s(ai: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="too many"):
        await ai.embeddings.create(model="gemini-embedding-001", input="hi", dimensions=10**9)


async def test_models_and_completions(ai: openai.AsyncOpenAI) -> None:
    assert "gemini-2.5-flash" in [model.id async for model in ai.models.list()]
    answer = await ai.completions.create(model="gpt-3.5-turbo-instruct", prompt="hi", max_tokens=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("This is the", "length")


@pytest.mark.parametrize(("ai", "status"), [("429", 429), ("503", 503)], indirect=["ai"], ids=["quota", "overload"])
async def test_a_fault_on_demand(ai: openai.AsyncOpenAI, status: int) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await ai.chat.completions.create(**HELLO)
    assert caught.value.status_code == status
    assert int(caught.value.response.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("ai", ["cut"], indirect=True)
async def test_a_cut_on_demand(ai: openai.AsyncOpenAI) -> None:
    stream = await ai.chat.completions.create(**HELLO, stream=True)
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError):
        await ai.chat.completions.create(**HELLO)
