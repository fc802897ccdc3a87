"""Lines of the ledger added up: by month, kind of use, model, resource or the value of a tag."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from outcrop.errors import ValidationException
from outcrop.meter import money
from outcrop.meter.lines import KINDS, Line

MONTH, KIND, MODEL, RESOURCE = "month", "type", "model", "resource"
TAG_PREFIX = "tag:"
"""Before the key of a tag, as in tag:team."""
NAMES = (MONTH, KIND, MODEL, RESOURCE)


@dataclass(frozen=True)
class Group:
    """Lines that are alike in what was asked for."""

    values: Mapping[str, str]
    """What they have in common, by name; a resource without the tag has the empty text."""
    quantities: Mapping[str, int]
    """By unit: tokens and hours are not added to one another."""
    amount: Decimal
    """Of the lines that have a price."""
    unpriced: int
    """Lines without one."""

    @property
    def key(self) -> tuple[str, ...]:
        """Its place among the groups; no two share one."""
        return tuple(
            f"{KINDS.index(value):02}" if name == KIND else value
            for name, value in self.values.items()
        )


def check_names(names: Sequence[str]) -> None:
    """Refuse what lines cannot be grouped by.

    Raises:
        ValidationException: so it is.
    """
    for place, name in enumerate(names):
        if name not in NAMES and not (name.startswith(TAG_PREFIX) and len(name) > len(TAG_PREFIX)):
            raise ValidationException(
                f"Lines cannot be grouped by {name!r}. They can by {', '.join(NAMES)}, and by a "
                f"tag, as in {TAG_PREFIX}team."
            )
        if name in names[:place]:
            raise ValidationException(f"{name} stands twice in what lines are to be grouped by.")


def group_lines(lines: Iterable[Line], names: Sequence[str]) -> list[Group]:
    """Return the groups of lines by these names, in the order of their values.

    Raises:
        ValidationException: as `check_names`.
    """
    check_names(names)
    alike: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        alike.setdefault(tuple(_value(line, name) for name in names), []).append(line)
    groups = [
        Group(
            dict(zip(names, values, strict=True)),
            _quantities(found),
            *total_amount(found),
        )
        for values, found in alike.items()
    ]
    return sorted(groups, key=lambda group: group.key)


def total_amount(lines: Iterable[Line]) -> tuple[Decimal, int]:
    """Return the sum of the lines that have a price, and how many have none."""
    found = list(lines)
    amounts = [line.amount for line in found if line.amount is not None]
    return money.total(amounts), len(found) - len(amounts)


def _value(line: Line, name: str) -> str:
    if name.startswith(TAG_PREFIX):
        return line.tags.get(name.removeprefix(TAG_PREFIX), "")
    return {
        MONTH: line.month,
        KIND: line.kind,
        MODEL: line.model_id,
        RESOURCE: line.resource_arn,
    }[name]


def _quantities(lines: Iterable[Line]) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in lines:
        found[line.unit] = found.get(line.unit, 0) + line.quantity
    return dict(sorted(found.items()))
