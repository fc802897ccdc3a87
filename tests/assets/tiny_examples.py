"""Rendered records of random tokens for the tiny model."""

from __future__ import annotations

import random

from tests.assets.tiny_model import VOCABULARY

from outcrop.data.records import Example


def tiny_examples(count: int, seed: int = 0, longest: int = 24) -> list[Example]:
    """Return records of different lengths; the second half of each carries loss."""
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        length = draw.randrange(4, longest + 1)
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        examples.append(Example(ids, [place >= length // 2 for place in range(length)]))
    return examples


def learnable_examples(count: int, seed: int = 0) -> list[Example]:
    """Return records with a rule to learn: the answer is the prompt's first token, three times."""
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        prompt = [draw.randrange(3, 20) for _ in range(draw.randrange(2, 6))]
        examples.append(Example([*prompt, *prompt[:1] * 3], [False] * len(prompt) + [True] * 3))
    return examples
