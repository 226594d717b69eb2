"""Many streams at once before an upstream that fails at random: is each intact, and is the gateway as small afterwards?

    python tests/laws/soak.py [--streams N] [--seconds S] [--seed S]

Each stream's text, pace and fault follow from the number in its model's name, so that the upstream and the client know
them both, and what the client got is compared byte for byte. Exit code 1 where a stream was not what it should be, or
where tasks, files or memory did not come down again.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import aiohttp

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import antigravity_proxy as agproxy

FAULTS = ("none",) * 14 + ("cut", "reset", "garbage", "error", "silence", "busy", "leaves")
ACCOUNTS = 8
REPORT_S = 0.2
SETTLED_S = 1.0
REQUESTS_MAX = 1 << 20
"""No bound: a client's next request may come before the gateway has ended its last."""


class Plan(NamedTuple):
    """What the upstream says to one request, and where it goes wrong."""

    texts: list[str]
    fault: str
    at: int
    pause_s: float


def plan_of(number: int) -> Plan:
    r = Random(number)
    texts = ["".join(r.choices('abc äöü 名\n"\\\t\u2028', k=r.randint(1, 60))) for _ in range(r.randint(1, 40))]
    return Plan(texts, r.choice(FAULTS), r.randint(1, len(texts)), r.choice((0.0, 0.01, 0.03, 0.05)))


def idle_s_for(streams: int) -> float:
    """The silence that the gateway bears: more than the upstream's own, which has one core for so many streams."""
    return 1 + streams / 500


# ---- the upstream


def frame(text: str, reason: str | None = None) -> bytes:
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}
    data = {"candidates": [candidate | ({"finishReason": reason} if reason else {})]}
    line = b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\r\n\r\n"
    return b"%x\r\n%b\r\n" % (len(line), line)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ERROR = b'data: {"error":{"code":500,"status":"INTERNAL","message":"Broken."}}\r\n\r\n'
BUSY = b'{"error":{"code":503,"status":"UNAVAILABLE","message":"Busy."}}'


async def answer(busy: set[int], idle_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of the gateway's, request after request; `busy` are the numbers that were refused once."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            number = re.search(rb"gemini-n(\d+)", head)
            if number is None:
                writer.write(b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}")
            elif not await say(plan_of(int(number[1])), writer, busy, int(number[1]), idle_s):
                break
    writer.close()


async def say(plan: Plan, writer: asyncio.StreamWriter, busy: set[int], number: int, idle_s: float) -> bool:
    """Whether the connection may go on."""
    if plan.fault == "busy" and number not in busy:
        busy.add(number)
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n" % len(BUSY) + BUSY)
        return True
    writer.write(HEAD)
    for place, text in enumerate(plan.texts, 1):
        writer.write(frame(text))
        await writer.drain()
        await asyncio.sleep(plan.pause_s)
        if place == plan.at and plan.fault in ("cut", "reset", "garbage", "error", "silence"):
            return await go_wrong(plan.fault, writer, idle_s)
    writer.write(frame("", "STOP") + b"0\r\n\r\n")
    await writer.drain()
    return True


async def go_wrong(fault: str, writer: asyncio.StreamWriter, idle_s: float) -> bool:
    if fault == "error":
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(ERROR), ERROR))
        await writer.drain()
        return True
    if fault == "reset":
        writer.transport.abort()
    if fault == "garbage":
        writer.write(b"zz\r\nno chunk\r\n")
    if fault == "silence":
        await asyncio.sleep(2 * idle_s)
    return False


# ---- the clients


async def check(session: aiohttp.ClientSession, url: str, number: int) -> str:
    """Asks for one stream; its fault, or what was wrong with what came: all of it, or its beginning and an error."""
    plan = plan_of(number)
    body = {"model": f"gemini-n{number}", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        whole = plan.fault in ("none", "busy", "leaves")
        if response.status != 200 and not whole and (await response.json())["error"]["code"] == "upstream_error":
            return f"{plan.fault} at once"  # it came with the first words, before anything was said
        if response.status != 200:
            return f"WRONG {plan.fault}: HTTP {response.status} {(await response.text())[:200]}"
        data = bytearray()
        async for piece in response.content.iter_any():
            data += piece
            if plan.fault == "leaves" and data.count(b"\n\n") > plan.at:
                return "leaves"
    frames = [one.removeprefix("data: ") for one in data.decode().split("\n\n") if one and not one.startswith(":")]
    done = frames[-1] == "[DONE]"
    chunks = [json.loads(one) for one in frames if one != "[DONE]"]
    got = "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks if one.get("choices"))
    said = "".join(plan.texts if whole else plan.texts[: plan.at])
    if not said.startswith(got) or (whole and got != said) or done != whole or ("error" in chunks[-1]) == whole:
        return f"WRONG {plan.fault}: {number}: {len(got)} of {len(said)} characters, ends with {frames[-1][:200]}"
    return plan.fault


async def keep_asking(url: str, streams: int, seconds: float, seed: int) -> Counter[str]:
    """So many streams at once, each followed by the next, until the time is over."""
    outcomes: Counter[str] = Counter()
    until, numbers = time.monotonic() + seconds, iter(range(seed * 10**9, (seed + 1) * 10**9))
    connector = aiohttp.TCPConnector(limit=0)

    async def ask(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < until:
            outcomes[await check(session, url, next(numbers))] += 1

    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
        await asyncio.gather(*(ask(session) for _ in range(streams)))
    return outcomes


# ---- the gateway, as a process of its own that tells how large it is


async def serve(url: str, idle_s: float) -> None:
    accounts = tuple(agproxy.Account(f"a{number}", "planted-key", url) for number in range(ACCOUNTS))
    timeouts = agproxy.Timeouts(idle_s=idle_s)
    config = agproxy.Config(accounts, timeouts=timeouts, heartbeat_s=0.5, max_requests=REQUESTS_MAX)
    agproxy.raise_file_limit()
    complaints: list[logging.LogRecord] = []
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: complaints.append(record) is None)
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    async with contextlib.AsyncExitStack() as stack:
        port = await agproxy.listen(agproxy.create_app(config), "127.0.0.1", 0, stack)
        while True:
            tell({"port": port, "tasks": len(asyncio.all_tasks()), "complaints": len(complaints)})
            await asyncio.sleep(REPORT_S)


def tell(state: dict[str, int]) -> None:
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    sys.stdout.write(json.dumps(state | {"rss_mib": rss, "fds": len(os.listdir("/proc/self/fd"))}) + "\n")
    sys.stdout.flush()


@contextlib.asynccontextmanager
async def gateway(url: str, streams: int) -> AsyncIterator[asyncio.StreamReader]:
    """The lines in which a gateway before this upstream tells how it is."""
    command = [sys.executable, __file__, "--serve", url, "--streams", str(streams)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, limit=1 << 22)
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.kill()
        await process.wait()


async def told(lines: asyncio.StreamReader) -> dict[str, int]:
    """The newest line."""
    line = await lines.readline()
    while True:
        try:
            line = await asyncio.wait_for(lines.readline(), REPORT_S / 2)
        except TimeoutError:
            return dict(json.loads(line))


async def settled(lines: asyncio.StreamReader, tasks: int, idle_s: float) -> dict[str, int]:
    """How the gateway is once it has no more tasks than that, or after all the time that its last ones may take."""
    until = time.monotonic() + SETTLED_S + 2 * idle_s
    while (state := await told(lines))["tasks"] > tasks and time.monotonic() < until:
        pass
    return state


async def soak(streams: int, seconds: float, seed: int = 0, every_s: float = 30.0) -> list[str]:
    """Runs it, and prints what it sees; what is wrong."""
    play = functools.partial(answer, set(), idle_s_for(streams))
    async with await asyncio.start_server(play, "127.0.0.1", 0, backlog=4096) as upstream:
        url = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}"
        mine = asyncio.all_tasks()
        async with gateway(url, streams) as lines:
            found = await watch(lines, streams, seconds, seed, every_s)
        await asyncio.gather(*(asyncio.all_tasks() - mine))  # the ends of the upstream's connections
        return found


async def watch(lines: asyncio.StreamReader, streams: int, seconds: float, seed: int, every_s: float) -> list[str]:
    outcomes: Counter[str] = Counter()
    idle = await told(lines)
    url = f"http://127.0.0.1:{idle['port']}"
    await keep_asking(url, streams, min(5.0, seconds), seed + 1000)  # what is loaded and kept once
    before, began = await settled(lines, idle["tasks"], idle_s_for(streams)), time.monotonic()
    while (left := seconds - (time.monotonic() - began)) > 0:
        outcomes += await keep_asking(url, streams, min(left, every_s), seed)
        seed += 1
        say_state(time.monotonic() - began, outcomes, await told(lines))
    after = await settled(lines, idle["tasks"], idle_s_for(streams))
    say_state(time.monotonic() - began, outcomes, after)
    wrong = [f"{count} x {outcome}" for outcome, count in outcomes.items() if outcome.startswith("WRONG")]
    bounds = {
        "tasks": before["tasks"] + 2,
        "fds": before["fds"] + 16 + streams // 4,
        "rss_mib": before["rss_mib"] * 1.1 + 10,
        "complaints": 0,
    }
    grown = [f"{name}: {before[name]} before, {after[name]} after" for name in bounds if after[name] > bounds[name]]
    sys.stdout.write(f"before {before}, after {after}\n")
    return wrong + grown


def say_state(seconds: float, outcomes: Counter[str], state: dict[str, int]) -> None:
    counts = ", ".join(f"{count} {outcome[:60]}" for outcome, count in sorted(outcomes.items()))
    sys.stdout.write(
        f"{seconds:5.0f} s  {state['rss_mib']} MiB, {state['fds']} files, {state['tasks']} tasks; {counts}\n"
    )
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, idle_s_for(given.streams)))
    agproxy.raise_file_limit()
    wrong = asyncio.run(soak(given.streams, given.seconds, given.seed))
    sys.stdout.write("\n".join([*wrong[:20], f"{len(wrong)} findings", ""]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
