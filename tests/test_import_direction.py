"""Imports go one way: launch -> trainer -> {elastic, checkpoint} -> parallel -> _native."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import parallel

ROOT = Path(parallel.__file__ or "").parent.parent
RENDEZVOUS = {"Store", "TCPStore", "PrefixStore", "HashStore"}
# What tells a program's own group apart; none of them communicates.
RENDEZVOUS |= {"get_rank", "get_world_size", "is_available", "is_initialized"}
ALLOWED = {
    "parallel": {"parallel", "_native"},
    "checkpoint": {"checkpoint", "parallel", "_native"},
    "elastic": {"elastic", "parallel", "_native"},
    "trainer": {"trainer", "checkpoint", "elastic", "parallel", "_native"},
    "launch": {"launch", "trainer", "checkpoint", "elastic", "parallel", "_native"},
}


def imported_folders(source: str) -> Iterator[str]:
    """The holdfast folders that a module's source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            names = (
                [f"holdfast.{alias.name}" for alias in node.names]
                if node.module == "holdfast"
                else [node.module]
            )
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("holdfast."))


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_imports_only_what_lies_below_it(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules, f"no modules in {folder}"
    wrong = [
        f"{module.relative_to(ROOT)} imports holdfast.{name}"
        for module in modules
        for name in imported_folders(module.read_text())
        if name not in ALLOWED[folder]
    ]
    assert wrong == []


def test_an_import_against_the_direction_is_seen() -> None:
    source = "def f():\n    from holdfast.launch import cli\n"
    assert list(imported_folders(source)) == ["launch"]


def test_only_communicators_import_torch_distributed() -> None:
    """Everything else goes through the protocol, apart from types and the rendezvous store."""
    allowed = {"comm_gloo.py", "comm_nccl.py", "gloo_link.py"}
    wrong = []
    for folder in ALLOWED:
        for module in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(module.read_text())):
                plain = isinstance(node, ast.Import) and any(
                    alias.name.startswith("torch.distributed") for alias in node.names
                )
                named = (
                    {alias.name for alias in node.names}
                    if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed"
                    else set()
                )
                if (plain or named - RENDEZVOUS) and module.name not in allowed:
                    wrong.append(str(module.relative_to(ROOT)))
    assert wrong == []


def test_only_the_mpi_communicator_imports_mpi() -> None:
    wrong = [
        str(module.relative_to(ROOT))
        for folder in ALLOWED
        for module in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.module == "mpi4py")
        or (isinstance(node, ast.Import) and any(a.name == "mpi4py" for a in node.names))
    ]
    assert [name for name in wrong if Path(name).name != "comm_mpi.py"] == []
