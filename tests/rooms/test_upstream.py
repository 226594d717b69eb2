"""What the upstream's shell keeps, and for how long; which answers belong together."""

import asyncio
import gc
import json
import time
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from conftest import HELLO, until
from fake_gemini import FakeGemini, error, said

import antigravity_proxy as agproxy

FLASH = "gemini-2.5-flash"
SLOW = error(429, "RESOURCE_EXHAUSTED", "Please retry in 60s.")
EMBEDS = {"supportedGenerationMethods": ["embedContent"]}
EMBEDDERS = ("gemini-embedding-001", "gemini-embedding-2")


def config_of(gemini: FakeGemini, **settings: Any) -> agproxy.Config:
    account = agproxy.Account("a", "key-a", gemini.url, max_concurrency=2)
    return agproxy.Config((account,), **{"max_wait_s": 0, **settings})


@pytest.fixture
async def upstream(gemini: FakeGemini) -> AsyncIterator[agproxy.Upstream]:
    made = agproxy.Upstream(config_of(gemini))
    yield made
    await made.close()


def trace_of(upstream: agproxy.Upstream, model: str = FLASH) -> agproxy.Trace:
    return agproxy.Trace(upstream._config, "1", "r", time.monotonic(), model=model, mapped_model=model)


class Messages(list[agproxy.Message]):
    """What a weak reference can be had of, as of a tuple it cannot."""


async def test_an_account_that_rests_keeps_no_body(upstream: agproxy.Upstream, gemini: FakeGemini) -> None:
    gemini.script = [SLOW]
    messages: Any = Messages(agproxy.parse_chat(HELLO)[0].messages)
    kept = weakref.ref(messages)
    with pytest.raises(agproxy.PoolExhausted):
        await upstream.ask([agproxy.Request(FLASH, messages)], trace_of(upstream))
    del messages
    gc.collect()
    assert "is in cooldown for" in upstream.pool.status(time.time())[0]["models"][0]["state"]
    assert kept() is None


async def test_an_answer_that_failed_ends_before_its_connection(gemini: FakeGemini) -> None:
    upstream = agproxy.Upstream(config_of(gemini))
    gemini.script = [[*said("half", reason=None), {"error": {"code": 503, "message": "Full."}}]]
    gemini.pause_s = 0.1
    answer: Any = await upstream.ask(agproxy.parse_chat(HELLO | {"stream": True}), trace_of(upstream))
    gemini.pause_s = 20
    async with asyncio.timeout(5):
        seen = [event async for events in answer for event in events]
    assert [type(event) for event in seen[-2:]] == [agproxy.PartEnd, agproxy.Failed]
    assert answer.last == seen[-1]
    answer.close()
    gemini.go_on.set()
    await upstream.close()


@pytest.mark.parametrize("steps", range(6))
async def test_who_leaves_twice_leaves_no_answer_behind(
    steps: int, upstream: agproxy.Upstream, gemini: FakeGemini
) -> None:
    gemini.script = [said("x")]
    gemini.pause_s = 20
    asked = upstream._begin

    async def begin(request: agproxy.Request, trace: agproxy.Trace) -> agproxy.Answer:
        await asyncio.sleep(0 if request.messages else 20)
        return await asked(request, trace)

    upstream._begin = begin  # type: ignore[method-assign]
    requests = [*agproxy.parse_chat(HELLO), agproxy.Request(FLASH, ())]
    task = asyncio.create_task(upstream.ask(requests, trace_of(upstream)))
    await until(lambda: gemini.bodies)
    await asyncio.sleep(0.05)
    task.cancel()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gemini.go_on.set()
    await until(lambda: upstream.pool.status(time.time())[0]["in_flight"] == 0, 1)


async def test_names_that_clients_invent_are_not_kept(
    upstream: agproxy.Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        for number in range(3):
            assert await upstream.catalog.resolve(f"{FLASH}-preview-{number:02d}") == FLASH
    assert len([line for line in caplog.messages if "is not listed" in line]) == 3
    assert upstream.catalog._warn_once.cache_info().maxsize == 1024


@pytest.mark.parametrize("listed", [{"models": ["x"]}, {"models": [{"name": 5, **EMBEDS}]}, {"models": 5}, [], {}])
async def test_a_list_that_is_none_is_told(listed: Any, upstream: agproxy.Upstream, gemini: FakeGemini) -> None:
    gemini.models = (200, listed)
    with pytest.raises(agproxy.UpstreamBroken, match="is not Gemini"):
        await upstream.catalog.models_of(upstream.pool.accounts[0])


async def test_a_reload_keeps_what_serves_on_and_nothing_more(gemini: FakeGemini) -> None:
    config = config_of(gemini)
    upstream = agproxy.Upstream(config)
    gemini.echo = True
    for number in range(5):
        upstream.adopt(replace(config, heartbeat_s=number + 1.0))
        answer = await upstream.ask(agproxy.parse_chat(HELLO), trace_of(upstream))
        answer.close()
    assert len(upstream.wire._opened) == 1
    upstream.adopt(replace(config, timeouts=agproxy.Timeouts(idle_s=5)))
    assert upstream.wire.transport_to(config.accounts[0]) not in list(upstream.wire._opened.values())[:1]
    await upstream.close()


async def test_a_list_that_was_asked_for_before_a_reload_is_not_the_new_one_s(
    upstream: agproxy.Upstream, gemini: FakeGemini
) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def models_of(account: agproxy.Account) -> tuple[str, ...]:
        if not asked.is_set():
            asked.set()
            await go_on.wait()
            return ("gemini-1-old",)
        return ("gemini-9-new",)

    upstream.catalog.models_of = models_of  # type: ignore[method-assign]
    waiting = asyncio.create_task(upstream.catalog.listed())
    await asked.wait()
    upstream.adopt(config_of(gemini))
    assert await upstream.catalog.listed() == ("gemini-9-new",)
    go_on.set()
    assert await waiting == ("gemini-9-new",)


@pytest.mark.parametrize(
    ("fault", "for_s", "kept"),
    [(agproxy.UpstreamBroken("No."), agproxy.MODELS_RETRY_S, True), (agproxy.AccountBarred("No."), 3600, False)],
)
async def test_an_account_that_fails_to_list_takes_no_model_away(
    fault: agproxy.UpstreamError, for_s: float, kept: bool, gemini: FakeGemini
) -> None:
    config = config_of(gemini)
    upstream = agproxy.Upstream(replace(config, accounts=(config.accounts[0], agproxy.Account("b", "key-b"))))
    only_b: Any = ("gemini-4-pro",)

    async def models_of(account: agproxy.Account) -> tuple[str, ...]:
        if account.name == "b" and only_b is None:
            raise fault
        return only_b if account.name == "b" else ("gemini-3-pro",)

    upstream.catalog.models_of = models_of  # type: ignore[method-assign]
    assert await upstream.catalog.resolve("gemini-4-pro") == "gemini-4-pro"
    only_b, upstream.catalog._fresh_until = None, 0.0
    await upstream.catalog.listed()
    assert upstream.catalog._listing
    await upstream.catalog._listing
    assert await upstream.catalog.resolve("gemini-4-pro") == ("gemini-4-pro" if kept else "gemini-3-pro")
    assert for_s - 1 < upstream.catalog._fresh_until - time.monotonic() <= for_s
    await upstream.close()


async def test_vectors_of_one_answer_are_of_one_model(gemini: FakeGemini) -> None:
    config = config_of(gemini, fallback={EMBEDDERS[0]: (EMBEDDERS[1],)})
    upstream = agproxy.Upstream(config)
    asked: list[tuple[str, int]] = []

    async def call(_: agproxy.Account, model: str, __: str, body: bytes) -> dict[str, Any]:
        requests = json.loads(body)["requests"]
        asked.append((model, len(requests)))
        if asked[-1] == (EMBEDDERS[0], 100) and len(asked) == 2:
            raise agproxy.RateLimited("Slow down.", retry_after_s=60)
        return {"embeddings": [{"values": [EMBEDDERS.index(model), 1]} for _ in requests]}

    upstream.wire.call = call  # type: ignore[method-assign]
    request = agproxy.parse_embeddings({"model": EMBEDDERS[0], "input": ["x"] * 250})
    trace = trace_of(upstream, EMBEDDERS[0])
    vectors, _ = await upstream.embed(request, trace)
    assert (trace.mapped_model, len(vectors), len({tuple(vector) for vector in vectors})) == (EMBEDDERS[1], 250, 1)
    await upstream.close()


@pytest.mark.parametrize(
    ("beside", "tokens"),
    [({}, 10_100), ({"usageMetadata": {"promptTokenCount": 7}}, 14), ({"usageMetadata": 5}, 10_100)],
)
async def test_tokens_of_embeddings_are_counted_for_the_limits(
    beside: Any, tokens: int, upstream: agproxy.Upstream, gemini: FakeGemini
) -> None:
    gemini.beside = beside
    request = agproxy.parse_embeddings({"model": EMBEDDERS[0], "input": ["x" * 399] * 101})
    assert (await upstream.embed(request, trace_of(upstream, EMBEDDERS[0])))[1] == tokens
    assert upstream.pool.status(time.time())[0]["models"][0]["tokens_per_day"] == tokens


async def test_a_count_that_is_none_is_no_zero(gemini: FakeGemini, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGemini, "count", lambda *_: web.Response(text="<html>"))
    upstream = agproxy.Upstream(config_of(gemini))
    with pytest.raises(agproxy.PoolExhausted, match="cannot be understood"):
        await upstream.count(agproxy.parse_chat(HELLO)[0], trace_of(upstream))
    await upstream.close()
