"""What a person types, and what is answered."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import antigravity_proxy as agproxy


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a.yaml"
    path.write_text(f"accounts:\n  - name: work\n    api_key: AIza{'x' * 30}yz\nproxy:\n  port: 9000\n")
    return str(path)


def test_check_lists_accounts_without_their_keys(file: str) -> None:
    run = CliRunner().invoke(agproxy.main, ["check", "--accounts", file])
    assert (run.exit_code, "work" in run.output, "AIza…yz" in run.output, "xxx" in run.output) == (0, True, True, False)


def test_env_prints_the_port_by_flag_environment_and_file(file: str) -> None:
    for arguments, environment, port in (
        ([], {}, 9000),
        ([], {"AGPROXY_PORT": "9001"}, 9001),
        (["--port", "9002"], {"AGPROXY_PORT": "9001"}, 9002),
    ):
        run = CliRunner().invoke(agproxy.main, ["env", "--accounts", file, *arguments], env=environment)
        assert f"export OPENAI_BASE_URL=http://127.0.0.1:{port}/v1\n" in run.output


def test_nothing_to_go_on_exits_2_and_names_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    none = dict.fromkeys(("GEMINI_API_KEY", "GOOGLE_API_KEY", "AGPROXY_ACCOUNTS"))
    run = CliRunner().invoke(agproxy.main, ["serve"], env=none | {"XDG_CONFIG_HOME": str(tmp_path)})
    assert run.exit_code == 2
    assert all(way in run.output for way in ("--accounts", "./accounts.yaml", "GEMINI_API_KEY"))
