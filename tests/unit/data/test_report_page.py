"""The page: needs nothing else, shows what the report has, and obeys nothing in the data."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from tests.unit.data.made_check import SCRIPT, check, clean_check, defect, facts

from outcrop.data.check import LabelStatistics
from outcrop.data.defects import Severity
from outcrop.data.report import Training, build_report
from outcrop.data.report_charts import histogram, named_bars
from outcrop.data.report_page import MAX_ROWS, write_page

VOID = {"meta"}


class Page(HTMLParser):
    """The tags, attributes and text of a page; a tag that is not closed is an error."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page.decode())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(**fields: Any) -> Page:
    report = build_report(
        check(**fields), model_name="Real", training=Training(2, 50.0, "j"), rejection=SCRIPT
    )
    return Page(write_page(report))


def test_the_page_asks_for_nothing_and_runs_nothing() -> None:
    found = page()
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {"src", "href", "srcset", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    raw = write_page(build_report(check())).decode()
    assert "url(" not in raw
    assert "@import" not in raw
    assert "default-src 'none'" in raw


def test_texts_of_the_data_are_shown_and_never_obeyed() -> None:
    hostile = f"{SCRIPT}\"'><svg onload=x>"
    found = page(
        base_model_id=hostile,
        files=(facts(hostile, "training", format=hostile),),
        defects=(defect("html", Severity.REPAIR, 1, hostile, hostile, file=hostile),),
        labels=LabelStatistics({hostile: 3}),
        languages={hostile: 1},
    )
    assert "script" not in found.tags
    assert "onload" not in {name for name, _ in found.attributes}
    assert found.text.count(hostile) >= 6
    assert SCRIPT in found.text


def test_the_page_shows_defects_files_and_figures() -> None:
    text = page().text
    for part in (
        *("rejected", "A job with these data fails.", "wrong_type", "s3://bucket/train.jsonl:3"),
        *("ab" * 32, "tokens an epoch", "estimated training", "Whole records, tokens", "Prompts"),
        *("Completions", "Labels (2)", "Languages of a sample", "limit 48", "near_duplicate"),
    ):
        assert part in text


def test_a_clean_set_says_so_and_has_no_empty_tables() -> None:
    text = Page(write_page(build_report(clean_check()))).text
    assert "Nothing was found." in text
    assert "Each defect" not in text
    assert "What was found" not in text


def test_data_without_a_model_are_measured_in_characters() -> None:
    report = build_report(check(base_model_id="", tokens=None))
    assert "Records, characters" in Page(write_page(report)).text


def test_of_very_many_defects_the_table_has_some_and_the_page_says_so() -> None:
    many = tuple(defect("html", Severity.REPAIR, line) for line in range(1, MAX_ROWS + 2))
    found = page(defects=many, counts={"html": {Severity.REPAIR: 5000}})
    assert f"{MAX_ROWS:,} of 5,000 are listed" in found.text
    assert found.text.count("s3://bucket/train.jsonl:") == MAX_ROWS


def test_bars_of_a_histogram_are_as_high_as_their_counts_and_empty_bins_have_none() -> None:
    picture = histogram("t", (0, 10, 20, 30), (4, 0, 2), "tokens", {"limit": 25, "far": 99})
    heights = [float(found) for found in re.findall(r'class="bar"[^>]* height="([\d.]+)"', picture)]
    assert heights[0] == 2 * heights[1]
    assert len(heights) == 2
    assert "limit 25" in picture
    assert "far" not in picture


def test_named_bars_have_no_width_for_nothing_and_cut_long_names() -> None:
    picture = named_bars("t", [("a" * 60, 4, "bar"), ("b", 0, "drop")])
    widths = [float(found) for found in re.findall(r'width="([\d.]+)" height', picture)]
    assert widths[0] > 0
    assert widths[1] == 0
    assert "a" * 60 + ": 4" in picture, "the title has the whole name"
    assert "a" * 28 not in picture.replace("a" * 60, "")
