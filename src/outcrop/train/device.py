"""Where a run computes: on a GPU if there is one and the operator does not say otherwise.

One device a run. Several GPUs would be several processes whose gradients are added up where the
rows' are now (train/gradients.py); nothing in the passes knows how many there are.
"""

from __future__ import annotations

import torch

from outcrop.data.pack import MAX_MICRO_BATCH_TOKENS
from outcrop.errors import TrainingError
from outcrop.models.catalog import LoraConfig
from outcrop.models.load import compute_dtype
from outcrop.models.passes import HEAD_CHUNK_TOKENS
from outcrop.train.memory import peak_memory_bytes
from outcrop.train.plan import TrainPlan
from outcrop.train.portions import Portions
from outcrop.train.prediction import PROCESS_BYTES, ModelShape, predict_memory

GPU_TOKENS = 16384
"""Of a micro-batch on a GPU at most: enough to fill any one there is now."""
LEAST_KEPT_TOKENS = 4096
"""Before a micro-batch on a GPU is made smaller, its activations are computed twice: that costs a
third more operations, and matrices of fewer rows leave parts of a large GPU idle."""
GPU_SHARE = 0.85
"""Of a GPU's memory that may be planned with; the rest is for what was not foretold, and for gaps
in the memory that is given back."""


def choose_device(name: str = "auto") -> torch.device:
    """Return where to compute.

    Args:
        name: "auto" (a GPU if there is one), "cpu" or "cuda".
    Raises:
        TrainingError: a GPU is asked for and torch sees none.
    """
    has_gpu = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise TrainingError(
            f"train_device is cuda, and torch {torch.__version__} sees no GPU. A driver may be "
            "missing, or a torch that is built for it (torch.version.cuda is "
            f"{torch.version.cuda}). With train_device auto, jobs train on the CPU then."
        )
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return what decides the last bit of a result on a device, besides the versions."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_dtype(device: torch.device) -> torch.dtype:
    """Return the type that weights are held and multiplied in on a device."""
    if device.type != "cuda":
        return compute_dtype()
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def default_portions(
    device: torch.device, shape: ModelShape, plan: TrainPlan, longest: int, lanes: int
) -> Portions:
    """Return how steps are cut where nothing else is said.

    Args:
        longest: tokens of the longest record.
        lanes: rows that a CPU computes at the same time.
    """
    if device.type != "cuda":
        return Portions.preferred(longest, lanes)
    size = torch.finfo(device_dtype(device)).bits // 8
    return gpu_portions(
        shape, plan, torch.cuda.get_device_properties(device).total_memory, number_bytes=size
    )


def gpu_portions(
    shape: ModelShape, plan: TrainPlan, memory_bytes: int, *, number_bytes: int = 2
) -> Portions:
    """Return the largest useful portions for a GPU with so much memory.

    What it has and not what is free: the same GPU computes the same job in the same order. Where
    less is free than that needs, steps are cut when they meet it.
    """

    def fits(tokens: int, *, is_recomputed: bool) -> bool:
        needed = predict_memory(
            *(shape, plan.method, tokens, tokens),
            adapter=LoraConfig(plan.lora_rank, plan.lora_alpha, plan.lora_targets),
            number_bytes=number_bytes,
            is_recomputed=is_recomputed,
        )
        # Foretold for the CPU, where fewer tokens' scores exist at once.
        more = HEAD_CHUNK_TOKENS["cuda"] - HEAD_CHUNK_TOKENS["cpu"]
        needed += more * shape.vocabulary * (number_bytes + 8) - PROCESS_BYTES
        return needed <= GPU_SHARE * memory_bytes

    tokens = GPU_TOKENS
    while tokens >= LEAST_KEPT_TOKENS:
        if fits(tokens, is_recomputed=False):
            return Portions(tokens, tokens)
        tokens //= 2
    tokens = GPU_TOKENS
    while tokens > MAX_MICRO_BATCH_TOKENS and not fits(tokens, is_recomputed=True):
        tokens //= 2
    return Portions(tokens, 0)


def peak_device_bytes(device: torch.device) -> int:
    """Return the most memory that this process has had: a GPU's where it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()
