"""The result of a bisection in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.launch.proofs.bisect_runs import Bisection
from holdfast.launch.proofs.operation_comparison import OperationDifference


def describe_bisection(found: Bisection) -> Iterator[str]:
    """The result, a line for each thing that is known of it."""
    where, steps = found.where, found.steps
    if where is None:
        yield f"the same bits in all {len(steps)} steps that both have, {steps[0]} to {steps[-1]}"
        return
    before = "the same bits until then; " if where.equal_until else ""
    names = ", ".join(found.layers[:3]) + (
        f" and {len(found.layers) - 3} more" if len(found.layers) > 3 else ""
    )
    match where.kind:
        case "start":
            yield f"different before step {where.step}: parameters of {names}"
        case "update":
            of = f": parameters of {names}" if names else ""
            exact = "" if where.is_exact else f", or one since step {where.equal_until}"
            yield f"{before}the update of step {where.step}{exact} differs{of}"
        case "gradients":
            of = f"gradients of {names}" if names else "the loss alone"
            yield f"{before}step {where.step} differs: {of}"
    if found.token:
        yield f"data of step {where.step}: {found.token}"
    for line in found.settings:
        yield f"setting: {line}"
    yield from _describe_repetition(found, where.step)
    if found.note:
        yield found.note


def _describe_repetition(found: Bisection, step: int) -> Iterator[str]:
    if found.reproduced is None:
        return
    for name, same in zip("AB", found.reproduced, strict=True):
        bits = "its bits" if same else "other bits"
        yield f"step {step} trained again as in {name}: {bits}"
    operation, element = found.operation, found.element
    if operation is not None:
        yield from _describe_operation(operation)
        if found.output is not None and found.output.first is not None:
            yield f"first module whose result differs: {found.output.first.describe()}"
        if element is not None:
            yield f"  {element.describe()}"
    elif found.tensor is not None:
        tensor = found.tensor
        yield (
            f"the operations of the step are the same; after its update {tensor.name} differs, "
            f"first at {list(tensor.first)} ({tensor.differing:,} of {tensor.elements:,} elements, "
            f"by {tensor.largest:.3g} at most)"
        )
    else:
        wrong = [name for name, same in zip("AB", found.reproduced, strict=True) if not same]
        whose = {1: f"run {''.join(wrong)}", 2: "both runs"}.get(len(wrong), "one of the runs")
        yield (
            f"both repetitions have the same operations and results, so no setting is behind it: "
            f"{whose} computed or kept something wrongly in step {step} (a machine's error, or an "
            "interference), or was another version"
        )
    yield f"{found.repeated} steps were trained again"


def _describe_operation(operation: OperationDifference) -> Iterator[str]:
    a, b = operation.first, operation.second
    if operation.is_other_program:
        names = [side.describe() if side else "nothing more" for side in (a, b)]
        yield f"first operation that differs: {names[0]} in A, {names[1]} in B"
        return
    assert a is not None
    made = (
        "its inputs differ, which no operation before gave"
        if operation.differs_before
        else ("its inputs are the same")
    )
    yield f"first operation that differs, number {a.number}: {a.describe()}; {made}"
