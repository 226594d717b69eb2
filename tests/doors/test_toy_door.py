"""A further API costs a parser and a renderer: a toy one, defined here alone, is served whole and streamed, with its own errors."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fake_gemini import FakeGemini, error, said

import antigravity_proxy as agproxy

# ---- the toy: {"engine", "say", "live"} is answered by {"said", "words"}, or by frames "+ text", "= words" and "! error"


def parse_toy(body: Any, past: agproxy.Past) -> list[agproxy.Request]:
    fields = agproxy.Fields(body)
    message = agproxy.Message("user", (agproxy.Text(fields.needed_text("say")),))
    engine, live = fields.needed_text("engine"), fields.flag("live")
    agproxy.read_fields(fields, TOY.fields)
    return [agproxy.Request(engine, (message,), stream=live, changes=tuple(fields.changes))]


def toy_error(error: agproxy.GatewayError) -> dict[str, Any]:
    return {"oops": error.message, "why": error.code or error.type, "at": error.param}


class ToyRenderer(agproxy.Renderer):
    def __init__(self, head: agproxy.Head, body: Mapping[str, Any]) -> None:
        self._model = head.model

    def render(self, event: agproxy.Event) -> str:
        match event:
            case agproxy.TextDelta(text=text):
                return f"data: + {text}\n\n"
            case agproxy.Ended(usage):
                return f"data: = {usage.completion}\n\n"
            case agproxy.Failed(error):
                return f"data: ! {json.dumps(toy_error(error))}\n\n"
        return ""

    def whole(self, events: Sequence[agproxy.Event]) -> Any:
        choices, usage = agproxy.collect(events)
        return {"said": choices[0].text, "words": usage.completion, "by": self._model}


TOY = agproxy.Door(
    path="/toy/talk",
    fields=agproxy.fates("mapped", engine="the model in the URL", say="contents", live="streamGenerateContent"),
    parse=parse_toy,
    renderer=ToyRenderer,
    error=toy_error,
)

# ---- what its clients see

ASK: dict[str, Any] = {"engine": "gpt-4o", "say": "hi"}
KEY = (agproxy.ClientKey("laptop", "right"),)
BUSY = error(429, "RESOURCE_EXHAUSTED", "Slow down.")


@pytest.fixture
async def start(gemini: FakeGemini, aiohttp_client: Any) -> Any:
    async def start(**settings: Any) -> TestClient:
        accounts = tuple(agproxy.Account(name, f"key-{name}", gemini.url) for name in "ab")
        config = agproxy.Config(accounts, max_wait_s=0, **settings)
        return await aiohttp_client(agproxy.create_app(config, doors=[*agproxy.DOORS, TOY]))

    return start


async def test_the_toy_is_answered_whole_and_as_a_stream(start: Any, gemini: FakeGemini) -> None:
    client = await start()
    gemini.script = [said("Hel", "lo"), said("Hel", "lo")]
    whole = await client.post("/toy/talk", json=ASK)
    assert (whole.status, await whole.json()) == (200, {"said": "Hello", "words": 4, "by": "gpt-4o"})
    streamed = await client.post("/toy/talk", json=ASK | {"live": True})
    assert (streamed.status, streamed.content_type) == (200, "text/event-stream")
    assert await streamed.text() == "data: + Hel\n\ndata: + lo\n\ndata: = 4\n\n"
    for answer in (whole, streamed):
        assert answer.headers["X-Mapped-Model"] == "gemini-2.5-flash"
        assert answer.headers["X-Attempts"] == "1"
    assert gemini.bodies[0]["contents"] == [{"role": "user", "parts": [{"text": "hi"}]}]


async def test_the_other_doors_are_served_beside_the_toy(start: Any, gemini: FakeGemini) -> None:
    client = await start()
    gemini.script = [said("x")]
    chat = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
    answer = await (await client.post("/v1/chat/completions", json=chat)).json()
    assert answer["object"] == "chat.completion"
    assert set(await (await client.post("/v1/chat/completions", json={})).json()) == {"error"}


async def test_a_field_that_the_toy_does_not_know_is_counted(start: Any, gemini: FakeGemini) -> None:
    client = await start()
    gemini.script = [said("x")]
    answer = await client.post("/toy/talk", json=ASK | {"odd": 1})
    assert (answer.status, answer.headers["X-Agproxy-Changes"]) == (200, "1")
    strict = await client.post("/toy/talk", json=ASK | {"odd": 1}, headers={"X-Agproxy-Strict": "1"})
    assert (strict.status, (await strict.json())["why"]) == (400, "unsupported_parameter")


@pytest.mark.parametrize(
    ("settings", "path", "body", "script", "status", "why", "at"),
    [
        ({}, "/toy/talk", {"engine": "gpt-4o"}, [], 400, "missing_required_parameter", "say"),
        ({}, "/toy/talk", ASK | {"say": 5}, [], 400, "invalid_type", "say"),
        ({}, "/toy/talk", [], [], 400, "invalid_type", None),
        ({}, "/toy/talk", ASK, [error(400, "INVALID_ARGUMENT", "bad")], 400, "invalid_request_error", None),
        ({"auth_mode": "strict", "api_key": KEY}, "/toy/talk", ASK, [], 401, "invalid_api_key", None),
        ({}, "/toy/talk", ASK | {"engine": "nobody-knows"}, [], 404, "model_not_found", "model"),
        ({}, "/toy/talk/more", ASK, [], 404, "unknown_url", None),
        ({}, "/toy/talk", ASK, [BUSY, BUSY], 429, "rate_limit_exceeded", None),
    ],
    ids=["field", "type", "no object", "gemini", "key", "model", "path", "accounts"],
)
@pytest.mark.parametrize("live", [False, True], ids=["whole", "stream"])
async def test_each_refusal_has_the_form_of_the_toy(
    live: bool,
    settings: dict[str, Any],
    path: str,
    body: Any,
    script: list[Any],
    status: int,
    why: str,
    at: str | None,
    start: Any,
    gemini: FakeGemini,
) -> None:
    client = await start(**settings)
    gemini.script = list(script)
    answer = await client.post(path, json=body | {"live": live} if isinstance(body, dict) else body)
    told = await answer.json()
    assert (answer.status, told["why"], told["at"]) == (status, why, at)
    assert set(told) == {"oops", "why", "at"}
    assert ("Retry-After" in answer.headers) == (status == 429)
    assert answer.content_type == "application/json"


async def test_another_method_is_refused_in_the_form_of_the_toy(start: Any) -> None:
    answer = await (await start()).get("/toy/talk")
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
    assert (await answer.json())["why"] == "method_not_supported"


@pytest.mark.parametrize("path", ["/toy", "/toy/talkative"])
async def test_beside_the_toy_errors_have_the_first_form(path: str, start: Any) -> None:
    answer = await (await start()).post(path, json=ASK)
    assert (answer.status, (await answer.json())["error"]["code"]) == (404, "unknown_url")


async def test_a_stream_that_is_cut_ends_in_the_form_of_the_toy(start: Any, gemini: FakeGemini) -> None:
    client = await start()
    gemini.script, gemini.pause_s = [said("ha", "lf", reason=None)], 0.01
    answer = await client.post("/toy/talk", json=ASK | {"live": True})
    *deltas, last = (await answer.text()).strip().split("\n\n")
    assert deltas == ["data: + ha", "data: + lf"]
    told = json.loads(last.removeprefix("data: ! "))
    assert (set(told), told["why"]) == ({"oops", "why", "at"}, "upstream_error")


async def test_a_refusal_behind_a_heartbeat_is_told_in_the_stream(start: Any, gemini: FakeGemini) -> None:
    client = await start(heartbeat_s=0.05)
    gemini.script, gemini.silence_s = [error(400, "INVALID_ARGUMENT", "bad")], 0.2
    answer = await client.post("/toy/talk", json=ASK | {"live": True})
    *beats, last = (await answer.text()).strip().split("\n\n")
    assert (answer.status, set(beats)) == (200, {": keep-alive"})
    assert json.loads(last.removeprefix("data: ! "))["oops"] == "bad"


async def test_a_stream_of_the_toy_is_ended_by_the_drain(start: Any, gemini: FakeGemini) -> None:
    client = await start()
    gemini.script, gemini.pause_s = [said("a", "b")], 20
    answer = await client.post("/toy/talk", json=ASK | {"live": True})
    assert await answer.content.readuntil(b"\n\n") == b"data: + a\n\n"
    ending = asyncio.create_task(client.app[agproxy.gateway_key()].drain(0))
    last = (await answer.text()).strip().removeprefix("data: ! ")
    assert json.loads(last)["why"] == "server_is_overloaded"
    await ending
