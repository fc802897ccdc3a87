"""The ledger: one line for each resource, kind of use and billing month, computed from rows.

Nothing is stored of a line. The same rows, prices and time give the same lines, so each can be
checked by hand: amount = quantity * price / per.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, tzinfo
from decimal import Decimal

from sqlalchemy import Connection

from outcrop.ids import parse_arn
from outcrop.meter import money, prices
from outcrop.meter.periods import HOUR, Period, begun_hours, split_by_month
from outcrop.meter.prices import PriceBook
from outcrop.store import ledger, tags
from outcrop.store.rows_ledger import Span, TrainedTokens
from outcrop.store.usage import UsageTotal, total_usage

RESERVED_INPUT, RESERVED_OUTPUT = "provisioned-input-tokens", "provisioned-output-tokens"
"""Kinds of use that are counted and cost nothing: the throughput's hours are paid."""
KINDS = (
    *(prices.TRAINING, prices.STORAGE, prices.MODEL_UNITS, prices.INPUT, prices.OUTPUT),
    *(prices.BATCH_INPUT, prices.BATCH_OUTPUT, RESERVED_INPUT, RESERVED_OUTPUT),
)
"""Every kind of use, in the order in which they are listed."""
TOKENS, MODEL_HOURS, UNIT_HOURS = "tokens", "model-hours", "model-unit-hours"
THOUSAND = 1000
IMPORTED = "imported"
"""For a base model's id, of models that were brought from elsewhere: they have no base."""


@dataclass(frozen=True)
class Line:
    """What one resource used of one kind in one billing month."""

    account: str
    region: str
    month: str
    """As "2026-12"."""
    kind: str
    """One of KINDS."""
    resource_arn: str
    resource_name: str
    """Empty where it has none."""
    model_id: str
    """The base model at its root, by which it is priced."""
    begins: datetime
    ends: datetime
    """Of the use in this month, or up to now."""
    quantity: int
    unit: str
    """What is counted: tokens, model-hours or model-unit-hours."""
    price: Decimal | None
    """Of `per` units; None where the price book has none."""
    per: int
    """1,000 tokens, 1 unit hour, or the hours of the month for a model's storage."""
    amount: Decimal | None
    """None where there is no price."""
    tags: Mapping[str, str]

    @property
    def key(self) -> tuple[str, int, str, str, str]:
        """Its place in a ledger of one account and region; no two lines share one."""
        price = "" if self.price is None else money.shown(self.price)
        return self.month, KINDS.index(self.kind), self.resource_arn, self.model_id, price


@dataclass(frozen=True)
class _Sources:
    """What lines are made with, besides the rows that they are of."""

    account: str
    region: str
    now: datetime
    book: PriceBook
    roots: Mapping[str, tuple[str, str]]
    """By ARN: name and root model's ARN of what is or was paid by the hour."""
    tags: Mapping[str, Mapping[str, str]]
    """By ARN."""


def ledger_lines(
    connection: Connection,
    account: str,
    region: str,
    *,
    since: datetime,
    until: datetime,
    now: datetime,
    zone: tzinfo,
    book: PriceBook,
) -> list[Line]:
    """Return an account's lines in order: by month, kind and resource.

    Args:
        since, until: what is counted is each hour and each job's end from `since` on, before
            `until`.
        now: nothing after it is counted.
        zone: of billing months.
    """
    sources = _Sources(
        *(account, region, now, book),
        roots=ledger.root_models(connection, account, region),
        tags=tags.tags_for_ledger(connection, account, region),
    )
    merged: dict[object, Line] = {}
    for period in split_by_month(since, min(until, now), zone):
        for line in _lines(connection, sources, period):
            merged[line.key] = _joined(merged.get(line.key), line)
    return sorted(merged.values(), key=lambda line: line.key)


def _lines(connection: Connection, sources: _Sources, period: Period) -> Iterator[Line]:
    scope = (connection, sources.account, sources.region)
    for span in ledger.list_spans(*scope, since=period.since, until=period.until):
        yield from _of_span(sources, span, period)
    for trained in ledger.list_training(*scope, since=period.since, until=period.until):
        yield _of_training(sources, trained, period)
    for used in total_usage(*scope, since=period.since, until=period.until):
        yield from _of_usage(sources, used, period)


def _joined(first: Line | None, second: Line) -> Line:
    """Return one line for two: a job that ended twice, a deployment that moved to another model."""
    if first is None:
        return second
    quantity = first.quantity + second.quantity
    price = first.price
    return replace(
        first,
        begins=min(first.begins, second.begins),
        ends=max(first.ends, second.ends),
        quantity=quantity,
        amount=None if price is None else money.amount(quantity, price, first.per),
    )


def _of_span(sources: _Sources, span: Span, period: Period) -> Iterator[Line]:
    ends = period.until
    if span.ended_at is not None:
        ends = min(ends, max(span.ended_at, span.billed_until or span.ended_at))
    hours = begun_hours(span.begun_at, period.since, ends)
    if not hours:
        return
    stored = span.kind == ledger.STORAGE
    model_id = _model_id(span.model_arn)
    price = sources.book.find(span.kind, model_id, span.commitment)
    yield _line(
        *(sources, period, span.kind, span.resource_arn, span.name, model_id),
        begins=max(span.begun_at, period.since),
        ends=ends,
        quantity=hours * span.quantity,
        unit=MODEL_HOURS if stored else UNIT_HOURS,
        price=None if price is None else price.amount,
        per=period.month_hours if stored else 1,
    )


def _of_training(sources: _Sources, trained: TrainedTokens, period: Period) -> Line:
    model_id = _model_id(trained.model_arn)
    price = sources.book.find(prices.TRAINING, model_id)
    amount = None if price is None else price.amount
    return _line(
        *(sources, period, prices.TRAINING, trained.job_arn, trained.job_name, model_id),
        begins=trained.begun_at,
        ends=trained.ended_at,
        quantity=trained.tokens,
        unit=TOKENS,
        price=Decimal(0) if trained.status == ledger.FREE_STATUS else amount,
        per=THOUSAND,
    )


def _of_usage(sources: _Sources, used: UsageTotal, period: Period) -> Iterator[Line]:
    asked = used.throughput_arn or used.endpoint_arn or used.model_arn
    name, _ = sources.roots.get(asked, ("", ""))
    _, root = sources.roots.get(used.model_arn, ("", used.model_arn))
    model_id = _model_id(root)
    kinds = (prices.INPUT, prices.OUTPUT)
    if used.throughput_arn:
        kinds = (RESERVED_INPUT, RESERVED_OUTPUT)
    elif used.batch:
        kinds = (prices.BATCH_INPUT, prices.BATCH_OUTPUT)
    counts = (used.usage.input_tokens, used.usage.output_tokens)
    for kind, tokens in zip(kinds, counts, strict=True):
        if not tokens:
            continue
        price = None if used.throughput_arn else sources.book.find(kind, model_id)
        amount = None if price is None else price.amount
        yield _line(
            *(sources, period, kind, asked, name, model_id),
            begins=used.first_hour,
            ends=min(used.last_hour + HOUR, sources.now),
            quantity=tokens,
            unit=TOKENS,
            price=Decimal(0) if used.throughput_arn else amount,
            per=THOUSAND,
            model_arn=used.model_arn,
        )


def _line(
    sources: _Sources,
    period: Period,
    kind: str,
    resource_arn: str,
    resource_name: str,
    model_id: str,
    *,
    begins: datetime,
    ends: datetime,
    quantity: int,
    unit: str,
    price: Decimal | None,
    per: int,
    model_arn: str = "",
) -> Line:
    """Return a line; what was asked through something else has that one's tags before its own."""
    amount = None if price is None else money.amount(quantity, price, per)
    tags = {**sources.tags.get(model_arn, {}), **sources.tags.get(resource_arn, {})}
    return Line(
        account=sources.account,
        region=sources.region,
        month=period.month,
        kind=kind,
        resource_arn=resource_arn,
        resource_name=resource_name,
        model_id=model_id,
        begins=begins,
        ends=ends,
        quantity=quantity,
        unit=unit,
        price=price,
        per=per,
        amount=amount,
        tags=tags,
    )


def _model_id(arn: str) -> str:
    """Return the base model's id of an ARN: its own, or the one in a customized model's."""
    parsed = parse_arn(arn)
    if parsed is None:
        return arn
    if parsed.resource_type == "foundation-model":
        return parsed.resource_id
    return parsed.resource_id.rpartition("/")[0] or IMPORTED
