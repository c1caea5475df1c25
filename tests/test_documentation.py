"""Everything shown in the documentation runs, and everything named in it exists.

Python blocks run as they stand, and so do commands that are marked. Paths, modules, test ids,
commands and make targets that a page names are looked up in the checkout.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from holdfast.parallel.offload import compact_heap_environment
from support.processes.forked_command import ForkedCommand, forked_for_shells

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
IN_CHECKOUT = pytest.mark.skipif(
    not (ROOT / "README.md").exists(), reason="the pages lie in the checkout"
)
FOLDERS = [
    "parallel",
    "trainer",
    "elastic",
    "checkpoint",
    "launch",
    "csrc",
    "tests",
    "docs",
    "benchmarks",
    "examples",
    "requirements",
]
CODE = re.compile(r"`([^`\n]+)`")
AS_IT_STANDS = "train.md-7"
"""The block whose commands train the first example itself, in its own layout and in one process."""
SMALLER = {
    "hidden = 96": "hidden = 48",
    "intermediate = 256": "intermediate = 128",
    "seq_len = 128": "seq_len = 64",
    "global_batch = 16": "global_batch = 8",
}
"""What the other blocks train has a fourth of its tokens in a step: commands are what they show."""
LISTS = {"trainer/models/", "checkpoint/convert/formats/"}
"""Rooms in which each folder is one more of a kind."""
REFERENCE = re.compile(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", re.MULTILINE)
SHELL = re.compile(r"^```sh[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(python|toml|sh run)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list[Any]:
    found = []
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            if match.group(1) == kind:
                found.append(pytest.param(match.group(2), id=f"{page.name}-{number}"))
    for page in (ROOT / "docs" / "api").glob("*.rst") if kind == "python" else ():
        for number, match in enumerate(REFERENCE.finditer(page.read_text())):
            found.append(pytest.param(dedent(match.group(1)), id=f"{page.name}-{number}"))
    return found


def put_examples(folder: Path, changes: Mapping[str, str]) -> None:
    """Make a folder of the examples, with lines of the first one changed."""
    folder.mkdir()
    for path in (ROOT / "examples").iterdir():
        (folder / path.name).symlink_to(path)
    text = (ROOT / "examples" / "tiny.toml").read_text()
    for line, other in changes.items():
        assert text.count(f"\n{line}\n") == 1
        text = text.replace(f"\n{line}\n", f"\n{other}\n")
    (folder / "tiny.toml").unlink()
    (folder / "tiny.toml").write_text(text)


def environment(*first: Path) -> dict[str, str]:
    """That of a shell which finds commands in these folders first, then in the environment's."""
    folders = [*map(str, first), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}


@pytest.mark.mp
@IN_CHECKOUT
@pytest.mark.parametrize("source", blocks("python"))
def test_python_block_runs(source: str, tmp_path: Path) -> None:
    script, printed = tmp_path / "block.py", tmp_path / "printed"
    script.write_text(source)
    block = ForkedCommand((), printed, environment(), folder=tmp_path, script=script)
    assert block.wait(timeout=120) == 0, block.printed()


@pytest.mark.mp
@IN_CHECKOUT
@pytest.mark.parametrize("source", blocks("sh run"))
def test_marked_commands_run(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    trains = re.search(r"^ *holdfast (train|check)|-m holdfast", source, re.MULTILINE)
    as_it_stands = request.node.callspec.id == AS_IT_STANDS or not trains
    put_examples(tmp_path / "examples", {} if as_it_stands else SMALLER)
    with forked_for_shells(tmp_path / "bin") as forked:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", source],
            cwd=tmp_path,
            env=environment(forked) | compact_heap_environment(os.environ),  # so none starts twice
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr


@IN_CHECKOUT
@pytest.mark.parametrize("source", blocks("toml"))
def test_toml_block_is_a_valid_configuration(source: str, tmp_path: Path) -> None:
    from holdfast.trainer.config.loading import load_config

    config = tmp_path / "config.toml"
    config.write_text(source)
    load_config(config, [])


@IN_CHECKOUT
def test_pages_link_only_to_what_exists() -> None:
    missing = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert missing == []


@IN_CHECKOUT
def test_every_page_is_in_the_readme() -> None:
    linked = re.findall(r"\]\(docs/([^)#\s]+)", (ROOT / "README.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - set(linked) == set()


@IN_CHECKOUT
def test_the_map_of_rooms_is_complete() -> None:
    houses = ("parallel", "checkpoint", "elastic", "trainer", "launch")
    rooms = {
        str(face.parent.relative_to(ROOT)) + "/"
        for house in houses
        for face in (ROOT / house).rglob("__init__.pyi")
    }
    page = ROOT / "docs" / "architecture.md"
    mapped = {name for name in named(page) if name.endswith("/")}
    within = {room for room in rooms if any(room.startswith(f"{m}") for m in LISTS - {room})}
    halls = {f"{house}/" for house in houses} | {"parallel/offload/", "checkpoint/convert/"}
    assert rooms - mapped - within - halls == set()
    rows = re.findall(r"^\| (`[^|]+) \|", page.read_text(), re.MULTILINE)
    assert [row for row in set(rows) if rows.count(row) > 1] == [], "a room has one row"


@IN_CHECKOUT
def test_every_word_of_the_glossary_is_used_by_the_code() -> None:
    houses = ("parallel", "checkpoint", "elastic", "trainer", "launch")
    modules = [path for house in houses for path in (ROOT / house).rglob("*.py")]
    code = spoken(" ".join(path.read_text() for path in modules))
    unused = [word for word in glossary_words() if spoken(word) not in code]
    assert unused == []


def glossary_words() -> list[str]:
    """The words that the glossary explains, without those that are planned."""
    page = (ROOT / "docs" / "glossary.md").read_text().partition("## One word")[0]
    rows = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    words = [row for row in rows if row not in ("word", "---") and "(planned)" not in row]
    return [word for row in words for word in re.sub(r"\(.*?\)", "", row).strip().split(", ")]


def spoken(text: str) -> str:
    """Names and prose alike as lower-case words with one space between them."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return re.sub(r"[\s_.#\"`-]+", " ", apart).lower().strip()


def named(page: Path) -> list[str]:
    """What a page sets in code, without its code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return CODE.findall(text)


def commands(page: Path) -> list[str]:
    """The commands that a page shows: lines of shell blocks, and what it sets in code."""
    lines = [line for block in SHELL.findall(page.read_text()) for line in block.splitlines()]
    return [*lines, *named(page)]


@IN_CHECKOUT
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_paths_and_tests_exist(page: Path) -> None:
    paths = [name for name in named(page) if name.split("/")[0] in FOLDERS and "/" in name]
    missing = [name for name in paths if not exists(name)]
    assert missing == []


def exists(name: str) -> bool:
    """Whether a path of the checkout is there; with `::test_name`, that test too."""
    path, _, test = name.partition("::")
    if not (ROOT / path).exists():
        return False
    return not test or test in functions_of(ROOT / path)


@functools.cache
def functions_of(module: Path) -> frozenset[str]:
    """The test functions of a module."""
    body = ast.parse(module.read_text()).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


def test_what_is_not_there_is_noticed() -> None:
    here = "tests/test_documentation.py"
    assert exists(here)
    assert exists(f"{here}::test_what_is_not_there_is_noticed")
    assert not exists(f"{here}::test_of_nothing")
    assert not exists("tests/nothing.py")


@IN_CHECKOUT
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_exist(page: Path) -> None:
    text = page.read_text()
    for name in {name for name in re.findall(r"\bholdfast(?:\.[A-Za-z_]\w*)+", text)}:
        resolve(name)


def resolve(name: str) -> Any:
    """What a dotted name stands for: a module, or something in it."""
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return getattr(resolve(module), attribute)


@IN_CHECKOUT
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configuration_keys_exist(page: Path) -> None:
    keys = configuration_keys()
    sections = {key.partition(".")[0] for key in keys}
    found = {name.partition(" ")[0] for name in named(page)}
    named_keys = {n for n in found if re.fullmatch(rf"({'|'.join(sections)})\.[a-z_]+", n)}
    assert named_keys - keys == set()


@IN_CHECKOUT
def test_every_configuration_key_is_described_with_its_default() -> None:
    assert described_defaults() == configuration_defaults()


def described_defaults() -> dict[str, Any]:
    """What the page of the configuration gives as defaults, by `section.key`."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    found: dict[str, Any] = {}
    for name, text in re.findall(r"^## \[(\w+)\]\n(.*?)(?=^## |\Z)", page, re.M | re.S):
        for keys, values in re.findall(r"^\| (`\w+`[^|]*) \| ([^|]*) \|", text, re.MULTILINE):
            given = values.replace("`", "").replace("*required*", '"required"')
            shown = tomllib.loads(f"values = [{given}]")["values"]
            names = CODE.findall(keys)
            shown = shown * len(names) if len(shown) == 1 else shown
            found |= {f"{name}.{key}": v for key, v in zip(names, shown, strict=True)}
    return found


def configuration_defaults() -> dict[str, Any]:
    """Every key of the configuration with its default, in the form of TOML."""
    import msgspec

    from holdfast.parallel.optimizer import OPTIMIZERS
    from holdfast.trainer.config import RunConfig

    found: dict[str, Any] = {}
    for section in msgspec.structs.fields(RunConfig):
        for key in msgspec.structs.fields(section.type):
            value = "required" if key.required else key.default
            if key.default is msgspec.NODEFAULT and not key.required:
                value = key.default_factory()
            found[f"{section.name}.{key.name}"] = _in_toml(value)
    for rule in OPTIMIZERS.values():
        found |= {f"optimizer.{key.name}": key.default for key in rule.own_keys}
    return found | _defaults_of_families()


def _in_toml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _defaults_of_families() -> dict[str, Any]:
    """The keys of [model] that some families have, with their defaults."""
    import msgspec

    from holdfast.trainer.models import FAMILIES, ModelConfig, family_of

    return {
        f"model.{key.name}": _in_toml(msgspec.to_builtins(key.default))
        for name in FAMILIES
        for key in msgspec.structs.fields(family_of(name).section)
        if key.name not in ModelConfig.__struct_fields__
    }


def configuration_keys() -> frozenset[str]:
    """Every key of the configuration, as `section.key`."""
    import msgspec

    from holdfast.parallel.optimizer import OPTIMIZERS
    from holdfast.trainer.config import RunConfig

    return (
        frozenset(
            f"{section.name}.{key.name}"
            for section in msgspec.structs.fields(RunConfig)
            for key in msgspec.structs.fields(section.type)
        )
        | {*_defaults_of_families()}
        | {f"optimizer.{key.name}" for rule in OPTIMIZERS.values() for key in rule.own_keys}
    )


@IN_CHECKOUT
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_make_targets_and_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = " ; ".join(commands(page))
    assert set(re.findall(r"(?:^|; )make ([\w-]+)", shown)) - targets == set()
    assert set(re.findall(r"(?:^|; )holdfast ([a-z]\w*)", shown)) - holdfast_commands() == set()


@functools.cache
def holdfast_commands() -> frozenset[str]:
    """The commands of `holdfast`."""
    import typer

    from holdfast.launch.cli import application

    command = typer.main.get_command(application(""))
    return frozenset(command.commands)  # type: ignore[attr-defined]
