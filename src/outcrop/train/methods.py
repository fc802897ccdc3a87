"""What is trained: a new adapter beside the frozen weights, or all the weights.

Both come to the loop as the same thing: tensors that receive gradients, float32 masters that the
optimizer moves, and a way to write the result. Masters are needed because a bfloat16 weight does
not move under an update of less than half its last place.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from outcrop.models.artifact import ADAPTER_FOLDER, copy_weights
from outcrop.models.decoder import make_decoder
from outcrop.models.kernels import wide
from outcrop.models.lora import (
    Adapter,
    LoraConfig,
    adapter_of,
    attach,
    save_adapter,
    weight_changes,
)
from outcrop.train.flat import FlatTensors, Gradients, flatten
from outcrop.train.plan import TrainPlan

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Trainable:
    """The part of a model that a run changes."""

    model: LlamaForCausalLM
    plan: TrainPlan
    live: list[nn.Parameter]
    """What the forward pass uses and gradients arrive at."""
    masters: list[Tensor]
    """What the optimizer moves, float32; the same tensors where `live` is float32 already."""
    whole: Path | None = None
    """Folder of the frozen weights where they are a custom model's own, not the base's."""
    flat: FlatTensors | None = None
    """Where the passes are our own: then its master is the only one of `masters`."""
    rooms: list[Gradients] = field(default_factory=list)
    """Room for the gradients of rows; kept from step to step."""

    def collect_gradients(self) -> None:
        """Add the gradients of one backward pass to the masters'."""
        for parameter, master in zip(self.live, self.masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def apply_masters(self) -> None:
        """Bring the forward pass's tensors to the masters' values after an optimizer step."""
        if self.flat is not None:
            self.flat.refresh()
            return
        with torch.no_grad():
            for parameter, master in zip(self.live, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    def drop_gradients(self) -> None:
        """Forget all gradients, those of an unfinished step included."""
        for tensor in (*self.live, *self.masters):
            tensor.grad = None

    def save(self, folder: Path, base_folder: Path) -> None:
        """Write the artifact: an adapter, or a whole model that can be loaded like its base.

        An adapter over a custom model's own weights is written together with those weights.
        """
        if self.plan.method == "adapter":
            adapter = adapter_of(self.model, _lora_config(self.plan))
            if self.whole is not None:
                copy_weights(self.whole, folder)
                folder = folder / ADAPTER_FOLDER
            save_adapter(adapter, folder, self.plan.base_model)
            return
        # Copies, because safetensors takes views into one vector for tensors that are shared.
        state = self.model.state_dict()
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        for name in self.model.all_tied_weights_keys:
            tensors.pop(name, None)
        self.model.save_pretrained(folder, state_dict=tensors, safe_serialization=True)
        for name in TOKENIZER_FILES:
            if (base_folder / name).is_file():
                shutil.copyfile(base_folder / name, folder / name)


def make_trainable(
    model: LlamaForCausalLM,
    plan: TrainPlan,
    seed: int,
    *,
    start: Adapter | None = None,
    whole: Path | None = None,
) -> Trainable:
    """Prepare a loaded, frozen model for the plan's method.

    Args:
        seed: decides the adapter's first values; full fine-tuning starts from the weights.
        start: the adapter of the custom model that training goes on from. The plan's adapter
            begins as it; for full fine-tuning it is added to the float32 masters.
        whole: folder of the model's weights where they are a custom model's own.
    Raises:
        ModelError: the model has no layer that the plan's adapter could change, or `start` does
            not fit the model or the plan.
    """
    if plan.method == "adapter":
        parameters = attach(model, _lora_config(plan), seed, start)
        decoder = make_decoder(model)
        if decoder is None:
            return Trainable(model, plan, parameters, list(parameters), whole)
        return _flat(model, plan, flatten(decoder, "adapter", _lora_config(plan).scaling), whole)
    changes = {} if start is None else weight_changes(model, start)
    decoder = make_decoder(model)
    if decoder is not None:
        flat = flatten(decoder, "full", 1.0)
        for name, master in flat.master_weights().items():
            if name in changes:
                master += changes[name].to(master.device)
        flat.refresh()
        return _flat(model, plan, flat, None)
    model.requires_grad_(True)
    live, masters = [], []
    for name, parameter in model.named_parameters():
        is_master = parameter.dtype == wide(parameter.dtype)
        master = parameter if is_master else parameter.detach().float().requires_grad_(True)
        if name in changes:
            with torch.no_grad():
                master += changes[name].to(master.device)
        live.append(parameter)
        masters.append(master)
    trainable = Trainable(model, plan, live, masters)
    if changes:
        trainable.apply_masters()
    return trainable


def _flat(
    model: LlamaForCausalLM, plan: TrainPlan, flat: FlatTensors, whole: Path | None
) -> Trainable:
    return Trainable(model, plan, [], [flat.master], whole, flat)


def _lora_config(plan: TrainPlan) -> LoraConfig:
    return LoraConfig(plan.lora_rank, plan.lora_alpha, plan.lora_targets)
