"""What each subcommand does: read the settings, call the room that knows, print."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any

from outcrop.errors import SettingsError
from outcrop.settings import Settings, describe_settings, load_settings


def _settings(options: argparse.Namespace) -> Settings:
    return load_settings(overrides=_overrides(options))


def _settings_and_data_dir(options: argparse.Namespace) -> Settings:
    """Read the settings and make their data directory, where it is not there yet."""
    settings = _settings(options)
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SettingsError(
            f"The data directory {settings.data_dir} cannot be made: {error.strerror}. "
            "Choose another with --data-dir."
        ) from error
    return settings


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    names = ("data_dir", "host", "port", "tls")
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def serve(options: argparse.Namespace) -> int:
    """Run the whole service until SIGTERM or Ctrl-C."""
    from outcrop.cli.serve import run_service

    _log_to_stderr()
    return run_service(
        _settings_and_data_dir(options), lambda url: print(f"ready {url}", flush=True)
    )


def gateway(options: argparse.Namespace) -> int:
    """Run the gateway until SIGTERM."""
    from outcrop.api.app import run_gateway
    from outcrop.processes.ready import announce_ready

    _log_to_stderr()

    def on_ready(url: str) -> None:
        print(f"ready {url}", flush=True)
        announce_ready(url)

    run_gateway(_settings(options), on_ready)
    return 0


def worker(options: argparse.Namespace) -> int:
    """Take up jobs until SIGTERM."""
    from outcrop.jobs.worker import run_worker

    _log_to_stderr()
    run_worker(_settings(options), name=options.name)
    return 0


def model_server(options: argparse.Namespace) -> int:
    """Serve one base model and its adapters until SIGTERM."""
    from outcrop.processes.ready import announce_ready
    from outcrop.serve.server import run_model_server

    _log_to_stderr()
    run_model_server(_settings(options), options.weights, options.socket, ready=announce_ready)
    return 0


def env(options: argparse.Namespace) -> int:
    """Print the variables for AWS clients; works before the service was ever started."""
    from outcrop.cli import env
    from outcrop.identity.bootstrap import load_or_make_credentials

    settings = _settings_and_data_dir(options)
    url = env.service_url(settings, options.port)
    variables = env.client_variables(url, load_or_make_credentials(settings), settings.region)
    if url.startswith("https:"):
        from outcrop.identity.certificates import make_tls_files

        variables |= env.tls_variables(make_tls_files(settings), bearer=options.bearer)
    if options.bearer:
        from outcrop.identity.api_keys import load_or_make_api_key

        variables |= env.bearer_variables(url, load_or_make_api_key(settings))
        if variables["AWS_BEARER_TOKEN_BEDROCK"] is None:
            print(f"outcrop: {env.PLAIN_HTTP}", file=sys.stderr)
    print(env.write_shell(variables, options.shell))
    return 0


def settings(options: argparse.Namespace) -> int:
    """Print every setting with its value and source."""
    described = describe_settings(overrides=_overrides(options))
    width = max(len(item.name) for item in described)
    values = max(len(item.value) for item in described)
    for item in described:
        print(f"{item.name:{width}}  {item.value:{values}}  {item.source}")
    return 0


def gc(options: argparse.Namespace) -> int:
    """List or remove ended jobs' files, unused artifacts, old logs and abandoned uploads."""
    from outcrop.cli.gc import collect_garbage

    total = 0
    for item in collect_garbage(_settings(options), remove=not options.dry_run):
        total += item.num_bytes
        print(f"{item.num_bytes:>14,}  {item.what}  ({item.reason})")
    verb = "would be freed" if options.dry_run else "freed"
    print(f"{total:>14,}  bytes {verb}")
    return 0


def cost(options: argparse.Namespace) -> int:
    """Print the ledger, or sums of it."""
    from outcrop.cli.cost_report import report

    print(report(_settings(options), options))
    return 0


def estimate(options: argparse.Namespace) -> int:
    """Print what a job will take and cost."""
    from outcrop.cli.estimate import estimate

    return estimate(_settings_and_data_dir(options), options)


def models(options: argparse.Namespace) -> int:
    """Show what the catalogue knows of a model, add a folder to it, or export a custom model."""
    from outcrop.models.catalog import load_catalog
    from outcrop.models.describe import add_model, describe_model

    settings = _settings(options)
    if options.verb == "add":
        base = add_model(
            settings,
            options.path,
            options.model_id,
            license=options.license,
            family=options.family,
            name=options.name,
            provider=options.provider,
        )
        print(f"{base.model_id} is offered from the next start of the service on.")
        return 0
    if options.verb == "export":
        from outcrop.cli.export import export_model

        place, manifest = export_model(
            settings, options.name, options.to, options.form, options.data_type
        )
        for row in manifest["files"]:
            print(f"{row['numBytes']:>14,}  {row['name']}  {row['sha256']}")
        print(f"written to {place}")
        return 0
    catalog = load_catalog(settings)
    name = getattr(options, "model", None)
    if name is None:
        width = max(len(base.model_id) for base in catalog.models)
        for base in catalog.models:
            print(f"{base.model_id:{width}}  {base.model_name}, {base.provider_name}")
        return 0
    found = catalog.resolve(name)
    if found is None:
        print(f"outcrop: there is no model {name}. `outcrop models` lists them.", file=sys.stderr)
        return 1
    print(json.dumps(describe_model(settings, found), indent=2, ensure_ascii=False))
    return 0


def data(options: argparse.Namespace) -> int:
    """Look at data files: check, stats, diff; and make others of them: clean, split, convert."""
    from outcrop.cli import data_check, data_clean, data_convert

    verbs = {
        "check": data_check.check,
        "stats": data_check.stats,
        "diff": data_check.diff,
        "clean": data_clean.clean,
        "undo": data_clean.undo,
        "split": data_clean.split,
        "convert": data_convert.convert,
    }
    return verbs[options.verb](_settings_and_data_dir(options), options)
