"""`outcrop data check`, `stats` and `diff`: what is in data files, before anything uses them.

`check` is the validation stage of a job without a job: the same rules, the same numbers. Exit codes
are 0 for clean data, 2 for data that a job would refuse, and with `--strict` 1 for data with
something to look at. The original is never changed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outcrop.cli.data_source import open_data_file
from outcrop.data.check import TEST, TRAINING, VALIDATION, Check, check_files
from outcrop.data.diff import Diff, Version, compare
from outcrop.data.formats import formats_for
from outcrop.data.rejection import rejection
from outcrop.data.render import Renderer
from outcrop.data.report import Training, build_report, write_json, write_summary
from outcrop.data.report_page import write_page
from outcrop.errors import SettingsError, StoreError, ValidationException
from outcrop.models.catalog import BaseModel, Catalog, load_catalog
from outcrop.models.weights import ensure_weights
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import check_version, connect
from outcrop.train.plan import TrainPlan, make_plan

CLEAN, WARNINGS, REJECTED = 0, 1, 2
"""Exit codes of `check`; 1 is also that of a command that cannot do its work."""
JSON_FILE, PAGE_FILE = "report.json", "report.html"
_BAR_CHARACTERS = 30
_SHOWN_LINES = 20


def check(settings: Settings, options: argparse.Namespace) -> int:
    """Check files as a job would, print or write the report, and return the exit code."""
    found, base, plan = _look(settings, options)
    formats = formats_for(base, options.customization_type)
    refusal = rejection(found, formats)
    report = _report(settings, found, base, plan, None if refusal is None else refusal.message)
    if options.report is not None:
        write_report(options.report, report)
    if options.json:
        sys.stdout.write(write_json(report).decode())
    else:
        print(write_summary(report, seconds=found.seconds))
    if found.is_rejected:
        return REJECTED
    return WARNINGS if options.strict and found.verdict == "warnings" else CLEAN


def stats(settings: Settings, options: argparse.Namespace) -> int:
    """Print what the records of files are like: counts, lengths, labels, languages."""
    found, base, plan = _look(settings, options)
    report = _report(settings, found, base, plan, None)
    figures = {
        name: report[name]
        for name in (
            *("schema", "model", "customizationType", "batchSize", "files", "duplicates"),
            *("tokens", "characters", "labels", "languages", "training"),
        )
    }
    if options.json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        nothing = {"codes": [], "defects": [], "counts": {}, "verdict": "measured"}
        print(write_summary({**figures, **nothing}, seconds=found.seconds))
    return 0


def diff(settings: Settings, options: argparse.Namespace) -> int:
    """Print how two versions of a file differ; 0 where both hold the same records, else 1."""
    old, new = (open_data_file(name, TRAINING) for name in (options.old, options.new))
    found = compare(Version(old.name, old.open), Version(new.name, new.open))
    print(json.dumps(_describe(found), indent=2) if options.json else _write_diff(found))
    return 0 if found.is_same else 1


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report into a folder, for programs and for people; each file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((JSON_FILE, write_json(report)), (PAGE_FILE, write_page(report))):
        being_made = folder / f".{name}.tmp-{os.getpid()}"
        try:
            being_made.write_bytes(content)
            being_made.rename(folder / name)
        finally:
            being_made.unlink(missing_ok=True)


def _look(
    settings: Settings, options: argparse.Namespace
) -> tuple[Check, BaseModel | None, TrainPlan | None]:
    """Check the files that the options name."""
    roles = (
        *((name, TRAINING) for name in options.files),
        *((name, VALIDATION) for name in (options.validation,) if name),
        *((name, TEST) for name in (options.test,) if name),
    )
    base = None if options.model is None else resolve_model(load_catalog(settings), options.model)
    customization_type = options.customization_type
    formats_for(base, customization_type)  # refuses a type that is none
    plan = _plan(base, customization_type, options)
    files = [open_data_file(name, role) for name, role in roles]
    renderer = None if base is None else Renderer(ensure_weights(settings, base.weights))
    with progress_bar([file.num_bytes for file in files]) as progress:
        found = check_files(
            files,
            base=base,
            customization_type=customization_type,
            batch_size=_batch_size(base, plan, options),
            renderer=renderer,
            hyper_parameters=None if plan is None else plan.hyper_parameters,
            max_training_records=settings.max_training_records,
            max_validation_records=settings.max_validation_records,
            progress=progress,
        )
    return found, base, plan


def resolve_model(catalog: Catalog, name: str) -> BaseModel:
    """Return the model of an id.

    Raises:
        SettingsError: there is none; with those whose ids are like it.
    """
    found = catalog.resolve(name)
    if found is not None:
        return found
    ids = [identifier for base in catalog.models for identifier in base.ids]
    near = difflib.get_close_matches(name, ids, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise SettingsError(
        f"--for {name}: there is no such model. {hint}`outcrop models` lists all of them."
    )


def _plan(
    base: BaseModel | None, customization_type: str, options: argparse.Namespace
) -> TrainPlan | None:
    """Return what a job of this model would do; None where no model is trained so."""
    if base is None:
        return None
    if customization_type not in base.customizations:
        offered = ", ".join(base.customizations) or "no customization"
        if customization_type in ("FINE_TUNING", "CONTINUED_PRE_TRAINING"):
            raise ValidationException(
                f"{base.model_id} does not support {customization_type}. It supports {offered}."
            )
        return None
    hyper_parameters = {}
    if options.batch_size is not None:
        if "batchSize" not in {row.name for row in base.hyper_parameters}:
            raise ValidationException(
                f"--batch-size: {base.model_id} has none; a step takes {base.batch_size} records."
            )
        hyper_parameters["batchSize"] = str(options.batch_size)
    has_validation = options.validation is not None
    return make_plan(base, customization_type, hyper_parameters, has_validation=has_validation)


def _batch_size(base: BaseModel | None, plan: TrainPlan | None, options: argparse.Namespace) -> int:
    if plan is not None:
        return plan.batch_size
    if options.batch_size is not None:
        return max(int(options.batch_size), 1)
    return 1 if base is None else base.batch_size


def _report(
    settings: Settings,
    found: Check,
    base: BaseModel | None,
    plan: TrainPlan | None,
    refusal: str | None,
) -> dict[str, Any]:
    training = None
    if base is not None and plan is not None:
        measured = measured_speed(settings, base, plan.method)
        name, speed = measured if measured is not None else ("", None)
        training = Training(plan.num_epochs, tokens_per_second=speed, measured_by=name)
    model_name = "" if base is None else base.full_name
    return build_report(found, model_name=model_name, training=training, rejection=refusal)


def measured_speed(settings: Settings, base: BaseModel, method: str) -> tuple[str, float] | None:
    """Return name and tokens a second of the last job of this model on this machine, if there was
    one and its database is here.
    """
    if not settings.database_url and not (settings.data_dir / "outcrop.sqlite3").exists():
        return None
    engine = connect(settings.effective_database_url)
    try:
        check_version(engine)
        with engine.connect() as connection:
            return jobs.last_speed(
                connection,
                *(settings.account, settings.region, base.weights, method),
                default_method=base.method,
            )
    except StoreError:  # of another version: then nothing is known
        return None
    finally:
        engine.dispose()


@contextmanager
def progress_bar(sizes: list[int | None]) -> Iterator[Callable[[int], None] | None]:
    """Show on a terminal how much was read; elsewhere nothing.

    Args:
        sizes: of the files, in bytes; without all of them no share is known, and none is shown.
    """
    if not sys.stderr.isatty():
        yield None
        return
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else 0
    started = time.monotonic()
    shown_at = 0.0

    def show(num_bytes: int) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at < 0.1 and num_bytes < total:
            return
        shown_at = now
        speed = num_bytes / max(now - started, 1e-3) / 1e6
        share = min(num_bytes / total, 1.0) if total else 0.0
        done = round(share * _BAR_CHARACTERS)
        bar = "#" * done + "-" * (_BAR_CHARACTERS - done)
        of = f"[{bar}] {share:4.0%} " if total else ""
        sys.stderr.write(f"\r{of}{num_bytes / 1e6:,.0f} MB, {speed:,.0f} MB/s ")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _describe(found: Diff) -> dict[str, Any]:
    return {
        **{
            side: {
                "name": facts.name,
                "sha256": facts.digest,
                "numBytes": facts.num_bytes,
                "numRecords": facts.num_records,
            }
            for side, facts in (("old", found.old), ("new", found.new))
        },
        "numUnchanged": found.num_unchanged,
        "added": list(found.added),
        "removed": list(found.removed),
        "changed": [{"old": old, "new": new} for old, new in found.changed],
    }


def _write_diff(found: Diff) -> str:
    lines = [
        f"{side} {facts.name}: {facts.num_records:,} records, SHA-256 {facts.digest}"
        for side, facts in (("old", found.old), ("new", found.new))
    ]
    lines += [f"- {found.old.name}:{line}" for line in found.removed[:_SHOWN_LINES]]
    lines += [f"+ {found.new.name}:{line}" for line in found.added[:_SHOWN_LINES]]
    lines += [
        f"~ {found.old.name}:{old} -> {found.new.name}:{new}"
        for old, new in found.changed[:_SHOWN_LINES]
    ]
    lists = (found.removed, found.added, found.changed)
    if any(len(rows) > _SHOWN_LINES for rows in lists):
        lines.append(f"  ... the first {_SHOWN_LINES} of each are listed; --json lists all")
    lines.append(
        f"{len(found.added):,} added, {len(found.removed):,} removed, {len(found.changed):,} "
        f"changed, {found.num_unchanged:,} unchanged"
    )
    return "\n".join(lines)
