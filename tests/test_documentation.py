"""Everything shown in the documentation runs: Python blocks as they stand, commands that are marked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(python|toml|sh run)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list[Any]:
    found = []
    for page in PAGES if PAGES[0].exists() else []:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            if match.group(1) == kind:
                found.append(pytest.param(match.group(2), id=f"{page.name}-{number}"))
    return found


def environment() -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not PAGES[0].exists(), reason="the pages lie in the checkout")
@pytest.mark.parametrize("source", blocks("python"))
def test_python_block_runs(source: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not PAGES[0].exists(), reason="the pages lie in the checkout")
@pytest.mark.parametrize("source", blocks("sh run"))
def test_marked_commands_run(source: str, tmp_path: Path) -> None:
    for folder in ("examples",):
        (tmp_path / folder).symlink_to(ROOT / folder)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", source],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not PAGES[0].exists(), reason="the pages lie in the checkout")
@pytest.mark.parametrize("source", blocks("toml"))
def test_toml_block_is_a_valid_configuration(source: str, tmp_path: Path) -> None:
    from holdfast.trainer.config.loading import load_config

    config = tmp_path / "config.toml"
    config.write_text(source)
    load_config(config, [])


@pytest.mark.skipif(not PAGES[0].exists(), reason="the pages lie in the checkout")
def test_pages_link_only_to_what_exists() -> None:
    missing = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert missing == []
