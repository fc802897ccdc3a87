"""The report for programs and terminals: complete, the same for the same data, safe to print."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.unit.data.made_check import SCRIPT, TRAIN, check, clean_check, defect, facts

from outcrop.data.check import MAX_LISTED
from outcrop.data.defects import KINDS, Place, Severity
from outcrop.data.report import SCHEMA, Training, build_report, write_json, write_summary


def test_the_report_tells_every_number_of_the_check() -> None:
    found = check()
    report = build_report(found, model_name="Real-1B", rejection="No.")
    assert (report["schema"], report["verdict"], report["rejection"]) == (SCHEMA, "rejected", "No.")
    assert report["model"] == {"id": "amazon.titan-text-lite-v1", "name": "Real-1B"}
    assert report["counts"] == {
        **dict.fromkeys(map(str, Severity), 0),
        "reject": 1,
        "drop": 1,
        "repair": 7,
        "advice": 1,
    }
    assert [file["sha256"] for file in report["files"]] == ["ab" * 32] * 2
    assert found.tokens is not None
    assert report["tokens"]["perEpoch"] == found.tokens.total.total
    assert report["tokens"]["numWithoutLabel"] == 1
    histogram = report["tokens"]["total"]["histogram"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert report["duplicates"] == {"exact": 0, "near": 1, "conflictingLabels": 0}
    assert report["labels"] == {"numLabels": 2, "counts": {"yes & no": 9, SCRIPT: 2}}
    assert report["languages"] == {"en": 10, "ja": 1}
    assert report["defectsListedForEachCode"] == MAX_LISTED


def test_codes_come_with_what_to_do_and_the_gravest_first() -> None:
    rows = build_report(check())["codes"]
    assert [row["code"] for row in rows] == [
        *("wrong_type", "near_duplicate", "html", "no_validation"),
    ]
    for row in rows:
        assert row["remedy"] == KINDS[row["code"]].remedy


def test_a_defect_is_told_with_its_place_and_its_twin() -> None:
    twin = build_report(check())["defects"][3]
    assert twin == {
        "code": "near_duplicate",
        "severity": "drop",
        "file": TRAIN,
        "line": 9,
        "message": "It is wrong.",
        "value": "",
        "twin": {"file": TRAIN, "line": 2},
    }


def test_the_same_data_give_the_same_bytes_however_long_the_check_took() -> None:
    slow = replace(check(), seconds=1000.0)
    assert write_json(build_report(check())) == write_json(build_report(slow))
    assert json.loads(write_json(build_report(slow))) == build_report(slow)


def test_half_a_surrogate_pair_does_not_keep_a_report_from_being_written() -> None:
    lone = check(defects=(defect("lone_surrogate", Severity.REPAIR, 1, value="a\ud800"),))
    assert json.loads(write_json(build_report(lone)))["defects"][0]["value"] == "a?"


def test_training_time_is_estimated_from_what_was_measured_or_not_at_all() -> None:
    found = check()
    assert found.tokens is not None
    tokens = 3 * found.tokens.epoch_tokens
    unknown = build_report(found, training=Training(3))["training"]
    assert (unknown["numTokens"], unknown["seconds"]) == (tokens, None)
    known = build_report(found, training=Training(3, 100.0, "before"))["training"]
    assert known["seconds"] == pytest.approx(tokens / 100, abs=0.1)
    assert known["measuredBy"] == "before"
    assert build_report(found)["training"] is None


def test_the_summary_names_files_lines_counts_and_the_verdict() -> None:
    text = write_summary(build_report(check(), training=Training(3, 100.0, "before")), seconds=0.25)
    for part in (
        *(f"{TRAIN} (training): 12 records, 11 usable", "ab" * 32, f"{TRAIN}:3: reject wrong_type"),
        *("html: 7 repair", "3 epochs", "of job before", "en 10, ja 1"),
        "rejected in 0.2 s: 1 reject, 1 drop, 7 repair, 1 advice",
    ):
        assert part in text
    assert text.index(f"{TRAIN}:3: reject") < text.index(f"{TRAIN}: advice"), "gravest first"
    assert write_summary(build_report(clean_check())).endswith("clean: nothing found")


def test_the_summary_has_nothing_that_a_terminal_obeys() -> None:
    hostile = check(
        files=(facts("a\x1b[2J.jsonl", "training"),),
        defects=(defect("html", Severity.REPAIR, 1, "\x1b]0;x\x07", "\r\n\u202e", twin=None),),
        languages={"\x9b": 1},
    )
    text = write_summary(build_report(hostile))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "\\x1b[2J" in text


def test_where_more_was_found_than_is_shown_the_rest_is_counted() -> None:
    many = check(
        defects=tuple(defect("html", Severity.REPAIR, line) for line in range(1, 51)),
        counts={"html": {Severity.REPAIR: 4000}},
    )
    assert "... 3,990 more" in write_summary(build_report(many))


def test_a_cleaned_file_names_what_it_was_made_from() -> None:
    report = build_report(check(), made_from={TRAIN: "s3://bucket/raw.jsonl"})
    assert [file["madeFrom"] for file in report["files"]] == ["s3://bucket/raw.jsonl", None]


def test_a_place_without_a_line_is_the_file() -> None:
    whole = check(defects=(defect("bom", Severity.REPAIR, None, twin=Place("other", None)),))
    assert f"{TRAIN}: repair bom" in write_summary(build_report(whole))
