"""Every refusal of the gateway's own: what is wrong, what to do, and a code that README's table explains."""

import ast
import asyncio
import io
import json
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from click.testing import CliRunner
from conftest import HELLO, ROOT, command_of, tree_of_the_file
from fake_gemini import FakeGemini, error
from own_listener import OwnListener

import antigravity_proxy as agproxy

README = (ROOT / "README.md").read_text()
TABLE = set(re.findall(r"^\|[^|]*\| `(\w+)` \|", README, re.MULTILINE))


def two_sentences(text: str) -> bool:
    """One sentence on what is wrong, one on what to do."""
    return re.search(r"\S[.)]\s+[A-Z`][^.]*\S", text) is not None


# ---- at the start

GOOD = "accounts: [{name: a, api_key: k}]\n"


@pytest.mark.parametrize(
    ("text", "arguments", "code", "said"),
    [
        (None, ["serve"], "no_accounts", "--demo"),
        (None, ["serve", "--accounts", "gone.yaml"], "config_invalid", "gone.yaml"),
        ("proxy: {\n", ["serve"], "config_invalid", "not valid YAML"),
        ("accounts:\n  - {name: a, api_kee: k}\n", ["serve"], "config_invalid", "accounts.yaml:2"),
        ("accounts: [{name: a, api_key: '${NOPE}'}]\n", ["check"], "config_invalid", "NOPE"),
        ("proxy: {port: x}\n", ["env"], "config_invalid", "proxy.port"),
        (GOOD + "proxy: {auth_mode: strict}\n", ["serve"], "key_needed", "proxy.api_key"),
        (GOOD + "proxy: {auth_mode: strict}\n", ["check"], "key_needed", "proxy.api_key"),
        (GOOD + "proxy: {host: 0.0.0.0}\n", ["serve"], "config_invalid", "proxy.allow_lan_access"),
        (GOOD, ["serve", "--port", "TAKEN"], "cannot_listen", "--port"),
        (GOOD, ["models", "llama"], "model_not_found", "models.map"),
        (GOOD, ["run", "no-such-command"], "command_not_started", "$PATH"),
        (GOOD + "proxy: {auth_mode: strict}\n", ["env"], "key_needed", "proxy.api_key"),
        (GOOD + "proxy: {allowed_hosts: ['*']}\n", ["check"], "config_invalid", "proxy.allowed_hosts"),
        (GOOD + "proxy: {cors_origins: ['*']}\n", ["check"], "config_invalid", "proxy.cors_origins"),
        ("accounts: [{name: a, api_key: x, base_url: 'http://[::1'}]\n", ["serve"], "config_invalid", "base_url"),
        ("accounts: [{name: a, enabled: no}]\n", ["serve"], "no_accounts", "--demo"),
        ("? [a]\n: b\n", ["check"], "config_invalid", "accounts.yaml:1"),
        (GOOD, ["env", "--client", "claude-code"], "client_not_served", "agproxy env --help"),
    ],
)
def test_at_the_start(
    text: str | None, arguments: list[str], code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "accounts.yaml").write_text(text.replace("k}", "k, base_url: 'http://127.0.0.1:9'}"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = [str(taken.getsockname()[1]) if a == "TAKEN" else a for a in arguments]
        none = dict.fromkeys(("GEMINI_API_KEY", "GOOGLE_API_KEY", "AGPROXY_ACCOUNTS", "AGPROXY_PORT", "NOPE"))
        run = CliRunner().invoke(agproxy.main, arguments, env=none | {"XDG_CONFIG_HOME": str(tmp_path)})
    assert run.exit_code == 2, run.output
    assert run.output.rstrip().endswith(f"[{code}]")
    assert code in TABLE
    assert said in run.output
    assert two_sentences(run.output.removeprefix("Error: ")), run.output


# ---- to a client

Start = Callable[..., Awaitable[TestClient]]
KEY = (agproxy.ClientKey("laptop", "right"),)


@pytest.fixture
async def start(gemini: FakeGemini, aiohttp_client: Any) -> Start:
    async def start(url: str = "", **settings: Any) -> TestClient:
        accounts = (agproxy.Account("a", "k", url or gemini.url),)
        return await aiohttp_client(agproxy.create_app(agproxy.Config(accounts, **settings)))

    return start


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("settings", "path", "sent", "status", "code", "said"),
    [
        ({"auth_mode": "strict", "api_key": KEY}, "/healthz", {}, 401, "invalid_api_key", "is missing"),
        (
            {"auth_mode": "strict", "api_key": KEY},
            CHAT,
            {"json": HELLO, "headers": {"Authorization": "Bearer wrong"}},
            401,
            "invalid_api_key",
            "proxy.api_key",
        ),
        ({}, "/v1/models", {"headers": {"Host": "evil.example"}}, 403, "host_not_allowed", "proxy.allowed_hosts"),
        (
            {},
            "/v1/models",
            {"headers": {"Origin": "https://evil.example"}},
            403,
            "origin_not_allowed",
            "proxy.cors_origins",
        ),
        ({}, "/v1/models", {"headers": {"Host": "[::1"}}, 403, "host_not_allowed", "proxy.auth_mode"),
        ({}, "/v1/models", {"headers": {"Origin": "null"}}, 403, "origin_not_allowed", "proxy.cors_origins"),
        ({}, "/v1/models", {"headers": {"Origin": "https://[::1"}}, 403, "origin_not_allowed", "proxy.cors_origins"),
        ({}, CHAT, {"json": HELLO | {"model": "\ud800"}}, 404, "model_not_found", "models.map"),
        ({}, "/v1/nothing", {}, 404, "unknown_url", "/v1"),
        ({}, CHAT, {}, 405, "method_not_supported", "POST"),
        ({}, CHAT, {"json": HELLO | {"model": "llama"}}, 404, "model_not_found", "models.map"),
        ({}, CHAT, {"json": {"model": "gpt-4o"}}, 400, "missing_required_parameter", "'messages'"),
        ({}, CHAT, {"json": HELLO | {"stream": 5}}, 400, "invalid_type", "'stream'"),
        ({}, CHAT, {"json": HELLO | {"n": 0}}, 400, "integer_below_min_value", "'n'"),
        ({}, CHAT, {"json": HELLO | {"n": 1000}}, 400, "integer_above_max_value", "'n'"),
        ({}, CHAT, {"json": HELLO | {"top_p": 2}}, 400, "decimal_above_max_value", "'top_p'"),
        ({}, CHAT, {"json": HELLO | {"temperature": -1}}, 400, "decimal_below_min_value", "'temperature'"),
        ({}, CHAT, {"json": HELLO | {"tools": [{"type": "elf"}]}}, 400, "invalid_value", "'tools[0].type'"),
        (
            {},
            "/v1/responses",
            {"json": {"model": "m", "input": "x", "background": True, "store": False}},
            400,
            "unsupported_parameter",
            "",
        ),
        (
            {},
            "/v1/responses",
            {"json": {"model": "m", "input": "x", "previous_response_id": "resp_1"}},
            400,
            "previous_response_not_found",
            "resp_1",
        ),
        ({}, CHAT, {"data": b"{"}, 400, None, "JSON"),
        ({}, CHAT, {"data": io.BytesIO(b" " * ((64 << 20) + 1))}, 413, "request_too_large", "64 MB"),
        ({"url": "http://127.0.0.1:9"}, CHAT, {"json": HELLO}, 502, "upstream_error", "network"),
        ({"url": "http://gemini.invalid"}, CHAT, {"json": HELLO}, 502, "upstream_error", "DNS"),
        ({"url": "https://127.0.0.1:PLAIN"}, CHAT, {"json": HELLO}, 502, "upstream_error", "clock"),
        (
            {"url": "http://gemini.invalid", "upstream_proxy": "http://127.0.0.1:9"},
            CHAT,
            {"json": HELLO},
            502,
            "upstream_error",
            "proxy.upstream_proxy",
        ),
        ({"accounts": ()}, CHAT, {"json": HELLO}, 503, "server_is_overloaded", "accounts"),
    ],
)
async def test_to_a_client(
    settings: dict[str, Any],
    path: str,
    sent: dict[str, Any],
    status: int,
    code: str | None,
    said: str,
    start: Start,
    gemini: FakeGemini,
    aiohttp_client: Any,
) -> None:
    if settings.get("accounts") == ():
        client = await aiohttp_client(agproxy.create_app(agproxy.Config(())))
    else:
        url = str(settings.pop("url", "")).replace("PLAIN", gemini.url.rsplit(":", 1)[1])
        client = await start(url, **settings)
    response = await client.request("POST" if {"json", "data"} & set(sent) else "GET", path, **sent)
    told = (await response.json())["error"]
    assert (response.status, told["code"]) == (status, code), told
    assert code is None or code in TABLE
    assert said in told["message"]
    assert two_sentences(told["message"]), told["message"]


async def test_a_packed_body_that_is_broken(aiohttp_client: Any, gemini: FakeGemini) -> None:
    """Over the product's own listener, for aiohttp's test server would unpack it first."""
    app = agproxy.create_app(agproxy.Config((agproxy.Account("a", "k", gemini.url),)))
    client = await aiohttp_client(OwnListener(app))
    response = await client.post(CHAT, data=b"no gzip", headers={"Content-Encoding": "gzip"})
    told = (await response.json())["error"]
    assert (response.status, told["code"], "Content-Encoding" in told["message"]) == (400, None, True)
    assert two_sentences(told["message"])


@pytest.mark.parametrize(
    ("step", "status", "code"),
    [
        (error(429, "RESOURCE_EXHAUSTED", "Slow down."), 429, "rate_limit_exceeded"),
        (error(401, "UNAUTHENTICATED", "API key not valid."), 502, "upstream_error"),
        (error(503, "UNAVAILABLE", "Overloaded."), 503, "server_is_overloaded"),
        (error(504, "DEADLINE_EXCEEDED", "Late."), 504, "timeout"),
    ],
)
async def test_of_all_accounts(step: Any, status: int, code: str, start: Start, gemini: FakeGemini) -> None:
    client = await start(max_wait_s=0)
    gemini.script = [step] * 3
    response = await client.post(CHAT, json=HELLO)
    told = (await response.json())["error"]
    assert (response.status, told["code"], code in TABLE) == (status, code, True)
    assert two_sentences(told["message"]), told["message"]
    assert f"a: {step[1]['error']['message'].rstrip('.')}" in told["message"]


# ---- the guard

PAGE = "https://page.example"


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({}, {"Host": "localhost:1"}, 200),
        ({}, {"Host": "[::1]:1"}, 200),
        ({}, {"Host": "192.168.1.5"}, 403),
        ({"allowed_hosts": ("box.lan",)}, {"Host": "box.lan:8045"}, 200),
        ({"allow_lan_access": True, "auth_mode": "off"}, {"Host": "192.168.1.5:8045"}, 200),
        ({"allow_lan_access": True, "auth_mode": "off"}, {"Host": "rebound.example"}, 403),
        ({}, {"Origin": "http://localhost:3000"}, 200),
        ({}, {"Origin": "http://127.0.0.1.evil.example"}, 403),
        ({}, {"Origin": "vscode-webview://abc"}, 200),
        ({"cors_origins": (PAGE,)}, {"Origin": PAGE}, 200),
        ({"auth_mode": "strict", "api_key": KEY}, {"Origin": PAGE, "Host": "any", "x-api-key": "right"}, 200),
    ],
)
async def test_who_may_call(settings: dict[str, Any], headers: dict[str, str], status: int, start: Start) -> None:
    client = await start(**settings)
    response = await client.get("/v1/models", headers=headers)
    assert response.status == status
    origin = headers.get("Origin", "")
    allowed = response.headers.get("Access-Control-Allow-Origin")
    assert allowed == (
        None if status == 403 or not origin.startswith("http") else "*" if "x-api-key" in headers else origin
    )
    if allowed:
        assert response.headers["Access-Control-Expose-Headers"] == "*"  # also what tells an SDK when to try again


# ---- what the commands say of accounts


@pytest.mark.parametrize(
    ("models", "said", "code"),
    [
        (None, "not Gemini. ", 1),
        (error(400, "INVALID_ARGUMENT", "API key not valid."), "Make a new key", 1),
        (error(400, "FAILED_PRECONDITION", "User location is not supported for the API use."), "region", 1),
        (error(403, "PERMISSION_DENIED", "Generative Language API has not been used in project 1"), "Turn on the", 1),
        (error(400, "FAILED_PRECONDITION", "Please enable billing."), "Turn on billing", 1),
        (["gemini-2.5-flash"], "yes        1", 0),
    ],
)
async def test_check_online(models: Any, said: str, code: int, gemini: FakeGemini, tmp_path: Path) -> None:
    gemini.models = models
    path = tmp_path / "a.yaml"
    path.write_text(f"accounts: [{{name: a, api_key: k, base_url: '{gemini.url}'}}]\n")
    path.chmod(0o640)
    arguments = ["check", "--online", "--accounts", str(path)]
    run = await asyncio.to_thread(CliRunner().invoke, agproxy.main, arguments)
    assert (run.exit_code, said in run.output) == (code, True), run.output
    assert f"chmod 600 {path}" in run.output


async def test_a_clock_that_is_wrong_is_told(gemini: FakeGemini, tmp_path: Path) -> None:
    gemini.date = "Thu, 01 Jan 2026 00:00:00 GMT"
    path = tmp_path / "a.yaml"
    path.write_text(f"accounts: [{{name: a, api_key: k, base_url: '{gemini.url}'}}]\n")
    run = await asyncio.to_thread(CliRunner().invoke, agproxy.main, ["check", "--online", "--accounts", str(path)])
    assert re.search(r"clock is off by \d+ s. Set it by NTP.", run.output)


def test_run_gives_a_command_its_own_gateway(tmp_path: Path) -> None:
    script = (
        "import json, os, sys, urllib.request as u\n"
        "r = u.Request(os.environ['OPENAI_BASE_URL'] + '/chat/completions', sys.argv[1].encode())\n"
        "r.add_header('Authorization', 'Bearer ' + os.environ['OPENAI_API_KEY'])\n"
        "print(json.load(u.urlopen(r))['choices'][0]['message']['content'])\n"
        "sys.exit(7)\n"
    )
    import subprocess
    import sys

    program, env = command_of(tmp_path, "run", "--demo", "--", sys.executable, "-c", script, json.dumps(HELLO))
    run = subprocess.run(program, check=False, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=30)
    assert run.returncode == 7
    assert "You said: hi" in run.stdout
    assert re.search(r"agproxy: 1 request \(0 failed\), \d+ tokens in, \d+ out; accounts: demo 1", run.stderr)


def test_run_ends_as_its_command_ended_by_a_signal(tmp_path: Path) -> None:
    import subprocess

    program, env = command_of(tmp_path, "run", "--demo", "--", "sh", "-c", "kill -9 $$")
    run = subprocess.run(program, check=False, capture_output=True, cwd=tmp_path, env=env, timeout=30)
    assert run.returncode == 128 + 9


# ---- README's table


def codes_in_the_source() -> set[str]:
    """Every code that the gateway can tell: as a class's default, an argument named `code`, or by its place."""
    kinds = [
        kind for kind in vars(agproxy).values() if isinstance(kind, type) and issubclass(kind, agproxy.GatewayError)
    ]
    found: set[Any] = {kind.code for kind in kinds}
    for node in ast.walk(tree_of_the_file()):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        place = {"wrong": 3, "Unusable": 1, "get": 3}.get(name, 99)
        given = [*node.args[place : place + 1], *(k.value for k in node.keywords if k.arg == "code")]
        found |= {leaf.value for one in given for leaf in ast.walk(one) if isinstance(leaf, ast.Constant)}
    found |= {
        "integer_below_min_value",
        "integer_above_max_value",
        "decimal_below_min_value",
        "decimal_above_max_value",
    }
    return {code for code in found if isinstance(code, str) and re.fullmatch(r"[a-z_]+", code)}


def test_readme_explains_every_code_and_no_other() -> None:
    assert TABLE - {"none"} == codes_in_the_source()
