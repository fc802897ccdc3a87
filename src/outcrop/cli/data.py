"""`outcrop data VERB`: the arguments of each verb, and which function it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outcrop.cli.data_making import TYPES, add_making

__all__ = ["TYPES", "add_data"]


def add_data(
    subcommands: Any, common: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]
) -> None:
    """Add the command with its verbs."""
    help = "Look at data files, and make better ones of them."
    data = subcommands.add_parser("data", help=help, description=help, parents=[common])
    data.set_defaults(run=run)
    verbs = data.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in (
        ("check", "Check files as the validation stage of a job does."),
        ("stats", "Print counts, lengths in tokens, labels and languages."),
    ):
        verb = verbs.add_parser(name, help=text, description=text, parents=[common])
        _add_files(verb)
    _add_check_options(verbs.choices["check"])
    text = "Compare two versions of a file: records added, removed and changed."
    diff = verbs.add_parser("diff", help=text, description=text, parents=[common])
    diff.add_argument("old", metavar="OLD", help="the earlier version")
    diff.add_argument("new", metavar="NEW", help="the later version")
    _add_json(diff)
    add_making(verbs, common)


def _add_files(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("files", nargs="+", metavar="FILE", help="training data: paths, s3:// URIs")
    verb.add_argument(
        "--for",
        dest="model",
        metavar="MODEL_ID",
        help="the model: its formats, its limits, its tokenizer; without it what holds for any",
    )
    verb.add_argument(
        "--type",
        dest="customization_type",
        choices=TYPES,
        default="FINE_TUNING",
        help="what the data are for (default: FINE_TUNING)",
    )
    verb.add_argument("--validation", metavar="FILE", help="validation data")
    verb.add_argument("--test", metavar="FILE", help="test data, which must not leak into training")
    verb.add_argument(
        "--batch-size", type=int, metavar="N", help="of the job; it decides the token limit"
    )
    _add_json(verb)


def _add_check_options(check: argparse.ArgumentParser) -> None:
    check.add_argument(
        "--report", type=Path, metavar="DIR", help="write report.json and report.html there"
    )
    check.add_argument(
        "--strict", action="store_true", help="exit code 1 where there is something to look at"
    )


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON")
