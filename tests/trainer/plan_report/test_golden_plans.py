"""`holdfast plan --json` says of a configuration what it said when tests/fixtures/plans was
written, and may say more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.runs.golden_runs import TESTS
from support.runs.old_runs import command, json_of

PLANS = TESTS / "fixtures" / "plans"


@pytest.mark.mp
@pytest.mark.parametrize(
    "case", json.loads((PLANS / "plans.json").read_text()), ids=lambda case: case["name"]
)
def test_the_plan_is_the_recorded_one(tmp_path: Path, case: Mapping[str, Any]) -> None:
    config, *options = case["arguments"]
    code, printed = command(tmp_path, "plan", str(PLANS / config), *options, "--json")
    assert code == 0, printed
    plan = json_of(printed)
    assert {key: plan[key] for key in case["plan"]} == case["plan"]
