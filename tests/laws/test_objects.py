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


def ours() -> Counter[str]:
    """How many instances there are of each class of the file's."""
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    return Counter(kind.__qualname__ for kind in kinds if kind.__module__ == agproxy.__name__)


async def test_an_open_stream_holds_few_objects(gemini: FakeGemini) -> None:
    """Of one plain streamed chat, while it lasts (both ends are real sockets):

    LIST
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
        await asyncio.sleep(1)
        print("left", ours() - before)
    a_stream = {kind: count / STREAMS for kind, count in more.most_common() if count >= STREAMS / 2}
    print(a_stream, sum(more.values()) / STREAMS)
    assert sum(more.values()) / STREAMS <= OBJECTS_MAX, a_stream
