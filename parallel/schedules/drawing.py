"""A timeline as text, for terminals."""

from __future__ import annotations

from holdfast.parallel.schedules.actions import Action
from holdfast.parallel.schedules.simulator import ActionSpan, Timeline

_IDLE = "."


def draw(timeline: Timeline, *, width: int = 120) -> str:
    """A chart with one row per rank and time to the right.

    A compute action is drawn as its label if that fits (`F3`, or `2F3` on a rank with several
    chunks), filled up with its small letter, or else as its letter alone. Dots are idle time.

    Args:
        width: the columns of the whole step; fewer are used if two columns per shortest action
            suffice.
    Returns:
        The chart, then a line with the makespan and the bubble; ends in a newline.
    """
    spans = [span for row in timeline.spans.values() for span in row if span.stop > span.start]
    if not spans:
        return "nothing to compute\n"
    several = any(len({span.action.chunk for span in row}) > 1 for row in timeline.spans.values())
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
    lines.append(f"makespan {timeline.makespan:g}, bubble {timeline.bubble:.1%}")
    return "\n".join(lines) + "\n"


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
    return f"{chunk}{action.op.value}{action.micro_batch}"
