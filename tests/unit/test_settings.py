"""Settings come from four places in a fixed order, and nothing unknown passes."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from outcrop.errors import SettingsError
from outcrop.settings import (
    Settings,
    child_environment,
    describe_settings,
    load_settings,
    setting_fields,
)


def test_defaults_stand_where_nothing_is_set(tmp_path: Path) -> None:
    settings = load_settings({}, {"data_dir": tmp_path})
    assert (settings.host, settings.port) == ("127.0.0.1", 7070)
    assert settings.effective_database_url == f"sqlite:///{tmp_path / 'outcrop.sqlite3'}"


def test_command_line_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    (tmp_path / "outcrop.toml").write_text('port = 1\nhost = "file"\nregion = "file-1"\n')
    environ = {"OUTCROP_PORT": "2", "OUTCROP_HOST": "environment"}
    overrides = {"data_dir": tmp_path, "port": 3}
    settings = load_settings(environ, overrides)
    assert (settings.port, settings.host, settings.region) == (3, "environment", "file-1")
    sources = {item.name: item.source for item in describe_settings(environ, overrides)}
    assert sources["port"] == "command line"
    assert sources["host"] == "environment OUTCROP_HOST"
    assert sources["region"] == f"file {tmp_path / 'outcrop.toml'}"
    assert sources["account"] == "default"


def test_named_config_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text("job_slots = 4\n")
    settings = load_settings({"OUTCROP_CONFIG": str(file)}, {"data_dir": tmp_path})
    assert settings.job_slots == 4


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"OUTCROP_PROT": "1"}, "OUTCROP_PROT is not a setting"),
        ({"OUTCROP_PORT": "many"}, "OUTCROP_PORT must be a whole number, not 'many'"),
        ({"OUTCROP_PORT": "70707"}, "port must be between 0 and 65535, not 70707"),
        ({"OUTCROP_ACCOUNT": "12"}, "account must be 12 digits, not '12'"),
        ({"OUTCROP_JOB_SLOTS": "-1"}, "job_slots must be at least 0, not -1"),
        ({"OUTCROP_MAX_JOB_ATTEMPTS": "0"}, "max_job_attempts must be at least 1, not 0"),
        ({"OUTCROP_MAX_BODY_BYTES": "0"}, "max_body_bytes must be at least 1, not 0"),
        ({"OUTCROP_INVOKE_TIMEOUT_SECONDS": "0"}, "invoke_timeout_seconds must be at least 1"),
        ({"OUTCROP_BILLING_ZONE": "Europe/Nowhere"}, "billing_zone is 'Europe/Nowhere'"),
        ({"OUTCROP_BILLING_ZONE": ""}, "billing_zone is ''"),
        ({"OUTCROP_BILLING_ZONE": "../passwd"}, "It must be a name such as UTC or Europe/Berlin"),
        ({"OUTCROP_KEEP_LOG_BYTES": "0"}, "keep_log_bytes must be at least 1, not 0"),
        ({"OUTCROP_KEEP_UPLOAD_DAYS": "0"}, "keep_upload_days must be at least 1, not 0"),
        ({"OUTCROP_ACCOUNT": "\uff11" * 12}, "account must be 12 digits"),
        ({"OUTCROP_REGION": ""}, "region must be lower-case letters, digits and hyphens, not ''"),
        ({"OUTCROP_REGION": "US East"}, "region must be lower-case letters"),
        ({"OUTCROP_HOST": ""}, "host must be an address or a host's name, not ''"),
        ({"OUTCROP_S3_ENDPOINT_URL": "s3:9000"}, "s3_endpoint_url must be a URL that begins with"),
        ({"OUTCROP_S3_REGION": ""}, "s3_region must be a region's name"),
        ({"OUTCROP_DATA_DIR": ""}, "OUTCROP_DATA_DIR is empty; it must name a directory"),
        ({"OUTCROP_DATA_DIR": "~no-such-user/x"}, "whose home is not known"),
        ({"OUTCROP_TLS": "maybe"}, "OUTCROP_TLS must be true or false, not 'maybe'"),
        ({"OUTCROP_TLS_NAMES": "a/b"}, "tls_names must be names and addresses"),
        ({"OUTCROP_S3_ENDPOINT_URL": "http://s3"}, "s3_access_key_id and s3_secret_access_key"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(environ: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load_settings(environ)


@pytest.mark.parametrize(
    ("text", "named"), [("prot = 1\n", "prot is not a setting"), ("port = ", "cannot be read")]
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "outcrop.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=named) as refused:
        load_settings({}, {"data_dir": tmp_path})
    assert str(file) in str(refused.value)


def test_secrets_are_neither_printed_nor_in_the_repr(tmp_path: Path) -> None:
    environ = {
        "OUTCROP_S3_ENDPOINT_URL": "http://s3",
        "OUTCROP_S3_ACCESS_KEY_ID": "key-canary",
        "OUTCROP_S3_SECRET_ACCESS_KEY": "secret-canary",
    }
    settings = load_settings(environ, {"data_dir": tmp_path})
    shown = repr(settings) + str(describe_settings(environ, {"data_dir": tmp_path}))
    assert "canary" not in shown
    assert settings.s3_secret_access_key == "secret-canary"


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_a_switch_is_on_or_off(tmp_path: Path, text: str, value: bool) -> None:
    assert load_settings({"OUTCROP_TLS": text}, {"data_dir": tmp_path}).tls is value
    (tmp_path / "outcrop.toml").write_text(f"tls = {str(value).lower()}\n")
    settings = load_settings({}, {"data_dir": tmp_path})
    assert settings.tls is value
    assert load_settings(child_environment(settings, {})) == settings


def test_a_child_process_sees_exactly_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "outcrop.toml").write_text("job_slots = 7\n")
    settings = load_settings({"OUTCROP_REGION": "eu-west-1"}, {"data_dir": tmp_path, "port": 0})
    environ = child_environment(settings, {"PATH": "/bin", "OUTCROP_PORT": "9"})
    assert environ["PATH"] == "/bin"
    assert load_settings(environ) == settings


def test_zero_is_allowed_where_it_has_a_meaning_and_the_help_text_says_which() -> None:
    numbers = [item for item in setting_fields() if item.type == "int"]
    allowed = {item.name for item in numbers if item.metadata["minimum"] == 0}
    assert allowed == {item.name for item in numbers if " 0 " in item.metadata["help"]}
    settings = load_settings({f"OUTCROP_{name.upper()}": "0" for name in allowed})
    assert settings.port == settings.max_custom_models == 0


def test_every_setting_has_a_help_text() -> None:
    assert all(item.metadata["help"].endswith(".") for item in setting_fields())
    assert len(setting_fields()) == len(Settings.__dataclass_fields__)


def test_billing_months_are_those_of_the_zone(tmp_path: Path) -> None:
    settings = load_settings({}, {"data_dir": tmp_path})
    assert settings.billing_time_zone is UTC
    berlin = load_settings({"OUTCROP_BILLING_ZONE": "Europe/Berlin"}, {"data_dir": tmp_path})
    assert berlin.billing_time_zone == ZoneInfo("Europe/Berlin")
