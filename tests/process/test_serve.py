"""The served process, as a user starts it: banner, log lines, signals and drain, refusals, what it keeps."""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import HELLO, Serve, until, write_accounts
from fake_gemini import FakeGemini, said

import antigravity_proxy as agproxy


@pytest.fixture
def file(tmp_path: Path, gemini: FakeGemini) -> str:
    return write_accounts(tmp_path, gemini)


async def test_a_signal_lets_running_answers_finish(serve: Serve, file: str, gemini: FakeGemini) -> None:
    served = await serve("--accounts", file, "--port", "0")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [said("a", "b", "c")]
    gemini.pause_s = 20
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{base_url}/chat/completions", json=HELLO | {"stream": True}) as response:
            assert await response.content.readline()
            served.process.send_signal(signal.SIGTERM)
            await served.wait_for("(agproxy stops)")
            gemini.go_on.set()
            assert (await response.text()).endswith("data: [DONE]\n\n")
        assert await served.ended() == 0
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{base_url}/models")


ASKED: dict[str, Any] = {
    "chat/completions": HELLO,
    "responses": {"model": "gpt-4o", "input": "hi"},
    "completions": {"model": "gpt-4o", "prompt": "hi"},
}


@pytest.mark.parametrize(
    ("stream", "begun"), [(True, True), (True, False), (False, False)], ids=["begun", "silent", "whole"]
)
async def test_what_takes_longer_than_the_drain_is_told_so(
    begun: bool, stream: bool, serve: Serve, file: str, gemini: FakeGemini
) -> None:
    served = await serve("--accounts", file, "--port", "0", "--drain-s", "0.2")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [said(*"abcdefghijklmnop") for _ in ASKED]
    gemini.pause_s, gemini.silence_s = 0.4, 0.0 if begun else 20.0
    async with aiohttp.ClientSession() as session:
        asking = [
            asyncio.create_task(session.post(f"{base_url}/{route}", json=body | {"stream": stream}))
            for route, body in ASKED.items()
        ]
        await until(lambda: len(gemini.bodies) == len(ASKED) and (all(one.done() for one in asking) or not begun))
        served.process.send_signal(signal.SIGTERM)
        for route, response in zip(ASKED, await asyncio.gather(*asking), strict=True):
            text = await response.text()
            assert response.status == (200 if stream and begun else 503)
            assert "The gateway was stopped before the answer was whole." in text
            assert "[DONE]" not in text or route == "responses"
            assert ("event: response.failed" in text) == (route == "responses" and stream and begun)
    assert await served.ended() == 0


async def test_while_it_drains_it_says_so_and_takes_nothing_new(serve: Serve, file: str, gemini: FakeGemini) -> None:
    served = await serve("--accounts", file, "--port", "0")
    base_url = await served.wait_for(r"base URL +(\S+)")
    port = int(base_url.split(":")[2].removesuffix("/v1"))
    health = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    gemini.script, gemini.pause_s = [said("a", "b", "c")], 20
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(health)
    assert b" 200 " in await reader.readuntil(b"}")
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{base_url}/chat/completions", json=HELLO | {"stream": True})
        async with response:
            served.process.send_signal(signal.SIGTERM)
            await served.wait_for("(agproxy stops)")
            writer.write(health)
            assert b" 503 " in await reader.readuntil(b"}}")
            assert await reader.read() == b""
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get(f"{base_url}/models")
            gemini.go_on.set()
            assert (await response.text()).endswith("data: [DONE]\n\n")
    writer.close()
    assert await served.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_at_once(
    number: signal.Signals, serve: Serve, file: str, gemini: FakeGemini
) -> None:
    served = await serve("--accounts", file, "--port", "0")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script, gemini.silence_s = [said("a")], 20
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(f"{base_url}/chat/completions", json=HELLO))
        await until(lambda: gemini.bodies)
        served.process.send_signal(number)
        await served.wait_for("(agproxy stops)")
        served.process.send_signal(number)
        assert await asyncio.wait_for(served.ended(), 1) == -number
        with pytest.raises(aiohttp.ClientError):
            await asking


def has_open(pid: int, path: Path) -> bool:
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{name}") == str(path):
                return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which files another process has open")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_before_it_listens_ends_it_in_order(
    number: signal.Signals, serve: Serve, file: str, tmp_path: Path
) -> None:
    store = tmp_path / "agproxy" / "state.sqlite3"
    store.parent.mkdir()
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as held:
        held.execute("BEGIN EXCLUSIVE")  # whoever starts now waits for what the store has kept
        served = await serve("--accounts", file, "--port", "0")
        await until(lambda: has_open(served.process.pid, store))
        served.process.send_signal(number)
    assert await served.ended() == 0
    assert "Traceback" not in served.said and "cannot be used" not in served.said


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")
async def test_a_stop_after_no_file_was_left_is_in_order(serve: Serve, file: str, gemini: FakeGemini) -> None:
    served = await serve("--accounts", file, "--port", "0")
    base_url = await served.wait_for(r"OPENAI_BASE_URL=(\S+)")
    gemini.script, gemini.pause_s = [said("a", "b")], 20
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{base_url}/chat/completions", json=HELLO | {"stream": True})
        await response.content.readline()
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (40, 40))
        port = int(base_url.split(":")[2].removesuffix("/v1"))
        crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        await asyncio.sleep(0.3)
        for _, writer in crowd:
            writer.close()
        served.process.terminate()
        ended = asyncio.create_task(served.ended())
        await asyncio.sleep(1.5)
        gemini.go_on.set()
        assert (await response.text()).endswith("data: [DONE]\n\n")
        assert await ended == 0
    assert "Traceback" not in served.said


async def test_the_start_says_where_and_for_whom_it_serves(serve: Serve, file: str, tmp_path: Path) -> None:
    os.chmod(file, 0o600)
    served = await serve("--accounts", file, "--port", "0")
    base_url = await served.wait_for(r"OPENAI_BASE_URL=(\S+)")
    host = base_url.removeprefix("http://").removesuffix("/v1")
    assert int(host.removeprefix("127.0.0.1:")) > 0
    assert served.said.splitlines() == [
        f"agproxy {agproxy.__version__} listens on {host}",
        f"  base URL  {base_url}",
        "  accounts  2 (a, b)",
        "  auth      off",
        "  default   none: unknown model names are a 404",
        "  at once   1000 requests (proxy.max_requests)",
        f"  store     {tmp_path}/agproxy/state.sqlite3 (responses; proxy.store)",
        f'  export OPENAI_BASE_URL={base_url} OPENAI_API_KEY="unused"',
    ]


async def test_systemd_is_told(serve: Serve, file: str, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        served = await serve("--accounts", file, "--port", "0", NOTIFY_SOCKET=str(tmp_path / "notify"))
        await served.wait_for(r"base URL +(\S+)")
        assert await asyncio.to_thread(systemd.recv, 99) == b"READY=1"
        served.process.terminate()
        assert await asyncio.to_thread(systemd.recv, 99) == b"STOPPING=1"
        assert await served.ended() == 0


async def test_the_log_as_json(serve: Serve, file: str, gemini: FakeGemini) -> None:
    served = await serve("--accounts", file, "--port", "0", "--log-format", "json")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [said("x")]
    async with aiohttp.ClientSession(headers={"X-Request-Id": "mine-1"}) as session:
        await (await session.post(f"{base_url}/chat/completions", json=HELLO | {"stream": True})).read()
    line = json.loads(await served.wait_for(r"(\{.+\})\n"))
    assert line["client_id"] == "mine-1"
    assert (line["route"], line["mapped_model"], line["account"]) == ("chat/completions", "gemini-2.5-flash", "a")
    assert (line["status"], line["attempts"], line["tokens"]) == (200, 1, "3+4")
    assert 0 <= line["first_ms"] <= line["ms"]
    assert list(line) == [
        *("time", "level", "id", "client_id", "route", "model", "mapped_model", "account", "attempts", "status"),
        *("first_ms", "ms", "tokens"),
    ]


async def test_the_log_line_begins_with_the_id_that_the_client_is_told(
    serve: Serve, file: str, gemini: FakeGemini
) -> None:
    served = await serve("--accounts", file, "--port", "0")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [said("x")]
    async with aiohttp.ClientSession() as session:
        answer = await session.post(f"{base_url}/chat/completions", json=HELLO)
        refused = await session.post(f"{base_url}/chat/completions", json={})
        await answer.read()
    for id, rest in (
        (answer.headers["X-Request-Id"], r"gpt-4o -> gemini-2\.5-flash account=a attempts=1 status=200"),
        (refused.headers["X-Request-Id"], r"attempts=0 status=400"),
    ):
        assert await served.wait_for(rf"\d ({id} chat/completions {rest}) ")


async def test_nothing_of_a_server_is_loaded_once_it_listens(serve: Serve) -> None:
    served = await serve("--demo", "--port", "0", PYTHONPROFILEIMPORTTIME="1", AIOHTTP_NO_EXTENSIONS="1")
    base_url = await served.wait_for(r"base URL +(\S+)")
    asked = HELLO | {"messages": [{"role": "user", "content": "hi"}]}
    async with aiohttp.ClientSession() as session:
        for stream in (True, False):
            async with session.post(f"{base_url}/chat/completions", json=asked | {"stream": stream}) as response:
                assert response.status == 200
                await response.read()
    served.process.terminate()
    assert await served.ended() == 0
    before, _, after = served.said.partition("base URL")
    assert "aiohttp.web_app" in before
    assert "aiohttp" not in after and "asyncio" not in after
    assert before.count("Warning: aiohttp's extensions in C are missing") == 1


async def test_a_server_with_extensions_is_not_warned_about(serve: Serve) -> None:
    served = await serve("--demo", "--port", "0")
    await served.wait_for(r"base URL +(\S+)")
    assert "Warning" not in served.said


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")
async def test_no_file_for_another_connection_is_told_once_and_passes(serve: Serve) -> None:
    served = await serve("--demo", "--port", "0")
    base_url = await served.wait_for(r"base URL +(\S+)")
    resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (40, 40))
    port = int(base_url.split(":")[2].removesuffix("/v1"))
    flood = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
    await asyncio.sleep(1.5)  # asyncio tries again after a second
    for _, writer in flood:
        writer.close()
    async with aiohttp.ClientSession() as session:
        for _ in range(50):  # uvloop still closes some connections for a moment
            with contextlib.suppress(aiohttp.ServerDisconnectedError):
                response = await session.post(f"{base_url}/chat/completions", json=HELLO)
                break
            await asyncio.sleep(0.1)
        assert (response.status, "hi" in await response.text()) == (200, True)
    served.process.terminate()
    assert await served.ended() == 0
    told = 1 if importlib.util.find_spec("uvloop") is None else 0  # uvloop closes what is too much
    assert served.said.count("no file is left for another connection; raise ulimit -n") == told
    assert "Traceback" not in served.said


async def test_a_taken_port_is_said(serve: Serve, file: str) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        served = await serve("--accounts", file, "--port", str(taken.getsockname()[1]))
        assert await served.ended() == 2
    assert "Cannot listen on 127.0.0.1" in served.said
    assert "base URL" not in served.said


async def test_a_key_is_needed_and_none_is_there(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "lan.yaml").write_text("proxy: {allow_lan_access: true}\naccounts: [{name: a, api_key: k}]\n")
    served = await serve("--accounts", "lan.yaml")
    assert await served.ended() == 2
    assert re.search(r"proxy:\n  api_key: sk-[\w-]{43}", served.said)


async def test_a_host_that_the_lan_can_reach_is_refused(serve: Serve, file: str) -> None:
    served = await serve("--accounts", file, "--host", "0.0.0.0")
    assert await served.ended() == 2
    assert "proxy.allow_lan_access" in served.said


async def test_a_killed_gateway_loses_no_response_that_was_over(serve: Serve, file: str, gemini: FakeGemini) -> None:
    gemini.script, previous = [said("one"), said("two"), said("three")], None
    kept: list[str] = []
    async with aiohttp.ClientSession() as session:
        for text in ("first", "second", "third"):
            served = await serve("--accounts", file, "--port", "0")
            assert (await served.wait_for(r"store +(\S+)")).endswith("/agproxy/state.sqlite3")
            base_url = await served.wait_for(r"OPENAI_BASE_URL=(\S+)")
            body = {"model": "gpt-4o", "input": text, "stream": True, "previous_response_id": previous}
            async with session.post(f"{base_url}/responses", json=body) as response:
                last = ""
                while not last.startswith('data: {"type":"response.completed"'):
                    last = (await response.content.readline()).decode()
                served.process.kill()
            previous = json.loads(last[6:])["response"]["id"]
            kept.append(previous)
        said_before = [part["text"] for turn in gemini.bodies[2]["contents"] for part in turn["parts"]]
        assert said_before == ["first", "one", "second", "two", "third"]
        base_url = await (await serve("--accounts", file, "--port", "0")).wait_for(r"base URL +(\S+)")
        for id in kept:
            assert (await (await session.get(f"{base_url}/responses/{id}")).json())["status"] == "completed"


@pytest.mark.parametrize("background", [False, True], ids=["stream", "background"])
async def test_what_a_killed_gateway_was_making_has_failed(
    background: bool, serve: Serve, file: str, gemini: FakeGemini, tmp_path: Path
) -> None:
    served = await serve("--accounts", file, "--port", "0")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script, gemini.pause_s = [said("a", "b", "c")], 20.0
    body = {"model": "gpt-4o", "input": "hi", "stream": True, "background": background}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{base_url}/responses", json=body) as response:
            frame = (await response.content.readuntil(b"\n\n")).decode()
            id = json.loads(frame.partition("data: ")[2])["response"]["id"]
            kept = await (await session.get(f"{base_url}/responses/{id}")).json()
            assert kept["status"] in ("queued", "in_progress")
            second = await serve("--accounts", file, "--port", "0")
            await second.wait_for(r"state.sqlite3 cannot be used \((another gateway uses it)\)")
            served.process.kill()
            await served.process.wait()
        other = await (await serve("--accounts", file, "--port", "0")).wait_for(r"base URL +(\S+)")
        kept = await (await session.get(f"{other}/responses/{id}")).json()
        assert (kept["id"], kept["status"], kept["error"]["code"]) == (id, "failed", "server_error")
        text = await (await session.get(f"{other}/responses/{id}?stream=true")).text()
        assert "event: response.failed" in text


@pytest.mark.parametrize("store", ["off", "memory", "~/mine.sqlite3", "--demo"])
async def test_what_is_to_leave_nothing_on_disk_leaves_nothing(
    store: str, serve: Serve, file: str, gemini: FakeGemini, tmp_path: Path
) -> None:
    config = tmp_path / "two.yaml"
    if store != "--demo":
        config.write_text(config.read_text().replace("proxy: {", f"proxy: {{store: {store}, "))
    served = await serve(*(["--demo"] if store == "--demo" else ["--accounts", file]), "--port", "0")
    shown = {"--demo": "memory"}.get(store, store).replace("~", str(tmp_path))
    assert await served.wait_for(r"store +(\S+)") == shown
    base_url = await served.wait_for(r"OPENAI_BASE_URL=(\S+)")
    gemini.script = [said("one"), said("two"), said("three")]
    async with aiohttp.ClientSession() as session:
        await (await session.post(f"{base_url}/chat/completions", json=HELLO | {"store": True})).read()
        await (await session.post(f"{base_url}/completions", json={"model": "gpt-4o", "prompt": "secret"})).read()
        assert sorted(os.listdir(tmp_path)) == ["two.yaml"]
        made = await (await session.post(f"{base_url}/responses", json={"model": "gpt-4o", "input": "secret"})).json()
        status = (await session.get(f"{base_url}/responses/{made['id']}")).status
    assert status == (404 if store == "off" else 200)
    assert any("sqlite" in name for name in os.listdir(tmp_path)) == (store == "~/mine.sqlite3")


async def test_what_is_not_to_be_kept_is_nowhere_in_the_file(
    serve: Serve, file: str, gemini: FakeGemini, tmp_path: Path
) -> None:
    served = await serve("--accounts", file, "--port", "0")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [said("answer-kept"), said("answer-lost"), said("answer-gone")]
    async with aiohttp.ClientSession() as session:
        for word, store in (("ask-kept", True), ("ask-lost", False), ("ask-gone", True)):
            body = {"model": "gpt-4o", "input": word, "store": store, "include": ["reasoning.encrypted_content"]}
            made = await (await session.post(f"{base_url}/responses", json=body)).json()
        assert (await session.delete(f"{base_url}/responses/{made['id']}")).status == 200
    served.process.send_signal(signal.SIGTERM)
    assert await served.ended() == 0
    data = (tmp_path / "agproxy" / "state.sqlite3").read_bytes()
    words = (b"ask-kept", b"answer-kept", b"ask-lost", b"answer-lost", b"ask-gone", b"answer-gone")
    assert [word in data for word in words] == [True, True, False, False, False, False]
