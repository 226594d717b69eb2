"""A request through a proxy: CONNECT on loopback, TLS to a Gemini whose name only the proxy knows."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp import web
from conftest import HELLO, Serve
from fake_gemini import FakeGemini, said

import antigravity_proxy as agproxy


class ConnectProxy:
    """Sends every CONNECT to one port; `asked` holds the hosts and whether credentials came with them."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.asked: list[tuple[str, bool]] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append((head.split()[1], "Proxy-Authorization: Basic" in head))
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        self.writers += [writer, there_writer]
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    async def close(self) -> None:
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def gemini(tmp_path: Path) -> AsyncIterator[FakeGemini]:
    fake = FakeGemini()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("gemini.test").configure_cert(context)
    runner = web.AppRunner(fake.app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    fake.url = f"https://gemini.test:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


@pytest.fixture
async def proxy(gemini: FakeGemini) -> AsyncIterator[tuple[ConnectProxy, str]]:
    proxy = ConnectProxy(int(gemini.url.rsplit(":", 1)[1]))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    yield proxy, f"me:s3cret@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await proxy.close()


@pytest.mark.parametrize("by", ["file", "environment"])
async def test_a_request_goes_through_the_proxy(
    by: str, serve: Serve, gemini: FakeGemini, proxy: tuple[ConnectProxy, str], tmp_path: Path
) -> None:
    address = f"http://{proxy[1]}"
    (tmp_path / "a.yaml").write_text(
        f"accounts: [{{name: a, api_key: k, base_url: '{gemini.url}'}}]\n"
        + (f"proxy: {{upstream_proxy: '{address}'}}\n" if by == "file" else "")
    )
    env = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")} | ({"HTTPS_PROXY": address} if by == "environment" else {})
    served = await serve("--accounts", "a.yaml", "--port", "0", **env)
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [said("through")]
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{base_url}/chat/completions", json=HELLO)
        assert (await response.json())["choices"][0]["message"]["content"] == "through"
    assert set(proxy[0].asked) == {(gemini.url.removeprefix("https://"), True)}
    assert await served.wait_for(r"\n  proxy +(\S+)") == f"http://127.0.0.1:{proxy[1].rsplit(':', 1)[1]}"
    assert "s3cret" not in served.said


async def test_no_proxy_excepts_a_host(
    serve: Serve, gemini: FakeGemini, proxy: tuple[ConnectProxy, str], tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(f"accounts: [{{name: a, api_key: k, base_url: '{gemini.url}'}}]\n")

    async def ask(excepted: str) -> int:
        env = {"HTTPS_PROXY": f"http://{proxy[1]}", "NO_PROXY": excepted}
        served = await serve("--accounts", "a.yaml", "--port", "0", **env)
        await served.wait_for(r"(default) ")
        base_url = await served.wait_for(r"OPENAI_BASE_URL=(\S+)")
        async with aiohttp.ClientSession() as session, session.post(f"{base_url}/chat/completions", json=HELLO) as got:
            return got.status

    assert await asyncio.gather(*(ask(excepted) for excepted in ("gemini.test", "*", ".test"))) == [502] * 3
    assert proxy[0].asked == []


async def test_a_dead_proxy_is_named(serve: Serve, gemini: FakeGemini, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"accounts: [{{name: a, api_key: k, base_url: '{gemini.url}'}}]\n")
    served = await serve("--accounts", "a.yaml", "--port", "0", HTTPS_PROXY="http://127.0.0.1:9")
    base_url = await served.wait_for(r"base URL +(\S+)")
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{base_url}/chat/completions", json=HELLO)
        assert response.status == 502
        assert "Check proxy.upstream_proxy or HTTPS_PROXY" in (await response.json())["error"]["message"]


async def test_an_account_may_have_a_proxy_of_its_own() -> None:
    own = agproxy.Account("a", "k", "https://g.example", proxy="http://p.example:1")
    accounts = (own, agproxy.Account("b", "k", "https://g.example"), agproxy.Account("c", "k", "http://127.0.0.1:1"))
    upstream = agproxy.Upstream(agproxy.Config(accounts, upstream_proxy="http://q.example:2"))
    assert [upstream.wire.transport_to(account).proxy for account in accounts] == [
        "http://p.example:1",
        "http://q.example:2",
        None,
    ]
    await upstream.close()
