"""A folder of texts as documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from outcrop.data.folders import Folder
from outcrop.errors import DataError


def test_text_markdown_and_html_become_documents_in_the_order_of_their_paths(
    tmp_path: Path,
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("# Title\r\n\r\nText\n", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfPlain caf\xc3\xa9\n")
    (tmp_path / "c.html").write_text(
        "<html><head><title>T</title><style>p {}</style></head><body><h1>Main</h1><p>a &lt; b</p>"
        "<h2>Sub</h2><ul><li>one</li><li>two</li></ul></body></html>",
        encoding="utf-8",
    )
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    folder = Folder(tmp_path)
    found = {Path(row.file).name: row.value for row in folder.rows()}
    assert list(found) == ["a.txt", "one.md", "c.html"]
    assert found["a.txt"] == {"input": "Plain café"}
    assert found["one.md"] == {"input": "# Title\n\nText"}
    assert found["c.html"] == {"input": "# Main\na < b\n\n## Sub\none\ntwo"}
    assert sorted(Path(name).name for name in folder.passed_over) == ["empty.txt", "picture.png"]


def test_long_texts_are_cut_at_ends_of_sentences(tmp_path: Path) -> None:
    sentences = [f"This is sentence number {place}." for place in range(40)]
    (tmp_path / "a.txt").write_text(" ".join(sentences), encoding="utf-8")
    rows = list(Folder(tmp_path, max_tokens=200, count=len).rows())
    texts = [row.value["input"] for row in rows if row.value]
    assert len(texts) > 5
    assert all(len(text) <= 200 and text.endswith(".") for text in texts)
    assert " ".join(texts) == " ".join(sentences)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    (row,) = Folder(tmp_path).rows()
    assert row.finding is not None
    assert (row.finding.code, row.line) == ("invalid_utf8", None)


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of text"):
        list(Folder(tmp_path).rows())
    with pytest.raises(DataError, match="no directory"):
        list(Folder(tmp_path / "a").rows())


def test_deep_html_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<div>" * 20_000 + "deep", encoding="utf-8")
    (row,) = Folder(tmp_path).rows()
    assert row.value == {"input": "deep"}
