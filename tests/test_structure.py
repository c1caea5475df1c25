"""The floor plan: folders, functions and classes stay small, and keep the conventions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from support.source_tree import FOLDERS, MODULES, functions_and_classes, tree_of

MOST_ROOMS = 17
"""Entries of one folder, its own `__init__` aside."""
LONGEST_FUNCTION = 60
"""Lines of a function, its docstring not counted."""
WIDEST = 12
"""Attributes of a class, or parameters of a function, that need no reason."""
WIDE = {
    "checkpoint.convert.rules.rules.Rule": "a field for each word of a rule",
    "checkpoint.convert.sources.catalog.Catalog": "a field for each thing",
    "checkpoint.saving.save.Save": "the results that the five phases hand to each other",
    "elastic.agreement.reports.Report": "so that a worker tells all of it or nothing",
    "launch.report.incident_files.Incident": "A field for each thing that it tells",
    "launch.agent.settings.AgentSettings": "each is given by name, and none is derived",
    "parallel.comm.gloo_connection.Connection": "because one lock guards one state",
    "parallel.offload.hooks.offloader.Offloader": "one object that both hooks of autograd share",
    "parallel.offload.stores.staged_store.StagedCopy": "and has the fields that both need",
    "parallel.optimizer.accumulator.GradientAccumulator": "Its attributes are the sums",
    "parallel.optimizer.exchange.gradients.GradientExchange": "that the two threads share",
    "parallel.layout.parameters.ParameterSpec": "It has a field for each rule",
    "parallel.optimizer.sharded.ShardedOptimizer": "The phases share its attributes",
    "parallel.output.evidence.record.Evidence": "A field for each source",
    "parallel.output.disk_queue.DiskQueue": "because one lock guards all that a retry needs",
    "parallel.plan.plan.Plan": "because they are all that ranks must agree on",
    "launch.agent.worker_slot.WorkerSlot": "hence its many attributes",
    "trainer.elastic.session.ElasticSession": "Its attributes are the parts of a step",
    "trainer.elastic.worker_status.WorkerStatus": "because ranks conclude from all of it at once",
    "trainer.elastic.worker_status.RecoveryPlan": "because every field follows from all statuses",
    "trainer.saves.checkpointing.Checkpoints": "hence its many attributes",
    "trainer.config.optimizer_section.OptimizerConfig": "A field for each key",
    "trainer.config.data_section.DataConfig": "A field for each key",
    "trainer.config.sections.CheckpointConfig": "A field for each key",
    "trainer.config.sections.ElasticConfig": "A field for each key",
    "trainer.config.sections.ParallelConfig": "A field for each key",
    "trainer.config.sections.TrainConfig": "A field for each key",
    "trainer.reports.metrics.StepMetrics": "with a field for each key",
    "trainer.models.decoder.section.Design": "a field for each such thing",
    "trainer.models.deepseek_v3.family.DeepseekV3Config": "A field for each key",
    "trainer.models.family.Family": "a field for each thing that families do their own way",
    "trainer.models.section.ModelConfig": "A field for each key",
    "trainer.step.vote.progress.Outcome": "a field for each",
    "trainer.step.training.Training": "so it has an attribute for each",
}
"""What is wider all the same, with the words of its docstring that give the reason."""


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_shows_few_rooms(folder: str) -> None:
    place = MODULES[folder].parent
    rooms = {
        path.stem
        for path in place.iterdir()
        if path.name not in ("__init__.py", "__init__.pyi", "py.typed", "__pycache__")
    }
    assert len(rooms) <= MOST_ROOMS, sorted(rooms)


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


PERSONS = re.compile(r"\b(who|whom|whoever|nobody|somebody|everybody)\b", re.IGNORECASE)
"""Words that a docstring does not use for ranks, workers and other things."""


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_say_what_a_thing_is_and_name_it(module: str) -> None:
    texts = [
        node.value.value.strip()
        for node in ast.walk(tree_of(MODULES[module]))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    headless = [text for text in texts if text.startswith(("Args:", "Returns:", "Raises:"))]
    assert headless == []
    assert [text for text in texts if PERSONS.search(text)] == []


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
    assert {"_before", "_fence", "_complete"} <= hooks, "attributes of other kinds do not count"
    assert hooks & set().union(*map(_set_from_outside, trees)) == set()


def test_a_hook_that_is_set_from_outside_is_seen() -> None:
    tree = ast.parse(
        "class A:\n    def f(self):\n        self.hook: Callable[[], None] = g\na.hook = g"
    )
    assert _hooks(tree) & _set_from_outside(tree) == {"hook"}


WALL_CLOCK = {
    "launch.health.links",
    "checkpoint.convert.formats.holdfast",
    "checkpoint.saving.save",
    "checkpoint.tools.verify",
    "parallel.comm.flight_recorder",
    "parallel.output.evidence.record",
    "trainer.elastic.incidents",
    "trainer.reports.events",
    "trainer.reports.tensorboard",
    "trainer.reports.trace",
}
"""What writes the time of day into a record, or compares the clocks of nodes."""


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


PURE = {
    "all", "any", "callable", "dim", "endswith", "exists", "get", "getattr", "hasattr", "int",
    "is_contiguous", "is_file", "isfinite", "isinstance", "issubclass", "items", "keys", "len",
    "list", "max", "min", "numel", "prod", "range", "repr", "set", "size", "sorted", "startswith",
    "str", "sum", "tuple", "type", "values", "zip",
}  # fmt: skip
"""Calls that an assert may make, as `python -O` leaves asserts out."""


def test_asserts_only_look() -> None:
    acts = [
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assert)
        for part in ast.walk(node.test)
        if isinstance(part, ast.NamedExpr)
        or (isinstance(part, ast.Call) and ast.unparse(part.func).rpartition(".")[2] not in PURE)
    ]
    assert not acts


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
