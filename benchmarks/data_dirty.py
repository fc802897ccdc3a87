"""Are all defects found, and nothing else, in the broken sets and in sets broken at random?

The broken sets (`dirty/` of the folder that BEDROCK_DATA_DIR names) have keys; the others are made
by `tests/assets/planted.py` from a seed that is drawn anew each time and stands in the page.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.running import write_result
from tests.assets.planted import planted_conversations, planted_pairs
from tests.assets.smollm2 import smollm2_folder
from tests.conftest import SHARED_DATA

from outcrop.data.check import TEST, Check, check_files
from outcrop.data.defects import KINDS, Severity
from outcrop.data.render import Renderer
from outcrop.data.sources import local_file
from outcrop.models.catalog import shipped_models

PAIRS_MODEL, CONVERSATIONS_MODEL = "amazon.titan-text-express-v1", "amazon.nova-micro-v1:0"
CERTAIN = {"reject", "drop", "repair"}
MODELS = {model.model_id: model for model in shipped_models()}


@dataclass
class Score:
    """How what was found compares with what is there."""

    expected: int = 0
    found: int = 0
    right: int = 0
    others: Counter[str] | None = None
    """Found beside, for a person to decide."""

    @property
    def row(self) -> list[str]:
        """Cells of the table."""
        recall = self.right / self.expected if self.expected else 1.0
        precision = self.right / self.found if self.found else 1.0
        return [str(self.expected), str(self.found), f"{precision:.3f}", f"{recall:.3f}"]


def score(check: Check, expected: Mapping[tuple[int, str], str]) -> Score:
    """Compare the findings of a check's first file with a key: (line, code) -> verdict."""
    first = check.files[0].name
    found = {
        (defect.place.line, defect.code): str(defect.severity)
        for defect in check.defects
        if defect.place.file == first and defect.place.line is not None
    }
    wanted = {place for place, verdict in expected.items() if verdict in CERTAIN}
    certain = {
        place
        for place, severity in found.items()
        # What the key leaves to a person is not held against a check that is told a model.
        if severity in CERTAIN and expected.get(place, "") not in ("review", "skip")
    }
    beside = Counter(
        code
        for (line, code), severity in found.items()
        if severity == Severity.REVIEW and (line, code) not in expected
    )
    return Score(len(wanted), len(certain), len(wanted & certain), beside)


def read_key(path: Path) -> dict[tuple[int, str], str]:
    """Return a key file as (line, code) -> verdict."""
    key = {}
    for item in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if item["defect"]:
            key[item["line"], item["defect"]] = item["verdict"]
        for code in item.get("also", ()):
            key[item["line"], code] = "repair"
    return key


def main() -> None:
    """Check all sets and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--sets", type=int, default=10, help="sets of each kind made at random")
    arguments = parser.parse_args()
    renderer = Renderer(smollm2_folder())
    table = [["set", "lines", "certain defects", "found", "precision", "recall", "review beside"]]
    by_code: dict[str, list[int]] = {}

    def add(name: str, check: Check, expected: Mapping[tuple[int, str], str]) -> None:
        result = score(check, expected)
        assert result.others is not None
        beside = ", ".join(f"{code} {count}" for code, count in sorted(result.others.items()))
        table.append([name, str(check.files[0].num_lines), *result.row, beside or "-"])
        listed = {(defect.place.line, defect.code) for defect in check.defects}
        for place in expected:
            counts = by_code.setdefault(place[1], [0, 0])
            counts[0] += 1
            counts[1] += place in listed

    if SHARED_DATA.is_dir():
        folder = SHARED_DATA / "dirty"
        for name, model in (
            ("dirty-pairs", PAIRS_MODEL),
            ("dirty-conversations", CONVERSATIONS_MODEL),
        ):
            files = [local_file(folder / f"{name}.jsonl", name=name)]
            if name == "dirty-pairs":
                files.append(local_file(SHARED_DATA / "banking77-test.jsonl", TEST))
            check = check_files(files, base=MODELS[model], renderer=renderer)
            add(name, check, read_key(folder / f"{name}.key.jsonl"))
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.sets):
            for kind, make, model in (
                ("pairs", planted_pairs, PAIRS_MODEL),
                ("conversations", planted_conversations, CONVERSATIONS_MODEL),
            ):
                planted = make(arguments.seed + number)
                path = Path(temporary) / "set.jsonl"
                path.write_bytes(planted.content)
                check = check_files([local_file(path)], base=MODELS[model], renderer=renderer)
                expected = {
                    (line, code): str(KINDS[code].severity)
                    for line, (code, _) in planted.expected.items()
                }
                add(f"{kind}, seed {arguments.seed + number}", check, expected)
    codes = ["", "Found of each code, all sets together, whatever its verdict:", ""]
    codes += ["| code | there | found |", "|---|---|---|"]
    codes += [f"| `{code}` | {there} | {got} |" for code, (there, got) in sorted(by_code.items())]
    write_result(
        "data_dirty",
        "Certain defects are those whose verdict is reject, drop or repair; each must be found on "
        "its line under its code, and nothing of these severities anywhere else. `review beside` "
        "is what the check adds for a person to look at.",
        table,
        "In dirty-conversations a model of text alone was named, so the image block that the key "
        "leaves to a person is refused there.\n" + "\n".join(codes),
    )


if __name__ == "__main__":
    main()
