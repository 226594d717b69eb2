"""The load generator: asks one gateway, checks every answer event by event, reads the gateway's clock.

    python tests/bench/load.py          an order a line on stdin, a result a line on stdout, both JSON

Raw sockets and HTTP/1.1 keep-alive. Connections are opened, and a first round is asked, before anything is measured.
"""

import contextlib
import itertools
import json
import math
import re
import select
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from meters import cpu_s, raise_file_limit, rss_kib, waited_s
from workloads import MODEL, Workload, event_bytes, gemini_body, number_of, openai_body, texts

CONNECTED_AT_ONCE = 50
RECEIVED_AT_ONCE = 1 << 16
WARM_UP_SHARE = 5
SETTLE_S = 0.02
"""Until a gateway has done what it does after an answer."""

Said = tuple[str, str | None]
"""What a chunk says: its text, and its finish reason."""


# ---- checks


def read_openai(chunk: dict[str, Any]) -> Said:
    choice = chunk["choices"][0]
    return (choice.get("delta") or choice.get("message") or {}).get("content") or "", choice.get("finish_reason")


def read_gemini(chunk: dict[str, Any]) -> Said:
    candidate = chunk["candidates"][0]
    return candidate["content"]["parts"][0]["text"], candidate.get("finishReason")


READERS: dict[str, Callable[[dict[str, Any]], Said]] = {"openai": read_openai, "gemini": read_gemini}
SEPARATORS = {"openai": b"\n\n", "gemini": b"\r\n\r\n"}


def order_faults(numbers: Iterable[int], expected: int) -> Counter[str]:
    """How many chunks are missing, came again, or came after a later one."""
    numbers = list(numbers)
    once = list(dict.fromkeys(numbers))
    faults = {
        "lost": len(set(range(expected)) - set(once)),
        "doubled": len(numbers) - len(once),
        "reordered": sum(later < earlier for earlier, later in itertools.pairwise(once)),
    }
    return Counter({name: count for name, count in faults.items() if count})


@cache
def encoded_texts(workload: Workload) -> tuple[bytes, ...]:
    return tuple(json.dumps(text).encode() for text in texts(workload))


class Check:
    """One answer: which chunks came, in which order, and how it ended.

    A chunk needs no parsing when it is to the byte what the upstream sent, or the chunk before with the next text: the
    generator must not become what is measured.
    """

    def __init__(self, workload: Workload, dialect: str) -> None:
        self.numbers: list[int] = []
        self.problem = ""
        self._texts = texts(workload)
        self._encoded = event_bytes(workload)[:-1] if dialect == "gemini" else encoded_texts(workload)
        self._read = READERS[dialect]
        self._separator = SEPARATORS[dialect]
        self._streamed = workload.chunks > 0
        self._needs_done = self._streamed and dialect == "openai"
        self._around = (b"", b"") if dialect == "gemini" else None
        """What stood before and after the text of the last chunk that was parsed."""
        self._rest = bytearray()
        self._finished = self._done = False

    def feed(self, data: bytes) -> None:
        if not self._streamed:
            self._rest += data
        elif not self._rest and data.endswith(self._separator):
            self._events(data[: -len(self._separator)])
        else:
            searched = len(self._rest)
            self._rest += data
            if (end := self._rest.rfind(self._separator, max(0, searched - 3))) >= 0:
                events = bytes(self._rest[:end])
                del self._rest[: end + len(self._separator)]
                self._events(events)

    def close(self, status: int) -> Counter[str]:
        """The faults of the whole answer."""
        if status != 200:
            self.problem = f"HTTP {status} {bytes(self._rest[:300]).decode(errors='replace')}"
        elif not self._streamed:
            self._parse(bytes(self._rest))
        elif self._rest:
            self.problem = self.problem or f"left over: {bytes(self._rest[:100])!r}"
        if not self.problem and not (self._finished and self._done >= self._needs_done):
            self.problem = "the answer ended without its finish reason or without [DONE]"
        faults = order_faults(self.numbers, len(self._texts)) if status == 200 else Counter[str]()
        return faults + Counter(errors=1 if self.problem else 0)

    def _events(self, events: bytes) -> None:
        for event in events.split(self._separator):
            number = len(self.numbers)
            around = self._around
            if (
                around
                and number < len(self._encoded)
                and not self._finished
                and event == around[0] + self._encoded[number] + around[1]
            ):
                self.numbers.append(number)
            elif event == b"data: [DONE]" and self._needs_done and not self._done:
                self._done = True
            elif event.startswith(b"data: "):
                self._parse(event[6:])
                self._learn(event)

    def _learn(self, event: bytes) -> None:
        """Keeps what stands around a chunk's text, unless the answer ends with it."""
        if self._needs_done and self.numbers and not (self._finished or self.problem):
            before, found, after = event.partition(self._encoded[self.numbers[-1]])
            self._around = (before, after) if found else None

    def _parse(self, chunk: bytes) -> None:
        try:
            self._said(*self._read(json.loads(chunk)))
        except (ValueError, LookupError, TypeError, AttributeError):
            self.problem = self.problem or f"not understood: {chunk[:300]!r}"

    def _said(self, text: str, finish: str | None) -> None:
        if self._finished or self._done:
            self.problem = self.problem or f"said after the end: {text!r}"
        self._finished = finish is not None
        if not text:
            return
        number = len(self.numbers)
        if number >= len(self._texts) or text != self._texts[number]:
            number = number_of(text)
        if 0 <= number < len(self._texts) and text == self._texts[number]:
            self.numbers.append(number)
        else:
            self.problem = self.problem or f"not what the upstream said: {text[:100]!r}"


class ResponseReader:
    """Bytes of one HTTP/1.1 response, cut anywhere, to its status and its body."""

    def __init__(self) -> None:
        self.status = 0
        self.ended = False
        self._rest = b""
        self._left: int | None = None
        """Bytes that belong to the body for sure; None where a chunk's size comes next."""
        self._chunked = self._last = False

    def feed(self, data: bytes) -> bytes:
        """The body's bytes among the next bytes of the response."""
        data = self._rest + data
        self._rest = b""
        if not self.status:
            head, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = head
                return b""
            self._head(head)
        return self._unchunk(data) if self._chunked else self._count(data)

    def _head(self, head: bytes) -> None:
        self.status = int(head[9:12])
        self._chunked = b"transfer-encoding: chunked" in head.lower()
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        self._left = int(length[1]) if length else None

    def _count(self, data: bytes) -> bytes:
        self._left = (self._left or 0) - len(data)
        self.ended = self._left <= 0
        return data

    def _unchunk(self, data: bytes) -> bytes:
        pieces, at = [], 0
        while at < len(data):
            if self._left is None:
                end = data.find(b"\r\n", at)
                if end < 0:
                    break
                self._left, at = int(data[at:end], 16), end + 2
                self._last = self._left == 0
            if piece := data[at : at + self._left]:
                pieces.append(piece)
                self._left -= len(piece)
                at += len(piece)
            if self._left == 0:
                if len(data) < at + 2:
                    break
                self._left, at = None, at + 2
                self.ended = self._last
        self._rest = data[at:]
        return b"".join(pieces)


# ---- connections


@dataclass(frozen=True, slots=True)
class Order:
    """Whom to ask what: `pid` is the gateway whose clock and memory are read, 0 for none."""

    workload: Workload
    dialect: str
    port: int
    pid: int
    key: str
    limit_s: float


@cache
def body_of(workload: Workload, dialect: str) -> bytes:
    """Compact and in UTF-8, as OpenAI's clients send it."""
    build = openai_body if dialect == "openai" else gemini_body
    return json.dumps(build(workload), ensure_ascii=False, separators=(",", ":")).encode()


def request_of(order: Order) -> bytes:
    body = body_of(order.workload, order.dialect)
    method = "streamGenerateContent?alt=sse" if order.workload.chunks else "generateContent"
    path = "/v1/chat/completions" if order.dialect == "openai" else f"/v1beta/models/{MODEL}:{method}"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{order.port}\r\nAccept: */*\r\nAuthorization: Bearer {order.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection:
    """One keep-alive connection of a run: asks, checks the answer, asks again until the run has enough."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._check: Check | None = None
        self._unsent = memoryview(b"")
        self.socket = socket.create_connection(("127.0.0.1", run.order.port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)

    def ask(self) -> None:
        self._reader = ResponseReader()
        self._check = Check(self._run.order.workload, self._run.order.dialect)
        self._unsent = memoryview(self._run.request)
        self._asked = time.perf_counter()
        self._send()

    def ready(self, mask: int) -> None:
        try:
            if mask & select.EPOLLOUT:
                self._send()
            if mask & ~select.EPOLLOUT:
                self._receive(self.socket.recv(RECEIVED_AT_ONCE))
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(str(error))

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        self._run.watch(self, sending=bool(self._unsent))

    def _receive(self, data: bytes) -> None:
        check = self._check
        if not data or check is None:
            return self._lose(f"sent without a request: {data[:100]!r}" if data else "the gateway closed")
        known = len(check.numbers)
        if body := self._reader.feed(data):
            check.feed(body)
        if self._reader.ended:
            self._check = None
            faults = check.close(self._reader.status)
        if (new := len(check.numbers) - known) > 0:
            self._run.heard(new, None if known else time.perf_counter() - self._asked)
        if self._reader.ended:
            self._run.ended(self, time.perf_counter() - self._asked, faults, check.problem)

    def _lose(self, why: str) -> None:
        self.socket.close()
        asked, self._check = self._check is not None, None
        if asked:
            self._run.ended(self, None, Counter(errors=1), f"the connection was lost: {why}")
        else:
            self._run.fault("errors", why)


class Run:
    """The connections to one gateway, and what they saw."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.request = request_of(order)
        self.connections: list[Connection] = []
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.chunks = self.reads = 0
        self.faults: Counter[str] = Counter()
        self.problem = ""
        self._to_ask = self._open = 0
        self._deadline = time.monotonic() + order.limit_s
        self._poll = select.epoll()
        self._sending: dict[int, bool] = {}
        self._by_number: dict[int, Connection] = {}

    def connect(self) -> None:
        """Not faster than a gateway with a short backlog accepts."""
        for number in range(self.order.workload.concurrency):
            if number % CONNECTED_AT_ONCE == 0:
                time.sleep(SETTLE_S)
            self.connections.append(Connection(self))

    def watch(self, connection: Connection, sending: bool) -> None:
        """Hears of the connection's data, and while it is `sending` of its space."""
        number = connection.socket.fileno()
        known = self._sending.get(number)
        if known != sending:
            change = self._poll.register if known is None else self._poll.modify
            change(number, select.EPOLLIN | (select.EPOLLOUT if sending else 0))
            self._sending[number] = sending
            self._by_number[number] = connection

    def forget(self) -> None:
        """Begins to measure; faults stay."""
        self.latencies, self.firsts, self.chunks, self.reads = [], [], 0, 0

    def begin(self, requests: int) -> None:
        """Asks so often in all, each connection again as soon as it has its answer."""
        asking = self.connections[:requests]
        self._to_ask, self._open = requests - len(asking), len(asking)
        for connection in asking:
            connection.ask()

    def until(self, reached: Callable[[], bool], within_s: float = math.inf) -> None:
        """Lets the answers come until it is reached, or for so long. Raises TimeoutError past the order's limit."""
        end = time.monotonic() + within_s
        while not reached() and (left := end - time.monotonic()) > 0:
            for number, mask in self._poll.poll(min(left, 1.0)):
                self._by_number[number].ready(mask)
            if time.monotonic() > self._deadline:
                raise TimeoutError

    def all_begun(self) -> bool:
        return len(self.firsts) >= len(self.connections) or not self._open

    def all_ended(self) -> bool:
        return not self._open

    def heard(self, chunks: int, first_s: float | None) -> None:
        self.chunks += chunks
        self.reads += 1
        if first_s is not None:
            self.firsts.append(first_s)

    def ended(self, connection: Connection, latency_s: float | None, faults: Counter[str], problem: str) -> None:
        self.faults += faults
        self.problem = self.problem or problem
        if latency_s is not None:
            self.latencies.append(latency_s)
            if self._to_ask:
                self._to_ask -= 1
                return connection.ask()
        self._open -= 1
        if not self._open:
            self.fault("errors", "no connection was left to ask", self._to_ask)

    def fault(self, kind: str, problem: str, count: int = 1) -> None:
        if count:
            self.faults[kind] += count
            self.problem = self.problem or problem

    def close(self) -> None:
        """With resets, so that no port stays in TIME_WAIT."""
        for connection in self.connections:
            if connection.socket.fileno() >= 0:
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.socket.close()
        self._poll.close()

    def result(self, **measured: float) -> dict[str, Any]:
        return {
            "requests": len(self.latencies),
            "latency_s": percentiles(self.latencies),
            "first_s": percentiles(self.firsts),
            "faults": dict(self.faults),
            "problem": self.problem,
            **measured,
        }


def percentiles(values: list[float]) -> list[float]:
    """The 50th and the 99th."""
    ranked = sorted(values)
    return [ranked[min(len(ranked) - 1, len(ranked) * rank // 100)] for rank in (50, 99)] if ranked else []


# ---- measurements


def measure(order: Order) -> dict[str, Any]:
    """One workload against one gateway; what does not end within the limit is an error."""
    run = Run(order)
    try:
        return measure_window(run) if order.workload.window_s else measure_requests(run)
    except (TimeoutError, OSError) as error:
        run.fault("errors", f"not all was answered within {order.limit_s:.0f} s ({error})")
        return run.result(**Stopwatch(run).stop(), memory_kib=0)
    finally:
        run.close()


class Stopwatch:
    """What a gateway does from now on: CPU, waiting for its core, chunks and reads."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._began = self._now()

    def _now(self) -> dict[str, float]:
        pid = self._run.order.pid
        chunks = self._run.chunks if self._run.order.workload.chunks else len(self._run.latencies)
        cpu, waited = (cpu_s(pid), waited_s(pid)) if pid else (0.0, 0.0)
        return {"cpu_s": cpu, "waited_s": waited, "units": chunks, "reads": self._run.reads, "wall_s": time.monotonic()}

    def stop(self) -> dict[str, float]:
        return {name: value - self._began[name] for name, value in self._now().items()}


def measure_requests(run: Run) -> dict[str, Any]:
    """The cost from the first request to the last answer, after a round that warms up."""
    run.connect()
    warm_up(run)
    stopwatch = Stopwatch(run)
    run.begin(run.order.workload.requests)
    run.until(run.all_ended)
    time.sleep(SETTLE_S)
    return run.result(**stopwatch.stop())


def warm_up(run: Run) -> None:
    """A request on every connection, and a few more where there are few; without pauses."""
    run.request = request_of(replace(run.order, workload=replace(run.order.workload, pause_ms=0)))
    run.begin(max(len(run.connections), run.order.workload.requests // WARM_UP_SHARE))
    run.until(run.all_ended)
    time.sleep(SETTLE_S)
    run.request = request_of(run.order)
    run.forget()


def measure_window(run: Run) -> dict[str, Any]:
    """The cost of a while in which every stream is alive, and what they add to the memory by its end."""
    order = run.order
    few = Run(replace(order, workload=replace(order.workload, concurrency=4, requests=100)))
    few.connect()
    warm_up(few)
    few.close()
    time.sleep(SETTLE_S)
    idle_kib = rss_kib(order.pid) if order.pid else 0
    run.connect()
    run.begin(order.workload.requests)
    run.until(run.all_begun)
    stopwatch = Stopwatch(run)
    run.until(run.all_ended, order.workload.window_s)
    measured = stopwatch.stop()
    added_kib = rss_kib(order.pid) - idle_kib if order.pid else 0
    run.until(run.all_ended)
    run.faults += few.faults
    return run.result(**measured, memory_kib=added_kib)


def main() -> None:
    raise_file_limit()
    for line in sys.stdin:
        given = json.loads(line)
        order = Order(**given | {"workload": Workload(**given["workload"] | {"targets": ()})})
        sys.stdout.write(json.dumps(measure(order)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
