"""What the chat template of a folder is, and whether it takes tools.

Reads text and runs none of it, so that the gateway can ask. The forms in which a model writes a
call of a tool are those that its template shows to it.

Source: the chat templates of Qwen2.5, Qwen3 and Hermes 2 Pro; of Llama 3.1 and 3.2; of
Mistral-7B-Instruct-v0.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError
from outcrop.ids import is_imported
from outcrop.models.files import read_json
from outcrop.models.imported import imported_folder
from outcrop.models.operator import operator_entries
from outcrop.settings import Settings

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
_BLOCK = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes that it wants tools to be called."""

    name: str
    marker: str
    """Begins a call, or a list of calls."""
    end: str
    """Ends it; "" where the JSON ends it."""
    arguments: str
    """Key of what a tool is given; the other key is `name`."""
    is_bare: bool
    """Whether an answer that is nothing but JSON is a call as well."""
    starts: tuple[str, str]
    """What stands before the name of a tool where one must be called, and between the name and
    what it is given. No blank at the end: it belongs to the token that follows."""


HERMES = ToolFormat(
    *("hermes", "<tool_call>", "</tool_call>", "arguments", False),
    ('<tool_call>\n{"name": "', '", "arguments":'),
)
LLAMA = ToolFormat(
    *("llama", "<|python_tag|>", "", "parameters", True), ('{"name": "', '", "parameters":')
)
MISTRAL = ToolFormat(
    *("mistral", "[TOOL_CALLS]", "", "arguments", False),
    ('[TOOL_CALLS] [{"name": "', '", "arguments":'),
)


@dataclass(frozen=True)
class ToolSupport:
    """Whether a model can be told of tools."""

    takes_tools: bool
    """Whether its template shows them."""
    format: ToolFormat | None = None
    """How calls are written; None where there are no tools, or the form is not known here."""


NO_TOOLS = ToolSupport(False)


def chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the Jinja source that turns messages into text; None where the folder has none.

    Args:
        config: content of the folder's tokenizer_config.json.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template if isinstance(template, str) else None


def tool_support(template: str | None) -> ToolSupport:
    """Return what a chat template makes of tools."""
    if template is None or not any(_TOOLS.search(block) for block in _BLOCK.findall(template)):
        return NO_TOOLS
    return ToolSupport(True, _format(template))


def tool_support_of(settings: Settings, weights_key: str) -> ToolSupport:
    """Return what the model with these weights makes of tools.

    The template of an operator's folder is read again when its file has changed. The shipped model
    has none that takes tools, so nothing is converted to look at it.
    """
    try:
        if is_imported(weights_key):
            folder = imported_folder(settings, weights_key)
        else:
            folder = next(
                entry.folder for entry in operator_entries(settings) if entry.key == weights_key
            )
        return _read(folder, _stamp(folder / TEMPLATE_FILE), _stamp(folder / CONFIG_FILE))
    except (StopIteration, ModelError, OSError):
        # A folder that is gone is the model server's to report, with what was in it.
        return NO_TOOLS


def _format(template: str) -> ToolFormat | None:
    if "<tool_call>" in template:
        # Others write XML between the same marks.
        is_xml = "<function=" in template or "<arg_key>" in template
        return None if is_xml else HERMES
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    if '"parameters": ' in template and ("<|python_tag|>" in template or "ipython" in template):
        return LLAMA
    return None


@lru_cache(maxsize=64)
def _read(folder: Path, template: int | None, config: int | None) -> ToolSupport:
    settings = {} if config is None else read_json(folder / CONFIG_FILE)
    return tool_support(chat_template(folder, settings))


def _stamp(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.is_file() else None
