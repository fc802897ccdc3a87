"""Each rule over one record's texts: what it finds, and what it lets pass."""

from __future__ import annotations

import time

import pytest

from outcrop.data.checks import personal, texts
from outcrop.data.checks.texts import Texts
from outcrop.data.defects import KINDS, Finding


def over(text: str, completion: str = " fine then") -> dict[str, Finding]:
    """What all rules say of a pair, by code."""
    findings = [rule(Texts(text, completion)) for rule in (*texts.RULES, personal.pii)]
    return {finding.code: finding for finding in findings if finding is not None}


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("a <p>b</p>", "html", "<p>"),
        ("a <br/> b", "html", "<br/>"),
        ("a <BR> b", "html", "<BR>"),
        ("<!DOCTYPE html>", "html", "<!DOCTYPE html>"),
        ("a &amp; b", "html", "&amp;"),
        ("a &#8217; b", "html", "&#8217;"),
        ("lost \ufffd here", "mojibake", "lost \ufffd here"),
        ("a\u200bb", "control_characters", "U+200B"),
        ("a\x07", "control_characters", "U+0007"),
        ("a\u00a0b", "control_characters", "U+00A0"),
        ("  a", "stray_whitespace", ""),
        ("a\n \n", "stray_whitespace", ""),
        ("write to jane@mail.example.org now", "pii", "jane@mail.example.org"),
        ("card 4000-0000-0000-0002, please", "pii", "4000-0000-0000-0002"),
        ("call (555) 010-0199 now", "pii", "(555) 010-0199"),
        ("電話 03-5550-0100 まで", "pii", "03-5550-0100"),
        ("account GB82 WEST 1234 5698 7654 32", "pii", "GB82 WEST 1234 5698 7654 32"),
        ("number 900-12-3456.", "pii", "900-12-3456"),
    ],
)
def test_what_is_found(text: str, code: str, value: str) -> None:
    found = over(text)
    assert set(found) == {code}
    assert code in KINDS
    assert value == "" or found[code].value == value


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d: x & y",
        "<Code>AccessDenied</Code> is XML, and so is <Key>k</Key>",
        "an AT&T phone; R&D;",
        "“Zoë’s café” — naïve, 5 °C",
        "日本語の文章です。東京タワー",
        "　段落の始まり",
        "family 👩‍👩‍👧 and flag 🏳️‍🌈",
        "می‌خواهم",
        "10\u00a0% et « oui\u00a0»",
        "a question:\n\n",
        "1,000,000 + 2,000,000 = 3,000,000",
        "pi is 3.14159265358979323846",
        "4000 0000 0000 0001 has a wrong checksum",
        "1111111111111111",
        "the years 1998-2001, 2003-2007",
        "user@localhost",
    ],
)
def test_what_is_let_pass(text: str) -> None:
    assert over(text) == {}


@pytest.mark.parametrize(
    "completion", [" TODO", " n/a", "[TBD]", " ...", " asdf", " qwerty uiop", " na na na"]
)
def test_a_completion_that_says_nothing_is_for_review(completion: str) -> None:
    assert set(over("a question", completion)) == {"low_information"}


@pytest.mark.parametrize(
    "completion", [" 7", " yes", " 👍", " -1", " A", " no no", " 1 1 1", " C#", " because"]
)
def test_a_short_answer_is_an_answer(completion: str) -> None:
    assert over("a question", completion) == {}


def test_a_completion_that_begins_with_the_prompt_is_for_review() -> None:
    prompt = "Translate this sentence, please: cat"
    assert set(over(prompt, f" {prompt} chat")) == {"completion_repeats_prompt"}
    assert over("yes", " yes, always") == {}  # a short prompt may begin its own answer


def test_a_document_is_read_as_a_whole_and_has_no_completion() -> None:
    document = Texts("a <p>b</p> for TODO", None, is_document=True)
    findings = [rule(document) for rule in texts.RULES]
    assert [finding.message for finding in findings if finding] == [
        "input holds HTML at character 3: <p>."
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("<context>" * 20_000, "a@" * 80_000, "+1 " * 50_000, "1" * 150_000, "<a " * 50_000),
        *("&#" * 80_000, " \n" * 80_000, "A1" * 80_000, "\u00a0" * 150_000, "é" * 150_000),
    ],
)
def test_no_text_takes_a_rule_long(text: str) -> None:
    began = time.process_time()
    over(text, text[:1000])
    assert time.process_time() - began < 5
