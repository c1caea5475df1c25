"""`holdfast check`: runs the layout at tiny size on local CPU ranks and reports differences."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from torch.distributed import Store

from holdfast.launch.launchers import start_workers
from holdfast.parallel.errors import counted
from holdfast.parallel.files import scratch_folder
from holdfast.parallel.output import plain_console, tell
from holdfast.trainer import describe, root_cause, run_worker
from holdfast.trainer.check import (
    Finding,
    compare,
    load_capture,
    run_layout,
    run_reference,
    save_capture,
    tiny_config,
)
from holdfast.trainer.config import RunConfig
from holdfast.trainer.run import RunDirectory, RunRequest, opened_run
from holdfast.trainer.step import choose_device
from holdfast.trainer.terms import make_certificate
from holdfast.trainer.worlds import WorldInfo

_SHOWN = 8
_KINDS = (
    "activation",
    "loss",
    "activation gradient",
    "gradient",
    "gradient norm",
    "parameter",
)


def check_layout(config: RunConfig, steps: int) -> int:
    """Run the check and print its result.

    Returns 0 if the layout agrees with one process, else 1.
    """
    tiny = tiny_config(config, steps)
    ranks = tiny.parallel.ranks
    with contextlib.ExitStack() as held:
        root = held.enter_context(scratch_folder())
        request = RunRequest(root / "config.toml", tiny, out=root / "run")
        run = held.enter_context(opened_run(request)).directory

        def task(config: RunConfig, world: WorldInfo, store: Store, _: RunDirectory) -> None:
            save_capture(run_layout(config, world, store), root / f"rank-{world.rank}.safetensors")

        def main(world: WorldInfo) -> int:
            return run_worker(tiny, world, run, announce=False, task=task)

        failed = [end for end in start_workers(main, ranks, run) if end.code]
        if failed:
            cause = root_cause(run, range(ranks))
            text = describe(cause, run) if cause else f"holdfast: rank {failed[0].rank} died"
            tell(text.split(" (log:")[0])
            return 1
        captures = [load_capture(root / f"rank-{rank}.safetensors") for rank in range(ranks)]
        findings = compare(captures, run_reference(tiny))
    _print(tiny, findings)
    return 1 if findings else 0


def print_certificate(config: RunConfig) -> None:
    """Print what this machine computes in the run's kinds of operations, as hashes."""
    device = choose_device(config, 0)
    console = plain_console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2))
    for kind, found in make_certificate(config, device).items():
        table.add_row(kind, found)
    console.print(f"certificate of this machine ({device.type}, {config.train.precision}):")
    console.print(table)


def _print(config: RunConfig, findings: Sequence[Finding]) -> None:
    console = plain_console(highlight=False)
    p, model = config.parallel, config.model
    console.print(
        f"layout: {p.mesh.text}, {counted(p.virtual, 'chunk')} per rank, "
        f"{p.schedule}; {p.ranks} ranks against one process, float64, {config.train.steps} steps, "
        f"{model.layers} blocks of width {model.hidden}",
        soft_wrap=True,
    )
    counts = Counter(finding.kind for finding in findings)
    table = Table(box=None, show_header=False, padding=(0, 2))
    for kind in _KINDS:
        verdict = f"{counts[kind]} differ" if counts[kind] else "equal"
        table.add_row(kind, verdict, style="red" if counts[kind] else "green")
    console.print(table)
    if findings:
        console.print(f"first: {findings[0]}", style="bold red", soft_wrap=True)
        for finding in findings[1:_SHOWN]:
            console.print(f"       {finding}", soft_wrap=True)
        if len(findings) > _SHOWN:
            console.print(f"       and {len(findings) - _SHOWN} more")
