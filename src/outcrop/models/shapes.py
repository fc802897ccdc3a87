"""Whether the weights of a folder are those of the model that its config.json describes.

The model is built without memory for its numbers, by transformers' own definition; names and shapes
of its tensors are compared with those in the files. Then every number is looked at once: one that
is not finite would answer every prompt with nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from outcrop.errors import ModelError
from outcrop.models.safetensors_header import TensorEntry

_LEFT_OVER = re.compile(
    r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|position_ids)$"
)
"""Tensors that older programs save along, and that no model needs: rotations, masks, positions."""
_RENAMED = {"embed_out.weight": "lm_head.weight"}
"""How files have it, and how the model does: GPT-NeoX's head."""
_SHOWN = 120


def described_model(folder: Path, where: str) -> Any:
    """Return the model that a folder's config.json describes, without numbers.

    Args:
        where: what the folder is called in errors.
    Raises:
        ModelError: transformers cannot make a model of it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    loader: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = loader.from_config(config, trust_remote_code=False)
    except Exception as error:  # a configuration can be wrong in as many ways as it has members
        raise ModelError(
            f"{where}config.json describes no model: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    named = (config.architectures or [None])[0]
    if type(model).__name__ != named:
        raise ModelError(
            f"{where}config.json names the architecture {named}, and its model_type "
            f"{config.model_type} is a {type(model).__name__}."
        )
    return model


def check_shapes(model: Any, tensors: Mapping[str, Mapping[str, TensorEntry]], where: str) -> int:
    """Refuse weights that are not exactly those of a model.

    Args:
        model: as `described_model` returns it.
        tensors: file -> its tensors.
    Returns:
        How many numbers the model has.
    Raises:
        ModelError: a tensor has another shape, is missing, or belongs to no part of the model; the
            message names it with both shapes.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, int] = {}
    for file, entries in tensors.items():
        for given, entry in entries.items():
            names = (given, prefix + given, given.removeprefix(prefix), _RENAMED.get(given))
            name = next((one for one in names if one in wanted), None)
            if name is None:
                if _LEFT_OVER.search(given):
                    continue
                raise ModelError(
                    f"{where}{file}: the tensor {given[:_SHOWN]} of shape {list(entry.shape)} is "
                    "no part of the model that config.json describes."
                )
            if entry.shape != wanted[name]:
                raise ModelError(
                    f"{where}{file}: the tensor {given[:_SHOWN]} has the shape "
                    f"{list(entry.shape)}, and config.json says {list(wanted[name])}."
                )
            found[name] = found.get(name, 0) + 1
    twice = next((name for name, count in found.items() if count > 1), None)
    if twice is not None:
        raise ModelError(f"{where} has the tensor {twice} under two names.")
    missing = sorted(wanted.keys() - found.keys() - _tied(model, found))
    if missing:
        raise ModelError(
            f"{where} lacks {len(missing)} of the {len(wanted)} tensors of the model that "
            f"config.json describes. The first is {missing[0]} of shape "
            f"{list(wanted[missing[0]])}."
        )
    return sum(parameter.numel() for parameter in model.parameters())


def check_finite(
    folder: Path, files: Iterable[str], where: str, should_stop: Callable[[], None]
) -> None:
    """Refuse weights with a number that is none, or is infinite. One tensor is in memory at a time.

    Args:
        should_stop: called before each tensor; raises where the work is to end.
    Raises:
        ModelError: names file, tensor, place and number.
    """
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                should_stop()
                tensor = opened.get_tensor(name)
                if not tensor.is_floating_point():
                    continue
                odd = ~torch.isfinite(tensor.reshape(-1))
                if bool(odd.any()):
                    place = int(odd.nonzero()[0])
                    raise ModelError(
                        f"{where}{file}: the tensor {name[:_SHOWN]} holds "
                        f"{float(tensor.reshape(-1)[place])} at place {place:,}, and "
                        f"{int(odd.sum()):,} such numbers in all. Weights must be finite."
                    )


def _tied(model: Any, found: Mapping[str, int]) -> set[str]:
    """Return the tensors that a model takes from others that are there."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    keys = model._tied_weights_keys
    return set(keys or ())
