"""What a person types, and what is answered."""

import subprocess
from pathlib import Path
from typing import Any

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


def test_without_a_command_help_and_three_ways_to_begin() -> None:
    run = CliRunner().invoke(agproxy.main, [])
    assert run.exit_code == 0
    assert all(way in run.output for way in ("serve --demo", "GEMINI_API_KEY=", "--accounts accounts.yaml", "check"))


def test_the_version_tells_copies_apart() -> None:
    run = CliRunner().invoke(agproxy.main, ["--version"])
    assert run.output == f"agproxy {agproxy.__version__} (file {agproxy.file_fingerprint()})\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["check", "--accounts", "gone.yaml"], {}, "gone.yaml: cannot be read (No such file or directory)"),
        (["env"], {"AGPROXY_PORT": "http"}, "AGPROXY_PORT is 'http'"),
        (["serve", "--port", "70000"], {}, "70000 is not in the range"),
    ],
)
def test_what_cannot_be_used_exits_2(arguments: list[str], environment: dict[str, str], said: str) -> None:
    run = CliRunner().invoke(agproxy.main, arguments, env=environment)
    assert (run.exit_code, said in run.output) == (2, True), run.output


def test_env_is_read_by_a_shell_and_quotes_the_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('proxy: {api_key: "it\'s $HOME"}\n')
    run = CliRunner().invoke(agproxy.main, ["env", "--accounts", str(path)])
    shell = subprocess.run(
        ["sh", "-c", 'eval "$1"; echo "$OPENAI_API_KEY $OPENAI_API_BASE"', "sh", run.output],
        check=True,
        capture_output=True,
        text=True,
    )
    assert shell.stdout == "it's $HOME http://127.0.0.1:8045/v1\n"


def test_readme_names_every_option() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for key in (
        *agproxy.keys_of(agproxy.Config),
        *agproxy.MODELS_KEYS,
        *agproxy.ACCOUNT_KEYS,
        *agproxy.keys_of(agproxy.Timeouts),
    ):
        assert f"`{key}`" in readme or f".{key}`" in readme, key
    commands: Any = agproxy.main
    for name, command in commands.commands.items():
        assert f"agproxy {name}" in readme, name
        for option in command.params:
            assert any(word in readme for word in option.opts), option.opts


def test_explain_takes_what_only_a_gateway_can_look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = '{"model": "gpt-4o", "input": "hi", "previous_response_id": "resp_1", "background": true}'
    run = CliRunner().invoke(agproxy.main, ["explain", "-"], input=body)
    assert run.exit_code == 0, run.output
    assert '"/previous_response_id": "mapped: the conversation that is kept, before the input"' in run.output
