"""HTTP/1.1 as clients speak it: what is read, what is refused, what goes back, over real sockets."""

import asyncio
import contextlib
import json
import zlib
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from conftest import HELLO
from fake_gemini import FakeGemini, said

import antigravity_proxy as agproxy

GET = "GET /healthz HTTP/1.1\r\nHost: localhost"


class Echo:
    """An application that answers with what it was asked, behind the product's own listener."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.asked = 0
        self.app = web.Application()
        self.app.router.add_route("*", "/{path:.*}", self.handle, expect_handler=agproxy.expect_later)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        if request.path == "/large":
            return web.Response(body=bytes(1_000_000))
        if request.path == "/refused":
            return web.Response(text="no", status=401)
        if request.path == "/slow":
            try:
                await asyncio.sleep(60)
            finally:
                self.left.set()
        try:
            body = await agproxy.read_body(request)
        except agproxy.GatewayError as error:
            response = web.Response(text=str(error.status), status=error.status)
            if error.headers.get("Connection") == "close":
                response.force_close()
            return response
        query = dict(request.query)
        told = {"method": request.method, "path": request.path, "query": query, "body": body.decode()}
        return web.Response(body=json.dumps(told).encode())


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, int]]:
    echo = Echo()
    async with contextlib.AsyncExitStack() as stack:
        yield echo, await agproxy.listen(echo.app, "127.0.0.1", 0, stack)


@pytest.fixture
async def gateway() -> AsyncIterator[int]:
    """The port of a gateway without accounts."""
    async with contextlib.AsyncExitStack() as stack:
        yield await agproxy.listen(agproxy.create_app(agproxy.Config(())), "127.0.0.1", 0, stack)


@pytest.fixture
async def guarded(gemini: FakeGemini) -> AsyncIterator[int]:
    """The port of a gateway that wants the key `right`, before a scripted Gemini."""
    keys = (agproxy.ClientKey("laptop", "right"),)
    config = agproxy.Config((agproxy.Account("a", "k", gemini.url),), auth_mode="strict", api_key=keys)
    async with contextlib.AsyncExitStack() as stack:
        yield await agproxy.listen(agproxy.create_app(config), "127.0.0.1", 0, stack)


async def wire(port: int, *pieces: bytes, end: bool = False) -> bytes:
    """What comes back until the connection is closed, or for a moment."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.02)
    said = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(5 if end else 0.1):
            while piece := await reader.read(1 << 16):
                said += piece
    writer.transport.abort()
    return said


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "target", ["GET /chat/completions", "POST /models", "POST //v1//models", "DELETE /v1/v1/responses"]
)
async def test_a_wrong_method_on_a_shortened_path_is_told(target: str, gateway: int) -> None:
    answer = await wire(gateway, f"{target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 405 "), answer
    assert b"\r\nAllow: " in answer


@pytest.mark.parametrize("target", ["CONNECT example.com:443", "GET http://localhost"])
async def test_a_target_without_a_path_is_an_unknown_url(target: str, gateway: int) -> None:
    answer = await wire(gateway, f"{target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 "), answer
    assert json.loads(body_of(answer))["error"]["code"] == "unknown_url"


async def test_a_stream_for_a_client_of_1_0_ends_with_its_connection(guarded: int, gemini: FakeGemini) -> None:
    gemini.script = [said("whole")]
    body = json.dumps(HELLO | {"stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer right\r\nConnection: keep-alive"
    _, writer = opened = await asyncio.open_connection("127.0.0.1", guarded)
    writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    async with asyncio.timeout(5):
        answer = await opened[0].read()
    writer.close()
    assert answer.endswith(b"data: [DONE]\n\n"), answer


@pytest.mark.parametrize(
    "head",
    [
        "get /healthz HTTP/1.1\r\nHost: x",
        "GET /healthz HTTP/2.0\r\nHost: x",
        "GET /healthz b HTTP/1.1\r\nHost: x",
        "GET /healthz HTTP/1.1",
        f"{GET}\r\nHost: y",
        f"{GET}\r\nAuthorization: a\r\nAuthorization: b",
        f"{GET}\r\nX-A : b",
        f"{GET}\r\n X-A: b",
        f"{GET}\r\nX-A: b\r\n\tc",
        f"{GET}\r\nX-A",
        f"{GET}\r\n: b",
        f"{GET}\r\nX-A: b\x00c",
        f"{GET}\r\nX-A: b\nX-B: c",
        f"{GET}\r\nX-A: b\rX-B: c",
        f"{GET}\r\nX-A: {'b' * 300}\x7f",
        f"{GET}\r\nContent-Length: +1",
        f"{GET}\r\nContent-Length: 1, 1",
        f"{GET}\r\nContent-Length: \u00b2",
        f"{GET}\r\nContent-Length: {'1' * 22}",
        f"{GET}\r\nContent-Length: 1\r\nContent-Length: 1",
        f"{GET}\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
        f"{GET}\r\nTransfer-Encoding: gzip, chunked",
        f"{GET}\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "GET /healthz HTTP/1.0\r\nTransfer-Encoding: chunked",
        f"{GET}\r\nX-A: {'b' * 70_000}",
        f"{GET}" + "\r\nX-A: b" * 200,
    ],
)
async def test_what_may_be_read_in_two_ways_is_refused(
    head: str, gateway: int, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await wire(gateway, f"{head}\r\nX-Key: sk-planted\r\n\r\n{GET}\r\n\r\n".encode(), end=True)
    assert answer.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 ")), answer
    assert b" 200 OK" not in answer  # what came behind it is not heard
    told = json.loads(body_of(answer))["error"]
    assert told["type"] == "invalid_request_error"
    assert "planted" not in answer.decode() + caplog.text
    assert not [record for record in caplog.records if record.exc_info]


async def test_what_aiohttp_reads_in_one_way_is_served(gateway: int) -> None:
    answer = await wire(gateway, b"GET  /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /a?b=c%20d&e= HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
        b"\r\nPOST http://x/a?b=c%20d&e= HTTP/1.1\r\nhOST:x\r\ncontent-length:\t5 \r\n\r\nhello",
        b"POST /%61?b=c+d&e HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello",
        b"POST /a?b=c+d&e HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nT: x\r\n\r\n",
        b"POST /a?b=c+d&e HTTP/1.1\r\nHost: x\r\nContent-Encoding: deflate\r\nContent-Length: %d\r\n\r\n%b"
        % (len(zlib.compress(b"hello")), zlib.compress(b"hello")),
        b"POST /a?b=c+d&e HTTP/1.1\r\nHost: x\r\nContent-Encoding: deflate\r\nContent-Length: %d\r\n\r\n%b"
        % (len(zlib.compress(b"hello")[2:-4]), zlib.compress(b"hello")[2:-4]),
    ],
    ids=["usual", "odd", "old", "chunks", "packed", "packed raw"],
)
async def test_each_form_of_a_request_is_read_however_it_is_cut(sent: bytes, echo: tuple[Echo, int]) -> None:
    asked = {"method": "POST", "path": "/a", "query": {"b": "c d", "e": ""}, "body": "hello"}
    for cut in range(0, len(sent), 7):
        reader, writer = await asyncio.open_connection("127.0.0.1", echo[1])
        writer.write(sent[:cut])
        await asyncio.sleep(0.001)
        writer.write(sent[cut:])
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        length = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
        assert (head[8:15], json.loads(await reader.readexactly(length))) == (b" 200 OK", asked)
        writer.transport.abort()


@pytest.mark.parametrize(
    "body",
    [
        *(b"+5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"-1\r\n", b"5_0\r\n", b"\r\n", b"g\r\n"),
        *(b"1" * 5000, b"5\r\nhelloXX0\r\n\r\n", b"5\r\nhello\rX0\r\n\r\n", b"5\r\nhello\n\n0\r\n\r\n"),
    ],
)
async def test_odd_chunks_are_refused(body: bytes, echo: tuple[Echo, int]) -> None:
    head = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 400 " in (await wire(echo[1], head + body, end=True))[:14]
    later = await wire(echo[1], head, body, end=True)  # then it is the reader who is told
    assert (later[:13], b"Connection: close" in later) == (b"HTTP/1.1 400 ", True)


async def test_requests_on_one_connection_are_answered_in_their_order(echo: tuple[Echo, int]) -> None:
    posts = b"".join(b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nok" % number for number in range(50))
    last = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = await wire(echo[1], posts[:1000], posts[1000:] + last, end=True)
    order = [part.split(b'"')[0] for part in answer.split(b'"path": "/')[1:]]
    assert order == [b"%d" % number for number in range(50)] + [b"last"]


async def test_an_old_client_keeps_its_connection_only_where_it_asks(echo: tuple[Echo, int]) -> None:
    one = b"GET /a HTTP/1.0\r\n\r\n"
    assert (await wire(echo[1], one, one, end=True)).count(b" 200 OK") == 1
    kept = b"GET /a HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
    answer = await wire(echo[1], kept, one, end=True)
    assert (answer.count(b" 200 OK"), answer.count(b"Connection: keep-alive")) == (2, 1)


async def test_a_head_is_asked_for_alone(echo: tuple[Echo, int]) -> None:
    answer = await wire(echo[1], b"HEAD /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", end=True)
    assert (b"Content-Length: " in answer, b"Date: " in answer, body_of(answer)) == (True, True, b"")


async def test_a_refusal_is_heard_before_a_large_body_is_sent(echo: tuple[Echo, int]) -> None:
    head = b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n"
    answer = await wire(echo[1], head, *[bytes(1_000_000)] * 9)
    assert (answer[:13], body_of(answer)) == (b"HTTP/1.1 401 ", b"no")


async def test_a_body_that_is_too_large_is_refused_by_what_it_says_or_by_what_comes(
    echo: tuple[Echo, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "BODY_BYTES_MAX", 100_000)
    head = b"POST /a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100001\r\n\r\n"
    assert (await wire(echo[1], head)).startswith(b"HTTP/1.1 413 ")
    chunks = (
        b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + bytes(0x8000) + b"\r\n"
    )
    assert (await wire(echo[1], chunks, *[chunks[-0x8008:]] * 4)).startswith(b"HTTP/1.1 413 ")


async def test_a_body_that_does_not_come_is_given_up(echo: tuple[Echo, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agproxy, "BODY_S_MAX", 0.1)
    monkeypatch.setattr(agproxy, "LINGER_S", 0.1)
    answer = await wire(echo[1], b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhe", end=True)
    assert (answer[:13], b"Connection: close" in answer) == (b"HTTP/1.1 408 ", True)


async def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agproxy, "KEEP_ALIVE_S", 0.1)
    async with contextlib.AsyncExitStack() as stack:
        port = await agproxy.listen(Echo().app, "127.0.0.1", 0, stack)
        began = asyncio.get_running_loop().time()
        answer = await wire(port, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /a HT", end=True)
        assert (answer.count(b"HTTP/1.1 200"), asyncio.get_running_loop().time() - began < 1) == (1, True)


async def test_whoever_leaves_is_not_worked_for(echo: tuple[Echo, int]) -> None:
    app, port = echo
    await wire(port, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.wait_for(app.left.wait(), 1)


async def test_pipelined_requests_do_not_fill_the_memory(echo: tuple[Echo, int]) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", echo[1])
    writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000_000)
    await asyncio.sleep(0.3)
    assert writer.transport.get_write_buffer_size() > 10 << 20  # nobody takes it
    writer.transport.abort()


async def test_answers_that_nobody_reads_do_not_fill_the_memory(echo: tuple[Echo, int]) -> None:
    app, port = echo
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
    await asyncio.sleep(0.3)
    assert 0 < app.asked < 50  # what fits into the sockets' buffers
    writer.transport.abort()


async def test_an_old_client_is_not_told_to_continue(echo: tuple[Echo, int]) -> None:
    head = "POST /a HTTP/1.{}\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"
    assert (await wire(echo[1], head.format(1).encode(), b"b")).startswith(b"HTTP/1.1 100 Continue\r\n")
    assert (await wire(echo[1], head.format(0).encode(), b"b")).startswith(b"HTTP/1.0 200 OK\r\n")


async def test_an_unknown_packing_is_named(echo: tuple[Echo, int]) -> None:
    with pytest.raises(agproxy.BadRequest, match=r"'br' is not served\. Send the body as it is"):
        agproxy.unpacked(b"x", "br")


# ---- a body is asked for, read and waited for only where somebody is let in

CHAT, ASKED = "/v1/chat/completions", json.dumps(HELLO).encode()


def posted(path: str, *headers: str, length: int = len(ASKED)) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *headers, "", ""]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("path", [CHAT, "/chat/completions", "/v1/nothing", "/healthz", "/v1/responses/resp_1"])
@pytest.mark.parametrize("expected", ["100-continue", "100-Continue", "something else"])
async def test_whoever_shows_no_key_is_not_told_to_continue(expected: str, path: str, guarded: int) -> None:
    answer = await wire(guarded, posted(path, f"Expect: {expected}"))
    assert (answer[:13], json.loads(body_of(answer))["error"]["code"]) == (b"HTTP/1.1 401 ", "invalid_api_key")


@pytest.mark.parametrize("path", [CHAT, "/v1//chat/completions/"])
async def test_whoever_shows_a_key_is_told_to_continue(path: str, guarded: int, gemini: FakeGemini) -> None:
    gemini.script = [said("x")]
    reader, writer = await asyncio.open_connection("127.0.0.1", guarded)
    writer.write(posted(path, "Authorization: Bearer right", "Expect: 100-continue"))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(ASKED)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)) == b"HTTP/1.1 200 OK\r\n"
    writer.transport.abort()


async def test_a_path_that_is_not_served_asks_for_no_body(guarded: int) -> None:
    answer = await wire(guarded, posted("/v1/nothing", "Authorization: Bearer right", "Expect: 100-continue"))
    assert (answer[:13], json.loads(body_of(answer))["error"]["code"]) == (b"HTTP/1.1 404 ", "unknown_url")


async def test_a_body_that_nobody_asked_for_is_not_waited_for(guarded: int) -> None:
    """Its connection ends, or the client's next request would be read as that body."""
    first = posted(CHAT, "Expect: 100-continue")
    answer = await wire(guarded, first, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer


async def test_another_expectation_is_passed_over(guarded: int, gemini: FakeGemini) -> None:
    gemini.script = [said("x")]
    answer = await wire(guarded, posted(CHAT, "x-api-key: right", "Expect: tea") + ASKED)
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_a_key_is_asked_for_while_a_body_still_comes(guarded: int) -> None:
    answer = await wire(guarded, posted(CHAT, length=9_000_000), *[bytes(1_000_000)] * 9)
    assert (answer[:13], json.loads(body_of(answer))["error"]["code"]) == (b"HTTP/1.1 401 ", "invalid_api_key")


@pytest.mark.parametrize("second", ["right", "wrong"])
async def test_two_keys_in_one_head_are_refused(second: str, guarded: int) -> None:
    keys = ("Authorization: Bearer right", f"authorization: Bearer {second}")
    answer = await wire(guarded, posted(CHAT, *keys) + ASKED, end=True)
    assert (answer[:13], b"Authorization is given twice" in answer) == (b"HTTP/1.1 400 ", True)


@pytest.mark.parametrize("broken", [b"zz\r\n", b"5\r\nhelloXX", b"-1\r\n"])
async def test_a_body_that_breaks_while_it_is_read_is_refused_soon(broken: bytes, guarded: int) -> None:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "x-api-key: right", "Transfer-Encoding: chunked", "", ""]
    reader, writer = await asyncio.open_connection("127.0.0.1", guarded)
    writer.write("\r\n".join(lines).encode() + b"1\r\n{\r\n")
    await asyncio.sleep(0.1)
    writer.write(broken)
    async with asyncio.timeout(1):
        answer = await reader.read()
    assert (answer[:13], b"Connection: close" in answer) == (b"HTTP/1.1 400 ", True)
    assert json.loads(body_of(answer))["error"]["type"] == "invalid_request_error"
    writer.close()
