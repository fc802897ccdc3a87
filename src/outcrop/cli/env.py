"""The variables that point unmodified AWS and OpenAI clients at this service, in a shell's own
syntax."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from outcrop.identity.api_keys import ApiKey
from outcrop.identity.bootstrap import Credentials
from outcrop.processes.address import GATEWAY, reachable_url, read_address
from outcrop.settings import Settings

if TYPE_CHECKING:
    from outcrop.identity.certificates import TlsFiles

UNSET = (
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_BEARER_TOKEN_BEDROCK",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL_STS",
    "AWS_ENDPOINT_URL_BEDROCK",
    "AWS_ENDPOINT_URL_BEDROCK_RUNTIME",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
)
"""Variables that would win over ours: other credentials, and endpoints of single services."""

PLAIN_HTTP = (
    "AWS clients keep signing their requests, because botocore sends no API key over plain http. "
    "Start the service with `outcrop serve --tls` for that; OpenAI's clients use the key now."
)
Variables = dict[str, str | None]
"""Name to value; None means that the variable must not be set."""


def service_url(settings: Settings, port: int | None) -> str:
    """Return the service's URL: of the given port, else as it runs now, else as it is set."""
    running = read_address(settings.data_dir, GATEWAY)
    if running is not None and port in (None, urlsplit(running).port):
        return running
    wanted = settings.port if port is None else port
    return reachable_url(settings.host, wanted, tls=settings.tls)


def client_variables(url: str, credentials: Credentials, region: str) -> Variables:
    """Return what to set and what to unset so that an AWS client speaks to `url` and to nothing
    else.
    """
    host = urlsplit(url).hostname or "127.0.0.1"
    return {
        **dict.fromkeys(UNSET),
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": credentials.access_key_id,
        "AWS_SECRET_ACCESS_KEY": credentials.secret_access_key,
        "AWS_DEFAULT_REGION": region,
        "AWS_REGION": region,
        "NO_PROXY": host,
        "no_proxy": host,
    }


def tls_variables(files: TlsFiles, *, bearer: bool) -> Variables:
    """Return what has clients trust the service's certificate.

    AWS clients speak to this service alone. The variables of other programs hold for every address
    they speak to, so those get the public authorities too.

    Args:
        bearer: whether OpenAI's clients are to trust it.
    """
    variables: Variables = {"AWS_CA_BUNDLE": str(files.authority)}
    if bearer:
        variables |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(files.bundle))
    return variables


def bearer_variables(url: str, key: ApiKey) -> Variables:
    """Return what has clients send the API key; botocore's refuse to over plain http."""
    return {
        "AWS_BEARER_TOKEN_BEDROCK": key.key if url.startswith("https:") else None,
        "OPENAI_API_KEY": key.key,
        "OPENAI_BASE_URL": f"{url}/v1",
    }


def write_shell(variables: Variables, shell: str) -> str:
    """Return the lines that a shell evaluates; in JSON, null means unset.

    NO_PROXY is added to what is set already, except in JSON, which cannot say that.
    """
    if shell == "json":
        return json.dumps(variables, indent=2)
    return "\n".join(_line(name, value, shell) for name, value in variables.items())


def _line(name: str, value: str | None, shell: str) -> str:
    appended = name.lower() == "no_proxy"
    match shell:
        case "fish":
            if value is None:
                return f"set -e {name};"
            rest = f' "${name}"' if appended else ""
            joined = (
                f"(string join , {shlex.quote(value)}{rest})" if appended else shlex.quote(value)
            )
            return f"set -gx {name} {joined};"
        case "powershell":
            if value is None:
                return f"Remove-Item Env:{name} -ErrorAction SilentlyContinue"
            quoted = "'" + value.replace("'", "''") + "'"
            if appended:
                quoted = f"(@({quoted}, $Env:{name}) | Where-Object {{ $_ }}) -join ','"
            return f"$Env:{name} = {quoted}"
        case _:
            if value is None:
                return f"unset {name}"
            rest = f"${{{name}:+,${name}}}" if appended else ""
            return f"export {name}={shlex.quote(value)}{rest}"
