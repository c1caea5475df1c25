"""The floor plan: imports go one way, rooms are entered by their face, folders and files stay
small.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from holdfast import parallel

ROOT = Path(parallel.__file__ or "").parent.parent
HOUSES = ("parallel", "checkpoint", "elastic", "trainer", "launch")
BELOW = {
    "parallel": {"parallel", "_native"},
    "checkpoint": {"checkpoint", "parallel", "_native"},
    "elastic": {"elastic", "parallel", "_native"},
    "trainer": {"trainer", "checkpoint", "elastic", "parallel", "_native"},
    "launch": {"launch", "trainer", "checkpoint", "elastic", "parallel", "_native"},
}
OPEN = {
    f"holdfast.parallel.{name}"
    for name in ("errors", "faults", "keyed_random", "precision", "step_phases")
}
"""Modules beside the rooms of a house that other houses name; all else is entered by a face."""
MOST_ROOMS = 18
"""Entries of one folder, its own `__init__` aside."""
LONGEST_FUNCTION = 60
"""Lines of a function, its docstring not counted."""
WIDEST = 12
"""Attributes of a class, or parameters of a function, that need no reason."""
WIDE = {
    "checkpoint.convert.rules.rules.Rule": "a field for each word of a rule",
    "checkpoint.saving.save.Save": "the results that the five phases hand to each other",
    "elastic.agreement.Report": "so that a worker tells all of it or nothing",
    "launch.agent.settings.AgentSettings": "each is given by name, and none is derived",
    "parallel.comm.gloo_connection.Connection": "because one lock guards one state",
    "parallel.offload.hooks.offloader.Offloader": "one object that both hooks of autograd share",
    "parallel.offload.stores.staged_store.StagedCopy": "and has the fields that both need",
    "parallel.plan.plan.Plan": "because they are all that ranks must agree on",
    "trainer.checkpointing.Checkpoints": "hence its many attributes",
    "trainer.config.sections.CheckpointConfig": "A field for each key",
    "trainer.config.sections.ElasticConfig": "A field for each key",
    "trainer.config.sections.TrainConfig": "A field for each key",
    "trainer.models.section.ModelConfig": "A field for each key",
    "trainer.step.training.Training": "so it has an attribute for each",
}
"""What is wider all the same, with the words of its docstring that give the reason."""
RENDEZVOUS = {"Store", "TCPStore", "PrefixStore", "HashStore"}
# What tells a program's own group apart; none of them communicates.
RENDEZVOUS |= {"get_rank", "get_world_size", "is_available", "is_initialized"}


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


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_shows_few_rooms(folder: str) -> None:
    place = MODULES[folder].parent
    rooms = {
        path.stem
        for path in place.iterdir()
        if path.name not in ("__init__.py", "__init__.pyi", "py.typed", "__pycache__")
    }
    assert len(rooms) <= MOST_ROOMS, sorted(rooms)


def functions_and_classes() -> Iterator[tuple[str, ast.AST]]:
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield f"{module}.{node.name}", node


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    described = first if ast.get_docstring(node) is not None else None
    spared = (described.end_lineno or 0) - described.lineno + 1 if described is not None else 0
    return (node.end_lineno or 0) - node.lineno + 1 - spared


def test_functions_fit_on_a_screen() -> None:
    wrong = {
        name: lines
        for name, node in functions_and_classes()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := _code_lines(node)) > LONGEST_FUNCTION
    }
    assert wrong == {}


def _width(node: ast.AST) -> int:
    """How many attributes a class sets or declares, or how many parameters a function takes."""
    if isinstance(node, ast.ClassDef):
        stored = {
            inner.attr
            for inner in ast.walk(node)
            if isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        }
        declared = {
            statement.target.id
            for statement in node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        }
        return len(stored | declared)
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    given = node.args
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)


def test_no_class_is_wide_without_a_reason_in_its_docstring() -> None:
    said = {
        name.removeprefix("holdfast."): " ".join((ast.get_docstring(node) or "").split())
        for name, node in functions_and_classes()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and _width(node) > WIDEST
    }
    assert said.keys() == WIDE.keys()
    assert [name for name, reason in WIDE.items() if reason not in said[name]] == []


CALLED = {"AtPhase", "Callable", "Fence", "GradientSink"}
"""Types of hooks: what is called when something happens."""


def _hooks(tree: ast.Module) -> set[str]:
    """The names of attributes that are annotated as hooks."""
    return {
        node.target.attr if isinstance(node.target, ast.Attribute) else node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, (ast.Attribute, ast.Name))
        and any(isinstance(n, ast.Name) and n.id in CALLED for n in ast.walk(node.annotation))
    }


def _set_from_outside(tree: ast.Module) -> set[str]:
    """The names of attributes that are assigned on another object than `self`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }


def test_hooks_are_given_and_never_set_from_outside() -> None:
    trees = [tree_of(path) for path in MODULES.values()]
    hooks = set().union(*map(_hooks, trees))
    assert {"_at_half", "_fence", "_sink"} <= hooks, "attributes of other kinds do not count"
    assert hooks & set().union(*map(_set_from_outside, trees)) == set()


def test_a_hook_that_is_set_from_outside_is_seen() -> None:
    tree = ast.parse(
        "class A:\n    def f(self):\n        self.hook: Callable[[], None] = g\na.hook = g"
    )
    assert _hooks(tree) & _set_from_outside(tree) == {"hook"}


WALL_CLOCK = {
    "checkpoint.convert.formats.holdfast",
    "checkpoint.saving.save",
    "checkpoint.tools.verify",
    "parallel.comm.flight_recorder",
    "trainer.elastic.incidents",
    "trainer.reports.metrics",
    "trainer.reports.trace",
}
"""What writes the time of day into a record."""


def test_the_time_of_day_goes_into_records_and_decides_nothing() -> None:
    reads = {
        name.removeprefix("holdfast.")
        for name, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow")
    }
    assert reads == WALL_CLOCK


OTHER_ENDS = {"abandon", "disturb", "give_up", "halt", "interrupt", "shutdown", "stop", "terminate"}
"""Words for stopping that mean what `abort`, `cancel` or `close` means."""
RUN_ENDS = {"Session.stop", "ElasticSession.stop"}
"""A run stops when it was asked to: after a step, saved."""
BOUNDS = {"OwnedBlock.stop"}
"""Begin and end of a range."""


def _methods() -> Iterator[tuple[str, ast.FunctionDef]]:
    for _, node in functions_and_classes():
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def test_work_is_stopped_by_abort_cancel_or_close_each_with_one_meaning() -> None:
    methods = list(_methods())
    others = {name for name, method in methods if method.name in OTHER_ENDS}
    assert others == RUN_ENDS | BOUNDS
    aborts = {name: method for name, method in methods if method.name == "abort"}
    first = {name: [a.arg for a in method.args.args[1:2]] for name, method in aborts.items()}
    assert {name for name, arguments in first.items() if arguments != ["reason"]} == set()
    blocking = (".join(", ".wait(", "sleep(")
    assert [n for n, m in aborts.items() if any(b in ast.unparse(m) for b in blocking)] == []


def test_docstrings_say_first_what_a_thing_is() -> None:
    wrong = [
        name
        for name, node in functions_and_classes()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and (ast.get_docstring(node) or "").startswith(("Args:", "Raises:", "Returns:"))
    ]
    assert wrong == []


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
    allowed |= {"holdfast.checkpoint.api", "holdfast.checkpoint.program_state"}
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
