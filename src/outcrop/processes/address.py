"""Where a running part of the service can be reached, also by processes that did not start it.

One small file a part in `<data_dir>/run/`, with the process id beside the URL, so that a file
left behind by a killed process is not taken for a running one.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

GATEWAY = "gateway"
"""The part that clients talk to."""

_THIS_MACHINE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Who listens everywhere is reached here."""


def reachable_url(host: str, port: int, *, tls: bool = False) -> str:
    """Return the URL at which this machine reaches a listener on `host`, an address or a name."""
    host = _THIS_MACHINE.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def address_file(data_dir: Path, part: str) -> Path:
    """Return where the address of `part` is kept."""
    return data_dir / "run" / f"{part}.json"


def write_address(data_dir: Path, part: str, url: str, pid: int) -> None:
    """Say that `part` answers at `url` as long as process `pid` lives."""
    file = address_file(data_dir, part)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps({"url": url, "pid": pid}), encoding="utf-8")
    new.chmod(0o600)
    new.replace(file)


def read_address(data_dir: Path, part: str) -> str | None:
    """Return the URL of `part`, or None where it is not running."""
    try:
        found = json.loads(address_file(data_dir, part).read_text(encoding="utf-8"))
        os.kill(int(found["pid"]), 0)
        return str(found["url"])
    except (OSError, ValueError, KeyError):
        return None


def last_port(data_dir: Path, part: str) -> int:
    """Return the port that `part` had last, whether it still runs or not; 0 where none is known."""
    try:
        found = json.loads(address_file(data_dir, part).read_text(encoding="utf-8"))
        return urlsplit(str(found["url"])).port or 0
    except (OSError, ValueError, KeyError):
        return 0


def clear_address(data_dir: Path, part: str) -> None:
    """Say that `part` has ended."""
    with contextlib.suppress(FileNotFoundError):
        address_file(data_dir, part).unlink()
