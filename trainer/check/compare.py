"""The comparison of captures with the reference, and the collective that a difference points to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.trainer.check.capture import CapturedBox, RankCapture

LOSS_TOLERANCE = 1e-12
TENSOR_TOLERANCE = 1e-10


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference from the reference."""

    kind: str
    """"activation", "activation gradient", "loss", "gradient", "gradient norm" or "parameter"."""
    name: str
    rank: int
    difference: float
    """The largest absolute difference, relative to the largest reference value if that exceeds
    1."""
    hint: str

    def __str__(self) -> str:
        line = f"{self.kind} {self.name} on rank {self.rank} differs by {self.difference:.3g}"
        return f"{line}: {self.hint}" if self.hint else line


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference over max(1, largest expected magnitude); infinite if NaN."""
    if not actual.numel():
        return 0.0
    scale = max(1.0, float(expected.abs().max()))
    largest = float((actual - expected).abs().max()) / scale
    return largest if largest == largest else float("inf")


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and difference(actual, expected) <= TENSOR_TOLERANCE


def compare(ranks: Sequence[RankCapture], reference: RankCapture) -> list[Finding]:
    """All findings, in the order of computation."""
    steps = range(len(reference.losses))
    findings = _activations(ranks, reference, forward=True)
    findings += _losses(ranks, reference, steps[:1])
    findings += _activations(ranks, reference, forward=False)
    findings += _gradients(ranks, reference)
    findings += _norms(ranks, reference, steps[:1])
    findings += _losses(ranks, reference, steps[1:])
    findings += _norms(ranks, reference, steps[1:])
    findings += _parameters(ranks, reference)
    return findings


def _along(axis: str, ranks: Iterable[RankCapture], rank: RankCapture) -> list[RankCapture]:
    """The ranks that differ from one along an axis alone, with itself, in order."""
    here = {**rank.place, axis: None}
    members = [other for other in ranks if {**other.place, axis: None} == here]
    return sorted(members, key=lambda other: other.place[axis])


def _activations(
    ranks: Sequence[RankCapture], reference: RankCapture, *, forward: bool
) -> list[Finding]:
    kind = "activation" if forward else "activation gradient"
    expected_values = reference.outputs if forward else reference.output_gradients
    order = list(expected_values)
    findings = []
    for key in order if forward else reversed(order):
        of_slices = expected_values[key]
        whole = torch.cat([of_slices[number] for number in sorted(of_slices)])
        for number, rank in enumerate(ranks):
            finding = _wrong_slice(key, whole, ranks, rank, forward=forward)
            if finding is not None:
                findings.append(Finding(kind, finding[0], number, *finding[1:]))
                break
    return findings


def _wrong_slice(
    key: tuple[str, int],
    whole: Tensor,
    ranks: Sequence[RankCapture],
    rank: RankCapture,
    *,
    forward: bool,
) -> tuple[str, float, str] | None:
    """Name, difference and hint of the first slice that differs from the reference.

    Args:
        whole: all slices of the reference.
    """

    def of(member: RankCapture) -> dict[int, Tensor]:
        return (member.outputs if forward else member.output_gradients).get(key, {})

    for number, actual in sorted(of(rank).items()):
        expected = whole.chunk(rank.slices)[number]
        part = expected
        if actual.shape[0] != expected.shape[0]:
            rows, index = actual.shape[0], rank.place["tensor"]
            part = expected[index * rows : (index + 1) * rows]
        if same(actual, part):
            continue
        members = _along("tensor", ranks, rank)
        partials = [of(member)[number] for member in members if number in of(member)]
        name = f"{key[0]} of micro-batch {key[1]}"
        if rank.slices > 1:
            name += f", slice {number}"
        hint = _activation_hint(actual, part, expected, partials, forward=forward)
        return name, _distance(actual, part), hint
    return None


def _distance(actual: Tensor, expected: Tensor) -> float:
    return difference(actual, expected) if actual.shape == expected.shape else float("inf")


def _activation_hint(
    actual: Tensor, part: Tensor, whole: Tensor, partials: Sequence[Tensor], *, forward: bool
) -> str:
    size = len(partials)
    where = "forward" if forward else "backward"
    if size > 1:
        total = torch.stack(list(partials)).sum(0)
        if same(total, whole):
            return (
                f"the tensor-parallel ranks hold partial sums: a {where} all_reduce (or "
                f"reduce_scatter) over the tensor group is missing"
            )
        if actual.shape == part.shape and same(actual, part * size):
            return (
                f"it is {size} times too large: a {where} sum over the tensor group is one too many"
            )
        for other, value in enumerate(partials):
            rows = value.shape[0]
            if rows != whole.shape[0] and same(actual, whole[other * rows : (other + 1) * rows]):
                return f"it holds the sequence part of tensor rank {other}"
    return ""


def _losses(ranks: Sequence[RankCapture], reference: RankCapture, steps: range) -> list[Finding]:
    of_ranks = [rank.losses for rank in ranks]
    return _scalars("loss", of_ranks, reference.losses, steps, LOSS_TOLERANCE, _scale_hint)


def _norms(ranks: Sequence[RankCapture], reference: RankCapture, steps: range) -> list[Finding]:
    of_ranks, expected = [rank.grad_norms for rank in ranks], reference.grad_norms
    hint = (
        "if the gradients agree, a parameter is counted too often or not at all, or some rank's "
        "share of the squares is missing"
    )
    tolerance = TENSOR_TOLERANCE
    return _scalars("gradient norm", of_ranks, expected, steps, tolerance, lambda *_: hint)


def _scalars(
    what: str,
    of_ranks: Sequence[Sequence[float]],
    expected: Sequence[float],
    steps: range,
    tolerance: float,
    hint: Callable[[float, float], str],
) -> list[Finding]:
    """The first rank of each step whose number is too far from the reference's."""
    findings = []
    for step in steps:
        for number, values in enumerate(of_ranks):
            actual, wanted = values[step], expected[step]
            apart = abs(actual - wanted) / max(1.0, abs(wanted))
            if not apart <= tolerance:
                said = hint(actual, wanted)
                findings.append(Finding(what, f"of step {step + 1}", number, apart, said))
                break
    return findings


def _scale_hint(actual: float, expected: float) -> str:
    for factor in range(2, 65):
        if abs(actual - expected * factor) <= LOSS_TOLERANCE * abs(expected) * factor:
            return (
                f"it is {factor} times too large: something is summed over {factor} ranks too often"
            )
        if abs(actual * factor - expected) <= LOSS_TOLERANCE * abs(expected):
            return (
                f"it is {factor} times too small: a sum over {factor} ranks or micro-batches is "
                "missing"
            )
    return ""


def _cut(piece: CapturedBox, reference: dict[str, Tensor]) -> Tensor:
    return reference[piece.name][tuple(map(slice, piece.start, piece.stop))]


def _whole(pieces: Iterable[CapturedBox]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for piece in pieces:
        target = whole.setdefault(piece.name, torch.zeros(piece.shape, dtype=torch.float64))
        target[tuple(map(slice, piece.start, piece.stop))] = piece.values
    return whole


def _gradients(ranks: Sequence[RankCapture], reference: RankCapture) -> list[Finding]:
    expected = _whole(reference.gradients)
    seen: set[str] = set()
    findings = []
    for number, rank in enumerate(ranks):
        for piece in rank.gradients:
            part = _cut(piece, expected)
            if piece.name in seen or same(piece.values, part):
                continue
            seen.add(piece.name)
            hint = _gradient_hint(piece, part, ranks, rank)
            apart = difference(piece.values, part)
            findings.append(Finding("gradient", piece.name, number, apart, hint))
    order = {name: place for place, name in enumerate(expected)}
    return sorted(findings, key=lambda finding: -order[finding.name])


def _gradient_hint(
    piece: CapturedBox, expected: Tensor, ranks: Sequence[RankCapture], owner: RankCapture
) -> str:
    """The sum over ranks that would have given the right gradient, as a hint."""

    def summed(members: Iterable[RankCapture]) -> Tensor:
        total = torch.zeros_like(piece.values)
        for member in members:
            for partial in member.partial_gradients:
                if partial.name == piece.name and _holds(partial, piece):
                    total += partial.values[_inside(piece, partial)]
        return total

    right = same(summed(_holding(owner.parts, ranks)), expected)
    for axis in _axes_inside(ranks):
        along = {part for r in _along(axis, ranks, owner) for part in r.parts}
        copies = _holding(along.intersection(piece.copies), ranks)
        if right and same(piece.values, summed(copies)):
            return f"it is summed over the {axis} group, where each copy already has all of it"
        if not right and same(summed(copies), expected):
            return (
                f"each copy along {axis} holds a part of it: the all_reduce over the {axis} group "
                "is missing (ParameterSpec.summed)"
            )
        if not right and same(summed(_holding(along, ranks)), expected):
            return (
                f"all {axis} ranks hold a part of it: the all_reduce over the {axis} group is "
                "missing"
            )
    if right:
        return "the sum over the data-parallel replicas (or tied uses) is missing or wrong"
    ratio = float((piece.values * expected).sum() / (expected * expected).sum().clamp_min(1e-300))
    if abs(ratio - 1) > 1e-6 and same(piece.values, expected * ratio):
        return f"it is {ratio:.6g} times the reference: a wrong scale, or counted that many times"
    return "no sum of the ranks' parts gives it: the computation itself differs"


def _holding(parts: Iterable[int], ranks: Sequence[RankCapture]) -> list[RankCapture]:
    """The ranks that hold one of some parts."""
    wanted = set(parts)
    return [rank for rank in ranks if not wanted.isdisjoint(rank.parts)]


def _axes_inside(ranks: Sequence[RankCapture]) -> list[str]:
    """The axes inside a stage replica that have several ranks."""
    outside = ("data", "pipeline")
    axes = [axis for axis in ranks[0].place if axis not in outside]
    return [axis for axis in axes if any(rank.place[axis] for rank in ranks)]


def _holds(outer: CapturedBox, inner: CapturedBox) -> bool:
    return all(a <= b for a, b in zip(outer.start, inner.start, strict=True)) and all(
        a >= b for a, b in zip(outer.stop, inner.stop, strict=True)
    )


def _inside(inner: CapturedBox, outer: CapturedBox) -> tuple[slice, ...]:
    return tuple(
        slice(a - o, b - o) for a, b, o in zip(inner.start, inner.stop, outer.start, strict=True)
    )


def _parameters(ranks: Sequence[RankCapture], reference: RankCapture) -> list[Finding]:
    expected = _whole(reference.parameters)
    findings = []
    seen: set[str] = set()
    for number, rank in enumerate(ranks):
        for piece in rank.parameters:
            part = _cut(piece, expected)
            if piece.name in seen or same(piece.values, part):
                continue
            seen.add(piece.name)
            apart = difference(piece.values, part)
            agreeing = [
                n
                for n, other in enumerate(ranks)
                for theirs in other.parameters
                if theirs.name == piece.name and same(theirs.values, _cut(theirs, expected))
            ]
            hint = (
                f"ranks {agreeing} hold it right: it was not gathered from its owner here"
                if agreeing
                else "the update itself differs (see gradients and optimizer settings)"
            )
            findings.append(Finding("parameter", piece.name, number, apart, hint))
    return findings
