"""All that a check finds: counted exactly, listed up to a bound."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from outcrop.data.defects import SEVERITIES, Defect, Finding, Place, Severity
from outcrop.data.facts import MAX_LISTED


class Findings:
    """Findings of several files."""

    def __init__(self, files: Sequence[str]) -> None:
        """Begin with none.

        Args:
            files: their names, in the order in which findings are listed.
        """
        self._files = files
        self._counts: Counter[tuple[str, Severity]] = Counter()
        self._listed: dict[str, list[tuple[int, int, Defect]]] = defaultdict(list)

    def add(
        self, file: int, line: int | None, finding: Finding, twin: tuple[int, int] | None = None
    ) -> None:
        """Add one.

        Args:
            file: number of the file.
            twin: (number of the file, line) of the record that this one repeats.
        """
        self._counts[finding.code, finding.severity] += 1
        self._list(file, line, finding, twin)

    def add_all(
        self,
        file: int,
        counts: Mapping[tuple[str, Severity], int],
        listed: Iterable[tuple[int, Finding]],
    ) -> None:
        """Add those of some lines: how many there are, and the first ones."""
        self._counts.update(counts)
        for line, finding in listed:
            self._list(file, line, finding, None)

    def counts(self) -> dict[str, dict[Severity, int]]:
        """Return code -> severity -> how many, the gravest first."""
        found: dict[str, dict[Severity, int]] = {}
        for severity in SEVERITIES:
            for (code, its), count in sorted(self._counts.items()):
                if its is severity:
                    found.setdefault(code, {})[severity] = count
        return found

    def defects(self) -> tuple[Defect, ...]:
        """Return those that are listed, in the order of files and lines."""
        rows = [
            row
            for rows in self._listed.values()
            for row in sorted(rows, key=lambda row: row[:2])[:MAX_LISTED]
        ]
        return tuple(defect for _, _, defect in sorted(rows, key=lambda row: row[:2]))

    def _list(
        self, file: int, line: int | None, finding: Finding, twin: tuple[int, int] | None
    ) -> None:
        rows = self._listed[finding.code]
        if len(rows) >= 2 * MAX_LISTED:
            rows.sort(key=lambda row: row[:2])
            del rows[MAX_LISTED:]
        place = None if twin is None else Place(self._files[twin[0]], twin[1])
        rows.append((file, line or 0, finding.at(self._files[file], line, place)))
