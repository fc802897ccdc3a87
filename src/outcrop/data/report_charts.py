"""Charts of the report page, as SVG: bars of a histogram, and bars with names.

Colours are CSS variables of the page, so that one picture serves light and dark. Every text is
escaped: names of labels are somebody's data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 560, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 34
_ROW = 26
_NAME_WIDTH, _COUNT_WIDTH = 190, 70
_MAX_NAME = 28
"""Characters of a name that are shown; its title has all of it."""


def histogram(
    title: str,
    edges: Sequence[int],
    counts: Sequence[int],
    unit: str,
    marks: Mapping[str, int] | None = None,
) -> str:
    """Return vertical bars, one a bin, with the highest count and five edges written.

    Args:
        unit: of the edges, such as "tokens".
        marks: names and places of vertical lines; those outside the edges are left out.
    """
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    first, last = edges[0], edges[-1]
    span, most = max(last - first, 1), max(*counts, 1)

    def across(value: float) -> float:
        return _LEFT + width * (value - first) / span

    parts = []
    for share in (0, 0.5, 1):
        y = _TOP + height * (1 - share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + width}" y1="{y}" y2="{y}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{round(most * share):,}", "end"))
    for lower, upper, count in zip(edges, edges[1:], counts, strict=False):
        if not count:
            continue
        bar = max(height * count / most, 1.5)
        x, wide = across(lower), max(across(upper) - across(lower) - 1, 1)
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{_TOP + height - bar:.1f}" width="{wide:.1f}" '
            f'height="{bar:.1f}"><title>{lower:,} to {upper:,} {escape(unit)}: {count:,} records'
            "</title></rect>"
        )
    for place in range(5):
        value = round(first + span * place / 4)
        anchor = ("start", "middle", "middle", "middle", "end")[place]
        parts.append(_text(across(value), _TOP + height + 16, f"{value:,}", anchor))
    parts.append(_text(_LEFT + width / 2, _HEIGHT - 3, unit, "middle"))
    for name, value in (marks or {}).items():
        if first <= value <= last:
            x = across(value)
            parts.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + height}"/>'
            )
            anchor = "end" if x > _LEFT + width / 2 else "start"
            nudge = -4 if anchor == "end" else 4
            parts.append(_text(x + nudge, _TOP - 8, f"{name} {value:,}", anchor))
    return _svg(title, _WIDTH, _HEIGHT, parts)


def named_bars(title: str, rows: Sequence[tuple[str, int, str]]) -> str:
    """Return horizontal bars: (name, count, class of the colour) a row."""
    width = _WIDTH - _NAME_WIDTH - _COUNT_WIDTH
    most = max([count for _, count, _ in rows] + [1])
    parts = []
    for place, (name, count, colour) in enumerate(rows):
        y = place * _ROW
        wide = max(width * count / most, 2) if count else 0
        shown = name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"
        parts.append(
            f"<g><title>{escape(name)}: {count:,}</title>"
            f"{_text(_NAME_WIDTH - 8, y + 17, shown, 'end')}"
            f'<rect class="{escape(colour)}" x="{_NAME_WIDTH}" y="{y + 4}" width="{wide:.1f}" '
            f'height="{_ROW - 8}" rx="2"/>'
            f"{_text(_NAME_WIDTH + wide + 6, y + 17, f'{count:,}', 'start')}</g>"
        )
    return _svg(title, _WIDTH, max(len(rows) * _ROW, _ROW), parts)


def _text(x: float, y: float, text: Any, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(str(text))}</text>'


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
