"""Kept responses as a client meets them: a gateway with one account before a scripted Gemini, and how it is asked."""

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp.test_utils import TestClient
from fake_gemini import FakeGemini
from golden import frames

import antigravity_proxy as agproxy

Start = Callable[..., Awaitable[TestClient]]
ASK: dict[str, Any] = {"model": "gpt-4o", "input": "first"}
GEMINI_3 = "gemini-3-pro-preview"
TOOL = {"type": "function", "name": "ls", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}


def starter(gemini: FakeGemini, aiohttp_client: Any) -> Start:
    """Starts gateways before that Gemini, with one account and the settings that are named."""

    async def start(drain_s: float = 0.0, **settings: Any) -> TestClient:
        account = agproxy.Account("a", "k", gemini.url)
        return await aiohttp_client(agproxy.create_app(agproxy.Config((account,), **settings), drain_s=drain_s))

    return start


async def ask(client: TestClient, **more: Any) -> Any:
    response = await client.post("/v1/responses", json=ASK | more)
    return await response.json()


async def ask_stream(client: TestClient, **more: Any) -> list[Any]:
    response = await client.post("/v1/responses", json=ASK | {"stream": True} | more)
    return frames(await response.text())


async def fetch(client: TestClient, path: str, method: str = "GET") -> tuple[int, Any]:
    response = await client.request(method, f"/v1/responses/{path}")
    return response.status, await response.json()
