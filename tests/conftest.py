"""A served process for the tests that need one."""

import ast
import asyncio
import contextlib
import gc
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from aiohttp.test_utils import TestServer
from fake_gemini import FakeGemini

HELLO: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
TESTS = Path(__file__).parent
ROOT, DATA = TESTS.parent, TESTS / "data"
NOT_PASSED = (
    *("GEMINI_API_KEY", "GOOGLE_API_KEY", "AGPROXY_ACCOUNTS", "AGPROXY_PORT"),
    "PYTHONDONTWRITEBYTECODE",  # else each gateway would compile its file anew
)
HOMES = ("XDG_CONFIG_HOME", "XDG_STATE_HOME")


@cache
def tree_of_the_file() -> ast.Module:
    """antigravity_proxy.py, parsed once for all that read it."""
    return ast.parse((ROOT / "antigravity_proxy.py").read_text(encoding="utf-8"))


def read_yaml(path: Path) -> Any:
    """A file's value, by PyYAML's part in C where it is there: the cases are read seven times as fast."""
    return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def called_from(frames: int, function: Callable[[], Any]) -> Any:
    """The function's result where it is called through so many others."""
    return called_from(frames - 1, function) if frames else function()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("at_the_end") is not None)
    gc.collect()
    gc.freeze()  # thousands of cases and the schemas need not be walked again and again


class Ended(NamedTuple):
    """What a command said, with which exit code, and the folder in which it ran."""

    code: int
    said: str
    folder: Path


@pytest.fixture(scope="session", autouse=True)
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The ends, by script, of what takes seconds: begun with the first test, one after the other, and judged last."""
    marks = [item.get_closest_marker("at_the_end") for item in request.session.items]
    running: list[subprocess.Popen[str]] = []

    def run(folder: Path, script: str, *arguments: str) -> Ended:
        command, env = [sys.executable, str(TESTS / script), *arguments], os.environ | dict.fromkeys(HOMES, str(folder))
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=folder, env=env, **pipes) as process:
            running.append(process)
            said, _ = process.communicate()
        return Ended(process.returncode, said, folder)

    commands = [(tmp_path_factory.mktemp("beside"), *mark.args) for mark in marks if mark]
    with ThreadPoolExecutor(1) as one_by_one:
        yield {command[1]: one_by_one.submit(run, *command) for command in commands}
        one_by_one.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()


@pytest.fixture(scope="session")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the state of whoever runs it; one that uses no files has no folder of its own."""
    own = "tmp_path" in request.fixturenames
    monkeypatch.setenv("XDG_STATE_HOME", str(request.getfixturevalue("tmp_path") if own else nowhere))


def command_of(folder: Path, *arguments: str, **env: str) -> tuple[list[str], dict[str, str]]:
    """What runs `agproxy`, and its environment: nothing of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in NOT_PASSED}
    mine = {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | dict.fromkeys(HOMES, str(folder))
    # by its module's name: a file that is named is always compiled
    return [sys.executable, "-m", "antigravity_proxy", *arguments], kept | mine | env


@pytest.fixture(scope="module")
def demo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of one demo for all tests of a module."""
    folder = tmp_path_factory.mktemp("demo")
    command, env = command_of(folder, "serve", "--demo", "--port", "0", "--log-level", "error")
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        yield next(line.split()[-1] for line in process.stderr if "base URL" in line)
        process.kill()


def sdk(base_url: str) -> Any:
    """OpenAI's client; it needs no certificates here, and to load them would take most of a test's time."""
    import openai

    http = openai.DefaultAsyncHttpxClient(verify=False)
    return openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0, http_client=http)


async def until(holds: Callable[[], object], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  # a fake, or another process, sets no event
            await asyncio.sleep(0.01)


class Served:
    """One `agproxy serve` process: what it said, and where it listens."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""

    async def wait_for(self, pattern: str) -> str:
        assert self.process.stderr is not None
        while not (match := re.search(pattern, self.said)):
            line = await asyncio.wait_for(self.process.stderr.readline(), 20)
            assert line, f"ended without {pattern}:\n{self.said}"
            self.said += line.decode()
        return match[1]

    async def ended(self) -> int:
        assert self.process.stderr is not None
        self.said += (await asyncio.wait_for(self.process.stderr.read(), 20)).decode()
        return await self.process.wait()


Serve = Callable[..., Awaitable[Served]]


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Serve]:
    """Starts processes with that folder as their home; ends them all."""
    started: list[asyncio.subprocess.Process] = []

    async def serve(*arguments: str, **env: str) -> Served:
        command, all_env = command_of(folder, "serve", *arguments, **env)
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, env=all_env, stderr=asyncio.subprocess.PIPE
        )
        started.append(process)
        return Served(process)

    yield serve
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    async with serving(tmp_path) as serve:
        yield serve


@contextlib.asynccontextmanager
async def scripted_gemini() -> AsyncIterator[FakeGemini]:
    fake = FakeGemini()
    async with TestServer(fake.app) as server:
        fake.url = str(server.make_url("")).rstrip("/")
        yield fake


@pytest.fixture
async def gemini() -> AsyncIterator[FakeGemini]:
    async with scripted_gemini() as fake:
        yield fake


def write_accounts(folder: Path, gemini: FakeGemini) -> str:
    """The path of a config with the accounts a and b, asked in this order."""
    path = folder / "two.yaml"
    accounts = [f"  - {{name: {name}, api_key: key-{name}, base_url: '{gemini.url}'}}" for name in ("a", "b")]
    path.write_text("\n".join(["proxy: {strategy: fill_first, max_wait_s: 0}", "accounts:", *accounts, ""]))
    return str(path)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody learns anything from waiting a second before an account is asked once more."""
    monkeypatch.setattr("antigravity_proxy.random.uniform", lambda low, high: low / 20)
