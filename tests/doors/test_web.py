"""What only HTTP shows, against a scripted Gemini and through the real openai package."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import conftest
import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from conftest import until
from fake_gemini import KINDS, FakeGemini, account_of, error, said
from openai_schema import findings
from own_listener import OwnListener
from yarl import URL

import antigravity_proxy as agproxy

Start = Callable[..., Awaitable[TestClient]]
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "33s"}
RATE_LIMITED = error(429, "RESOURCE_EXHAUSTED", "Slow down.", RETRY_INFO)
HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(params=["direct", "aiohttp", "vertex", "cloudcode"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is seen by HTTP is the same over both transports, and of all kinds of accounts; the kind."""
    monkeypatch.setitem(agproxy.create_app.__kwdefaults__, "direct", request.param != "aiohttp")
    return request.param if request.param in KINDS else "gemini"


# Where the account is not of the parameter's kind, vertex and cloudcode are the direct transport once more.
both_transports = pytest.mark.parametrize("transport", ["direct", "aiohttp"], indirect=True)


@pytest.fixture
async def gemini() -> AsyncIterator[tuple[FakeGemini, str]]:
    fake = FakeGemini()
    async with TestServer(fake.app) as server:
        yield fake, str(server.make_url("")).rstrip("/")


@pytest.fixture
async def start(gemini: tuple[FakeGemini, str], aiohttp_client: Any, transport: str) -> Start:
    async def start(accounts: str = "ab", **settings: Any) -> TestClient:
        made = tuple(account_of(transport, name, gemini[1]) for name in accounts)
        given = {"strategy": "round_robin", "max_wait_s": 0, **settings}
        return await aiohttp_client(agproxy.create_app(agproxy.Config(made, **given)))

    return start


@pytest.fixture
async def sdk() -> AsyncIterator[Callable[[TestClient], openai.AsyncOpenAI]]:
    async with contextlib.AsyncExitStack() as stack:

        def sdk(client: TestClient) -> openai.AsyncOpenAI:
            made = conftest.sdk(str(client.make_url("/v1")))
            stack.push_async_callback(made.close)
            return made

        yield sdk


async def test_health_and_models(start: Start) -> None:
    client = await start()
    assert (await (await client.get("/healthz")).json())["status"] == "ok"
    listed = await (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert "gemini-2.5-flash" in [model["id"] for model in listed["data"]]


async def test_chat_by_the_sdk(start: Start, gemini: Any, sdk: Any) -> None:
    client = await start()
    gemini[0].script = [said("Hel", "lo")]
    raw = await sdk(client).chat.completions.with_raw_response.create(**HELLO)
    answer = raw.parse()
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "stop")
    assert (answer.model, raw.headers["x-mapped-model"]) == ("gpt-4o", "gemini-2.5-flash")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 7


async def test_a_stream_by_the_sdk(start: Start, gemini: Any, sdk: Any) -> None:
    client = await start()
    gemini[0].script = [said("Hel", "lo \u2028 wörld")]
    texts = []
    async for chunk in await sdk(client).chat.completions.create(**HELLO, stream=True):
        texts.append(chunk.choices[0].delta.content or "")
    assert "".join(texts) == "Hello \u2028 wörld"


@pytest.mark.parametrize("stream", [False, True])
async def test_one_line_a_request_without_the_prompt(
    start: Start, gemini: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "agproxy")
    gemini[0].script = [said("x")]
    await (await (await start()).post("/v1/chat/completions", json=HELLO | {"stream": stream})).read()
    line = caplog.messages[-1]
    assert all(word in line for word in ("gpt-4o -> gemini-2.5-flash", "attempts=1", "status=200", "tokens=3+4"))
    assert "hi" not in line.split()


async def test_a_stream_ends_with_done(start: Start, gemini: Any) -> None:
    client = await start()
    gemini[0].script = [said("x")]
    response = await client.post("/v1/chat/completions", json=HELLO | {"stream": True})
    assert (await response.text()).endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("forgetful", [False, True], ids=["client keeps the signature", "client drops it"])
async def test_a_tool_call_there_and_back(forgetful: bool, start: Start, gemini: Any, sdk: Any) -> None:
    client = await start()
    call = {"functionCall": {"name": "ls", "args": {"path": "/"}}, "thoughtSignature": "c2ln"}
    gemini[0].script = [
        [{"candidates": [{"content": {"role": "model", "parts": [call]}, "finishReason": "STOP"}]}],
        said("two files"),
    ]
    tools: Any = [
        {
            "type": "function",
            "function": {"name": "ls", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}},
        }
    ]
    messages: list[Any] = list(HELLO["messages"])
    first = await sdk(client).chat.completions.create(model="gemini-3-pro-preview", messages=messages, tools=tools)
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message.model_dump(exclude_none=True)
    made = message["tool_calls"][0]
    if forgetful:
        del made["extra_content"]
    messages += [message, {"role": "tool", "tool_call_id": made["id"], "content": "a b"}]
    second = await sdk(client).chat.completions.create(model="gemini-3-pro-preview", messages=messages, tools=tools)
    assert second.choices[0].message.content == "two files"
    assert gemini[0].bodies[1]["contents"][1]["parts"][0]["thoughtSignature"] == "c2ln"


async def test_a_rate_limited_account_is_followed_by_the_next(start: Start, gemini: Any) -> None:
    client = await start()
    gemini[0].script = [RATE_LIMITED, said("b answers")]
    response = await client.post("/v1/chat/completions", json=HELLO)
    assert (response.status, response.headers["X-Attempts"]) == (200, "2")
    assert gemini[0].keys == ["key-a", "key-b"]


async def test_all_rate_limited_is_one_clean_429(start: Start, gemini: Any, sdk: Any) -> None:
    client = await start()
    gemini[0].script = [RATE_LIMITED, RATE_LIMITED]
    with pytest.raises(openai.RateLimitError) as caught:
        await sdk(client).chat.completions.create(**HELLO)
    assert 32 <= int(caught.value.response.headers["retry-after"]) <= 37  # with its jitter
    assert caught.value.code == "rate_limit_exceeded"


async def test_a_cut_stream_ends_with_an_error_and_no_done(start: Start, gemini: Any) -> None:
    client = await start()
    gemini[0].script = [said("half", reason=None)]
    response = await client.post("/v1/chat/completions", json=HELLO | {"stream": True})
    text = await response.text()
    assert json.loads(text.strip().split("\n\n")[-1][6:])["error"]["code"] == "upstream_error"
    assert "[DONE]" not in text


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/models", {}, 401),
        ("/v1/models", {"Authorization": "Bearer wrong"}, 401),
        ("/v1/models", {"Authorization": "bearer right"}, 200),
        ("/v1/models", {"Authorization": "Bearer wrong", "x-api-key": "right"}, 200),
        ("/healthz", {}, 200),
    ],
)
async def test_the_key(start: Start, path: str, headers: dict[str, str], status: int) -> None:
    client = await start(auth_mode="all_except_health", api_key=(agproxy.ClientKey("laptop", "right"),))
    assert (await client.get(path, headers=headers)).status == status


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/models", 200),
        ("/v1/models/gemini-2.5-pro", 200),
        ("/v1/models/none", 404),
        ("/v1/v1/models/", 200),
        ("/v1/chat/completions/models", 200),
        ("/v1/nothing", 404),
    ],
)
async def test_paths_as_clients_stack_them(start: Start, path: str, status: int) -> None:
    response = await (await start()).get(path)
    assert response.status == status


@pytest.mark.parametrize("end", ["%0A", "%0Ax/input_items"])
def test_no_path_takes_long_to_read(end: str) -> None:
    began = time.process_time()
    agproxy.place_of(unquote("/models" * 9000 + "/" + end))
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"model": "gpt-4o"}, "messages", "missing_required_parameter"),
        (HELLO | {"temperature": 3}, "temperature", "decimal_above_max_value"),
        (HELLO | {"stream": "yes"}, "stream", "invalid_type"),
        (HELLO | {"tools": [5]}, "tools[0]", "invalid_type"),
        ({"model": "gpt-4o", "messages": [{"role": "elf", "content": "x"}]}, "messages[0].role", "invalid_value"),
        (HELLO | {"model": "nobody-knows"}, "model", "model_not_found"),
        ([], None, "invalid_type"),
    ],
)
async def test_bad_input_names_the_field(start: Start, body: Any, param: str | None, code: str) -> None:
    response = await (await start()).post("/v1/chat/completions", json=body)
    told = (await response.json())["error"]
    assert (response.status in (400, 404), told["param"], told["code"]) == (True, param, code)


@both_transports
async def test_a_client_that_leaves_closes_the_upstream(gemini: Any) -> None:
    closed = asyncio.Event()

    async def never_ends(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: " + json.dumps(said("x")[0]).encode() + b"\n\n")
        try:
            await asyncio.sleep(60)
        finally:
            closed.set()
        return response

    slow = web.Application()
    slow.router.add_post("/{tail:.*}", never_ends)
    upstream = TestServer(slow)
    await upstream.start_server()
    async with upstream:
        account = agproxy.Account("a", "k", str(upstream.make_url("")).rstrip("/"))
        app = agproxy.create_app(agproxy.Config((account,)))
        server = OwnListener(app)
        await server.start_server()
        async with TestClient(server) as client:
            response = await client.post("/v1/chat/completions", json=HELLO | {"stream": True})
            assert await response.content.readline()
            response.close()
            await asyncio.wait_for(closed.wait(), 1)


async def test_fifty_at_once_are_not_mixed(start: Start, gemini: Any, sdk: Any) -> None:
    ai = sdk(await start())
    gemini[0].script = [said("ans", "wer") for _ in range(50)]

    async def ask(number: int) -> tuple[str, str | None]:
        messages: Any = [{"role": "user", "content": f"n{number}"}]
        answer = await ai.chat.completions.create(model=f"gemini-{number}", messages=messages)
        return answer.model, answer.choices[0].message.content

    answers = await asyncio.gather(*(ask(number) for number in range(50)))
    assert answers == [(f"gemini-{number}", "answer") for number in range(50)]
    prompts = {body["contents"][0]["parts"][0]["text"] for body in gemini[0].bodies}
    assert prompts == {f"n{number}" for number in range(50)}


async def test_one_account_is_asked_once_more_for_a_fault_not_its_own(start: Start, gemini: Any) -> None:
    client = await start(accounts="a")
    gemini[0].script = [error(503, "UNAVAILABLE", "busy"), said("x")]
    response = await client.post("/v1/chat/completions", json=HELLO)
    assert (response.status, response.headers["X-Attempts"], gemini[0].keys) == (200, "2", ["key-a"] * 2)


@pytest.mark.parametrize(
    ("step", "calls", "status"),
    [
        (error(503, "UNAVAILABLE", "busy"), 3, 503),
        (error(500, "INTERNAL", "oops"), 3, 502),
        (said(reason="MALFORMED_FUNCTION_CALL"), 3, 502),
        (error(504, "DEADLINE_EXCEEDED", "late"), 3, 504),
        (error(403, "PERMISSION_DENIED", "no"), 2, 502),
        (error(400, "INVALID_ARGUMENT", "bad"), 1, 400),
        (error(400, "INVALID_ARGUMENT", "API key not valid.", {"reason": "API_KEY_INVALID"}), 2, 502),
        (error(404, "NOT_FOUND", "no model"), 2, 404),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_what_each_refusal_costs_and_says(
    step: Any, calls: int, status: int, stream: bool, start: Start, gemini: Any
) -> None:
    client = await start()
    gemini[0].script = [step] * 3
    response = await client.post("/v1/chat/completions", json=HELLO | {"stream": stream})
    assert (response.status, len(gemini[0].keys)) == (status, calls)
    assert response.headers["X-Mapped-Model"] == "gemini-2.5-flash"
    assert findings(await response.json(), "ErrorResponse") == []
    assert ("Retry-After" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("timeouts", "pause", "text"),
    [
        ({"first_event_s": 0.1}, {"silence_s": 1.0}, "Gemini did not answer in time"),
        ({"total_s": 0.1}, {"silence_s": 1.0}, "No answer began within proxy.timeouts.total_s."),
        ({"idle_s": 0.1}, {"pause_s": 1.0}, "Gemini fell silent in the middle of its answer."),
        ({"total_s": 0.2}, {"pause_s": 0.15}, "The answer took longer than proxy.timeouts.total_s."),
    ],
)
async def test_each_deadline_says_which_it_was(
    timeouts: dict[str, float], pause: dict[str, float], text: str, start: Start, gemini: Any
) -> None:
    client = await start(accounts="a", timeouts=agproxy.Timeouts(**timeouts))
    vars(gemini[0]).update(pause)
    gemini[0].script = [said("a", "b", "c")] * 3
    response = await client.post("/v1/chat/completions", json=HELLO | {"stream": True})
    body = await response.text()
    told = json.loads(body if "silence_s" in pause else body.strip().split("\n\n")[-1][6:])["error"]
    assert (text in told["message"], told["code"]) == (True, "timeout")
    assert response.status == (504 if "silence_s" in pause else 200)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Basic right"}, 401),
        ({"Authorization": "right"}, 200),
        ({"Authorization": "BEARER   right"}, 200),
        ({"x-goog-api-key": "right"}, 200),
        ({"api-key": "right"}, 200),
        ({"api-key": "r\u00efght"}, 401),
        ({"Authorization": "Bearer other"}, 200),
    ],
)
async def test_the_key_in_every_header_that_clients_use(start: Start, headers: dict[str, str], status: int) -> None:
    keys = (agproxy.ClientKey("a", "right"), agproxy.ClientKey("b", "other"))
    client = await start(auth_mode="strict", api_key=keys)
    response = await client.get("/healthz", headers=headers)
    assert response.status == status
    if status == 401:
        assert findings(await response.json(), "ErrorResponse") == []


@pytest.mark.parametrize(("show", "shown"), [("full", "me@example.com"), ("masked", "m***@example.com"), ("off", None)])
async def test_the_account_is_shown_as_configured(
    show: str, shown: str | None, gemini: Any, aiohttp_client: Any
) -> None:
    account = agproxy.Account("a", "k", gemini[1], email="me@example.com")
    client = await aiohttp_client(agproxy.create_app(agproxy.Config((account,), show_account=show)))
    gemini[0].script = [said("x")]
    response = await client.post("/v1/chat/completions", json=HELLO)
    assert response.headers.get("X-Account-Email") == shown


async def test_methods_that_browsers_and_probes_use(start: Start) -> None:
    client = await start(auth_mode="strict", api_key=(agproxy.ClientKey("a", "right"),))
    asked = {"Origin": "https://page.example", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    preflight = await client.options("/v1/chat/completions", headers=asked)
    assert (preflight.status, preflight.headers["Access-Control-Allow-Origin"]) == (204, "*")
    assert preflight.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
    key = {"Authorization": "Bearer right"}
    wrong = await client.get("/v1/responses", headers=key)
    assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
    assert (await client.head("/v1/models", headers=key)).status == 200
    named = await client.get("/v1/chat/nothing", headers=key)
    assert "/v1" in (await named.json())["error"]["message"]


@both_transports
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/v1/nothing", "/healthz"])
async def test_a_page_may_ask_before_it_has_a_key(path: str, start: Start) -> None:
    client = await start(auth_mode="strict", api_key=(agproxy.ClientKey("a", "right"),))
    preflight = await client.options(path, headers={"Origin": "https://page.example"})
    assert (preflight.status, await preflight.read()) == (204, b"")
    told = {name: preflight.headers[f"Access-Control-{name}"] for name in ("Allow-Methods", "Max-Age", "Allow-Headers")}
    assert told == {
        "Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Max-Age": "600",
        "Allow-Headers": "authorization",
    }
    assert preflight.headers["Vary"] == "Origin"


@both_transports
async def test_a_page_that_may_not_call_is_told_nothing(start: Start) -> None:
    preflight = await (await start()).options("/v1/models", headers={"Origin": "https://page.example"})
    assert (preflight.status, "Access-Control-Allow-Origin" in preflight.headers) == (403, False)


@both_transports
@pytest.mark.parametrize("path", ["/healthz", "/models", "/v1/v1/models/", "/v1/models/gemini-2.5-pro"])
async def test_head_tells_what_get_would(path: str, start: Start) -> None:
    client = await start()
    got, head = await client.get(path), await client.head(path)
    assert (head.status, await head.read()) == (200, b"")
    for name in ("Content-Type", "Content-Length"):
        assert head.headers[name] == got.headers[name]


@both_transports
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/models/team%2Ffast", "team/fast"),
        ("/models/team%2Ffast", "team/fast"),
        ("/v1//models/team%2ffast/", "team/fast"),
        ("/v1/models/team/fast", "team/fast"),
        ("/v1/models/a%20b%3Fc%25d%23e", "a b?c%d#e"),
        ("/models/a%20b%3Fc%25d%23e", "a b?c%d#e"),
        ("/v1/models/team%252Ffast", None),
        ("/v1/models/models%2Fnone", None),
    ],
)
async def test_a_model_is_named_by_an_escaped_path(path: str, name: str | None, start: Start) -> None:
    client = await start(aliases={"team/fast": "gemini-2.5-flash", "a b?c%d#e": "gemini-2.5-flash"})
    answer = await client.get(URL(path, encoded=True))
    assert (answer.status, (await answer.json()).get("id")) == (200 if name else 404, name)


@both_transports
async def test_an_error_too_tells_what_was_changed(start: Start, gemini: Any) -> None:
    client = await start()
    body = HELLO | {"logit_bias": {"1": 1}, "odd": 1}
    gemini[0].script = [error(400, "INVALID_ARGUMENT", "bad"), RATE_LIMITED, RATE_LIMITED]
    for status in (400, 429):
        answer = await client.post("/v1/chat/completions", json=body)
        assert (answer.status, answer.headers["X-Agproxy-Changes"]) == (status, "2")
        assert answer.headers["X-Request-Id"].startswith("req_")


@both_transports
async def test_when_to_try_again_is_told_twice(start: Start, gemini: Any) -> None:
    gemini[0].script = [RATE_LIMITED, RATE_LIMITED]
    headers = (await (await start()).post("/v1/chat/completions", json=HELLO)).headers
    wait_s, wait_ms = int(headers["Retry-After"]), int(headers["Retry-After-Ms"])
    assert wait_s - 1 <= wait_ms / 1000 <= wait_s


@pytest.mark.parametrize("path", ["/v1/chat/completions/responses", "/responses/", "/v1/v1//responses?x=1"])
async def test_responses_under_the_paths_that_clients_make(path: str, start: Start, gemini: Any) -> None:
    client = await start()
    gemini[0].script = [said("x")]
    response = await client.post(path, json={"model": "gpt-4o", "input": "hi"})
    assert (await response.json())["object"] == "response"


@pytest.mark.parametrize("transport", ["direct"], indirect=True)  # of the other kinds none lists models
async def test_the_list_of_models_has_aliases_but_no_patterns(start: Start, gemini: Any) -> None:
    client = await start(aliases={"fast": "gemini-2.5-flash", "my-*": "gemini-2.5-pro"})
    listed = await (await client.get("/v1/models")).json()
    assert findings(listed, "ListModelsResponse") == []
    assert [model["id"] for model in listed["data"]] == [*gemini[0].models, "fast"]


async def test_a_list_that_cannot_be_had_is_replaced(start: Start, gemini: Any) -> None:
    gemini[0].models = None
    client = await start()
    listed = await (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == list(agproxy.STATIC_MODELS)


@pytest.mark.parametrize("transport", ["direct"], indirect=True)  # of the other kinds none lists models
async def test_a_preview_name_is_found_and_told_once(
    start: Start, gemini: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client = await start()
    gemini[0].script = [said("x"), said("x")]
    for _ in range(2):
        response = await client.post("/v1/chat/completions", json=HELLO | {"model": "gemini-3-flash"})
        assert response.headers["X-Mapped-Model"] == "gemini-3-flash-preview"
    assert len([line for line in caplog.messages if "is not listed" in line]) == 1


async def test_the_first_failure_of_several_choices_is_the_answer(start: Start, gemini: Any) -> None:
    client = await start()
    gemini[0].script = [said("x"), error(400, "INVALID_ARGUMENT", "bad")]
    response = await client.post("/v1/chat/completions", json=HELLO | {"n": 2, "stream": True})
    assert (response.status, (await response.json())["error"]["message"]) == (400, "bad")


async def test_schemas_that_gemini_refuses_are_sent_once_more_in_its_own_form(start: Start, gemini: Any) -> None:
    """https://github.com/google-gemini/gemini-cli/issues/4607"""
    refusal = error(400, "INVALID_ARGUMENT", "schema at anyOf.0 requires unspecified property 'b'")
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [{"required": ["b"]}]}
    asked = HELLO | {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}
    client = await start()
    gemini[0].script = [refusal, said("x")]
    response = await client.post("/v1/chat/completions", json=asked)
    assert (response.status, response.headers["X-Agproxy-Changes"]) == (200, "1")
    declared = [body["tools"][0]["functionDeclarations"][0] for body in gemini[0].bodies]
    assert declared[0]["parametersJsonSchema"] == parameters
    assert declared[1]["parameters"] == {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}}
    assert gemini[0].keys[0] == gemini[0].keys[1]
    gemini[0].script = [refusal] * 3
    response = await client.post("/v1/chat/completions", json=asked)
    assert (response.status, len(gemini[0].bodies)) == (400, 4)


@pytest.mark.parametrize("n", [1, 2])
async def test_an_error_that_gemini_tells_in_mid_stream_ends_all(
    n: int, start: Start, gemini: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "agproxy")
    gemini[0].pause_s = 0.01  # so that the answer has begun
    broken = [*said("half", reason=None), error(503, "UNAVAILABLE", "The model is overloaded.")[1]]
    gemini[0].script = [broken, *[said(*"abcd")] * (n - 1)]
    client = await start("a")
    response = await client.post("/v1/chat/completions", json=HELLO | {"n": n, "stream": True})
    last = (await response.text()).rstrip().rpartition("\n")[2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_is_overloaded"
    assert "error=server_is_overloaded" in caplog.messages[-1]


async def test_choices_of_one_seed_are_not_all_the_same(start: Start, gemini: Any) -> None:
    client = await start()
    gemini[0].script = [said("x") for _ in range(4)]
    for body in ({"n": 3, "seed": 2**31 - 1}, {"seed": 7}):
        assert (await client.post("/v1/chat/completions", json=HELLO | body)).status == 200
    seeds = [sent["generationConfig"]["seed"] for sent in gemini[0].bodies]
    assert (sorted(seeds[:3]), seeds[3]) == ([0, 1, 2**31 - 1], 7)


async def test_cursor_sends_a_responses_body_to_chat(start: Start, gemini: Any) -> None:
    client = await start()
    gemini[0].script = [said("x")]
    body = {"model": "gpt-4o", "input": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    response = await client.post("/v1/chat/completions", json=body)
    assert (await response.json())["object"] == "chat.completion"
    assert gemini[0].bodies[0]["systemInstruction"] == {"parts": [{"text": "s"}]}


@pytest.mark.parametrize(
    ("route", "body", "param", "code"),
    [
        ("responses", {"model": "m"}, "input", "missing_required_parameter"),
        ("responses", {"model": "m", "input": 5}, "input", "invalid_type"),
        ("responses", {"model": "m", "input": ["x"]}, "input[0]", "invalid_type"),
        ("responses", {"model": "m", "input": [{"type": "elf"}]}, "input[0].type", "invalid_value"),
        (
            "responses",
            {"model": "m", "input": "x", "background": True, "store": False},
            "background",
            "unsupported_parameter",
        ),
        (
            "responses",
            {"model": "m", "input": "x", "previous_response_id": "resp_1"},
            "previous_response_id",
            "previous_response_not_found",
        ),
        ("completions", {"model": "m", "prompt": [1, 2]}, "prompt", "invalid_type"),
        ("completions", {"model": "m", "prompt": ["x"] * 129}, "prompt", "invalid_value"),
        ("chat/completions", HELLO | {"n": 129}, "n", "integer_above_max_value"),
        ("chat/completions", HELLO | {"n": 0}, "n", "integer_below_min_value"),
    ],
)
async def test_bad_input_on_every_route(start: Start, route: str, body: Any, param: str, code: str) -> None:
    response = await (await start()).post(f"/v1/{route}", json=body)
    told = (await response.json())["error"]
    assert (response.status, told["param"], told["code"]) == (400, param, code)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b'{"a": NaN}', b"[" * 100_000, b'"x"', b"null"])
async def test_a_body_that_is_no_json_object(data: bytes, start: Start) -> None:
    client = await start()
    response = await client.post("/v1/chat/completions", data=data)
    assert (response.status, (await response.json())["error"]["type"]) == (400, "invalid_request_error")
    assert (await client.get("/healthz")).status == 200


@both_transports
async def test_more_at_once_than_files_allow_is_told(gemini: Any, aiohttp_client: Any) -> None:
    config = agproxy.Config((agproxy.Account("a", "k", gemini[1]),))
    client = await aiohttp_client(agproxy.create_app(dataclasses.replace(config, max_requests=1)))
    gemini[0].script = [said("x")]
    gemini[0].silence_s = 20
    first = asyncio.create_task(client.post("/v1/chat/completions", json=HELLO))
    await until(lambda: gemini[0].bodies)
    second = await client.post("/v1/chat/completions", json=HELLO)
    assert (second.status, "proxy.max_requests" in (await second.json())["error"]["message"]) == (503, True)
    assert (await client.get("/agproxy/status")).status == 200  # the operator is let in
    gemini[0].go_on.set()
    assert (await first).status == 200


@both_transports
async def test_a_client_that_does_not_read_holds_the_upstream_back() -> None:
    frame = b"data: " + json.dumps(said("x" * 8000)[0]).encode() + b"\r\n\r\n"
    sent = 0

    async def never_ends(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(frame)
            sent += len(frame)

    endless = web.Application()
    endless.router.add_post("/{tail:.*}", never_ends)
    async with TestServer(endless) as upstream:
        account = agproxy.Account("a", "k", str(upstream.make_url("")).rstrip("/"))
        async with OwnListener(agproxy.create_app(agproxy.Config((account,)))) as server:
            reader, writer = await asyncio.open_connection(server.host, server.port, limit=1 << 12)
            body = json.dumps(HELLO | {"stream": True}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            held = -1
            while held < sent or not held:
                held = sent
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.2)
            assert sent == held < 32 << 20  # what fits into the sockets' buffers, and no more
            await reader.readexactly(8 << 20)
            await until(lambda: sent > held)
            writer.close()


class Scripted:
    """An answer that says its events, one after a moment each."""

    def __init__(self, *events: agproxy.Event) -> None:
        self.events = list(events)
        self.last: agproxy.Event | None = None

    async def __anext__(self) -> list[agproxy.Event]:
        await asyncio.sleep(0.01)
        self.last = self.events.pop(0)
        return [self.last]

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize("transport", ["direct"], indirect=True)
async def test_nothing_is_said_behind_a_choice_that_failed() -> None:
    failed = Scripted(agproxy.TextDelta(0, "half"), agproxy.Failed(agproxy.UpstreamBroken("Cut.")))
    other = Scripted(*[agproxy.TextDelta(0, "more")] * 9, agproxy.Ended(agproxy.Usage()))
    answers: Any = [failed, other]
    heard: list[agproxy.Event] = []
    merged = agproxy.Merged(answers)
    async for events in merged:
        heard += events
    assert isinstance(heard[-1], agproxy.Failed)
    assert len(other.events) > 5  # nobody asks it for more
    merged.close()
