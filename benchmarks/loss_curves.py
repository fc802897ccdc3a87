"""Draws the losses that `training_speed.py` compared: docs/loss-curves.svg.

    python -m benchmarks.loss_curves [RESULT.json] [--svg FILE]

Above: the loss of each step. Below: how far each is from the plain float32 loop. Without a file,
the newest one of `results/` is drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.pictures import grid
from benchmarks.running import RESULTS

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, UPPER, LOWER = 720, 260, 220
LEFT, RIGHT, TOP, BOTTOM, GAP = 70, 170, 30, 50, 40
COLOURS = {
    "plain float32 loop": "#222222",
    "Outcrop in float32": "#7a3e8e",
    "Outcrop": "#0b6e99",
    "TRL, its defaults": "#b3541e",
    "TRL, best": "#3d7d3a",
}
Place = Callable[[float], float]


def main() -> None:
    """Read the losses and draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path, nargs="?")
    parser.add_argument("--svg", type=Path, default=DOCS / "loss-curves.svg")
    options = parser.parse_args()
    file = options.result or newest()
    losses: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))["losses"]
    options.svg.write_text(draw(losses), encoding="utf-8")
    print(f"{file.name} drawn as {options.svg.name}")


def newest() -> Path:
    """Return the losses that were measured last."""
    found = sorted(RESULTS.glob("*_training_losses.json"))
    if not found:
        raise SystemExit("no losses have been measured: run benchmarks.training_speed first")
    return found[-1]


def draw(losses: dict[str, list[float]]) -> str:
    """Return both pictures as one SVG.

    Args:
        losses: of each step, by name; the first name is what the others are compared with.
    """
    reference, *others = losses
    steps = min(len(curve) for curve in losses.values())
    differences = {
        name: [100.0 * (losses[name][at] / losses[reference][at] - 1.0) for at in range(steps)]
        for name in others
    }
    height = TOP + UPPER + GAP + LOWER + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13" role="img" '
        'aria-label="Training loss of each step, and its difference from a float32 reference">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="{TOP - 12}">training loss, nats a token</text>',
        *panel(losses, steps, TOP, UPPER, "{:.3g}"),
        f'<text x="{LEFT}" y="{TOP + UPPER + GAP - 12}">difference from the {reference}, %</text>',
        *panel(differences, steps, TOP + UPPER + GAP, LOWER, "{:+.3g} %"),
    ]
    for step in range(0, steps, max(1, steps // 10)):
        at = across(step, steps)
        parts.append(
            f'<text x="{at:.1f}" y="{height - BOTTOM + 20}" text-anchor="middle">{step}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - 10}" text-anchor="middle">step</text>')
    for row, name in enumerate(losses):
        y = TOP + 10 + 20 * row
        parts.append(
            f'<line x1="{WIDTH - RIGHT + 15}" x2="{WIDTH - RIGHT + 35}" y1="{y}" y2="{y}" '
            f'stroke="{colour(name)}" stroke-width="2"/>'
            f'<text x="{WIDTH - RIGHT + 40}" y="{y + 4}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(
    curves: dict[str, list[float]], steps: int, top: float, height: float, form: str
) -> list[str]:
    """Return the grid and the curves of one picture."""
    values = [value for curve in curves.values() for value in curve[:steps]]
    marks = grid(min(values), max(values))
    low, high = marks[0], marks[-1]

    def down(value: float) -> float:
        return top + height * (1 - (value - low) / (high - low))

    parts = []
    for mark in marks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(mark):.1f}" y2="{down(mark):.1f}" '
            'stroke="#dddddd"/>'
            f'<text x="{LEFT - 8}" y="{down(mark) + 4:.1f}" text-anchor="end">'
            f"{form.format(mark)}</text>"
        )
    for name, curve in curves.items():
        points = " ".join(
            f"{across(step, steps):.1f},{down(value):.1f}"
            for step, value in enumerate(curve[:steps])
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour(name)}" stroke-width="1.5"/>'
        )
    return parts


def across(step: int, steps: int) -> float:
    """Return where a step lies from left to right."""
    return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, steps - 1)


def colour(name: str) -> str:
    """Return the colour of a curve."""
    return COLOURS.get(name, "#888888")


if __name__ == "__main__":
    main()
