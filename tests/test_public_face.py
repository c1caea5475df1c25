"""What other programs import: its names are found, and its numbers are checked when given."""

from __future__ import annotations

import math
import pydoc
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.checkpoint.convert import Conversion, convert
from holdfast.parallel.offload import Bounds, Offloader
from holdfast.parallel.schedules import compute_programs, placement


def test_names_are_found_by_completion_without_a_further_import() -> None:
    assert holdfast.__version__ == version("holdfast")
    assert {"__version__", "checkpoint", "parallel", "trainer", "ConfigError"} <= {*dir(holdfast)}
    assert {"Checkpointer", "SaveResult", "load", "save"} <= {*dir(holdfast.checkpoint)}
    assert issubclass(holdfast.DataError, holdfast.ConfigError)
    assert issubclass(holdfast.CheckpointError, holdfast.HoldfastError)
    with pytest.raises(AttributeError):
        getattr(holdfast, "nothing")  # noqa: B009


@pytest.mark.parametrize(
    ("owner", "page", "name"),
    [(Offloader, "offload.md", "offloader"), (holdfast.checkpoint.Checkpointer, "checkpoints.md",
                                              "checkpointer")],
)  # fmt: skip
def test_help_has_every_attribute_that_the_page_uses(owner: type, page: str, name: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / page).read_text()
    used = set(re.findall(rf"\b{name}\.(\w+)", text))
    assert used
    said = pydoc.plain(pydoc.render_doc(owner))
    assert {attribute for attribute in used if not re.search(rf"\b{attribute}\b", said)} == set()


REFUSED: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "limit_bytes": (lambda n: Offloader(None, limit_bytes=n), (-1, "1G", 0.5, math.inf, 1 << 63)),
    "smallest_bytes": (lambda n: Offloader(None, smallest_bytes=n), (-1, "1M")),
    "staging_bytes": (lambda n: Offloader(None, staging_bytes=n), (-1, None)),
    "bytes_per_s": (lambda n: Offloader(None, bytes_per_s=n), (-1.0, math.nan, math.inf)),
    "least_share": (lambda n: Bounds(n, 0.5), (0.9, -0.1, math.nan, True)),
    "most_share": (lambda n: Bounds(0.5, n), (1.1, "1", math.nan)),
    "parallel.pipeline": (lambda n: placement("gpipe", n, 1), (0, "2", 1.5)),
    "parallel.virtual": (lambda n: placement("gpipe", 2, n), (-1, True)),
    "micro_batches": (lambda n: compute_programs("gpipe", 2, 1, n), (0, 2.0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_number_out_of_its_range_is_named_with_the_range(name: str) -> None:
    make, numbers = REFUSED[name]
    for number in numbers:
        with pytest.raises(holdfast.HoldfastError, match=f"^{name} = .*: allowed are "):
            make(number)


@pytest.mark.parametrize(
    ("said", "options", "arguments"),
    [
        ("memory_bytes = '1G'", {"memory_bytes": "1G"}, {}),
        ("--value heads = 1.5", {"values": {"heads": 1.5}}, {}),
        ("workers = 0", {}, {"workers": 0}),
        ("world = 0", {}, {"world": 0}),
        ("rank = 5: allowed are whole numbers from 0 to 1", {}, {"rank": 5, "world": 2}),
    ],
)
def test_a_conversion_with_such_a_number_is_refused_before_it_waits_for_others(
    tmp_path: Path, said: str, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    paths: dict[str, Any] = {"source": str(tmp_path / "none"), "target": str(tmp_path / "to")}
    with pytest.raises(holdfast.ConfigError, match=re.escape(said)):
        convert(Conversion(**paths, to="hf", **options), **arguments)
