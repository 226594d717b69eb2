"""Damaged HTTP from clients and from Gemini, through real sockets: `python tests/laws/fuzz.py --wire N`."""

import asyncio
import contextlib
import gzip
import json
import logging
import re
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from unittest import mock

import aiohttp
import generators as g

import antigravity_proxy as agproxy

HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/embeddings", "/v1/models", "/healthz", "/x")
AT_ONCE = 50
PATIENCE_S = 1.0
"""Of the gateway; a client waits twice as long for its first word."""


# ---- requests


def make_request(r: Random) -> bytes:
    """The bytes of a request, damaged mostly."""
    body = json.dumps(HELLO | {"stream": g.maybe(r, 30)}).encode()
    headers = ["Host: localhost", "Authorization: Bearer k", "Content-Type: application/json", odd_header(r)]
    if (packing := r.choice(("", "", "gzip", "deflate", "zstd", "br"))) and g.maybe(r, 60):
        body = {"gzip": gzip.compress, "deflate": zlib.compress}.get(packing, bytes)(body)
        headers.append(f"Content-Encoding: {packing}")
    if g.maybe(r, 30):
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in g.cut(r, body) if piece) + b"0\r\n\r\n"
        headers.append("Transfer-Encoding: chunked")
    else:
        headers.append(f"Content-Length: {len(body) + r.choice((0, 0, 0, 0, 1, -1))}")
    r.shuffle(headers)
    first = f"{r.choice(('POST', 'POST', 'POST', 'GET', 'HEAD', 'OPTIONS', 'BREW'))} {r.choice(PATHS)} HTTP/1.1"
    head = "\r\n".join([first, *headers, "", ""]).encode("latin-1", "replace")
    for _ in range(r.choice((0, 1, 1, 2))):
        head = g.damaged(r, head)
    return (head + (g.damaged(r, body) if g.maybe(r, 30) else body)) * r.choice((1, 1, 1, 2))


def odd_header(r: Random) -> str:
    value = r.choice(("x" * 9000, "ä", "\x01", "a\r\n b", "a\nX-Made-Up: b", "", "100-continue", "chunked", "99" * 30))
    return (
        f"{r.choice(('X-Request-Id', 'Origin', 'Expect', 'Connection', 'Upgrade', 'Content-Length', 'X A'))}: {value}"
    )


async def send(port: int, data: bytes, r: Random) -> bytes:
    """What a gateway says to these bytes, cut anywhere, until it is silent or closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        for piece in g.cut(r, data, 3):
            writer.write(piece)
            await asyncio.sleep(0)
        while piece := await asyncio.wait_for(reader.read(1 << 16), PATIENCE_S * (0.5 if b"\r\n\r\n" in said else 2)):
            said += piece
    writer.transport.abort()
    return said


async def check_request(port: int, _: aiohttp.ClientSession, r: Random) -> None:
    data = make_request(r)
    said = await send(port, data, r)
    heads = re.findall(rb"^HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n(.*?)\r\n\r\n(.{0,40})", said, re.DOTALL | re.MULTILINE)
    assert said == b"" or said.startswith(b"HTTP/"), f"no HTTP: {said[:200]!r} to {data!r}"
    for status, head, begun in heads:
        assert status not in (b"500", b"501"), f"{said[:400]!r} to {data!r}"
        assert b"Made-Up" not in head, f"a header is injected: {head!r} by {data!r}"
        if status >= b"400" and not data.lstrip().startswith((b"HEAD", b"H")):
            assert begun == b"" or begun.startswith(b'{"error"'), f"no error body: {said[:400]!r} to {data!r}"


# ---- answers of Gemini


def make_stream(r: Random) -> bytes:
    """The bytes of an upstream's answer to a streamed request; its body, its framing or its head is damaged."""
    chunks = g.answer_chunks(r)
    mutated = g.mutated(r, chunks) if g.maybe(r, 30) else chunks
    body = g.sse_bytes(r, mutated if isinstance(mutated, list) else [mutated])
    body = g.damaged(r, body) if g.maybe(r, 30) else body
    head = b"HTTP/1.1 %d OK\r\nContent-Type: text/event-stream\r\n" % r.choice((200,) * 9 + (429, 500, 204, 302))
    packing = r.choice((b"", b"", b"gzip", b"deflate", b"br"))
    body = {b"gzip": gzip.compress, b"deflate": zlib.compress}.get(packing, bytes)(body)
    head += b"Content-Encoding: %b\r\n" % packing if packing else b""
    if g.maybe(r, 60):
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in g.cut(r, body) if piece) + b"0\r\n\r\n"
        head += b"Transfer-Encoding: chunked\r\n"
    elif g.maybe(r, 70):
        head += b"Content-Length: %d\r\n" % (len(body) + r.choice((0, 0, 0, 5, -5)))
    whole = (g.damaged(r, head) if g.maybe(r, 15) else head) + b"\r\n" + body
    return g.damaged(r, whole) if g.maybe(r, 30) else whole


async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An upstream that answers by the seed in the model's name."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            seed = re.search(rb"gemini-s(\w+)", head)
            r = Random(seed[1]) if seed else None
            for piece in g.cut(r, make_stream(r), 3) if r else [b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}"]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
            if r and g.maybe(r, 50):
                break
    writer.close()


async def check_stream(port: int, session: aiohttp.ClientSession, r: Random) -> None:
    seed = f"gemini-s{r.randrange(1 << 60)}"
    path, body = r.choice(
        (("chat/completions", HELLO), ("responses", {"input": "x"}), ("completions", {"prompt": "x"}))
    )
    sent = body | {"model": seed, "stream": g.maybe(r, 80)}
    async with session.post(f"http://127.0.0.1:{port}/v1/{path}", json=sent) as response:
        text = await response.text()
    told = f"{response.status} {text[:600]!r} for {seed}"
    assert response.status != 500, told
    if not sent["stream"] or response.status != 200:
        assert ("error" in json.loads(text)) is (response.status != 200) or path == "responses", told
        return
    frames = [frame for frame in text.split("\n\n") if frame]
    data = [frame.split("data: ", 1)[1] for frame in frames if not frame.startswith(":")]
    last = [json.loads(one) for one in data if one != "[DONE]"][-1]
    assert text.endswith("\n\n"), told
    assert data[-1] == "[DONE]" or "error" in last or path == "responses", told


# ---- the run


def never_long(*_: object) -> float:
    return 0.0


@contextlib.asynccontextmanager
async def served(direct: bool) -> AsyncIterator[int]:
    """A gateway, impatient so that a case takes seconds at most, before the upstream above."""
    patched = mock.patch.multiple(agproxy, BODY_S_MAX=PATIENCE_S, KEEP_ALIVE_S=PATIENCE_S, cooldown_of=never_long)
    timeouts = agproxy.Timeouts(
        connect_s=2, first_event_s=PATIENCE_S, idle_s=PATIENCE_S, total_s=2 * PATIENCE_S, stall_s=2
    )
    with (
        patched,
        mock.patch.object(agproxy.random, "uniform", return_value=0.01),
    ):
        async with await asyncio.start_server(play, "127.0.0.1", 0) as upstream, contextlib.AsyncExitStack() as stack:
            url = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}"
            accounts = tuple(agproxy.Account(f"a{number}", "k", url) for number in range(3))
            app = agproxy.create_app(agproxy.Config(accounts, timeouts=timeouts, max_wait_s=0.2), direct=direct)
            yield await agproxy.listen(app, "127.0.0.1", 0, stack)


Check = Callable[[int, aiohttp.ClientSession, Random], Awaitable[None]]


async def run_some(check: Check, direct: bool, count: int, seed: int) -> list[str]:
    """Plays the cases, many at once; what failed, also a mistake that only the gateway's log tells, or a hang."""
    failures: list[str] = []
    limit = asyncio.Semaphore(AT_ONCE)
    asyncio.get_running_loop().set_exception_handler(lambda _, told: failures.append(f"in the loop: {told}"))
    complaints = logging.Handler(logging.ERROR)
    complaints.emit = lambda record: failures.append(complaints.format(record))  # type: ignore[method-assign]
    logging.getLogger().handlers = [complaints]

    async def one(number: int, port: int, session: aiohttp.ClientSession) -> None:
        async with limit:
            try:
                async with asyncio.timeout(20):
                    await check(port, session, Random(f"{seed} {check.__name__} {number}"))
            except Exception as error:  # noqa: BLE001  # what escapes is what is looked for
                failures.append(f"{check.__name__}:{number} --seed {seed}: {type(error).__name__}: {error!s:.900}")

    async with served(direct) as port, aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(number, port, session) for number in range(count)))
        async with session.get(f"http://127.0.0.1:{port}/healthz") as response:
            assert response.status == 200
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # what is still said is the end's of the upstream
    return failures


def run(count: int, seed: int = 0) -> tuple[str, list[str]]:
    """That many requests, and half as many answers over each transport; a summary, and what failed."""
    began = time.monotonic()
    failures = asyncio.run(run_some(check_request, True, count, seed))
    for direct in (True, False):
        failures += asyncio.run(run_some(check_stream, direct, count // 2, seed))
    told = f"{count} damaged requests, {count // 2} damaged answers over each of 2 transports; {len(failures)} failures"
    return f"{told} (seed {seed}), {time.monotonic() - began:.1f} s", failures
