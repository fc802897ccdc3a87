"""`outcrop data check`, `stats` and `diff`: exit codes, reports, and errors that say what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.assets import tiny_tokenizer as tiny
from tests.assets.tiny_model import write_tiny_model

from outcrop.cli import EXIT_ERROR, main
from outcrop.cli.data_check import CLEAN, REJECTED, WARNINGS, measured_speed, progress_bar
from outcrop.cli.data_making import TYPES
from outcrop.data.formats import DATA_KINDS
from outcrop.data.report import SCHEMA
from outcrop.models.catalog import load_catalog
from outcrop.models.describe import add_model
from outcrop.settings import Settings

MODEL_ID = "mylab.tiny-v1:0"
NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hans", "ida", "jonas")
GOOD = [
    {"prompt": f"Where does {name} live?", "completion": f" In house {3 * place}."}
    for place, name in enumerate(NAMES)
]

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with a model of two layers."""
    folder = write_tiny_model(tmp_path / "model", vocab_size=400)
    tiny.write_tokenizer(folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, eos="<|im_end|>")
    path = tmp_path / "data"
    path.mkdir()
    add_model(Settings(data_dir=path), folder, MODEL_ID, license="mit", family="titan-text")
    monkeypatch.setenv("OUTCROP_DATA_DIR", str(path))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, *records: Any, raw: bytes = b"") -> Path:
        path = tmp_path / name
        content = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        path.write_bytes(content + raw)
        return path

    return make


def run(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def output(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out


def test_clean_data_exit_with_0_and_say_so(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    train, validation = write("train.jsonl", *GOOD[:8]), write("validation.jsonl", *GOOD[8:])
    code = run("check", train, "--validation", validation, "--for", MODEL_ID, "--strict")
    text = output(capsys)
    assert code == CLEAN, text
    assert f"{train} (training): 8 records, 8 usable, prompt-completion" in text
    assert "tokens: " in text
    assert "clean in " in text


def test_what_is_worth_a_look_is_an_error_only_where_that_is_asked_for(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write("train.jsonl", *GOOD, GOOD[0])
    assert run("check", train, "--for", MODEL_ID) == CLEAN
    assert f"{train}:11: drop exact_duplicate" in output(capsys)
    assert run("check", train, "--for", MODEL_ID, "--strict") == WARNINGS


def test_data_that_a_job_would_refuse_exit_with_2_and_name_the_line(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write("train.jsonl", *GOOD, raw=b'{"prompt": 7, "completion": "x"}\nnot json\n')
    original = train.read_bytes()
    assert run("check", train, "--for", MODEL_ID) == REJECTED
    text = output(capsys)
    assert f"{train}:11: reject wrong_type" in text
    assert f"{train}:12: reject invalid_json" in text
    assert train.read_bytes() == original


def test_the_report_is_written_for_programs_and_people_and_printed_as_json(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write("train.jsonl", *GOOD, raw=b"not json\n")
    folder = tmp_path / "report"
    assert run("check", train, "--for", MODEL_ID, "--report", folder, "--json") == REJECTED
    printed = json.loads(output(capsys))
    assert printed == json.loads((folder / "report.json").read_bytes())
    assert (printed["schema"], printed["verdict"]) == (SCHEMA, "rejected")
    assert printed["rejection"].startswith(f"Unable to parse Amazon S3 file: {train}.")
    assert b"not_json" not in (folder / "report.html").read_bytes()
    assert b"Unable to parse" in (folder / "report.html").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.html"}


def test_leaks_into_a_test_file_are_found(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = write("train.jsonl", *GOOD), write("test.jsonl", GOOD[3])
    assert run("check", train, "--test", test, "--strict") == WARNINGS
    assert f"{train}:4: drop test_leak" in output(capsys)


def test_a_wrong_model_is_refused_with_those_that_are_like_it(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write("train.jsonl", *GOOD)
    assert run("check", train, "--for", "amazon.titan-text-lite-v2") == EXIT_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert "--for amazon.titan-text-lite-v2: there is no such model" in err
    assert "amazon.titan-text-lite-v1" in err
    assert run("check", train, "--for", "zzzzzzzz") == EXIT_ERROR
    assert "Did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--batch-size", "9999"), "batchSize is '9999'; it must be a whole number from 1 to 64"),
        (("--batch-size", "0"), "batchSize is '0'"),
    ],
)
def test_a_batch_size_that_a_job_would_refuse_is_refused(
    write: Write, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert run("check", write("train.jsonl", *GOOD), "--for", MODEL_ID, *arguments) == EXIT_ERROR
    assert says in capsys.readouterr().err


def test_a_type_that_the_model_does_not_offer_is_refused(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write("train.jsonl", {"input": "Some raw text."})
    model = ("--for", "cohere.command-text-v14", "--type", "CONTINUED_PRE_TRAINING")
    assert run("check", train, *model) == EXIT_ERROR
    assert "does not support CONTINUED_PRE_TRAINING" in capsys.readouterr().err


def test_a_directory_and_a_file_that_is_not_there_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, says in ((tmp_path, "is a directory"), (tmp_path / "no", "cannot be read")):
        assert run("check", name) == REJECTED
        assert says in output(capsys)
    assert run("check", "s3://bucket/folder/") == EXIT_ERROR
    assert "names no object" in capsys.readouterr().err


def test_stats_are_figures_without_defects(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write("train.jsonl", *GOOD, GOOD[0], raw=b"not json\n")
    assert run("stats", train, "--for", MODEL_ID) == 0
    text = output(capsys)
    assert "12 records, 11 usable" in text
    assert "exact_duplicate" not in text
    assert run("stats", train, "--for", MODEL_ID, "--json") == 0
    figures = json.loads(output(capsys))
    assert figures["tokens"]["perEpoch"] > 0
    assert "defects" not in figures


def test_diff_lists_what_was_added_removed_and_changed(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write("old.jsonl", *GOOD[:4])
    changed = {**GOOD[0], "completion": " Nowhere."}
    new = write("new.jsonl", changed, *GOOD[2:5])
    assert run("diff", old, new) == 1
    text = output(capsys)
    for part in (f"- {old}:2", f"+ {new}:4", f"~ {old}:1 -> {new}:1"):
        assert part in text
    assert "1 added, 1 removed, 1 changed, 2 unchanged" in text
    assert run("diff", old, new, "--json") == 1
    assert json.loads(output(capsys))["changed"] == [{"old": 1, "new": 1}]
    assert run("diff", old, old) == 0


def test_every_type_of_data_can_be_named() -> None:
    assert set(TYPES) == set(DATA_KINDS)


def test_without_a_database_no_speed_is_known(data_directory: Path) -> None:
    settings = Settings(data_dir=data_directory)
    base = load_catalog(settings).resolve(MODEL_ID)
    assert base is not None
    assert measured_speed(settings, base, "adapter") is None


def test_a_bar_is_drawn_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar([100]) as nothing:
        assert nothing is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cases: list[tuple[list[int | None], str]] = [([100], "100%"), ([100, None], "MB/s")]
    for sizes, expected in cases:
        with progress_bar(sizes) as show:
            assert show is not None
            show(100)
        err = capsys.readouterr().err
        assert expected in err
        assert err.endswith("\r\x1b[K"), "the line is empty afterwards"
