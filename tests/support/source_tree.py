"""The project's own source, as tests of its structure read it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from holdfast import parallel

ROOT = Path(parallel.__file__ or "").parent.parent
HOUSES = ("parallel", "checkpoint", "elastic", "trainer", "launch")


def module_name(path: Path) -> str:
    """The dotted name of a file of this project."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("holdfast", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {
    module_name(path): path for house in HOUSES for path in sorted((ROOT / house).rglob("*.py"))
}
FOLDERS = {name for name, path in MODULES.items() if path.name == "__init__.py"}


@cache
def tree_of(path: Path) -> ast.Module:
    """A module's syntax tree; many tests look at it."""
    return ast.parse(path.read_text())


def functions_and_classes() -> Iterator[tuple[str, ast.AST]]:
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield f"{module}.{node.name}", node
