"""Runs every benchmark and keeps the JSON beside benchmarks/RESULTS.md: python
benchmarks/run_all.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "results"
RUNS = {
    "native_kernels.py": ["--json", str(OUTPUT / "native_kernels.json")],
    "executor.py": ["--repetitions", "7", "--json", str(OUTPUT / "executor.json")],
    "communicator_edit.py": ["--json", str(OUTPUT / "communicator_edit.json")],
    "data_parallel.py": ["--json", str(OUTPUT / "data_parallel")],
    "link.py": ["--json", str(OUTPUT / "link")],
    "checkpoint.py": ["--json", str(OUTPUT / "checkpoint.json")],
    "checkpoint_scale.py": ["--json", str(OUTPUT / "checkpoint_scale.json")],
    "elastic_overhead.py": ["--json", str(OUTPUT / "elastic_overhead.json")],
    "lost_rank.py": ["--json", str(OUTPUT / "lost_rank.json")],
    "smaller_replicas.py": ["--json", str(OUTPUT / "smaller_replicas.json")],
    "recovery.py": ["--json", str(OUTPUT / "recovery.json")],
    "replan_scale.py": ["--json", str(OUTPUT / "replan_scale.json")],
    "convert.py": ["--json", str(OUTPUT / "convert.json")],
    "offload.py": ["--folder", str(OUTPUT), "--json", str(OUTPUT / "offload.json")],
    "vocab_chunk.py": ["--json", str(OUTPUT / "vocab_chunk.json")],
    "compiled_layer.py": ["--json", str(OUTPUT / "compiled_layer.json")],
    "atoms.py": ["--json", str(OUTPUT / "atoms")],
    "long_context.py": ["--json", str(OUTPUT / "long_context.json")],
    "stretches.py": ["--json", str(OUTPUT / "stretches")],
    "tensor_strips.py": ["--json", str(OUTPUT / "tensor_strips")],
    "optimizers.py": ["--json", str(OUTPUT / "optimizers.json")],
    "experts.py": ["--json", str(OUTPUT / "experts.json")],
    "expert_parallel.py": ["--json", str(OUTPUT / "expert_parallel")],
    "expert_losses.py": ["--json", str(OUTPUT / "expert_losses.json")],
    "expert_learning.py": ["--json", str(OUTPUT / "expert_learning.json")],
    "documents.py": ["--json", str(OUTPUT / "documents.json")],
    "startup.py": ["--json", str(OUTPUT / "startup.json")],
}


def main() -> int:
    OUTPUT.mkdir(exist_ok=True)
    failed = [
        name
        for name, arguments in RUNS.items()
        if subprocess.run([sys.executable, str(HERE / name), *arguments], check=False).returncode
    ]
    if failed:
        print("failed:", ", ".join(failed), file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
