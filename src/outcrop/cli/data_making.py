"""The arguments of the data verbs that make files of files: clean, undo, split, convert."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

TYPES = (
    *("FINE_TUNING", "CONTINUED_PRE_TRAINING", "DISTILLATION", "REINFORCEMENT_FINE_TUNING"),
    *("EVALUATION", "BATCH_INFERENCE"),
)
"""What data may be for; `data/formats.py` has their formats."""
TARGETS = (
    *("prompt-completion", "conversation", "claude-messages", "continued-pre-training"),
    *("distillation-prompts", "evaluation-prompts", "reinforcement"),
)
"""What can be converted to; `data/convert.py` has them."""
DEFAULT_THRESHOLD = 0.85
"""As in `data/near.py`, which costs numpy to import."""


def add_making(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs."""

    def add(name: str, text: str) -> argparse.ArgumentParser:
        verb: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=text, parents=[common]
        )
        return verb

    clean = add("clean", "Mend texts and leave out what repeats, into another file with a log.")
    clean.add_argument("files", nargs="+", metavar="FILE", help="paths, s3:// URIs")
    _add_model(clean)
    clean.add_argument("--output", type=Path, metavar="PATH", help="file; a directory for several")
    clean.add_argument("--log", type=Path, metavar="FILE", help="the change log of a single file")
    clean.add_argument("--validation", metavar="FILE", help="leave out records that it has too")
    clean.add_argument("--test", metavar="FILE", help="leave out records that it has too")
    clean.add_argument(
        "--repairs", metavar="CODES", help="only these, with commas; `none` for none"
    )
    clean.add_argument(
        "--keep-duplicates", action="store_true", help="leave out no record that repeats another"
    )
    clean.add_argument(
        "--keep-near-duplicates", action="store_true", help="leave out only the very same"
    )
    _add_threshold(clean)
    clean.add_argument(
        "--strict", action="store_true", help="exit code 1 where anything was changed"
    )
    _add_writing(clean)

    undo = add("undo", "Make the original of a cleaned file again, byte for byte.")
    undo.add_argument("cleaned", metavar="CLEANED", help="the cleaned file")
    undo.add_argument("--log", type=Path, required=True, metavar="FILE", help="its change log")
    undo.add_argument("--output", type=Path, required=True, metavar="FILE", help="where it goes")
    _add_writing(undo)

    split = add("split", "Split a file into training and validation data.")
    split.add_argument("file", metavar="FILE", help="path, s3:// URI")
    _add_model(split)
    split.add_argument("--training", type=Path, metavar="FILE", help="where the training part goes")
    split.add_argument("--validation", type=Path, metavar="FILE", help="where the other part goes")
    split.add_argument(
        "--share", type=float, default=0.1, metavar="S", help="for validation (default: 0.1)"
    )
    split.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another one, another split (default: 0)"
    )
    _add_threshold(split)
    _add_writing(split)

    convert = add(
        "convert", "Turn files into records of a format: JSONL, CSV, Parquet, texts, logs."
    )
    convert.add_argument(
        "files", nargs="+", metavar="SOURCE", help="paths, s3:// URIs, or a folder of texts"
    )
    convert.add_argument("--to", required=True, choices=TARGETS, help="the format that is wanted")
    convert.add_argument("--output", type=Path, required=True, metavar="FILE", help="where it goes")
    convert.add_argument(
        "--for",
        dest="model",
        metavar="MODEL_ID",
        help="whose mark-up prompts are in, and whose limit texts of a folder are cut to",
    )
    convert.add_argument("--prompt-column", default="", metavar="NAME", help="of a table")
    convert.add_argument("--completion-column", default="", metavar="NAME", help="of a table")
    convert.add_argument("--input-column", default="", metavar="NAME", help="of a table")
    convert.add_argument(
        "--delimiter", default="", metavar="C", help="of a CSV file; else found out"
    )
    convert.add_argument("--encoding", default="", metavar="NAME", help="of a CSV file")
    convert.add_argument("--logs", action="store_true", help="the files are invocation logs")
    convert.add_argument("--filter", metavar="JSON", help="requestMetadataFilters of those logs")
    convert.add_argument(
        "--prompts-only", action="store_true", help="of logs: without the logged answers"
    )
    convert.add_argument(
        "--skip-refused", action="store_true", help="leave out what cannot be converted"
    )
    _add_writing(convert)


def _add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--for", dest="model", metavar="MODEL_ID", help="the model: its formats and limits"
    )
    verb.add_argument(
        "--type",
        dest="customization_type",
        choices=TYPES,
        default="FINE_TUNING",
        help="what the data are for (default: FINE_TUNING)",
    )
    verb.add_argument(
        "--batch-size", type=int, metavar="N", help="of the job; it decides the token limit"
    )


def _add_threshold(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--near-threshold",
        type=float,
        default=DEFAULT_THRESHOLD,
        metavar="T",
        help=f"share of runs of words that near duplicates share (default: {DEFAULT_THRESHOLD})",
    )


def _add_writing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--force", action="store_true", help="replace files that are there")
    verb.add_argument("--json", action="store_true", help="print JSON")
