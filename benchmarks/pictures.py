"""Small pictures as SVG: curves over time, and histograms. Knows nothing of what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 34, 46
INK, PALE = "#222222", "#dddddd"
COLOURS = ("#0b6e99", "#b3541e", "#3d7d3a", "#7a3e8e", "#222222", "#a08000", "#888888")
"""That differ for those who see no red or no green too, in the order in which they are taken."""


@dataclass(frozen=True)
class Panel:
    """One of the pictures that lie below each other."""

    title: str
    across: str
    """What the axis below shows."""
    parts: Sequence[str]
    """What is drawn, as SVG, in a frame of WIDTH and HEIGHT."""


def grid(low: float, high: float) -> Sequence[float]:
    """Return about five round numbers that enclose both."""
    span = max(high - low, 1e-9)
    size = 10.0 ** len(str(int(span)))
    while span / size < 4:
        size /= 2 if str(f"{size:e}")[0] in "12" else 2.5
    first, last = int(low // size), -int(-high // size)
    return [size * number for number in range(first, max(last, first + 1) + 1)]


def curves(
    title: str,
    across: str,
    values: Mapping[str, Sequence[tuple[float, float]]],
    form: str = "{:g}",
) -> Panel:
    """Return curves of (x, y), each with its name beside it."""
    points = [point for curve in values.values() for point in curve]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_marks, y_marks = grid(min(xs), max(xs)), grid(min(0.0, *ys), max(ys))
    parts = [*_rows(y_marks, form), *_columns(x_marks)]
    for number, (name, curve) in enumerate(values.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(f"{_at_x(x, x_marks):.1f},{_at_y(y, y_marks):.1f}" for x, y in curve)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        parts += _legend(number, name, colour)
    return Panel(title, across, parts)


def histogram(
    title: str, across: str, values: Sequence[float], marks: Mapping[str, float], bars: int = 48
) -> Panel:
    """Return how often values lie in ranges that each are as many times wider than the one before.

    Args:
        values: above 0.
        marks: values that are named and marked by a line.
    """
    low, high = min(values), max(values)
    ratio = max(high / low, 1.001)
    counts = [0] * bars
    for value in values:
        counts[min(bars - 1, int(bars * math.log(value / low) / math.log(ratio)))] += 1
    y_marks = grid(0.0, max(counts))
    parts = _rows(y_marks, "{:g}")
    wide = (WIDTH - LEFT - RIGHT) / bars
    for number, count in enumerate(counts):
        top = _at_y(count, y_marks)
        parts.append(
            f'<rect x="{LEFT + number * wide:.1f}" y="{top:.1f}" width="{wide - 1:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{COLOURS[0]}"/>'
        )
    for value in _round_numbers(low, high):
        at = LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / low) / math.log(ratio)
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
        )
    for number, (name, value) in enumerate(marks.items()):
        at = LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / low) / math.log(ratio)
        colour = COLOURS[1 + number % (len(COLOURS) - 1)]
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="4 3"/>'
        )
        parts += _legend(number, name, colour)
    return Panel(title, across, parts)


def picture(panels: Sequence[Panel], about: str) -> str:
    """Return panels below each other as one SVG.

    Args:
        about: said to those who do not see it.
    """
    height = HEIGHT * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{about}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts += [
            f'<g transform="translate(0 {HEIGHT * number})">',
            f'<text x="{LEFT}" y="{TOP - 14}" font-size="13">{panel.title}</text>',
            *panel.parts,
            f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{panel.across}</text>',
            "</g>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _rows(marks: Sequence[float], form: str) -> list[str]:
    parts = []
    for mark in marks:
        y = _at_y(mark, marks)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{PALE}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{form.format(mark)}</text>'
        )
    return parts


def _columns(marks: Sequence[float]) -> list[str]:
    y = HEIGHT - BOTTOM + 16
    return [
        f'<text x="{_at_x(mark, marks):.1f}" y="{y}" text-anchor="middle">{mark:g}</text>'
        for mark in marks
    ]


def _legend(number: int, name: str, colour: str) -> list[str]:
    x, y = WIDTH - RIGHT + 14, TOP + 8 + 19 * number
    return [
        f'<line x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        f'<text x="{x + 24}" y="{y + 4}">{name}</text>'
    ]


def _at_x(value: float, marks: Sequence[float]) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - marks[0]) / (marks[-1] - marks[0])


def _at_y(value: float, marks: Sequence[float]) -> float:
    share = (value - marks[0]) / (marks[-1] - marks[0])
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten between both; fewer where they are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 4 else (1,)
    found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [value for value in found if low <= value <= high]
