"""What goes wrong in a command is one line that says what to do, and never a traceback."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest

from outcrop.cli import EXIT_ERROR, commands, main, parser
from outcrop.settings import load_settings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTCROP_DATA_DIR", raising=False)


def error_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that fails and return its one line on standard error."""
    assert main([str(argument) for argument in arguments]) == EXIT_ERROR
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("outcrop:")]
    assert "Traceback" not in err
    assert out == ""
    return line


@pytest.mark.parametrize("command", ["serve", "env"])
def test_a_data_directory_that_cannot_be_made(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = error_line(capsys, command, "--data-dir", tmp_path / "file")
    assert str(tmp_path / "file") in line
    assert "--data-dir" in line


@pytest.mark.parametrize("command", ["worker", "gc"])
def test_a_database_that_cannot_be_opened(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, command, "--data-dir", tmp_path / "absent")
    assert "unable to open database file" in line
    assert "database_url" in line


def test_a_file_of_the_system_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lock").mkdir()
    line = error_line(capsys, "serve", "--data-dir", tmp_path)
    assert line == f"outcrop: {tmp_path / 'lock'}: Is a directory"


def test_a_port_in_use(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        line = error_line(capsys, "gateway", "--port", port, "--data-dir", data_dir)
    assert line == f"outcrop: port {port} is in use; choose another with --port."


def test_a_host_that_is_not_of_this_machine(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # TEST-NET-1 of RFC 5737: nobody's.
    line = error_line(
        *(capsys, "gateway", "--host", "192.0.2.1", "--port", "0"), "--data-dir", data_dir
    )
    assert "192.0.2.1 cannot be listened on" in line
    assert "--host" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "add", "X", "--as", "ID", "--license", "L", "--data-dir", "D"],
        ["models", "--data-dir", "D", "add", "X", "--as", "ID", "--license", "L"],
        ["models", "show", "--data-dir", "D"],
        ["models", "--data-dir", "D", "show"],
        ["models", "--data-dir", "other", "show", "--data-dir", "D"],
        ["gc", "--data-dir", "D"],
    ],
)
def test_the_data_directory_may_be_given_to_a_command_and_to_its_verb(arguments: list[str]) -> None:
    assert parser().parse_args(arguments).data_dir == Path("D")


def test_without_a_data_directory_there_is_none() -> None:
    options: argparse.Namespace = parser().parse_args(["models", "show"])
    assert not hasattr(options, "data_dir")


@pytest.mark.parametrize("command", ["serve", "gateway", "env"])
def test_the_flag_turns_tls_on_and_without_it_the_setting_decides(command: str) -> None:
    given = commands._overrides(parser().parse_args([command, "--tls"]))
    absent = commands._overrides(parser().parse_args([command]))
    assert load_settings({}, given).tls
    assert not load_settings({}, absent).tls
    assert load_settings({"OUTCROP_TLS": "1"}, absent).tls
