"""A machine with few local ports: a start with enough of them trains, one without is refused, and
a run whose ports are taken later ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs.commands import HOLDFAST, environment, lines_of

pytestmark = [pytest.mark.mp]

PLAIN, ELASTIC = 40, 120
"""The local ports that four ranks need, without and with two agents."""

STEPS = 12
TAKER = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

def lines(name):
    path = Path("out", name)
    whole = path.read_bytes().split(b"\\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]

run = subprocess.Popen(sys.argv[1:])
while len(lines("metrics.jsonl")) < 3 and run.poll() is None:
    time.sleep(0.02)
held = []
try:
    while True:
        held.append(socket.socket())
        held[-1].bind(("127.0.0.1", 0))
except OSError:
    pass
os.kill([e["pid"] for e in lines("events.jsonl") if e.get("rank") == 1][-1], signal.SIGKILL)
sys.exit(run.wait())
"""
"""In the place of the command: takes all ports that are free while the run trains, and kills one of
its ranks."""


def train(
    folder: Path, ports: int, *arguments: str, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Train in a network of its own that has so many local ports."""
    network = "ip link set lo up && echo $0 > /proc/sys/net/ipv4/ip_local_port_range || exit 77"
    shell = ["unshare", "-n", "sh", "-c", f'{network}; exec "$@"', f"20000 {19999 + ports}"]
    done = subprocess.run(
        [*shell, *before, *HOLDFAST, "train", "run.toml", "--out", "out", *arguments],
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


@pytest.mark.chaos
@pytest.mark.skipif("HOLDFAST_SOAK_S" not in os.environ, reason="waits for limits: make soak")
def test_an_elastic_run_whose_ports_are_taken_later_goes_on_or_says_why_it_ends(
    config: Path,
) -> None:
    """A replacement may find the ports of the rank that was lost, or none."""
    keys = ("hang_timeout_s=2", "apart_s=15", 'chaos=[{fault="slow", rank=0, step=1, seconds=0.2}]')
    sets = [word for key in keys for word in ("--set", f"elastic.{key}")]
    before = (sys.executable, "-c", TAKER)
    steps = ("--set", f"train.steps={STEPS}")
    done = train(config.parent, ELASTIC, *AGENTS, *sets, *steps, before=before)
    taken = len(lines_of(config.parent / "out/metrics.jsonl"))
    assert taken >= 3, done.stderr
    if done.returncode == 0:
        assert taken == STEPS
    else:
        assert "holdfast: " in done.stderr
        assert "Traceback" not in done.stderr
