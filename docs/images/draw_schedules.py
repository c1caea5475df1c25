"""Draws docs/images/schedules.svg from the simulator: python docs/images/draw_schedules.py"""

from __future__ import annotations

from pathlib import Path

from holdfast.parallel.schedules import (
    Op,
    Timeline,
    compute_programs,
    placement,
    simulate,
    unit_cost,
    with_messages,
)

RANKS, MICRO_BATCHES = 4, 8
SHOWN = (("1f1b", 1), ("interleaved-1f1b", 2), ("zb-h1", 1), ("zb-v", 2))
UNIT, ROW, LEFT, GAP = 22.0, 20, 8, 34
COLOURS = {
    Op.FORWARD: ("#4c78a8", "#8fb3d9"),
    Op.BACKWARD: ("#59a14f", "#9fd097"),
    Op.BACKWARD_INPUT: ("#76b7b2", "#aedbd7"),
    Op.BACKWARD_WEIGHT: ("#edc948", "#f5e08f"),
}


def timeline(schedule: str, virtual: int) -> Timeline:
    where = placement(schedule, RANKS, virtual)
    programs = dict(enumerate(compute_programs(schedule, RANKS, virtual, MICRO_BATCHES)))
    complete = with_messages(programs, lambda chunk, micro_batch: where[chunk])
    return simulate(complete, unit_cost(virtual=virtual))


def picture() -> str:
    """The SVG text; light for the second half of a rank's chunks."""
    timelines = [(schedule, virtual, timeline(schedule, virtual)) for schedule, virtual in SHOWN]
    width = LEFT * 2 + UNIT * max(t.makespan for _, _, t in timelines)
    height = len(timelines) * (RANKS * ROW + GAP) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="sans-serif">',
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
    ]
    top = 0.0
    for schedule, virtual, shown in timelines:
        chunks = f", {virtual} chunks per rank" if virtual > 1 else ""
        title = f"{schedule}{chunks}: bubble {shown.bubble:.1%}"
        parts.append(f'<text x="{LEFT}" y="{top + 22:g}" font-size="13" fill="#222">{title}</text>')
        top += 28
        for rank, spans in shown.spans.items():
            y = top + rank * ROW
            parts.append(
                f'<rect x="{LEFT}" y="{y:g}" width="{shown.makespan * UNIT:g}" height="{ROW - 2}" '
                'fill="#eeeeee"/>'
            )
            for action, start, stop in spans:
                shade = 1 if action.chunk >= RANKS else 0
                fill = COLOURS[action.op][shade]
                x, w = LEFT + start * UNIT, (stop - start) * UNIT
                parts.append(
                    f'<rect x="{x:g}" y="{y:g}" width="{w - 0.8:g}" height="{ROW - 2}" '
                    f'fill="{fill}"/>'
                    f'<text x="{x + w / 2:g}" y="{y + 13:g}" font-size="9" text-anchor="middle" '
                    f'fill="#111">{action.micro_batch}</text>'
                )
        top += RANKS * ROW + GAP - 28
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("schedules.svg").write_text(picture())
