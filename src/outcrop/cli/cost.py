"""The flags of `outcrop cost` and `outcrop estimate`."""

from __future__ import annotations

import argparse
from typing import Any


def add_cost(subcommands: Any, common: argparse.ArgumentParser, run: object) -> None:
    """Add the command to the parser."""
    help = "Print what was used and what it costs, from the ledger."
    command = subcommands.add_parser("cost", help=help, description=help, parents=[common])
    command.set_defaults(run=run)
    command.add_argument("--month", help="as in 2026-12 (default: the month that is under way)")
    command.add_argument("--last", help="last month of several, the first of which is --month")
    command.add_argument(
        "--by",
        metavar="NAMES",
        help="add lines up by month, type, model, resource or tag:KEY; several with commas",
    )
    command.add_argument("--account", help="whose ledger (default: the setting account)")
    command.add_argument("--region", help="where (default: the setting region)")
    command.add_argument(
        "--prices", metavar="FILE", help="another price book than that of the settings"
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON; money is text in it")
    form.add_argument("--csv", action="store_true", help="print CSV")
    form.add_argument(
        "--price-book", action="store_true", help="print the price book in force, a TOML file"
    )


def add_estimate(subcommands: Any, common: argparse.ArgumentParser, run: object) -> None:
    """Add the command to the parser."""
    help = "Print what a job on a data file will take and cost: tokens, time, memory, disk, price."
    command = subcommands.add_parser("estimate", help=help, description=help, parents=[common])
    command.set_defaults(run=run)
    command.add_argument("file", metavar="FILE", help="training data: a path, or an s3:// URI")
    command.add_argument(
        "--for", dest="model", metavar="MODEL_ID", required=True, help="the base model"
    )
    command.add_argument(
        "--type",
        dest="customization_type",
        choices=("FINE_TUNING", "CONTINUED_PRE_TRAINING"),
        default="FINE_TUNING",
        help="of the job (default: FINE_TUNING)",
    )
    command.add_argument("--validation", metavar="FILE", help="validation data")
    command.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a hyperparameter of the job; as often as needed",
    )
    command.add_argument("--json", action="store_true", help="print JSON; money is text in it")
