"""Training over a limited link is measured, its bytes are counted, and no network stays behind."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.network.elastic_network import network

CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
AVAILABLE = CONTROL.with_name("tcp_available_congestion_control")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = [
    pytest.mark.mp,
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks lie in the checkout"),
]
ASKED = (
    "holdfast, fast",
    "holdfast, exact",
    "DDP, fused AdamW",
    "FSDP2, fused AdamW",
    "FSDP2, ZeRO-3",
    "holdfast, fast, elastic, 1 shadow",
    "plain loop, fused AdamW",
)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's module; the test is skipped where `tc` cannot limit a cable."""
    with network("a") as made:
        limit = f"tc -n {made.name('a')} qdisc add dev eth0 root tbf rate 1gbit burst 70k limit 1m"
        try:
            subprocess.run(limit.split(), check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"tc limits no rate here: {getattr(error, 'stderr', '') or error}")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("link")


def namespaces() -> set[str]:
    found = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    return {line.split()[0] for line in found.stdout.splitlines()}


def test_every_contestant_trains_over_the_link_and_its_bytes_are_counted(
    link: Any, tmp_path: Path
) -> None:
    before = CONTROL.read_text()
    limits = ["--tiny", "--rates", "1000", "--ranks", "2", "--repetitions", "1"]
    limits += ["--micro-batches", "2x32"]
    link.main([*limits, "--contestants", ";".join(ASKED), "--json", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out-1000-2-2x32.json").read_text())
    assert [row["name"] for row in record["rows"]] == list(ASKED)
    assert all(0 < speed < 1000 for speed in record["measured_mbit_per_s"])
    sent, least = record["sent_bytes"], record["least_bytes"]
    for counts in sent["DDP, fused AdamW"]:
        assert least["DDP, fused AdamW"] <= counts[0] < 1.5 * least["DDP, fused AdamW"]
    for name in ASKED[:-1]:
        assert all(counts[0] >= least[name] for counts in sent[name]), name
    shadowed = sent["holdfast, fast, elastic, 1 shadow"]
    assert all(counts[0] < 1.2 * least["holdfast, fast"] for counts in shadowed)
    assert all(counts[0] < 100_000 for counts in sent["plain loop, fused AdamW"])
    assert CONTROL.read_text() == before
    assert record["congestion_control"] in AVAILABLE.read_text().split()
    (prefix,) = {link.Cables("a").name(node).partition("-")[0] for node in "ab"}
    assert not [name for name in namespaces() if name.startswith(f"{prefix}-")]


def test_a_congestion_control_that_the_kernel_lacks_is_refused(link: Any) -> None:
    with pytest.raises(SystemExit, match=r"'qubic' is none that this kernel has: .*reno"):
        link.main(["--congestion-control", "qubic"])


def test_what_no_contestant_is_named_is_answered_by_those_there_are(link: Any) -> None:
    with pytest.raises(SystemExit, match=r"'DPP'; there are: holdfast, fast; "):
        link.main(["--contestants", "DPP"])
