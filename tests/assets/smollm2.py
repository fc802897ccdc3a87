"""The shipped model, converted once on this machine for all tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import platformdirs

from outcrop.models.convert import CONVERTER_VERSION
from outcrop.models.weights import SHIPPED_KEY, convert_shipped, file_digest, shipped_gguf


@cache
def smollm2_folder() -> Path:
    """Return the folder of the converted model; it is shared, so nobody may write into it."""
    cache_folder = Path(platformdirs.user_cache_dir("outcrop-tests", appauthor=False))
    name = f"{SHIPPED_KEY}-{file_digest(shipped_gguf())[:16]}-{CONVERTER_VERSION}"
    folder = cache_folder / name
    convert_shipped(folder)
    return folder


def place_smollm2(data_dir: Path) -> Path:
    """Give a data directory the converted model, so that no service converts it again."""
    folder = data_dir / "models" / "base" / SHIPPED_KEY
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        folder.symlink_to(smollm2_folder(), target_is_directory=True)
    return folder
