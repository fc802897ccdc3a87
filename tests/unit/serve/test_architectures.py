"""Models of every architecture answer; an adapter changes the answer as merged weights do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets.architectures import ARCHITECTURES, Architecture
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_plan import tiny_plan
from torch import Tensor

from outcrop.models.load import load_base
from outcrop.models.lora import load_adapter, set_adapter, weight_changes
from outcrop.serve.network import LlamaNetwork, Network, load_network
from outcrop.train.loop import train
from outcrop.train.plan import TrainPlan

PROMPT = [20, 31, 7, 59, 40, 3, 50, 61, 9]
COUNT = 12
"""Tokens of an answer; with the prompt they go past every window."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


def plan(architecture: Architecture, method: str = "adapter") -> TrainPlan:
    return tiny_plan(
        method=method,
        learning_rate=3e-2 if method == "adapter" else 3e-3,
        warmup_steps=0,
        lora_targets=architecture.linears,
    )


def answers(network: Network) -> tuple[list[int], Tensor]:
    """The greedy answer, token by token with the cache, and the scores of each token."""
    cache, waiting, ids, scores = network.new_cache(), PROMPT, [], []
    for _ in range(COUNT):
        scores.append(network.forward(waiting, cache)[0].clone())
        waiting = [int(scores[-1].argmax())]
        ids += waiting
    return ids, torch.stack(scores)


def whole(model: Any, answer: list[int]) -> Tensor:
    """The scores of the same tokens in one pass of transformers' own, without a cache."""
    ids = [*PROMPT, *answer[:-1]]
    with torch.no_grad():
        scores: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return scores[len(PROMPT) - 1 :]


def test_a_trained_adapter_changes_the_answer_as_merged_weights_do(
    architecture: Architecture, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    architecture.model(dtype=torch.float32).save_pretrained(folder)
    result = train(
        *(plan(architecture), folder, learnable_examples(24), [], tmp_path / "run"),
        threads=1,
        dtype=torch.float32,
    )
    adapter = load_adapter(result.artifact)
    assert adapter.config.targets == architecture.linears

    network = load_network(folder, torch.float32)
    base_ids, base_scores = answers(network)
    torch.testing.assert_close(
        base_scores, whole(load_base(folder, torch.float32), base_ids), rtol=1e-3, atol=1e-3
    )

    merged = load_base(folder, torch.float32)
    weights = dict(merged.named_parameters())
    with torch.no_grad():
        for name, change in weight_changes(merged, adapter).items():
            weights[name].add_(change)
    set_adapter(network.module, adapter)
    ids, scores = answers(network)
    torch.testing.assert_close(scores, whole(merged, ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(scores[0], base_scores[0], rtol=1e-2, atol=1e-2)

    set_adapter(network.module, None)
    assert torch.equal(answers(network)[1], base_scores)


def test_a_whole_model_that_was_trained_is_served_from_its_folder(
    architecture: Architecture, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    architecture.model(dtype=torch.float32).save_pretrained(folder)
    losses: list[float] = []
    result = train(
        *(plan(architecture, "full"), folder, learnable_examples(24), learnable_examples(8, 1)),
        tmp_path / "run",
        on_validation=lambda row: losses.append(row.validation_loss),
        threads=1,
        dtype=torch.float32,
    )
    assert losses[-1] < losses[0]
    network = load_network(result.artifact, torch.float32)
    ids, scores = answers(network)
    torch.testing.assert_close(
        scores, whole(load_base(result.artifact, torch.float32), ids), rtol=1e-3, atol=1e-3
    )
    base_scores = answers(load_network(folder, torch.float32))[1]
    assert not torch.allclose(scores[0], base_scores[0], rtol=1e-2, atol=1e-2)


def test_only_plain_llamas_run_through_the_pass_of_our_own(tmp_path: Path) -> None:
    for name in ("llama", "llama with biases", "gpt2"):
        ARCHITECTURES[name].model(dtype=torch.float32).save_pretrained(tmp_path / name)
    assert isinstance(load_network(tmp_path / "llama"), LlamaNetwork)
    assert not isinstance(load_network(tmp_path / "llama with biases"), LlamaNetwork)
    assert not isinstance(load_network(tmp_path / "gpt2"), LlamaNetwork)
