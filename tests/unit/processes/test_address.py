"""Addresses of running parts, and what is left of those that ended."""

from __future__ import annotations

import os
from pathlib import Path

from outcrop.processes.address import (
    address_file,
    clear_address,
    last_port,
    reachable_url,
    read_address,
    write_address,
)

NOBODY = 2**22 + 1
"""More than the greatest process id that Linux gives."""


def test_an_address_holds_as_long_as_its_process_lives(data_dir: Path) -> None:
    write_address(data_dir, "gateway", "http://127.0.0.1:7070", os.getpid())
    assert read_address(data_dir, "gateway") == "http://127.0.0.1:7070"
    write_address(data_dir, "gateway", "http://127.0.0.1:7070", NOBODY)
    assert read_address(data_dir, "gateway") is None
    assert address_file(data_dir, "gateway").stat().st_mode & 0o777 == 0o600


def test_the_port_is_known_after_the_process_has_ended(data_dir: Path) -> None:
    assert last_port(data_dir, "gateway") == 0
    write_address(data_dir, "gateway", "http://[::1]:40861", NOBODY)
    assert last_port(data_dir, "gateway") == 40861
    clear_address(data_dir, "gateway")
    assert last_port(data_dir, "gateway") == 0
    clear_address(data_dir, "gateway")


def test_a_damaged_file_is_no_address(data_dir: Path) -> None:
    write_address(data_dir, "gateway", "http://127.0.0.1:7070", os.getpid())
    address_file(data_dir, "gateway").write_text("{", encoding="utf-8")
    assert read_address(data_dir, "gateway") is None
    assert last_port(data_dir, "gateway") == 0


def test_who_listens_everywhere_is_reached_on_this_machine() -> None:
    assert reachable_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert reachable_url("::", 1) == "http://[::1]:1"
    assert reachable_url("db.example", 1) == "http://db.example:1"
