"""The admission of a node to a run by its health: a node that is sick is refused, with the reason.

The nodes that begin a run are judged by each other, before any worker starts, and their reports
are kept in RUN/health.json. A node that joins later is judged by those. So a refusal costs a run
that is under way nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from holdfast.launch.health.judgement import judged
from holdfast.launch.health.report import HealthReport, failed
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import scratch_folder
from holdfast.parallel.output import write_whole
from holdfast.parallel.reading import decode_json, read_regular
from holdfast.trainer.config import RunConfig, anchored, dump_toml
from holdfast.trainer.run import RunDirectory

CHECK_S = 90.0
"""Seconds after which a node that has not finished its checks is sick: it takes about ten."""
_MOST_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node that is not let in."""

    node: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"node {self.node} is not let in: {'; '.join(self.reasons)}"


class NodeRefused(ConfigError):
    """Nodes that are sick were not let in to a run."""

    def __init__(self, refused: Sequence[Refusal]) -> None:
        super().__init__("\n".join(map(str, refused)))
        self.refused = tuple(refused)


class WrittenHealth(msgspec.Struct, frozen=True):
    """The content of health.json."""

    start: str
    """The name of the start of the run to which it belongs."""
    nodes: tuple[HealthReport, ...]


def own_report(config: RunConfig, run: Path, node: str) -> HealthReport:
    """The report on this node, from a process of its own. Local; it takes some seconds.

    This process may not begin threads, nor use a GPU, before it forks. What hangs on a broken
    device is ended, and is the report.

    Args:
        run: the folder of the run, which need not exist yet.
        node: the name of this node in the run.
    """
    with scratch_folder() as folder:
        path = folder / "config.toml"
        write_whole(path, dump_toml(anchored(config)).encode())
        command = [sys.executable, "-m", "holdfast.launch.cli", "health", str(path), "--json"]
        command += ["--out", str(run.absolute())]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            said, errors = process.communicate(timeout=CHECK_S)
        except subprocess.TimeoutExpired:
            process.kill()  # in a call to a broken device it does not end, and is not waited for
            return _sick(node, f"its checks have not ended within {CHECK_S:g} s")
    try:
        (found,) = decode_json(said, _Answer).nodes
    except ValueError:
        reason = (errors.strip() or f"exit code {process.returncode}").splitlines()[-1]
        return _sick(node, f"its checks have failed: {reason}")
    return msgspec.structs.replace(found, node=node)


class _Answer(msgspec.Struct, frozen=True):
    """What the command prints."""

    nodes: tuple[HealthReport, ...]


def require_health(
    reports: Sequence[HealthReport], others: Sequence[HealthReport] = ()
) -> list[HealthReport]:
    """The reports of nodes, judged by each other. Pure.

    Args:
        others: reports of nodes in the run, against which the others are held.
    Raises:
        NodeRefused: some are sick.
    """
    found = judged(reports, others)
    refused = [Refusal(report.node, report.failures) for report in found if not report.passed]
    if refused:
        raise NodeRefused(refused)
    return found


def write_health(run: RunDirectory, start: str, reports: Sequence[HealthReport]) -> None:
    """Keep the reports of the nodes that begin a run, for those that join later.

    Raises:
        OSError: the disk refuses them.
    """
    write_whole(run.health, msgspec.json.encode(WrittenHealth(start, tuple(reports))) + b"\n")


def read_health(run: RunDirectory, start: str) -> tuple[HealthReport, ...]:
    """The reports of the nodes that have begun a run; none if they cannot be read."""
    try:
        found = decode_json(read_regular(run.health, _MOST_BYTES), WrittenHealth)
    except (OSError, ValueError):
        return ()
    return found.nodes if found.start == start else ()


def _sick(node: str, reason: str) -> HealthReport:
    return HealthReport(node, (failed("health", "unknown", "", reason),))
