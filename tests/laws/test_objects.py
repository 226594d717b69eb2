"""How little a stream holds: every object of ours that a stream keeps is one that a reader must know."""

import asyncio
import contextlib
import gc
from collections import Counter
from typing import Any

import aiohttp
from conftest import HELLO, until
from fake_gemini import FakeGemini, said

import antigravity_proxy as agproxy

STREAMS = 100
OBJECTS_MAX = 15
STAY = {"Trace", "Usage", "Decision", "Connection", "Unframer"}  # for `agproxy why`, and for the next request


def ours() -> Counter[str]:
    """How many instances there are of each class of the file's."""
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    return Counter(kind.__qualname__ for kind in kinds if kind.__module__ == agproxy.__name__)


async def test_an_open_stream_holds_few_objects(gemini: FakeGemini) -> None:
    """What one plain streamed chat holds while it lasts, through the product's own listener:

    - of the client's side: ClientConnection, EventStream;
    - of the request: Exchange, Trace, and its Decision, which stay for `agproxy why`;
    - of the answer: Answer, ChatRenderer, and the TextDelta that was sent last;
    - of Gemini's bytes: GeminiReader, SseSplitter, Candidate;
    - of Gemini's side: Lease, DirectIncoming, Connection and Unframer, of which the last two are used again.
    """
    gemini.script = [said("a", "b") for _ in range(STREAMS + 1)]
    config = agproxy.Config((agproxy.Account("a", "k", gemini.url),))
    async with contextlib.AsyncExitStack() as stack:
        port = await agproxy.listen(agproxy.create_app(config), "127.0.0.1", 0, stack)
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))

        async def ask() -> Any:
            answer = await session.post(url, json=HELLO | {"stream": True})
            while b'"content":"a"' not in await answer.content.readuntil(b"\n\n"):
                pass
            return answer

        async with await ask() as first:  # what a gateway makes once is made by now
            await first.text()
        await asyncio.sleep(0.1)
        before = ours()
        gemini.pause_s = 60
        answers = await asyncio.gather(*(ask() for _ in range(STREAMS)))
        more = ours() - before
        gemini.go_on.set()
        for answer in answers:
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        del answers, answer
        await until(lambda: {kind for kind, count in (ours() - before).items() if count > 1} <= STAY)
    a_stream = {kind: count / STREAMS for kind, count in more.most_common()}
    assert round(sum(more.values()) / STREAMS) <= OBJECTS_MAX, a_stream
