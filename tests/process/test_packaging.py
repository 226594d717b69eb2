"""The lone file, its header, and the example file, held against each other."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, tree_of_the_file

import antigravity_proxy as agproxy


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
    config = agproxy.load_config(text, "example", {"AGPROXY_API_KEY": "k", "GEMINI_API_KEY": "g"}, Path.read_text)
    assert (config.api_key[0].key, config.accounts[0].api_key, config.auth) == ("k", "g", "off")
    tables = (
        *map(agproxy.keys_of, (agproxy.Config, agproxy.Timeouts)),
        agproxy.MODELS_KEYS,
        agproxy.ACCOUNT_KEYS,
        agproxy.TRAIT_KEYS,
    )
    for key in (key for table in tables for key in table):
        assert re.search(rf"^[ -]*{key}:", text, re.MULTILINE), key


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_two_builds_are_equal_and_hold_what_they_should(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buildapi = pytest.importorskip("flit_core.buildapi")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1750000000")
    built = []
    for copy in (tmp_path / "a", tmp_path / "b" / "longer"):
        copy.mkdir(parents=True)
        for name in ("antigravity_proxy.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(ROOT / name, copy / name)  # with another time and place
        monkeypatch.chdir(copy)
        built.append(copy / getattr(buildapi, f"build_{kind}")(str(copy)))
    assert built[0].read_bytes() == built[1].read_bytes()
    assert files_in(built[0]) == (WHEEL if kind == "wheel" else SDIST)


def files_in(package: Path) -> set[str]:
    """The names of a package's files, without its version."""
    with zipfile.ZipFile(package) if package.suffix == ".whl" else tarfile.open(package) as opened:
        names = opened.namelist() if isinstance(opened, zipfile.ZipFile) else opened.getnames()
    return {re.sub(r"^agproxy-[\d.]+(\.dist-info)?/", r"about\1/", name) for name in names}


WHEEL = {"antigravity_proxy.py"} | {
    f"about.dist-info/{name}" for name in ("entry_points.txt", "licenses/LICENSE", "WHEEL", "METADATA", "RECORD")
}
SDIST = {f"about/{name}" for name in ("antigravity_proxy.py", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO")}


def test_nothing_is_imported_that_is_not_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["fast"]]
    allowed = {re.split(r"[>=;<]", name)[0].replace("pyyaml", "yaml") for name in declared} | sys.stdlib_module_names
    source = (ROOT / "antigravity_proxy.py").read_text()
    imported = re.findall(r"(?:import_module|_Lazy)\(\"(\w+)", source)
    for node in ast.walk(tree_of_the_file()):
        imported += [one.name for one in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    assert len(imported) > 30
    assert {name.partition(".")[0] for name in imported} <= allowed
