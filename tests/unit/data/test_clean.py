"""Cleaning a file: what becomes of each line, that nothing else changes, and the way back."""

from __future__ import annotations

import gzip
import io
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from benchmarks.data_clean import measure
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.assets.smollm2 import smollm2_folder

from outcrop.data.check import check_files
from outcrop.data.clean import Cleaned, Cleaning, Model, clean_file
from outcrop.data.clean_log import read_log, undo
from outcrop.data.defects import Severity
from outcrop.data.facts import TEST, VALIDATION, DataFile
from outcrop.data.formats import formats_for
from outcrop.data.html import find_html
from outcrop.data.output import write_whole
from outcrop.data.render import Renderer
from outcrop.data.sources import local_file
from outcrop.errors import DataError
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, FINE_TUNING, shipped_models

ANY = formats_for(None, FINE_TUNING)
WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("na", "rek", "sol", "tim")]


def pair(prompt: str, completion: str = " yes", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def prompts(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=30)) for _ in range(number)]


def clean(
    tmp_path: Path,
    content: bytes,
    cleaning: Cleaning | None = None,
    formats: Sequence[str] = ANY,
    **options: Any,
) -> tuple[Cleaned, list[bytes], list[dict[str, Any]]]:
    """Clean some content, prove that the way back is exact, and return what came out."""
    source = tmp_path / "train.jsonl"
    source.write_bytes(content)
    target, log = tmp_path / "cleaned.jsonl", tmp_path / "cleaned.log.jsonl"
    options.setdefault("force", True)
    found = clean_file(local_file(source), target, log, cleaning or Cleaning(), formats, **options)
    assert source.read_bytes() == content
    restored = tmp_path / "restored.jsonl"
    with target.open("rb") as stream:
        undo(stream, log, restored)
    assert restored.read_bytes() == content
    restored.unlink()
    raw = target.read_bytes()
    lines = (gzip.decompress(raw) if options.get("packed") else raw).splitlines(keepends=True)
    return found, [each.removesuffix(b"\n") for each in lines], read_log(log)[1]


def test_a_line_that_needs_nothing_is_copied_to_the_byte(tmp_path: Path) -> None:
    odd = [
        b'{"completion":"  1.50 \\u00e9", "prompt" : "a"}'.replace(b"  1", b" 1").replace(
            b" \\", b"\\"
        ),
        b'{"prompt": "b", "prompt": "second", "completion": " x"}',
        b'{ "prompt": "c\\nd", "completion": " <int> & 5 < 6" } ',
    ]
    found, lines, log = clean(tmp_path, b"\n".join(odd) + b"\n")
    assert lines == odd
    assert log == []
    assert found.is_unchanged
    assert not found.actions


def test_every_line_that_was_changed_or_left_out_is_in_the_log_with_its_reason(
    tmp_path: Path,
) -> None:
    one, two, three = prompts(3)
    content = b"\n".join(
        [
            b"\xef\xbb\xbf" + line(pair(one)),  # 1
            line(pair(f"<p>{two}</p>")) + b"\r",  # 2
            b"",  # 3
            line({"completion": " yes", "prompt": one}),  # 4: the first again
            line(pair(three, id=7)),  # 5
            line(pair(three.upper())),  # 6: nearly the fifth
            b'{"prompt": "cut',  # 7
            line(pair("a", "")),  # 8
            b'{"prompt": "\xfc", "completion": "x"}',  # 9
            line(pair(two, " no")),  # 10: another answer is no duplicate
        ]
    )
    found, lines, log = clean(tmp_path, content)
    values = [json.loads(each) for each in lines]
    assert values == [pair(one), pair(two), pair(three), pair(two, " no")]
    reasons = {
        entry["line"]: (entry["action"], [change["code"] for change in entry["changes"]])
        for entry in log
    }
    assert reasons == {
        1: ("repair", ["bom"]),
        2: ("repair", ["crlf", "html"]),
        3: ("skip", ["blank_line"]),
        4: ("drop", ["exact_duplicate"]),
        5: ("repair", ["extra_keys"]),
        6: ("drop", ["near_duplicate"]),
        7: ("reject", ["invalid_json"]),
        8: ("reject", ["empty_completion"]),
        9: ("reject", ["invalid_utf8"]),
    }
    twins = {entry["line"]: entry["twin"]["line"] for entry in log if "twin" in entry}
    assert twins == {4: 1, 6: 5}
    assert found.actions == {"repair": 3, "skip": 1, "drop": 2, "reject": 3}
    assert found.counts["near_duplicate"] == 1
    assert (found.num_lines, found.num_records, found.num_output_records) == (10, 9, 4)
    assert [defect.place.line for defect in found.rejected] == [7, 8, 9]


def test_each_change_says_where_and_what(tmp_path: Path) -> None:
    value = {
        "schemaVersion": "bedrock-conversation-2024",
        "system": [{"text": "Be\u200b brief"}],
        "messages": [
            {"role": "user", "content": [{"text": "a"}, {"text": "The cafÃ© <b>is</b> open"}]},
            {"role": "assistant", "content": [{"text": "Yes"}]},
        ],
    }
    _, lines, log = clean(tmp_path, line(value))
    said = json.loads(lines[0])
    assert said["system"] == [{"text": "Be brief"}]
    assert said["messages"][0]["content"][1] == {"text": "The café is open"}
    changes = {change["code"]: change for change in log[0]["changes"]}
    assert changes["control_characters"]["where"] == "system[0].text"
    assert changes["mojibake"]["where"] == "messages[0].content[1].text"
    assert "cafÃ©" in changes["mojibake"]["before"]
    assert "café" in changes["mojibake"]["after"]


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"\n\n", b"\n  "])
def test_the_original_comes_back_however_it_ended(tmp_path: Path, ending: bytes) -> None:
    one, two = prompts(2)
    content = line(pair(one)) + b"\n" + line(pair(f"<b>{two}</b>")) + ending
    clean(tmp_path, content)  # proves it


LINES = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from(
            [
                *(b"", b"  ", b"{}", b'{"input": "x"}', b"\xef\xbb\xbf", b"null", b'"\\ud800"'),
                line(pair("a")),
                line(pair("a")) + b"\r",
                line(pair("<p>a</p>")),
                line(pair("a\0")),
                b'{"prompt": "\\ud83d", "completion": "b"}',
                line({"completion": " yes", "prompt": "a"}),
                line(pair("A!", " YES")),
                line(pair("a", more=1)),
                b'{"prompt": "\0", "completion": "b"}',
            ]
        ),
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(LINES)
def test_any_file_can_be_cleaned_and_had_again(lines: list[bytes]) -> None:
    content = b"\n".join([line(pair("first")), *lines])
    with tempfile.TemporaryDirectory() as folder:
        _, once, _ = clean(Path(folder), content)
        again, twice, log = clean(Path(folder), b"".join(each + b"\n" for each in once))
        assert twice == once
        assert log == []
        assert again.is_unchanged


def test_the_same_file_gives_the_same_bytes_packed_or_not(tmp_path: Path) -> None:
    content = b"\n".join(line(pair(f"<i>{prompt}</i>")) for prompt in prompts(20))
    _, plain, _ = clean(tmp_path, content)
    first = (tmp_path / "cleaned.log.jsonl").read_bytes()
    _, packed, _ = clean(tmp_path, content, packed=True)
    bytes_once = (tmp_path / "cleaned.jsonl").read_bytes()
    assert packed == plain
    assert (tmp_path / "cleaned.log.jsonl").read_bytes() == first
    clean(tmp_path, content, packed=True)
    assert (tmp_path / "cleaned.jsonl").read_bytes() == bytes_once


def test_a_packed_file_is_read_and_comes_back_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "train.jsonl.gz"
    content = line(pair("<b>a</b>")) + b"\n" + line(pair("b")) + b"\n"
    source.write_bytes(gzip.compress(content))
    target, log = tmp_path / "out.jsonl.gz", tmp_path / "log"
    clean_file(local_file(source), target, log, Cleaning(), ANY, packed=True)
    assert json.loads(gzip.decompress(target.read_bytes()).splitlines()[0]) == pair("a")
    with target.open("rb") as stream:
        undo(stream, log, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_what_is_not_asked_for_is_not_done(tmp_path: Path) -> None:
    one = prompts(1)[0]
    content = b"\n".join(
        [line(pair(one)), line(pair(one)), line(pair(one.upper())), line(pair("<b>x</b>"))]
    )
    nothing = Cleaning(repairs=(), drops_exact_duplicates=False, drops_near_duplicates=False)
    found, lines, _ = clean(tmp_path, content, nothing)
    assert b"\n".join(lines) == content
    found, lines, _ = clean(tmp_path, content, Cleaning(drops_near_duplicates=False))
    assert found.actions == {"drop": 1, "repair": 1}


def test_a_record_of_the_test_file_is_left_out_of_training(tmp_path: Path) -> None:
    one, two, three, four = prompts(4)
    test, validation = tmp_path / "test.jsonl", tmp_path / "validation.jsonl"
    test.write_bytes(line(pair("x")) + b"\n" + line(pair(two)))
    validation.write_bytes(line(pair(three.title())))
    content = b"\n".join(line(pair(prompt)) for prompt in (one, two, three, four))
    against = (local_file(test, TEST), local_file(validation, VALIDATION))
    found, lines, log = clean(tmp_path, content, against=against)
    assert [json.loads(each)["prompt"] for each in lines] == [one, four]
    assert found.counts == {"test_leak": 1, "validation_leak": 1}
    assert log[0]["twin"] == {"file": str(test), "line": 2}


def test_every_repair_of_a_dirty_set_leaves_its_clean_lines_alone(
    tmp_path: Path, shared_data: Path
) -> None:
    dirty = shared_data / "dirty" / "dirty-pairs.jsonl"
    key = [json.loads(each) for each in dirty.with_suffix(".key.jsonl").read_bytes().splitlines()]
    _, _, log = clean(tmp_path, dirty.read_bytes())
    said = {entry["line"]: entry for entry in log}
    for entry in key:
        number, verdict = entry["line"], entry["verdict"]
        if verdict in ("keep", "review") and number != 1:
            assert number not in said, entry
        if entry["defect"] in ("exact_duplicate", "near_duplicate"):
            assert said[number]["twin"]["line"] == entry["twin_line"]
        if verdict == "reject" and entry["defect"] != "too_long":
            assert said[number]["action"] == "reject", entry
        if verdict == "repair":
            assert said[number]["action"] == "repair", entry
            assert entry["defect"] in [change["code"] for change in said[number]["changes"]]


def test_a_check_finds_nothing_left_to_repair_or_drop(tmp_path: Path) -> None:
    one, two = prompts(2)
    dirt = [
        "<p>{}</p>",
        "{}&nbsp;&lt;br&gt;",
        "\u200b{}",
        "  {}  \n",
        "cafÃ© {}",
        "{}\0",
        "\ud83d{}",
    ]
    texts = [form.format(text) for form, text in zip(dirt, prompts(len(dirt) + 2)[2:], strict=True)]
    texts += [one, one, one.upper(), two]
    content = b"\r\n".join(json.dumps(pair(text, more=1)).encode() for text in texts)
    clean(tmp_path, b"\xef\xbb\xbf" + content)
    found = check_files([local_file(tmp_path / "cleaned.jsonl")], workers=0)
    left = (Severity.REJECT, Severity.DROP, Severity.REPAIR)
    assert [found.count(severity) for severity in left] == [0, 0, 0]
    assert found.files[0].num_usable == len(dirt) + 2


def test_a_check_of_a_cleaned_dirty_set_leaves_only_what_people_decide(
    tmp_path: Path, shared_data: Path
) -> None:
    clean(tmp_path, (shared_data / "dirty" / "dirty-pairs.jsonl").read_bytes())
    found = check_files([local_file(tmp_path / "cleaned.jsonl")], workers=0)
    assert found.verdict == "warnings"
    assert not found.count(Severity.DROP)
    assert not found.count(Severity.REPAIR)


def html_records(number: int) -> list[str]:
    rng = random.Random(1)
    made = []
    for place in range(number):
        one, two, three = (" ".join(rng.choices(WORDS, k=12)) for _ in range(3))
        made.append(
            f"<p>{one} <code>{two.split()[0]}</code>: <a href='https://example.com/{place}'>{two}"
            f"</a>.</p> <ul> <li> <p>{three} &lt; 5 &amp; more</p> </li> </ul><note>{one}</note>"
        )
    return made


def test_html_records_keep_every_visible_word_and_no_tag(tmp_path: Path) -> None:
    texts = html_records(60)
    content = b"\n".join(line({"input": text}) for text in [*texts, *texts[:7]])
    found, lines, _ = clean(tmp_path, content, formats=formats_for(None, CONTINUED_PRE_TRAINING))
    cleaned = [json.loads(each)["input"] for each in lines]
    assert len(cleaned) == 60
    assert found.counts["exact_duplicate"] == 7
    for text, shown in zip(texts, cleaned, strict=True):
        assert find_html(shown) is None
        assert "< 5 & more" in shown
        assert set(shown.split()) >= {word for word in WORDS if f" {word} " in text}


def test_the_messy_set_has_no_tag_left_and_loses_no_visible_text(
    tmp_path: Path, shared_data: Path
) -> None:
    figures = measure(shared_data / "messy" / "cpt-aws-api-html.jsonl", tmp_path)
    assert figures.num_tags_after == 0
    assert figures.lost_share < 0.01
    assert figures.num_records_after <= 2961


# -- token limits


@pytest.fixture(scope="module")
def model() -> Model:
    base = next(
        base for base in shipped_models() if base.model_id.startswith("amazon.titan-text-l")
    )
    return Model(base, 1, Renderer(smollm2_folder()))


def test_a_long_document_is_cut_at_sentence_ends_within_the_limit(
    tmp_path: Path, model: Model
) -> None:
    limit = model.limits.longest_piece
    sentences = [f"これは{place}番目の文です。" for place in range(limit // 4)]
    english = [f"This is sentence number {place} of the text. " for place in range(limit // 4)]
    content = b"\n".join(
        line({"input": "".join(text).strip()}) for text in (sentences, english, ["Short."])
    )
    found, lines, log = clean(
        tmp_path, content, formats=formats_for(model.base, CONTINUED_PRE_TRAINING), model=model
    )
    texts = [json.loads(each)["input"] for each in lines]
    assert found.actions == {"split": 2}
    assert log[0]["numOutputLines"] + log[1]["numOutputLines"] + 1 == len(texts)
    for text in texts:
        assert len(model.renderer.tokenizer.encode(text)) + 2 <= limit
        assert text.endswith(("。", "."))
    first = log[0]["numOutputLines"]
    assert "".join(texts[:first]) == "".join(sentences)
    assert " ".join(texts[first:-1]) == "".join(english).strip()


def test_a_pair_that_is_too_long_is_left_out_and_not_cut(tmp_path: Path, model: Model) -> None:
    content = b"\n".join([line(pair("word " * 6000)), line(pair("Is it right?"))])
    found, lines, _ = clean(
        tmp_path, content, formats=formats_for(model.base, FINE_TUNING), model=model
    )
    assert found.rejected[0].code == "too_long"
    assert len(lines) == 1


# -- what is refused


def test_an_output_that_is_the_original_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(line(pair("a")))
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    hard = tmp_path / "hard.jsonl"
    hard.hardlink_to(source)
    for target in (source, link, hard, tmp_path / "." / "a.jsonl"):
        with pytest.raises(DataError, match="is read"):
            clean_file(local_file(source), target, tmp_path / "l", Cleaning(), ANY, force=True)
    assert json.loads(source.read_bytes()) == pair("a")


def test_what_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_bytes(line(pair("a")))
    target.write_bytes(b"mine")
    with pytest.raises(DataError, match="--force"):
        clean_file(local_file(source), target, tmp_path / "l", Cleaning(), ANY)
    assert target.read_bytes() == b"mine"
    clean_file(local_file(source), target, tmp_path / "l", Cleaning(), ANY, force=True)
    assert json.loads(target.read_bytes()) == pair("a")


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    source, other, target = (tmp_path / name for name in ("a.jsonl", "other", "b.jsonl"))
    source.write_bytes(line(pair("a")))
    other.write_bytes(b"mine")
    target.symlink_to(other)
    with pytest.raises(DataError, match="a link is there"):
        clean_file(local_file(source), target, tmp_path / "l", Cleaning(), ANY)
    clean_file(local_file(source), target, tmp_path / "l", Cleaning(), ANY, force=True)
    assert other.read_bytes() == b"mine"
    assert not target.is_symlink()


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(content)
    with pytest.raises(DataError, match="holds no record"):
        clean_file(local_file(source), tmp_path / "b", tmp_path / "l", Cleaning(), ANY)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_directory_or_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(line(pair("a")))
    with pytest.raises(DataError, match="directory"):
        clean_file(local_file(tmp_path), tmp_path / "b", tmp_path / "l", Cleaning(), ANY)
    with pytest.raises(DataError, match="it is a directory"):
        clean_file(local_file(source), tmp_path, tmp_path / "l", Cleaning(), ANY)
    with pytest.raises(DataError, match="there is no directory"):
        clean_file(local_file(source), tmp_path / "no" / "b", tmp_path / "l", Cleaning(), ANY)


def test_a_file_that_changes_between_the_readings_leaves_no_output(tmp_path: Path) -> None:
    contents = iter([line(pair(said)) + b"\n" for said in ("a", "a", "b")])

    @contextmanager
    def changing() -> Iterator[BinaryIO]:
        yield io.BytesIO(next(contents))

    data = DataFile("s3://bucket/a.jsonl", "training", changing)
    with pytest.raises(DataError, match="changed while it was read"):
        clean_file(data, tmp_path / "b", tmp_path / "l", Cleaning(), ANY)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("/dev/full is not here")

    def fill() -> None:
        with write_whole(tmp_path / "b") as out, full.open("wb", buffering=0) as out.stream:
            out.write(b"x")

    with pytest.raises(DataError, match="disk is full"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_log_of_another_file_does_not_restore_anything(tmp_path: Path) -> None:
    clean(tmp_path, line(pair("<b>a</b>")) + b"\n" + line(pair("b")))
    other = tmp_path / "other.jsonl"
    other.write_bytes(line(pair("c")) + b"\n" + line(pair("d")))
    with pytest.raises(DataError, match="was not made with it"), other.open("rb") as stream:
        undo(stream, tmp_path / "cleaned.log.jsonl", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_unfinished_log_is_refused(tmp_path: Path) -> None:
    clean(tmp_path, line(pair("<b>a</b>")))
    log = tmp_path / "cleaned.log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    with (
        (tmp_path / "cleaned.jsonl").open("rb") as stream,
        pytest.raises(DataError, match="end is missing"),
    ):
        undo(stream, log, tmp_path / "back")


def test_a_repair_that_does_not_exist_is_refused() -> None:
    with pytest.raises(DataError, match="There is no repair spelling"):
        Cleaning(repairs=("spelling",))
