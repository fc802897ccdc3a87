"""A model that somebody hands over: which of its files are used, and what is wrong with them.

Looks at names, sizes, JSON and headers of safetensors; runs nothing, and reads no weights. What
stands in a folder and what stands below a prefix of S3 are checked alike. Pickles and code are
refused, not left out: who brings them shall know that they are never used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError
from outcrop.models.files import read_json
from outcrop.models.operator import (
    CONTEXT_KEYS,
    KNOWN_ARCHITECTURES,
    LAYER_WEIGHT,
    PICKLE_SUFFIXES,
)
from outcrop.models.safetensors_header import TensorEntry

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIONAL = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json")
"""Brought along where they are there."""
SUFFIX = ".safetensors"
MAX_FILES = 2000
"""LIMIT: ours; the largest models that are published have 200 files."""
MAX_JSON_BYTES = 64 * 1024 * 1024
"""Of a file that is not weights. A tokenizer of 260,000 tokens has 35 MB."""
WEIGHT_DTYPES = ("F32", "F16", "BF16")
MAX_CONTEXT = 1 << 24
MAX_LAYERS = 1000
LAYER_KEYS = ("num_hidden_layers", "n_layer")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,186}\.safetensors")
_SHOWN = 5


@dataclass(frozen=True)
class Listed:
    """The files that are there, by their names below the place."""

    where: str
    """The place, as messages name it: an S3 prefix with its slash."""
    sizes: Mapping[str, int]

    def check_names(self) -> None:
        """Refuse pickles, code, and a place without what a model needs; subfolders do not count.

        Raises:
            ModelError: so it is; names the files.
        """
        names = sorted(self.sizes)
        weights = [name for name in names if name.endswith(SUFFIX)]
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        if pickles:
            rest = "" if weights else " There are no weights as safetensors beside them."
            raise ModelError(
                f"{self.where} holds {_some(pickles)}. Such files can run code when they are read; "
                f"only safetensors are used here. Take them out.{rest}"
            )
        code = [name for name in names if name.endswith(".py")]
        if code:
            raise ModelError(
                f"{self.where} brings code of its own ({_some(code)}), which is never run here. "
                "Take it out."
            )
        if not weights:
            raise ModelError(
                f"{self.where} has no weights: no file there ends in {SUFFIX}. "
                + self._what_is_there(names)
            )

    def check_model(self) -> None:
        """Refuse a place that lacks a file of a whole model, or whose files are too large.

        Raises:
            ModelError: so it is; names the file.
        """
        self.check_names()
        if CONFIG not in self.sizes and ADAPTER_CONFIG in self.sizes:
            raise ModelError(
                f"{self.where} holds an adapter ({ADAPTER_CONFIG}) and no {CONFIG}. Merge it into "
                "its base first, or hand it to CreateCustomModel."
            )
        for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG):
            if name not in self.sizes:
                remedy = (
                    " tokenizer.model alone is not read: save the tokenizer with transformers."
                    if name == TOKENIZER and "tokenizer.model" in self.sizes
                    else ""
                )
                raise ModelError(f"{self.where} has no {name}.{remedy}")
        if INDEX not in self.sizes and SINGLE not in self.sizes:
            raise ModelError(f"{self.where} has neither {SINGLE} nor {INDEX}.")
        self.check_sizes((CONFIG, TOKENIZER, TOKENIZER_CONFIG, *OPTIONAL, INDEX))

    def check_sizes(self, names: Iterable[str]) -> None:
        """Refuse files of these names that are larger than any such file.

        Raises:
            ModelError: so it is.
        """
        for name in names:
            if self.sizes.get(name, 0) > MAX_JSON_BYTES:
                raise ModelError(
                    f"{self.where}{name} has {self.sizes[name]:,} bytes; {MAX_JSON_BYTES:,} are "
                    "allowed."
                )

    def _what_is_there(self, names: list[str]) -> str:
        return f"There are {_some(names)}." if names else "There are no files."


def weight_files(listed: Listed, index: Any) -> tuple[str, ...]:
    """Return the names of the files that hold a model's weights.

    Args:
        index: content of the index; None where there is none.
    Raises:
        ModelError: it names files that are not there, or not in this place.
    """
    if index is None:
        return (SINGLE,)
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise ModelError(f"{listed.where}{INDEX} has no weight_map of names and files.")
    for tensor, name in table.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ModelError(
                f"{listed.where}{INDEX} says that the tensor {tensor[:80]} is in "
                f"{str(name)[:80]!r}. "
                f"It must be the name of a file beside the index that ends in {SUFFIX}, of up to "
                "200 letters, digits, dots, hyphens and underscores."
            )
    names = sorted(set(table.values()))
    missing = [name for name in names if name not in listed.sizes]
    if missing:
        raise ModelError(
            f"{listed.where} lacks {_some(missing)}, which {INDEX} names: {len(missing)} of "
            f"{len(names)} files of weights are missing."
        )
    return tuple(names)


def check_index(where: str, index: Any, tensors: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    """Refuse an index that says of a tensor what the files do not.

    Args:
        tensors: file -> its tensors.
    Raises:
        ModelError: names the tensor and the file.
    """
    if index is None:
        return
    for name, file in index["weight_map"].items():
        if name not in tensors[file]:
            raise ModelError(
                f"{where}{INDEX} says that the tensor {name[:80]} is in {file}, where it is not."
            )


def check_config(folder: Path, where: str) -> dict[str, Any]:
    """Return a model's config.json, once it names a known architecture and brings no code.

    Args:
        folder: where the files are now, tokenizer_config.json too.
        where: where they came from, for messages.
    Raises:
        ModelError: so it is not; names the member, its value and what is allowed.
    """
    config = _json(folder, CONFIG, where)
    for name in (CONFIG, TOKENIZER_CONFIG):
        if "auto_map" in _json(folder, name, where):
            raise ModelError(
                f"{where}{name} has auto_map: it brings code of its own, which is never run here. "
                "Take it out, where the model is one that transformers itself defines."
            )
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if first not in KNOWN_ARCHITECTURES:
        raise ModelError(
            f"{where}{CONFIG} names the architecture {str(first)[:80]}. Known are "
            f"{', '.join(KNOWN_ARCHITECTURES)}."
        )
    if "quantization_config" in config:
        raise ModelError(
            f"{where}{CONFIG} has quantization_config: its weights are quantized. Hand over the "
            f"unquantized ones, in {', '.join(WEIGHT_DTYPES)}."
        )
    _whole_number(config, ("vocab_size",), 1, 1 << 24, where)
    _whole_number(config, CONTEXT_KEYS, 1, MAX_CONTEXT, where)
    _whole_number(config, LAYER_KEYS, 1, MAX_LAYERS, where)
    return config


def check_weights(where: str, tensors: Mapping[str, Mapping[str, TensorEntry]]) -> str:
    """Refuse weights that are not numbers of a kind that can be computed with.

    Args:
        tensors: file -> its tensors.
    Returns:
        The dtype that most of the bytes have.
    Raises:
        ModelError: a tensor is in two files, or a matrix has another dtype; names both.
    """
    seen: dict[str, str] = {}
    bytes_of: dict[str, int] = {}
    for file, entries in tensors.items():
        for name, entry in entries.items():
            if name in seen:
                raise ModelError(f"The tensor {name[:80]} is in {where}{seen[name]} and in {file}.")
            seen[name] = file
            # Masks that some programs save along have a dtype of their own, and are left out.
            if name.endswith(".weight") and entry.dtype not in WEIGHT_DTYPES:
                raise ModelError(
                    f"{where}{file}: the tensor {name[:80]} has the dtype {entry.dtype}; allowed "
                    f"are {', '.join(WEIGHT_DTYPES)}."
                )
            bytes_of[entry.dtype] = bytes_of.get(entry.dtype, 0) + entry.num_bytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])


def linear_layers(tensors: Mapping[str, Mapping[str, TensorEntry]]) -> tuple[str, ...]:
    """Return the last part of the names of a model's linear layers, as `operator.linear_layers`."""
    found = set()
    for entries in tensors.values():
        for name, entry in entries.items():
            match = LAYER_WEIGHT.search(name)
            if match and len(entry.shape) == 2 and "norm" not in match[1]:
                found.add(match[1])
    return tuple(sorted(found))


def _json(folder: Path, name: str, where: str) -> dict[str, Any]:
    try:
        return read_json(folder / name)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder / name), f"{where}{name}")) from None
    except RecursionError:
        raise ModelError(f"{where}{name} is nested too deeply.") from None


def _whole_number(
    config: Mapping[str, Any], names: tuple[str, ...], least: int, most: int, where: str
) -> None:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ModelError(
                f"{where}{CONFIG}: {name} is {str(value)[:80]}; it must be a whole number from "
                f"{least:,} to {most:,}."
            )
        return
    raise ModelError(f"{where}{CONFIG} has no {' or '.join(names)}.")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
