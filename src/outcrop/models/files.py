"""The JSON files of a model's folder, read with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a file holds.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object.")
    return value
