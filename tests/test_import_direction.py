"""Imports go one way, and folders are entered by their face."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from support.source_tree import FOLDERS, HOUSES, MODULES, ROOT, tree_of

BELOW = {
    "parallel": {"parallel", "_native"},
    "checkpoint": {"checkpoint", "parallel", "_native"},
    "elastic": {"elastic", "parallel", "_native"},
    "trainer": {"trainer", "checkpoint", "elastic", "parallel", "_native"},
    "launch": {"launch", "trainer", "checkpoint", "elastic", "parallel", "_native"},
}
OPEN = {
    f"holdfast.parallel.{name}"
    for name in (
        "errors",
        "keyed_random",
        "precision",
        "reading",
        "waiting",
    )
}
"""Modules beside the rooms of a house that other houses name; all else is entered by a face."""
# The rendezvous store, and the error of its operations.
RENDEZVOUS = {"Store", "TCPStore", "PrefixStore", "HashStore", "DistError"}
# What tells a program's own group apart; none of them communicates.
RENDEZVOUS |= {"get_rank", "get_world_size", "is_available", "is_initialized"}


def imports(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Every import of this project in a module's source, as (module, name in it), anywhere in
    it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found: list[tuple[str, str | None]] = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute"
            found = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in found:
            if module == "holdfast" and name is not None:
                yield f"holdfast.{name}", None
            elif module.startswith("holdfast."):
                yield module, name


def folder_of(module: str) -> str:
    return module if module in FOLDERS else module.rpartition(".")[0]


def may_reach(module: str, importer: str) -> str:
    """The deepest prefix of `module` that `importer` may name: one step below what both share.

    Of another house it may name the rooms, and the modules in `OPEN`.
    """
    there, here = module.split("."), folder_of(importer).split(".")
    shared = 0
    while shared < min(len(there), len(here)) and there[shared] == here[shared]:
        shared += 1
    room = ".".join(there[:3])
    open_to_all = room in FOLDERS or room in OPEN
    return ".".join(there[: max(shared + 1, 3 if open_to_all else 2)])


def reaches_inside(module: str, name: str | None, importer: str) -> bool:
    """Whether an import passes by the face of the folder that it enters."""
    inner = f"{module}.{name}"
    if module in FOLDERS and inner in MODULES and may_reach(inner, importer) != inner:
        return name not in importlib.import_module(module).__all__
    return module.startswith("holdfast.") and may_reach(module, importer) != module


@pytest.mark.parametrize("house", HOUSES)
def test_house_imports_only_what_lies_below_it(house: str) -> None:
    wrong = [
        f"{importer} imports {module}"
        for importer, path in MODULES.items()
        if importer.split(".")[1] == house
        for module, _ in imports(tree_of(path))
        if module.split(".")[1] not in BELOW[house]
    ]
    assert wrong == []


def test_an_import_against_the_direction_is_seen() -> None:
    source = "def f():\n    from holdfast.launch import cli\n"
    assert list(imports(ast.parse(source))) == [("holdfast.launch", "cli")]


def test_other_folders_are_entered_by_their_face() -> None:
    wrong = [
        f"{importer} imports {module} ({name}): import it from {may_reach(module, importer)}"
        for importer, path in MODULES.items()
        for module, name in imports(tree_of(path))
        if reaches_inside(module, name, importer)
    ]
    assert wrong == []


def test_an_import_past_the_face_is_seen() -> None:
    inside, importer = "holdfast.parallel.layout.boxes", "holdfast.trainer.loop"
    assert reaches_inside(inside, "Box", importer)
    assert not reaches_inside("holdfast.parallel.layout", "Box", importer)
    assert not reaches_inside(inside, "Box", "holdfast.parallel.layout.mesh")
    assert reaches_inside(inside, "Box", "holdfast.parallel.plan.plan")
    assert reaches_inside("holdfast.elastic.membership", "Membership", importer)
    assert not reaches_inside("holdfast.elastic.membership", "Membership", "holdfast.elastic.watch")
    assert not reaches_inside("holdfast.elastic", "Membership", importer)
    assert not reaches_inside("holdfast.parallel.errors", "PeerLost", importer)


def _room_arrows() -> dict[str, set[str]]:
    """Which folders and modules import which, as seen from the folder that holds both."""
    arrows: dict[str, set[str]] = {}
    for importer, path in MODULES.items():
        for module, name in imports(tree_of(path)):
            inner = f"{module}.{name}"
            there = (inner if inner in MODULES else module).split(".")
            here = importer.split(".")
            shared = 0
            while shared < min(len(there), len(here)) and there[shared] == here[shared]:
                shared += 1
            a, b = ".".join(here[: shared + 1]), ".".join(there[: shared + 1])
            if a != b and shared >= 2:
                arrows.setdefault(a, set()).add(b)
    return arrows


def test_no_circle_of_imports_between_rooms() -> None:
    arrows = _room_arrows()
    done: set[str] = set()
    path: list[str] = []

    def walk(room: str) -> None:
        assert room not in path, " -> ".join([*path[path.index(room) :], room])
        if room in done:
            return
        path.append(room)
        for other in sorted(arrows.get(room, ())):
            walk(other)
        done.add(path.pop())

    for room in sorted(arrows):
        walk(room)


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_face_exports_what_exists(folder: str) -> None:
    face = importlib.import_module(folder)
    assert (face.__doc__ or "").strip(), f"{folder} does not say what it is for"
    for name in getattr(face, "__all__", ()):
        assert getattr(face, name) is not None


@cache
def _words_outside(folder: str) -> frozenset[str]:
    """The words of the code outside of a folder, and of the pages for users."""
    place = MODULES[folder].parent
    code = [path for house in HOUSES for path in (ROOT / house).rglob("*.py*")]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.rst")]
    texts = [path for path in code if path.suffix in (".py", ".pyi") and place not in path.parents]
    return frozenset(re.findall(r"\w+", " ".join(path.read_text() for path in [*texts, *pages])))


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_face_lists_what_is_used_outside_and_no_more(folder: str) -> None:
    names = set(getattr(importlib.import_module(folder), "__all__", ()))
    assert names - _words_outside(folder) == set()


def _said_to_be_imported(folder: str) -> list[str]:
    """What a folder's docstring says that it may import: rooms, with all that is in them."""
    said = " ".join((ast.get_docstring(tree_of(MODULES[folder])) or "").split())
    found = re.search(r"May import (.*?)\.( |$)", said)
    return [f"holdfast.{name}" for name in re.split(r", | and ", found.group(1))] if found else []


def _imported_from_outside(folder: str) -> set[str]:
    """The modules outside of a folder that it imports, its inner folders included."""
    found = set()
    for importer, path in MODULES.items():
        if f"{importer}.".startswith(f"{folder}."):
            for module, name in imports(tree_of(path)):
                inner = f"{module}.{name}"
                found.add(inner if inner in MODULES else module)
    return {module for module in found if not f"{module}.".startswith(f"{folder}.")}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_imports_what_it_says_and_no_more(folder: str) -> None:
    said, imported = _said_to_be_imported(folder), _imported_from_outside(folder)
    wrong = {m for m in imported if not any(f"{m}.".startswith(f"{name}.") for name in said)}
    assert wrong == set(), f"{folder} may import {said}"
    unused = {name for name in said if not any(f"{m}.".startswith(f"{name}.") for m in imported)}
    assert unused == set(), f"{folder} says that it may import what it does not import"


def _distributed_names(path: Path) -> set[str]:
    """What a module uses of torch.distributed beyond rendezvous, however it is spelled."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("torch.distributed")}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch.distributed":
            found |= {alias.name for alias in node.names} - RENDEZVOUS
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "torch.distributed."
        ):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "distributed"
        ):
            found |= {f"distributed.{node.attr}"} - {f"distributed.{n}" for n in RENDEZVOUS}
    return found


def test_only_communicators_use_torch_distributed() -> None:
    """Everything else goes through the protocol, apart from types and the rendezvous store."""
    allowed = {f"holdfast.parallel.comm.{name}" for name in ("gloo", "gloo_connection", "nccl")}
    # The library saves the state of programs that use torch's own groups and DTensors.
    allowed |= {"holdfast.checkpoint.api", "holdfast.checkpoint.program.tensors"}
    wrong = {
        module: found
        for module, path in MODULES.items()
        if module not in allowed and (found := _distributed_names(path))
    }
    assert wrong == {}


def test_only_the_mpi_communicator_imports_mpi() -> None:
    wrong = [
        module
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.ImportFrom) and node.module == "mpi4py")
        or (isinstance(node, ast.Import) and any(a.name == "mpi4py" for a in node.names))
    ]
    assert [name for name in wrong if name != "holdfast.parallel.comm.mpi"] == []
