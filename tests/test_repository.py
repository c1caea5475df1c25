"""The files beside the code agree with it: workflow, hooks, issue forms, citation."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / ".ci" / "run").exists(), reason="the files lie in the checkout"
)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_workflow_runs_the_ci_script_and_nothing_else() -> None:
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    used = [step["uses"].split("@")[0] for step in job["steps"] if "uses" in step]
    assert commands == [".ci/run"]
    assert used == ["actions/checkout", "actions/setup-python"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    (python,) = [s["with"]["python-version"] for s in job["steps"] if "with" in s]
    assert project()["requires-python"] == f">={python}"


def test_hooks_are_the_tools_that_make_lint_calls() -> None:
    hooks = [hook for repo in load(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    called = {line.split()[0] for line in lint.splitlines()[1:]}
    assert {hook["entry"].split()[0] for hook in hooks} == {
        tool.replace("$(BIN)", ".venv/bin") for tool in called
    }
    assert all(hook["language"] == "system" for hook in hooks)


def test_issue_forms_ask_something() -> None:
    forms = [
        path
        for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
        if path.name != "config.yml"
    ]
    assert forms
    for path in forms:
        form = load(str(path.relative_to(ROOT)))
        assert {"name", "description", "body"} <= form.keys()
        identifiers = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert identifiers
        assert len(set(identifiers)) == len(identifiers)


def test_the_citation_names_the_version_of_the_package() -> None:
    citation = load("CITATION.cff")
    assert citation["version"] == project()["version"]
    assert citation["license"] == project()["license"]
