"""The printed variables point a client here and nowhere else, in every shell."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from outcrop.cli import main
from outcrop.cli.env import (
    UNSET,
    bearer_variables,
    client_variables,
    service_url,
    tls_variables,
    write_shell,
)
from outcrop.identity.api_keys import ApiKey, load_or_make_api_key
from outcrop.identity.bootstrap import Credentials
from outcrop.identity.certificates import TlsFiles
from outcrop.processes.address import clear_address, write_address
from outcrop.settings import Settings

CREDENTIALS = Credentials("123456789012", "owner", "AKIAEXAMPLE", "se'cr$et/+ x")
KEY = ApiKey("123456789012", "owner", "id", "ABSK+/=")
VARIABLES = client_variables("http://127.0.0.1:7070", CREDENTIALS, "us-east-1")


def _after_sh(before: str) -> dict[str, str]:
    script = f"{before}\n{write_shell(VARIABLES, 'sh')}\nenv -0"
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True, env={})
    pairs = (item.split("=", 1) for item in done.stdout.decode().split("\0") if "=" in item)
    return dict(pairs)


def test_sh_gets_endpoint_credentials_and_region_to_the_letter() -> None:
    environment = _after_sh("")
    assert environment["AWS_ENDPOINT_URL"] == "http://127.0.0.1:7070"
    assert environment["AWS_ACCESS_KEY_ID"] == "AKIAEXAMPLE"
    assert environment["AWS_SECRET_ACCESS_KEY"] == "se'cr$et/+ x"
    assert environment["AWS_DEFAULT_REGION"] == "us-east-1"


def test_no_other_credentials_are_left() -> None:
    # Source: botocore's names of the session token and of the profile, the older ones included.
    tokens = {"AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_BEARER_TOKEN_BEDROCK"}
    assert tokens | {"AWS_PROFILE", "AWS_DEFAULT_PROFILE"} <= set(UNSET)


@pytest.mark.parametrize("name", UNSET)
def test_what_would_win_over_it_is_unset(name: str) -> None:
    assert name not in _after_sh(f"export {name}=other")


def test_the_host_is_added_to_the_hosts_without_a_proxy() -> None:
    assert _after_sh("")["NO_PROXY"] == "127.0.0.1"
    assert _after_sh("export NO_PROXY=example.com")["NO_PROXY"] == "127.0.0.1,example.com"


def test_json_has_null_for_what_must_not_be_set() -> None:
    shown = json.loads(write_shell(VARIABLES, "json"))
    assert shown["AWS_SECRET_ACCESS_KEY"] == "se'cr$et/+ x"
    assert [name for name, value in shown.items() if value is None] == list(UNSET)


def test_powershell_doubles_the_quote_and_removes_by_name() -> None:
    lines = write_shell(VARIABLES, "powershell").splitlines()
    assert "$Env:AWS_SECRET_ACCESS_KEY = 'se''cr$et/+ x'" in lines
    assert "Remove-Item Env:AWS_PROFILE -ErrorAction SilentlyContinue" in lines
    assert (
        "$Env:NO_PROXY = (@('127.0.0.1', $Env:NO_PROXY) | Where-Object { $_ }) -join ','" in lines
    )


def test_fish_sets_global_exported_variables() -> None:
    lines = write_shell(VARIABLES, "fish").splitlines()
    assert "set -gx AWS_ACCESS_KEY_ID AKIAEXAMPLE;" in lines
    assert "set -e AWS_PROFILE;" in lines


def test_the_running_service_wins_over_the_default_port(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    assert service_url(settings, None) == "http://127.0.0.1:7070"
    write_address(data_dir, "gateway", "http://127.0.0.1:41234", os.getpid())
    assert service_url(settings, None) == "http://127.0.0.1:41234"
    assert service_url(settings, 5) == "http://127.0.0.1:5"
    clear_address(data_dir, "gateway")
    assert service_url(settings, None) == "http://127.0.0.1:7070"


def test_the_address_of_a_killed_service_is_not_taken_for_a_running_one(data_dir: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    write_address(data_dir, "gateway", "http://127.0.0.1:41234", ended.pid)
    assert service_url(Settings(data_dir=data_dir), None) == "http://127.0.0.1:7070"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:7070"),
        ("::", "http://[::1]:7070"),
        ("::1", "http://[::1]:7070"),
        ("192.0.2.7", "http://192.0.2.7:7070"),
        ("localhost", "http://localhost:7070"),
    ],
)
def test_the_url_is_one_that_this_machine_reaches(data_dir: Path, host: str, url: str) -> None:
    assert service_url(Settings(data_dir=data_dir, host=host), None) == url


def test_over_https_the_api_key_is_for_every_client() -> None:
    assert bearer_variables("https://127.0.0.1:7070", KEY) == {
        "AWS_BEARER_TOKEN_BEDROCK": "ABSK+/=",
        "OPENAI_API_KEY": "ABSK+/=",
        "OPENAI_BASE_URL": "https://127.0.0.1:7070/v1",
    }


def test_over_plain_http_the_api_key_is_for_openais_clients_only() -> None:
    # botocore fails with the variable set, because it sends no key over plain http.
    found = bearer_variables("http://127.0.0.1:7070", KEY)
    assert found["AWS_BEARER_TOKEN_BEDROCK"] is None
    assert found["OPENAI_API_KEY"] == "ABSK+/="


def test_the_authority_is_for_aws_clients_and_the_bundle_for_all_others() -> None:
    files = TlsFiles(Path("server.pem"), Path("ca.crt"), Path("bundle.pem"))
    assert tls_variables(files, bearer=False) == {"AWS_CA_BUNDLE": "ca.crt"}
    assert tls_variables(files, bearer=True) == {
        "AWS_CA_BUNDLE": "ca.crt",
        "SSL_CERT_FILE": "bundle.pem",
        "REQUESTS_CA_BUNDLE": "bundle.pem",
    }


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str | None]:
    assert main(["env", "--shell", "json", *arguments]) == 0
    found: dict[str, str | None] = json.loads(capsys.readouterr().out)
    return found


def test_env_works_before_the_service_was_ever_started(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("--data-dir", str(data_dir))
    key = load_or_make_api_key(Settings(data_dir=data_dir)).key
    plain = _printed(capsys, *place)
    assert plain["AWS_ENDPOINT_URL"] == "http://127.0.0.1:7070"
    assert "OPENAI_API_KEY" not in plain
    assert "AWS_CA_BUNDLE" not in plain
    safe = _printed(capsys, *place, "--tls", "--bearer")
    assert safe["AWS_ENDPOINT_URL"] == "https://127.0.0.1:7070"
    assert safe["AWS_BEARER_TOKEN_BEDROCK"] == safe["OPENAI_API_KEY"] == key
    assert safe["OPENAI_BASE_URL"] == "https://127.0.0.1:7070/v1"
    for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        path = safe[name]
        assert path is not None
        assert Path(path).exists()


def test_env_says_why_aws_clients_do_not_get_the_key_over_plain_http(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["env", "--bearer", "--data-dir", str(data_dir)]) == 0
    printed = capsys.readouterr()
    assert "unset AWS_BEARER_TOKEN_BEDROCK" in printed.out
    assert "export OPENAI_API_KEY=ABSK" in printed.out
    assert "outcrop serve --tls" in printed.err


def test_a_running_service_says_itself_whether_it_speaks_https(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    write_address(data_dir, "gateway", "https://127.0.0.1:41234", os.getpid())
    assert service_url(settings, None) == "https://127.0.0.1:41234"
    assert service_url(settings, 41234) == "https://127.0.0.1:41234"
    assert service_url(settings, 5) == "http://127.0.0.1:5"
