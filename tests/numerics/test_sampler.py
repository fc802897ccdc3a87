"""Sampling against probabilities that are computed another way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from outcrop.serve.forward import draw_token, is_compiled
from outcrop.serve.request import SamplingParams
from outcrop.serve.sampler import Draw, distribution, logprobs, new_draw, new_generator, sample

Take: TypeAlias = Callable[[Tensor, Draw], int]

DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0, 3.0])
SCORES = st.lists(
    st.sampled_from([-4.0, -1.0, 0.0, 0.25, 0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=12
)


KINDS = {"torch": sample, "compiled": draw_token}


@pytest.fixture(params=KINDS)
def take(request: pytest.FixtureRequest) -> Take:
    """Draws a token, by torch or as a compiled pass does."""
    if request.param == "compiled" and not is_compiled():
        pytest.skip("there is no C compiler")
    return KINDS[request.param]


def drawn(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw as a request does."""
    draw = new_draw(params, generator)
    return int(logits.argmax()) if draw is None else sample(logits, draw)


def reference(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """The same cuts in plain Python: sorted by score, then by id."""
    highest = max(logits)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: params.top_k]
    weights = {t: math.exp((logits[t] - highest) / params.temperature) for t in order}
    total = math.fsum(weights.values())
    kept: dict[int, float] = {}
    for token in order:
        if kept and params.top_p < 1 and math.fsum(kept.values()) >= params.top_p - 1e-9:
            break
        kept[token] = weights[token] / total
    return {token: weight / math.fsum(kept.values()) for token, weight in kept.items()}


@given(
    SCORES,
    st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    st.none() | st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 0.35, 0.62, 0.9, 0.999, 1.0]),
)
def test_what_can_be_drawn_is_exact(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    ids, probabilities = distribution(torch.tensor(logits), params)
    found = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    wanted = reference(logits, params)
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, abs=1e-6)
    assert math.fsum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=4, top_p=0.9),
    ],
)
def test_many_draws_have_the_computed_probabilities(params: SamplingParams) -> None:
    generator = new_generator(7)
    counts = [0] * len(LOGITS)
    for _ in range(DRAWS):
        counts[drawn(LOGITS, params, generator)] += 1
    wanted = reference(LOGITS.tolist(), params)
    # Pearson's statistic; 25 is exceeded by chance once in 7,000 at 5 degrees of freedom.
    statistic = sum(
        (counts[token] - DRAWS * chance) ** 2 / (DRAWS * chance) for token, chance in wanted.items()
    )
    assert statistic < 25
    assert sum(counts[token] for token in wanted) == DRAWS


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_first() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, -1.0])
    params = SamplingParams(temperature=0)
    assert {drawn(logits, params, new_generator(None)) for _ in range(20)} == {1}


def test_equal_scores_at_the_cut_are_kept_in_the_order_of_their_ids() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0])
    ids, _ = distribution(logits, SamplingParams(temperature=1.0, top_k=3))
    assert ids.tolist() == [1, 4, 0]
    ids, _ = distribution(torch.zeros(5), SamplingParams(temperature=1.0, top_p=0.5))
    assert ids.tolist() == [0, 1, 2]


def test_a_seed_repeats_the_draws_and_another_does_not() -> None:
    params = SamplingParams(temperature=1.0)

    def draws(seed: int | None) -> list[int]:
        generator = new_generator(seed)
        return [drawn(LOGITS, params, generator) for _ in range(50)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)
    assert draws(-1) == draws(-1)
    assert draws(2**80) == draws(2**80)


def test_draws_do_not_depend_on_what_else_the_process_draws() -> None:
    params = SamplingParams(temperature=1.0)
    first, second = new_generator(3), new_generator(3)
    alone = [drawn(LOGITS, params, first) for _ in range(20)]
    mixed = []
    for _ in range(20):
        torch.rand(3)
        mixed.append(drawn(LOGITS, params, second))
    assert alone == mixed


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 5.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extremes_stay_finite(temperature: float, scale: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9)
    _, probabilities = distribution(LOGITS * scale, params)
    assert bool(torch.isfinite(probabilities).all())
    assert float(probabilities.sum()) == pytest.approx(1)


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.5, 1 - 1e-12])
def test_a_flat_distribution_over_a_large_vocabulary_keeps_the_right_number(top_p: float) -> None:
    ids, _ = distribution(torch.zeros(49_152), SamplingParams(temperature=1.0, top_p=top_p))
    assert len(ids) == max(1, math.ceil(top_p * 49_152))


def test_half_precision_scores_are_summed_in_full() -> None:
    logits = LOGITS.to(torch.bfloat16)
    _, probabilities = distribution(logits, SamplingParams(temperature=1.0))
    torch.testing.assert_close(probabilities, torch.softmax(logits.double(), 0))


def test_logprob_is_the_log_of_the_softmax() -> None:
    wanted = torch.log_softmax(LOGITS, 0)
    tokens = list(range(len(LOGITS)))
    found = logprobs(LOGITS.expand(len(tokens), -1), tokens, top=3)
    best = wanted.topk(3)
    for (value, likeliest), true in zip(found, wanted.tolist(), strict=True):
        assert value == pytest.approx(true, abs=1e-5)
        assert [token for token, _ in likeliest] == best.indices.tolist()
        assert [of for _, of in likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert logprobs(LOGITS[None], [0])[0][1] == []


NUMBERS = [0.0, 1e-9, 0.999999, *[(place + 0.5) / 40 for place in range(40)]]


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.35, 0.62, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 2, 5, 1000])
@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 3.0])
def test_each_number_draws_the_token_that_has_its_share(
    take: Take, temperature: float, top_k: int | None, top_p: float
) -> None:
    for seed, size in ((1, 6), (2, 100), (3, 33)):
        logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2
        logits[size // 2] = logits[0]  # two of equal score
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        ids, probabilities = distribution(logits, params)
        ends = probabilities.cumsum(0).tolist()
        for number in NUMBERS:
            if any(abs(number - end) < 1e-5 for end in ends):
                continue
            place = sum(end <= number for end in ends)
            found = take(logits, Draw(temperature, top_p, top_k, number))
            assert found == ids[min(place, len(ends) - 1)]


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 5.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_a_token_is_drawn_at_every_extreme(
    take: Take, temperature: float, scale: float, number: float
) -> None:
    logits = LOGITS * scale
    for top_p, top_k in ((1.0, None), (0.5, None), (1.0, 2), (0.0, 3)):
        token = take(logits, Draw(temperature, top_p, top_k, number))
        assert 0 <= token < len(LOGITS)
        if temperature < 1e-5:
            assert token == 5


def test_a_vocabulary_of_equal_scores_is_drawn_from_evenly(take: Take) -> None:
    logits = torch.zeros(49_152)
    for number in (0.0, 0.25, 0.75):
        wanted = int(number * 49_152)
        assert abs(take(logits, Draw(1.0, 1.0, None, number)) - wanted) <= 1
        assert abs(take(logits, Draw(1.0, 0.5, None, number)) - wanted // 2) <= 1
        assert abs(take(logits, Draw(1.0, 1.0, 1000, number)) - int(number * 1000)) <= 1
