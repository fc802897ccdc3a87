"""What a run takes of the memory, and how a long record takes less: activations are computed again.

Each layer then keeps only its input until the backward pass. It costs about a third more time, so
micro-batches of usual length do without. The numbers do not change.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

KEPT_TOKENS = 2048
"""Up to so many tokens of a micro-batch keep their activations: about 3 GB in bfloat16 on 135
million parameters in 30 layers. Micro-batches are smaller unless one record is longer."""


@contextmanager
def recomputed_layers(model: LlamaForCausalLM) -> Iterator[None]:
    """Let the layers of a forward pass inside this `with` compute their activations again later."""
    layers: Any = model.model.layers
    for layer in layers:
        # Nothing is drawn at random in a layer, so there is no generator to set back.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def peak_memory_bytes() -> int:
    """Return the most that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux
