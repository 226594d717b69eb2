"""The processes that are measured: agproxy, the pass-through, and LiteLLM's proxy where it is installed."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from meters import cores, cpu_s, rss_kib
from workloads import MODEL

HERE = Path(__file__).resolve().parent
AGPROXY = HERE.parent.parent / "antigravity_proxy.py"
# Imported, as an installed command does it, so that Python keeps the compiled form; a script is compiled at each start.
AS_INSTALLED = (
    "import importlib.util as u, sys; spec = u.spec_from_file_location('antigravity_proxy', sys.argv.pop(1)); "
    "made = u.module_from_spec(spec); sys.modules[spec.name] = made; spec.loader.exec_module(made); made.main()"
)
STARTED_WITHIN_S = 60
IDLE_S = 0.3
REQUESTS_MAX = 4000
"""More than a workload asks at once: a client's next request may come before the gateway has ended its last."""
PACKAGES = ("aiohttp", "orjson", "uvloop", "litellm")


@contextlib.contextmanager
def pinned(to: set[int]) -> Iterator[None]:
    """What is started meanwhile runs on these cores from its first instruction on."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, to)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class NotStarted(Exception):
    """Its text says whose process ended or stayed silent, and the end of its log."""


@dataclass(frozen=True)
class Kind:
    """How a gateway is started: `{port}` in its command becomes the port that it shall listen on."""

    name: str
    command: tuple[str, ...]
    dialect: str = "openai"
    health: str = "/healthz"
    key: str = "unused"
    effort: float = 1.0
    """The part of the requests that is asked of it; a slow peer's ratio needs no more."""


class Gateway:
    """One running gateway, alone on its core."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        self.port = free_port()
        self._log = folder / f"{kind.name.replace(' ', '_')}-{self.port}.log"
        command = [word.replace("{port}", str(self.port)) for word in kind.command]
        with pinned(cores()[0]), self._log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log)
        self.pid = self._process.pid
        self.start_cpu_s = self._until_healthy()

    def _until_healthy(self) -> float:
        """CPU seconds until the first health answer."""
        deadline = time.monotonic() + STARTED_WITHIN_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.kind.health}", timeout=5).close()
                return cpu_s(self.pid)
            time.sleep(0.002)
        self.stop()
        raise NotStarted(f"{self.kind.name} did not start:\n{self.log()}")

    def idle_kib(self) -> int:
        time.sleep(IDLE_S)
        return rss_kib(self.pid)

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def environment(home: Path) -> dict[str, str]:
    """This one without what would change a gateway's behaviour."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("AGPROXY_", "GEMINI_", "GOOGLE_"))
    }
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled, whatever it says
    return kept | {"HOME": str(home), "XDG_CONFIG_HOME": str(home), "NO_PROXY": "127.0.0.1"}


# ---- the kinds


def agproxy(name: str, python: str, file: Path, upstream: str, folder: Path) -> Kind:
    accounts = folder / f"{name}.yaml"
    accounts.write_text(f"accounts:\n  - name: bench\n    api_key: k\n    base_url: {upstream}\n")
    if "max_requests" in file.read_text(encoding="utf-8"):  # version 0.1.0 has no such key
        with accounts.open("a") as more:
            more.write(f"proxy:\n  max_requests: {REQUESTS_MAX}\n")
    accounts.chmod(0o600)
    arguments = ("serve", "--accounts", str(accounts), "--port", "{port}", "--log-level", "warning")
    subprocess.run([python, "-m", "py_compile", file], check=True)  # as pip does
    return Kind(name, (python, "-c", AS_INSTALLED, str(file), *arguments))


def pass_through(name: str, python: str, upstream: str) -> Kind:
    arguments = ("--port", "{port}", "--upstream", upstream)
    return Kind(name, (python, str(HERE / "passthrough.py"), *arguments), dialect="gemini")


def lite_llm(binary: str, upstream: str, folder: Path) -> Kind:
    config = folder / "litellm.json"  # which is YAML too
    base = f"{upstream}/v1beta/models/{MODEL}"
    given = {"model": f"gemini/{MODEL}", "api_key": "k", "api_base": base}
    key = f"sk-{secrets.token_hex(32)}"  # it refuses to start without one
    listed = {"model_list": [{"model_name": MODEL, "litellm_params": given}]}
    config.write_text(json.dumps(listed | {"general_settings": {"master_key": key}}))
    command = (binary, "--config", str(config), "--host", "127.0.0.1", "--port", "{port}", "--telemetry", "False")
    return Kind("LiteLLM", command, health="/health/liveliness", key=key, effort=0.05)


def find_lite_llm(python: str) -> str | None:
    beside = Path(python).parent / "litellm"
    return str(beside) if beside.exists() else shutil.which("litellm")


def versions(python: str) -> Mapping[str, str]:
    """What an interpreter and the packages that matter call themselves."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({'Python': platform.python_version(), **{n: found[n] for n in sys.argv[1:] if n in found}}))"
    )
    said = subprocess.run([python, "-c", code, *PACKAGES], check=True, capture_output=True, text=True).stdout
    found: Mapping[str, str] = json.loads(said)
    return found


# ---- the two partners


class Partner:
    """A process beside the gateways: the upstream, or the load generator."""

    def __init__(self, script: str) -> None:
        command = [sys.executable, str(HERE / script)]
        with pinned(cores()[1]):
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a partner process ended")
        return line

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
