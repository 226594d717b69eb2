"""The pool of a served process: what survives kill -9, what a reload keeps, and what a person sees and steers."""

import asyncio
import json
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner, Result
from conftest import DATA, HELLO, Serve, read_yaml, until
from fake_gemini import KINDS, FakeGemini, error, said

import antigravity_proxy as agproxy

ERRORS = {row["about"]: row for row in read_yaml(DATA / "errors.yaml")}
DAY = ERRORS["a day's requests of the free tier, with a RetryInfo that tells nothing"]
USED_UP = (429, DAY["body"])
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, gemini: FakeGemini) -> Write:
    """Writes accounts.yaml with the named accounts."""

    def write(*names: str, proxy: str = "", more: str = "") -> None:
        rows = "".join(f"  - {{name: {name}, api_key: key-{name}, base_url: '{gemini.url}'{more}}}\n" for name in names)
        text = f"proxy: {{strategy: fill_first, port: 0{proxy}}}\naccounts:\n{rows}"
        (tmp_path / "new.yaml").write_text(text)
        (tmp_path / "new.yaml").replace(tmp_path / "accounts.yaml")

    return write


async def ask(base_url: str) -> tuple[int, str, Any]:
    async with aiohttp.ClientSession() as session, session.post(f"{base_url}/chat/completions", json=HELLO) as answer:
        return answer.status, answer.headers.get("X-Account-Email", ""), await answer.json()


def is_written(folder: Path, word: bytes) -> bool:
    return any(word in path.read_bytes() for path in folder.glob("state.sqlite3*"))


async def command(base_url: str, *words: str, **env: str) -> Result:
    port = base_url.rsplit(":", 1)[1].removesuffix("/v1")
    arguments = [words[0], "--port", port, *words[1:]]
    return await asyncio.to_thread(CliRunner().invoke, agproxy.main, arguments, env=env)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "terminate"])
async def test_a_day_that_is_used_up_is_remembered(
    how: signal.Signals, serve: Serve, write: Write, gemini: FakeGemini, tmp_path: Path
) -> None:
    write("a", "b", proxy=", store: ./state.sqlite3")
    served = await serve()
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [USED_UP, said("b")]
    assert (await ask(base_url))[:2] == (200, "b")
    await until(lambda: is_written(tmp_path, b"requests_per_day"))  # at once, but beside the answer
    served.process.send_signal(how)
    await served.process.wait()
    assert (tmp_path / "state.sqlite3").stat().st_mode & 0o777 == 0o600
    served = await serve()
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.keys.clear()
    gemini.script = [said("b")]
    assert (await ask(base_url))[:2] == (200, "b")
    assert gemini.keys == ["key-b"]
    shown = await command(base_url, "status")
    assert re.search(
        r"gemini-2.5-flash .*/50 .*is in cooldown for \d{3,5} s \(requests_per_day\): You exceeded", shown.output
    )


async def test_gateways_that_share_a_file_leave_the_rests_of_the_others_there(tmp_path: Path) -> None:
    async def started(account: str) -> tuple[agproxy.Database, agproxy.PoolStore, agproxy.AccountPool]:
        pool = agproxy.AccountPool([agproxy.Account(account, "k")])
        store = agproxy.PoolStore(database := agproxy.Database(tmp_path / "state"), pool)
        await store.load(1768507200.0)
        return database, store, pool

    for account in ("a", "b", "a"):
        database, store, pool = await started(account)
        if lease := pool.acquire("m", (), 0, 1768507200.0, []):
            pool.failed(lease, agproxy.QuotaGone("Used up."), 1768507200.0, 0)
        await store.save()
        await database.close()
    assert lease is None  # a is in cooldown still


async def test_a_store_that_cannot_be_opened_stops_nothing(serve: Serve, write: Write, gemini: FakeGemini) -> None:
    write("a", proxy=", store: /proc/none/state.sqlite3")
    served = await serve()
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [said("a"), said("a")]
    assert (await ask(base_url))[0] == 200
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{base_url}/responses", json={"model": "gpt-4o", "input": "hi"}) as kept:
            id = (await kept.json())["id"]
        async with session.get(f"{base_url}/responses/{id}") as again:
            assert again.status == 200
    assert await served.wait_for(r"state.sqlite3 (cannot be used)")


async def test_reloads_under_load_drop_no_request(serve: Serve, write: Write, gemini: FakeGemini) -> None:
    write("a", "b")
    served = await serve("--log-level", "warning")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.echo, gemini.pause_s = True, 0.01
    names = [["c", "a"], ["a"], ["b", "a", "c"], ["c"]]
    ended: list[int] = []

    async def load() -> None:
        async with aiohttp.ClientSession() as session:
            for stream in (True, False) * 20:
                async with session.post(f"{base_url}/chat/completions", json=HELLO | {"stream": stream}) as answer:
                    text = await answer.text()
                    ended.append(answer.status if ("[DONE]" in text) == stream and '"error"' not in text else 0)

    async def edit() -> None:
        for number, some in enumerate(names * 2):
            write(*some)
            if number % 2:
                served.process.send_signal(signal.SIGHUP)
            else:
                assert (await command(base_url, "reload")).output == f"{len(some)} accounts\n"
            await asyncio.sleep(0.06)

    await asyncio.gather(edit(), *(load() for _ in range(8)))
    assert ended == [200] * 320
    rows = json.loads((await command(base_url, "status", "--json")).output)["accounts"]
    assert [(row["account"], row["in_flight"]) for row in rows] == [("c", 0)]
    assert {"key-a", "key-b", "key-c"} == set(gemini.keys)


async def test_a_changed_file_is_read_by_itself_and_a_bad_one_changes_nothing(
    serve: Serve, write: Write, gemini: FakeGemini, tmp_path: Path
) -> None:
    write("a", "b")
    served = await serve()
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [error(429, "RESOURCE_EXHAUSTED", "Slow down."), said("b")]
    assert (await ask(base_url))[1] == "b"
    write("a", "c")
    await served.wait_for(r"(the config was read again: 2 accounts)")
    gemini.script = [said("c")]
    assert (await ask(base_url))[1] == "c"  # a did not change, and is in cooldown still
    (tmp_path / "accounts.yaml").write_text("accounts:\n  - {name: a, api_kee: x}\n")
    await served.wait_for(r"(the config stays as it was: accounts.yaml:2: unknown key 'api_kee')")
    told = await command(base_url, "reload")
    assert (told.exit_code, "accounts.yaml:2: unknown key" in told.output) == (2, True)
    gemini.script = [said("c")]
    assert (await ask(base_url))[1] == "c"
    write("a", proxy=", allow_lan_access: true, auth_mode: off")
    told = await command(base_url, "reload")
    assert "Where it listens changed" in told.output
    write("a", proxy=", store: off")
    assert "Where responses are kept changed" in (await command(base_url, "reload")).output
    (tmp_path / "accounts.yaml").write_text("accounts: [{name: a, api_key: k}]\nproxy: {port: 9}\n")
    assert "Where it listens changed" in (await command(base_url, "reload")).output
    (tmp_path / "accounts.yaml").unlink()  # as some editors do for a moment
    told = await command(base_url, "reload")
    assert "accounts.yaml: cannot be read" in told.output


async def test_a_login_is_taken_by_a_running_gateway(serve: Serve, gemini: FakeGemini, tmp_path: Path) -> None:
    account = f"base_url: '{gemini.url}', token_url: '{gemini.url}/token'"
    rows = f"[{{name: me, kind: cloudcode, client_id: i, client_secret: s, {account}}}]"
    (tmp_path / "accounts.yaml").write_text(f"accounts: {rows}\nproxy: {{port: 0, max_wait_s: 0}}\n")
    served = await serve()
    base_url = await served.wait_for(r"base URL +(\S+)")
    status, _, body = await ask(base_url)
    assert (status, "Run `agproxy login me`" in body["error"]["message"]) == (502, True)
    about = {"client_id": "i", "client_secret": "s", "refresh_token": "key-me"}
    agproxy.write_private(tmp_path / "me.token.json", json.dumps(about))
    await served.wait_for(r"(the config was read again)")
    gemini.script = [said("me")]
    assert (await ask(base_url))[:2] == (200, "me")


async def test_what_a_person_sees_and_steers(serve: Serve, write: Write, gemini: FakeGemini) -> None:
    write("a", "b", more=", quota_group: p")
    served = await serve("--log-level", "info")
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [error(503, "UNAVAILABLE", "Busy."), said("b")]
    assert (await ask(base_url))[1] == "b"
    id = await served.wait_for(r"(req_\w+)")
    told = (await command(base_url, "why", id)).output
    assert re.search(r"account=b attempts=2 status=200", told)
    assert "1. gemini-2.5-flash: a -> Overloaded: Busy.\n   a is ready\n   b is ready\n" in told
    assert "2. gemini-2.5-flash: b -> answered\n   a was tried\n   b is ready\n" in told
    assert "[unknown_url]" in (await command(base_url, "why", "req_none")).output
    assert "A person paused it" in (await command(base_url, "pool", "pause", "a")).output
    gemini.script = [said("b")]
    assert (await ask(base_url))[1] == "b"
    assert "paused" not in (await command(base_url, "pool", "resume", "a")).output
    assert "A person paused it" in (await command(base_url, "pool", "pause", "a/gpt-4o")).output
    gemini.script = [said("b")]
    assert (await ask(base_url))[1] == "b"
    await command(base_url, "pool", "resume", "a/gemini-2.5-flash")
    gemini.script = [USED_UP]
    status, _, body = await ask(base_url)
    assert (status, body["error"]["code"]) == (429, "insufficient_quota")
    steps = body["error"]["decisions"]
    assert [(step["chosen"], step["answer"] is not None) for step in steps] == [("a", True), (None, False)]
    assert "is in cooldown for" in steps[1]["considered"]["b"]
    rows = json.loads((await command(base_url, "status", "--json")).output)["accounts"]
    assert [(row["account"], row["quota_group"], row["in_flight"]) for row in rows] == [("a", "p", 0), ("b", "p", 0)]
    assert "cooldown" not in (await command(base_url, "pool", "reset", "b")).output  # of the whole group
    assert "no account's name" in (await command(base_url, "pool", "reset", "x")).output


async def test_an_account_with_a_slash_in_its_name_is_steered(serve: Serve, write: Write) -> None:
    write("team", "team/b")
    base_url = await (await serve()).wait_for(r"base URL +(\S+)")
    assert re.search(r"\nteam/b .*A person paused it", (await command(base_url, "pool", "pause", "team/b")).output)
    assert "paused" not in (await command(base_url, "pool", "resume", "team/b")).output
    told = (await command(base_url, "pool", "pause", "team/b/gemini-3-pro-preview")).output
    assert re.search(r"\nteam/b .*is ready\n +gemini-3-pro-preview .*A person paused it", told)


async def test_the_commands_need_the_key_where_one_is_needed(
    serve: Serve, write: Write, gemini: FakeGemini, tmp_path: Path
) -> None:
    write("a", proxy=", auth_mode: strict, api_key: k")
    served = await serve()
    base_url = await served.wait_for(r"base URL +(\S+)")
    told = await command(base_url, "status")
    assert (told.exit_code, "[invalid_api_key]" in told.output) == (2, True)
    known = {"AGPROXY_ACCOUNTS": str(tmp_path / "accounts.yaml")}
    assert "gemini" in (await command(base_url, "status", **known)).output


async def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = await command("http://127.0.0.1:9/v1", "status", XDG_CONFIG_HOME=str(tmp_path))
    assert (told.exit_code, "[no_gateway]" in told.output) == (2, True)


async def test_the_state_is_shown_to_this_machine_alone(gemini: FakeGemini, aiohttp_client: Any) -> None:
    config = agproxy.Config((agproxy.Account("a", "secret-key", gemini.url),))
    client = await aiohttp_client(agproxy.create_app(config))
    shown = await client.get("/agproxy/status")
    assert (shown.status, "secret" in await shown.text()) == (200, False)
    page = await client.get("/agproxy/status", headers={"Origin": "http://localhost:3000"})
    told = (await page.json())["error"]
    assert (page.status, "Only programs on this machine" in told["message"]) == (403, True)
    wrong = await client.get("/agproxy/pool")
    assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
    for body, param in (({"action": "stop", "account": "a"}, "action"), ({"action": "reset"}, "account")):
        assert (await (await client.post("/agproxy/pool", json=body)).json())["error"]["param"] == param
    assert (await (await client.post("/agproxy/reload")).json())["error"]["code"] == "config_invalid"


@pytest.mark.parametrize(("host", "status"), [("192.0.2.7", 200), ("192.0.2.8", 403), ("0.0.0.0", 403)])
async def test_who_calls_from_the_address_that_is_listened_on_is_this_machine(
    host: str, status: int, aiohttp_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.BaseRequest, "remote", "192.0.2.7")
    config = agproxy.Config((agproxy.Account("a", "k"),), host=host, allow_lan_access=True, auth_mode="off")
    client = await aiohttp_client(agproxy.create_app(config))
    assert (await client.get("/agproxy/status")).status == status


@pytest.mark.parametrize("stream", [False, True], ids=["before the answer", "in a stream"])
async def test_a_client_that_leaves_gives_its_account_back(
    stream: bool, serve: Serve, write: Write, gemini: FakeGemini
) -> None:
    write("a", more=", max_concurrency: 1")
    served = await serve()
    base_url = await served.wait_for(r"base URL +(\S+)")
    gemini.script = [error(429, "RESOURCE_EXHAUSTED", "Please retry in 0.5s."), said("a", "b", "c"), said("x")]
    gemini.pause_s = 20.0
    async with aiohttp.ClientSession() as session:
        leaving = asyncio.create_task(session.post(f"{base_url}/chat/completions", json=HELLO | {"stream": stream}))
        await until(lambda: gemini.bodies)
        gemini.silence_s = 0.0 if stream else 20.0
        await until(lambda: len(gemini.bodies) == 2)  # the probe after a short rest
        if stream:
            async with await leaving as answer:
                await answer.content.readline()
        leaving.cancel()
    gemini.silence_s = gemini.pause_s = 0.0
    gemini.script = gemini.script or [said("x")]
    for _ in range(50):
        row = json.loads((await command(base_url, "status", "--json")).output)["accounts"][0]
        if row["in_flight"] == 0:
            break
        await asyncio.sleep(0.02)
    assert row["in_flight"] == 0
    assert (await ask(base_url))[0] == 200


# ---- the retry loop

PRO = HELLO | {"model": "gemini-2.5-pro"}
FORBIDDEN = error(403, "PERMISSION_DENIED", "No.")
SOON = error(429, "RESOURCE_EXHAUSTED", "Please retry in 1s.")


@pytest.mark.parametrize(
    ("script", "settings", "status", "mapped", "attempts"),
    [
        ([USED_UP, FORBIDDEN, said("x")], {"count": 2}, 200, "gemini-2.5-flash", "3"),
        ([USED_UP, said("x")], {}, 200, "gemini-2.5-flash", "2"),
        ([error(404, "NOT_FOUND", "Gone."), said("x")], {}, 200, "gemini-2.5-flash", "2"),
        ([error(503, "UNAVAILABLE", "Full.")] * 2 + [said("x")], {}, 200, "gemini-2.5-flash", "3"),
        ([error(401, "UNAUTHENTICATED", "No.")], {}, 502, "gemini-2.5-pro", "1"),
        ([SOON, said("x")], {"max_wait_s": 3}, 200, "gemini-2.5-pro", "2"),
        ([USED_UP, USED_UP], {}, 429, "gemini-2.5-flash", "2"),
    ],
    ids=["a key is refused too", "exhausted", "gone", "full", "refused", "soon", "both"],
)
async def test_the_next_model_of_the_chain_is_asked_where_nobody_has_the_first(
    script: list[Any],
    settings: dict[str, Any],
    status: int,
    mapped: str,
    attempts: str,
    gemini: FakeGemini,
    aiohttp_client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cooldown_of = agproxy.cooldown_of
    monkeypatch.setattr(agproxy, "cooldown_of", lambda *told: cooldown_of(*told) / 10)
    settings = {"max_wait_s": 0, "count": 1} | settings
    accounts = tuple(agproxy.Account(f"a{i}", "k", gemini.url) for i in range(settings.pop("count")))
    chain = {"gemini-2.5-pro": ("nobody-knows-it", "gemini-2.5-flash")}
    config = agproxy.Config(accounts, fallback=chain, strategy="fill_first", **settings)
    client = await aiohttp_client(agproxy.create_app(config))
    gemini.script = list(script)
    response = await client.post("/v1/chat/completions", json=PRO)
    headers = response.headers
    assert (response.status, headers["X-Mapped-Model"], headers["X-Attempts"]) == (status, mapped, attempts)
    assert ("X-Agproxy-Changes" in headers) == (status == 200 and mapped != "gemini-2.5-pro")


async def test_a_wait_is_given_up_when_it_is_long_and_the_limit_is_kept(
    gemini: FakeGemini, aiohttp_client: Any
) -> None:
    accounts = (agproxy.Account("a", "k", gemini.url, max_concurrency=1),)
    client = await aiohttp_client(agproxy.create_app(agproxy.Config(accounts, max_wait_s=2)))
    gemini.script = [said("x")] * 3
    gemini.silence_s = 0.1
    answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=HELLO) for _ in range(3)))
    assert [answer.status for answer in answers] == [200] * 3
    gemini.script = [error(429, "RESOURCE_EXHAUSTED", "Please retry in 20s.")]
    response = await client.post("/v1/chat/completions", json=HELLO)
    assert (response.status, 20 <= int(response.headers["Retry-After"]) <= 22) == (429, True)


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_do_not_wait_for_those_that_wait_for_them(
    stream: bool, gemini: FakeGemini, aiohttp_client: Any
) -> None:
    accounts = (agproxy.Account("a", "k", gemini.url, max_concurrency=2),)
    client = await aiohttp_client(agproxy.create_app(agproxy.Config(accounts, max_wait_s=0)))
    gemini.script = [said("word") for _ in range(5)]
    response = await client.post("/v1/chat/completions", json=HELLO | {"n": 5, "stream": stream})
    assert (response.status, (await response.text()).count('"word"')) == (200, 5)
    gemini.script = [said("word"), [*said("half", reason=None), USED_UP[1]]]
    response = await client.post("/v1/chat/completions", json=HELLO | {"n": 2, "stream": stream})
    assert (response.status, (await response.json())["error"]["code"]) == (429, "insufficient_quota")


async def test_a_request_waits_no_longer_where_models_fall_back(
    gemini: FakeGemini, aiohttp_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "POLL_S", 0.02)
    accounts = (agproxy.Account("a", "k", gemini.url, max_concurrency=1),)
    chain = {"gemini-2.5-pro": ("gemini-2.5-flash",)}
    app = agproxy.create_app(agproxy.Config(accounts, fallback=chain, max_wait_s=0.05))
    assert app[agproxy.gateway_key()].upstream.pool.acquire("m", (), 0, 0, [])  # and nobody gives it back
    client = await aiohttp_client(app)
    response = await client.post("/v1/chat/completions", json=PRO)
    waits = [step["waited_s"] for step in (await response.json())["error"]["decisions"]]
    assert (response.status, waits) == (503, [0.04, 0])


async def test_who_waits_for_a_rest_sees_that_it_was_ended(
    gemini: FakeGemini, aiohttp_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "RELOAD_CHECK_S", 0.01)
    account = agproxy.Account("a", "k", gemini.url)
    app = agproxy.create_app(agproxy.Config((account,), max_wait_s=600))
    client, pool = await aiohttp_client(app), app[agproxy.gateway_key()].upstream.pool
    for end in (lambda: pool.steer("reset", "a", ""), lambda: pool.update([replace(account, weight=2)], "affinity", 0)):
        gemini.script = [error(429, "RESOURCE_EXHAUSTED", "Please retry in 300s."), said("x")]
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=HELLO))
        await until(lambda: "cooldown" in json.dumps(pool.status(time.time())))
        end()
        assert (await asyncio.wait_for(asked, 5)).status == 200


async def test_three_dead_keys_fail_no_request_each_time_that_their_rests_are_over(
    gemini: FakeGemini, aiohttp_client: Any
) -> None:
    accounts = tuple(agproxy.Account(name, f"key-{name}", gemini.url) for name in "abcd")
    app = agproxy.create_app(agproxy.Config(accounts, strategy="fill_first"))
    client, now = await aiohttp_client(app), 1768507200.0
    app[agproxy.gateway_key()].upstream.clock = lambda: now
    gemini.script = [FORBIDDEN] * 3
    assert (await client.post("/v1/chat/completions", json=HELLO)).status == 429
    now += 100
    gemini.script = [FORBIDDEN, said("x")]
    answer = await client.post("/v1/chat/completions", json=HELLO)
    assert (answer.status, answer.headers["X-Account-Email"]) == (200, "d")


async def test_what_no_prompt_cache_knows_is_spread_over_the_accounts(gemini: FakeGemini, aiohttp_client: Any) -> None:
    accounts = tuple(agproxy.Account(name, f"key-{name}", gemini.url) for name in "ab")
    client = await aiohttp_client(agproxy.create_app(agproxy.Config(accounts)))
    for route in ("embeddings", "responses/input_tokens"):
        gemini.keys.clear()
        for _ in range(30):
            assert (await client.post(f"/v1/{route}", json={"model": "gpt-4o", "input": "x"})).status == 200
        assert set(gemini.keys) == {"key-a", "key-b"}


async def test_a_mixed_pool_gets_the_schema_as_it_is(gemini: FakeGemini, aiohttp_client: Any) -> None:
    from fake_gemini import account_of

    accounts = tuple(account_of(kind, kind, gemini.url) for kind in KINDS)
    client = await aiohttp_client(agproxy.create_app(agproxy.Config(accounts, strategy="fill_first")))
    gemini.script = [error(429, "RESOURCE_EXHAUSTED", "Slow.")] * 2 + [said('{"a": 1}')]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    response = await client.post("/v1/chat/completions", json=HELLO | {"response_format": form})
    assert (response.status, response.headers["X-Account-Email"]) == (200, "cloudcode")
    assert [body["generationConfig"]["responseJsonSchema"] for body in gemini.bodies] == [schema] * 3


async def test_a_stream_that_ends_by_a_refusal_sends_the_account_to_rest(
    gemini: FakeGemini, aiohttp_client: Any
) -> None:
    accounts = tuple(agproxy.Account(name, f"key-{name}", gemini.url) for name in "ab")
    client = await aiohttp_client(agproxy.create_app(agproxy.Config(accounts, strategy="fill_first")))
    gemini.script = [[*said("half", reason=None), USED_UP[1]], said("b")]
    gemini.pause_s = 0.05  # so that the answer has begun
    cut = await client.post("/v1/chat/completions", json=HELLO | {"stream": True})
    assert ("half" in (text := await cut.text()), "insufficient_quota" in text) == (True, True)
    later = await client.post("/v1/chat/completions", json=HELLO)
    assert (later.status, later.headers["X-Account-Email"], later.headers["X-Attempts"]) == (200, "b", "1")
