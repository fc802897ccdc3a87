"""The broken sets among the real data: every defect of their keys is found, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.assets.smollm2 import smollm2_folder

from outcrop.data.check import TEST, Check, check_files
from outcrop.data.defects import Severity
from outcrop.data.render import Renderer
from outcrop.data.sources import local_file
from outcrop.models.catalog import shipped_models

MODELS = {model.model_id: model for model in shipped_models()}
CERTAIN = {"reject", "drop", "repair"}
"""Verdicts that leave nothing to decide."""


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(smollm2_folder())


def check_set(shared_data: Path, name: str, renderer: Renderer) -> Check:
    base = MODELS[
        "amazon.titan-text-express-v1" if name == "dirty-pairs" else "amazon.nova-micro-v1:0"
    ]
    files = [local_file(shared_data / "dirty" / f"{name}.jsonl")]
    if name == "dirty-pairs":
        files.append(local_file(shared_data / "banking77-test.jsonl", TEST))
    return check_files(files, base=base, renderer=renderer)


def key(shared_data: Path, name: str) -> dict[tuple[int, str], tuple[str, int | None]]:
    """(line, code) -> (verdict, line of the twin)."""
    entries = {}
    lines = (shared_data / "dirty" / f"{name}.key.jsonl").read_text(encoding="utf-8").splitlines()
    for item in map(json.loads, lines):
        if item["defect"]:
            entries[item["line"], item["defect"]] = (item["verdict"], item.get("twin_line"))
        for code in item.get("also", ()):
            entries[item["line"], code] = ("repair", None)
    return entries


@pytest.mark.parametrize("name", ["dirty-pairs", "dirty-conversations"])
def test_the_defects_of_the_key_are_found_with_their_verdicts_and_no_others(
    name: str, shared_data: Path, renderer: Renderer
) -> None:
    check = check_set(shared_data, name, renderer)
    expected = key(shared_data, name)
    first = check.files[0].name
    found = {
        (defect.place.line, defect.code): str(defect.severity)
        for defect in check.defects
        if defect.place.file == first and defect.place.line is not None
    }
    certain = {place: verdict for place, (verdict, _) in expected.items() if verdict in CERTAIN}
    assert {place: found.get(place) for place in certain} == certain
    # An image for a model of text alone is refused, where the key leaves it to a person.
    others = {
        (line, code)
        for (line, code), severity in found.items()
        if severity in CERTAIN and (line, code) not in certain and code != "unsupported_block"
    }
    assert others == set()


@pytest.mark.parametrize("name", ["dirty-pairs", "dirty-conversations"])
def test_what_the_key_leaves_to_a_person_is_listed_and_blank_lines_are_passed_over(
    name: str, shared_data: Path, renderer: Renderer
) -> None:
    check = check_set(shared_data, name, renderer)
    places = {(defect.place.line, defect.code) for defect in check.defects}
    uncertain = {
        place
        for place, (verdict, _) in key(shared_data, name).items()
        if verdict in ("review", "skip")
    }
    assert uncertain - places == set()
    blank = {item.place.line for item in check.defects if item.severity is Severity.SKIP}
    assert blank == {line for line, code in uncertain if code == "blank_line"}


@pytest.mark.parametrize("name", ["dirty-pairs", "dirty-conversations"])
def test_twins_are_named_by_their_lines(name: str, shared_data: Path, renderer: Renderer) -> None:
    check = check_set(shared_data, name, renderer)
    found = {
        (defect.place.line, defect.code): defect.twin.line
        for defect in check.defects
        if defect.twin
    }
    expected = {
        place: twin for place, (_, twin) in key(shared_data, name).items() if twin is not None
    }
    assert {place: found.get(place) for place in expected} == expected
