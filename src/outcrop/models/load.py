"""Turn a folder of weights into a model in memory that is ready to answer or to be trained.

The folder is in Hugging Face's layout (config.json and safetensors). Nothing in it is executed and
nothing is fetched: no remote code, no pickle, no look-up on a hub. The model comes back frozen and
in evaluation mode; who trains it says which parameters may change.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from outcrop.errors import ModelError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def has_fast_bfloat16() -> bool:
    """Return whether matrices multiply faster in bfloat16 than in float32 on this machine.

    Source: oneDNN uses the instructions avx512_bf16, amx_bf16 (x86) and bf16 (Arm) where it says
    that bfloat16 is supported; without them it converts, which is slower than float32.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    # avx512 without its bf16 extension also counts as supported there, but only emulates.
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype() -> torch.dtype:
    """Return the type that weights are held and multiplied in on this machine."""
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


def load_base(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> LlamaForCausalLM:
    """Load the model of a folder, frozen and in evaluation mode.

    Args:
        folder: a folder with config.json and the weights as safetensors.
        dtype: the type to hold the weights in; None takes `compute_dtype()`.
        device: where to hold them; None means the CPU.
    Raises:
        ModelError: the folder is not there, is incomplete, or is not a causal language model that
            the installed transformers knows.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: config.json is missing.")
    # Only who needs the model pays for this import, which takes about 2 seconds.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=dtype or compute_dtype(),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"The model in {folder} is incomplete: {len(missing)} tensors are missing, "
            f"the first is {missing[0]}."
        )
    model.requires_grad_(False)
    model.eval()
    if device is not None:
        model.to(device)
    loaded: LlamaForCausalLM = model
    return loaded
