"""The reference pages say what the code says: settings, errors, operations, commands."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path

import pytest

from outcrop import errors
from outcrop.api.operations import OPERATIONS
from outcrop.api.s3_actions import ACTIONS
from outcrop.cli import parser
from outcrop.data.defects import KINDS, SEVERITIES
from outcrop.data.formats import DATA_KINDS, FORMS
from outcrop.models.catalog import (
    CONTINUED_PRE_TRAINING,
    OWN_HYPER_PARAMETERS,
    BaseModel,
    LoraConfig,
    shipped_models,
)
from outcrop.settings import ENVIRONMENT_PREFIX, setting_fields
from outcrop.train.own_parameters import OWN_NAMES
from outcrop.train.plan import canonical
from outcrop.wire.model import service_model

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(name: str) -> list[list[str]]:
    """Return the cells of every table row of a page."""
    lines = [line for line in page(name).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_setting_is_documented_with_its_help_text_and_default() -> None:
    documented = {cells[0].strip("`"): cells for cells in rows("settings.md")}
    for item in setting_fields():
        assert item.name in documented, f"docs/settings.md has no row for {item.name}"
        _, variable, default, meaning = documented[item.name]
        assert variable == f"`{ENVIRONMENT_PREFIX}{item.name.upper()}`"
        assert meaning.rstrip("| ") == item.metadata["help"]
        if item.default is not MISSING and item.default != "":
            assert f"`{item.default}`" in default
        assert ("secret" in default) is item.metadata["secret"]


def test_no_setting_is_documented_that_does_not_exist() -> None:
    names = {item.name for item in setting_fields()}
    documented = {cells[0].strip("`") for cells in rows("settings.md")} - {"Setting"}
    assert documented == names


def error_classes() -> list[type[object]]:
    found = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
    return [value for value in found if value.__module__ == errors.__name__]


def test_every_error_is_documented_with_its_status() -> None:
    documented = {cells[0].strip("`"): cells for cells in rows("errors.md")}
    for error in error_classes():
        assert error.__name__ in documented, f"docs/errors.md has no row for {error.__name__}"
        if issubclass(error, errors.ApiError) and error is not errors.ApiError:
            assert documented[error.__name__][1] == str(error.http_status)


def test_every_operation_is_documented_under_its_service() -> None:
    documented = {(cells[0], cells[1].strip("`")) for cells in rows("operations.md")}
    for service, name in OPERATIONS:
        assert (f"`{service}`", name) in documented, f"docs/operations.md lacks {service} {name}"


def test_no_operation_is_documented_that_is_not_there() -> None:
    known = {f"`{service}`" for service, _ in OPERATIONS}
    for cells in rows("operations.md"):
        if cells[0] in known:
            assert (cells[0].strip("`"), cells[1].strip("`")) in OPERATIONS


def test_every_operation_of_both_services_has_its_state_and_a_reason() -> None:
    documented = {
        (cells[0].strip("`"), cells[1].strip("`")): cells[2:] for cells in rows("coverage.md")
    }
    documented.pop(("Service", "Operation"))
    modelled = {
        (service, name)
        for service in ("bedrock", "bedrock-runtime")
        for name in service_model(service).operation_names
    }
    assert set(documented) == modelled, (
        "docs/coverage.md has a row for each operation, and no other"
    )
    assert len(rows("coverage.md")) == len(modelled) + 1, "each once"
    for key, (state, reason) in documented.items():
        assert state == ("built" if key in OPERATIONS else "501"), f"{key} in docs/coverage.md"
        assert len(reason.rstrip("| ")) > 8, key


def test_every_member_of_our_own_operations_is_documented() -> None:
    text = page("operations.md")
    model = service_model("outcrop")
    for name in model.operation_names:
        operation = model.operation_model(name)
        for shape in (operation.input_shape, operation.output_shape):
            assert shape is not None
            for member in shape.members:
                assert f"`{member}`" in text, f"docs/operations.md lacks {name}.{member}"


@pytest.mark.parametrize("operation", sorted(ACTIONS))
def test_every_offered_s3_operation_is_documented(operation: str) -> None:
    assert re.search(rf"\b{operation}\b", page("operations.md"))


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from commands(subparser)


def sections(name: str) -> dict[str, str]:
    """Return the text below each `## ...` heading of a page, by what it names in backticks."""
    parts = re.split(r"^## `([^`]+)`.*$", page(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_and_flag_is_documented() -> None:
    documented = sections("cli.md")
    for command in commands(parser()):
        assert command.prog in documented, f"docs/cli.md has no section `{command.prog}`"
        for action in command._actions:
            if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                continue
            for name in action.option_strings or [str(action.metavar or action.dest).upper()]:
                assert f"`{name}" in documented[command.prog], (
                    f"docs/cli.md, {command.prog}, lacks {name}"
                )


def test_no_command_or_flag_is_documented_that_does_not_exist() -> None:
    by_name = {command.prog: command for command in commands(parser())}
    for name, text in sections("cli.md").items():
        assert name in by_name
        known = {flag for action in by_name[name]._actions for flag in action.option_strings}
        for flag in re.findall(r"^\| `(--[a-z-]+)", text, flags=re.MULTILINE):
            assert flag in known, f"docs/cli.md documents {name} {flag}"


def test_every_model_id_is_documented() -> None:
    text = page("data-formats.md")
    for model in shipped_models():
        assert f"`{model.model_id}`" in text, f"docs/data-formats.md lacks {model.model_id}"


@pytest.mark.parametrize("family", sorted({model.family for model in shipped_models()}))
def test_every_hyperparameter_of_a_family_is_documented(family: str) -> None:
    documented = [cells for cells in rows("data-formats.md") if cells[0] == f"`{family}`"]
    names = {
        row.name
        for model in shipped_models()
        if model.family == family
        for row in model.hyper_parameters
    }
    assert {cells[1].strip("`") for cells in documented if len(cells) > 4} == names


def test_every_hyperparameter_of_our_own_is_documented_with_its_bounds_and_default() -> None:
    documented = {cells[0].strip("`"): cells for cells in rows("data-formats.md")}
    assert set(OWN_NAMES) <= set(documented)
    for row in OWN_HYPER_PARAMETERS:
        bounds = [canonical(bound, row.kind) for bound in (row.minimum, row.maximum)]
        assert documented[row.name][1] == f"{row.kind}, {bounds[0]} to {bounds[1]}"
    lora = LoraConfig()
    assert documented["adapterRank"][2] == str(lora.rank)
    assert (documented["adapterAlpha"][2], lora.scaling) == ("twice `adapterRank`", 2)
    assert documented["method"][1:3] == ["`adapter`, `full`", f"`{shipped_models()[0].method}`"]
    for layer in lora.targets:
        assert f"`{layer}`" in documented["adapterTargets"][1]


@pytest.mark.parametrize("model", shipped_models(), ids=lambda model: str(model.model_id))
def test_the_families_for_continued_pre_training_are_documented(model: BaseModel) -> None:
    text = page("data-formats.md")
    sentence = text.split("Continued pre-training is offered for")[1].split(".")[0]
    offered = CONTINUED_PRE_TRAINING in model.customizations
    named = f"`{model.family}`" in sentence and "premier" not in model.model_id
    assert named == offered
    if offered:
        assert f"{model.pre_training_records.max_total:,} documents" in sentence


def test_every_code_of_a_defect_is_documented_under_its_severity_with_what_to_do() -> None:
    text = page("data-defects.md")
    documented = set()
    for severity in SEVERITIES:
        section = text.split(f"\n### {severity}\n")[1].split("\n##")[0]
        cells = [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in section.splitlines()
            if line.startswith("| `")
        ]
        for code, summary, example, remedy in cells:
            kind = KINDS[code.strip("`")]
            assert kind.severity is severity, f"{code} is a {kind.severity}"
            assert (summary.replace("`", ""), remedy.rstrip("| ")) == (kind.summary, kind.remedy)
            assert example
            documented.add(kind.code)
    assert documented == set(KINDS)


def test_every_format_of_data_is_documented() -> None:
    text = page("data-formats.md")
    assert [name for name in FORMS if f"`{name}`" not in text] == []
    assert [kind for kind in DATA_KINDS if f"`{kind}`" not in text and kind != "FINE_TUNING"] == []
