"""Planted keys and words: no log line, error, header or traceback may repeat them, at the most talkative level."""

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner
from conftest import HELLO, Served, serving

import antigravity_proxy as agproxy

SECRETS = {
    "account": "AIzaSyPlantedPlantedPlantedPlantedPlanted",
    "plain account": "plantedaccountpassword",
    "odd account": 'planted "quoted" \\ käy',
    "client": "sk-planted-planted-planted-client",
    "plain client": "plantedclientpassword",
    "stranger": "planted-stranger-token-0123456789",
}
WORDS = "plantedwords of a conversation"
CHAT = "/v1/chat/completions"
SAID = {"model": "gpt-4o", "messages": [{"role": "user", "content": WORDS}]}
KEY = {"Authorization": f"Bearer {SECRETS['client']}"}


def leaks(text: str) -> list[str]:
    """The names of the secrets in a text, as they are or escaped as JSON escapes them."""
    forms = {name: {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]} for name, secret in SECRETS.items()}
    return [name for name, all_ in forms.items() if any(form in text for form in all_)]


class Echo:
    """An upstream that repeats the key it was sent, in errors of each status, in streams and where a head should be."""

    def __init__(self) -> None:
        self.app = web.Application()
        self.app.router.add_route("*", "/{tail:.*}", self.answer)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        key = request.headers["x-goog-api-key"]
        status = int(request.path.rpartition("gemini-")[2].partition(":")[0]) if "gemini-" in request.path else 404
        told = {"code": status, "status": "X", "message": f"The key {key} (or Bearer {key}, ?key={key}) is wrong."}
        if request.method == "GET":
            return web.json_response({"error": told | {"code": 403}}, status=403)
        response = web.StreamResponse(status=200 if status in (200, 201) else status)
        await response.prepare(request)
        if status == 201:
            chunk = {"candidates": [{"content": {"parts": [{"text": "x"}]}}]}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n")
            await asyncio.sleep(0.3)  # else both may come in one read, and the answer has not begun
        body = json.dumps({"error": told | ({"code": 500} if status < 300 else {})}).encode()
        await response.write(b"data: " + body + b"\r\n\r\n" if status < 300 else body)
        return response


def requests() -> Iterable[tuple[str, dict[str, Any]]]:
    """Each way a request can fail, with words or keys in it where they might come back."""
    for status in (201, 200, 400, 401, 403, 404, 413, 429, 500, 503, 504, 529):
        for stream in (True, False):
            for path, body in ((CHAT, SAID), ("/v1/responses", {"input": WORDS})):
                yield path, {"json": body | {"model": f"gemini-{status}", "stream": stream}, "headers": KEY}
    yield "/v1/embeddings", {"json": {"model": "gemini-429", "input": WORDS}, "headers": KEY}
    yield f"{CHAT}?key={SECRETS['client']}", {"json": SAID}
    yield "/v1/none", {"json": SAID, "headers": KEY}
    for headers in ({}, {"Authorization": f"Bearer {SECRETS['stranger']}"}, {"x-api-key": SECRETS["stranger"]}):
        yield CHAT, {"json": SAID, "headers": headers}
    broken = json.dumps(SAID)
    for data in (broken[:-1], broken.replace(WORDS, WORDS + '"'), f'{{"{WORDS}": NaN}}', f'"{WORDS}"', broken * 2):
        yield CHAT, {"data": data.encode(), "headers": KEY}
    for field, value in ((name, wrong) for name in agproxy.CHAT_FIELDS for wrong in (WORDS, {WORDS: WORDS}, [WORDS])):
        if field != "model":
            yield CHAT, {"json": SAID | {field: value, "model": "gemini-400"}, "headers": KEY}
    packed = {**KEY, "Content-Encoding": "gzip"}
    yield CHAT, {"data": gzip.compress(broken.encode())[:-9] + WORDS.encode(), "headers": packed}
    link = {"type": "image_url", "image_url": {"url": f"http://me:{SECRETS['stranger']}@127.0.0.1:9/{WORDS}"}}
    yield CHAT, {"json": SAID | {"messages": [{"role": "user", "content": [link]}]}, "headers": KEY}


RAW = [
    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRETS['client']}\x01\r\n\r\n",
    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nBearer {SECRETS['client']}\r\n\r\n",
    f"{SECRETS['plain client']} {CHAT} HTTP/1.1\r\n\r\n",
    f"GET /?key={SECRETS['plain client']}\x01 HTTP/9\r\n\r\n",
    f"GET / HTTP/1.1\r\nx-api-key: {SECRETS['plain client']}{'x' * 9000}\r\n\r\n",
]


async def test_no_error_path_tells_a_key_or_the_conversation(tmp_path: Path) -> None:
    async with TestServer(Echo().app) as echo, contextlib.AsyncExitStack() as stack:
        url = str(echo.make_url("")).rstrip("/")
        accounts = [{"name": n, "api_key": SECRETS[n], "base_url": url} for n in ("account", "plain account")]
        keys = [{"name": "c", "key": SECRETS["client"]}, {"name": "d", "key": SECRETS["plain client"]}]
        config = {"accounts": accounts, "proxy": {"api_key": keys, "auth_mode": "strict", "max_wait_s": 0}}
        asking = []
        for form in ("text", "json"):  # side by side: most of the time they wait before they ask once more
            (tmp_path / form).mkdir()
            (tmp_path / form / "a.yaml").write_text(json.dumps(config))
            serve = await stack.enter_async_context(serving(tmp_path / form))
            arguments = ("--accounts", "a.yaml", "--port", "0", "--log-level", "debug", "--log-format", form)
            asking.append(tells_nothing(await serve(*arguments)))
        await asyncio.gather(*asking)


async def tells_nothing(served: Served) -> None:
    """Asks in each way that can fail, stops the gateway, and reads whatever it said."""
    base = (await served.wait_for(r"base URL +(\S+)")).removesuffix("/v1")
    async with aiohttp.ClientSession() as session:

        async def ask(path: str, sent: dict[str, Any]) -> tuple[Any, int, str, str]:
            async with session.post(base + path, **sent) as response:
                return sent, response.status, await response.text(), str(response.headers)

        told = []
        asked = list(requests())
        for some in (asked[:2], asked[2:]):  # what answers, before the accounts rest
            told += await asyncio.gather(*(ask(path, sent) for path, sent in some))
        for text in RAW:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(base.rpartition(":")[2]))
            writer.write(text.encode("latin-1"))
            answer = (await asyncio.wait_for(reader.read(), 5)).decode()
            assert " 400 " in answer[:13] and '{"error":{' in answer, answer
            told.append(({}, 400, answer, ""))
            writer.close()
    served.process.terminate()
    assert await served.ended() == 0
    assert len(told) > 100
    assert {status for _, status, _, _ in told} >= {200, 400, 401, 404, 502}
    for sent, status, body, headers in told:
        assert leaks(body + headers) == [], ("LEAK", sent, status, body, headers)
        assert WORDS not in body + headers, (sent, status, body)
    assert leaks(served.said) == []
    assert WORDS not in served.said
    assert served.said.count("\n") > len(told)


@pytest.mark.parametrize("form", ["text", "json"])
def test_whatever_is_logged_is_masked(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    accounts = tuple(agproxy.Account(name, SECRETS[name]) for name in ("account", "plain account", "odd account"))
    clients = tuple(agproxy.ClientKey(name, SECRETS[name]) for name in ("client", "plain client"))
    handler = agproxy.MaskingHandler()
    handler.learn(agproxy.Config(accounts, api_key=clients))
    handler.setFormatter(agproxy.JsonFormatter() if form == "json" else None)
    log = logging.getLogger("anybody's")
    log.propagate = False
    log.handlers = [handler]
    for secret in SECRETS.values():
        log.error("sent Authorization: Bearer %s to https://x/?key=%s&a=b", secret.replace(" ", ""), secret)
        try:
            raise ValueError(f"bad key {secret}" if secret != SECRETS["stranger"] else f"Bearer {secret}")
        except ValueError:
            log.exception("it failed")
    said = capsys.readouterr().err
    assert leaks(said) == []
    assert said.count("ValueError") >= len(SECRETS)


def test_the_secrets_of_a_reload_are_masked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    handlers: list[logging.Handler] = []
    told: list[str] = []

    def write(key: str) -> None:
        path.write_text(json.dumps({"accounts": [{"name": "a", "api_key": key, "base_url": "http://127.0.0.1:9"}]}))

    def serves(config: agproxy.Config, _: Path, load: Any, drain_s: float) -> None:
        for key in ("plain account", "odd account"):
            write(SECRETS[key])
            load()
            words = " ".join([*SECRETS.values(), SECRETS["plain account"] + "-and-longer"])
            told.append(handlers[0].format(logging.LogRecord("x", 40, "", 0, words, (), None)))

    monkeypatch.setattr(logging, "basicConfig", lambda **given: handlers.extend(given["handlers"]))
    monkeypatch.setattr(agproxy, "run_until_signal", serves)
    monkeypatch.setattr(agproxy, "run_loop", lambda _: None)
    write(SECRETS["plain account"] + "-and-longer")
    assert CliRunner().invoke(agproxy.main, ["serve", "--accounts", str(path)]).exit_code == 0
    assert [{"plain account", "odd account"} & {*leaks(text)} for text in told] == [{"odd account"}, set()]
    assert not any("-and-longer" in text for text in told)


async def test_a_mistake_of_the_gateways_is_logged_without_words(
    gemini: Any, aiohttp_client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mistake(*_: object, **__: object) -> None:
        raise KeyError(WORDS)

    monkeypatch.setattr(agproxy, "build_generate_content", mistake)
    app = agproxy.create_app(agproxy.Config((agproxy.Account("a", "k", gemini.url),)))
    response = await (await aiohttp_client(app)).post(CHAT, json=SAID | {"model": HELLO["model"]})
    assert (response.status, WORDS in await response.text()) == (500, False)
    assert "KeyError" in caplog.text and "in mistake" in caplog.text
    assert WORDS not in caplog.text
