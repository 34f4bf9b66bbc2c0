"""The budgets of the source: lengths, globals, probes, letters of shapes, characters."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megavid

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "megavid").rglob("*.py"))
TEXTS = [*SOURCES, *(ROOT / "tools").glob("*.py"), *(ROOT / "tests").rglob("*.py")]

FILE_LINES = 420  # the budget is about 400
FUNCTION_LINES = 80  # the budget is about 60
PROBES_PER_1000_LINES = 1.0


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path, ast.parse(path.read_text(), filename=str(path))


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for function in _functions(ast.parse(text)):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= FUNCTION_LINES, f"{function.name} has {length} lines"


def test_there_is_no_global() -> None:
    found = [f"{_name(p)}:{n.lineno}" for p, tree in _trees() for n in ast.walk(tree) if isinstance(n, ast.Global)]
    assert found == []


def test_no_error_is_swallowed_unseen() -> None:
    found = []
    for path, tree in _trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            swallows = all(isinstance(statement, ast.Pass) for statement in node.body)
            if node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "BaseException" and swallows):
                found.append(f"{_name(path)}:{node.lineno}")
    assert found == []


def test_probes_are_rare() -> None:
    probes = [
        f"{_name(path)}:{node.lineno}"
        for path, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    ]
    lines = sum(len(path.read_text().splitlines()) for path in SOURCES)
    assert len(probes) <= max(3.0, PROBES_PER_1000_LINES * lines / 1000), probes


def test_everything_public_has_a_docstring() -> None:
    found = []
    for path, tree in _trees():
        if path.name != "__init__.py" and path.stat().st_size and not ast.get_docstring(tree):
            found.append(_name(path))
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name[0] == "_":
                continue
            if not ast.get_docstring(node):
                found.append(f"{_name(path)}:{node.lineno} {node.name}")
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and inner.name[0] != "_" and not ast.get_docstring(inner):
                    found.append(f"{_name(path)}:{inner.lineno} {node.name}.{inner.name}")
    assert found == []


@pytest.mark.parametrize("path", TEXTS, ids=_name)
def test_source_is_ascii(path: Path) -> None:
    assert path.read_text(encoding="utf-8").isascii()


def test_letters_of_shapes_are_in_the_legend() -> None:
    legend = set(re.findall(r"(?:^|\s{2,})([A-Z])  ?\S", megavid.__doc__ or "", flags=re.M))
    assert {"B", "T", "D", "E", "P", "G", "Q"} <= legend
    unknown = set()
    for path, tree in _trees():
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            suffix = (
                name.rpartition("_")[2] if re.fullmatch(r"[a-z][a-z0-9_]*_[A-Za-z0-9]*[A-Z][A-Za-z0-9]*", name) else ""
            )
            # An "x" stands for dims that do not matter, a digit for itself, lower case for the local shard.
            letters = {letter.upper() for letter in suffix if letter.isalpha() and letter != "x"}
            unknown |= {f"{_name(path)}: {name}" for letter in letters if letter not in legend}
    assert unknown == set()


def test_todos_carry_an_issue_number() -> None:
    found = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX)\b", line) and not re.search(r"TODO\(#\d+\)", line):
                found.append(f"{_name(path)}:{number}")
    assert found == []
