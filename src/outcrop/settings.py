"""What the operator sets: one frozen object, read once at the edge.

A setting comes from the command line, else from `OUTCROP_<NAME>` in the environment, else from a
TOML file (`OUTCROP_CONFIG`, else `outcrop.toml` in the data directory), else from its default.
Nothing else in Outcrop reads the environment. An unknown `OUTCROP_*` variable or key is refused:
a misspelt setting must not be ignored.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import platformdirs

from outcrop.errors import SettingsError

ENVIRONMENT_PREFIX = "OUTCROP_"
CONFIG_VARIABLE = "OUTCROP_CONFIG"
CONFIG_FILE = "outcrop.toml"
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False, "": False}


def _setting(
    help: str,
    default: Any = MISSING,
    *,
    secret: bool = False,
    minimum: int = 1,
    form: tuple[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """Declare a setting.

    Args:
        minimum: of a number.
        form: the pattern of a text, and what it says in words.
    """
    metadata = {"help": help, "secret": secret, "minimum": minimum, "form": form}
    if "default_factory" in kwargs:
        return field(default_factory=kwargs["default_factory"], repr=not secret, metadata=metadata)
    return field(default=default, repr=not secret, metadata=metadata)


def _default_data_dir() -> Path:
    return Path(platformdirs.user_data_dir("outcrop", appauthor=False))


@dataclass(frozen=True)
class Settings:
    """Every setting of the service; the help text of each is also its line in docs/settings.md."""

    data_dir: Path = _setting(
        "The one directory that holds everything: database, objects, models, logs.",
        default_factory=_default_data_dir,
    )
    host: str = _setting(
        "Address the gateway listens on.", "127.0.0.1", form=(r"\S+", "an address or a host's name")
    )
    port: int = _setting("Port the gateway listens on; 0 takes a free one.", 7070, minimum=0)
    tls: bool = _setting(
        "Whether the gateway speaks https, with a certificate of an authority that the first start "
        "makes. botocore sends API keys over https only.",
        False,
    )
    tls_names: str = _setting(
        "Further names and addresses of the gateway, separated by commas, for its certificate; "
        "localhost, host and this machine's name are in it.",
        "",
        form=(r"[A-Za-z0-9.:_,* -]*", "names and addresses, separated by commas"),
    )
    account: str = _setting(
        "Account id made at the first start, 12 digits.",
        "123456789012",
        form=(r"[0-9]{12}", "12 digits"),
    )
    region: str = _setting(
        "Region the service answers for.",
        "us-east-1",
        form=(r"[a-z0-9-]+", "lower-case letters, digits and hyphens"),
    )
    regions: str = _setting(
        "Further regions that the one endpoint answers for, separated by commas. Each has models, "
        "jobs and lists of its own; requests name theirs in their signature.",
        "",
        form=(r"([a-z0-9-]{1,20}( *, *[a-z0-9-]{1,20})*)?", "regions, separated by commas"),
    )
    database_url: str = _setting(
        "SQLAlchemy URL of the database; empty means SQLite in the data directory.", "", secret=True
    )
    s3_endpoint_url: str = _setting(
        "URL of an S3 of your own; empty means the embedded object store.",
        "",
        form=(r"(https?://[^\s/]\S*)?", "a URL that begins with http:// or https://"),
    )
    s3_access_key_id: str = _setting("Access key for your own S3.", "", secret=True)
    s3_secret_access_key: str = _setting("Secret key for your own S3.", "", secret=True)
    s3_region: str = _setting(
        "Region your own S3 signs with.", "us-east-1", form=(r"[^\s/]+", "a region's name")
    )
    job_slots: int = _setting(
        "Jobs that may run at once; 0 means as many as cores and memory carry (one on two cores).",
        0,
        minimum=0,
    )
    train_threads: int = _setting(
        "Threads of one training process; 0 means its share of the cores.", 0, minimum=0
    )
    train_device: str = _setting(
        "Where jobs train: auto takes a GPU if there is one; cpu, or cuda for a GPU.",
        "auto",
        form=(r"auto|cpu|cuda", "auto, cpu or cuda"),
    )
    checkpoint_seconds: int = _setting(
        "Least time between two checkpoints of a running job, from which it goes on after an "
        "interruption. Writing them takes a hundredth of its time at most.",
        30,
    )
    keep_checkpoint_days: int = _setting(
        "Days for which the last checkpoint of a stopped job is kept, to continue it or to make a "
        "model of it; 0 keeps none.",
        7,
        minimum=0,
    )
    serve_engine: str = _setting(
        "What answers: own is our engine; vllm needs the package vllm (`outcrop[vllm]`); auto "
        "takes vllm where it and a GPU are there.",
        "auto",
        form=(r"auto|own|vllm", "auto, own or vllm"),
    )
    vllm_max_rank: int = _setting(
        "Greatest rank of an adapter that vLLM holds, up to 512; wider ones are answered by our "
        "own engine. Each doubling doubles what an adapter's place takes of the GPU.",
        64,
    )
    vllm_memory_percent: int = _setting(
        "How much of the GPU's memory vLLM may fill, in percent, other programs' share included.",
        90,
    )
    serve_threads: int = _setting(
        "Threads of one model server; 0 means its share of the cores.", 0, minimum=0
    )
    serve_weights: str = _setting(
        "What a model server holds matrices in on a CPU: auto and bfloat16 keep them as they are "
        "published, int8 and int4 round them to 8 or 4 bits a number.",
        "auto",
        form=(r"auto|bfloat16|int8|int4", "auto, bfloat16, int8 or int4"),
    )
    model_idle_seconds: int = _setting(
        "A model server that answered nothing for so long is ended and its memory given back.", 900
    )
    model_start_seconds: int = _setting(
        "How long an invocation waits for its model server to start before "
        "ModelNotReadyException; 0 does not wait.",
        45,
        minimum=0,
    )
    invoke_timeout_seconds: int = _setting(
        "How long one invocation may take before ModelTimeoutException.", 300
    )
    max_training_records: int = _setting(
        "Records a training file may hold; 0 keeps the limit of the model's family.", 0, minimum=0
    )
    max_validation_records: int = _setting(
        "Records a validation file may hold; 0 keeps the limit of the model's family.",
        0,
        minimum=0,
    )
    invoke_custom_models: bool = _setting(
        "Whether a custom model answers by its own ARN or name, on demand, without a provisioned "
        "throughput; false refuses that as Bedrock does.",
        True,
    )
    max_provisioned_models: int = _setting(
        "Provisioned throughputs without commitment an account may hold; 0 allows none.",
        2,
        minimum=0,
    )
    max_model_deployments: int = _setting(
        "Custom model deployments an account may hold in a region; 0 allows none.", 100, minimum=0
    )
    max_inference_profiles: int = _setting(
        "Application inference profiles an account may hold in a region; 0 allows none.",
        1000,
        minimum=0,
    )
    max_model_units: int = _setting("Model units one provisioned throughput may have.", 1)
    machine_model_units: int = _setting(
        "Model units that the machine has, for provisioned throughputs of all accounts and models "
        "together; each is that part of its decode slots and of its rate in full batches.",
        2,
    )
    machine_tokens_per_second: int = _setting(
        "Rate of full batches, in tokens of answers a second, that model units are parts of; 0 has "
        "it measured for each model.",
        0,
        minimum=0,
    )
    throughput_burst_seconds: int = _setting(
        "A provisioned throughput that was idle for so long may have as many seconds' tokens of "
        "its rate at once.",
        30,
    )
    max_waiting_requests: int = _setting(
        "Requests on demand that may wait for one model server; a provisioned throughput has its "
        "part of as many places of its own.",
        256,
    )
    max_custom_models: int = _setting(
        "Custom models an account may hold in a region; 0 allows none.", 100, minimum=0
    )
    max_imported_models: int = _setting(
        "Imported models an account may hold in a region; 0 allows none.", 100, minimum=0
    )
    batch_slots: int = _setting(
        "Batch inference jobs that run at once; the others wait for their turn.", 2
    )
    min_batch_records: int = _setting(
        "Records that a batch inference job must have. Bedrock asks for 100.", 1
    )
    max_batch_records: int = _setting("Records that a batch inference job may have.", 100_000)
    max_batch_file_bytes: int = _setting(
        "Size that one input file of a batch inference job may have, in bytes.", 1 << 30
    )
    max_batch_bytes: int = _setting(
        "Size that all input files of a batch inference job may have together, in bytes.", 5 << 30
    )
    max_job_attempts: int = _setting(
        "Attempts after which a job whose process keeps dying is failed.", 5
    )
    max_body_bytes: int = _setting("Largest body of a Bedrock request, in bytes.", 25_000_000)
    invocation_log_seconds: int = _setting(
        "How long records of invocation logging are gathered before they are written to the "
        "owner's bucket as one object; 0 writes each at once.",
        10,
        minimum=0,
    )
    invocation_log_spool_bytes: int = _setting(
        "Bytes of records that may wait in the data directory for the object store; beyond that, "
        "records are dropped and counted.",
        268_435_456,
    )
    delivery_hours: int = _setting(
        "Hours after which an invocation log that its bucket does not take, or an event that its "
        "receiver does not take, is given up and counted.",
        24,
    )
    event_webhook_urls: str = _setting(
        "URLs that are sent the events of jobs, separated by commas.",
        "",
        form=(
            r"(https?://[^\s,/@]+[^\s,@]*(\s*,\s*https?://[^\s,/@]+[^\s,@]*)*)?",
            "URLs that begin with http:// or https://, without a user's name",
        ),
    )
    event_webhook_secret: str = _setting(
        "Secret with which events sent to webhooks are signed (HMAC-SHA256); empty signs none.",
        "",
        secret=True,
    )
    event_webhook_allow: str = _setting(
        "Webhooks that may be on this machine's loopback, on a link-local address or on a port of "
        "this service: host or host:port, separated by commas.",
        "",
        form=(r"[A-Za-z0-9.:_,\[\] -]*", "names and addresses, separated by commas"),
    )
    event_s3_uri: str = _setting(
        "Prefix s3://bucket/prefix below which each event of a job is written as an object.",
        "",
        form=(
            r"(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/\S*)?)?",
            "a URI such as s3://bucket/prefix",
        ),
    )
    price_book: str = _setting(
        "TOML file with the prices that the ledger and estimates use; empty means those published "
        "of Amazon Bedrock.",
        "",
    )
    billing_zone: str = _setting(
        "Time zone in which billing months begin, as the IANA database names it.",
        "UTC",
    )
    refuse_unfit_jobs: bool = _setting(
        "Whether a job that cannot fit into this machine's memory or disk is refused when it is "
        "created; false where workers run on other machines than the gateway.",
        True,
    )
    keep_log_bytes: int = _setting(
        "Size at which a process's log file is rotated, in bytes.", 10_000_000
    )
    keep_upload_days: int = _setting(
        "Days after which an abandoned multipart upload is removed from the embedded object "
        "store; in an S3 of your own its lifecycle rules do that.",
        7,
    )

    @property
    def all_regions(self) -> tuple[str, ...]:
        """The regions that requests may be signed for: `region` first, each once."""
        further = (name.strip() for name in self.regions.split(","))
        return tuple(dict.fromkeys((self.region, *filter(None, further))))

    @property
    def effective_database_url(self) -> str:
        """The URL to connect to: the setting, or the SQLite file in the data directory."""
        return self.database_url or f"sqlite:///{self.data_dir / 'outcrop.sqlite3'}"

    @property
    def billing_time_zone(self) -> tzinfo:
        """The zone of billing months.

        Raises:
            SettingsError: the system's time zone database has no such zone.
        """
        if self.billing_zone == "UTC":  # also where there is no such database
            return UTC
        try:
            return ZoneInfo(self.billing_zone)
        except (KeyError, ValueError, OSError) as error:  # unknown, or no name of a zone at all
            raise SettingsError(
                f"billing_zone is {self.billing_zone!r}, which the system's time zone database "
                "does not have. It must be a name such as UTC or Europe/Berlin."
            ) from error


@dataclass(frozen=True)
class Setting:
    """One setting's value and where it came from, as `outcrop settings` prints it."""

    name: str
    value: str
    source: str
    help: str


def setting_fields() -> tuple[Field[Any], ...]:
    """Return the declared settings in their order."""
    return fields(Settings)


def load_settings(
    environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Build the settings from overrides, environment, file and defaults, in that order.

    Args:
        environ: the environment to read; None means the process's own.
        overrides: values from the command line; those that are None are not set.
    Raises:
        SettingsError: a setting is unknown, or its value cannot be used; the message names it and
            its source.
    """
    settings, _ = _resolve(os.environ if environ is None else environ, overrides or {})
    return settings


def describe_settings(
    environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> list[Setting]:
    """Return every setting with its value and source; secrets are shown as `(set)`."""
    settings, sources = _resolve(os.environ if environ is None else environ, overrides or {})
    described = []
    for item in setting_fields():
        value = getattr(settings, item.name)
        shown = ("(set)" if value else "") if item.metadata["secret"] else str(value)
        described.append(Setting(item.name, shown, sources[item.name], item.metadata["help"]))
    return described


def _resolve(
    environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> tuple[Settings, dict[str, str]]:
    known = {item.name: item for item in setting_fields()}
    values: dict[str, Any] = {}
    sources = dict.fromkeys(known, "default")

    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name not in known:
            raise SettingsError(f"{variable} is not a setting. `outcrop settings` lists them all.")
        values[name] = _convert(known[name], text, variable)
        sources[name] = f"environment {variable}"
    for name, value in overrides.items():
        if value is not None:
            values[name] = _convert(known[name], value, f"--{name.replace('_', '-')}")
            sources[name] = "command line"

    file = _config_file(environ, values.get("data_dir"))
    if file is not None:
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"{file} cannot be read as TOML: {error}") from error
        for name, value in table.items():
            if name not in known:
                raise SettingsError(
                    f"{file}: {name} is not a setting. `outcrop settings` lists them all."
                )
            if name not in values:
                values[name] = _convert(known[name], value, f"{file}: {name}")
                sources[name] = f"file {file}"

    settings = Settings(**values)
    _check(settings)
    return settings, sources


def _config_file(environ: Mapping[str, str], data_dir: Path | None) -> Path | None:
    named = environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named)
    beside = (data_dir or _default_data_dir()) / CONFIG_FILE
    return beside if beside.exists() else None


def _convert(item: Field[Any], value: object, origin: str) -> Any:
    kind = {"int": int, "str": str, "bool": bool, "Path": Path}[str(item.type)]
    text = str(value)
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise SettingsError(f"{origin} must be true or false, not {value!r}.")
        return _BOOLEANS[text.lower()]
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise SettingsError(f"{origin} must be a whole number, not {value!r}.") from None
    if kind is Path:
        if not text:
            raise SettingsError(f"{origin} is empty; it must name a directory.")
        try:
            return Path(text).expanduser().absolute()
        except RuntimeError:  # the home of a user who is not there
            raise SettingsError(f"{origin} is {text!r}, whose home is not known.") from None
    return text


def _check(settings: Settings) -> None:
    if not 0 <= settings.port <= 65535:
        raise SettingsError(f"port must be between 0 and 65535, not {settings.port}.")
    for item in setting_fields():
        value = getattr(settings, item.name)
        minimum, form = item.metadata["minimum"], item.metadata["form"]
        if isinstance(value, int) and not isinstance(value, bool) and value < minimum:
            raise SettingsError(f"{item.name} must be at least {minimum}, not {value}.")
        if form is not None and not re.fullmatch(form[0], value):
            raise SettingsError(f"{item.name} must be {form[1]}, not {value!r}.")
    for url in settings.event_webhook_urls.split(","):
        try:
            _ = urlsplit(url.strip()).port
        except ValueError as error:
            raise SettingsError(f"event_webhook_urls: {error}.") from None
    _ = settings.billing_time_zone
    for name, most in (("vllm_max_rank", 512), ("vllm_memory_percent", 100)):
        if getattr(settings, name) > most:
            raise SettingsError(f"{name} is {getattr(settings, name)}; {most} is the most.")
    if settings.s3_endpoint_url and not (
        settings.s3_access_key_id and settings.s3_secret_access_key
    ):
        raise SettingsError(
            "s3_endpoint_url is set, so s3_access_key_id and s3_secret_access_key must be set too."
        )


def child_environment(
    settings: Settings, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment for a process of ours that is to see exactly these settings.

    Whatever came from the command line or a file is set as `OUTCROP_*`, so that the child needs
    neither.
    """
    inherited = os.environ if environ is None else environ
    child = {
        name: text for name, text in inherited.items() if not name.startswith(ENVIRONMENT_PREFIX)
    }
    for item in setting_fields():
        child[ENVIRONMENT_PREFIX + item.name.upper()] = str(getattr(settings, item.name))
    return child
