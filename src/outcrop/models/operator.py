"""The models an operator added: entries in the data directory, one TOML file each.

An entry names a folder in Hugging Face's layout, which stays where it is, and records what was in
it when it was added: licence, digest, size of each file. The folder is checked before it is added,
and looked at again before it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError
from outcrop.models.files import read_json
from outcrop.settings import Settings

KNOWN_ARCHITECTURES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    *("PhiForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"),
    *("GraniteForCausalLM", "CohereForCausalLM", "Olmo2ForCausalLM", "SmolLM3ForCausalLM"),
    "Starcoder2ForCausalLM",
)
"""What is trained and served. Tests compare the losses, gradients and answers of each with those of
transformers' own definition."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MAX_HEADER_BYTES = 100_000_000
"""Source: the safetensors format's own limit."""
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")
"""What architectures call the number of tokens that they can hold; GPT-2 the second."""
LAYER_WEIGHT = re.compile(r"\.\d+\.(?:.+\.)?(\w+)\.weight")
"""A weight inside one of the numbered layers: the last part of its module's name."""
_REMEDY = "Put it back, or add the folder again."


@dataclass(frozen=True)
class OperatorEntry:
    """One file of `models/catalog/` in the data directory."""

    file: Path
    table: Mapping[str, Any]
    """The file's content, in the form of the catalogue's own files."""

    @property
    def key(self) -> str:
        """The key of its weights."""
        return str(self._weights["key"])

    @property
    def folder(self) -> Path:
        """Where its weights are."""
        return Path(str(self._weights["folder"]))

    @property
    def digest(self) -> str:
        """What `folder_digest` said when it was added."""
        return str(self._weights["digest"])

    @property
    def _weights(self) -> Mapping[str, Any]:
        weights = self.table.get("weights")
        if not isinstance(weights, dict) or not {"key", "folder", "digest"} <= set(weights):
            raise ModelError(
                f"{self.file}: weights must be a table with key, folder and digest. "
                "`outcrop models add` writes it."
            )
        return weights

    def check_unchanged(self) -> None:
        """Refuse a folder whose files are gone or have another size than when it was added.

        Raises:
            ModelError: so it is; the message names the file.
        """
        for name, size in self._weights.get("files", {}).items():
            file = self.folder / name
            if not file.is_file():
                raise ModelError(
                    f"{file} is gone; it had {size} bytes when the model was added. {_REMEDY}"
                )
            found = file.stat().st_size
            if found != size:
                raise ModelError(
                    f"{file} has {found} bytes now and had {size} when the model was added. "
                    f"{_REMEDY}"
                )


def catalog_folder(settings: Settings) -> Path:
    """Return the folder of the operator's entries."""
    return settings.data_dir / "models" / "catalog"


def operator_entries(settings: Settings) -> Iterator[OperatorEntry]:
    """Read the operator's entries in the order of their names.

    Raises:
        ModelError: a file is not TOML.
    """
    for file in sorted(catalog_folder(settings).glob("*.toml")):
        try:
            yield OperatorEntry(file, tomllib.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read as TOML: {error}") from error


def operator_entry(settings: Settings, key: str) -> OperatorEntry:
    """Return an entry that has the weights `key`.

    Raises:
        ModelError: there is none.
    """
    for entry in operator_entries(settings):
        if entry.key == key:
            return entry
    raise ModelError(f"No model of the catalogue has the weights {key}.")


def check_folder(folder: Path) -> list[Path]:
    """Check that a folder holds a model that can be used without running anything in it.

    Returns:
        The files that hold weights, sorted by name.
    Raises:
        ModelError: the folder is missing or incomplete, holds pickles or code, is quantized, or
            has an architecture that is not known here.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder.")
    config = read_json(folder / "config.json")
    _refuse_code(folder, config)
    architectures = config.get("architectures") or ["none"]
    if architectures[0] not in KNOWN_ARCHITECTURES:
        raise ModelError(
            f"{folder / 'config.json'} names the architecture {architectures[0]}. "
            f"Known are {', '.join(KNOWN_ARCHITECTURES)}."
        )
    if not isinstance(config.get("vocab_size"), int):
        raise ModelError(f"{folder / 'config.json'} has no whole number vocab_size.")
    context_tokens(folder, config)
    if "quantization_config" in config:
        raise ModelError(
            f"The weights in {folder} are quantized. Add the unquantized ones: float32, float16 or "
            "bfloat16."
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json.")
    read_json(folder / "tokenizer_config.json")
    return _weight_files(folder)


def context_tokens(folder: Path, config: Mapping[str, Any]) -> int:
    """Return how many tokens a model can hold, as its config.json says.

    Raises:
        ModelError: it does not say so.
    """
    for name in CONTEXT_KEYS:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ModelError(f"{folder / 'config.json'} has no whole number {' or '.join(CONTEXT_KEYS)}.")


def linear_layers(files: list[Path]) -> tuple[str, ...]:
    """Return the last part of the names of the linear layers that a model has in its layers.

    So the head is not one of them. Read from the names and shapes of the tensors: a matrix in a
    numbered layer is a linear layer's, but for norms that keep one for each head. In the order of
    their names.

    Args:
        files: of a folder that `check_folder` has found good.
    """
    found = set()
    for file in files:
        for name, entry in _header(file).items():
            match = LAYER_WEIGHT.search(name)
            is_matrix = name != "__metadata__" and len(entry["shape"]) == 2
            if match and is_matrix and "norm" not in match[1]:
                found.add(match[1])
    return tuple(sorted(found))


def folder_digest(files: list[Path]) -> str:
    """Return one SHA-256 for the weights: the file's own, or that of the list of all files'."""
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append((file.name, hashlib.file_digest(stream, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    text = "".join(f"{name} {digest}\n" for name, digest in digests)
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_code(folder: Path, config: Mapping[str, Any]) -> None:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise ModelError(
            f"{folder} holds {', '.join(pickles)}. Such files can run code when they are read; "
            "only safetensors are used here. Take them out of the folder."
        )
    code = [name for name in names if name.endswith(".py")]
    tokenizer = folder / "tokenizer_config.json"
    mapped = "auto_map" in config or (tokenizer.is_file() and "auto_map" in read_json(tokenizer))
    if code or mapped:
        shown = ", ".join(code) or "auto_map in its configuration"
        raise ModelError(f"{folder} brings code of its own ({shown}), which is never run here.")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(read_json(index).get("weight_map", {}).values())
        files = sorted(folder / name for name in named)
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise ModelError(
                f"{folder} has no {file.name}. Weights are read from safetensors only."
            )
        _check_safetensors(file)
    if not files:
        raise ModelError(f"{index} names no files.")
    return files


def _check_safetensors(file: Path) -> None:
    """Refuse a file that is cut off or is none. Source: the safetensors format."""
    size = file.stat().st_size
    try:
        table = _header(file)
        length = _header_length(file)
        ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ModelError(f"{file} is not a safetensors file.") from None
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise ModelError(f"{file} has {size} bytes where its header says {wanted}: it is damaged.")


def _header_length(file: Path) -> int:
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8), "little")


def _header(file: Path) -> dict[str, Any]:
    """Return the table at the start of a safetensors file.

    Raises:
        ValueError: there is none.
    """
    length = _header_length(file)
    with file.open("rb") as stream:
        stream.seek(8)
        text = stream.read(length) if length <= min(MAX_HEADER_BYTES, file.stat().st_size) else b""
    table: dict[str, Any] = json.loads(text)
    return table
