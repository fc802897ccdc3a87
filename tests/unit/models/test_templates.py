"""Whether a chat template takes tools, and how its model calls them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.assets.smollm2 import smollm2_folder
from tests.unit.serve import tool_templates

from outcrop.models import templates
from outcrop.models.catalog import shipped_models
from outcrop.models.operator import catalog_folder
from outcrop.models.templates import NO_TOOLS, tool_support, tool_support_of
from outcrop.settings import Settings


@pytest.mark.parametrize("name", tool_templates.BY_NAME)
def test_the_form_of_calls_is_read_from_the_template(name: str) -> None:
    support = tool_support(tool_templates.BY_NAME[name])
    assert support.takes_tools
    assert support.format is not None
    assert support.format.name == name


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "My tools: {{ messages[0].content }}",
        "{{ messages[0].my_tools_list }}",
    ],
)
def test_a_template_that_reads_no_tools_takes_none(template: str | None) -> None:
    assert tool_support(template) == NO_TOOLS


@pytest.mark.parametrize(
    "calls",
    [
        "<tool_call><function=NAME></function></tool_call>",
        "<tool_call>NAME<arg_key>KEY</arg_key></tool_call>",
        "[TOOL_CALLS]NAME[ARGS]{}",
        "call NAME",
    ],
)
def test_a_form_of_calls_that_is_not_known_is_told_apart_from_none(calls: str) -> None:
    support = tool_support("{% for tool in tools %}{{ tool }}{% endfor %}" + calls)
    assert support.takes_tools
    assert support.format is None


def add_entry(settings: Settings, folder: Path, key: str = "mine") -> None:
    catalog_folder(settings).mkdir(parents=True)
    text = f'[weights]\nkey = "{key}"\nfolder = "{folder}"\ndigest = "0"\n'
    (catalog_folder(settings) / "mine.toml").write_text(text, encoding="utf-8")


def test_a_template_is_read_again_when_its_file_has_changed(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    folder = tmp_path / "model"
    folder.mkdir()
    add_entry(settings, folder)
    assert tool_support_of(settings, "mine") == NO_TOOLS
    tool_templates.give_template(folder, tool_templates.HERMES)
    assert tool_support_of(settings, "mine").format == templates.HERMES
    file = folder / "chat_template.jinja"
    file.write_text(tool_templates.MISTRAL, encoding="utf-8")
    assert tool_support_of(settings, "mine").format == templates.MISTRAL
    file.write_text("{{ messages[0].content }}", encoding="utf-8")
    os.utime(file, ns=(1, 1))
    assert tool_support_of(settings, "mine") == NO_TOOLS


def test_a_folder_that_is_gone_or_unreadable_takes_no_tools(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    add_entry(settings, tmp_path / "gone")
    assert tool_support_of(settings, "mine") == NO_TOOLS
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    assert tool_support_of(settings, "mine") == NO_TOOLS
    assert tool_support_of(settings, "other") == NO_TOOLS


def test_the_shipped_model_takes_no_tools() -> None:
    folder = smollm2_folder()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = templates.chat_template(folder, config)
    assert template
    assert tool_support(template) == NO_TOOLS
    settings = Settings(data_dir=folder)
    assert tool_support_of(settings, shipped_models()[0].weights) == NO_TOOLS
