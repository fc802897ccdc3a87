"""`outcrop data clean`, `undo` and `split`: files made of a data file, which stays as it is.

Exit codes of `clean` are 0, 2 where records were left out because they cannot be used, and with
`--strict` 1 where anything was changed. `split` takes no file with a bad line: 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outcrop.cli.data_check import CLEAN, REJECTED, WARNINGS, progress_bar, resolve_model
from outcrop.cli.data_source import counted, open_data_file
from outcrop.data import clean_log
from outcrop.data.clean import Cleaned, Cleaning, Model, clean_file
from outcrop.data.facts import TEST, TRAINING, VALIDATION
from outcrop.data.formats import formats_for
from outcrop.data.output import check_target
from outcrop.data.render import Renderer
from outcrop.data.split import split_file
from outcrop.data.text import CODES
from outcrop.errors import DataError, SettingsError
from outcrop.models.catalog import BaseModel, load_catalog
from outcrop.models.weights import ensure_weights
from outcrop.settings import Settings

_SHOWN_REJECTED = 10


def clean(settings: Settings, options: argparse.Namespace) -> int:
    """Clean files, and say what was done."""
    targets = cleaned_paths(options.files, options.output, options.log)
    base = _base(settings, options)
    formats = formats_for(base, options.customization_type)
    cleaning = Cleaning(
        repairs=_repairs(options.repairs),
        drops_exact_duplicates=not options.keep_duplicates,
        drops_near_duplicates=not (options.keep_duplicates or options.keep_near_duplicates),
        near_threshold=options.near_threshold,
    )
    model = None if base is None else _model(settings, base, options.batch_size)
    against = [
        open_data_file(name, role)
        for name, role in ((options.validation, VALIDATION), (options.test, TEST))
        if name
    ]
    found: list[tuple[Cleaned, Path, Path]] = []
    for name, (target, log) in zip(options.files, targets, strict=True):
        data = open_data_file(name, TRAINING)
        with progress_bar([data.num_bytes, data.num_bytes]) as progress:
            cleaned = clean_file(
                counted(data, progress),
                target,
                log,
                cleaning,
                formats,
                model=model,
                against=against,
                packed=target.suffix == ".gz",
                force=options.force,
            )
        found.append((cleaned, target, log))
        if not options.json:
            print(_describe(cleaned, target, log))
    if options.json:
        print(json.dumps([_as_json(*each) for each in found], indent=2, ensure_ascii=False))
    if any(cleaned.rejected for cleaned, _, _ in found):
        return REJECTED
    changed = any(cleaned.actions for cleaned, _, _ in found)
    return WARNINGS if options.strict and changed else CLEAN


def undo(settings: Settings, options: argparse.Namespace) -> int:
    """Write the original of a cleaned file again."""
    data = open_data_file(options.cleaned, TRAINING)
    sources = [options.log, *([] if data.name.startswith("s3://") else [Path(data.name)])]
    check_target(options.output, sources, force=options.force)
    with data.open() as stream:
        digest = clean_log.undo(stream, options.log, options.output)
    if options.json:
        print(json.dumps({"output": str(options.output), "sha256": digest}))
    else:
        print(f"{options.output}: the original, SHA-256 {digest}")
    return CLEAN


def split(settings: Settings, options: argparse.Namespace) -> int:
    """Split a file, and say how many records went where."""
    base = _base(settings, options)
    formats = formats_for(base, options.customization_type)
    data = open_data_file(options.file, TRAINING)
    stem, suffix = _stem(options.file)
    training = options.training or stem.with_name(f"{stem.name}.training{suffix}")
    validation = options.validation or stem.with_name(f"{stem.name}.validation{suffix}")
    packed = training.suffix == ".gz"
    try:
        with progress_bar([data.num_bytes, data.num_bytes]) as progress:
            found = split_file(
                counted(data, progress),
                *(training, validation, formats),
                share=options.share,
                seed=options.seed,
                near_threshold=options.near_threshold,
                packed=packed,
                force=options.force,
            )
    except DataError as error:
        return rejected(error)
    if options.json:
        described = {
            "training": _part(training, found.num_training, found.training_digest),
            "validation": _part(validation, found.num_validation, found.validation_digest),
            "numGroups": found.num_groups,
            "labels": {
                label: {"training": one, "validation": other}
                for label, (one, other) in found.labels.items()
            },
        }
        print(json.dumps(described, indent=2, ensure_ascii=False))
        return CLEAN
    print(f"{training}: {found.num_training:,} records")
    print(f"{validation}: {found.num_validation:,} records")
    if found.labels:
        print(f"{len(found.labels)} labels, each in the same proportion")
    return CLEAN


def rejected(error: DataError) -> int:
    """Print the error of a record and return the exit code; raise those that are of no record."""
    if error.line is None:
        raise error
    print(f"outcrop: {error}", file=sys.stderr)
    return REJECTED


def cleaned_paths(
    files: Sequence[str], output: Path | None, log: Path | None
) -> list[tuple[Path, Path]]:
    """Return where each file's cleaned content and its log go.

    Raises:
        SettingsError: several files are to become one.
    """
    if len(files) > 1 and (log is not None or (output is not None and not output.is_dir())):
        raise SettingsError(
            "Several files are cleaned into a directory that is there: name it with --output. Each "
            "has a log of its own beside it."
        )
    found = []
    for name in files:
        stem, suffix = _stem(name)
        target = stem.with_name(f"{stem.name}.cleaned{suffix}")
        if output is not None:
            target = output / target.name if output.is_dir() else output
        bare = target.name.removesuffix(".gz").removesuffix(".jsonl")
        found.append((target, log or target.with_name(f"{bare}.log.jsonl")))
    return found


def _stem(name: str) -> tuple[Path, str]:
    """Return a file's path without its suffix, here for an object, and the suffix."""
    path = Path(name.rpartition("/")[2]) if name.startswith("s3://") else Path(name)
    if not path.name or path.is_dir():
        raise DataError(f"{name} is a directory. Name a file.", code="unreadable_file", file=name)
    packed = ".gz" if path.name.endswith(".gz") else ""
    bare = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return path.parent / (bare or path.name), f".jsonl{packed}"


def _base(settings: Settings, options: argparse.Namespace) -> BaseModel | None:
    return None if options.model is None else resolve_model(load_catalog(settings), options.model)


def _model(settings: Settings, base: BaseModel, batch_size: int | None) -> Model:
    return Model(base, batch_size or 1, Renderer(ensure_weights(settings, base.weights)))


def _repairs(codes: str | None) -> tuple[str, ...]:
    if codes is None:
        return CODES
    return () if codes == "none" else tuple(code.strip() for code in codes.split(","))


def _describe(cleaned: Cleaned, target: Path, log: Path) -> str:
    lines = [
        f"{cleaned.file}: {cleaned.num_records:,} records; {target}: {cleaned.num_output_records:,}"
    ]
    if cleaned.is_unchanged:
        lines.append("  nothing needed cleaning")
    for code, count in sorted(cleaned.counts.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"  {count:>9,}  {code}")
    for defect in cleaned.rejected[:_SHOWN_REJECTED]:
        lines.append(f"  line {defect.place.line} cannot be used: {defect.message}")
    if len(cleaned.rejected) > _SHOWN_REJECTED:
        lines.append("  ... the log has all of them")
    lines.append(f"  every change is in {log}; outcrop data undo makes the original of both")
    return "\n".join(lines)


def _as_json(cleaned: Cleaned, target: Path, log: Path) -> dict[str, Any]:
    return {
        "file": cleaned.file,
        "sha256": cleaned.original_digest,
        "numBytes": cleaned.num_bytes,
        "numLines": cleaned.num_lines,
        "numRecords": cleaned.num_records,
        "output": str(target),
        "outputSha256": cleaned.digest,
        "numOutputBytes": cleaned.num_output_bytes,
        "numOutputRecords": cleaned.num_output_records,
        "log": str(log),
        "actions": dict(cleaned.actions),
        "counts": dict(cleaned.counts),
        "rejected": [
            {"line": defect.place.line, "code": defect.code, "message": defect.message}
            for defect in cleaned.rejected
        ],
    }


def _part(path: Path, num_records: int, digest: str) -> dict[str, Any]:
    return {"output": str(path), "numRecords": num_records, "sha256": digest}
