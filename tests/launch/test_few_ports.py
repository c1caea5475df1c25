"""A machine with few local ports: a start with enough of them trains, one without is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support.runs.commands import HOLDFAST, environment, lines_of

pytestmark = [pytest.mark.mp]

PLAIN, ELASTIC = 40, 120
"""The local ports that four ranks need, without and with two agents."""


def train(folder: Path, ports: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Train in a network of its own that has so many local ports."""
    network = "ip link set lo up && echo $0 > /proc/sys/net/ipv4/ip_local_port_range || exit 77"
    shell = ["unshare", "-n", "sh", "-c", f'{network}; exec "$@"', f"20000 {19999 + ports}"]
    done = subprocess.run(
        [*shell, *HOLDFAST, "train", "run.toml", "--out", "out", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"a network of its own cannot be made: {done.stderr}")
    return done


AGENTS = ("--set", "elastic.enabled=true", "--set", "elastic.local_nodes=2")


@pytest.mark.parametrize(("ports", "elastic"), [(PLAIN, False), (ELASTIC, True)])
def test_a_start_with_one_port_too_few_is_refused_in_one_line(
    config: Path, ports: int, elastic: bool
) -> None:
    done = train(config.parent, ports - 1, *(AGENTS if elastic else ()))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"need at least {ports} local ports" in line
    assert f"(net.ipv4.ip_local_port_range is 20000 to {19998 + ports})" in line


def test_a_start_with_just_enough_ports_trains(config: Path) -> None:
    done = train(config.parent, PLAIN)
    assert done.returncode == 0, done.stderr
    assert len(lines_of(config.parent / "out/metrics.jsonl")) == 6
