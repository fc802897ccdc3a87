"""Stop sequences in text that comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outcrop.serve.stop import StopScanner

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def scan(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stop)
    released = ""
    for piece in pieces:
        text, found = scanner.add(piece)
        released += text
        if found is not None:
            return released, found
    return released + scanner.finish(), None


def first_complete(text: str, stop: list[str]) -> tuple[str, str | None]:
    """What a reader sees who looks after every single character."""
    for end in range(len(text) + 1):
        ended = [each for each in stop if text[:end].endswith(each)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(TEXT, STOPS, st.data())
def test_how_the_text_is_cut_makes_no_difference(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert scan(pieces, stop) == first_complete(text, stop)


@given(TEXT, STOPS)
def test_released_text_never_has_to_be_taken_back(text: str, stop: list[str]) -> None:
    final, _ = first_complete(text, stop)
    scanner = StopScanner(stop)
    released = ""
    for letter in text:
        piece, found = scanner.add(letter)
        released += piece
        assert final.startswith(released)
        if found is not None:
            assert released == final
            break


def test_text_without_a_stop_sequence_is_never_held() -> None:
    scanner = StopScanner(())
    assert scanner.add("User") == ("User", None)
    assert scanner.finish() == ""


def test_only_what_may_become_a_stop_sequence_is_held() -> None:
    scanner = StopScanner(["\nUser:"])
    assert scanner.add("Yes.\nUs") == ("Yes.", None)
    assert scanner.add("ual") == ("\nUsual", None)
    assert scanner.add("\nUser") == ("", None)
    assert scanner.add(": more") == ("", "\nUser:")
