"""Repairs of a text: what is mended, what is never touched, and that twice is once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.data.text import CODES, repair_text, shows_something

CLEAN = [
    "It costs 5 < 6 and a > b, R&D at AT&T; see List<int>, Map<String, List<b>> and x <y> z.",
    "“Curly” quotes, ‘single’ ones, an en dash – and ﬁligature, ｆｕｌｌ ｗｉｄｔｈ.",
    "価格は１２３円です。　次の行。",
    "naïve café, Zürich, Łódź, Ελλάδα, Москва, हिन्दी, ไทย, عربي",
    "👩‍💻 and ❤️‍🔥 and 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "می‌خواهم",
    "Combien\u202f? «\u00a0Peu\u00a0», 10\u202f000\u00a0€, 20\u00a0%",
    "<context>\nText\n</context>\n<summary>of it</summary>",
    "<s>[INST] <<SYS>>\nBe brief\n<</SYS>> Hi [/INST]",
    "Write `<b>bold</b>` and\n```html\n<p>a &amp; b</p>\n```\nas they are.",
    "line\n\n  indented\ttab\n",
    "if (a<b && c>d) { return x&y; }",
    "$\\alpha < \\beta$ and 3 <4> 5 and <-> and <3",
    "https://example.com/?a=1&copy=2&lt=3",
]


@pytest.mark.parametrize("text", CLEAN)
def test_what_somebody_may_have_meant_is_not_touched(text: str) -> None:
    assert repair_text(text) == (text, [])


DAMAGED = [
    ("html", "<p>Hello <b>you</b></p> <p>there</p>", "Hello you\nthere"),
    ("html", '<div class="msg"><b>one\n\ntwo</b><br/></div>', "one\n\ntwo"),
    ("html", "<script>track('x')</script>Which one?", "Which one?"),
    ("html", "<!-- ticket 4711 -->Which one?", "Which one?"),
    ("html", "Tom &amp; Jerry&lt;br&gt;", "Tom & Jerry"),
    ("html", "<html><body>one\ntwo</body></html>", "one\ntwo"),
    ("html", "<ul> <li> <p>a</p> </li> <li>b</li></ul>", "a\nb"),
    ("html", "<table><tr><td>1<td>2</table>", "1\t2"),
    ("html", "<p>send <code>&lt;Status&gt;on&lt;/Status&gt;</code>", "send <Status>on</Status>"),
    ("mojibake", "The cafÃ© wasnâ€™t open", "The café wasn’t open"),
    ("mojibake", "手数料".encode().decode("latin-1"), "手数料"),
    ("control_characters", "a\x07\x1b[31mb", "ab"),
    ("control_characters", "some\u200b\u200dthing", "something"),
    ("control_characters", "a\u202eb", "ab"),
    ("control_characters", "a\u00a0\u2009b", "a  b"),
    ("control_characters", "a\ufeffb\u2028c", "ab\nc"),
    ("control_characters", "plain\U000e0068\U000e0069", "plain"),
    ("null_byte", "a\0b", "ab"),
    ("lone_surrogate", "a\ud83d b", "a\ufffd b"),
    ("lone_surrogate", "a\ud83d\ude00b", "a😀b"),
    ("unicode_form", "e\u0301te\u0301", "été"),
    ("stray_whitespace", "  \n text  \n", "text"),
    ("stray_whitespace", "text   \n\n", "text"),
]


@pytest.mark.parametrize(("code", "text", "expected"), DAMAGED)
def test_damage_is_mended_and_named(code: str, text: str, expected: str) -> None:
    mended, repairs = repair_text(text)
    assert mended == expected
    assert code in [repair.code for repair in repairs]
    assert (repairs[0].before, repairs[-1].after) == (text, expected)


def test_only_the_repairs_that_are_asked_for_are_made() -> None:
    text = "<b>a</b>\0 caf\u00c3\u00a9"
    assert repair_text(text, {"null_byte"})[0] == "<b>a</b> caf\u00c3\u00a9"
    assert repair_text(text, ())[0] == text


def test_one_space_before_a_completion_is_a_convention() -> None:
    assert repair_text(" yes", keeps_leading_space=True) == (" yes", [])
    assert repair_text("   yes", keeps_leading_space=True)[0] == " yes"
    assert repair_text(" <b>yes</b>", keeps_leading_space=True)[0] == " yes"
    assert repair_text(" yes")[0] == "yes"


@pytest.mark.parametrize("text", ["\0\0", "\u200b\ufeff", "<br>", " <!-- x --> ", "\ud800"])
def test_a_text_of_nothing_but_damage_is_not_emptied_silently(text: str) -> None:
    mended, _ = repair_text(text)
    assert mended
    assert shows_something(mended) or mended == text


PIECES = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            [
                *(
                    "<b>",
                    "</b>",
                    "<p>",
                    "</p>",
                    "<br>",
                    "<!--",
                    "-->",
                    "&lt;",
                    "&amp;",
                    "&#0;",
                    "&",
                ),
                *(
                    "<script>",
                    "</script>",
                    "`",
                    "```",
                    "\n",
                    "  ",
                    "\0",
                    "\x1b[0m",
                    "\u200d",
                    "\u00a0",
                ),
                *(
                    "Ã©",
                    "â€™",
                    "ã\x81\x82",
                    "\ud83d",
                    "\ude00",
                    "e\u0301",
                    "<note>",
                    "</note>",
                    "<td>",
                ),
                *(
                    "&#8203;",
                    "&nbsp;",
                    "&#x1f600;",
                    "<a href='x'>",
                    "</a>",
                    "\u2028",
                    "\r\n",
                    "\ufffd",
                ),
            ]
        ),
    ),
    max_size=12,
).map("".join)


@settings(deadline=None)
@given(PIECES)
def test_repairing_twice_is_repairing_once(text: str) -> None:
    once, _ = repair_text(text)
    assert repair_text(once) == (once, [])


@settings(deadline=None)
@given(PIECES)
def test_a_repaired_text_does_not_grow_and_can_be_written(text: str) -> None:
    mended, _ = repair_text(text)
    assert len(mended) <= 3 * len(text)
    if mended != text:
        assert shows_something(mended)
    if text:
        assert mended


def test_every_repair_has_a_code_of_its_own() -> None:
    assert len(set(CODES)) == len(CODES) == 7
