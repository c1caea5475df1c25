"""Every legal layout of up to eight ranks has the bits of one process, over two steps. See
`make soak`.
"""

from __future__ import annotations

import os

import pytest

from support.processes.cluster import Cluster
from support.runs.layout_factors import MOST_RANKS, config_of, every_layout, ranks_of
from support.runs.undisturbed import Undisturbed

IS_SOAK = "HOLDFAST_SOAK_S" in os.environ
MOST = int(os.environ.get("HOLDFAST_SOAK_LAYOUTS", "1000000" if IS_SOAK else "0"))
"""How many layouts are tried at most: evenly chosen among all."""
STEPS = 2
"""The second begins with what the first has changed."""

pytestmark = [
    pytest.mark.mp,
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not MOST, reason="takes an hour: make soak"),
]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Undisturbed:
    """What undisturbed runs give, each once."""
    return Undisturbed(cluster)


@pytest.mark.parametrize("ranks", range(1, MOST_RANKS + 1))
def test_every_layout_gives_the_bits_of_one_process(undisturbed: Undisturbed, ranks: int) -> None:
    chosen = every_layout()[:: max(1, -(-len(every_layout()) // MOST))]
    tried = [layout for layout in chosen if ranks_of(layout) == ranks]
    differ = [one for one in tried if not undisturbed.has_bits_of(config_of(one, steps=STEPS))]
    print(f"{len(tried)} layouts of {ranks} ranks, {len(differ)} with other bits")
    assert differ == []
