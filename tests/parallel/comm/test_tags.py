"""Message tags: the ranges are disjoint, and no module makes up a tag of its own."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from holdfast import parallel
from holdfast.parallel.comm import tags
from holdfast.parallel.pipeline.executor import message_tag
from holdfast.parallel.schedules import Action, Op

ROOT = Path(parallel.__file__ or "").parent


def test_no_two_kinds_share_a_tag() -> None:
    for one, other in itertools.combinations(tags.RANGES, 2):
        assert one.stop <= other.first or other.stop <= one.first, (one, other)


def test_every_tag_fits_what_transports_carry() -> None:
    for found in tags.RANGES:
        assert 0 <= found.first < found.stop <= 1 << 31, found


def test_every_range_of_the_module_is_listed() -> None:
    named = {value for value in vars(tags).values() if isinstance(value, tags.TagRange)}
    assert named == set(tags.RANGES)


@pytest.mark.parametrize("kind", tags.RANGES, ids=lambda found: found.kind)
def test_a_message_beyond_the_range_is_refused(kind: tags.TagRange) -> None:
    last = kind.stop - kind.first - 1
    assert kind.tag(0) == kind.first
    assert kind.tag(last) == kind.stop - 1
    for number in (-1, last + 1):
        with pytest.raises(ValueError, match="there are tags for"):
            kind.tag(number)
    assert kind.wrapped(last + 1) == kind.first


def test_activations_of_a_large_step_have_tags() -> None:
    chunks, micro_batches = 2048, 65_536
    last = message_tag(Action(Op.RECEIVE_BACKWARD, chunks - 1, micro_batches - 1, 0), micro_batches)
    assert last == tags.ACTIVATIONS.stop - 1


def test_no_other_module_makes_up_a_tag() -> None:
    spelled = re.compile(r"_?TAGS?\b\s*(:\s*\w+\s*)?=|\btag\s*=\s*\d|<<\s*2[6-9]\s*\+")
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "tags.py"
        for line in path.read_text().splitlines()
        if spelled.search(line)
    ]
    assert wrong == []
