"""Clients that are programs of their own, each with a task over a scripted Gemini: Codex and OpenAI's SDK for Node.

They come by `npm install --prefix tests/clients`; where they are not there, their tests are skipped by name.
"""

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import ROOT, TESTS
from fake_gemini import FakeGemini, answer, call, said
from own_listener import OwnListener

import antigravity_proxy as agproxy

CLIENTS = TESTS / "clients"
MODULES = CLIENTS / "node_modules"
README = (ROOT / "README.md").read_text()

needs_node = pytest.mark.skipif(
    not (shutil.which("node") and (MODULES / "openai").exists()), reason="node with openai is not in tests/clients"
)
needs_codex = pytest.mark.skipif(not (MODULES / ".bin/codex").exists(), reason="codex is not in tests/clients")


@pytest.fixture
async def base_url(gemini: FakeGemini) -> AsyncIterator[str]:
    app = agproxy.create_app(agproxy.Config((agproxy.Account("a", "k", gemini.url),)))
    async with OwnListener(app) as server:
        yield str(server.make_url("/v1"))


async def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """What a client prints; it may see nothing of whoever runs the tests."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "OPENAI_API_KEY": "unused", **env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        printed, _ = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, printed.decode()
    return printed.decode()


@needs_node
async def test_the_sdk_for_node(base_url: str, gemini: FakeGemini) -> None:
    gemini.script = [said("o", "ne"), said("tw", "o"), said('{"name": "Ada", "age": 36}'), answer(call("ls", path="/"))]
    assert "all held" in await run("node", "responses.mjs", cwd=CLIENTS, OPENAI_BASE_URL=base_url)
    texts = [part["text"] for turn in gemini.bodies[1]["contents"] for part in turn["parts"]]
    assert texts == ["hi", "one", "more"]


PATCH = """\
*** Begin Patch
*** Update File: greeting.txt
@@
-hello
+hello, world
*** End Patch
"""


def results(body: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [part for turn in body["contents"] for part in turn["parts"]]
    return [part["functionResponse"]["response"] for part in parts if "functionResponse" in part]


@needs_codex
async def test_codex_runs_a_command_and_changes_a_file(base_url: str, gemini: FakeGemini, tmp_path: Path) -> None:
    """From an empty home, with the recipe that README has pasted as it is printed."""
    recipe = re.search(r"<!-- client: codex -->\n```sh\n(.+?)```", README, re.DOTALL)
    assert recipe is not None
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    project.mkdir()
    (project / "greeting.txt").write_text("hello\n")
    program = tmp_path / "bin" / "agproxy"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {agproxy.__file__} "$@"\n')
    program.chmod(0o755)
    thought = {"text": "I look first.", "thought": True}
    signed = call("exec_command", cmd="cat greeting.txt") | {"thoughtSignature": "c2ln"}
    gemini.script = [
        answer(thought, signed),
        answer({"text": "Now I change it."}, call("apply_patch", input=PATCH)),
        said("It says hello, ", "world now."),
    ]
    script = recipe[1].replace("--skip-git-repo-check hello", "--skip-git-repo-check -s danger-full-access 'change it'")
    path = f"{program.parent}:{MODULES / '.bin'}:{os.environ['PATH']}"
    port = str(urlsplit(base_url).port)
    said_at_last = await run("bash", "-ec", script, cwd=project, HOME=str(home), PATH=path, AGPROXY_PORT=port)
    assert "It says hello, world now." in said_at_last
    assert (project / "greeting.txt").read_text() == "hello, world\n"
    assert gemini.script == []
    first, second = results(gemini.bodies[2])
    assert "hello" in str(first)
    assert "Success" in str(second)
    called = next(p for turn in gemini.bodies[2]["contents"] for p in turn["parts"] if "functionCall" in p)
    assert called["functionCall"]["name"] == "exec_command"
