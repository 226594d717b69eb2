"""Walks through README as a newcomer: an empty HOME, fresh environments, each recipe as it is printed, the demo behind.

    python3 tests/clients/walk.py            every client that can be installed
    python3 tests/clients/walk.py --quick    those that install in seconds
    python3 tests/clients/walk.py llm aider  those that are named

Ends with a table of what ran and what was skipped, and with 1 if a recipe failed.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SAID = "This is the demo of agproxy"


@dataclass(frozen=True)
class Client:
    """How a client is installed into the walk's folder, and what its recipe must print."""

    pip: str = ""
    npm: str = ""
    needs: str = ""
    quick: bool = False
    said: str = SAID


CLIENTS = {
    "curl": Client(needs="curl", quick=True, said='"content":" hello"'),
    "run": Client(needs="curl", quick=True, said='"object":"list"'),
    "openai-python": Client(pip="openai", quick=True),
    "openai-node": Client(npm="openai", quick=True),
    "llm": Client(pip="llm", quick=True),
    "langchain": Client(pip="langchain-openai"),
    "openai-agents": Client(pip="openai-agents"),
    "aider": Client(pip="aider-chat"),
    "codex": Client(npm="@openai/codex"),
    "opencode": Client(npm="opencode-ai"),
}
RUNNERS = {"sh": ["bash", "-e"], "python": ["python"], "js": ["node"]}
ENDINGS = {"sh": ".sh", "python": ".py", "js": ".mjs"}


def blocks() -> dict[str, tuple[str, str]]:
    """README's recipes by client: language and text."""
    found = re.findall(r"<!-- client: ([\w-]+) -->\n```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return {name: (language, text) for name, language, text in found}


def free_port() -> int:
    """README's 8045; where it is taken another, so that no foreign gateway answers in this one's place."""
    for port in (8045, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as tried:
            return int(tried.getsockname()[1])
    sys.exit("no port is free")


class Walk:
    """One folder with everything that the walk needs: HOME, the project, the environments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "NPM_", "npm_", "LANG"))}
        self.port = str(free_port())
        path = f"{folder}/project/.venv/bin:{os.environ['PATH']}"
        self.env = kept | {"HOME": str(self.home), "PATH": path, "TERM": "dumb", "CI": "1", "AGPROXY_PORT": self.port}

    def start(self) -> subprocess.Popen[bytes]:
        """The first command of README, on a fresh clone; returns when it answers."""
        project = self.folder / "project"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(project)], check=True)
        command = re.search(r"```sh\n(python3 -m venv .*--demo --port 8045)\n```", (ROOT / "README.md").read_text())
        assert command is not None
        words = command[1].replace("8045", self.port)
        gateway = subprocess.Popen(["bash", "-c", words], cwd=project, env=self.env, start_new_session=True)
        for _ in range(1200):
            if gateway.poll() is not None:
                sys.exit(f"README's first command ended with {gateway.returncode}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz"):
                return gateway
            time.sleep(0.1)
        sys.exit("README's first command did not answer within two minutes")

    def run(self, name: str, client: Client) -> str:
        """ "ran", "skipped: why" or "FAILED: why"."""
        if client.needs and not shutil.which(client.needs):
            return f"skipped: {client.needs} is not there"
        if client.npm and not shutil.which("npm"):
            return "skipped: npm is not there"
        place = self.folder / name
        place.mkdir()
        env = self.env | {"PATH": f"{place}/venv/bin:{place}/node_modules/.bin:{self.env['PATH']}"}
        if why := self.install(client, place, env):
            return f"skipped: it cannot be installed here ({why})"
        language, text = blocks()[name]
        script = place / f"recipe{ENDINGS[language]}"
        script.write_text(text.replace("8045", self.port))
        try:
            done = subprocess.run(
                [*RUNNERS[language], str(script)],
                cwd=place,
                env=env,
                check=False,
                capture_output=True,
                text=True,
                timeout=180,
            )
        except subprocess.TimeoutExpired:
            return "FAILED: no end within 180 s"
        if client.said in re.sub(r"\s+", " ", done.stdout) and done.returncode == 0:
            return "ran"
        return f"FAILED ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def install(self, client: Client, place: Path, env: dict[str, str]) -> str:
        """Why it could not be installed, else nothing."""
        commands = []
        if client.pip:
            commands = [["python3", "-m", "venv", "venv"], ["venv/bin/pip", "-q", "install", client.pip]]
        if client.npm:
            commands = [["npm", "init", "-y"], ["npm", "install", client.npm]]
        try:
            for command in commands:
                subprocess.run(command, cwd=place, env=env, check=True, capture_output=True, text=True, timeout=900)
        except subprocess.TimeoutExpired:
            return "no end within 900 s"
        except subprocess.CalledProcessError as error:
            return str(error.stderr).strip()[-500:]
        return ""


def main() -> None:
    wanted = [word for word in sys.argv[1:] if not word.startswith("--")]
    assert set(blocks()) == set(CLIENTS), "README's recipes and the table differ"
    assert set(wanted) <= set(CLIENTS), f"the clients are {', '.join(CLIENTS)}"
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(Path(folder))
        gateway = walk.start()
        try:
            for name, client in CLIENTS.items():
                left_out = (wanted and name not in wanted) or ("--quick" in sys.argv and not client.quick)
                results[name] = "skipped: not asked for" if left_out else walk.run(name, client)
                print(f"{name:14} {results[name]}", flush=True)  # noqa: T201
        finally:
            os.killpg(gateway.pid, signal.SIGTERM)
            gateway.wait(timeout=40)
    sys.exit(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    main()
