"""The accounts file: what it means, and what is said of what it cannot mean."""

from pathlib import Path
from typing import Any

import pytest

import antigravity_proxy as agproxy


def loaded(text: str, **env: str) -> agproxy.Config:
    return agproxy.load_config(text, "f.yaml", env, Path.read_text)


def test_an_account_and_a_key_from_the_environment() -> None:
    config = loaded(
        "accounts:\n  - name: work\n    api_key: ${KEY}\nmodels:\n  map: {fast: gemini-2.5-flash}\n", KEY="k"
    )
    assert config.accounts == (agproxy.Account("work", "k"),)
    assert config.aliases == {"fast": "gemini-2.5-flash"}
    assert (config.auth, config.bind, config.base_url) == ("off", "127.0.0.1", "http://127.0.0.1:8045/v1")


def test_an_account_without_a_name_is_called_by_its_e_mail_and_a_disabled_one_needs_no_key() -> None:
    config = loaded(
        "accounts:\n"
        "  - {email: me@example.com, api_key: env:KEY}\n"
        "  - {name: old, enabled: false, api_key: '${GONE}'}\n",
        KEY="k",
    )
    assert [(account.name, account.email) for account in config.accounts] == [("me@example.com", "me@example.com")]


@pytest.mark.parametrize(
    ("proxy", "expected"),
    [
        ("auth_mode: off", {"auth": "off"}),
        ("auth_mode: strict", {"auth": "strict"}),
        ("allow_lan_access: true", {"auth": "all_except_health", "bind": "0.0.0.0"}),
        ("allow_lan_access: yes\n  host: '::'", {"bind": "::", "base_url": "http://[::1]:8045/v1"}),
        ("api_key: k", {"api_key": (agproxy.ClientKey("client", "k"),)}),
        ("api_key: [{name: ci, key: a}, {name: me, key: b}]", {"api_key": (agproxy.ClientKey("ci", "a"),) * 1}),
        ("timeouts: {idle_s: 2.5}", {"timeouts": agproxy.Timeouts(idle_s=2.5)}),
        ("host: '[::1]'", {"bind": "::1", "base_url": "http://[::1]:8045/v1"}),
        ("media_hosts: [NAS.lan, 'box:9000', '[fd00::1]']", {"media_hosts": ("nas.lan", "box", "fd00::1")}),
        ("host: LOCALHOST", {"bind": "localhost"}),
        ("cors_origins: https://a.example", {"cors_origins": ("https://a.example",)}),
        ("port: null", {"port": 8045}),
        ("store: off", {"store": "off"}),
        ("store: ~/state.sqlite3", {"store": "~/state.sqlite3"}),
    ],
)
def test_what_the_proxy_keys_mean(proxy: str, expected: dict[str, Any]) -> None:
    config = loaded(f"proxy:\n  {proxy}\n")
    for name, value in expected.items():
        found = getattr(config, name)
        assert (found[: len(value)] if name == "api_key" else found) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accounts:\n  - name: a\n    api_kee: k\n", ["f.yaml:3: unknown key 'api_kee' (api_key?)"]),
        ("proxy:\n  prot: 1\n", ["f.yaml:2: unknown key 'prot' (port?)"]),
        ("accounts:\n  - name: a\n    api_key: ${NOPE}\n", ["f.yaml:3:", "variable NOPE, which is not set"]),
        ("accounts:\n  - api_key: k\n", ["f.yaml:2: 'accounts[0]' needs a `name` or an `email`."]),
        ("accounts:\n  - name: a\n", ["f.yaml:2: 'accounts[0]' needs an `api_key`."]),
        ("accounts:\n  - {name: a, api_key: k}\n  - {name: a, api_key: l}\n", ["f.yaml:3: two accounts are named 'a'"]),
        ("accounts: {a: b}\n", ["f.yaml:1: 'accounts' must be a list"]),
        ("accounts:\n  - {name: a, api_key: k, kind: vertx}\n", ["f.yaml:2:", "must be one of gemini"]),
        ("accounts:\n  - {name: a, api_key: k, base_url: ftp://x}\n", ["must be a URL that begins with http://"]),
        ("proxy:\n  host: 0.0.0.0\n", ["allow_lan_access"]),
        ("proxy:\n  port: 99999\n", ["f.yaml:2: 'proxy.port' must be a whole number from 0 to 65535."]),
        ("proxy:\n  port: x\n  auth_mode: never\n", ["f.yaml:2:", "f.yaml:3: 'proxy.auth_mode' must be one of off"]),
        ("proxy:\n  store: memroy\n", ["f.yaml:2: 'proxy.store' must be memory, off or the path of a file"]),
        ("proxy:\n  port: 1\n  port: 2\n", ["f.yaml:3: 'proxy.port' stands here twice"]),
        ("proxy:\n  timeouts: {idle: 3}\n", ["f.yaml:2: unknown key 'idle' (idle_s?)"]),
        ("proxy:\n  api_key: [{name: ci}]\n", ["a `name` and a `key` each"]),
        ("models:\n  map: {a: [b]}\n", ["f.yaml:2: 'models.map.a' must be a text"]),
        ("models:\n  map:\n    a: x\n    a: y\n", ["f.yaml:4: 'models.map.a' stands here twice"]),
        ("models:\n  map: {[a]: b}\n", ["f.yaml:2: a key must be a word."]),
        (
            "models:\n  traits: {x: {levels: []}}\n",
            ["f.yaml:2: 'models.traits.x.levels' must be some of NONE, MINIMAL"],
        ),
        ("models:\n  traits: {x: {levels: [deep]}}\n", ["'models.traits.x.levels' must be some of"]),
        ("models:\n  traits: {x: {budget: [5, 1]}}\n", ["must be two whole numbers, [least, most]"]),
        ("proxy:\n  allowed_hosts: box:port\n", ["f.yaml:2: 'proxy.allowed_hosts' must be host names"]),
        ("proxy:\n  upstream_proxy: http://a..b\n", ["f.yaml:2: 'proxy.upstream_proxy' must be a URL"]),
        ("proxy:\n  upstream_proxy: http://a/b c\n", ["f.yaml:2: 'proxy.upstream_proxy' must be a URL"]),
        ("models: []\n", ["f.yaml:1: models must hold 'key: value' lines"]),
        ("models:\n  traits: {x: {speed: 1}}\n", ["unknown key 'speed'"]),
        ("- a\n", ["f.yaml:1: the file must hold"]),
        ("proxy: {\n", ["f.yaml:2: not valid YAML"]),
        ("accounts: " + "[" * 3000, ["f.yaml: not valid YAML (maximum recursion"]),
        ('accounts: "\\U00110000"\n', ["f.yaml: not valid YAML (chr() arg"]),
        ('accounts: "\\UFFFFFFFF"\n', ["f.yaml: not valid YAML"]),
        ("proxy:\n  port: 1\x00\n", ["f.yaml:2: not valid YAML (special characters are not allowed)"]),
    ],
)
def test_a_bad_file_says_where_and_what(text: str, said: list[str]) -> None:
    with pytest.raises(agproxy.ConfigError) as caught:
        loaded(text)
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_in_a_map_too_null_is_as_if_the_key_were_not_there() -> None:
    config = loaded("models:\n  map: {a: x, b: null, c: ~}\n  traits: {y: {levels: [low, HIGH]}, z: ~}\n")
    assert (config.aliases, config.traits) == ({"a": "x"}, {"y": {"levels": ("LOW", "HIGH")}})


def test_keys_are_never_shown() -> None:
    config = loaded("proxy: {api_key: s3cret}\naccounts: [{name: a, api_key: s3cret}]\n")
    assert "s3cret" not in repr(config)


# ---- kinds of accounts

USER = '{"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "r"}'
SERVICE = '{"type": "service_account", "client_email": "e", "private_key": "k", "token_uri": "https://t.example"}'


def account(text: str, **files: str) -> agproxy.Account:
    known = {f"/etc/{name}.json": content for name, content in files.items()}

    def read(path: Path) -> str:
        if str(path) not in known:
            raise FileNotFoundError(path)
        return known[str(path)]

    rows = f"accounts: [{{name: me, {text}}}]\n"
    return agproxy.load_config(rows, "/etc/f.yaml", {"HOME": "/etc"}, read).accounts[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: vertex, project: p, credentials: user.json", {"refresh_token": "r", "location": "global"}),
        ("kind: vertex, project: p, credentials: ~/user.json, refresh_token: own", {"refresh_token": "own"}),
        ("kind: vertex, project: p, credentials: user.json", {"base_url": "https://aiplatform.googleapis.com"}),
        (
            "kind: vertex, project: p, location: europe-west1, credentials: user.json",
            {"base_url": "https://europe-west1-aiplatform.googleapis.com"},
        ),
        ("kind: vertex, project: p, credentials: service.json", {"service_account": SERVICE, "client_id": ""}),
        ("kind: vertex, project: p, credentials: service.json", {"token_url": "https://t.example"}),
        ("kind: cloudcode, client_id: i, client_secret: s", {"credentials": "/etc/me.token.json", "project": ""}),
        ("kind: cloudcode, credentials: user.json", {"base_url": agproxy.CLOUDCODE_URL}),
        ("kind: cloudcode, client_id: i, client_secret: s, refresh_token: r", {"credentials": ""}),
        ("api_key: k, weight: 2, max_concurrency: 3, quota_group: g", {"weight": 2.0, "max_concurrency": 3}),
        ("api_key: k, limits: {'*': {requests_per_day: 5}}", {"limits": {"*": {"requests_per_day": 5}}}),
    ],
)
def test_what_the_keys_of_an_account_mean(text: str, expected: dict[str, Any]) -> None:
    made = account(text, user=USER, service=SERVICE)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: gemini, api_key: k, project: p", "has no use for `project`"),
        ("kind: vertex, api_key: k", "has no use for `api_key`"),
        ("kind: vertex, credentials: user.json", "needs a `project`"),
        ("kind: cloudcode", "needs `credentials: FILE`, or the `client_id` and `client_secret`"),
        ("kind: cloudcode, client_id: i", "needs `credentials: FILE`"),
        ("kind: cloudcode, credentials: gone.json", "names /etc/gone.json, which cannot be read"),
        ("kind: cloudcode, credentials: bad.json", "has /etc/bad.json, which is no authorized_user"),
        ("kind: cloudcode, credentials: deep.json", "has /etc/deep.json, which is no authorized_user"),
        ("kind: vertex, project: p, location: a.b/c, credentials: user.json", "has the location 'a.b/c'"),
        ("api_key: k, weight: 0", "must be a number from 0.01"),
        ("api_key: k, limits: {'*': {requests_a_day: 5}}", "unknown key 'requests_a_day' (requests_per_day?)"),
    ],
)
def test_an_account_that_cannot_be_says_why(text: str, said: str) -> None:
    with pytest.raises(agproxy.ConfigError) as caught:
        account(text, user=USER, service=SERVICE, bad='["x"]', deep="[" * 10_000)
    assert said in str(caught.value)
    assert "/etc/f.yaml:1:" in str(caught.value)


def test_credentials_are_never_shown() -> None:
    for made in (
        account("kind: cloudcode, credentials: user.json", user=USER.replace('"r"', '"s3cret"')),
        account("kind: vertex, project: p, credentials: service.json", service=SERVICE.replace('"k"', '"s3cret"')),
    ):
        assert "s3cret" not in repr(made)
