"""How long anything may last: silence towards a client, a client that is slow or gone, a body or head that trickles."""

import asyncio
import contextlib
import gc
import gzip
import json
import logging
import resource
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from conftest import HELLO, sdk
from fake_gemini import FakeGemini, error, said

import antigravity_proxy as agproxy

BEAT = ": keep-alive\n\n"
STREAM = HELLO | {"stream": True}
CHAT = "/v1/chat/completions"
FIRST = b"data: " + json.dumps(said("x")[0]).encode() + b"\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
Start = Callable[..., Awaitable[str]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Serves a gateway as `agproxy serve` does; its URL."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(url: str, *, drain_s: float = 0, **settings: Any) -> str:
            config = agproxy.Config((agproxy.Account("a", "k", url),), **settings)
            app = agproxy.create_app(config, drain_s=drain_s)
            stall_s = config.timeouts.stall_s
            return f"http://127.0.0.1:{await agproxy.listen(app, '127.0.0.1', 0, stack, stall_s=stall_s)}"

        yield start


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(params=["direct", "aiohttp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(agproxy.create_app.__kwdefaults__, "direct", request.param == "direct")


# ---- heartbeat


async def test_a_silent_upstream_is_bridged_until_the_answer_comes(start: Start, session: Any, gemini: Any) -> None:
    url = await start(gemini.url, heartbeat_s=0.1)
    gemini.silence_s, gemini.script = 0.35, [said("Hel", "lo")]
    async with session.post(url + CHAT, json=STREAM) as response:
        text = await response.text()
    assert (response.status, text.startswith(BEAT * 2), 2 <= text.count(BEAT) <= 4) == (200, True, True)
    assert [line for line in text.split("\n\n") if line and not line.startswith(("data: ", ":"))] == []
    assert text.endswith("data: [DONE]\n\n")


async def test_silence_between_events_is_bridged_for_the_sdk(start: Start, gemini: Any, session: Any) -> None:
    url = await start(gemini.url, heartbeat_s=0.1)
    gemini.pause_s, gemini.script = 0.25, [said("Hel", "lo"), said("Hel", "lo")]

    async def count_beats() -> int:
        async with session.post(url + CHAT, json=STREAM) as response:
            return (await response.text()).count(BEAT)

    async def last_event() -> str:
        async with sdk(f"{url}/v1") as ai:
            stream = await ai.responses.create(model="gpt-4o", input="hi", stream=True)
            return [event.type async for event in stream][-1]

    beats, last = await asyncio.gather(count_beats(), last_event())
    assert (2 <= beats <= 8, last) == (True, "response.completed")


@pytest.mark.parametrize(
    ("settings", "body"), [({"heartbeat_s": 0}, STREAM), ({"heartbeat_s": 0.1}, HELLO), ({}, STREAM)]
)
async def test_no_heartbeat_where_none_is_due(
    settings: Any, body: Any, start: Start, session: Any, gemini: Any
) -> None:
    url = await start(gemini.url, **settings)
    gemini.silence_s, gemini.pause_s, gemini.script = 0.2, 0.01, [said("Hel", "lo")]
    async with session.post(url + CHAT, json=body) as response:
        assert ":\x20keep" not in await response.text()


@pytest.mark.parametrize(("silence_s", "status"), [(0.0, 400), (0.2, 200)])
@pytest.mark.parametrize(
    ("route", "asked", "end"),
    [
        ("chat/completions", STREAM, '"code":null}}\n\n'),
        ("completions", {"model": "gpt-4o", "prompt": "x", "stream": True}, '"code":null}}\n\n'),
        ("responses", {"model": "gpt-4o", "input": "x", "stream": True}, "event: response.failed"),
    ],
)
async def test_a_failure_has_its_status_before_a_heartbeat_and_is_told_in_the_stream_after_one(
    silence_s: float, status: int, route: str, asked: Any, end: str, start: Start, session: Any, gemini: Any
) -> None:
    url = await start(gemini.url, heartbeat_s=0.1)
    gemini.silence_s, gemini.script = silence_s, [error(400, "INVALID_ARGUMENT", "No such thing.")]
    async with session.post(f"{url}/v1/{route}", json=asked) as response:
        text = await response.text()
    assert (response.status, "No such thing." in text) == (status, True)
    assert text.startswith(BEAT) == (end in text) == (status == 200)


@pytest.mark.parametrize("silence_s", [0.0, 0.2], ids=["at an event", "after a heartbeat"])
async def test_a_stream_that_a_mistake_ends_is_cut_and_not_taken_for_whole(
    silence_s: float,
    start: Start,
    session: Any,
    gemini: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = await start(gemini.url, heartbeat_s=0.1)
    gemini.silence_s, gemini.pause_s, gemini.script = silence_s, 0.03, [said("a", "b")]
    rendered = agproxy.ChatRenderer.frames

    def fails(renderer: Any, events: Any) -> str:
        if silence_s or isinstance(events[-1], agproxy.Ended):
            raise KeyError("a mistake")
        return rendered(renderer, events)

    monkeypatch.setattr(agproxy.ChatRenderer, "frames", fails)
    async with session.post(url + CHAT, json=STREAM) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.text()
    assert "KeyError" in caplog.text


# ---- a client that is slow, or gone


class Holding:
    """An upstream that says something after each request, or nothing, and then waits for the other side to leave."""

    def __init__(self, says: bytes) -> None:
        self.says = says
        self.tls_seen = 0
        self.asked = asyncio.Event()
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        listing = False
        with contextlib.suppress(ConnectionError):
            first = await reader.read(20)
            self.tls_seen += first.startswith(b"\x16")
            listing = first.startswith(b"GET /v1beta/models?") or self.tls_seen == 1  # the list is asked first
            if not listing:
                writer.write(self.says)
                self.asked.set()
                while await reader.read(1 << 16):
                    pass
            else:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()
        if not listing:
            self.left.set()


@contextlib.asynccontextmanager
async def holding(says: bytes = b"") -> AsyncIterator[tuple[Holding, str]]:
    upstream = Holding(says)
    async with await asyncio.start_server(upstream.serve, "127.0.0.1", 0) as server:
        yield upstream, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def linking(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": f"{url.replace('127.0.0.1', 'localhost')}/a.png"}}
    return HELLO | {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize("heartbeat_s", [15, 0.02], ids=["held", "beating"])
@pytest.mark.parametrize("phase", ["media", "connecting", "first byte", "streaming", "whole", "half a head"])
@pytest.mark.usefixtures("transport")
async def test_the_upstream_is_left_within_a_second_of_the_client(
    phase: str, heartbeat_s: float, start: Start, session: Any
) -> None:
    says = {"streaming": HEAD + FIRST, "whole": HEAD[:-2] + b"Content-Length: 9\r\n\r\n{", "half a head": HEAD[:9]}
    async with holding(says.get(phase, b"")) as (upstream, url):
        secure = url.replace("http:", "https:") if phase == "connecting" else url
        gateway = await start(secure, heartbeat_s=heartbeat_s, media_hosts=("localhost",))
        body = linking(url) if phase == "media" else HELLO
        asking = asyncio.create_task(session.post(gateway + CHAT, json=body | {"stream": phase != "whole"}))
        await asyncio.wait_for(upstream.asked.wait(), 5)
        await asyncio.sleep(0.05)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await asking).close()
        await asyncio.wait_for(upstream.left.wait(), 1)


async def test_a_client_that_leaves_at_the_end_is_no_mistake_of_the_gateways(
    start: Start, gemini: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # found by the soak test: a traceback in the log
    ended = agproxy.EventStream.end

    async def end(stream: Any) -> Any:
        stream._request.transport.abort()
        return await ended(stream)

    monkeypatch.setattr(agproxy.EventStream, "end", end)
    url = await start(gemini.url)
    gemini.script = [said("x")]
    async with raw(url, STREAM) as (reader, _):
        with contextlib.suppress(ConnectionError):
            await reader.read()
    await asyncio.sleep(0.1)
    assert "status=499" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_nobody_is_asked_again_for_a_client_that_left_while_waiting(
    start: Start, session: Any, gemini: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy.random, "uniform", lambda *_: 0.3)
    gateway = await start(gemini.url)
    gemini.script = [error(503, "UNAVAILABLE", "busy"), said("x")]
    with pytest.raises(TimeoutError):
        await session.post(gateway + CHAT, json=STREAM, timeout=aiohttp.ClientTimeout(total=0.15))
    await asyncio.sleep(0.5)
    assert len(gemini.bodies) == 1


@contextlib.asynccontextmanager
async def raw(url: str, body: Any, head: str = "") -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that reads as little as it wants."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]), limit=1 << 12)
    data = json.dumps(body).encode()
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("platform", [sys.platform, "any other, whose kernel does not help"])
async def test_a_client_that_takes_nothing_is_cut_off(
    platform: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = b"data: " + json.dumps(said("x" * 8000)[0]).encode() + b"\r\n\r\n"
    async with holding(HEAD + large * 2000) as (upstream, url):
        monkeypatch.setattr(sys, "platform", platform)
        gateway = await start(url, timeouts=agproxy.Timeouts(stall_s=0.3), heartbeat_s=0.1)
        monkeypatch.undo()
        async with raw(gateway, STREAM):
            await asyncio.wait_for(upstream.asked.wait(), 5)
            began = time.monotonic()
            await asyncio.wait_for(upstream.left.wait(), 5)
            assert 0.25 < time.monotonic() - began < 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds what stays in a socket's buffer")
async def test_a_whole_answer_that_nobody_takes_is_let_go(start: Start, gemini: FakeGemini) -> None:
    gateway = await start(gemini.url, timeouts=agproxy.Timeouts(stall_s=0.2))
    gemini.script = [said("x" * (20 << 20))]
    async with raw(gateway, HELLO) as (reader, _):
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        await asyncio.sleep(0.6)
        got = 0
        with contextlib.suppress(ConnectionError):
            while piece := await asyncio.wait_for(reader.read(1 << 20), 5):
                got += len(piece)
        assert got < 20 << 20


# ---- what trickles, and floods


async def test_a_body_that_trickles_is_answered_in_time(
    start: Start, gemini: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "BODY_S_MAX", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int((await start(gemini.url)).rsplit(":", 1)[1]))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{".encode())
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 2)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close" in answer and b'"code":"request_timeout"' in answer
    writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-A"])
async def test_a_head_that_trickles_ends_the_connection(
    sent: bytes, start: Start, gemini: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "KEEP_ALIVE_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int((await start(gemini.url)).rsplit(":", 1)[1]))
    writer.write(sent)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()


# ---- broken HTTP, and bodies that are not what they seem


async def wire(url: str, *pieces: bytes) -> bytes:
    """What comes back until the connection is closed; each further piece is sent after a moment."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    for number, piece in enumerate(pieces):
        await asyncio.sleep(0.05 * bool(number))
        writer.write(piece)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.transport.abort()


def post(body: bytes, *headers: str, close: str = "Connection: close") -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", close, f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


GOOD = json.dumps(HELLO).encode()
ENDLESS = [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", b"X-A: " + b"a" * 70_000 + b"\r\n" * 2]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([post(gzip.compress(GOOD), "Content-Encoding: gzip")], 200),
        ([post(zlib.compress(GOOD), "Content-Encoding: deflate")], 200),
        ([post(GOOD, "Expect: 100-continue")], 200),
        ([post(GOOD, "Expect: 100-continue")[: -len(GOOD)], GOOD], 100),
        ([post(GOOD, "Expect: chunked")], 200),  # found by the fuzzer: text/plain
        ([post(GOOD, "Expect: \xe4")], 200),  # found by the fuzzer: a 500
        ([post(GOOD, "X-Request-Id: \xe4", "X-Agproxy-Strict: a\x01b")], 400),
        ([post(gzip.compress(GOOD)[:-20], "Content-Encoding: gzip")], 400),
        ([post(b"no gzip", "Content-Encoding: gzip", close="X-A: b")], 400),
        ([post(GOOD, "Content-Encoding: zstd")], 400),
        ([post(b"[" * 1_000_000)], 400),
        ([post(b'{"a":' * 100_000)], 400),
        ([post(GOOD.replace(b'"hi"', b"NaN"))], 400),
        ([post(GOOD.replace(b'"hi"', b"1" * 5000))], 400),
        ([post(GOOD.replace(b'"hi"', b"1e999"))], 400),
        ([post(GOOD.replace(b"hi", b"\xff"))], 400),
        ([post(GOOD.replace(b'"hi"', b'"hi", "content": 5'))], 400),  # of two keys the last counts
        ([post(GOOD.replace(b"gpt-4o", b"gemini-" + b"x" * 1_000_000))], 400),
        ([post(GOOD.replace(b"gpt-4o", b"gpt\\r\\nX-Made-Up: b"))], 404),
        ([post(GOOD.replace(b"gpt-4o", b"a\\r\\nX-Made-Up: b"))], 404),
        ([post(GOOD.replace(b"gpt-4o", "gemini-\u2028\u00e4\u540d".encode()))], 404),
        ([b"GET /v1/models/a%0d%0aX-Made-Up:%20b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"], 404),
        ([post(GOOD).replace(b"Host", b"Host\x01")], 400),
        ([post(GOOD).replace(b"HTTP/1.1", b"HTTP/9")], 400),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], 400),
        ([post(GOOD, "Content-Length: 3")], 400),
        ([post(GOOD, "Transfer-Encoding: chunked")], 400),
        ([post(GOOD).replace(b"Content-Length: ", b"Content-Length: -")], 400),
        (ENDLESS, 400),
    ],
)
async def test_whatever_comes_is_answered_and_closed(
    sent: list[bytes], status: int, start: Start, gemini: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = await start(gemini.url)
    gemini.script = [said("x")] * 2
    answer = await wire(url, *sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == str(status).encode(), answer[:300]
    assert b"Made-Up" not in head
    if status >= 400:
        told = json.loads(body)["error"]
        assert (told["type"], set(told)) == ("invalid_request_error", {"message", "type", "param", "code"})
        assert ". " in told["message"]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert b'"status":"ok"' in await wire(url, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize("lines", ["X-A: " + "a" * 9000, "\r\n".join(f"X-{i}: a" for i in range(300))])
async def test_a_head_that_is_too_long_is_told_so(lines: str, start: Start, gemini: Any) -> None:
    answer = await wire(await start(gemini.url), post(GOOD, lines))
    assert b" 400 " in answer[:20]
    assert b"headers are too many, or one is longer than 8190 bytes" in answer


async def test_a_broken_body_that_nobody_reads_is_no_mistake_of_the_gateways(
    start: Start, gemini: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = await start(gemini.url)  # found by the fuzzer: a traceback in the log
    sent = post(b"no gzip at all, and not read", "Content-Encoding: gzip").replace(CHAT.encode(), b"/healthz")
    assert b" 405 " in await wire(url, sent[:-20], sent[-20:])
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_what_a_request_had_too_much_is_not_kept(start: Start, session: Any, gemini: FakeGemini) -> None:
    gemini.script = [said("x")]
    body = HELLO | {f"odd{i}": 1 for i in range(50)}
    async with session.post(await start(gemini.url) + CHAT, json=body) as answer:
        assert answer.headers["X-Agproxy-Changes"] == "50"
        await answer.read()
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, agproxy.Change) and one.pointer.startswith("/odd")]


async def test_a_bomb_does_not_fill_the_memory(start: Start, gemini: Any) -> None:
    url = await start(gemini.url)
    packer = zlib.compressobj(wbits=31)
    first, next_one = (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    bomb = post(first + 255 * next_one + packer.flush(), "Content-Encoding: gzip")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert b" 413 " in (await wire(url, bomb))[:20]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 << 10  # in KiB, of 256 MiB


async def test_a_client_that_takes_nothing_gets_no_heartbeat() -> None:
    """One that is written behind the end of a stream would be read as the next answer."""
    protocol = SimpleNamespace(writing_paused=True)
    stream: Any = agproxy.EventStream(cast(Any, SimpleNamespace(protocol=protocol)), cast(Any, None))
    stream.response = object()
    loop = asyncio.get_running_loop()
    for paused, beats in ((True, False), (False, True)):
        protocol.writing_paused, stream._quiet = paused, True
        stream._beat(loop, 60)
        stream._alarm.cancel()
        assert (stream._beating is not None) == beats
    stream._beating.cancel()
