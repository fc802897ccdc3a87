"""Turn the GGUF file of a Llama model into a folder in Hugging Face's layout.

Writes model.safetensors (bfloat16), config.json, generation_config.json, tokenizer.json and
tokenizer_config.json. Weights that were quantized come back dequantized: they are not the
published ones, and the caller records that. It knows one architecture (`llama`) and one tokenizer
(byte-level BPE as SmolLM2's), refuses all else, and needs numpy only.

Source: the GGUF specification (ggml, docs/gguf.md) for the keys; llama.cpp's convert_hf_to_gguf.py
for the names of tensors and for the order of the rows of the query and key projections.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from outcrop.errors import ModelError

CONVERTER_VERSION = 2
"""Raised when the same file would be turned into other bytes."""

CONTROL_TOKEN = 3
"""gguf's TokenType.CONTROL: a token that text never spells."""

END_OF_TEXT = "<|endoftext|>"

_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_SMOLLM_PRE_TOKENIZER = {
    # Source: tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct: each digit is a word of its
    # own, then GPT-2's splitting into bytes.
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


@dataclass(frozen=True)
class Converted:
    """What the file's header says of itself, for the record that goes with the folder."""

    name: str
    organization: str
    license: str
    quantization: str
    """The types of its matrices, most frequent first, such as "Q4_1, token embeddings Q8_0"."""
    num_parameters: int
    digest: str
    """SHA-256 of model.safetensors, in hexadecimal."""


def convert_gguf(file: Path, folder: Path) -> Converted:
    """Convert `file` into `folder`, which must exist and be empty.

    Raises:
        ModelError: the file is no GGUF, or holds an architecture or a tokenizer that is not known
            here.
    """
    try:
        reader = GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{file} cannot be read as GGUF: {error}") from error
    header = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    _refuse_unknown(file, header)
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    digest = _write_weights(reader, header, folder / "model.safetensors")
    _write_json(folder / "config.json", _model_config(header, tied))
    _write_json(folder / "generation_config.json", _generation_config(header))
    _write_json(folder / "tokenizer.json", _tokenizer(header))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(header))
    return Converted(
        name=str(header.get("general.name", file.stem)),
        organization=str(header.get("general.organization", "unknown")),
        license=str(header.get("general.license", "unknown")),
        quantization=_quantization(reader),
        num_parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        digest=digest,
    )


def _refuse_unknown(file: Path, header: Mapping[str, Any]) -> None:
    known = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    for key, value in known.items():
        if header.get(key) != value:
            raise ModelError(
                f"{file} has {key} = {header.get(key)!r}. Only {value!r} is converted here; add "
                "the model as a folder in Hugging Face's layout instead."
            )


def _write_weights(reader: GGUFReader, header: Mapping[str, Any], file: Path) -> str:
    """Write one tensor after the other, so that the model is never in memory as a whole.

    Returns:
        The SHA-256 of the file.
    Source: the safetensors format: length of the header in 8 bytes, the header as JSON, the data.
    """
    num_heads = int(header["llama.attention.head_count"])
    num_kv_heads = int(header.get("llama.attention.head_count_kv", num_heads))
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    tensors = sorted((_tensor_name(tensor.name), tensor) for tensor in reader.tensors)
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        end = offset + 2 * int(tensor.n_elements)
        table[name] = {"dtype": "BF16", "shape": _shape(tensor), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for part in _parts(len(text).to_bytes(8, "little") + text, tensors, heads):
            stream.write(part)
            digest.update(part)
    return digest.hexdigest()


def _parts(
    start: bytes, tensors: Sequence[tuple[str, ReaderTensor]], heads: Mapping[str, int]
) -> Iterator[bytes | memoryview]:
    yield start
    for _, tensor in tensors:
        values = _dequantize(tensor).reshape(_shape(tensor))
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = _unpermute(values, heads[part])
        yield bfloat16(values).data


def _dequantize(tensor: ReaderTensor) -> npt.NDArray[np.float32]:
    """Return the values of a tensor, in the file's order.

    gguf works on 16 rows at a time, which is slow for short ones; blocks follow each other without
    a gap, so rows can be taken together.
    """
    data = tensor.data
    if data.ndim == 2:
        together = next(count for count in (64, 32, 16, 8, 4, 2, 1) if len(data) % count == 0)
        data = data.reshape(len(data) // together, -1)
    values: npt.NDArray[np.float32] = dequantize(data, tensor.tensor_type)
    return values.astype(np.float32, copy=False)


def _shape(tensor: ReaderTensor) -> list[int]:
    """Return the sizes in the order of the rows first; GGUF writes the innermost first."""
    return [int(size) for size in reversed(tensor.shape)]


def _tensor_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    block, layer, part = stem.split(".")
    if block != "blk" or part not in _TENSOR_NAMES:
        raise ModelError(f"The GGUF holds a tensor {name} that a Llama model does not have.")
    return f"model.layers.{layer}.{_TENSOR_NAMES[part]}.{kind}"


def _unpermute(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's order of the rows of a query or key projection.

    Hugging Face rotates the first half of a head against the second; llama.cpp rotates neighbours.
    """
    rows, columns = values.shape
    halves = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round finite values to bfloat16, ties to even, as torch does; returns the upper halves."""
    bits = np.array(values, dtype="<f4", order="C").view("<u4")
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    bits += odd
    return np.ascontiguousarray(bits.view("<u2")[..., 1::2])


def _quantization(reader: GGUFReader) -> str:
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2)
    (most, _), *_ = types.most_common(1)
    words = [most]
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight" and tensor.tensor_type.name != most:
            words.append(f"token embeddings {tensor.tensor_type.name}")
    return ", ".join(words)


def _model_config(header: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    num_heads = int(header["llama.attention.head_count"])
    width = int(header["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(header["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(header["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(header["tokenizer.ggml.padding_token_id"]),
        "head_dim": int(header.get("llama.rope.dimension_count", width // num_heads)),
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 1.0 / float(np.sqrt(width)),
        "intermediate_size": int(header["llama.feed_forward_length"]),
        "max_position_embeddings": int(header["llama.context_length"]),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": int(header["llama.block_count"]),
        "num_key_value_heads": int(header.get("llama.attention.head_count_kv", num_heads)),
        # The header holds it as float32: 9.99999974e-06. The published value is the short one.
        "rms_norm_eps": float(f"{header['llama.attention.layer_norm_rms_epsilon']:.3g}"),
        "rope_theta": float(header["llama.rope.freq_base"]),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": int(header.get("llama.vocab_size", len(header["tokenizer.ggml.tokens"]))),
    }


def _generation_config(header: Mapping[str, Any]) -> dict[str, Any]:
    ends = [int(header["tokenizer.ggml.eos_token_id"])]
    # What ended a document in pre-training ends an answer too; llama.cpp stops there as well.
    ends += [place for place, token in _control_tokens(header).items() if token == END_OF_TEXT]
    return {
        "bos_token_id": int(header["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": list(dict.fromkeys(ends)),
        "pad_token_id": int(header["tokenizer.ggml.padding_token_id"]),
    }


def _control_tokens(header: Mapping[str, Any]) -> dict[int, str]:
    tokens, types = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    return {
        place: token
        for place, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == CONTROL_TOKEN
    }


def _tokenizer(header: Mapping[str, Any]) -> dict[str, Any]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": place, "content": token, **flags, "special": True}
            for place, token in _control_tokens(header).items()
        ],
        "normalizer": None,
        "pre_tokenizer": _SMOLLM_PRE_TOKENIZER,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: place for place, token in enumerate(header["tokenizer.ggml.tokens"])},
            "merges": [merge.split(" ") for merge in header["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(header: Mapping[str, Any]) -> dict[str, Any]:
    tokens = header["tokenizer.ggml.tokens"]

    def token(kind: str) -> str:
        return str(tokens[int(header[f"tokenizer.ggml.{kind}_token_id"])])

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(header["llama.context_length"]),
        "chat_template": header["tokenizer.chat_template"],
    }


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    indent = None if file.name == "tokenizer.json" else 2
    file.write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8")
