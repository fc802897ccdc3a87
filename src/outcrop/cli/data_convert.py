"""`outcrop data convert`: records of one format from files of another, whatever they are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from outcrop.cli.data_check import CLEAN, progress_bar, resolve_model
from outcrop.cli.data_clean import rejected
from outcrop.cli.data_source import counted, local_copy, open_data_file
from outcrop.data.convert import Row, converted_rows, jsonl_rows, write_rows
from outcrop.data.facts import TRAINING, DataFile
from outcrop.data.folders import Folder
from outcrop.data.limits import TokenCheck
from outcrop.data.logs import log_rows, make_filter
from outcrop.data.render import Renderer
from outcrop.data.tables import Columns, csv_rows, parquet_rows
from outcrop.errors import DataError, SettingsError
from outcrop.models.catalog import DOCUMENTS, BaseModel, load_catalog
from outcrop.models.weights import ensure_weights
from outcrop.settings import Settings

CSV_FILES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
PARQUET_FILES = (".parquet", ".pq")
_SHOWN_REFUSED = 10


def convert(settings: Settings, options: argparse.Namespace) -> int:
    """Convert files into one, and say how many records came of it."""
    base = None if options.model is None else resolve_model(load_catalog(settings), options.model)
    _check_options(options)
    sources = [Path(name) for name in options.files if not name.startswith("s3://")]
    folders: list[Folder] = []
    with ExitStack() as opened:
        files = {
            name: open_data_file(name, TRAINING)
            for name in options.files
            if name.startswith("s3://") or not Path(name).is_dir()
        }
        progress = opened.enter_context(progress_bar([file.num_bytes for file in files.values()]))

        def rows() -> Iterator[Row]:
            for name in options.files:
                if name in files:
                    data = counted(files[name], progress)
                    yield from _file_rows(data, base, options, opened)
                else:
                    folders.append(_folder(Path(name), settings, base, options))
                    yield from folders[-1].rows()

        try:
            found = write_rows(
                rows(),
                options.output,
                sources=sources,
                skip_refused=options.skip_refused,
                packed=options.output.suffix == ".gz",
                force=options.force,
            )
        except DataError as error:
            return rejected(error)
    passed_over = [name for folder in folders for name in folder.passed_over]
    if options.json:
        described = {
            "output": str(options.output),
            "sha256": found.digest,
            "numBytes": found.num_bytes,
            "numRecords": found.num_records,
            "numRefused": found.num_refused,
            "refused": [
                {
                    "file": defect.place.file,
                    "line": defect.place.line,
                    "code": defect.code,
                    "message": defect.message,
                }
                for defect in found.refused
            ],
            "passedOver": passed_over,
        }
        print(json.dumps(described, indent=2, ensure_ascii=False))
        return CLEAN
    print(f"{options.output}: {found.num_records:,} records")
    if found.num_refused:
        print(f"  {found.num_refused:,} could not be converted and were left out:")
    for defect in found.refused[:_SHOWN_REFUSED]:
        where = (
            f"{defect.place.file}:{defect.place.line}" if defect.place.line else defect.place.file
        )
        print(f"  {where}: {defect.message}")
    if passed_over:
        print(f"  {len(passed_over):,} files are empty or of other kinds, and were passed over")
    return CLEAN


def _check_options(options: argparse.Namespace) -> None:
    if (options.filter or options.prompts_only) and not options.logs:
        raise SettingsError("--filter and --prompts-only are for invocation logs: add --logs.")


def _file_rows(
    data: DataFile, base: BaseModel | None, options: argparse.Namespace, opened: ExitStack
) -> Iterator[Row]:
    """Return the records of one file, converted."""
    body_family = base.body_family if base else ""
    if options.logs:
        matches = make_filter(_json(options.filter)) if options.filter else None
        return log_rows(
            data, options.to, matches=matches, use_prompt_response=not options.prompts_only
        )
    name = data.name.lower()
    if name.endswith(PARQUET_FILES):
        path = opened.enter_context(local_copy(data))
        rows = parquet_rows(path, data.name, _columns(options))
    elif name.endswith(CSV_FILES):
        rows = csv_rows(
            data, _columns(options), delimiter=options.delimiter, encoding=options.encoding
        )
    else:
        return jsonl_rows(data, options.to, body_family=body_family)
    return converted_rows(rows, options.to, body_family=body_family)


def _columns(options: argparse.Namespace) -> Columns:
    try:
        return Columns(options.prompt_column, options.completion_column, options.input_column)
    except DataError as error:
        raise SettingsError(
            "A table needs --prompt-column and --completion-column, or --input-column."
        ) from error


def _folder(
    path: Path, settings: Settings, base: BaseModel | None, options: argparse.Namespace
) -> Folder:
    if options.to != DOCUMENTS:
        raise SettingsError(f"A folder of texts becomes {DOCUMENTS}, not {options.to}.")
    if base is None:
        return Folder(path)
    renderer = Renderer(ensure_weights(settings, base.weights))
    room = TokenCheck(base, 1).longest_piece - len(renderer.tokenizer.document_start) - 1
    return Folder(path, room, renderer.counter.count)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise SettingsError(f"--filter is not JSON: {error}.") from None
