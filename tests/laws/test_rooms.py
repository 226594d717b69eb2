"""The walls between the rooms of the one file: the map equals the banners, nobody looks down, pure rooms stay pure."""

import ast
import re

from conftest import ROOT, tree_of_the_file

SOURCE = (ROOT / "antigravity_proxy.py").read_text(encoding="utf-8")
TREE = tree_of_the_file()
BANNERS = [
    (n, m[1], m[2]) for n, line in enumerate(SOURCE.splitlines(), 1) if (m := re.match(r"# (\d+)\. (.+)$", line))
]
PURE = {"Errors", "JSON", "Vocabulary", "Config", "Doors", "Chat", "Responses", "Embeddings", "Models"} | {
    *("To Gemini", "From Gemini", "Signatures", "Accounts", "Journal"),
}
IMPURE_NAMES = {"aiohttp", "web", "asyncio", "time", "random", "secrets", "open", "os", "sys", "logging"}


def room_of(line: int) -> int:
    return max((i for i, (start, _, _) in enumerate(BANNERS) if start <= line), default=-1)


def test_the_map_in_the_docstring_equals_the_banners() -> None:
    promised = re.findall(r"^ +(\d+) (.+?)  +\S", ast.get_docstring(TREE, clean=False) or "", re.MULTILINE)
    assert promised == [(number, name) for _, number, name in BANNERS]


def test_no_room_names_a_later_one() -> None:
    defined: dict[str, int] = {}
    for node in TREE.body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        defined |= {name: room_of(node.lineno) for name in names}
    wrong = [
        f"line {n.lineno}: {n.id}"
        for n in ast.walk(TREE)
        if isinstance(n, ast.Name) and defined.get(n.id, -1) > room_of(n.lineno) >= 0
    ]
    assert len(defined) > 20
    assert wrong == []


def test_pure_rooms_name_no_io_clock_or_chance() -> None:
    wrong = [
        f"line {n.lineno}: {n.id}"
        for n in ast.walk(TREE)
        if isinstance(n, ast.Name) and n.id in IMPURE_NAMES and room_of(n.lineno) >= 0
        if BANNERS[room_of(n.lineno)][2] in PURE
    ]
    assert wrong == []


def test_no_function_is_longer_than_60_lines() -> None:
    functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60] == []
