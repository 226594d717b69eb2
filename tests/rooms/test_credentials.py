"""Tokens: renewed once for all who wait, ahead of their end and when they are refused; what their endpoint's faults cost."""

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from aiohttp.test_utils import TestClient
from click.testing import CliRunner
from conftest import HELLO, command_of
from fake_gemini import FakeGemini, account_of

import antigravity_proxy as agproxy

CHAT = "/v1/chat/completions"
INVALID_GRANT = (400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."})
Start = Callable[..., Awaitable[TestClient]]


@pytest.fixture(params=["vertex", "cloudcode"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def start(gemini: FakeGemini, aiohttp_client: Any, kind: str) -> Start:
    """A gateway with the named accounts, asked in this order."""

    async def start(accounts: str = "ab", **settings: Any) -> TestClient:
        made = tuple(account_of(kind, name, gemini.url) for name in accounts)
        config = agproxy.Config(made, strategy="fill_first", **settings)
        return await aiohttp_client(agproxy.create_app(config))

    gemini.echo = True
    return start


@pytest.fixture
async def made(gemini: FakeGemini, kind: str) -> AsyncIterator[agproxy.Upstream]:
    upstream = agproxy.Upstream(agproxy.Config((account_of(kind, "a", gemini.url),)))
    yield upstream
    await upstream.close()


async def test_one_renewal_for_all_who_wait(start: Start, gemini: FakeGemini) -> None:
    client = await start("a")
    gemini.tokens = [0.1]
    answers = await asyncio.gather(*(client.post(CHAT, json=HELLO) for _ in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert len(gemini.forms) == 1
    form = {"grant_type": "refresh_token", "refresh_token": "key-a", "client_id": "id", "client_secret": "secret"}
    assert gemini.forms[0] == form


async def test_who_leaves_does_not_end_the_renewal_for_the_others(made: agproxy.Upstream, gemini: FakeGemini) -> None:
    gemini.tokens = [0.1]
    account = made.pool.accounts[0]
    one, other = (asyncio.create_task(made.wire.credentials.header(account)) for _ in range(2))
    await asyncio.sleep(0.03)
    one.cancel()
    assert (await other)["Authorization"] == "Bearer key-a:1"


async def test_a_token_is_renewed_ahead_of_its_end_and_nobody_waits(made: agproxy.Upstream, gemini: FakeGemini) -> None:
    account, clock = made.pool.accounts[0], made.clock
    await made.wire.credentials.header(account)
    gemini.tokens = [0.1]
    made.clock = lambda: clock() + 3599 - 200
    assert (await made.wire.credentials.header(account))["Authorization"] == "Bearer key-a:1"
    await asyncio.sleep(0.2)
    assert (await made.wire.credentials.header(account))["Authorization"] == "Bearer key-a:2"
    made.clock = lambda: clock() + 3 * 3599
    assert (await made.wire.credentials.header(account))["Authorization"] == "Bearer key-a:3"


async def test_a_renewal_ahead_that_fails_is_no_request_s_trouble(made: agproxy.Upstream, gemini: FakeGemini) -> None:
    account, clock = made.pool.accounts[0], made.clock
    await made.wire.credentials.header(account)
    gemini.tokens = [(500, {})]
    made.clock = lambda: clock() + 3599 - 200
    for _ in range(3):
        assert (await made.wire.credentials.header(account))["Authorization"] == "Bearer key-a:1"
        await asyncio.sleep(0.05)
    assert len(gemini.forms) == 2  # and it is not tried with every request


async def test_a_refused_token_is_renewed_once_and_the_request_served(start: Start, gemini: FakeGemini) -> None:
    client = await start("a")
    assert (await client.post(CHAT, json=HELLO)).status == 200
    gemini.revoked = {"key-a:1"}
    response = await client.post(CHAT, json=HELLO)
    assert (response.status, response.headers["X-Attempts"], len(gemini.forms)) == (200, "1", 2)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([INVALID_GRANT], "agproxy login a"),
        ([(401, {"error": "invalid_client"})], "Check client_id"),
        ([(500, {})], "The token endpoint fails (HTTP 500)"),
        ([(503, {"error": "temporarily_unavailable"})], "temporarily_unavailable"),
        ([(200, {"error": "nonsense"})], "nonsense"),
        ([5.0], "could not be reached in time"),
    ],
    ids=["invalid_grant", "invalid_client", "500", "503", "no token", "slow"],
)
async def test_a_fault_of_the_token_endpoint_loses_no_request(
    faults: list[Any], said: str, start: Start, gemini: FakeGemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "TOKEN_S_MAX", 0.1)
    client = await start("ab")
    gemini.tokens = list(faults)
    response = await client.post(CHAT, json=HELLO)
    assert (response.status, response.headers["X-Attempts"], response.headers["X-Account-Email"]) == (200, "2", "b")
    told = await (await client.get(f"/agproxy/why/{response.headers['X-Request-Id']}")).json()
    assert said in told["decisions"][0]["answer"]


async def test_an_account_revoked_while_in_use_is_out_until_its_login_changes(start: Start, gemini: FakeGemini) -> None:
    client = await start("ab", max_wait_s=0)
    assert (await client.post(CHAT, json=HELLO)).headers["X-Account-Email"] == "a"
    gemini.revoked, gemini.tokens = {"key-a:1"}, [INVALID_GRANT]
    assert (await client.post(CHAT, json=HELLO)).headers["X-Account-Email"] == "b"
    asked = len(gemini.forms)
    for _ in range(3):
        assert (await client.post(CHAT, json=HELLO)).headers["X-Account-Email"] == "b"
    assert len(gemini.forms) == asked
    rows = (await (await client.get("/agproxy/status")).json())["accounts"]
    assert rows[0]["state"].startswith("is in cooldown (barred): The login of a is no longer good")


async def test_trouble_with_the_network_puts_no_account_out(
    start: Start, gemini: FakeGemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "TOKEN_RETRY_S", 1.0)
    cooldown_of = agproxy.cooldown_of
    monkeypatch.setattr(agproxy, "cooldown_of", lambda *told: cooldown_of(*told) / 10)
    client = await start("a")
    gemini.tokens = [(500, {})]
    response = await client.post(CHAT, json=HELLO)  # waits the time that such trouble is given
    assert (response.status, response.headers["X-Attempts"]) == (200, "2")


async def test_no_secret_that_the_token_endpoint_repeats_is_told(
    gemini: FakeGemini, aiohttp_client: Any, kind: str
) -> None:
    account = replace(account_of(kind, "a", gemini.url), client_secret="GOCSPX-planted", refresh_token="planted-too")
    client = await aiohttp_client(agproxy.create_app(agproxy.Config((account,), max_wait_s=0)))
    gemini.tokens = [(400, {"error": "invalid_grant", "error_description": "planted-too of GOCSPX-planted is no good"})]
    text = await (await client.post(CHAT, json=HELLO)).text()
    assert ("is no longer good" in text, "planted" in text) == (True, False)


# ---- the project of a cloudcode account


@pytest.mark.parametrize("kind", ["cloudcode"], indirect=True)
async def test_the_project_is_the_one_that_the_service_names(start: Start, gemini: FakeGemini) -> None:
    client = await start("a")
    for _ in range(2):
        assert (await client.post(CHAT, json=HELLO)).status == 200
    assert gemini.asked == ["loadCodeAssist", "streamGenerateContent", "streamGenerateContent"]


async def test_a_token_that_is_refused_where_the_project_is_asked_for_is_renewed(
    gemini: FakeGemini, aiohttp_client: Any
) -> None:
    account, gemini.echo = account_of("cloudcode", "a", gemini.url), True
    app = agproxy.create_app(agproxy.Config((account,), max_wait_s=0))
    await app[agproxy.gateway_key()].upstream.wire.credentials.header(account)
    gemini.revoked = {"key-a:1"}
    client = await aiohttp_client(app)
    assert ((await client.post(CHAT, json=HELLO)).status, len(gemini.forms)) == (200, 2)


@pytest.mark.parametrize("kind", ["cloudcode"], indirect=True)
async def test_an_account_without_a_project_is_let_in_where_it_may(
    start: Start, gemini: FakeGemini, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agproxy, "ONBOARD_POLL_S", 0.01)
    gemini.service = {
        "loadCodeAssist": {"allowedTiers": [{"id": "paid"}, {"id": "free-tier", "isDefault": True}]},
        "onboardUser": {"name": "operations/1", "done": False},
        "operations/1": {"name": "operations/1", "done": True, "response": {"cloudaicompanionProject": {"id": "p"}}},
    }
    client = await start("a")
    assert (await client.post(CHAT, json=HELLO)).status == 200
    assert gemini.asked[:3] == ["loadCodeAssist", "onboardUser", "operations/1"]


TIER = {"allowedTiers": [{"id": "free-tier", "isDefault": True}]}
VALIDATE = {"reasonMessage": "Validate it:", "validationUrl": "https://validate.example"}


@pytest.mark.parametrize("kind", ["cloudcode"], indirect=True)
@pytest.mark.parametrize(
    ("service", "why"),
    [
        ({"loadCodeAssist": {"ineligibleTiers": [{"reasonMessage": "Too young."}]}}, " (Too young.)"),
        ({"loadCodeAssist": {"ineligibleTiers": [VALIDATE]}}, " (Validate it: https://validate.example)"),
        ({"loadCodeAssist": {"ineligibleTiers": [{"reasonCode": "DASHER_USER"}]}}, " (DASHER_USER)"),
        ({"loadCodeAssist": TIER, "onboardUser": {"done": True, "error": {"code": 9, "message": "No."}}}, " (No.)"),
    ],
)
async def test_without_any_project_the_reason_is_told_and_none_invented(
    service: dict[str, Any], why: str, start: Start, gemini: FakeGemini
) -> None:
    gemini.service = service
    client = await start("a", max_wait_s=0)
    response = await client.post(CHAT, json=HELLO)
    assert response.status == 502
    assert f"no project for a{why}. Set its `project`" in (await response.json())["error"]["message"]


async def test_embeddings_are_asked_of_those_that_make_them(gemini: FakeGemini, aiohttp_client: Any, kind: str) -> None:
    body = {"model": "text-embedding-3-small", "input": ["x"]}
    for kinds, status in (((kind, "gemini"), 200), ((kind,), 404)):
        accounts = tuple(account_of(one, one, gemini.url) for one in kinds)
        client = await aiohttp_client(agproxy.create_app(agproxy.Config(accounts, strategy="fill_first")))
        response = await client.post("/v1/embeddings", json=body)
        assert response.status == status, await response.text()
    assert "only accounts of kind gemini do" in (await response.json())["error"]["message"]


# ---- files


FILE = "accounts:\n  - {name: a, kind: vertex, project: p, base_url: 'URL', token_url: 'URL/token', MORE}\n"
USER = {"type": "authorized_user", "client_id": "id", "client_secret": "s", "refresh_token": "key-a"}


async def test_a_credentials_file_and_check_online(gemini: FakeGemini, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(FILE.replace("URL", gemini.url).replace("MORE", "credentials: adc.json"))
    path.chmod(0o600)
    (tmp_path / "adc.json").write_text(json.dumps(USER))
    run = await asyncio.to_thread(CliRunner().invoke, agproxy.main, ["check", "--online", "--accounts", str(path)])
    assert (run.exit_code, "yes        3" in run.output) == (0, True), run.output
    assert gemini.keys == ["key-a"]
    run = CliRunner().invoke(agproxy.main, ["check", "--accounts", str(path)])
    assert "vertex  login" in run.output


def test_check_tells_of_terms_and_of_a_missing_login(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("accounts: [{name: me, kind: cloudcode, client_id: i, client_secret: s}]\n")
    run = CliRunner().invoke(agproxy.main, ["check", "--accounts", str(path)])
    assert "no login yet: agproxy login me" in run.output
    assert "API keys (kind gemini) are the recommended kind" in run.output


async def test_a_service_account_signs_for_itself(gemini: FakeGemini, tmp_path: Path) -> None:
    jwt = pytest.importorskip("google.auth.jwt", reason="needs google-auth")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem = key.private_bytes(*form).decode()
    about = {"type": "service_account", "client_email": "s@p.iam.example", "private_key": pem, "private_key_id": "1"}
    account = replace(account_of("vertex", "s", gemini.url), service_account=json.dumps(about))
    upstream = agproxy.Upstream(agproxy.Config((account,)))
    assert (await upstream.wire.credentials.header(account))["Authorization"] == "Bearer key-service:1"
    await upstream.close()
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    claims = jwt.decode(gemini.forms[0]["assertion"], public, audience=f"{gemini.url}/token")
    assert (claims["iss"], claims["scope"]) == ("s@p.iam.example", agproxy.SCOPE)


async def test_a_service_account_that_cannot_sign_says_why(tmp_path: Path) -> None:
    account = agproxy.Account("s", kind="vertex", service_account='{"client_email": "e", "private_key": "none"}')
    with pytest.raises(agproxy.CredentialRefused, match=r"google-auth|private key"):
        agproxy.signed_assertion(account, 0)


@pytest.mark.parametrize("paste", [False, True])
async def test_login(paste: bool, gemini: FakeGemini, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    text = FILE.replace("URL", gemini.url).replace("MORE", "client_id: id, client_secret: s")
    path.write_text(text)
    command, env = command_of(tmp_path, "login", "--accounts", str(path), "a", *["--paste"] * paste)
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stdout=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.PIPE
    )
    assert process.stdout and process.stdin
    await process.stdout.readline()
    asked = {
        key: value[0] for key, value in parse_qs(urlsplit((await process.stdout.readline()).decode()).query).items()
    }
    assert (asked["code_challenge_method"], len(asked["code_challenge"]), asked["scope"]) == ("S256", 43, agproxy.SCOPE)
    gemini.tokens = [(200, {"access_token": "x", "refresh_token": "key-new"})]
    end = f"{asked['redirect_uri']}?code=c0de&state="
    if paste:
        process.stdin.write(f"{end}{asked['state']}\n".encode())
        process.stdin.close()
    else:
        async with aiohttp.ClientSession() as browser:
            await (await browser.get(f"{end}forged")).read()
            assert gemini.forms == []
            await (await browser.get(f"{end}{asked['state']}")).read()
    said = (await asyncio.wait_for(process.stdout.read(), 20)).decode()
    assert await process.wait() == 0, said
    form = gemini.forms[0]
    assert (form["grant_type"], form["code"], form["redirect_uri"]) == (
        "authorization_code",
        "c0de",
        asked["redirect_uri"],
    )
    hashed = agproxy.hashlib.sha256(form["code_verifier"].encode()).digest()
    assert agproxy.base64.urlsafe_b64encode(hashed).decode().rstrip("=") == asked["code_challenge"]
    kept = tmp_path / "a.token.json"
    assert stat.S_IMODE(os.stat(kept).st_mode) == 0o600
    assert path.read_text() == text
    config = agproxy.load_config(text, str(path), {}, Path.read_text)
    assert config.accounts[0].refresh_token == "key-new"
    assert "key-new" not in said and "key-new" not in repr(config)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("refresh_token: r, client_id: i, client_secret: s", "[config_invalid]"),
        ("client_id: i, client_secret: s", "[login_failed]"),
    ],
)
def test_a_login_that_cannot_be(more: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(FILE.replace("URL", "http://127.0.0.1:9").replace("MORE", more))
    arguments = ["login", "--paste", "--accounts", str(path), "a"]
    run = CliRunner().invoke(agproxy.main, arguments, input="http://127.0.0.1:1/?error=access_denied\n")
    assert (run.exit_code, said in run.output) == (2, True), run.output


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:1/?code=c&state=s#", "c"),
        ("http://127.0.0.1:1/?code=c&state=other", "not the address of this login"),
        ("http://[::1", "not the address of this login"),
        ("", "not the address of this login"),
    ],
)
def test_the_address_that_a_login_ends_at(address: str, said: str) -> None:
    try:
        assert agproxy.login_code(address, "s") == said
    except agproxy.CredentialRefused as error:
        assert said in error.message


async def test_of_shared_work_nothing_is_kept() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        raise KeyError

    shared = agproxy.Shared()
    results = await asyncio.gather(*(shared.do("a", work) for _ in range(2)), return_exceptions=True)
    assert [type(result) for result in results] == [KeyError, KeyError]
    assert not shared._tasks
