"""vLLM itself: whether it is there and wanted, and how its engine is started.

The one module that imports the package, which is optional, and only when it is started. Knows no
requests.

Source: vLLM's documentation, "AsyncLLM", "Engine arguments", "LoRA adapters".
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from outcrop.errors import SettingsError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What an engine's greatest rank can be. Source: vLLM's LoRAConfig."""
MAX_ADAPTERS_AT_ONCE = 16
"""Different adapters in one batch; requests of more wait for a place."""
MAX_ADAPTERS_KEPT = 128
"""In the machine's memory; others are read from their files again."""
MAX_LOGPROBS = 20
"""Likeliest tokens that may be told in one place. Source: bound of OpenAI's `top_logprobs`."""
INSTALL = "pip install 'outcrop[vllm]'"


class Client(Protocol):
    """What is used of AsyncLLM."""

    def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        priority: int = 0,
    ) -> AsyncGenerator[Any, None]:
        """Yield RequestOutputs; closing the generator aborts the request."""

    def add_lora(self, lora_request: Any) -> Awaitable[Any]:
        """Read an adapter; raises where it cannot be used."""

    def shutdown(self) -> None:
        """End the engine's processes."""


@dataclass(frozen=True)
class Library:
    """vLLM's engine, the classes that it takes, and its figures."""

    client: Client
    sampling: Callable[..., Any]
    """Makes SamplingParams, whose outputs come as what is new."""
    lora: Callable[[str, int, str], Any]
    """(name, number from 1, folder) -> LoRARequest."""
    num_pages: int = 0
    figures: Callable[[], Mapping[str, Any]] = dict
    """Name of a metric -> its value, or its histogram."""


def is_installed() -> bool:
    """Return whether the package vllm is there; it is not imported."""
    return importlib.util.find_spec("vllm") is not None


def check_engine_setting(engine: str) -> None:
    """Refuse `serve_engine = vllm` where the package is not there.

    Raises:
        SettingsError: says what to install.
    """
    if engine == "vllm" and not is_installed():
        raise SettingsError(
            "serve_engine is vllm, but the package vllm is not installed. Install it with "
            f"{INSTALL}, or set serve_engine to auto or own."
        )


def wants_vllm(engine: str) -> bool:
    """Return whether vLLM serves, by the setting: auto takes it where it and a GPU are there."""
    check_engine_setting(engine)
    if engine != "auto" or not is_installed():
        return engine == "vllm"
    import torch  # here, so that who only looks at the setting stays small

    return torch.cuda.is_available()


def open_vllm(
    folder: Path, *, max_rank: int, memory_percent: int, dtype: str = "auto", eager: bool = False
) -> Library:
    """Start vLLM's AsyncLLM on a folder. Called inside an event loop.

    Args:
        max_rank: of adapters; rounded up to a rank that vLLM knows.
        dtype: of the weights; auto takes the file's own.
        eager: compiles nothing, which starts sooner and answers slower.
        memory_percent: of the GPU's memory that it may take, other programs' included.
    """
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    made = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=eager,
            seed=secrets.randbits(31),
            gpu_memory_utilization=memory_percent / 100,
            enable_prefix_caching=True,
            scheduling_policy="priority",
            enable_lora=True,
            max_lora_rank=next(rank for rank in RANKS if rank >= max_rank),
            max_loras=MAX_ADAPTERS_AT_ONCE,
            max_cpu_loras=MAX_ADAPTERS_KEPT,
            max_logprobs=MAX_LOGPROBS,
            logprobs_mode="raw_logprobs",
        )
    )

    def figures() -> dict[str, Any]:
        return {metric.name: getattr(metric, "value", metric) for metric in get_metrics_snapshot()}

    return Library(
        client=made,
        sampling=lambda **given: vllm.SamplingParams(output_kind=RequestOutputKind.DELTA, **given),
        lora=lambda name, number, path: _lora_request(name, number, path),
        num_pages=int(made.vllm_config.cache_config.num_gpu_blocks or 0),
        figures=figures,
    )


def _lora_request(name: str, number: int, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, path)
