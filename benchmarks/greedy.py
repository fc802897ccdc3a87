"""Greedy answers from a model in this process, for the benchmarks that compare models by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def greedy_answers(
    model: Any,
    prompts: Sequence[list[int]],
    end_token_ids: Sequence[int],
    max_tokens: int,
    batch_size: int = 16,
) -> list[list[int]]:
    """Return the most likely tokens after each prompt, up to the end token, which is left out.

    Prompts are answered in batches of similar length, padded on the left.

    Args:
        model: a causal language model of transformers.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        width = max(len(prompts[place]) for place in places)
        pad = end_token_ids[0]
        input_ids = torch.tensor(
            [[pad] * (width - len(prompts[place])) + prompts[place] for place in places]
        )
        attention_mask = torch.tensor(
            [[0] * (width - len(prompts[place])) + [1] * len(prompts[place]) for place in places]
        )
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=list(end_token_ids),
                pad_token_id=pad,
            )
        for place, row in zip(places, output[:, width:].tolist(), strict=True):
            for token in row:
                if token in end_token_ids:
                    break
                answers[place].append(token)
    return answers
