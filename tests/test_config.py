"""The accounts file: what it means, and what is said of what it cannot mean."""

import pytest

import antigravity_proxy as agproxy


def test_an_account_and_a_key_from_the_environment() -> None:
    text = "accounts:\n  - name: work\n    api_key: ${KEY}\nmodels:\n  map: {fast: gemini-2.5-flash}\n"
    config = agproxy.load_config(text, "f.yaml", {"KEY": "k"})
    assert config.accounts == (agproxy.Account("work", "k"),)
    assert agproxy.map_model("fast", config) == "gemini-2.5-flash"
    assert config.auth == "off"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("accounts:\n  - name: a\n    api_kee: k\n", "f.yaml:3: unknown key 'api_kee' (api_key?)"),
        ("proxy:\n  prot: 1\n", "f.yaml:2: unknown key 'prot' (port?)"),
        ("accounts:\n  - name: a\n    api_key: ${NOPE}\n", "NOPE is not set"),
        ("proxy:\n  allow_lan_access: true\n", "proxy.api_key is not set"),
        ("proxy:\n  host: 0.0.0.0\n", "allow_lan_access"),
        ("[", "not valid YAML"),
    ],
)
def test_a_bad_file_says_where_and_what(text: str, said: str) -> None:
    with pytest.raises(agproxy.ConfigError) as caught:
        agproxy.load_config(text, "f.yaml", {})
    assert said in str(caught.value)
