"""`holdfast replay RUN`: repeats a run's membership changes on one machine, and its bits."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from holdfast.elastic import MembershipHistory, WorkerSpec, history_of
from holdfast.launch.agent import AgentSettings
from holdfast.launch.launchers import (
    explained,
    log_agents,
    node_settings,
    run_nodes,
    start_display,
    worker_main,
)
from holdfast.launch.proofs.compare_runs import bits_of
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import scratch_folder
from holdfast.parallel.links import new_secret
from holdfast.parallel.output import write_whole
from holdfast.parallel.reading import converted, open_regular
from holdfast.trainer.config import EVERY_CHANGE, ChaosConfig, RunConfig, load_config
from holdfast.trainer.reports import last_step
from holdfast.trainer.run import RunDirectory, RunRequest, checkpoint_root, opened_run, read_events


@dataclass(frozen=True, slots=True)
class Replay:
    """The comparison of a repeated run with the first."""

    steps: int
    first_difference: int | None
    """The first step with any different bit in loss or gradient norm; None if there is none."""
    changes: int
    different_plan: int | None
    """The first change followed by another plan; None if there is none."""

    @property
    def equal(self) -> bool:
        return self.first_difference is None and self.different_plan is None


def read_history(run: RunDirectory) -> MembershipHistory:
    """The history of a run's newest start.

    Raises:
        ConfigError: the run has no history, or it cannot be read.
    """
    try:
        open_regular(run.events).close()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(f"{run.events} cannot be read: {error.strerror}") from error
    events = read_events(run.events)
    if not events:
        raise ConfigError(f"{run.root} has no events.jsonl; name the folder of a run")
    return history_of(events)


def replay_run(source: RunDirectory, out: Path) -> tuple[int, Replay | None]:
    """Train in `out` with the losses, departures and arrivals of `source`, at the same steps.

    Call it in the main thread of a process without other threads.

    Returns:
        The exit code of the run, and the comparison if the run finished.
    Raises:
        ConfigError: there is nothing to repeat, or the checkpoint that the run began from is gone.
    """
    history = read_history(source)
    last = last_step(source.metrics) if history.last_step is None else history.last_step
    recorded = load_config(source.config, [])
    config = _config(recorded, history, last, out)
    begin = "none"
    if history.first_step:
        found = checkpoint_root(source.root, recorded)
        begin = str(found / f"step-{history.first_step:08d}")
        if not Path(begin).is_dir():
            raise ConfigError(
                f"the run began from {begin}, which is gone; there is nothing to begin from"
            )
    request = RunRequest(source.config, config, out=out, resume=begin, allow_change=EVERY_CHANGE)
    with opened_run(request) as opened:
        run = opened.directory
        write_whole(run.journal, msgspec.json.encode(asdict(history)))
        log_agents(run.agent_log)
        nodes = _nodes(config, run, history)
        display = start_display(config, run)
        try:
            with scratch_folder() as folder:
                code = run_nodes(nodes, worker_main(config, run), folder)
        finally:
            display.close()
    code = explained(code, run, (rank for ranks in history.nodes.values() for rank in ranks))
    # A run that stops before its last step ends with exit code 3.
    if last_step(run.metrics) < last:
        return code or 1, None
    return 0, _compare(source, run, history)


def _config(config: RunConfig, history: MembershipHistory, last: int, out: Path) -> RunConfig:
    faults = [converted(asdict(fault), ChaosConfig) for fault in history.faults]
    stop_after = last if last < config.train.steps else 0
    changes = msgspec.structs.replace
    return changes(
        config,
        train=changes(config.train, stop_after=stop_after),
        checkpoint=changes(config.checkpoint, path=str(out / "checkpoints")),
        elastic=changes(
            config.elastic, chaos=faults, respawn=True, lighthouse="", straggler_every=0
        ),
    )


def _nodes(config: RunConfig, run: RunDirectory, history: MembershipHistory) -> list[AgentSettings]:
    """The settings of an agent for each node of the run, and for each rank that joined later."""
    token, secret = uuid.uuid4().hex, new_secret()
    founders = config.parallel.ranks

    def may_start(spec: WorkerSpec) -> bool:
        committed = max(last_step(run.metrics), history.first_step)
        return history.may_start(
            spec.rank, spec.incarnation, committed, founder=spec.rank < founders
        )

    found = []
    for name, ranks in history.nodes.items():
        for founder in (True, False):
            mine = tuple(rank for rank in ranks if (rank < founders) == founder)
            if mine:
                node = node_settings(config, run, token=token, secret=secret, ranks=mine)
                machine = history.machines.get(name, node.machine)
                where = replace(node, node=name, machine=machine)
                found.append(replace(where, founder=founder, may_start=may_start))
    return found


def _compare(source: RunDirectory, run: RunDirectory, history: MembershipHistory) -> Replay:
    first, again = bits_of(source.metrics), bits_of(run.metrics)
    last = history.last_step or max(first, default=0)
    steps = [step for step in sorted(first) if history.first_step < step <= last]
    plans = [_shape(change.plan) for change in history.changes]
    repeated = [_shape(change.plan) for change in read_history(run).changes][: len(plans)]
    repeated += [None] * (len(plans) - len(repeated))
    return Replay(
        steps=len(steps),
        first_difference=next((s for s in steps if first[s] != again.get(s)), None),
        changes=len(plans),
        different_plan=next(
            (n for n, plan in enumerate(plans, 1) if plan != repeated[n - 1]), None
        ),
    )


def _shape(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan without its generation's number, which counts failed attempts too."""
    return {key: value for key, value in plan.items() if key != "generation"}


def describe_replay(replay: Replay) -> str:
    """The comparison in one line."""
    if replay.different_plan is not None:
        change = f"change {replay.different_plan} of {replay.changes}"
        return f"{change} led to another plan than in the run"
    if replay.first_difference is not None:
        return f"step {replay.first_difference} differs from the run's"
    return (
        f"{replay.changes} changes repeated, each with the same plan; "
        f"{replay.steps} steps have the same bits"
    )
