"""Turn the tensors, the shape and the tokenizer of a model into one GGUF file.

The other way round is `convert.py`. It knows Llama, Mistral, Qwen 2 and Qwen 3, and the byte-level
tokenizers whose way of cutting text llama.cpp has a name for; all else is refused by name, because
a file that loads and answers otherwise is worse than none. Needs numpy only: tensors come one at a
time, so that no more than one is in memory in its new form.

Source: the GGUF specification (ggml, docs/gguf.md) for the keys; llama.cpp's convert_hf_to_gguf.py
for the names of tensors and the order of the rows of the query and key projections;
llama-vocab.cpp for how text is cut under each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, TokenType
from gguf.quants import quantize

from outcrop.errors import ModelError
from outcrop.models.convert import bfloat16
from outcrop.models.exported import BF16, F16, F32, Q8_0
from outcrop.models.files import read_json
from outcrop.models.tokenizer import Tokenizer

_FILE_TYPES = {
    F32: LlamaFileType.ALL_F32,
    F16: LlamaFileType.MOSTLY_F16,
    BF16: LlamaFileType.MOSTLY_BF16,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK = 32
"""Numbers that share a scale in Q8_0; a row that is no multiple of it stays in float16."""
_QUANTIZATION_VERSION = 2
"""Of the layout of quantized blocks. Source: ggml.h, GGML_QNT_VERSION."""

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""config.json's model_type -> general.architecture."""
_TOP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

_LLAMA3_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_CUTS = _LLAMA3_CUTS.replace(r"\p{N}{1,3}", r"\p{N}")

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Described:
    """What the file says of the model, for whoever finds it."""

    name: str
    description: str
    license: str


def write_gguf(
    file: Path,
    config: Mapping[str, Any],
    tokenizer_folder: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], Callable[[], Array]]],
    data_type: str,
    described: Described,
    *,
    template: str,
    rope_factors: Array | None = None,
) -> None:
    """Write the file. The same model gives the same bytes.

    Args:
        config: content of config.json.
        tokenizer_folder: has tokenizer.json.
        tensors: name as transformers has it, shape with rows first, and what returns the float32
            values; called once each, in order.
        data_type: what matrices are held in, one of `DATA_TYPES`; vectors are always float32, as
            llama.cpp wants them.
        template: chat template, for a folder that has none.
        rope_factors: what the wave lengths of the rotation are multiplied by, where not one.
    Raises:
        ModelError: llama.cpp would not compute, or not tokenize, as this model does.
    """
    architecture = check_gguf(config, tokenizer_folder)
    heads = int(config["num_attention_heads"])
    turned = {"attn_q": heads, "attn_k": int(config.get("num_key_value_heads") or heads)}
    writer = GGUFWriter(file, architecture)
    _write_header(writer, config, described, data_type)
    _write_tokenizer(writer, config, tokenizer_folder, template)
    listed = [(_tensor_name(name), shape, read) for name, shape, read in tensors]
    if rope_factors is not None:
        factors = rope_factors
        listed.append(("rope_freqs.weight", factors.shape, lambda: factors))
    forms = [_form(shape, data_type) for _, shape, _ in listed]
    for (name, shape, _), form in zip(listed, forms, strict=True):
        _announce(writer, name, shape, form)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, _, read), form in zip(listed, forms, strict=True):
            values = read()
            part = name.split(".")[-2]
            if part in turned and architecture == "llama":
                values = _permute(values, turned[part])
            writer.write_tensor_data(_encode(name, values, form))
    finally:
        writer.close()


def check_gguf(config: Mapping[str, Any], tokenizer_folder: Path) -> str:
    """Return the name of the architecture in GGUF.

    Raises:
        ModelError: as `write_gguf`, known before anything is computed.
    """
    kind = str(config.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise _refused(f"the architecture is {kind}; {', '.join(_ARCHITECTURES)} can be")
    layers = set(config.get("layer_types") or ())
    if layers - {"full_attention"} or (kind == "mistral" and config.get("sliding_window")):
        raise _refused("some layers look at a sliding window only")
    if config.get("hidden_act") != "silu":
        raise _refused(f"hidden_act is {config.get('hidden_act')}; silu can be")
    rope = rope_type(config)
    if rope not in ("default", "linear", "llama3"):
        raise _refused(f"the rotation is of type {rope}; default, linear and llama3 can be")
    _pre_tokenizer(read_json(tokenizer_folder / "tokenizer.json"))
    return _ARCHITECTURES[kind]


def rope_type(config: Mapping[str, Any]) -> str:
    """Return how the rotation of positions is stretched; "default" where it is not."""
    rope = _rope(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found


def _refused(why: str) -> ModelError:
    return ModelError(
        f"This model cannot be written as GGUF here: {why}. Export it as merged; other converters "
        "read that."
    )


def _write_header(
    writer: GGUFWriter, config: Mapping[str, Any], described: Described, data_type: str
) -> None:
    heads = int(config["num_attention_heads"])
    width = int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or width // heads)
    rope = _rope(config)
    writer.add_type("model")
    writer.add_name(described.name)
    writer.add_description(described.description)
    writer.add_license(described.license)
    writer.add_file_type(_FILE_TYPES[data_type])
    if data_type == Q8_0:
        writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(width)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    if rope_type(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _write_tokenizer(
    writer: GGUFWriter, config: Mapping[str, Any], folder: Path, template: str
) -> None:
    described = read_json(folder / "tokenizer.json")
    tokenizer = Tokenizer(folder)
    vocabulary: dict[int, str] = {
        int(place): token for token, place in described["model"]["vocab"].items()
    }
    kinds = dict.fromkeys(vocabulary, TokenType.NORMAL)
    for token in described.get("added_tokens") or ():
        place = int(token["id"])
        vocabulary[place] = str(token["content"])
        kinds[place] = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
    places = range(int(config["vocab_size"]))
    if vocabulary and max(vocabulary) >= len(places):
        raise _refused(f"its tokenizer has more tokens than its vocabulary of {len(places)}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(described))
    # A model may have more places than tokens; llama.cpp wants a name for each.
    writer.add_token_list([vocabulary.get(place, f"[PAD{place}]") for place in places])
    writer.add_token_types([kinds.get(place, TokenType.UNUSED) for place in places])
    writer.add_token_merges(
        [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in described["model"].get("merges") or ()
        ]
    )
    named = {
        "bos_token": writer.add_bos_token_id,
        "eos_token": writer.add_eos_token_id,
        "pad_token": writer.add_pad_token_id,
        "unk_token": writer.add_unk_token_id,
    }
    for role, add in named.items():
        token_id = tokenizer.token_id(tokenizer.named_tokens.get(role, ""))
        if token_id is not None:
            add(token_id)
    # Said in any case: what llama.cpp assumes of a file that is silent depends on its version.
    writer.add_add_bos_token(bool(tokenizer.document_start))
    writer.add_chat_template(tokenizer.chat_template or template)


def _pre_tokenizer(described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text into words.

    Raises:
        ModelError: it has none, or the vocabulary is not byte-level BPE.
    """
    model = described.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise _refused("its tokenizer is not byte-level BPE")
    merges_whole_words = bool(model.get("ignore_merges"))
    normalizer = (described.get("normalizer") or {}).get("type")
    form = described.get("pre_tokenizer") or {}
    parts: list[Any] = form.get("pretokenizers", []) if form.get("type") == "Sequence" else [form]
    kinds = [part.get("type") for part in parts]
    last = parts[-1] if parts else {}
    splits = last.get("use_regex", True)
    if not kinds or kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        raise _refused("its tokenizer is not byte-level BPE")
    name = None
    if normalizer is None and not merges_whole_words and splits:
        if kinds == ["ByteLevel"]:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not splits:
        pattern = (parts[0].get("pattern") or {}).get("Regex")
        isolates = parts[0].get("behavior") == "Isolated" and not parts[0].get("invert")
        if isolates and (pattern, merges_whole_words, normalizer) == (_LLAMA3_CUTS, True, None):
            name = "llama-bpe"
        elif isolates and pattern == _QWEN2_CUTS and not merges_whole_words:
            # LIMIT: Qwen's tokenizer brings text into the form NFC first, llama.cpp does not.
            name = "qwen2" if normalizer in (None, "NFC") else None
    if name is None:
        raise _refused("llama.cpp has no name here for how its tokenizer cuts text into words")
    return name


def _tensor_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    found = _LAYER.fullmatch(stem)
    if found is None or found[2] not in _LAYER_NAMES:
        raise _refused(f"it has a tensor {name}, for which GGUF has no name here")
    return f"blk.{found[1]}.{_LAYER_NAMES[found[2]]}.{kind}"


def _form(shape: tuple[int, ...], data_type: str) -> str:
    if len(shape) < 2:
        return F32
    return F16 if data_type == Q8_0 and shape[-1] % _BLOCK else data_type


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], form: str) -> None:
    if form in (F32, F16):
        dtype = np.dtype(np.float32 if form == F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    row = shape[-1] * 2 if form == BF16 else shape[-1] // _BLOCK * (_BLOCK + 2)
    in_bytes = (*shape[:-1], row)
    kind = GGMLQuantizationType[form.upper()]
    writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), kind)


def _encode(name: str, values: Array, form: str) -> npt.NDArray[Any]:
    if form == F32:
        return values
    if form == F16:
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise _refused(f"{name} has numbers that float16 cannot hold; take f32, bf16 or q8_0")
        return halves
    if form == BF16:
        return bfloat16(values).view(np.uint8)
    found: npt.NDArray[Any] = quantize(values, GGMLQuantizationType[form.upper()])
    return found


def _permute(values: Array, num_heads: int) -> Array:
    """Bring the rows of a query or key projection into llama.cpp's order.

    Hugging Face rotates the first half of a head against the second; llama.cpp rotates neighbours.
    """
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
