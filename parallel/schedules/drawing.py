"""A timeline as text, for terminals."""

from __future__ import annotations

from holdfast.parallel.schedules.actions import Action, Op
from holdfast.parallel.schedules.simulator import ActionSpan, Timeline

_IDLE = "."


_MEANINGS = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward of the inputs",
    Op.BACKWARD_WEIGHT: "backward of the weights",
}


def legend(timeline: Timeline) -> str:
    """The meaning of what `draw` draws of this timeline, in a sentence."""
    actions = [span.action for row in timeline.spans.values() for span in row]
    used = {action.op for action in actions}
    letters = [f"{op.value} {meaning}" for op, meaning in _MEANINGS.items() if op in used]
    chunk = "; 1F3 is of chunk 1" if _has_chunks(timeline) else ""
    stretched = any(action.stretch is not None for action in actions)
    stretch, kept = ("; F3.2 of its stretch 2", "stretches") if stretched else ("", "micro-batches")
    return (
        f"{', '.join(letters)}; F3 is of micro-batch 3{stretch}{chunk}; small letters fill up its "
        f"time, dots are idle; peak: {kept} whose activations a rank keeps at once"
    )


def draw(timeline: Timeline, *, width: int = 120, summary: bool = True) -> str:
    """A chart with one row per rank and time to the right.

    A compute action is drawn as its label if that fits (`F3`, or `2F3` on a rank with several
    chunks), filled up with its small letter, or else as its letter alone. Dots are idle time.

    Args:
        width: the columns of the whole step; fewer are used if two columns per shortest action
            suffice.
        summary: whether a last line has the makespan, in the unit of the costs, and the bubble.
    Returns:
        The chart; ends in a newline.
    """
    spans = [span for row in timeline.spans.values() for span in row if span.stop > span.start]
    if not spans:
        return "nothing to compute\n"
    several = _has_chunks(timeline)
    longest = max(len(_label(span.action, several)) for span in spans)
    shortest = min(span.stop - span.start for span in spans)
    columns = min(width, round(timeline.makespan / shortest * longest))
    scale = columns / timeline.makespan
    name_width = len(str(max(timeline.spans)))
    lines = [
        f"{rank:>{name_width}} |{_row(timeline.spans[rank], columns, scale, several)}| "
        f"{timeline.busy[rank] / timeline.makespan:4.0%} busy, peak "
        f"{timeline.peak_saved[rank]}"
        for rank in sorted(timeline.spans)
    ]
    if summary:
        lines.append(f"makespan {timeline.makespan:g}, bubble {timeline.bubble:.1%}")
    return "\n".join(lines) + "\n"


def _has_chunks(timeline: Timeline) -> bool:
    """Whether a rank computes several chunks, so that labels name them."""
    return any(len({span.action.chunk for span in row}) > 1 for row in timeline.spans.values())


def _row(spans: tuple[ActionSpan, ...], columns: int, scale: float, several: bool) -> str:
    cells = [_IDLE] * columns
    for action, start, stop in spans:
        first, after = round(start * scale), round(stop * scale)
        room = after - first
        label, letter = _label(action, several), action.op.value
        text = (
            label.ljust(room, letter.lower()) if len(label) <= room else letter.ljust(room, letter)
        )
        cells[first:after] = text[:room]
    return "".join(cells)


def _label(action: Action, several: bool) -> str:
    chunk = str(action.chunk) if several else ""
    return f"{chunk}{action.op.value}{action.label}"
