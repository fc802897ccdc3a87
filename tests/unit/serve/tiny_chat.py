"""A random Llama that can be talked to: a tokenizer of bytes and a chat template, two layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tests.assets.tiny_model import tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaForCausalLM

from outcrop.errors import ApiError
from outcrop.models.lora import (
    ALL_LINEARS,
    Adapter,
    LoraConfig,
    LoraLinear,
    adapter_of,
    attach,
    save_adapter,
)
from outcrop.serve.interface import Engine
from outcrop.serve.request import Event, Generation, GenerationRequest

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_chat(folder: Path, seed: int = 0, *, ends: bool = True, **changes: Any) -> Path:
    """Write a model of 262 tokens: 256 bytes, two merges, two control tokens and two spare ones.

    Args:
        ends: whether it can end an answer by itself.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "th", "he"])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[("t", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    settings = {
        "vocab_size": tokenizer.get_vocab_size() + 2,
        "eos_token_id": tokenizer.token_to_id(END),
        "bos_token_id": None,
        "pad_token_id": None,
    }
    model: Any = tiny_model(seed, **(settings | changes))
    if not ends:
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                table.weight[settings["eos_token_id"]] = 0.0
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def random_adapter(
    folder: Path, seed: int = 1, targets: tuple[str, ...] = ALL_LINEARS, size: float = 0.3
) -> Adapter:
    """Return an adapter for the model of a folder that changes what it says."""
    model = load_reference(folder)
    config = LoraConfig(rank=4, alpha=8.0, targets=targets)
    attach(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.lora_b is not None:
            with torch.no_grad():
                module.lora_b.normal_(0, size, generator=generator)
    return adapter_of(model, config)


def write_random_adapter(folder: Path, artifact: Path, seed: int = 1, size: float = 0.3) -> Path:
    """Write such an adapter as an artifact and return its folder."""
    save_adapter(random_adapter(folder, seed, size=size), artifact, "tiny")
    return artifact


def load_reference(folder: Path) -> LlamaForCausalLM:
    """Return the model of a folder as transformers runs it, float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: LlamaForCausalLM = model.eval().requires_grad_(False)
    return found


def reference_ids(model: Any, prompt: list[int], count: int, end: int) -> list[int]:
    """Return what transformers' own generate answers, greedily, without the prompt."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [int(token) for token in found[0, len(prompt) :]]


def stream(engine: Engine, request: GenerationRequest) -> Iterator[Event]:
    """Submit a request now, and return its events as they come; the last one ends them."""
    events: SimpleQueue[Event] = SimpleQueue()
    engine.submit(request, events.put)

    def read() -> Iterator[Event]:
        while True:
            event = events.get()
            yield event
            if isinstance(event, Generation | ApiError):
                return

    return read()
