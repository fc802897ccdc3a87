"""Documents of a folder: text, Markdown and HTML files, each as raw text for pre-training.

HTML becomes the text that it shows, its headings written as Markdown writes them. Files are taken
in the order of their paths, so the same folder gives the same records. Hidden files, links and
files of other kinds are passed over and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from outcrop.data.convert import Row, refuse
from outcrop.data.html import html_text
from outcrop.data.sentences import split_text
from outcrop.data.text import shows_something
from outcrop.errors import DataError

HTML_FILES = (".html", ".htm", ".xhtml")
TEXT_FILES = (".txt", ".text", ".md", ".markdown", ".rst", *HTML_FILES)
MAX_FILE_BYTES = 64 * 2**20
"""LIMIT: the largest file, 64 MiB: it is read whole."""


@dataclass
class Folder:
    """A folder that is read, and what was passed over."""

    path: Path
    max_tokens: int = 0
    """Of a record: longer documents are cut at ends of sentences. 0 cuts none."""
    count: Callable[[str], int] = len
    """Tokens of a text."""
    num_files: int = 0
    """That were read."""
    passed_over: list[str] = field(default_factory=list)
    """Files of other kinds, and empty ones."""

    def rows(self) -> Iterator[Row]:
        """Yield the documents.

        Raises:
            DataError: the folder is none, or holds no file of text.
        """
        if not self.path.is_dir():
            raise DataError(
                f"{self.path} is no directory.", code="not_a_folder", file=str(self.path)
            )
        for path in sorted(self._files(), key=lambda path: path.relative_to(self.path).parts):
            if path.suffix.lower() not in TEXT_FILES:
                self.passed_over.append(str(path))
                continue
            self.num_files += 1
            yield from self._documents(path)
        if not self.num_files:
            kinds = ", ".join(TEXT_FILES)
            raise DataError(
                f"{self.path} holds no file of text ({kinds}).",
                code="empty_file",
                file=str(self.path),
            )

    def _files(self) -> Iterator[Path]:
        for path in self.path.rglob("*"):
            inside = path.relative_to(self.path)
            is_hidden = any(part.startswith(".") for part in inside.parts)
            is_linked = any(part.is_symlink() for part in (path, *_parents(path, self.path)))
            if not is_hidden and not is_linked and path.is_file():
                yield path

    def _documents(self, path: Path) -> Iterator[Row]:
        name = str(path)
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            message = f"It has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read."
            yield Row(name, None, None, refuse("too_long", message))
            return
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            message = f"Byte {error.start + 1} is not UTF-8."
            yield Row(name, None, None, refuse("invalid_utf8", message))
            return
        if path.suffix.lower() in HTML_FILES:
            text = html_text(text, headings=True)
        text = text.replace("\r\n", "\n").strip()
        if not shows_something(text):
            self.passed_over.append(name)
            return
        pieces = split_text(text, self.max_tokens, self.count) if self.max_tokens else [text]
        for piece in pieces:
            if shows_something(piece):
                yield Row(name, None, {"input": piece.rstrip()})


def _parents(path: Path, root: Path) -> Iterator[Path]:
    for parent in path.parents:
        if parent == root:
            return
        yield parent
