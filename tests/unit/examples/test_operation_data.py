"""The demo's data: what is asked in the end has nothing in common with what was learnt."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[3] / "examples" / "operation_data.py"
Record = dict[str, str]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operation_data", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["operation_data"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """The records of each file."""
    folder = tmp_path_factory.mktemp("operations")
    load().main(folder)
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.iterdir()
    }


def test_every_set_has_its_number_of_records(sets: dict[str, list[Record]]) -> None:
    assert {name: len(records) for name, records in sets.items()} == {
        "training": 400,
        "validation": 50,
        "test": 40,
    }


@pytest.mark.parametrize("part", [0, 1], ids=["service", "operation"])
def test_the_sets_share_no_service_and_no_operation(
    sets: dict[str, list[Record]], part: int
) -> None:
    used = {
        name: {record["completion"].split(":")[part] for record in records}
        for name, records in sets.items()
    }
    assert used["training"] & used["validation"] == set()
    assert used["training"] & used["test"] == set()
    assert used["validation"] & used["test"] == set()


def test_no_description_is_nearly_another(sets: dict[str, list[Record]]) -> None:
    module = load()
    texts = [r["prompt"].split("\n", 1)[1] for records in sets.values() for r in records]
    words = [module.content_words(text) for text in texts]
    for place, one in enumerate(words):
        for other in words[:place]:
            assert module.overlap(one, other) < module.NEARLY_THE_SAME


def test_every_answer_can_be_found_in_its_prompt(sets: dict[str, list[Record]]) -> None:
    module = load()
    for records in sets.values():
        for record in records:
            service, name = record["completion"].split(":")
            head, sentence = record["prompt"].split("\n", 1)
            assert f" {service} " in head
            assert module.can_be_answered(name, sentence)


def test_a_stem_joins_the_forms_of_a_word() -> None:
    stem = load().stem
    assert stem("Creates") == stem("create")
    assert stem("policies") == stem("Policy")
    assert stem("searches") == stem("Search")
    assert stem("access") == "access"
