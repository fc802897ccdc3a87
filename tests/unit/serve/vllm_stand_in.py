"""What is used of vLLM's AsyncLLM, with a tiny model of transformers behind it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.unit.serve.tiny_chat import load_reference
from torch import Tensor

from outcrop.models.lora import load_adapter, set_adapter
from outcrop.serve.vllm_library import Library


class StandIn:
    """Computes a token at a time, in the order in which the event loop lets it."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = load_reference(folder)
        self._adapters: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.fault: Exception | None = None
        self.errored = False
        self.is_down = False

    async def add_lora(self, lora_request: Any) -> bool:
        self._adapters[lora_request.path] = load_adapter(Path(lora_request.path))
        return True

    async def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        priority: int = 0,
    ) -> AsyncGenerator[Any, None]:
        self.asked.append({"sampling": sampling_params, "lora": lora_request, "priority": priority})
        ids = list(prompt["prompt_token_ids"])
        length, params = len(ids), SimpleNamespace(**sampling_params)
        seed = secrets.randbits(60) if params.seed is None else params.seed
        generator = torch.Generator().manual_seed(seed)
        finished = False
        try:
            while not finished:
                await asyncio.sleep(0)
                if self.fault is not None:
                    raise self.fault
                logits = self._scores(ids, lora_request)
                token = _draw(logits[-1], params, generator)
                ids.append(token)
                finished = token in params.stop_token_ids
                finished = finished or len(ids) - length == params.max_tokens
                yield SimpleNamespace(
                    prompt_logprobs=_prompt(logits, ids, params)
                    if len(ids) == length + 1
                    else None,
                    num_cached_tokens=0,
                    outputs=[
                        SimpleNamespace(
                            token_ids=[token],
                            logprobs=_told([logits[-1]], [token], params.logprobs),
                        )
                    ],
                    finished=finished,
                )
        finally:
            if not finished:
                self.aborted.append(request_id)

    def shutdown(self) -> None:
        self.is_down = True

    def _scores(self, ids: list[int], lora_request: Any) -> Tensor:
        set_adapter(self._model, self._adapters[lora_request.path] if lora_request else None)
        found: Tensor = self._model(input_ids=torch.tensor([ids])).logits[0]
        return found


def stand_in_library(client: StandIn) -> Library:
    return Library(
        client=client,
        sampling=dict,
        lora=lambda name, number, path: SimpleNamespace(name=name, number=number, path=path),
        num_pages=100,
        figures=lambda: {
            "vllm:kv_cache_usage_perc": 0.25,
            "vllm:num_preemptions": 2,
            "vllm:iteration_tokens_total": SimpleNamespace(
                count=5, sum=40.0, buckets={"8": 3, "1": 1, "+Inf": 5}
            ),
        },
    )


def _draw(logits_V: Tensor, params: Any, generator: torch.Generator) -> int:
    if params.temperature == 0:
        return int(logits_V.argmax())
    scores = logits_V / params.temperature
    if params.top_k:
        scores[scores < scores.topk(params.top_k).values[-1]] = -torch.inf
    return int(torch.multinomial(scores.softmax(0), 1, generator=generator))


def _prompt(logits_TV: Tensor, ids: list[int], params: Any) -> list[Any] | None:
    if params.prompt_logprobs is None:
        return None
    told = _told(list(logits_TV[:-1]), ids[1:-1], params.prompt_logprobs) or []
    return [None, *told]


def _told(rows: list[Tensor], tokens: list[int], number: int | None) -> list[Any] | None:
    """Return for each place the token's own log-probability and the likeliest ones', by id."""
    if number is None:
        return None
    found = []
    for row, token in zip(rows, tokens, strict=True):
        logprobs = row.log_softmax(0)
        named = (
            {token, *(int(other) for other in logprobs.topk(number).indices)} if number else {token}
        )
        found.append({other: SimpleNamespace(logprob=float(logprobs[other])) for other in named})
    return found
