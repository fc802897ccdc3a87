"""Adapters: the low-rank change of a model's linear layers that a customization job trains.

Puts the layers of a loaded model into a form that adds `scaling * x A^T B^T` to the frozen
`x W^T`, trains A and B as float32 masters, and turns them to and from a folder in peft's layout.
The frozen weights are never touched, so a model without its adapter is the base again, bit by bit.

How the two parts are added matters in bfloat16. Adding a small change to an already rounded output
loses it: a value moves only if the change is at least half its last place. Here the frozen product
is accumulated onto the change inside one matrix multiplication (float32 inside, rounded once), so
the change survives on average; see docs/learning-rate.md for the measurement.

Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1 for the form and its start (A random, B
zero); peft's "PEFT checkpoint format" page for the files and the names of the tensors, its LoRA
layers for `fan_in_fan_out`: the base weight of GPT-2's Conv1D is stored as (I, O), A and B are not.

Axis suffixes: T tokens, I inputs of a layer, O outputs of a layer, R rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from outcrop.errors import ModelError
from outcrop.models.artifact import ADAPTER_CONFIG as ADAPTER_CONFIG
from outcrop.models.catalog import ALL_LINEARS as ALL_LINEARS
from outcrop.models.catalog import LoraConfig as LoraConfig
from outcrop.models.kernels import wide

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TENSOR_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """The tensors of one adapter, apart from any model."""

    config: LoraConfig
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """Name of a linear layer in the model -> (lora_a_RI, lora_b_OR), float32."""
    fan_in_fan_out: bool = False
    """Whether the weights of the layers lie as (I, O): then they are Conv1D. It matters to peft
    only, which reads it from adapter_config.json."""


class LoraLinear(nn.Module):
    """A linear layer with room for an adapter; without one it does what the layer does.

    The layer is nn.Linear, or transformers' Conv1D, whose weight lies as (I, O).
    """

    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.is_conv1d = _is_conv1d(linear)
        self.training = linear.training
        self.scaling = 1.0
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)

    @property
    def weight_OI(self) -> Tensor:
        """The frozen weight; a view where it lies the other way."""
        return self.linear.weight.t() if self.is_conv1d else self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x of shape (..., I)."""
        if self.lora_a is None:
            found: Tensor = self.linear(x)
            return found
        apply: Callable[..., Tensor] = _AdaptedMatmul.apply
        return apply(x, self.weight_OI, self.linear.bias, self.lora_a, self.lora_b, self.scaling)


class _AdaptedMatmul(torch.autograd.Function):
    """x W^T + scaling * x A^T B^T, with gradients for x, A and B and none for W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        lora_a_RI: Tensor,
        lora_b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        a_RI = lora_a_RI.to(x.dtype)
        b_OR = (lora_b_OR * scaling).to(x.dtype) if scaling != 1.0 else lora_b_OR.to(x.dtype)
        h_TR = x_TI @ a_RI.t()
        y_TO = h_TR @ b_OR.t()
        y_TO.addmm_(x_TI, weight_OI.t())
        if bias_O is not None:
            y_TO += bias_O
        ctx.save_for_backward(x_TI, h_TR, weight_OI, a_RI, b_OR)
        ctx.scaling, ctx.master_dtype = scaling, lora_a_RI.dtype
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        x_TI, h_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_y_TO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_h_TR = grad_y_TO @ b_OR
        grad_x = grad_a_RI = grad_b_OR = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = grad_h_TR @ a_RI
            grad_x_TI.addmm_(grad_y_TO, weight_OI)
            grad_x = grad_x_TI.view(*grad_y.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            grad_a_RI = (grad_h_TR.t() @ x_TI).to(ctx.master_dtype)
        if ctx.needs_input_grad[4]:
            grad_b_OR = (grad_y_TO.t() @ h_TR).to(ctx.master_dtype) * ctx.scaling
        return grad_x, None, None, grad_a_RI, grad_b_OR, None


def attach(
    model: nn.Module, config: LoraConfig, seed: int, start: Adapter | None = None
) -> list[nn.Parameter]:
    """Give the model a new adapter that can be trained, and return its parameters.

    A is drawn uniformly from +-1/sqrt(inputs), B is zero, so that the model's output is at first
    the base's. The numbers depend on the seed and each layer's name, not on any global state.

    Args:
        start: an adapter to go on from. The new one is at first the same function: what it has
            more, in rank or layers, begins as above, and a scaling that differs is folded into B.
    Raises:
        ModelError: the model has none of the layers that the configuration names, or `start` does
            not fit the model, or has a larger rank or other layers than the new one.
    """
    parameters = []
    layers = _adaptable(model, config.targets)
    if start is not None:
        _check_start(start, config, layers)
    for name, layer in layers.items():
        weight_OI = layer.weight_OI
        outputs, inputs = weight_OI.shape
        generator = torch.Generator().manual_seed(_seed(seed, name))
        bound = 1.0 / math.sqrt(inputs)
        a_RI = torch.empty(config.rank, inputs).uniform_(-bound, bound, generator=generator)
        b_OR = torch.zeros(outputs, config.rank)
        if start is not None and name in start.tensors:
            first_a_RI, first_b_OR = start.tensors[name]
            a_RI[: start.config.rank] = first_a_RI
            # In float64, so that it is rounded once at most, and not at all for powers of two.
            factor = start.config.scaling / config.scaling
            b_OR[:, : start.config.rank] = first_b_OR.double() * factor
        layer.lora_a = nn.Parameter(a_RI.to(weight_OI.device, wide(weight_OI.dtype)))
        layer.lora_b = nn.Parameter(b_OR.to(weight_OI.device, wide(weight_OI.dtype)))
        layer.scaling = config.scaling
        parameters += [layer.lora_a, layer.lora_b]
    return parameters


def set_adapter(model: nn.Module, adapter: Adapter | None) -> None:
    """Make the model answer with this adapter, or as the base where it is None; cannot be trained.

    The tensors are rounded to the model's type once, here, as training rounds them each step.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    if adapter is None:
        for layer in _lora_layers(model).values():
            layer.lora_a = layer.lora_b = None
        return
    layers = _adaptable(model, adapter.config.targets)
    _check_fit(adapter, {name: layer.weight_OI for name, layer in layers.items()})
    for name, layer in _lora_layers(model).items():
        if name not in adapter.tensors:
            layer.lora_a = layer.lora_b = None
            continue
        a_RI, b_OR = adapter.tensors[name]
        weight = layer.linear.weight
        scaled_b_OR = b_OR * adapter.config.scaling
        layer.lora_a = nn.Parameter(a_RI.to(weight.device, weight.dtype), requires_grad=False)
        layer.lora_b = nn.Parameter(
            scaled_b_OR.to(weight.device, weight.dtype), requires_grad=False
        )
        layer.scaling = 1.0


class WeightChanges(Mapping[str, Tensor]):
    """What an adapter adds to the weights of a model.

    Name of a weight, as `named_parameters` has it -> scaling * B A, float32, of the weight's shape.
    Each is computed in float64, rounded once, and made when it is asked for: all of them together
    are as large as the model.
    """

    def __init__(self, adapter: Adapter, turned: Collection[str] = ()) -> None:
        """
        Args:
            turned: the names of weights that lie as (I, O), and so do their changes.
        """
        self._turned = turned
        self._scaling = adapter.config.scaling
        self._tensors = {f"{name}.weight": pair for name, pair in adapter.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        a_RI, b_OR = self._tensors[name]
        change_OI = (b_OR.double() @ a_RI.double() * self._scaling).float()
        return change_OI.t() if name in self._turned else change_OI

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def weight_changes(model: nn.Module, adapter: Adapter) -> WeightChanges:
    """Return what an adapter adds to the weights of a model that has none attached.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and name.rpartition(".")[2] in adapter.config.targets
    }
    _check_fit(adapter, {name: _weight_OI(linear) for name, linear in linears.items()})
    return WeightChanges(
        adapter, {f"{name}.weight" for name, linear in linears.items() if _is_conv1d(linear)}
    )


def adapter_of(model: nn.Module, config: LoraConfig) -> Adapter:
    """Return a copy of the adapter that `attach` gave the model, as it is now."""
    tensors, turned = {}, False
    for name, layer in _lora_layers(model).items():
        if layer.lora_a is not None and layer.lora_b is not None:
            tensors[name] = (_on_cpu(layer.lora_a), _on_cpu(layer.lora_b))
            turned |= layer.is_conv1d
    return Adapter(config, tensors, turned)


def save_adapter(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write the adapter as peft does: adapter_config.json and adapter_model.safetensors.

    The same adapter gives the same bytes.

    Args:
        folder: is made where it does not exist.
        base_model: what the adapter belongs to, for a reader; a name, not a path of this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a_RI, b_OR) in adapter.tensors.items():
        tensors[f"{TENSOR_PREFIX}{name}.lora_A.weight"] = a_RI.contiguous()
        tensors[f"{TENSOR_PREFIX}{name}.lora_B.weight"] = b_OR.contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.config.rank,
        "target_modules": list(adapter.config.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter from a folder in peft's layout.

    Raises:
        ModelError: a file is missing or damaged, or the adapter is of a kind that is not plain
            LoRA on linear layers.
    """
    try:
        described = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        flat = load_file(folder / ADAPTER_WEIGHTS)
        config = LoraConfig(
            rank=int(described["r"]),
            alpha=float(described["lora_alpha"]),
            targets=tuple(described["target_modules"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"The adapter in {folder} cannot be read: {error!r}") from error
    for unsupported in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern"):
        if described.get(unsupported):
            raise ModelError(f"The adapter in {folder} uses {unsupported}, which is not supported.")
    tensors = {}
    for key, a_RI in flat.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(TENSOR_PREFIX).removesuffix(".lora_A.weight")
        b_OR = flat.get(key.replace(".lora_A.", ".lora_B."))
        if b_OR is None:
            raise ModelError(f"The adapter in {folder} has no lora_B for {name}.")
        tensors[name] = (a_RI.float(), b_OR.float())
    if 2 * len(tensors) != len(flat):
        raise ModelError(f"The adapter in {folder} holds tensors that are not lora_A or lora_B.")
    return Adapter(config, tensors, bool(described.get("fan_in_fan_out")))


def check_fits(adapter: Adapter, model: nn.Module) -> None:
    """Refuse an adapter that is not made for exactly a model's layers; it needs no numbers.

    Raises:
        ModelError: names the layer, and both shapes where they differ.
    """
    layers = {
        name: _weight_OI(module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in adapter.config.targets and _is_linear(module)
    }
    _check_fit(adapter, layers)


def _adaptable(model: nn.Module, targets: tuple[str, ...]) -> dict[str, LoraLinear]:
    """Return the named layers in a form that can carry an adapter, made so where they are not."""
    layers = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in targets:
            continue
        if _is_linear(module):
            module = LoraLinear(module)
            _replace(model, name, module)
        if isinstance(module, LoraLinear):
            layers[name] = module
    if not layers:
        raise ModelError(f"The model has no linear layer named {', '.join(targets)}.")
    return layers


def _check_fit(adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that is not made for exactly these layers."""
    if weights.keys() != adapter.tensors.keys():
        odd = sorted(weights.keys() ^ adapter.tensors.keys())
        raise ModelError(f"The adapter does not fit the model: {odd[0]} is only in one of them.")
    rank = adapter.config.rank
    for name, (a_RI, b_OR) in adapter.tensors.items():
        outputs, inputs = weights[name].shape
        wanted = ((rank, inputs), (outputs, rank))
        if (tuple(a_RI.shape), tuple(b_OR.shape)) != wanted:
            raise ModelError(
                f"The adapter does not fit the model: {name} has shapes {tuple(a_RI.shape)} and "
                f"{tuple(b_OR.shape)}, where {wanted[0]} and {wanted[1]} are needed."
            )


def _check_start(start: Adapter, config: LoraConfig, layers: Mapping[str, LoraLinear]) -> None:
    """Refuse to go on from an adapter that the new one cannot hold, or of another model."""
    missing = sorted(set(start.config.targets) - set(config.targets))
    if missing or start.config.rank > config.rank:
        raise ModelError(
            f"An adapter of rank {config.rank} on {', '.join(config.targets)} cannot go on from "
            f"one of rank {start.config.rank} on {', '.join(start.config.targets)}: it is smaller."
        )
    targets = start.config.targets
    _check_fit(
        start,
        {
            name: layer.weight_OI
            for name, layer in layers.items()
            if name.rpartition(".")[2] in targets
        },
    )


def _lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # A model that has such layers has imported them; importing transformers takes two seconds.
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def _weight_OI(linear: nn.Linear) -> Tensor:
    return linear.weight.t() if _is_conv1d(linear) else linear.weight


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
