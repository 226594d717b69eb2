"""Responses that are kept: by HTTP and through the real openai package, over a scripted Gemini."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp.test_utils import TestClient
from conftest import sdk, until
from fake_gemini import FakeGemini, error, said
from golden import CASES, frames, without_null_usage
from kept import ASK, GEMINI_3, TOOL, Start, ask, ask_stream, fetch, starter
from openai_schema import findings
from pydantic import BaseModel

import antigravity_proxy as agproxy


@pytest.fixture
def start(gemini: FakeGemini, aiohttp_client: Any) -> Start:
    return starter(gemini, aiohttp_client)


@pytest.fixture
async def client(start: Start) -> TestClient:
    return await start(max_wait_s=0)


@pytest.fixture
async def ai(client: TestClient) -> AsyncIterator[openai.AsyncOpenAI]:
    async with sdk(str(client.make_url("/v1"))) as ai:
        yield ai


def words(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], part.get("text", "?")) for turn in body["contents"] for part in turn["parts"]]


# ---- there and back


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_response_is_kept_as_it_was_given(stream: bool, client: TestClient, gemini: FakeGemini) -> None:
    gemini.script = [said("one")]
    if stream:
        made = (await ask_stream(client))[-2]["response"]
    else:
        made = await ask(client)
        assert made.pop("choices")[0]["message"]["content"] == "one"
    assert made["store"] is True
    status, kept = await fetch(client, made["id"])
    assert (status, kept) == (200, made)
    assert findings(kept, "Response") == []
    assert await fetch(client, made["id"], "DELETE") == (
        200,
        {"id": made["id"], "object": "response", "deleted": True},
    )
    assert (await fetch(client, made["id"]))[0] == 404
    assert (await fetch(client, made["id"], "DELETE"))[0] == 404


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_conversation_goes_on_by_id(stream: bool, ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("one"), said("two"), said("three")]
    previous = None
    for text in ("first", "second", "third"):
        made: Any = await ai.responses.create(
            model="gpt-4o", input=text, instructions=text, previous_response_id=previous, stream=stream
        )
        if stream:
            made = [event async for event in made][-1].response
        assert made.previous_response_id == previous
        previous = made.id
    assert words(gemini.bodies[2]) == [
        ("user", "first"),
        ("model", "one"),
        ("user", "second"),
        ("model", "two"),
        ("user", "third"),
    ]
    assert gemini.bodies[2]["systemInstruction"] == {"parts": [{"text": "third"}]}  # instructions are not inherited


async def test_a_tools_result_needs_nothing_but_the_id(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    call = {"functionCall": {"name": "ls", "args": {"path": "/"}}, "thoughtSignature": "c2ln"}
    gemini.script = [[{"candidates": [{"content": {"parts": [call]}, "finishReason": "STOP"}]}], said("two files")]
    first = await ai.responses.create(model=GEMINI_3, input="list", tools=[TOOL])  # type: ignore[list-item]
    result: Any = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "a b"}  # type: ignore[union-attr]
    second = await ai.responses.create(model=GEMINI_3, input=[result], previous_response_id=first.id)
    assert second.output_text == "two files"
    turns = gemini.bodies[1]["contents"]
    assert turns[1]["parts"][0]["thoughtSignature"] == "c2ln"
    assert turns[2]["parts"][0]["functionResponse"]["response"] == {"output": "a b"}


async def test_a_tool_that_is_declared_again_is_sent_once(client: TestClient, gemini: FakeGemini) -> None:
    def declared(about: str) -> dict[str, Any]:
        tools = [{"type": "function", "name": "f", "description": about}]
        return {"type": "additional_tools", "role": "developer", "tools": tools}

    gemini.script = [said("one"), said("two")]
    first = await ask(client, input=[declared("old"), {"role": "user", "content": "hi"}])
    await ask(client, previous_response_id=first["id"], input=[declared("new"), {"role": "user", "content": "hi"}])
    assert gemini.bodies[1]["tools"][0]["functionDeclarations"] == [{"name": "f", "description": "new"}]


async def test_media_are_kept_whole(client: TestClient, gemini: FakeGemini) -> None:
    url = f"data:image/png;base64,{'iVBO' * 9000}"
    gemini.script = [said("a cat"), said("black")]
    first = await ask(client, input=[{"role": "user", "content": [{"type": "input_image", "image_url": url}]}])
    await ask(client, previous_response_id=first["id"])
    assert gemini.bodies[1]["contents"][0]["parts"][0]["inlineData"]["data"] == "iVBO" * 9000
    _, items = await fetch(client, f"{first['id']}/input_items")
    assert items["data"][0]["content"] == [{"type": "input_image", "image_url": url, "detail": "auto"}]


@pytest.mark.parametrize("kind", ["input_image", "image_url"])
@pytest.mark.parametrize("about", [{}, {"detail": None}, {"detail": "high"}])
def test_an_image_is_listed_as_responses_has_it(kind: str, about: dict[str, Any]) -> None:
    url = "data:image/png;base64,aGk="
    image = {"image_url": url, **about} if kind == "input_image" else {"image_url": {"url": url, **about}}
    (item,) = agproxy.render_input([{"role": "user", "content": [{"type": kind, **image}]}], "0")
    assert item["content"] == [{"type": "input_image", "image_url": url, "detail": about.get("detail") or "auto"}]


async def test_an_item_is_named_instead_of_sent(client: TestClient, gemini: FakeGemini) -> None:
    gemini.script = [said("one"), said("two")]
    first = await ask(client)
    _, items = await fetch(client, f"{first['id']}/input_items")
    named = [{"type": "item_reference", "id": items["data"][0]["id"]}, {"id": first["output"][0]["id"]}]
    await ask(client, input=[*named, {"role": "user", "content": "second"}])
    assert words(gemini.bodies[1]) == [("user", "first"), ("model", "one"), ("user", "second")]
    gemini.script = [said("odd"), said("odd again")]
    odd = await ask(client, input=[{"role": "user", "content": "x", "id": id} for id in (5, [], {"a": 1}, "")])
    assert (await ask(client, previous_response_id=odd["id"]))["status"] == "completed"
    assert (await ask(client, input=[{"type": "item_reference", "id": ["x"]}]))["error"]["param"] == "input[0].id"
    refused = await ask(client, input=[{"type": "item_reference", "id": "msg_0123456789abcdef012345670000"}])
    assert (refused["error"]["param"], "Send the item itself" in refused["error"]["message"]) == ("input[0].id", True)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", CASES)
async def test_every_kind_of_answer_is_kept(name: str, stream: bool, client: TestClient, gemini: FakeGemini) -> None:
    gemini.script = [CASES[name]["chunks"]] * 3
    response = await client.post("/v1/responses", json=ASK | {"stream": stream})
    if response.status != 200:
        assert findings(await response.json(), "ErrorResponse") == []
        return
    made = frames(await response.text())[-2]["response"] if stream else await response.json()
    status, kept = await fetch(client, made["id"])
    assert (status, kept) == (200, {key: value for key, value in made.items() if key != "choices"})
    played = frames(await (await client.get(f"/v1/responses/{made['id']}?stream=true")).text())[:-1]
    assert [problem for event in played for problem in findings(without_null_usage(event), "ResponseStreamEvent")] == []
    assert [event["item"] for event in played if event["type"] == "response.output_item.done"] == kept["output"]
    assert (played[-1]["type"], played[-1]["response"]) == (f"response.{kept['status']}", kept)
    again = await ask(client, previous_response_id=made["id"])
    assert again.get("status") == CASES[name]["responses"]["status"] or "error" in again


class Person(BaseModel):
    name: str
    age: int


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_sdk_parses_what_it_asked_for(stream: bool, ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    call = {"functionCall": {"name": "Person", "args": {"name": "Ada", "age": 36}}}
    gemini.script = [
        said('{"name": "Ada", ', '"age": 36}'),
        [{"candidates": [{"content": {"parts": [call]}, "finishReason": "STOP"}]}],
    ]
    asked: list[dict[str, Any]] = [{"text_format": Person}, {"tools": [openai.pydantic_function_tool(Person)]}]
    made: list[Any] = []
    for more in asked:
        if stream:
            async with ai.responses.stream(model="gpt-4o", input="who?", **more) as events:
                made.append(await events.get_final_response())
        else:
            made.append(await ai.responses.parse(model="gpt-4o", input="who?", **more))
    assert made[0].output_parsed == Person(name="Ada", age=36)
    assert made[1].output[0].parsed_arguments == Person(name="Ada", age=36)


async def test_a_generated_image_is_seen_in_the_next_turn(client: TestClient, gemini: FakeGemini) -> None:
    gemini.models = ["gemini-2.5-flash-image"]
    image = {"inlineData": {"mimeType": "image/png", "data": "iVBORw0K"}}
    gemini.script = [[{"candidates": [{"content": {"parts": [image]}, "finishReason": "STOP"}]}], said("blue")]
    first = await ask(client, model="gemini-2.5-flash-image")
    await ask(client, model="gemini-2.5-flash-image", previous_response_id=first["id"])
    assert gemini.bodies[1]["contents"][1] == {"role": "model", "parts": [image]}


# ---- what is not kept


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("settings", "sent"), [({"store": "off"}, {}), ({}, {"store": False})], ids=["by the config", "by the request"]
)
async def test_nothing_is_kept_that_is_not_to_be(
    settings: dict[str, Any], sent: dict[str, Any], stream: bool, start: Start, gemini: FakeGemini
) -> None:
    client = await start(**settings)
    gemini.script = [said("one")]
    made = (await ask_stream(client, **sent))[-2]["response"] if stream else await ask(client, **sent)
    assert made["store"] is False
    assert (await fetch(client, made["id"]))[0] == 404
    refused = await ask(client, previous_response_id=made["id"])
    assert refused["error"]["code"] == "previous_response_not_found"
    assert made["id"] in refused["error"]["message"]


async def test_a_request_that_failed_leaves_nothing(client: TestClient, gemini: FakeGemini, tmp_path: Path) -> None:
    gemini.script = [error(400, "INVALID_ARGUMENT", "No.")]
    assert "error" in await ask(client)


async def test_a_broken_chain_is_told(client: TestClient, gemini: FakeGemini) -> None:
    gemini.script = [said("one"), said("two")]
    first = await ask(client)
    second = await ask(client, previous_response_id=first["id"])
    await fetch(client, first["id"], "DELETE")
    refused = (await ask(client, previous_response_id=second["id"]))["error"]
    assert (refused["code"], refused["param"]) == ("previous_response_not_found", "previous_response_id")
    assert first["id"] in refused["message"]


async def test_another_key_is_told_nothing(start: Start, gemini: FakeGemini) -> None:
    keys = (agproxy.ClientKey("mine", "k1"), agproxy.ClientKey("theirs", "k2"))
    client = await start(auth_mode="strict", api_key=keys)
    gemini.script = [said("one"), said("two")]
    mine, theirs = ({"Authorization": f"Bearer {key.key}"} for key in keys)
    made = await (await client.post("/v1/responses", json=ASK, headers=mine)).json()
    path = f"/v1/responses/{made['id']}"
    for method, where in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        assert (await client.request(method, path + where, headers=theirs)).status == 404
    sent = ASK | {"previous_response_id": made["id"]}
    assert (await client.post("/v1/responses", json=sent, headers=theirs)).status == 400
    assert (await client.post("/v1/responses", json=sent, headers=mine)).status == 200
    assert (await client.get(path, headers=mine)).status == 200


# ---- reading what is kept


async def test_the_input_is_listed_in_pages(ai: openai.AsyncOpenAI, client: TestClient, gemini: FakeGemini) -> None:
    gemini.script = [said("one")]
    texts = [f"t{i}" for i in range(5)]
    made = await ai.responses.create(model="gpt-4o", input=[{"role": "user", "content": text} for text in texts])
    listed = [item async for item in await ai.responses.input_items.list(made.id, limit=2)]
    assert [item.content[0].text for item in listed] == texts[::-1]  # type: ignore[union-attr]
    assert len({item.id for item in listed}) == 5
    _, page = await fetch(client, f"{made.id}/input_items?order=asc&limit=2&after={listed[-1].id}")
    assert [item["content"][0]["text"] for item in page["data"]] == ["t1", "t2"]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (listed[3].id, listed[2].id, True)
    assert findings(page, "ResponseItemList") == []
    for wrong in ("limit=0", "limit=101", "limit=x", "order=x", "after=x"):
        status, refused = await fetch(client, f"{made.id}/input_items?{wrong}")
        assert (status, refused["error"]["param"]) == (400, wrong.partition("=")[0])


async def test_every_kind_of_input_is_listed_as_openai_would(client: TestClient, gemini: FakeGemini) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    sent: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, image]},
        {"role": "user", "content": [{"type": "input_file", "file_data": "aGk=", "filename": "a.txt"}]},
        {"role": "assistant", "content": "b", "id": None},
        {"role": "assistant", "content": [{"type": "text", "text": "c", "annotations": None}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": None},
        {"type": "function_call", "call_id": "c1", "name": "ls", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "x", "id": None},
        {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "raw"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "y"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "text", "text": "z"}, image]},
    ]
    gemini.script = [said("one"), said("two")]
    made = await ask(client, input=sent)
    _, page = await fetch(client, f"{made['id']}/input_items?order=asc")
    assert findings(page, "ResponseItemList") == []
    assert [item["type"] for item in page["data"]] == [item.get("type", "message") for item in sent]
    assert len({item["id"] for item in page["data"]}) == len(sent)
    await ask(client, input=page["data"], store=False)
    assert gemini.bodies[0] == gemini.bodies[1]


async def test_a_stream_is_played_again(client: TestClient, gemini: FakeGemini) -> None:
    thought = {"text": "Hm.", "thought": True}
    call = {"functionCall": {"name": "ls", "args": {"path": "/"}}}
    parts = [thought, {"text": "So"}, {"text": "."}, call]
    gemini.script = [[{"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}]}]]
    sent = await ask_stream(client, tools=[TOOL])
    last = sent[-2]["response"]
    response = await client.get(f"/v1/responses/{last['id']}?stream=true")
    again = frames(await response.text())
    assert [event["sequence_number"] for event in again[:-1]] == list(range(len(again) - 1))
    assert [
        problem for event in again[:-1] for problem in findings(without_null_usage(event), "ResponseStreamEvent")
    ] == []
    assert again[-2] | {"sequence_number": 0} == sent[-2] | {"sequence_number": 0}
    deltas = "response.output_text.delta"
    for of in (lambda event: event["type"], lambda event: event.get("item")):
        assert [of(e) for e in again[:-1] if e["type"] != deltas] == [of(e) for e in sent[:-1] if e["type"] != deltas]
    rest = frames(await (await client.get(f"/v1/responses/{last['id']}?stream=true&starting_after=3")).text())
    assert rest == again[4:]


async def test_input_tokens(ai: openai.AsyncOpenAI, client: TestClient, gemini: FakeGemini) -> None:
    counted = await ai.responses.input_tokens.count(
        model="gpt-4o", input="four words are here", instructions="Be brief."
    )
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", 6)
    response = await client.post("/v1/responses/input_tokens", json={})
    assert findings(await response.json(), "TokenCountsResource") == []


# ---- in the background


async def finished(ai: openai.AsyncOpenAI, id: str, running: Sequence[str] = ("queued", "in_progress")) -> Any:
    for _ in range(200):
        made = await ai.responses.retrieve(id)
        if made.status not in running:
            return made
        await asyncio.sleep(0.01)
    raise AssertionError("it never ends")


async def test_a_background_response_is_polled(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script, gemini.silence_s = [said("one")], 0.1
    made = await ai.responses.create(model="gpt-4o", input="hi", background=True)
    assert (made.status, made.background, made.output) == ("queued", True, [])
    assert (await ai.responses.retrieve(made.id)).status == "queued"
    done = await finished(ai, made.id)
    assert (done.status, done.output_text, done.usage.total_tokens) == ("completed", "one", 7)
    assert (await ai.responses.cancel(made.id)).status == "completed"


async def test_a_background_stream_is_left_and_taken_up_again(
    ai: openai.AsyncOpenAI, client: TestClient, gemini: FakeGemini
) -> None:
    gemini.script, gemini.pause_s = [said("a", "b", "c", "d")], 0.05
    response = await client.post("/v1/responses", json=ASK | {"stream": True, "background": True})
    head = b""
    while b'"delta":"a"' not in head:
        head += await response.content.readany()
    response.close()
    first = frames(head.decode().rpartition("\n\n")[0] + "\n\n")
    assert [event["type"] for event in first[:3]] == [
        f"response.{kind}" for kind in ("created", "queued", "in_progress")
    ]
    id, at = first[0]["response"]["id"], first[-1]["sequence_number"]
    rest = [event async for event in await ai.responses.retrieve(id, stream=True, starting_after=at)]
    assert [event.sequence_number for event in rest] == list(range(at + 1, at + 1 + len(rest)))
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.output_text == "abcd"
    await finished(ai, id)
    later = [event async for event in await ai.responses.retrieve(id, stream=True, starting_after=at)]
    assert later == rest
    everything = frames(await (await client.get(f"/v1/responses/{id}?stream=true")).text())
    assert everything[: len(first)] == first
    problems = [p for event in everything[:-1] for p in findings(without_null_usage(event), "ResponseStreamEvent")]
    assert problems == []


@pytest.mark.parametrize("pause", [{"silence_s": 5}, {"pause_s": 0.1}], ids=["before it begins", "in the middle"])
async def test_a_background_response_is_cancelled(
    pause: dict[str, float], ai: openai.AsyncOpenAI, client: TestClient, gemini: FakeGemini
) -> None:
    gemini.script = [said(*"abcdefghij")]
    for name, value in pause.items():
        setattr(gemini, name, value)
    made = await ai.responses.create(model="gpt-4o", input="hi", background=True)
    if "pause_s" in pause:
        await finished(ai, made.id, running=["queued"])
    cancelled = await ai.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert (await ai.responses.retrieve(made.id)) == cancelled
    assert (await ai.responses.cancel(made.id)).status == "cancelled"
    if "pause_s" in pause:
        assert (cancelled.output[0].status, cancelled.output_text[:1]) == ("incomplete", "a")  # type: ignore[union-attr]
        assert cancelled.output_text != "abcdefghij"
    events = frames(await (await client.get(f"/v1/responses/{made.id}?stream=true")).text())
    assert (events[-2]["type"], events[-2]["response"]["status"]) == ("response.incomplete", "cancelled")


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (error(429, "RESOURCE_EXHAUSTED", "Slow down."), "rate_limit_exceeded"),
        (error(429, "RESOURCE_EXHAUSTED", "Quota exceeded, limit: 0"), "insufficient_quota"),
        (error(400, "INVALID_ARGUMENT", "The input token count (9) exceeds the limit."), "context_length_exceeded"),
        (error(400, "INVALID_ARGUMENT", "No."), "invalid_prompt"),
        (error(403, "PERMISSION_DENIED", "No."), "server_error"),
    ],
)
async def test_a_background_response_fails(step: Any, code: str, ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [step] * 3
    made = await finished(ai, (await ai.responses.create(model="gpt-4o", input="hi", background=True)).id)
    assert (made.status, made.error.code) == ("failed", code)


async def test_what_runs_is_deleted(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script, gemini.silence_s = [said("one")], 5
    made = await ai.responses.create(model="gpt-4o", input="hi", background=True)
    await ai.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await ai.responses.retrieve(made.id)


async def test_only_what_is_kept_and_in_the_background_can_be(client: TestClient, gemini: FakeGemini) -> None:
    gemini.script = [said("one")]
    refused = (await ask(client, background=True, store=False))["error"]
    assert (refused["param"], refused["code"]) == ("background", "unsupported_parameter")
    status, told = await fetch(client, f"{(await ask(client))['id']}/cancel", "POST")
    assert (status, told["error"]["message"]) == (
        400,
        "Cannot cancel a synchronous response. Close its connection instead.",
    )


# ---- in a file


async def test_a_client_that_leaves_is_not_waited_for(client: TestClient, gemini: FakeGemini) -> None:
    gemini.script, gemini.pause_s = [said("a", "b", "c")], 0.3
    response = await client.post("/v1/responses", json=ASK | {"stream": True})
    id = json.loads((await response.content.readuntil(b"\n\n")).decode().partition("data: ")[2])["response"]["id"]
    assert (await fetch(client, id))[1]["status"] == "in_progress"
    followed = await client.get(f"/v1/responses/{id}?stream=true")
    assert (followed.status, "cannot be followed" in await followed.text()) == (400, True)
    response.close()
    for _ in range(100):
        kept = (await fetch(client, id))[1]
        if kept["status"] != "in_progress":
            break
        await asyncio.sleep(0.01)
    assert (kept["status"], kept["error"]["code"]) == ("failed", "server_error")
    assert findings({key: value for key, value in kept.items() if key != "usage"}, "Response") == []
    for after in (2, 50):  # more than is kept of it
        rest = frames(await (await client.get(f"/v1/responses/{id}?stream=true&starting_after={after}")).text())
        assert [(event["type"], event["sequence_number"]) for event in rest[:-1]] == [("response.failed", after + 1)]


async def test_a_background_response_that_a_mistake_ends_is_cut_and_not_taken_for_whole(
    client: TestClient, gemini: FakeGemini, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rendered = agproxy.ResponseRenderer.frames

    def fails(renderer: Any, events: Any) -> str:
        if isinstance(events[-1], agproxy.Ended):
            raise KeyError("words".upper())
        return rendered(renderer, events)

    monkeypatch.setattr(agproxy.ResponseRenderer, "frames", fails)
    gemini.script, gemini.pause_s = [said("a", "b")], 0.03
    async with client.post("/v1/responses", json=ASK | {"background": True, "stream": True}) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.text()
    assert "KeyError" in caplog.text
    assert "WORDS" not in caplog.text
    made = f"resp_{response.headers['X-Request-Id'][4:]}"
    assert (await fetch(client, made))[1]["status"] == "failed"


async def test_why_tells_of_a_background_response_what_it_tells_of_others(
    client: TestClient, gemini: FakeGemini
) -> None:
    gemini.script = [said("one")]
    made = await ask(client, background=True)
    why = f"/agproxy/why/req_{made['id'][5:]}"
    async with asyncio.timeout(5):
        while (told := await client.get(why)).status != 200:  # noqa: ASYNC110  # another task sets no event
            await asyncio.sleep(0.01)
    one = await told.json()
    assert (one["model"], one["account"], one["attempts"]) == ("gpt-4o", "a", 1)
    assert [step["chosen"] for step in one["decisions"]] == ["a"]


async def test_what_is_made_in_the_background_takes_no_request_its_place(
    gemini: FakeGemini, aiohttp_client: Any
) -> None:
    app = agproxy.create_app(agproxy.Config((agproxy.Account("a", "k", gemini.url),), max_requests=1))
    client = await aiohttp_client(app)
    gemini.script, gemini.silence_s = [said("one")], 5
    made = await ask(client, background=True)
    assert (await fetch(client, f"{made['id']}/cancel", "POST"))[1]["status"] == "cancelled"


async def test_a_follower_that_leaves_is_logged_as_gone(
    client: TestClient, gemini: FakeGemini, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    gemini.script, gemini.silence_s = [said("one")], 5
    made = await ask(client, background=True)
    followed = await client.get(f"/v1/responses/{made['id']}?stream=true")
    await followed.content.readuntil(b"\n\n")
    followed.close()
    await until(lambda: "responses/{id} attempts=0 status=" in caplog.text)
    assert "responses/{id} attempts=0 status=499" in caplog.text
    assert (await fetch(client, made["id"]))[1]["status"] in ("queued", "in_progress")  # it goes on
    await fetch(client, f"{made['id']}/cancel", "POST")


async def test_cancelled_by_many_at_once(client: TestClient, gemini: FakeGemini) -> None:
    gemini.script, gemini.silence_s = [said("one")], 5
    made = await ask(client, background=True)
    told = await asyncio.gather(*(fetch(client, f"{made['id']}/cancel", "POST") for _ in range(4)))
    assert [(status, answer["status"]) for status, answer in told] == [(200, "cancelled")] * 4
    assert (await fetch(client, made["id"]))[1]["status"] == "cancelled"


async def test_text_so_far_stays_where_the_gateway_stops(start: Start, gemini: FakeGemini, tmp_path: Path) -> None:
    store = str(tmp_path / "s")
    one = await start(drain_s=0.3, store=store)
    gemini.script, gemini.pause_s = [said("so ", "far ", *"abcdefgh")], 0.2
    made = await ask(one, background=True)
    async with aiohttp.ClientSession() as session:
        followed = await session.get(one.make_url(f"/v1/responses/{made['id']}?stream=true"))
        await one.close()
        assert b"response.failed" in await followed.read()
    other = await start(store=store)
    kept = (await fetch(other, made["id"]))[1]
    assert (kept["status"], kept["output"][0]["content"][0]["text"][:3]) == ("failed", "so ")


async def test_head_of_what_runs_has_no_body(client: TestClient, gemini: FakeGemini) -> None:
    gemini.script, gemini.silence_s = [said("one")], 1
    made = await ask(client, background=True)
    head = await client.head(f"/v1/responses/{made['id']}?stream=true")
    assert (head.status, await head.read()) == (200, b"")
    assert (await fetch(client, made["id"]))[0] == 200


@pytest.mark.parametrize("previous", ["\ud800", "resp_none"])
async def test_odd_previous_ids(previous: str, client: TestClient) -> None:
    body = json.dumps({"model": "gpt-4o", "input": "x", "previous_response_id": previous})
    response = await client.post("/v1/responses", data=body, headers={"Content-Type": "application/json"})
    assert (response.status, (await response.json())["error"]["code"]) == (400, "previous_response_not_found")


async def test_items_of_one_id_are_listed_once(ai: openai.AsyncOpenAI, gemini: FakeGemini) -> None:
    gemini.script = [said("one")]
    items: Any = [{"id": f"msg_{n // 2}", "role": "user", "content": f"{n}"} for n in range(9)]
    made = await ai.responses.create(model="gpt-4o", input=items)
    listed = [item async for item in ai.responses.input_items.list(made.id, limit=2)]
    assert len(listed) == len({item.id for item in listed}) == 9
