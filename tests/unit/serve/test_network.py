"""The forward pass against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.serve.tiny_chat import (
    load_reference,
    random_adapter,
    reference_ids,
    write_tiny_chat,
)
from torch import Tensor

from outcrop.errors import ModelError
from outcrop.models.lora import set_adapter
from outcrop.serve.network import (
    GeneralNetwork,
    LlamaNetwork,
    Network,
    is_plain_llama,
    load_network,
)

PROMPT = [20, 31, 7, 99, 140, 3, 250]
SPARE = 261
"""A token that is never drawn as an end here, so that answers have their full length."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


def float32(folder: Path) -> Network:
    return load_network(folder, torch.float32)


def greedy(network: Network, prompt: list[int], count: int) -> list[int]:
    cache = network.new_cache()
    ids, waiting = [], prompt
    for _ in range(count):
        token = int(network.forward(waiting, cache).argmax())
        ids.append(token)
        waiting = [token]
    return ids


def logits(network: Network, prompt: list[int]) -> Tensor:
    return network.forward(prompt, network.new_cache())[0]


@pytest.mark.parametrize("length", [1, 2, 7, 150])
def test_greedy_tokens_are_those_of_transformers_generate(folder: Path, length: int) -> None:
    network = float32(folder)
    assert isinstance(network, LlamaNetwork)
    prompt = (PROMPT * 40)[:length]
    wanted = reference_ids(load_reference(folder), prompt, 40, end=SPARE)
    assert greedy(network, prompt, 40) == wanted


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj", "o_proj", "down_proj")])
def test_greedy_tokens_with_an_adapter_are_those_of_transformers(
    folder: Path, targets: tuple[str, ...]
) -> None:
    adapter = random_adapter(folder, targets=targets)
    network, reference = float32(folder), load_reference(folder)
    base = greedy(network, PROMPT, 40)
    set_adapter(network.module, adapter)
    set_adapter(reference, adapter)
    wanted = reference_ids(reference, PROMPT, 40, end=SPARE)
    assert greedy(network, PROMPT, 40) == wanted
    assert wanted != base


def test_the_base_answers_as_before_when_its_adapter_is_taken_off(folder: Path) -> None:
    network = float32(folder)
    before = logits(network, PROMPT), logits(network, PROMPT[:1])
    set_adapter(network.module, random_adapter(folder))
    assert not torch.equal(logits(network, PROMPT), before[0])
    set_adapter(network.module, None)
    assert torch.equal(logits(network, PROMPT), before[0])
    assert torch.equal(logits(network, PROMPT[:1]), before[1])


@pytest.mark.parametrize("parts", [(1, 6), (3, 3, 1), (5, 2)])
def test_a_prompt_in_parts_gives_the_scores_of_the_whole(
    folder: Path, parts: tuple[int, ...]
) -> None:
    network = float32(folder)
    cache = network.new_cache()
    start = 0
    for length in parts:
        found = network.forward(PROMPT[start : start + length], cache)[0]
        start += length
    torch.testing.assert_close(found, logits(network, PROMPT), atol=1e-4, rtol=1e-4)


def test_a_cache_grows_without_losing_what_it_holds(folder: Path) -> None:
    network = float32(folder)
    ids = [(7 * place) % 256 for place in range(420)]
    cache = network.new_cache()
    for token in ids:
        found = network.forward([token], cache)[0]
    torch.testing.assert_close(found, logits(network, ids), atol=1e-3, rtol=1e-3)


def test_bfloat16_rounds_as_transformers_does(folder: Path) -> None:
    found = logits(load_network(folder, torch.bfloat16), PROMPT)
    reference: Any = load_reference(folder)
    reference.to(torch.bfloat16)
    wanted = reference(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LLAMA3_ROPE},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
    ],
)
def test_what_is_not_plain_runs_through_transformers(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = write_tiny_chat(tmp_path / "model", **changes)
    network = float32(folder)
    assert isinstance(network, GeneralNetwork)
    wanted = reference_ids(load_reference(folder), PROMPT, 20, end=SPARE)
    assert greedy(network, PROMPT, 20) == wanted


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"head_dim": 32},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 0.1},
    ],
)
def test_every_plain_shape_is_computed_right(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_tiny_chat(tmp_path / "model", **changes)
    network = float32(folder)
    assert isinstance(network, LlamaNetwork)
    wanted = reference_ids(load_reference(folder), PROMPT, 20, end=SPARE)
    assert greedy(network, PROMPT, 20) == wanted


def test_the_older_place_of_the_rotation_base_is_read(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    (old / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert is_plain_llama({**config, "rope_theta": 10000.0})
    assert torch.equal(logits(float32(old), PROMPT), logits(float32(folder), PROMPT))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_network(tmp_path)


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match="cannot be read"):
        load_network(tmp_path)


def test_weights_in_several_files_are_put_together(folder: Path, tmp_path: Path) -> None:
    load_reference(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(float32(tmp_path), PROMPT), logits(float32(folder), PROMPT))


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_network(tmp_path)


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"do not fit config\.json"):
        load_network(tmp_path)
