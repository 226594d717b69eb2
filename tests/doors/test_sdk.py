"""What the real openai package makes of the translated answers: parsed models, tools, choices, images, embeddings."""

import base64
import json
import math
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pytest
from conftest import HELLO, sdk
from fake_gemini import KINDS, FakeGemini, account_of, answer, call, error, said
from own_listener import OwnListener
from pydantic import BaseModel

import antigravity_proxy as agproxy


@pytest.fixture(params=KINDS)
async def ai(gemini: FakeGemini, request: pytest.FixtureRequest) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a gateway with one account, of each kind."""
    app = agproxy.create_app(agproxy.Config((account_of(request.param, "a", gemini.url),), max_wait_s=0))
    async with OwnListener(app) as server:
        base_url = str(server.make_url("/v1"))
        async with sdk(base_url) as client:
            yield client


class Step(BaseModel):
    explanation: str
    output: str


class Solution(BaseModel):
    steps: list[Step]
    answer: Literal["x = 2", "x = 3"]


def tool(name: str = "weather", **more: Any) -> Any:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


async def test_a_pydantic_model_is_parsed(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    wanted = Solution(steps=[Step(explanation="halve", output="x")], answer="x = 2")
    gemini.script = [said(wanted.model_dump_json())]
    made = await ai.chat.completions.parse(**HELLO, response_format=Solution)
    assert made.choices[0].message.parsed == wanted
    config = gemini.bodies[0]["generationConfig"]
    assert config["responseMimeType"] == "application/json"
    if "responseJsonSchema" in config:  # Vertex takes Google's Schema, without references
        assert config["responseJsonSchema"]["$defs"]["Step"]["required"] == ["explanation", "output"]
    else:
        steps = config["responseSchema"]["properties"]["steps"]
        assert steps["items"]["required"] == ["explanation", "output"]


async def test_a_pydantic_model_beside_tools_is_asked_for_as_a_call_where_json_cannot_be(
    ai: openai.AsyncOpenAI, gemini: FakeGemini
) -> None:
    wanted = Solution(steps=[], answer="x = 3")
    gemini.script = [answer(call(agproxy.ANSWER_TOOL, **wanted.model_dump()))]
    raw = await ai.chat.completions.with_raw_response.create(
        model="gemini-2.5-flash",
        messages=[{"role": "user", "content": "hi"}],
        tools=[tool()],
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": Solution.model_json_schema()}},
    )
    made = raw.parse().choices[0]
    assert (Solution.model_validate_json(made.message.content or ""), made.finish_reason) == (wanted, "stop")
    assert made.message.tool_calls is None
    assert raw.headers["X-Agproxy-Changes"] == "1"
    names = [declared["name"] for declared in gemini.bodies[0]["tools"][0]["functionDeclarations"]]
    assert names == ["weather", agproxy.ANSWER_TOOL]


async def test_tools_are_accumulated_from_a_stream(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [answer({"text": "So: "}, call("weather", city="Bern"), call("weather", city="Zürich"))]
    async with ai.chat.completions.stream(**HELLO, tools=[tool(strict=True)]) as stream:
        async for _ in stream:
            pass
        made = (await stream.get_final_completion()).choices[0]
    calls = made.message.tool_calls or []
    assert [json.loads(one.function.arguments) for one in calls] == [{"city": "Bern"}, {"city": "Zürich"}]
    assert len({one.id for one in calls}) == 2
    assert (made.message.content, made.finish_reason) == ("So: ", "tool_calls")


async def test_an_answer_that_stops_at_its_first_word_is_empty(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [answer(), answer({"text": "Hm.", "thought": True})]
    made = await ai.completions.create(model="gpt-4o", prompt="a = ", suffix="\nb = 2", stop=["\n"])
    assert [(one.text, one.finish_reason) for one in made.choices] == [("", "stop")]
    async with ai.chat.completions.stream(**HELLO, stop=["\n"]) as stream:
        last = (await stream.get_final_completion()).choices[0]
    assert (last.message.content, last.finish_reason) == ("", "stop")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_one_call_at_a_time_where_that_is_asked_for(
    stream: bool, ai: openai.AsyncOpenAI, gemini: FakeGemini
) -> None:
    gemini.script = [answer(call("weather", city="Bern"), call("weather", city="Basel"))]
    made = await ai.chat.completions.create(**HELLO, tools=[tool()], parallel_tool_calls=False, stream=stream)  # type: ignore[call-overload]
    if stream:
        calls = [c async for chunk in made for c in chunk.choices[0].delta.tool_calls or [] if c.function.name]
    else:
        calls = made.choices[0].message.tool_calls
    assert len(calls) == 1


async def test_names_that_gemini_cannot_take_come_back_as_they_were(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    odd = "mcp/files#" + "x" * 80
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    gemini.script = [answer(call("f")), said("done")]
    gemini.answer_first_tool = True
    made = await ai.chat.completions.create(model="gpt-4o", messages=messages, tools=[tool(odd)])
    calls: Any = made.choices[0].message.tool_calls
    assert calls[0].function.name == odd
    messages += [made.choices[0].message, {"role": "tool", "tool_call_id": calls[0].id, "content": "ok"}]
    gemini.answer_first_tool = False
    await ai.chat.completions.create(model="gpt-4o", messages=messages, tools=[tool(odd)])
    declared = gemini.bodies[1]["tools"][0]["functionDeclarations"][0]["name"]
    assert gemini.bodies[1]["contents"][1]["parts"][0]["functionCall"]["name"] == declared
    assert gemini.bodies[1]["contents"][2]["parts"][0]["functionResponse"]["name"] == declared
    assert len(declared) <= 64


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_custom_tool_takes_free_text(stream: bool, ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [answer(call("patch", input="*** Begin\n+ö"))]
    tools: Any = [{"type": "custom", "custom": {"name": "patch", "description": "Edits."}}]
    made = await ai.chat.completions.create(**HELLO, tools=tools, stream=stream)  # type: ignore[call-overload]
    if stream:
        deltas = [c.model_dump() async for chunk in made for c in chunk.choices[0].delta.tool_calls or []]
        assert deltas[0]["type"] == "custom"
        assert deltas[0]["custom"] == {"name": "patch", "input": ""}
        assert "".join(d["custom"]["input"] for d in deltas) == "*** Begin\n+ö"
    else:
        called = made.choices[0].message.tool_calls[0]
        assert (called.type, called.custom.name, called.custom.input) == ("custom", "patch", "*** Begin\n+ö")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_legacy_functions_are_answered_in_their_own_shape(
    stream: bool, ai: openai.AsyncOpenAI, gemini: FakeGemini
) -> None:
    gemini.script = [answer(call("weather", city="Bern"))]
    functions: Any = [tool()["function"]]
    made: Any = await ai.chat.completions.create(**HELLO, functions=functions, stream=stream)  # type: ignore[call-overload]
    if stream:
        chunks = [chunk.choices[0] async for chunk in made]
        parts = [chunk.delta.function_call for chunk in chunks if chunk.delta.function_call]
        assert (parts[0].name, "".join(p.arguments for p in parts)) == ("weather", '{"city":"Bern"}')
        assert chunks[-1].finish_reason == "function_call"
    else:
        choice = made.choices[0]
        assert choice.message.function_call.model_dump() == {"name": "weather", "arguments": '{"city":"Bern"}'}
        assert (choice.finish_reason, choice.message.tool_calls) == ("function_call", None)


async def test_a_generated_image_has_its_own_place(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.models = ["gemini-2.5-flash-image"]
    gemini.script = [answer({"text": "Here."}, {"inlineData": {"mimeType": "image/png", "data": "aW1n"}})]
    made: Any = await ai.chat.completions.create(
        model="gemini-2.5-flash-image",
        messages=[{"role": "user", "content": "paint"}],
        extra_body={"modalities": ["text", "image"]},
    )
    message = made.choices[0].message
    assert (message.content, message.images[0]["image_url"]["url"]) == ("Here.", "data:image/png;base64,aW1n")
    assert gemini.bodies[0]["generationConfig"]["responseModalities"] == ["TEXT", "IMAGE"]


async def test_the_choices_of_a_stream_are_told_apart(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("same", "same"), said("same", "same"), said("same", "same")]
    async with ai.chat.completions.stream(**HELLO, n=3, stream_options={"include_usage": True}) as stream:
        made = await stream.get_final_completion()
    assert [(c.index, c.message.content) for c in made.choices] == [(0, "samesame"), (1, "samesame"), (2, "samesame")]
    assert made.usage is not None
    assert made.usage.total_tokens == 21


@pytest.mark.parametrize("count", [1, 3, 230])
@pytest.mark.parametrize("ai", ["gemini"], indirect=True)
async def test_embeddings_come_in_order_and_at_length_one(
    count: int, ai: openai.AsyncOpenAI, gemini: FakeGemini
) -> None:
    gemini.models = ["gemini-embedding-001"]
    made = await ai.embeddings.create(
        model="text-embedding-3-small", input=[f"{'x' * i}" for i in range(1, count + 1)], dimensions=3
    )
    assert [one.index for one in made.data] == list(range(count))
    assert all(math.isclose(math.hypot(*one.embedding), 1, rel_tol=1e-5) for one in made.data)
    ratios = [one.embedding[0] / one.embedding[1] for one in made.data]
    assert ratios == pytest.approx([i / 2 for i in range(1, count + 1)], rel=1e-4)
    assert made.usage.prompt_tokens > 0
    assert [len(body["requests"]) for body in gemini.bodies] == [100] * (count // 100) + [count % 100]


@pytest.mark.parametrize("ai", ["gemini"], indirect=True)
async def test_embeddings_as_numbers_and_as_base64_are_the_same(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.models = ["gemini-embedding-001"]
    asked: Any = {"model": "text-embedding-3-small", "input": "xx"}
    numbers = await ai.embeddings.create(**asked, encoding_format="float")
    raw = await ai.post("/embeddings", body=asked | {"encoding_format": "base64"}, cast_to=object)
    packed = base64.b64decode(raw["data"][0]["embedding"])  # type: ignore[index]
    assert len(packed) == 4 * len(numbers.data[0].embedding)
    assert (await ai.embeddings.create(**asked)).data[0].embedding == pytest.approx(numbers.data[0].embedding)


async def test_a_signature_that_is_refused_is_left_out_once(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    refused = error(400, "INVALID_ARGUMENT", "Corrupted thought signature.")
    gemini.script = [refused, said("ok"), refused, refused]
    extra = {"google": {"thought_signature": "Zm9yZWlnbg=="}}
    called = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": "{}"},
        "extra_content": extra,
    }
    messages: list[Any] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    asked: Any = {"model": "gemini-3-pro-preview", "messages": messages, "tools": [tool()]}
    raw = await ai.chat.completions.with_raw_response.create(**asked)
    assert raw.headers["X-Attempts"] == "2"
    sent = [body["contents"][1]["parts"][0]["thoughtSignature"] for body in gemini.bodies]
    assert sent == ["Zm9yZWlnbg==", agproxy.SIGNATURE_SENTINEL]
    with pytest.raises(openai.BadRequestError, match="Corrupted"):
        await ai.chat.completions.create(**asked)


async def test_a_signed_text_goes_back_as_it_came(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [answer({"text": "Hel"}, {"text": "lo"}, {"text": "", "thoughtSignature": "c2ln"}), said("again")]
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    made = await ai.chat.completions.create(model="gemini-3-pro-preview", messages=messages)
    messages += [{"role": "assistant", "content": made.choices[0].message.content}, {"role": "user", "content": "more"}]
    await ai.chat.completions.create(model="gemini-3-pro-preview", messages=messages)
    assert gemini.bodies[1]["contents"][1]["parts"] == [{"text": "Hello"}, {"text": "", "thoughtSignature": "c2ln"}]
    gemini.script = [said("other")]
    await ai.chat.completions.create(model="gemini-3-flash-preview", messages=messages)
    assert gemini.bodies[2]["contents"][1]["parts"] == [{"text": "Hello"}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_answer_without_content_is_tried_once_more(
    stream: bool, ai: openai.AsyncOpenAI, gemini: FakeGemini
) -> None:
    gemini.script = [answer(reason="MALFORMED_FUNCTION_CALL"), said("ok")]
    raw = await ai.chat.completions.with_raw_response.create(**HELLO, stream=stream)  # type: ignore[call-overload]
    assert raw.headers["X-Attempts"] == "2"


async def test_what_is_only_thought_is_tried_once_more_while_nobody_saw_it(
    ai: openai.AsyncOpenAI, gemini: FakeGemini
) -> None:
    gemini.script = [answer({"text": "Hm.", "thought": True}), said("ok")]
    assert (await ai.chat.completions.create(**HELLO)).choices[0].message.content == "ok"


async def test_strict_refuses_what_would_be_lost(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("ok")]
    asked: Any = HELLO | {"logit_bias": {"50256": -100}}
    raw = await ai.chat.completions.with_raw_response.create(**asked)
    assert raw.headers["X-Agproxy-Changes"] == "1"
    with pytest.raises(openai.BadRequestError, match="no bias by token") as caught:
        await ai.chat.completions.create(**asked, extra_headers={"X-Agproxy-Strict": "1"})
    assert caught.value.param == "logit_bias"
    assert gemini.script == []


async def test_nothing_is_told_where_nothing_changed(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("ok")]
    raw = await ai.chat.completions.with_raw_response.create(**HELLO)
    assert "X-Agproxy-Changes" not in raw.headers


@pytest.mark.parametrize(
    ("step", "status", "code", "kind"),
    [
        (
            error(
                400, "INVALID_ARGUMENT", "The input token count (9) exceeds the maximum number of tokens allowed (8)."
            ),
            400,
            "context_length_exceeded",
            "invalid_request_error",
        ),
        ((413, {}), 413, "request_too_large", "invalid_request_error"),
        (
            error(400, "INVALID_ARGUMENT", "Request payload size exceeds the limit: 20971520 bytes."),
            413,
            "request_too_large",
            "invalid_request_error",
        ),
        (error(429, "RESOURCE_EXHAUSTED", "Quota exceeded, limit: 0"), 429, "insufficient_quota", "insufficient_quota"),
        (error(400, "FAILED_PRECONDITION", "User location is not supported."), 502, "upstream_error", "server_error"),
        (
            (400, {"error": {"code": 400, "message": json.dumps(error(503, "UNAVAILABLE", "Overloaded.")[1])}}),
            503,
            "server_is_overloaded",
            "server_error",
        ),
        (
            (404, [error(404, "NOT_FOUND", "models/x is not found.")[1]]),
            404,
            "model_not_found",
            "invalid_request_error",
        ),
        ((418, {"error": "teapot"}), 502, "upstream_error", "server_error"),
    ],
)
async def test_each_error_body_has_its_openai_class(
    step: Any, status: int, code: str, kind: str, ai: openai.AsyncOpenAI, gemini: FakeGemini
) -> None:
    gemini.script = [step] * 3
    with pytest.raises(openai.APIStatusError) as caught:
        await ai.chat.completions.create(**HELLO)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (status, code, kind)
    if code == "context_length_exceeded":
        assert caught.value.param == "messages"
    assert caught.value.response.headers.get("X-Should-Retry") == ("false" if kind == "insufficient_quota" else None)


@pytest.mark.parametrize("ai", ["gemini"], indirect=True)
async def test_usage_of_no_known_form_does_not_lose_the_vectors(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.models, gemini.beside = ["gemini-embedding-001"], {"usageMetadata": [5]}
    made = await ai.embeddings.create(model="text-embedding-3-small", input="x")
    assert (len(made.data), made.usage.prompt_tokens) == (1, 1)
