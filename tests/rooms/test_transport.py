"""Bytes of HTTP/1.1 cut anywhere give the same body; connections are kept, found dead, cut and slowed down."""

import asyncio
import contextlib
import gc
import gzip
import ssl
import weakref
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

import antigravity_proxy as agproxy

BODY = b"data: {}\r\n\r\n" * 40


def chunked(*pieces: bytes, trailer: bytes = b"") -> bytes:
    return b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailer + b"\r\n"


@pytest.mark.parametrize(
    ("headers", "wire", "whole"),
    [
        ({"transfer-encoding": "chunked"}, chunked(BODY[:7], BODY[7:]), BODY),
        ({"transfer-encoding": "chunked"}, chunked(BODY, trailer=b"X-Sum: 1\r\n"), BODY),
        ({"transfer-encoding": "chunked", "content-encoding": "gzip"}, chunked(gzip.compress(BODY)), BODY),
        ({"content-length": str(len(BODY))}, BODY, BODY),
        ({"content-length": "0"}, b"", b""),
        ({"content-length": str(len(zlib.compress(BODY))), "content-encoding": "deflate"}, zlib.compress(BODY), BODY),
        ({}, BODY, BODY),
    ],
)
def test_every_cut_gives_the_same_body(headers: dict[str, str], wire: bytes, whole: bytes) -> None:
    for cut in range(len(wire) + 1):
        unframer = agproxy.Unframer(headers)
        assert unframer.feed(wire[:cut]) + unframer.feed(wire[cut:]) == whole
        assert unframer.close()
    unframer = agproxy.Unframer(headers)
    assert b"".join(unframer.feed(wire[i : i + 1]) for i in range(len(wire))) == whole


@pytest.mark.parametrize(
    ("headers", "wire"),
    [
        ({"transfer-encoding": "chunked"}, b"zz\r\n"),
        ({"transfer-encoding": "chunked"}, b"-5\r\n"),
        ({"transfer-encoding": "chunked"}, b"1" * 5000),
        ({"content-length": "3"}, b"four"),
        ({"content-length": "3", "content-encoding": "gzip"}, b"abc"),
    ],
)
def test_what_is_no_body_is_refused(headers: dict[str, str], wire: bytes) -> None:
    with pytest.raises(ValueError):
        agproxy.Unframer(headers).feed(wire)


@pytest.mark.parametrize("headers", [{"transfer-encoding": "chunked"}, {"content-length": "9"}])
def test_a_body_that_ends_early_is_not_whole(headers: dict[str, str]) -> None:
    unframer = agproxy.Unframer(headers)
    unframer.feed(b"5\r\nab")
    assert not unframer.close()


# ---- against a socket

Answerer = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Socket:
    """A server that answers each request of each connection by `answer`, which is told the request's number."""

    def __init__(self, answer: Answerer, context: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.context = context
        self.connections = 0
        self.requests: list[bytes] = []
        self.tasks: list[asyncio.Task[Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if task := asyncio.current_task():
            self.tasks.append(task)
        ends = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends), contextlib.closing(writer):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                await self.answer(len(self.requests), reader, writer)
                await writer.drain()

    async def __aenter__(self) -> str:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context)
        scheme = "https" if self.context else "http"
        return f"{scheme}://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/base"

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.sleep(0.01)


def said(body: bytes, extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%b" % (len(body), extra, body)


@pytest.fixture(params=["direct", "aiohttp"])
async def transport(request: pytest.FixtureRequest) -> AsyncIterator[Callable[[str], Any]]:
    """Makes a transport to a URL: both kinds keep the same promises."""
    async with contextlib.AsyncExitStack() as stack:

        def make(url: str, **waits: float) -> Any:
            timeouts = agproxy.Timeouts(**waits)
            direct = request.param == "direct"
            made: Any = agproxy.DirectTransport(url, timeouts) if direct else None
            made = made or agproxy.ProxiedTransport(url, None, timeouts)
            stack.push_async_callback(made.close)
            return made

        yield make


HEADERS = {"x-goog-api-key": "k", "Content-Type": "application/json"}


@pytest.mark.parametrize("transport", ["direct"], indirect=True)
async def test_a_connection_is_used_again(transport: Any) -> None:
    async def answer(number: int, _: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"%d" % number))

    socket = Socket(answer)
    async with socket as url:
        to = transport(url)
        for number in (1, 2, 3):
            incoming = await to.send("/v1", HEADERS, b"{}")
            assert (incoming.status, await incoming.read()) == (200, b"%d" % number)
    assert socket.connections == 1
    assert socket.requests[0].startswith(b"POST /base/v1 HTTP/1.1\r\n")
    assert b"x-goog-api-key: k" in socket.requests[0]


async def test_an_answer_that_is_over_is_let_go(transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"over"))

    async with Socket(answer) as url:
        to = transport(url)
        incoming = await to.send("/v1", HEADERS, b"{}")
        assert await incoming.read() == b"over"
        await asyncio.sleep(0.01)
        kept = weakref.ref(incoming)
        del incoming
        gc.collect()
        assert kept() is None


@pytest.mark.parametrize("transport", ["direct"], indirect=True)
async def test_a_kept_connection_that_died_is_replaced(transport: Any) -> None:
    async def answer(number: int, _: Any, writer: asyncio.StreamWriter) -> None:
        if number == 2:
            writer.transport.abort()
        else:
            writer.write(said(b"%d" % number))

    socket = Socket(answer)
    async with socket as url:
        to = transport(url)
        assert await (await to.send("/", HEADERS, b"{}")).read() == b"1"
        assert await (await to.send("/", HEADERS, b"{}")).read() == b"3"  # the second was heard by nobody
    assert socket.connections == 2


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" + said(b"ok"),
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + said(b"ok"),
        b"HTTP/1.1 100 Continue\r\n\r\n" * 2000 + said(b"ok"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"o", b"k"),
        said(b"ok", b"Connection: close\r\n"),
        said(gzip.compress(b"ok"), b"Content-Encoding: gzip\r\n"),
    ],
)
async def test_forms_of_an_answer(wire: bytes, transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        for i in range(0, len(wire), step):
            writer.write(wire[i : i + step])
            await asyncio.sleep(0)

    step = 7 if len(wire) < 1000 else len(wire)
    async with Socket(answer) as url:
        assert await (await transport(url).send("/", HEADERS, b"{}")).read() == b"ok"


async def test_an_answer_that_has_no_body_waits_for_none(transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with Socket(answer) as url:
        incoming = await transport(url, first_event_s=1).send("/", HEADERS, b"{}")
        assert (incoming.status, await incoming.read()) == (204, b"")


async def test_a_body_until_the_connection_ends(transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nok")
        writer.close()

    async with Socket(answer) as url:
        assert await (await transport(url).send("/", HEADERS, b"{}")).read() == b"ok"


@pytest.mark.parametrize("wire", [b"", b"HTTP/1.1 200", b"hello\r\n\r\n", b"HTTP/1.1 two OK\r\n\r\n", b"x" * 70000])
async def test_what_is_no_answer_is_an_error(wire: bytes, transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(wire)
        writer.close()

    async with Socket(answer) as url:
        with pytest.raises(agproxy.UpstreamBroken):
            await transport(url).send("/", HEADERS, b"{}")


async def test_a_body_that_is_cut_is_an_error(transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab")
        writer.close()

    async with Socket(answer) as url:
        incoming = await transport(url).send("/", HEADERS, b"{}")
        with pytest.raises(agproxy.UpstreamBroken):
            await incoming.read()


async def test_silence_in_a_body_ends_it(transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"ab")[:-1])

    async with Socket(answer) as url:
        incoming = await transport(url, idle_s=0.1).send("/", HEADERS, b"{}")
        assert await incoming.more(first=True) == b"a"
        with pytest.raises(agproxy.UpstreamTimeout, match="fell silent in the middle"):
            await incoming.more()


@pytest.mark.parametrize("sent", [b"", said(b"ab")[:10], said(b"ab")[:-1]])
async def test_an_answer_is_there_in_time(transport: Any, sent: bytes) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)

    async with Socket(answer) as url:
        started = asyncio.get_running_loop().time()
        with pytest.raises(agproxy.UpstreamTimeout, match="did not answer in time"):
            await (await transport(url, first_event_s=0.1).send("/", HEADERS, b"{}")).read()
        assert 0.075 < asyncio.get_running_loop().time() - started < 1


async def test_a_paused_body_waits_upstream(transport: Any) -> None:
    total = 64 << 20
    sent = 0

    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    async with Socket(answer) as url:
        incoming = await transport(url, idle_s=0.1).send("/", HEADERS, b"{}")
        got = len(await incoming.more())
        await asyncio.sleep(0.25)
        assert sent < total // 2, "the upstream was not held"
        data = await incoming.more()
        assert len(data) <= 1 << 20
        while data:
            got += len(data)
            data = await incoming.more()
        assert got == total


async def give_up_reading(incoming: agproxy.Incoming) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await incoming.read()


async def abort(incoming: agproxy.Incoming) -> None:
    incoming.abort()


@pytest.mark.parametrize("leave", [abort, give_up_reading])
async def test_who_leaves_closes_the_connection(leave: Any, transport: Any) -> None:
    closed = asyncio.Event()

    async def answer(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"ab")[:-1])
        await writer.drain()
        with contextlib.suppress(OSError):
            await reader.read()
        closed.set()

    async with Socket(answer) as url:
        await leave(await transport(url).send("/", HEADERS, b"{}"))
        await asyncio.wait_for(closed.wait(), 1)


async def test_who_gives_up_waiting_closes_the_connection(transport: Any) -> None:
    closed = asyncio.Event()

    async def answer(_: int, reader: asyncio.StreamReader, __: Any) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        closed.set()

    async with Socket(answer) as url:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await transport(url).send("/", HEADERS, b"{}")
        await asyncio.wait_for(closed.wait(), 1)


async def test_over_tls(transport: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(BODY))

    async with Socket(answer, context) as url:
        with pytest.raises(agproxy.UpstreamBroken, match="TLS certificate was refused"):
            await transport(url).send("/", HEADERS, b"{}")
        trusted = ssl.create_default_context()
        authority.configure_trust(trusted)
        monkeypatch.setattr(agproxy, "tls_context", lambda: trusted)
        to = transport(url)
        if isinstance(to, agproxy.DirectTransport):
            assert await (await to.send("/", HEADERS, b"{}")).read() == BODY
            assert await (await to.send("/", HEADERS, b"{}")).read() == BODY


@pytest.mark.parametrize("transport", ["direct"], indirect=True)
async def test_what_was_not_asked_for_is_taken_for_no_answer(transport: Any) -> None:
    async def answer(number: int, _: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"%d" % number))
        if number == 1:
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.write(said(b"of nobody"))

    socket = Socket(answer)
    async with socket as url:
        to = transport(url)
        assert await (await to.send("/", HEADERS, b"{}")).read() == b"1"
        await asyncio.sleep(0.1)
        assert await (await to.send("/", HEADERS, b"{}")).read() == b"2"
    assert socket.connections == 2


@pytest.mark.parametrize("transport", ["direct"], indirect=True)
async def test_a_connection_whose_last_piece_was_too_much_for_its_reader_serves_the_next(transport: Any) -> None:
    body = bytes(4 * agproxy.UNREAD_BYTES_MAX)

    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(body))

    socket = Socket(answer)
    async with socket as url:
        to = transport(url, first_event_s=5)
        first = await to.send("/", HEADERS, b"{}")
        got = 0
        while not to._idle:
            got += len(await first.more())
            await asyncio.sleep(0.05)
        second = await to.send("/", HEADERS, b"{}")
        assert got + len(await first.more()) == len(body)
        assert await second.read() == body
    assert socket.connections == 1


@pytest.mark.parametrize("transport", ["direct"], indirect=True)
async def test_an_idle_connection_holds_nothing_of_its_last_answer(transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"over"))

    async with Socket(answer) as url:
        to = transport(url)
        incoming = await to.send("/v1", HEADERS, b"{}")
        assert await incoming.read() == b"over"
        (connection,) = to._idle
        assert (connection._incoming, connection._waiter) == (None, None)


async def test_only_silence_that_somebody_waits_through_counts(transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"abc")[:-1])
        await writer.drain()
        await asyncio.sleep(0.3)
        writer.write(b"c")

    async with Socket(answer) as url:
        incoming = await transport(url, idle_s=0.2).send("/", HEADERS, b"{}")
        assert await incoming.more(first=True) == b"ab"
        await asyncio.sleep(0.25)
        assert await incoming.more() == b"c"
        assert await incoming.more() == b""


async def test_who_waits_for_more_is_told_why_it_was_ended(transport: Any) -> None:
    async def answer(_: int, __: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(said(b"ab")[:-1])

    async with Socket(answer) as url:
        incoming = await transport(url).send("/", HEADERS, b"{}")
        assert await incoming.more(first=True) == b"a"
        asyncio.get_running_loop().call_later(0.05, incoming.abort, agproxy.UpstreamTimeout("Too long."))
        with pytest.raises(agproxy.UpstreamTimeout, match="Too long"):
            await incoming.more()
        incoming = await transport(url).send("/", HEADERS, b"{}")
        assert await incoming.more(first=True) == b"a"
        asyncio.get_running_loop().call_later(0.05, incoming.abort)
        assert await incoming.more() == b""


@pytest.mark.parametrize("transport", ["direct"], indirect=True)
async def test_a_host_that_no_name_can_have_is_an_error_of_the_network(transport: Any) -> None:
    with pytest.raises(agproxy.UpstreamBroken, match="could not be reached"):
        await transport("http://a..b").send("/", HEADERS, b"{}")
