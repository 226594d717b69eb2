"""Linked media: fetched, limited, and never from an address that is not public."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fake_gemini import FakeGemini, Step, error, said

import antigravity_proxy as agproxy

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
Ask = Callable[..., Awaitable[Any]]


async def serve_media(request: web.Request) -> web.StreamResponse:
    name = request.match_info["name"]
    if name == "moved":
        raise web.HTTPFound("/a.png")
    if name == "to-metadata":
        raise web.HTTPFound("http://169.254.169.254/latest/meta-data")
    if name == "for-ever":
        raise web.HTTPFound("/for-ever")
    if name == "slow.png":
        await asyncio.sleep(5)
    bodies = {"large.png": bytes(21 << 20), "page.html": b"<html>", "a.svg": b"<svg/>"}
    types = {"page.html": "text/html", "a.svg": "image/svg+xml", "a.pdf": "application/octet-stream"}
    if name == "gone.png":
        raise web.HTTPNotFound
    return web.Response(body=bodies.get(name, PNG), content_type=types.get(name, "image/png"))


@pytest.fixture
async def media() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{name}", serve_media)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


@pytest.fixture
async def ask(gemini: FakeGemini, aiohttp_client: Any) -> Ask:
    async def ask(
        *parts: dict[str, Any],
        door: str = "chat/completions",
        edit: Callable[[str], str] = str,
        step: Step | None = None,
        **settings: Any,
    ) -> tuple[int, Any]:
        """`edit` changes the written body; `step` is Gemini's answer."""
        accounts = (agproxy.Account("a", "k", gemini.url),)
        client: TestClient[Any, Any] = await aiohttp_client(agproxy.create_app(agproxy.Config(accounts, **settings)))
        gemini.script = [step or said("ok")]
        turns = "input" if door == "responses" else "messages"
        body = {"model": "gpt-4o", turns: [{"role": "user", "content": list(parts)}]}
        response = await client.post(f"/v1/{door}", data=edit(json.dumps(body)).encode())
        return response.status, await response.json()

    return ask


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


LOOPBACK = {"media_hosts": ("127.0.0.1",)}


@pytest.mark.parametrize(
    ("name", "mime"), [("a.png", "image/png"), ("moved", "image/png"), ("a.pdf", "application/pdf")]
)
async def test_a_link_is_followed(name: str, mime: str, ask: Ask, media: str, gemini: FakeGemini) -> None:
    status, _ = await ask({"type": "text", "text": "see"}, image(f"{media}/{name}"), **LOOPBACK)
    assert status == 200
    parts = gemini.bodies[0]["contents"][0]["parts"]
    assert parts[1] == {"inlineData": {"mimeType": mime, "data": base64.b64encode(PNG).decode()}}


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("MEDIA/a.png", {}, "private address"),
        ("MEDIA/to-metadata", LOOPBACK, "private address"),
        ("MEDIA/for-ever", LOOPBACK, "redirected more than 5 times"),
        ("MEDIA/gone.png", LOOPBACK, "HTTP 404"),
        ("MEDIA/a.svg", LOOPBACK, "image/svg+xml, which Gemini does not read"),
        ("MEDIA/large.png", LOOPBACK, "larger than 20 MB"),
        ("MEDIA/a.png", LOOPBACK | {"fetch_media": False}, "proxy.fetch_media is off"),
        ("http://localhost:1/a.png", {}, "could not be fetched"),
        ("http://2130706433/a.png", {}, "could not be fetched"),
        ("http://127.1/a.png", {}, "could not be fetched"),
        ("http://[::ffff:10.0.0.1]/a.png", {}, "private address"),
        ("http://[64:ff9b::a00:1]/a.png", {}, "private address"),
        ("http://169.254.169.254/", {}, "private address"),
        ("http://0.0.0.0/", {}, "private address"),
        ("http://\uff11\uff12\uff17.0.0.1/", {}, "private address"),  # full-width digits
        ("http://\u2460\u2461\u2466.0.0.1/", {}, "private address"),  # digits in circles
        ("http://127\u30020\u30020\u30021/", {}, "private address"),  # ideographic full stops
        ("http://none.invalid/a.png", {}, "could not be fetched"),
        ("file:///etc/passwd", {}, "neither a data: URL"),
        ("data:image/svg+xml;base64,AAAA", {}, "image/svg+xml, which Gemini does not read"),
        ("data:image/png;base64,A", {}, "not valid base64"),
    ],
)
async def test_what_is_refused_names_the_part(
    url: str, settings: dict[str, Any], said: str, ask: Ask, media: str, gemini: FakeGemini
) -> None:
    status, answer = await ask({"type": "text", "text": "see"}, image(url.replace("MEDIA", media)), **settings)
    told = answer["error"]
    assert (status, told["code"], gemini.bodies) == (400, "invalid_image_url", [])
    assert told["param"] == "messages[0].content[1].image_url.url"
    assert said in told["message"]
    assert media not in told["message"]


LONG = base64.b64encode(PNG + bytes(30_000)).decode()


@pytest.mark.parametrize("at", [9, 20_000, len(LONG) - 9])
@pytest.mark.parametrize("broken", ["!", "\x01", "€", "\\n"])
async def test_damage_in_a_large_image_names_the_part(broken: str, at: int, ask: Ask, gemini: FakeGemini) -> None:
    """What only a look at all of it would show, Gemini is left to find."""

    def damage(body: str) -> str:
        return body.replace(LONG, f"{LONG[:at]}{broken}{LONG[at + 1 :]}")

    status, answer = await ask(image(f"data:image/png;base64,{LONG}"), edit=damage)
    told = answer["error"]
    assert (status, told["type"]) == (400, "invalid_request_error")
    if broken != "\x01" or gemini.refused:
        assert (told["code"], told["param"]) == ("invalid_image_url", "messages[0].content[0].image_url.url")
        assert "not valid base64" in told["message"]
    else:
        assert "not valid JSON" in told["message"]
    assert gemini.refused == (at == 20_000 and broken in "!\x01")


async def test_a_large_image_without_a_type_is_known_by_its_content(ask: Ask, gemini: FakeGemini) -> None:
    webp = base64.b64encode(b"RIFF" + bytes(30_000)).decode()
    status, _ = await ask(image(f"data:application/octet-stream;base64,{webp}"))
    part = gemini.bodies[0]["contents"][0]["parts"][0]
    assert (status, part) == (200, {"inlineData": {"mimeType": "image/webp", "data": webp}})


async def test_what_is_kept_is_looked_through_before_it_is_sent(ask: Ask, gemini: FakeGemini) -> None:
    parts = {"type": "input_image", "image_url": f"data:image/png;base64,{LONG[:20_000]}!{LONG[20_001:]}"}
    status, answer = await ask(parts, door="responses")
    assert (status, answer["error"]["param"], gemini.bodies) == (400, "input[0].content[0].image_url", [])


async def test_another_fault_than_that_of_a_sound_image_is_told_in_geminis_words(ask: Ask) -> None:
    refusal = error(400, "INVALID_ARGUMENT", "The image is too wide.")
    status, answer = await ask(image(f"data:image/png;base64,{LONG}"), step=refusal)
    assert (status, answer["error"]["message"]) == (400, "The image is too wide.")


async def test_a_slow_link_ends_in_time(ask: Ask, media: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agproxy, "MEDIA_S_MAX", 0.1)
    status, answer = await ask(image(f"{media}/slow.png"), **LOOPBACK)
    assert (status, "did not come within" in answer["error"]["message"]) == (400, True)


async def test_too_many_links_are_refused(ask: Ask, media: str) -> None:
    status, answer = await ask(*(image(f"{media}/{i}.png") for i in range(17)), **LOOPBACK)
    assert (status, answer["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    "url", ["https://www.youtube.com/watch?v=1", "https://generativelanguage.googleapis.com/v1beta/files/1"]
)
async def test_what_gemini_follows_itself_is_passed_on(url: str, ask: Ask, gemini: FakeGemini) -> None:
    status, _ = await ask(image(url))
    assert (status, gemini.bodies[0]["contents"][0]["parts"]) == (200, [{"fileData": {"fileUri": url}}])


async def test_an_image_in_a_tool_result_is_fetched_too(gemini: FakeGemini, media: str, aiohttp_client: Any) -> None:
    accounts = (agproxy.Account("a", "k", gemini.url),)
    client = await aiohttp_client(agproxy.create_app(agproxy.Config(accounts, media_hosts=("127.0.0.1",))))
    gemini.script = [said("ok")]
    call = {"id": "c1", "type": "function", "function": {"name": "shot", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [image(f"{media}/a.png")]},
    ]
    response = await client.post("/v1/chat/completions", json={"model": "gemini-3-pro-preview", "messages": messages})
    assert response.status == 200
    result = gemini.bodies[0]["contents"][2]["parts"][0]["functionResponse"]
    assert result["parts"][0]["inlineData"]["mimeType"] == "image/png"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("[2001:4860:4860::8888]", True),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::a00:1", False),
        ("fec0::1", False),
        ("::10.0.0.1", False),
    ],
)
def test_which_addresses_belong_to_the_internet(address: str, public: bool) -> None:
    assert agproxy.is_public(address) is public


async def test_of_links_none_is_fetched_on_once_one_is_refused(gemini: FakeGemini) -> None:
    left = asyncio.Event()

    async def serve(reader: Any, writer: Any) -> None:
        await reader.read()  # until the other side leaves
        writer.close()
        left.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    silent = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a.png"
    links = [agproxy.Media("image/png", "", url=url) for url in (silent, f"{gemini.url}/none.png")]
    fetcher = agproxy.MediaFetcher(agproxy.Config((), **LOOPBACK))
    with pytest.raises(agproxy.BadRequest, match="HTTP 404"):
        await fetcher.filled(agproxy.Request("m", (agproxy.Message("user", tuple(links)),)))
    async with asyncio.timeout(1):
        await left.wait()
    await fetcher.close()
    server.close()


def test_images_of_a_stream_are_counted_without_its_audio() -> None:
    media = [agproxy.Media(mime, "AAAA") for mime in ("image/png", "audio/mp3", "image/png")]
    renderer = agproxy.ChatRenderer(agproxy.Head("0" * 24, 0, "m"), {})
    frames = renderer.frames(agproxy.PartStart(0, one) for one in media)
    assert re.findall(r'"images":\[{"type":"image_url","index":(\d)', frames) == ["0", "1"]
