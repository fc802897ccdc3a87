"""What is HTML, what only looks like it, and what a page shows."""

from __future__ import annotations

import pytest

from outcrop.data.html import find_html, html_text, remove_html


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a <b>bold</b> word", "<b>"),
        ("a line<br>break", "<br>"),
        ("closed </div> only", "</div>"),
        ("fish &amp; chips", "&amp;"),
        ("a&#160;b", "&#160;"),
        ("<!-- note -->", "<!-- note -->"),
        ("<!DOCTYPE html>", "<!DOCTYPE html>"),
        ('<section class="x">', '<section class="x">'),
        ("<P>LOUD</P>", "<P>"),
        ("code `<b>` and <i>real</i>", "<i>"),
    ],
)
def test_the_first_html_is_found(text: str, found: str) -> None:
    span = find_html(text)
    assert span is not None
    assert text[slice(*span)] == found
    assert find_html(remove_html(text)) is None


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a < b > c",
            "List<b>",
            "vector<li> v",
            "Map<String, a>",
            "x<y && y>z",
            "<-",
            "<3",
            "a<b",
        ),
        *("<context>x</context>", "<summary>x</summary>", "<Code>x</Code>", "<s>[INST] x</s>"),
        *("`<b>x</b>`", "```\n<p>&amp;</p>\n```", "~~~\n<p>x</p>\n~~~"),
        *("AT&T", "R&D;", "a&b=c", "&unknown;", "?a=1&copy=2", "&#xFFFFFFF;", "&;"),
        *("<b in 5>", "a <i j> b", "<input>", "<data>", "{% if a < b %}"),
    ],
)
def test_what_only_looks_like_html_is_left(text: str) -> None:
    assert find_html(text) is None
    assert remove_html(text) == text


def test_own_tags_count_beside_real_ones() -> None:
    assert remove_html("<note> <p>Be careful</p> </note>") == "Be careful"
    assert remove_html("<p>in <section>this</section></p>") == "in\nthis"


def test_what_entities_spell_is_looked_at_again() -> None:
    assert remove_html("a&lt;br&gt;b") == "a\nb"
    assert remove_html("&amp;amp;") == "&"
    assert remove_html("<p>&lt;Status&gt;</p>") == "<Status>"


def test_line_ends_that_were_there_stay() -> None:
    assert remove_html("<b>one</b>\r\ntwo\n\n  three") == "one\r\ntwo\n\n  three"
    assert remove_html(" <i>yes</i>") == " yes"


def test_a_page_shows_its_text_with_headings_and_without_scripts() -> None:
    page = (
        "<title>T</title><script>x()</script><h1>Main</h1><p>One <a href='#'>two</a>.</p>"
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>"
        "<h2></h2><h3>Deep</h3><img src='a.png' alt='a tree'><pre>x  y\n  z</pre>"
    )
    assert html_text(page, headings=True) == (
        "# Main\nOne two.\na\tb\n1\t2\n\n### Deep\na tree\nx  y\n  z"
    )
    assert "#" not in html_text(page)


@pytest.mark.parametrize(
    "text", ["<!--" * 200_000, "<a" + " " * 400_000 + "<", "`<b>` " * 20_000 + "<b>x</b>"]
)
def test_no_text_takes_long(text: str) -> None:
    # What grows with the square of a text of this length meets the time limit of a test.
    assert len(remove_html(text)) <= len(text)
