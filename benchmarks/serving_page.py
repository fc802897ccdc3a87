"""Brings the newest measurements of serving into docs/serving-speed.md.

    python -m benchmarks.serving_page

Between `<!-- measured: SUBJECT -->` and `<!-- end -->` it has the tables of the newest page of that
subject in `results/`, with a link to it. A subject that was not measured is left as it stands.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from benchmarks.running import RESULTS
from benchmarks.training_work import ROOT

PAGE = ROOT / "docs" / "serving-speed.md"
PART = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write the page anew."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


def fill(page: str, results: Path) -> str:
    """Return the page with the newest tables.

    Args:
        results: folder of the dated pages.
    """

    def part(found: re.Match[str]) -> str:
        subject = found[2]
        pages = sorted(results.glob(f"????-??-??_*_{subject}.md"))
        if not pages:
            return found[0]
        newest = pages[-1]
        day = date.fromisoformat(newest.name[:10])
        link = f"Measured on {day:%Y-%m-%d} ([page](../benchmarks/results/{newest.name})):"
        return f"{found[1]}{link}\n\n{tables(newest.read_text(encoding='utf-8'))}\n{found[3]}"

    return PART.sub(part, page)


def tables(text: str) -> str:
    """Return a page's tables, each with the line before it that says what it is of."""
    lines = text.splitlines()
    kept: list[str] = []
    for number, line in enumerate(lines):
        if not line.startswith("|"):
            continue
        if not lines[number - 1].startswith("|"):
            named = [before for before in lines[:number] if before][-1]
            kept += ["", named, ""] if named.startswith("Weights of") else [""]
        kept.append(line)
    return "\n".join(kept).strip("\n")


if __name__ == "__main__":
    main()
