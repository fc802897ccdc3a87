"""`outcrop data clean`, `undo`, `split` and `convert`: exit codes, files, what is printed."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tests.assets.smollm2 import place_smollm2

from outcrop.cli import main
from outcrop.cli.data_making import DEFAULT_THRESHOLD, TARGETS
from outcrop.data import convert, near

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("na", "rek", "sol", "tim")]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTCROP_DATA_DIR", str(data_dir))


def prompts(number: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=30)) for _ in range(number)]


def write(path: Path, values: list[Any]) -> str:
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def pair(prompt: str, completion: str = " yes") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def records(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def test_clean_writes_beside_the_original_and_undo_gives_it_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = prompts(2)
    source = write(tmp_path / "a.jsonl", [pair(f"<b>{one}</b>"), pair(two), pair(two)])
    assert main(["data", "clean", source]) == 0
    printed = capsys.readouterr()
    assert "1  exact_duplicate" in printed.out
    assert printed.err == ""
    assert records("a.cleaned.jsonl") == [pair(one), pair(two)]
    log = "a.cleaned.log.jsonl"
    assert main(["data", "undo", "a.cleaned.jsonl", "--log", log, "--output", "b.jsonl"]) == 0
    assert Path("b.jsonl").read_bytes() == Path(source).read_bytes()
    assert main(["data", "undo", "a.cleaned.jsonl", "--log", log, "--output", source]) == 1
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "options", "code"),
    [
        ([pair("a"), pair("b")], ["--strict"], 0),
        ([pair("<p>a</p>"), pair("b")], [], 0),
        ([pair("<p>a</p>"), pair("b")], ["--strict"], 1),
        ([pair("a"), pair("a")], ["--strict"], 1),
        ([pair("a"), '{"cut'], [], 2),
        ([pair("a"), pair("", "b")], ["--strict"], 2),
    ],
)
def test_exit_codes_tell_clean_from_changed_from_unusable(
    tmp_path: Path, values: list[Any], options: list[str], code: int
) -> None:
    assert main(["data", "clean", write(tmp_path / "a.jsonl", values), *options]) == code
    assert Path("a.cleaned.jsonl").exists()


def test_json_has_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", [pair("<p>a</p>"), '{"cut', pair("b")])
    assert main(["data", "clean", source, "--json"]) == 2
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["numRecords"], found["numOutputRecords"]) == (3, 2)
    assert found["actions"] == {"repair": 1, "reject": 1}
    assert found["rejected"][0]["line"] == 2


def test_what_is_asked_for_is_done(tmp_path: Path) -> None:
    one = prompts(1)[0]
    values = [pair(one), pair(one), pair(one.upper()), pair("<p>x</p>\0")]
    source = write(tmp_path / "a.jsonl", values)
    for options, expected in (
        (["--keep-duplicates", "--repairs", "none"], values),
        (["--keep-near-duplicates", "--repairs", "none"], [values[0], *values[2:]]),
        (["--repairs", "null_byte"], [values[0], pair("<p>x</p>")]),
        (["--near-threshold", "1", "--repairs", "none"], [values[0], values[3]]),
    ):
        assert main(["data", "clean", source, "--force", *options]) == 0
        assert records("a.cleaned.jsonl") == expected
    assert main(["data", "clean", source, "--force", "--near-threshold", "0.2"]) == 1
    assert main(["data", "clean", source, "--force", "--repairs", "spelling"]) == 1


def test_several_files_go_into_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / name, [pair("a")]) for name in ("a.jsonl", "b.jsonl")]
    assert main(["data", "clean", *files, "--output", "both.jsonl"]) == 1
    assert "into a directory" in capsys.readouterr().err
    Path("out").mkdir()
    assert main(["data", "clean", *files, "--output", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("a.cleaned.jsonl", "a.cleaned.log.jsonl", "b.cleaned.jsonl", "b.cleaned.log.jsonl"),
    ]


def test_a_packed_file_stays_packed(tmp_path: Path) -> None:
    Path("a.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair("<p>a</p>")).encode()))
    assert main(["data", "clean", "a.jsonl.gz"]) == 0
    assert json.loads(gzip.decompress(Path("a.cleaned.jsonl.gz").read_bytes())) == pair("a")


@pytest.mark.parametrize("name", ["no.jsonl", ".", "s3://bucket", "s3://bucket/"])
@pytest.mark.parametrize("verb", ["clean", "split"])
def test_what_is_no_file_is_refused_in_one_line(
    name: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", verb, name]) == 1
    error = capsys.readouterr().err
    assert error.startswith("outcrop: ")
    assert error.count("\n") == 1


def test_split_writes_both_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", [pair(prompt) for prompt in prompts(50)])
    assert main(["data", "split", source, "--seed", "5", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["training"]["numRecords"] == 45
    parts = records("a.training.jsonl"), records("a.validation.jsonl")
    assert sorted(map(str, (*parts[0], *parts[1]))) == sorted(map(str, records(source)))
    assert main(["data", "split", source]) == 1
    assert "--force" in capsys.readouterr().err


def test_split_refuses_a_bad_line_with_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [pair("a"), {"x": 1}])
    assert main(["data", "split", source]) == 2
    assert "Line 2" in capsys.readouterr().err


def test_convert_takes_tables_folders_and_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("t.csv").write_text("q;a\nIs it?;Yes\n", encoding="utf-8")
    columns = ["--prompt-column", "q", "--completion-column", "a"]
    assert (
        main(
            ["data", "convert", "t.csv", "--to", "claude-messages", "--output", "t.jsonl", *columns]
        )
        == 0
    )
    assert records("t.jsonl")[0]["messages"][1] == {"role": "assistant", "content": "Yes"}
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.md").write_text("# A\n\ntext", encoding="utf-8")
    arguments = ["--to", "continued-pre-training", "--output", "d.jsonl"]
    assert main(["data", "convert", str(folder), *arguments]) == 0
    assert records("d.jsonl") == [{"input": "# A\n\ntext"}]
    call = {
        "schemaType": "ModelInvocationLog",
        "requestMetadata": {"team": "a"},
        "input": {"inputBodyJson": {"inputText": "Hi"}},
        "output": {"outputBodyJson": {"results": [{"outputText": "Hello"}]}},
    }
    log = write(tmp_path / "log.json", [call, {**call, "requestMetadata": {"team": "b"}}])
    arguments = ["--to", "prompt-completion", "--output", "l.jsonl", "--logs"]
    chosen = ["--filter", '{"equals": {"team": "b"}}']
    assert main(["data", "convert", log, *arguments, *chosen]) == 0
    assert records("l.jsonl") == [{"prompt": "Hi", "completion": "Hello"}]
    capsys.readouterr()
    for options, said in (
        (["t.csv", "--to", "conversation"], "--prompt-column"),
        ([str(folder), "--to", "conversation"], "A folder of texts becomes"),
        ([log, "--to", "conversation", "--filter", "{}"], "add --logs"),
        ([log, "--to", "conversation", "--logs", "--filter", "{"], "--filter is not JSON"),
    ):
        assert main(["data", "convert", *options, "--output", "x.jsonl"]) == 1
        assert said in capsys.readouterr().err
        assert not Path("x.jsonl").exists()


def test_convert_refuses_what_would_be_lost_or_leaves_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [pair("a"), {**pair("b"), "id": "1"}])
    arguments = ["data", "convert", source, "--to", "conversation", "--output", "b.jsonl"]
    assert main(arguments) == 2
    assert "line 2 cannot be converted" in capsys.readouterr().err
    assert main([*arguments, "--skip-refused", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["numRecords"], described["numRefused"]) == (1, 1)


def test_a_models_limit_holds_for_documents(tmp_path: Path, data_dir: Path) -> None:
    place_smollm2(data_dir)
    text = " ".join(f"This is sentence number {place}." for place in range(1200))
    source = write(tmp_path / "a.jsonl", [{"input": text}])
    options = ["--for", "amazon.titan-text-lite-v1", "--type", "CONTINUED_PRE_TRAINING"]
    assert main(["data", "clean", source, *options]) == 0
    pieces = [record["input"] for record in records("a.cleaned.jsonl")]
    assert len(pieces) > 1
    assert " ".join(pieces) == text


def test_the_parser_says_what_the_library_does() -> None:
    assert near.DEFAULT_THRESHOLD == DEFAULT_THRESHOLD
    assert set(TARGETS) == set(convert.TARGETS)


# -- objects


class Bucket(BaseHTTPRequestHandler):
    """An S3 with one object, which may change or go away after it was looked at."""

    content = b""
    after_head = "same"

    def do_HEAD(self) -> None:
        self._answer(200, self.content, '"one"')

    def do_GET(self) -> None:
        if self.after_head == "gone":
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>")
        elif self.after_head == "changed" and self.headers["If-Match"] == '"one"':
            self._answer(412, b"<Error><Code>PreconditionFailed</Code><Message>x</Message></Error>")
        else:
            cut = len(self.content) // 2 if self.after_head == "broken" else None
            self._answer(200, self.content, '"one"', cut)

    def _answer(self, status: int, body: bytes, etag: str = "", cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    handler = type("OneBucket", (Bucket,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        yield handler
        server.shutdown()
        thread.join()


def test_an_object_is_cleaned_into_a_file_here(bucket: type[Bucket]) -> None:
    bucket.content = f"{json.dumps(pair('<p>a</p>'))}\n".encode() * 2
    assert main(["data", "clean", "s3://data/set/train.jsonl"]) == 0
    assert records("train.cleaned.jsonl") == [pair("a")]


@pytest.mark.parametrize(
    ("happens", "said"),
    [("gone", "gone"), ("changed", "changed while it was read"), ("broken", "broke off")],
)
def test_an_object_that_goes_changes_or_breaks_off_leaves_no_output(
    bucket: type[Bucket], happens: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.content = f"{json.dumps(pair('a'))}\n".encode() * 1000
    bucket.after_head = happens
    assert main(["data", "clean", "s3://data/train.jsonl"]) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["data"]
