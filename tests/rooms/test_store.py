"""What is kept in a file or in memory: its bounds, who shares and holds it, and what cannot be written."""

import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from conftest import DATA, until
from fake_gemini import FakeGemini, said
from kept import ASK, Start, ask, ask_stream, fetch, starter

import antigravity_proxy as agproxy

KEEPS_ONE = """
import asyncio, pathlib, sys, antigravity_proxy as agproxy
async def run():
    store = agproxy.ResponseStore(agproxy.Database(pathlib.Path(sys.argv[1])))
    await store.save("resp_1", "running", (b"{}", b"[]", b""), ("", None, b"[]"))
    print("saved", flush=True)
    await asyncio.sleep(60)
asyncio.run(run())
"""


@pytest.fixture
def start(gemini: FakeGemini, aiohttp_client: Any) -> Start:
    return starter(gemini, aiohttp_client)


@pytest.fixture
async def client(start: Start) -> TestClient:
    return await start(max_wait_s=0)


async def test_a_file_that_cannot_be_used_is_told_and_replaced_by_memory(
    start: Start, gemini: FakeGemini, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken").write_text("This is no database. " * 100)
    client = await start(store=str(tmp_path / "broken"))
    gemini.script = [said("one"), said("two")]
    made = await ask(client)
    assert (await ask(client, previous_response_id=made["id"]))["status"] == "completed"
    assert "broken cannot be used" in caplog.text


@pytest.mark.parametrize("limit", [{"MAX": 20}, {"MEMORY_MAX": 20_000}, {"BYTES_MAX": 20_000}, {"AGE_S": 0.3}], ids=str)
async def test_the_store_is_bounded(
    limit: dict[str, float], start: Start, gemini: FakeGemini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limit.items():
        monkeypatch.setattr(agproxy, f"RESPONSES_{name}", value)
    monkeypatch.setattr(agproxy, "USED_S", 0.0)
    client = await start(store="memory" if "MEMORY_MAX" in limit else str(tmp_path / "s"))
    gemini.echo = True
    first, second = await ask(client), await ask(client)
    await asyncio.sleep(0.35 if "AGE_S" in limit else 0)
    for _ in range(99):
        last = await ask(client)
        await fetch(client, second["id"])
    assert (await fetch(client, first["id"]))[0] == 404
    assert (await fetch(client, last["id"]))[0] == 200
    assert (await fetch(client, second["id"]))[0] == 200  # it was used lately


async def test_nobody_waits_for_a_file_that_another_program_holds(
    start: Start, gemini: FakeGemini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agproxy, "DATABASE_BUSY_S", 0.5)
    client = await start(store=str(tmp_path / "s"))
    gemini.echo = True
    await ask(client)
    with contextlib.closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        late = asyncio.create_task(ask(client))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        chat = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
        assert (await client.post("/v1/chat/completions", json=chat)).status == 200
        assert time.monotonic() - began < 0.3
        made = await late
    assert made["status"] == "completed"
    assert f"{made['id']} cannot be kept: The store cannot be used (database is locked)" in caplog.text
    assert (await ask(client))["status"] == "completed"


async def test_deleting_waits_for_no_program_that_reads_the_file(
    start: Start, gemini: FakeGemini, tmp_path: Path
) -> None:
    client = await start(store=str(tmp_path / "s"))
    gemini.echo = True
    made = await ask(client)
    with contextlib.closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as reading:
        reading.execute("BEGIN")
        reading.execute("SELECT id FROM responses").fetchall()
        await ask(client)
        async with asyncio.timeout(3):
            assert (await fetch(client, made["id"], "DELETE"))[0] == 200


async def test_a_response_whose_end_could_not_be_written_is_over_for_whoever_polls(
    start: Start, gemini: FakeGemini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "DATABASE_BUSY_S", 0.1)
    client = await start(store=str(tmp_path / "s"))
    gemini.script, gemini.silence_s = [said("one"), said("two")], 20
    made = await ask(client, background=True)
    stream = asyncio.create_task(client.get(f"/v1/responses/{made['id']}?stream=true"))
    await until(lambda: gemini.bodies)
    await asyncio.sleep(0.05)
    with contextlib.closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        gemini.go_on.set()
        assert "response.completed" in await (await stream).text()
    async with asyncio.timeout(5):
        while (status := (await fetch(client, made["id"]))[1].get("status")) != "completed":
            assert status is None  # while the store is busy
            await asyncio.sleep(0.05)
    assert (await ask(client, previous_response_id=made["id"]))["status"] == "completed"


async def test_a_stream_whose_end_could_not_be_written_is_not_kept(
    start: Start, gemini: FakeGemini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "DATABASE_BUSY_S", 0.1)
    client = await start(store=str(tmp_path / "s"))
    gemini.script, gemini.pause_s = [said("one"), said("two")], 20
    async with client.post("/v1/responses", json=ASK | {"stream": True}) as response:
        id = f"resp_{response.headers['X-Request-Id'][4:]}"
        assert (await fetch(client, id))[1]["status"] == "in_progress"
        with contextlib.closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as held:
            held.execute("BEGIN IMMEDIATE")
            gemini.go_on.set()
            assert "response.completed" in await response.text()
    await asyncio.sleep(0.2)
    assert (await fetch(client, id))[0] == 404
    assert (await ask(client, previous_response_id=id))["error"]["code"] == "previous_response_not_found"


async def test_what_cannot_be_written_is_still_read_and_cancelled_but_not_begun_in_the_background(
    start: Start, gemini: FakeGemini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "DATABASE_BUSY_S", 0.1)
    monkeypatch.setattr(agproxy, "USED_S", 0.0)
    client = await start(store=str(tmp_path / "s"))
    gemini.script, gemini.silence_s = [said("one"), said("two")], 20
    made = await ask(client, background=True)
    await until(lambda: gemini.bodies)
    with contextlib.closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        assert (await fetch(client, made["id"]))[0] == 200
        async with asyncio.timeout(5):
            status, cancelled = await fetch(client, f"{made['id']}/cancel", "POST")
        assert (status, cancelled["status"]) == (200, "cancelled")
        await asyncio.sleep(0.2)
        response = await client.post("/v1/responses", json=ASK | {"background": True})
        assert (response.status, (await response.json())["error"]["code"]) == (503, "server_is_overloaded")
        gemini.script, gemini.silence_s = [said("three")], 0
        assert (await ask_stream(client, background=True))[-2]["type"] == "response.completed"
    async with asyncio.timeout(5):
        while (await fetch(client, made["id"]))[1].get("status") != "cancelled":  # noqa: ASYNC110  # another task's
            await asyncio.sleep(0.05)
    assert len(gemini.bodies) < 4


async def test_what_a_client_did_not_wait_for_is_kept(start: Start, gemini: FakeGemini, tmp_path: Path) -> None:
    database = agproxy.Database(tmp_path / "s")
    busy = asyncio.create_task(database.run(lambda _: time.sleep(0.2)))
    await asyncio.sleep(0.05)
    made: list[int] = []
    waits = asyncio.create_task(database.run(lambda _: made.append(1)))
    await asyncio.sleep(0.05)
    waits.cancel()
    await busy
    await database.close()
    assert made == [1]


async def test_what_a_full_disk_holds_is_read_without_a_pause(tmp_path: Path) -> None:
    database = agproxy.Database(tmp_path / "s")
    store = agproxy.ResponseStore(database)
    await store.save("resp_1", "over", (b"{}", b"[]", b""), ("", None, b"[]"))
    await database.run(lambda connection: connection.execute("PRAGMA max_page_count = 1").fetchall())
    with pytest.raises(agproxy.StoreTrouble, match="disk is full"):
        await store.save("resp_2", "over", (b"{}", b"[]", b""), ("", None, b"x" * 99_999))
    assert await store.get("resp_1", "")
    await database.close()


async def test_what_was_deleted_is_not_on_the_disk(start: Start, gemini: FakeGemini, tmp_path: Path) -> None:
    client = await start(store=str(tmp_path / "s"))
    gemini.echo = True
    made = await ask(client, input="forget-this-word")
    await fetch(client, made["id"], "DELETE")
    assert not any(b"forget-this-word" in (tmp_path / name).read_bytes() for name in os.listdir(tmp_path))


async def test_some_are_deleted_while_others_are_kept(client: TestClient, gemini: FakeGemini) -> None:
    gemini.echo = True
    old = [await ask(client) for _ in range(8)]
    deleted = asyncio.gather(*(fetch(client, one["id"], "DELETE") for one in old))
    new = await asyncio.gather(*(ask(client) for _ in old))
    assert [status for status, _ in await deleted] == [200] * 8
    assert [(await fetch(client, one["id"]))[0] for one in new] == [200] * 8


async def test_a_second_gateway_on_a_file_keeps_in_memory_and_says_so(
    start: Start, gemini: FakeGemini, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = str(tmp_path / "deep" / "state.sqlite3")
    one = await start(store=store)
    gemini.echo = True
    made = await ask(one)
    assert "cannot be used" not in caplog.text
    other = await start(store=store)
    assert f"{store} cannot be used (another gateway uses it); until the next start everything is kept" in caplog.text
    assert (await fetch(other, made["id"]))[0] == 404
    own = await ask(other)
    assert (await ask(other, previous_response_id=own["id"]))["status"] == "completed"
    assert (await fetch(one, own["id"]))[0] == 404
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as reader:
        assert reader.execute("SELECT id FROM responses").fetchall() == [(made["id"],)]
    await other.close()
    assert [os.stat(path).st_mode & 0o777 for path in (store, os.path.dirname(store))] == [0o600, 0o700]
    assert (await fetch(one, made["id"]))[0] == 200
    await one.close()
    assert os.listdir(os.path.dirname(store)) == ["state.sqlite3"]
    again = await start(store=store)
    assert (await fetch(again, made["id"]))[0] == 200


async def test_a_killed_gateway_leaves_no_lock_and_what_it_made_is_lost(tmp_path: Path) -> None:
    program = (sys.executable, "-c", KEEPS_ONE, str(tmp_path / "s"))
    process = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout and await process.stdout.readline() == b"saved\n"
    (tmp_path / "s.0123456789abcdef.life").touch()  # left behind by 0.1.0
    second = agproxy.Database(tmp_path / "s")
    await second.run(lambda _: None)
    assert second.path is None
    await second.close()
    process.kill()
    await process.wait()
    database = agproxy.Database(tmp_path / "s")
    stored = await agproxy.ResponseStore(database).get("resp_1", "")
    assert (database.path, stored and stored.state) == (tmp_path / "s", "lost")
    await database.close()
    assert os.listdir(tmp_path) == ["s"]


async def test_the_file_of_0_1_0_opens_and_all_is_there(start: Start, gemini: FakeGemini, tmp_path: Path) -> None:
    """Two turns with a tool, a response of the background, one that was running, a cooldown and the counts."""
    shutil.copy(DATA / "state-0.1.0.sqlite3", tmp_path / "s")
    base = "resp_a9fd17529d2e7271000000"
    now = 1796094300.0  # the day of the file
    database = agproxy.Database(tmp_path / "s")
    store = agproxy.ResponseStore(database)
    chain = await store.chain(f"{base}03", "")
    assert [(one.id, one.previous, one.state) for one in chain] == [
        (f"{base}01", None, "over"),
        (f"{base}03", f"{base}01", "over"),
    ]
    assert json.loads(chain[0].input)[0]["content"] == [{"type": "input_text", "text": "What is here?"}]
    assert [item["type"] for one in chain for item in one.response["output"]] == ["function_call", "message"]
    assert chain[0].signatures == [["call_a9fd17529d2e727100000002", "gemini-2.5-flash", "c2ln"]]
    background = await store.get(f"{base}04", "")
    assert background and background.state == "over" and b"response.completed" in background.events
    running = await store.get(f"{base}07", "")
    assert running and running.state == "lost"
    pool = agproxy.AccountPool([agproxy.Account(name, f"key-{name}") for name in "ab"])
    await agproxy.PoolStore(database, pool).load(now)
    counts = [one["models"][0]["requests_per_day"] for one in pool.status(now)]
    assert counts == [3, 2]
    lease = pool.acquire("gemini-2.5-flash", (), 0, now, [])
    assert lease and lease.account.name == "b"
    assert 5 * 3600 > pool.wait_s("gemini-2.5-flash", {"b"}, now) > 4 * 3600
    await database.close()
    client = await start(store=str(tmp_path / "s"))
    gemini.script = [said("So it is.")]
    assert (await ask(client, previous_response_id=f"{base}03"))["status"] == "completed"
    turns = gemini.bodies[0]["contents"]
    assert [turn["role"] for turn in turns] == ["user", "model", "user", "model", "user"]
    assert turns[1]["parts"][0]["thoughtSignature"] == "c2ln"
    assert (await fetch(client, f"{base}07"))[1]["status"] == "failed"
