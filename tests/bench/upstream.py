"""A fast Gemini in its own process: answers what the directive in a body asks for, the same bytes to every caller.

    python tests/bench/upstream.py          prints the port that it listens on

It answers 400 when not all of the messages, tools or image bytes that the directive names have reached it.
"""

import asyncio
import heapq
import json
import re
import sys
import zlib
from functools import cache

from workloads import MODEL, PNG_START, Workload, answers, event_bytes

PER_WRITE = 5
"""Chunks that a burst hands to the kernel at once, each in an HTTP chunk of its own."""

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LISTED = {"name": f"models/{MODEL}", "supportedGenerationMethods": ["generateContent", "countTokens"]}


def whole(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json; charset=UTF-8\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


MODELS = whole(json.dumps({"models": [LISTED]}).encode())


def directive_of(body: bytes) -> str:
    start = body.rfind(b"[bench ")
    return body[start + 7 : body.find(b"]", start)].decode() if start >= 0 else "chunks=0"


def complaint(body: bytes, directive: str) -> str:
    """What the directive promised and the body does not hold."""
    for token, count in re.findall(r"count=([\w-]+):(\d+)", directive):
        if (found := body.count(token.encode()) - directive.count(token)) != int(count):
            return f"{found} of {count} {token} arrived"
    if match := re.search(r"image=(\d+):(\d+)", directive):
        start = body.find(PNG_START.encode())
        data = body[start : start + int(match[1])]
        if start < 0 or zlib.crc32(data) != int(match[2]) or body[start + len(data) : start + len(data) + 1] != b'"':
            return "the image did not arrive as it was sent"
    return ""


@cache
def asked_for(directive: str) -> Workload:
    given = {name: int(value) for name, value in re.findall(r"(chunks|pause_ms|event)=(\d+)", directive)}
    content, size = ("event", given["event"]) if "event" in given else ("chat", 0)
    return Workload("asked", "", (), content, size, chunks=given.get("chunks", 0), pause_ms=given.get("pause_ms", 0))


@cache
def whole_answer(workload: Workload) -> bytes:
    return whole(json.dumps(next(answers(workload)), indent=2).encode())


@cache
def stream_frames(workload: Workload) -> tuple[bytes, ...]:
    """One HTTP chunk an event; the last one ends the body."""
    frames = [b"%x\r\n%s\r\n\r\n\r\n" % (len(event) + 4, event) for event in event_bytes(workload)]
    frames[-1] += b"0\r\n\r\n"
    return tuple(frames)


class Pacer:
    """Sends the chunks of all paced streams when they are due, however late the ones before were."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: list[tuple[float, int, Connection, float]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._streams = 0

    def add(self, connection: "Connection", pause_s: float) -> None:
        """From the next pause on; the streams are spread evenly over it."""
        self._streams += 1
        phase = self._streams * 0.618034 % 1
        due = (self._loop.time() // pause_s + 1 + phase) * pause_s
        heapq.heappush(self._due, (due, self._streams, connection, pause_s))
        self._wait()

    def _wait(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._due[0][0], self._send) if self._due else None

    def _send(self) -> None:
        now = self._loop.time()
        while self._due and self._due[0][0] <= now:
            due, number, connection, pause_s = self._due[0]
            if connection.send_next():
                heapq.heapreplace(self._due, (due + pause_s, number, connection, pause_s))
            else:
                heapq.heappop(self._due)
        self._wait()


class Connection(asyncio.Protocol):
    """One keep-alive connection: a request, its answer, the next request."""

    pacer: Pacer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._buffer = bytearray()
        self._needed = 0
        self._frames: tuple[bytes, ...] = ()
        self._next = 0
        self._full = False
        self._pumping: asyncio.Handle | None = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._pumping:
            self._pumping.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while self._has_request():
            request = bytes(self._buffer[: self._needed])
            del self._buffer[: self._needed]
            self._needed = 0
            self._answer(request)

    def _has_request(self) -> bool:
        if not self._needed:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return False
            match = LENGTH.search(self._buffer, 0, end)
            self._needed = end + 4 + (int(match[1]) if match else 0)
        return len(self._buffer) >= self._needed

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET "):
            self._transport.write(MODELS)
            return
        directive = directive_of(request)
        if problem := complaint(request, directive):
            error = {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": problem}}
            self._transport.write(whole(json.dumps(error).encode(), "400 Bad Request"))
        elif b":streamGenerateContent" in request[:200]:
            self._stream(asked_for(directive))
        else:
            self._transport.write(whole_answer(asked_for(directive)))

    # ---- streams

    def _stream(self, workload: Workload) -> None:
        self._frames, self._next = stream_frames(workload), 1
        self._transport.write(STREAM_HEAD + self._frames[0])
        if workload.pause_ms:
            self.pacer.add(self, workload.pause_ms / 1000)
        else:
            self._pump()

    def send_next(self) -> bool:
        """Sends a chunk; false when it was the last one or nobody takes it."""
        if self._next < len(self._frames) and not self._transport.is_closing():
            self._transport.write(self._frames[self._next])
            self._next += 1
        return self._next < len(self._frames) and not self._transport.is_closing()

    def _pump(self) -> None:
        """A few chunks, and more in the loop's next round unless the caller is slow."""
        if self._full or self._next >= len(self._frames):
            return
        self._transport.write(b"".join(self._frames[self._next : self._next + PER_WRITE]))
        self._next += PER_WRITE
        self._pumping = asyncio.get_running_loop().call_soon(self._pump)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._pump()


async def main() -> None:
    Connection.pacer = Pacer()
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
