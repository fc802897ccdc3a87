"""Draw the next token from a model's scores: greedy, or by temperature, top-k and top-p.

The order is that of transformers' generate: temperature, then the k likeliest, then the nucleus of
what is left. Tokens of equal score count in the order of their ids, so which tokens are kept is
exact. A seed fixes the draws, whatever else the process computes in between.

Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751), for top-p.

Axis suffixes: V vocabulary, K tokens that are kept, N rows of scores.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from outcrop.serve.request import SamplingParams

ROUNDING = 1e-7
"""Room for the rounding of sums: a mass that lacks no more than this of `top_p` has reached it."""
CUTS = (1e-2, 1e-4)
"""Shares of the likeliest token's probability below which no token may be in the nucleus."""


def new_generator(seed: int | None) -> torch.Generator:
    """Return the source of one request's random numbers.

    Args:
        seed: any integer; None takes an unpredictable one.
    """
    generator = torch.Generator()
    return generator.manual_seed((secrets.randbits(63) if seed is None else seed) % 2**63)


@dataclass(frozen=True)
class Draw:
    """How one token is drawn."""

    temperature: float
    """Above 0."""
    top_p: float
    top_k: int | None
    number: float
    """Which of the tokens that can be drawn it is: their probabilities, one after the other, fill
    the numbers from 0 to 1."""


def new_draw(params: SamplingParams, generator: torch.Generator) -> Draw | None:
    """Return how the next token is drawn; None takes the likeliest, and needs no number."""
    if params.temperature == 0 or params.top_k == 1:
        return None
    number = float(torch.rand(1, generator=generator, dtype=torch.float64))
    return Draw(params.temperature, params.top_p, params.top_k, number)


def sample(logits_V: Tensor, draw: Draw) -> int:
    """Draw one token id.

    Args:
        logits_V: unnormalized scores, any float type; computed in float32, summed in float64.
    """
    ids_K, probabilities_K = distribution(logits_V, draw)
    cumulative_K = probabilities_K.cumsum(0)
    target = draw.number * cumulative_K[-1]
    place = int(torch.searchsorted(cumulative_K, target, right=True))
    return int(ids_K[min(place, len(ids_K) - 1)])


def distribution(logits_V: Tensor, params: SamplingParams | Draw) -> tuple[Tensor, Tensor]:
    """Return the tokens that can be drawn and their probabilities, at a temperature above 0.

    Returns:
        (ids_K, probabilities_K): int64 and float64. Where tokens were cut off, the likeliest come
        first and equal ones by id, else all come by id. The probabilities sum to 1.
    """
    scores_V = logits_V.float().cpu()
    ids_K = torch.arange(len(scores_V))
    if params.top_k is not None and params.top_k < len(scores_V):
        threshold = torch.topk(scores_V, params.top_k).values[-1]
        ids_K, scores_V = _sorted(ids_K, scores_V, scores_V >= threshold)
        ids_K, scores_V = ids_K[: params.top_k], scores_V[: params.top_k]
    if params.top_p < 1:
        return _nucleus(ids_K, scores_V, params.temperature, params.top_p)
    return ids_K, torch.softmax(_scaled(scores_V, params.temperature), dim=0)


def _scaled(scores_V: Tensor, temperature: float) -> Tensor:
    # The maximum goes first, so that a tiny temperature cannot overflow to infinity less infinity.
    return (scores_V - scores_V.max()).double() / temperature


def _nucleus(
    ids_V: Tensor, scores_V: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Return the fewest likeliest tokens that have the mass `top_p`, and their probabilities."""
    # Of nearly all tokens only the sum matters. It is taken of float32 terms, which takes a quarter
    # of the time; those few that may be in the nucleus are computed again in float64.
    weights_V = torch.exp((scores_V - scores_V.max()) / max(temperature, 1e-30))
    total = float(weights_V.sum(dtype=torch.float64))
    # Fewer than V tokens lie below the last of these, so all of them together lack the mass to
    # matter. Before that, a few cuts that usually do, because sorting is what costs.
    lowest = (1 - top_p) * total / len(weights_V) * (1 - 1e-6)
    for cut in (*(share for share in CUTS if share > lowest), lowest):
        places_K = torch.nonzero(weights_V >= cut)[:, 0]
        if cut == lowest or float(weights_V[places_K].sum(dtype=torch.float64)) > top_p * total:
            break
    ids_K, scores_K = _sorted(ids_V, scores_V, places_K)
    probabilities_K = torch.exp(_scaled(scores_K, temperature)) / total
    before_K = nn.functional.pad(probabilities_K.cumsum(0)[:-1], (1, 0))
    kept_K = before_K < top_p - ROUNDING
    kept_K[0] = True
    ids_K, probabilities_K = ids_K[kept_K], probabilities_K[kept_K]
    return ids_K, probabilities_K / probabilities_K.sum()


def logprobs(
    logits_NV: Tensor, tokens: Sequence[int], top: int = 0
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Return the natural logarithms of tokens' probabilities at temperature 1, without cuts.

    Args:
        tokens: the one that came in each row.
        top: likeliest tokens that are wanted of each row, with theirs; the likeliest first.
    """
    scores_NV = logits_NV.float()
    totals_N = torch.logsumexp(scores_NV, dim=-1)
    chosen_N = scores_NV[torch.arange(len(tokens)), torch.tensor(list(tokens))] - totals_N
    values_NK, ids_NK = torch.topk(scores_NV, min(top, scores_NV.shape[-1]), dim=-1)
    likeliest_NK = (values_NK - totals_N[:, None]).tolist()
    return [
        (chosen, list(zip(ids, likeliest, strict=True)))
        for chosen, ids, likeliest in zip(
            chosen_N.tolist(), ids_NK.tolist(), likeliest_NK, strict=True
        )
    ]


def _sorted(ids_K: Tensor, values_K: Tensor, keep_K: Tensor) -> tuple[Tensor, Tensor]:
    ids_K, values_K = ids_K[keep_K], values_K[keep_K]
    values_K, order_K = torch.sort(values_K, descending=True, stable=True)
    return ids_K[order_K], values_K
