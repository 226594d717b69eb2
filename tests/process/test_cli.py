"""What a person types, and what is answered."""

import asyncio
import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT, command_of

import antigravity_proxy as agproxy


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "a.yaml"
    path.write_text(f"accounts:\n  - name: work\n    api_key: AIza{'x' * 30}yz\nproxy:\n  port: 9000\n")
    return str(path)


def test_check_lists_accounts_without_their_keys(file: str) -> None:
    run = CliRunner().invoke(agproxy.main, ["check", "--accounts", file])
    assert (run.exit_code, "work" in run.output, "AIza…yz" in run.output, "xxx" in run.output) == (0, True, True, False)


def test_check_shows_no_password_of_a_url(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("accounts: [{name: a, api_key: k, base_url: 'https://me:s3cret@box.example/gemini'}]\n")
    run = CliRunner().invoke(agproxy.main, ["check", "--accounts", str(path)])
    assert ("https://…@box.example/gemini" in run.output, "s3cret" in run.output) == (True, False), run.output


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


@pytest.mark.parametrize("command", ["--help", "--version", "env", "check"])
def test_what_only_prints_loads_neither_a_server_nor_a_loop(command: str, file: str, tmp_path: Path) -> None:
    program, env = command_of(tmp_path, command, AGPROXY_ACCOUNTS=file, PYTHONPROFILEIMPORTTIME="1")
    run = subprocess.run(program, env=env, cwd=tmp_path, check=True, capture_output=True, text=True)
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in loaded
    assert loaded & {"aiohttp", "asyncio", "ssl", "sqlite3", "socket", "uvloop"} == set()


def test_the_version_tells_copies_apart() -> None:
    run = CliRunner().invoke(agproxy.main, ["--version"])
    assert run.output == f"agproxy {agproxy.__version__} (file {agproxy.file_fingerprint()})\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["check", "--accounts", "gone.yaml"], {}, "gone.yaml: cannot be read (No such file or directory)"),
        (["env"], {"AGPROXY_PORT": "http"}, "AGPROXY_PORT is 'http'"),
        (["env"], {"AGPROXY_PORT": "9" * 5000}, "Set it to a number from 0 to 65535"),
        (["why", "--port", "1", "a b"], {}, "[no_gateway]"),
        (["why", "--port", "1", "ü"], {}, "[no_gateway]"),
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
    readme = (ROOT / "README.md").read_text()
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


def test_explain_shows_half_a_surrogate_pair_as_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = '{"model": "gpt-4o", "messages": [{"role": "user", "content": "a\\ud83d"}]}'
    run = CliRunner().invoke(agproxy.main, ["explain", "-"], input=body)
    assert (run.exit_code, '"text": "a?"' in run.output) == (0, True), run.output


@pytest.mark.parametrize(
    "said",
    [
        "SSH-2.0-x",
        "HTTP/1.1 404 Not Found\r\n\r\n<p>nothing here",
        'HTTP/1.1 404 Not Found\r\n\r\n{"detail": "Not Found"}',
        "HTTP/1.1 200 OK\r\n\r\nhi",
    ],
)
def test_something_else_at_the_port_is_no_gateway(said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("proxy: {api_key: schlüssel€}\n")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            client, _ = server.accept()
            client.recv(4096)
            client.sendall(f"{said}\r\n".encode())
            client.close()

        threading.Thread(target=greet, daemon=True).start()
        arguments = ["status", "--accounts", str(path), "--port", str(server.getsockname()[1])]
        run = CliRunner().invoke(agproxy.main, arguments)
    assert (run.exit_code, "[no_gateway]" in run.output) == (2, True), run.output


def test_a_host_that_can_be_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("proxy: {allow_lan_access: true, auth_mode: off}\naccounts: [{name: a, api_key: k}]\n")
    arguments = ["serve", "--accounts", str(path), "--host", "a..b", "--port", "0"]
    run = CliRunner().invoke(agproxy.main, arguments, env={"XDG_STATE_HOME": str(tmp_path)})
    assert (run.exit_code, "Cannot listen on a..b:0 (no such name)" in run.output) == (2, True), run.output


def test_whoever_has_no_home_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a user of a number alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    none = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "AGPROXY_ACCOUNTS"))
    run = CliRunner().invoke(agproxy.main, ["env"], env=none)
    assert run.exit_code == 0, run.output


def in_terminal(folder: Path, *arguments: str, wait_for: bytes, stdin: str = "&3") -> tuple[int, bytes]:
    """What a command in a terminal of its own ended with and said, after Ctrl-C was pressed there."""
    command, env = command_of(folder, *arguments)
    mine, its = pty.openpty()
    script = f'exec 3<"$0" && exec "$@" <{stdin}'  # whoever leads a session owns the terminal that it opens
    program = ["sh", "-c", script, os.ttyname(its), *command]
    process = subprocess.Popen(program, env=env, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    late = threading.Timer(15, process.kill)
    late.start()
    said = b""
    pressed = False
    with contextlib.suppress(OSError), process:  # Linux's way to say that nobody has the terminal open any more
        while piece := os.read(mine, 4096):
            said += piece
            if not pressed and wait_for in said:
                time.sleep(0.2)
                pressed = bool(os.write(mine, b"\x03"))
    late.cancel()
    os.close(mine)
    return process.wait(), said


def test_ctrl_c_ends_a_login_that_waits_for_a_paste(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("accounts: [{name: me, kind: cloudcode, client_id: i, client_secret: s}]\n")
    code, said = in_terminal(tmp_path, "login", "--paste", "--accounts", str(path), "me", wait_for=b"shows no page")
    assert (code, b"Aborted!" in said) == (1, True), said


COUNT = """
import os, signal, sys, time
came, goes = os.pipe()
os.set_blocking(goes, False)
signal.set_wakeup_fd(goes)
signal.signal(signal.SIGINT, lambda *_: None)
print("counts", flush=True)
os.read(came, 1)
time.sleep(0.5)
os.set_blocking(came, False)
try:
    sys.exit(1 + len(os.read(came, 9)))
except BlockingIOError:
    sys.exit(1)
"""


def test_ctrl_c_reaches_a_command_once_though_its_input_comes_from_elsewhere(tmp_path: Path) -> None:
    command = (sys.executable, "-c", COUNT)
    run = in_terminal(tmp_path, "run", "--demo", "--", *command, wait_for=b"counts", stdin="/dev/null")
    assert run[0] == 1, run


async def test_a_signal_after_the_command_has_ended_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bill(_: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "nothing"

    monkeypatch.setattr(agproxy.Journal, "bill", bill)
    assert await agproxy.run_command(agproxy.Config((), demo=True), ["true"]) == 0
    await asyncio.sleep(0.05)
    assert "ProcessLookupError" not in caplog.text


def test_a_login_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("accounts: [{name: me, kind: cloudcode, client_id: i, client_secret: s}]\n")
    (tmp_path / "me.token.json").mkdir()

    async def granted(*_: Any) -> str:
        return "t0ken"

    monkeypatch.setattr(agproxy, "log_in", granted)
    run = CliRunner().invoke(agproxy.main, ["login", "--accounts", str(path), "me"])
    assert (run.exit_code, "me.token.json: cannot be written" in run.output) == (2, True), run.output
