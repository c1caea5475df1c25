"""The commit of a user's code is read as git keeps it, without git."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from holdfast.trainer.reports.start_facts import commit_of, start_facts

COMMIT, OTHER = "0123456789" * 4, "abcdef0123" * 4


def repository(root: Path, head: str) -> Path:
    (root / ".git/refs/heads").mkdir(parents=True)
    (root / ".git/HEAD").write_text(f"{head}\n")
    (root / "below").mkdir()
    return root / "below"


def test_a_commit_is_found_where_git_keeps_it(tmp_path: Path) -> None:
    below = repository(tmp_path / "a", "ref: refs/heads/main")
    assert commit_of(below) is None, "nothing is committed yet"
    packed = tmp_path / "a/.git/packed-refs"
    packed.write_text(f"# pack-refs\n{OTHER} refs/heads/other\n{COMMIT} refs/heads/main\n")
    assert commit_of(below) == COMMIT
    (tmp_path / "a/.git/refs/heads/main").write_text(f"{OTHER}\n")
    assert commit_of(below) == OTHER
    tree = tmp_path / "tree"
    tree.mkdir()
    kept = tmp_path / "a/.git/worktrees/tree"
    kept.mkdir(parents=True)
    (tree / ".git").write_text(f"gitdir: {kept}\n")
    (kept / "HEAD").write_text("ref: refs/heads/main\n")
    (kept / "commondir").write_text("../..\n")
    assert commit_of(tree) == OTHER
    assert commit_of(repository(tmp_path / "b", COMMIT)) == COMMIT
    assert commit_of(repository(tmp_path / "c", "../../../etc/passwd")) is None


def test_facts_are_json_and_name_the_machine() -> None:
    facts = json.loads(json.dumps(start_facts(torch.device("cpu"))))
    assert facts["torch"] == torch.__version__
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 1 << 28
    assert all(facts[name] for name in ("holdfast", "python", "host", "processor"))
