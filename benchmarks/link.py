"""A whole training step of replicas that are joined by a network of a given rate.

Each rank has a network namespace of its own, with one cable to a bridge; `tc` limits both ends of
each cable, so that a rank sends and receives at the rate and no faster. The ranks share the cores
of this machine, one thread each. Contestants (training_contestants.py) live in the same processes
and take a step in turn. Each has a column for the processor time of a step, which other work on the
machine leaves much as it is.

Beside the times stand the bytes that the busiest rank sent in a step, as its interface counts
them, with headers, acknowledgements, repeated packets and the barriers around the step. An
interface counts a TCP segment of up to 64 KiB before it is cut into packets, with one header; the
limit counts packets of 1500 bytes, whose headers take 4.6 % of the rate. The least that a
data-parallel step can send, in bytes of gradients and parameters, is 2 (n - 1) / n of 4 bytes a
parameter: each rank's part of the sums goes to the others, and their parts of the parameters come
back.

    python benchmarks/link.py [--rates 200,1000,5000] [--ranks 2,4] [--micro-batches 2x128] \\
        [--repetitions 3] [--contestants "holdfast, fast; DDP, fused AdamW"] [--json PREFIX] \\
        [--congestion-control cubic]

TCP is that of Linux as it comes (cubic) where that can be set, whatever this machine prefers. Where
several ranks send to one, another one may cost a quarter of the rate (RESULTS.md).

Needs Linux, root and iproute2. What it makes is gone when it ends, also when it is interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from operator import attrgetter
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from harness import Measurement, report
from link_ranks import Node
from support.network.elastic_network import Network
from support.processes.cluster import Cluster
from training_contestants import BUILDERS, Work

MODEL = {
    "layers": 6,
    "hidden": 512,
    "intermediate": 1408,
    "heads": 8,
    "kv_heads": 8,
    "vocab": 4096,
}
"""23.5 million parameters."""
TINY = {"layers": 2, "hidden": 96, "intermediate": 256, "heads": 4, "kv_heads": 4, "vocab": 512}
NODES = "abcdefgh"
"""Of one rank each."""
MICRO_BATCHES = 4
"""Of each replica."""
BASE = (2, 128)
"""Sequences of a micro-batch, and their tokens."""
CASES = {200: (BASE, (5, 128), (1, 16))}
"""The micro-batches by rate, if not the base alone: one with which computation takes about as long
as the exchange, and one with which it takes next to nothing, so that the cores here matter little.
"""
REFERENCE = "DDP, fused AdamW"
CONGESTION_CONTROL = "cubic"
"""Linux's own default."""


class Cables(Network):
    """A network whose cables have a limited rate."""

    congestion_control = ""
    """TCP's, in all nodes."""

    def limit(self, mbit: int) -> None:
        """Limit what each node sends and receives.

        A millisecond may pass at once, and at least one segment of 64 KiB as TCP gives it to the
        interface; four milliseconds may wait.
        """
        per_ms = mbit * 1000 // 8
        burst, waiting = max(70_000, per_ms), max(200_000, 4 * per_ms)
        for node in map(self.node, range(self.size)):
            for place, device in ((node, "eth0"), ("hub", node)):
                subprocess.run(
                    f"tc -n {self.name(place)} qdisc replace dev {device} root tbf "
                    f"rate {mbit}mbit burst {burst} limit {waiting}".split(),
                    check=True,
                    capture_output=True,
                    text=True,
                )

    def places(self, ranks: int) -> list[Node]:
        """The places of the first ranks."""
        master = self.address(self.node(0))
        nodes = [self.node(rank) for rank in range(ranks)]
        return [Node(self.name(node), self.address(node), master) for node in nodes]


@contextmanager
def congestion_control(asked: str | None) -> Iterator[str]:
    """Have network namespaces that are made meanwhile use a congestion control of TCP.

    Args:
        asked: its name; None: Linux's default, or this machine's where that cannot be set.
    Returns:
        The name of the one that they use.
    """
    settings = Path("/proc/sys/net/ipv4")
    setting = settings / "tcp_congestion_control"
    known = (settings / "tcp_available_congestion_control").read_text().split()
    if asked is not None and asked not in known:
        raise SystemExit(
            f"link.py: --congestion-control: {asked!r} is none that this kernel has: "
            f"{', '.join(known)}"
        )
    before = setting.read_text().strip()
    try:
        try:
            setting.write_text(asked or CONGESTION_CONTROL)
        except OSError:
            if asked is not None:
                raise
        yield setting.read_text().strip()
    finally:
        if setting.read_text().strip() != before:
            setting.write_text(before)


@contextmanager
def cables(ranks: int, control: str | None = None) -> Iterator[Cables]:
    """The network of these ranks; SystemExit with a sentence where none can be made.

    Args:
        control: as for `congestion_control`.
    """
    made = Cables(NODES[:ranks])
    try:
        try:
            with congestion_control(control) as made.congestion_control:
                made.make()
            made.limit(1000)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip()
            raise SystemExit(
                "link.py: networks of limited rate cannot be made here; that needs root, network "
                f"namespaces and iproute2 with tc and tbf: {reason}"
            ) from error
        yield made
    finally:
        made.close()


def least_bytes(work: Work) -> float:
    """What a rank has to send in a data-parallel step.

    A shadow adds nothing: the holder of a copy gets gradients for it instead of parameters.
    """
    return 4 * work.parameters / work.ranks * 2 * (work.ranks - 1)


def compare(net: Cables, rate: int, work: Work, arguments: argparse.Namespace) -> None:
    """Measure all contestants on one network, and report."""
    nodes = net.places(work.ranks)
    # Some peers keep what they know of their groups in the process, so each case has its own.
    with closing(Cluster(work.ranks)) as cluster:
        results = cluster.run(
            "link_ranks:measure",
            work.ranks,
            nodes=nodes,
            contestants=arguments.contestants,
            repetitions=arguments.repetitions,
            work=work,
            timeout_s=3600,
        )
    speeds, found = zip(*results, strict=True)
    rows = [
        Measurement(name, tuple(step.seconds for step in steps)) for name, steps in found[0].items()
    ]
    sent, cpu_s = (
        {
            row.name: max(statistics.median(map(part, by_rank[row.name])) for by_rank in found)
            for row in rows
        }
        for part in (attrgetter("sent_bytes"), attrgetter("cpu_s"))
    )
    least = {row.name: least_bytes(work) for row in rows}
    transfers = [speed for speed, _ in speeds]
    note = (
        f"{work.parameters / 1e6:.1f} million parameters: {work}; plain TCP reached "
        f"{min(transfers):.0f}..{max(transfers):.0f} Mbit/s in all ranks at once; a round trip "
        f"took {speeds[0][1]:.2f} ms; TCP with {net.congestion_control}; "
        f"load {os.getloadavg()[0]:.1f}; ratio = time / {REFERENCE}; "
        "cpu s, MB = processor time, and megabytes sent, of the busiest rank in a step"
    )
    reference = next((row.median_s for row in rows if row.name == REFERENCE), None)
    prefix = arguments.json
    report(
        f"training step, {work.ranks} replicas, {rate} Mbit/s",
        rows,
        {} if reference is None else {row.name: reference for row in rows},
        json_path=prefix and f"{prefix}-{rate}-{work.ranks}-{work.micro_batch}x{work.seq_len}.json",
        note=note,
        columns={
            "cpu s": cpu_s,
            "MB": {name: count / 1e6 for name, count in sent.items()},
            "of least": {name: count / least[name] for name, count in sent.items()},
            "least s": {name: count * 8e-6 / rate for name, count in least.items()},
        },
        record={
            "mbit_per_s": rate,
            "ranks": work.ranks,
            "sequences": work.micro_batch,
            "seq_len": work.seq_len,
            "measured_mbit_per_s": transfers,
            "congestion_control": net.congestion_control,
            "load": os.getloadavg()[0],
            "sent_bytes": {
                row.name: [[step.sent_bytes for step in by_rank[row.name]] for by_rank in found]
                for row in rows
            },
            "least_bytes": least,
        },
    )


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError("numbers are 1 or more")
    return found


def sizes(text: str) -> list[tuple[int, int]]:
    """Sequences and tokens of micro-batches, as in 2x128,5x128."""
    found = []
    for part in text.split(","):
        sequences, tokens = map(int, part.split("x"))
        if min(sequences, tokens) < 1:
            raise ValueError("numbers are 1 or more")
        found.append((sequences, tokens))
    return found


def names(text: str) -> list[str]:
    """Names of contestants; SystemExit with those there are, if one is not known."""
    asked = [part.strip() for part in text.split(";")]
    if unknown := [name for name in asked if name not in BUILDERS]:
        known = "; ".join(BUILDERS)
        raise SystemExit(f"link.py: no contestant is named {unknown[0]!r}; there are: {known}")
    return asked


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=numbers, default=[200, 1000, 5000], help="Mbit/s")
    parser.add_argument("--ranks", type=numbers, default=[2, 4], help=f"2 to {len(NODES)}")
    parser.add_argument("--micro-batches", type=sizes, help="sequences x tokens; default: by rate")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--contestants", type=names, default=list(BUILDERS), help="with ; between")
    parser.add_argument("--congestion-control", help="of TCP; default: cubic, where it can be set")
    parser.add_argument("--tiny", action="store_true", help="a model that only shows that all runs")
    parser.add_argument("--json", help="prefix of the files to write")
    arguments = parser.parse_args(given)
    if not 2 <= min(arguments.ranks) <= max(arguments.ranks) <= len(NODES):
        parser.error(f"--ranks: {arguments.ranks} are not all from 2 to {len(NODES)}")
    if arguments.repetitions < 1:
        parser.error(f"--repetitions: {arguments.repetitions} is less than 1")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    arguments = parsed(given)
    ranks = max(arguments.ranks)
    with cables(ranks, arguments.congestion_control) as net:
        for rate in arguments.rates:
            net.limit(rate)
            for count in arguments.ranks:
                for sequences, tokens in arguments.micro_batches or CASES.get(rate, (BASE,)):
                    work = Work(
                        TINY if arguments.tiny else MODEL,
                        ranks=count,
                        micro_batches=MICRO_BATCHES,
                        micro_batch=sequences,
                        seq_len=tokens,
                    )
                    compare(net, rate, work, arguments)


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_by_signal(number: int, _: object) -> None:
    for other in ENDING:  # a second one shall not keep the network from going
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in ENDING:
        signal.signal(number, end_by_signal)
    main()
