"""Clean a file of raw HTML and write what it was like before and after.

    python -m benchmarks.data_clean FILE [--write]

Visible text is counted with a parser of its own (Python's html.parser), not with the one that
cleans. Prints a table; `--write` writes it to benchmarks/results/ as well, as a dated page.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from benchmarks.running import write_result

from outcrop.data.clean import Cleaning, clean_file
from outcrop.data.clean_log import undo
from outcrop.data.formats import formats_for
from outcrop.data.sources import local_file
from outcrop.models.catalog import CONTINUED_PRE_TRAINING

HOW = (
    "A corpus of raw HTML (botocore's documentation strings) is cleaned with the default settings. "
    "Tags, entities and visible characters are counted with Python's own html.parser, not with the "
    "parser that cleans; white space is not counted. Tags that the original only spelled with "
    "entities are text, and stay."
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|[a-zA-Z]+);")


class _Visible(HTMLParser):
    """Counts the characters that a page shows, white space left out, and its tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.said: list[str] = []
        self.num_tags = 0

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.num_tags += 1

    def handle_endtag(self, tag: str) -> None:
        self.num_tags += 1

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.num_tags += 1


@dataclass(frozen=True)
class Figures:
    """What cleaning did."""

    num_records_before: int
    num_records_after: int
    num_exact: int
    num_near: int
    num_tags_before: int
    num_tags_after: int
    """Tags that the original's mark-up had and that are still there."""
    num_entities_before: int
    num_entities_after: int
    num_bytes_before: int
    num_bytes_after: int
    visible_before: int
    """Characters that the records that were kept show in the original, white space left out."""
    visible_after: int
    """Of those, the ones that are still there, in their order."""
    seconds: float
    max_memory_mb: int
    is_restored: bool
    """Whether the original came back from the cleaned file and the log, byte for byte."""

    @property
    def lost_share(self) -> float:
        """Of the visible characters, how many are gone."""
        return 1 - self.visible_after / self.visible_before


def measure(file: Path, folder: Path) -> Figures:
    """Clean a file of documents into a folder and count."""
    target, log = folder / "cleaned.jsonl", folder / "cleaned.log.jsonl"
    started = time.perf_counter()
    found = clean_file(
        local_file(file),
        target,
        log,
        Cleaning(),
        formats_for(None, CONTINUED_PRE_TRAINING),
        force=True,
    )
    seconds = time.perf_counter() - started
    with target.open("rb") as stream:
        undo(stream, log, folder / "restored.jsonl")
    before = [json.loads(line)["input"] for line in file.read_bytes().splitlines()]
    after = [json.loads(line)["input"] for line in target.read_bytes().splitlines()]
    dropped = {
        entry["line"]
        for entry in map(json.loads, log.read_bytes().splitlines())
        if entry.get("action") == "drop"
    }
    kept = [text for line, text in enumerate(before, 1) if line not in dropped]
    tags_before, visible, still_there, tags_after = 0, 0, 0, 0
    for text, cleaned in zip(kept, after, strict=True):
        parser = _Visible()
        parser.feed(text)
        parser.close()
        tags_before += parser.num_tags
        shown = "".join("".join(parser.said).split())
        visible += len(shown)
        still_there += _in_order(shown, "".join(cleaned.split()))
        # What an entity spelled is shown as text, and is no tag: it was none before either.
        spelled = Counter(_TAG.findall("".join(parser.said)))
        tags_after += (Counter(_TAG.findall(cleaned)) - spelled).total()
    return Figures(
        num_records_before=len(before),
        num_records_after=len(after),
        num_exact=found.counts.get("exact_duplicate", 0),
        num_near=found.counts.get("near_duplicate", 0),
        num_tags_before=tags_before,
        num_tags_after=tags_after,
        num_entities_before=sum(len(_ENTITY.findall(text)) for text in kept),
        num_entities_after=sum(len(_ENTITY.findall(text)) for text in after),
        num_bytes_before=found.num_bytes,
        num_bytes_after=found.num_output_bytes,
        visible_before=visible,
        visible_after=still_there,
        seconds=seconds,
        max_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        is_restored=(folder / "restored.jsonl").read_bytes() == file.read_bytes(),
    )


def _in_order(shown: str, cleaned: str) -> int:
    """Return how many characters of a text stand in another, in the same order."""
    if shown == cleaned:
        return len(shown)
    found = place = 0
    for character in shown:
        there = cleaned.find(character, place)
        if 0 <= there <= place + 64:
            found += 1
            place = there + 1
    return found


def table(figures: Figures) -> list[list[str]]:
    """Return the figures as rows; the first one is the head."""
    rows = (
        ("records", figures.num_records_before, figures.num_records_after),
        ("tags, in the records that were kept", figures.num_tags_before, figures.num_tags_after),
        ("entities, likewise", figures.num_entities_before, figures.num_entities_after),
        ("visible characters, likewise", figures.visible_before, figures.visible_after),
        ("bytes of the file", figures.num_bytes_before, figures.num_bytes_after),
    )
    head = ["what", "before", "after"]
    return [head, *([name, f"{before:,}", f"{after:,}"] for name, before, after in rows)]


def notes(figures: Figures) -> str:
    """Return what the table does not say."""
    back = "came back byte for byte" if figures.is_restored else "did NOT come back"
    return (
        f"{figures.num_exact:,} exact and {figures.num_near:,} near duplicates were left out. Of "
        f"the visible characters of what was kept, {figures.lost_share:.3%} are gone. It took "
        f"{figures.seconds:.1f} s in one process, and {figures.max_memory_mb:,} MB. The original "
        f"{back} from the cleaned file and the change log."
    )


def main() -> None:
    """Measure, print, and write where asked."""
    arguments = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--write", action="store_true")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options.file, Path(folder))
    for row in table(figures):
        print(f"{row[0]:40} {row[1]:>12} {row[2]:>12}")
    print(notes(figures))
    if options.write:
        print(write_result("data_clean", HOW, table(figures), notes(figures)))


if __name__ == "__main__":
    main()
