"""The lone file, its header, and the example file, held against each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import antigravity_proxy as agproxy

ROOT = Path(__file__).parent.parent


def test_the_script_header_names_the_packages_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    header = re.search(r"# /// script\n(.+?)# ///", (ROOT / "antigravity_proxy.py").read_text(), re.DOTALL)
    assert header is not None
    script = tomllib.loads(header[1].replace("# ", ""))
    assert script["dependencies"] == project["dependencies"]
    assert script["requires-python"] == project["requires-python"]


def test_a_lone_copy_starts_without_aiohttp(tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ImportError('not for --help')")
    copy = tmp_path / "agproxy_copy.py"
    copy.write_bytes((ROOT / "antigravity_proxy.py").read_bytes())
    run = subprocess.run(
        [sys.executable, copy, "--help"], check=False, capture_output=True, text=True, cwd=tmp_path, timeout=30
    )
    assert (run.returncode, "serve" in run.stdout) == (0, True)


def test_the_example_file_loads_and_names_every_key() -> None:
    text = (ROOT / "accounts.yaml.example").read_text()
    config = agproxy.load_config(text, "example", {"AGPROXY_API_KEY": "k", "GEMINI_API_KEY": "g"})
    assert (config.api_key[0].key, config.accounts[0].api_key, config.auth) == ("k", "g", "off")
    tables = (agproxy.PROXY_KEYS, agproxy.MODELS_KEYS, agproxy.ACCOUNT_KEYS, agproxy.TIMEOUT_KEYS, agproxy.TRAIT_KEYS)
    for key in (key for table in tables for key in table):
        assert re.search(rf"^[ -]*{key}:", text, re.MULTILINE), key
