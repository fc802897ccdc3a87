"""The `outcrop` command: every process of the service, and its owner's tools.

Each subcommand imports what it needs when it runs, so that none pays for another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from outcrop import __version__
from outcrop.errors import OutcropError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are one line on standard error."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except OutcropError as error:
        print(f"outcrop: {error}", file=sys.stderr)  # the end of a log has lines of its own
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, had enough
        sys.stderr.close()
        return 0
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except _database_errors() as error:
        reason = getattr(error, "orig", None) or error
        return _fail(
            f"the database cannot be used: {reason}. Check --data-dir and the setting "
            "database_url; `outcrop serve` makes the database."
        )
    return code


def _database_errors() -> type[Exception]:
    """Return what SQLAlchemy raises; asked for only once something went wrong."""
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError


def _fail(message: str) -> int:
    print(f"outcrop: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_ERROR


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser; docs/cli.md is checked against it."""
    from outcrop.cli import commands
    from outcrop.cli.cost import add_cost, add_estimate
    from outcrop.cli.data import add_data

    top = argparse.ArgumentParser(
        prog="outcrop",
        description="Amazon Bedrock's model customization on your own machines.",
    )
    top.add_argument("--version", action="version", version=f"outcrop {__version__}")
    subcommands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,  # a verb that is not given one leaves its command's alone
        help="the directory that holds everything",
    )

    def add(name: str, run: object, help: str) -> argparse.ArgumentParser:
        command = subcommands.add_parser(name, help=help, description=help, parents=[common])
        command.set_defaults(run=run)
        return command

    serve = add("serve", commands.serve, "Run the whole service on this machine.")
    gateway = add("gateway", commands.gateway, "Run the gateway alone.")
    for command in (serve, gateway):
        command.add_argument("--host", help="address to listen on")
        command.add_argument("--port", type=int, help="port to listen on; 0 takes a free one")
    for command in (serve, gateway):
        _add_tls(command, "speak https, with a certificate made at the first start")
    worker = add("worker", commands.worker, "Run a worker alone: it takes up queued jobs.")
    worker.add_argument("--name", help="what the worker is called in the jobs it holds")
    model_server = add("model-server", commands.model_server, "Run one model server alone.")
    model_server.add_argument("--weights", required=True, help="key of the base weights to serve")
    model_server.add_argument("--socket", required=True, type=Path, help="unix socket to listen on")

    env = add("env", commands.env, "Print the variables that point AWS clients here.")
    env.add_argument("--port", type=int, help="port of the service")
    _add_tls(env, "for a service that will be started with --tls; one that runs is asked itself")
    env.add_argument(
        "--bearer",
        action="store_true",
        help="also the API key, for Bedrock's clients (over https) and OpenAI's",
    )
    env.add_argument(
        "--shell",
        choices=("sh", "fish", "powershell", "json"),
        default="sh",
        help="in whose syntax (default: sh)",
    )
    add("settings", commands.settings, "Print every setting, its value and where it came from.")
    gc = add("gc", commands.gc, "Remove what nothing needs any more.")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    add_cost(subcommands, common, commands.cost)
    add_estimate(subcommands, common, commands.estimate)
    add_data(subcommands, common, commands.data)
    models = add(
        "models", commands.models, "Show the base models, add one, or export a custom one."
    )
    verbs = models.add_subparsers(dest="verb", metavar="VERB")
    show = verbs.add_parser(
        "show", help="full name, licence, digest and origin of a base model", parents=[common]
    )
    show.add_argument("model", nargs="?", help="a model id; all of them without it")
    added = verbs.add_parser(
        "add", help="offer a Hugging Face folder as a base model", parents=[common]
    )
    added.add_argument("path", type=Path, help="folder with safetensors, config and tokenizer")
    added.add_argument("--as", dest="model_id", required=True, metavar="ID", help="its model id")
    added.add_argument("--license", required=True, help="licence of the weights, as SPDX names it")
    added.add_argument("--family", help="whose bounds and bodies a new id has (default: llama)")
    added.add_argument("--name", help="its name in lists, at most 20 characters")
    added.add_argument("--provider", help="its maker in lists, at most 20 characters")
    export = verbs.add_parser(
        "export", help="write a custom model where other programs can use it", parents=[common]
    )
    export.add_argument("name", metavar="MODEL", help="the custom model: its name or its ARN")
    export.add_argument(
        "--to", required=True, metavar="PLACE", help="a new folder, or s3://bucket/prefix"
    )
    export.add_argument(
        "--format",
        dest="form",
        choices=("adapter", "merged", "gguf"),
        default="merged",
        help="peft's layout, Hugging Face's, or one GGUF file (default: merged)",
    )
    export.add_argument(
        "--type",
        dest="data_type",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="what numbers are held in (default: f32)",
    )
    return top


def _add_tls(command: argparse.ArgumentParser, help: str) -> None:
    """Add the flag; without it the setting decides."""
    command.add_argument("--tls", action="store_true", default=None, help=help)
