"""All that a decoder trains as one vector: of values, of gradients, of what is computed with.

One vector, because then the optimizer, the gradient's norm, the sum over rows and the rounding to
the matrices' type are a few long operations instead of hundreds of short ones. Matrices come first
and have gradients in the matrices' type; the rest (norms, biases, embeddings: sums over many
tokens) has them in wide numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from outcrop.models.decoder import Decoder, Joined, JoinedTensors, LayerTensors, ModelTensors
from outcrop.models.kernels import wide
from outcrop.models.lora import LoraLinear

PIECE = 1 << 20
"""Numbers of the gradient that are summed up together: 4 MB."""
GROUPS = ("qkv", "out", "gate_up", "down")
Take = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Gradients:
    """Room for the gradient of one row."""

    matrices: Tensor
    rest: Tensor
    tensors: ModelTensors
    """Views into both."""


@dataclass(frozen=True)
class FlatTensors:
    """What is trained."""

    decoder: Decoder
    """Computes with views into `work` and `norms`."""
    method: str
    master: nn.Parameter
    """The values that the optimizer moves, wide numbers."""
    work: Tensor
    """The same, rounded to the matrices' type, B times the adapter's scaling."""
    norms: Tensor
    """Norms and biases as they are computed with: rounded as they will be published, then wide."""
    gradient: Tensor
    """Room for the masters' gradient: to ask the system for it in every step takes longer than to
    fill it."""
    num_matrices: int
    """Numbers that belong to matrices; they come first, then embeddings, then norms and biases."""
    scaled_from: int
    """Where B begins, whose gradient is multiplied by the scaling."""
    scaling: float

    def refresh(self) -> None:
        """Bring what is computed with to the masters' values."""
        with torch.no_grad():
            self.work.copy_(self.master)
            if self.scaling != 1.0:
                self._scaled(self.work).copy_(self._scaled(self.master) * self.scaling)
            self.norms.copy_(self.work[len(self.work) - len(self.norms) :])

    def new_gradients(self) -> Gradients:
        """Return room for the gradient of a row."""
        count = self.num_matrices
        matrices = torch.zeros_like(self.work[:count])
        rest = torch.zeros_like(self.master[count:], requires_grad=False)
        tables, norms = rest.split([len(rest) - len(self.norms), len(self.norms)])
        return Gradients(matrices, rest, _bind(self.decoder, self.method, matrices, tables, norms))

    def collect(self, rows: Sequence[Gradients]) -> None:
        """Add the gradients of rows to the masters', in their order.

        Piece by piece, so that a sum is still in the cache when the next row is added to it.
        """
        count, master = self.num_matrices, self.master
        is_first = master.grad is None
        master.grad = self.gradient
        with torch.no_grad():
            for start in range(0, len(master), PIECE):
                stop = min(start + PIECE, len(master))
                total = self.gradient[start:stop]
                for place, row in enumerate(rows):
                    matrices = row.matrices[start:stop]
                    rest = row.rest[max(0, start - count) : max(0, stop - count)]
                    for part, piece in (
                        (total[: len(matrices)], matrices),
                        (total[len(matrices) :], rest),
                    ):
                        if is_first and place == 0:
                            part.copy_(piece)
                        else:
                            part.add_(piece)

    def scale_gradient(self) -> None:
        """Give the gradient of B its factor; once, when all rows are collected."""
        if self.scaling != 1.0 and self.master.grad is not None:
            self._scaled(self.master.grad).mul_(self.scaling)

    def master_weights(self) -> dict[str, Tensor]:
        """Return the masters of linear layers' weights by their parameters' names; none of them
        are trained where an adapter is."""
        if self.method != "full":
            return {}
        masters = _bind(self.decoder, self.method, *self._parts(self.master.data))
        return {
            f"{name}.weight": part
            for group, views in _groups(self.decoder, masters)
            for name, part in zip(group.names, _split(views.weight_OI, group), strict=True)
        }

    def _parts(self, flat: Tensor) -> list[Tensor]:
        num_norms = len(self.norms)
        num_tables = len(flat) - self.num_matrices - num_norms
        return list(torch.split(flat, [self.num_matrices, num_tables, num_norms]))

    def _scaled(self, flat: Tensor) -> Tensor:
        return flat[self.scaled_from : self.num_matrices]


def flatten(decoder: Decoder, method: str, scaling: float) -> FlatTensors:
    """Move what is trained into one vector; the modules of transformers then look into it.

    An adapter's parameters look into the masters, the weights of full fine-tuning into what is
    computed with.

    Args:
        method: "adapter" or "full".
        scaling: the adapter's alpha / rank; 1 for full fine-tuning.
    """
    sizes = _Sizes()
    _walk(decoder, method, sizes.a, sizes.b, sizes.norm, sizes.table)
    parts = [sizes.num_a + sizes.num_b, sizes.num_tables, sizes.num_norms]
    dtype, device = decoder.dtype, decoder.device
    master = nn.Parameter(torch.empty(sum(parts), dtype=wide(dtype), device=device))
    work = torch.empty_like(master, dtype=dtype, requires_grad=False)
    norms = torch.empty(sizes.num_norms, dtype=wide(dtype), device=device)
    masters = _bind(decoder, method, *master.data.split(parts))
    live_matrices, live_tables, live_norms = work.split(parts)
    computing = _bind(decoder, method, live_matrices, live_tables, norms)
    if method == "adapter":
        _take_over_adapters(decoder, masters)
    else:
        live = _bind(decoder, method, live_matrices, live_tables, live_norms)
        decoder = _take_over_weights(decoder, masters, live)
    flat = FlatTensors(
        *(replace(decoder, work=computing), method, master, work, norms),
        gradient=torch.empty_like(master, requires_grad=False),
        num_matrices=parts[0],
        scaled_from=sizes.num_a if method == "adapter" else parts[0],
        scaling=scaling,
    )
    flat.refresh()
    return flat


class _Sizes:
    """Counts instead of taking."""

    def __init__(self) -> None:
        self.num_a = self.num_b = self.num_tables = self.num_norms = 0

    def a(self, shape: tuple[int, ...]) -> Tensor:
        self.num_a += prod(shape)
        return torch.empty(0)

    def b(self, shape: tuple[int, ...]) -> Tensor:
        self.num_b += prod(shape)
        return torch.empty(0)

    def table(self, shape: tuple[int, ...]) -> Tensor:
        self.num_tables += prod(shape)
        return torch.empty(0)

    def norm(self, shape: tuple[int, ...]) -> Tensor:
        self.num_norms += prod(shape)
        return torch.empty(0)


def _taker(flat: Tensor, start: int = 0) -> Take:
    """Return a function that gives one part of a vector after the other."""
    place = start

    def take(shape: tuple[int, ...]) -> Tensor:
        nonlocal place
        part = flat[place : place + prod(shape)].view(shape)
        place += prod(shape)
        return part

    return take


def _bind(
    decoder: Decoder, method: str, matrices: Tensor, tables: Tensor, norms: Tensor
) -> ModelTensors:
    """Return views into vectors."""
    sizes = _Sizes()
    _walk(decoder, method, sizes.a, sizes.b, sizes.norm, sizes.table)
    takers = _taker(matrices), _taker(matrices, sizes.num_a), _taker(norms), _taker(tables)
    return _walk(decoder, method, *takers)


def _tables(decoder: Decoder) -> list[Tensor]:
    tied = decoder.head_VD is decoder.table_VD or (
        decoder.head_VD.data_ptr() == decoder.table_VD.data_ptr()
    )
    return [decoder.table_VD] if tied else [decoder.table_VD, decoder.head_VD]


def _walk(
    decoder: Decoder, method: str, take_a: Take, take_b: Take, take_norm: Take, take_table: Take
) -> ModelTensors:
    """Take all tensors in the order of the vector."""
    is_full = method == "full"
    tables = [take_table(tuple(table.shape)) for table in _tables(decoder)] if is_full else []

    def joined(group: Joined) -> JoinedTensors:
        if is_full:
            bias = group.bias_O
            return JoinedTensors(
                weight_OI=take_a(tuple(group.weight_OI.shape)),
                bias_O=None if bias is None else take_norm(tuple(bias.shape)),
            )
        adapted = [_adapter(layer) for layer in group.layers]
        rank = sum(a_RI.shape[0] for a_RI, _ in filter(None, adapted))
        if not rank:
            return JoinedTensors()
        return JoinedTensors(
            a_RI=take_a((rank, group.weight_OI.shape[1])),
            bs_OR=tuple(None if pair is None else take_b(tuple(pair[1].shape)) for pair in adapted),
        )

    layers = tuple(
        LayerTensors(
            qkv=joined(layer.qkv),
            out=joined(layer.out),
            gate_up=joined(layer.gate_up),
            down=joined(layer.down),
            norms=tuple(take_norm(tuple(norm.shape)) for norm in layer.norms) if is_full else None,
        )
        for layer in decoder.layers
    )
    if not is_full:
        return ModelTensors(layers)
    return ModelTensors(layers, tables[0], tables[-1], take_norm(tuple(decoder.norm_D.shape)))


def _adapter(layer: nn.Linear | LoraLinear) -> tuple[Tensor, Tensor] | None:
    if not isinstance(layer, LoraLinear) or layer.lora_a is None or layer.lora_b is None:
        return None
    return layer.lora_a, layer.lora_b


def _groups(decoder: Decoder, tensors: ModelTensors) -> list[tuple[Joined, JoinedTensors]]:
    return [
        (getattr(layer, name), getattr(views, name))
        for layer, views in zip(decoder.layers, tensors.layers, strict=True)
        for name in GROUPS
    ]


def _take_over_adapters(decoder: Decoder, masters: ModelTensors) -> None:
    for group, views in _groups(decoder, masters):
        if views.a_RI is None:
            continue
        first = 0
        for layer, b_OR in zip(group.layers, views.bs_OR, strict=True):
            pair = _adapter(layer)
            if pair is None or b_OR is None:
                continue
            a_RI, old_OR = pair
            place_RI = views.a_RI[first : first + a_RI.shape[0]]
            first += a_RI.shape[0]
            with torch.no_grad():
                place_RI.copy_(a_RI)
                b_OR.copy_(old_OR)
            a_RI.data, old_OR.data = place_RI, b_OR


def _take_over_weights(decoder: Decoder, masters: ModelTensors, live: ModelTensors) -> Decoder:
    """Copy the weights into the masters, and let transformers' parameters look into the live ones.

    Returns:
        The decoder with its weights there, so that the old ones can go.
    """
    *tables, last_norm = decoder.parameters
    pairs: list[tuple[nn.Parameter, Tensor | None, Tensor | None]] = [
        (tables[0], masters.table_VD, live.table_VD),
        (last_norm, masters.norm_D, live.norm_D),
    ]
    if len(tables) > 1:
        pairs.append((tables[1], masters.head_VD, live.head_VD))
    for layer, wide_layer, live_layer in zip(
        decoder.layers, masters.layers, live.layers, strict=True
    ):
        assert wide_layer.norms is not None
        assert live_layer.norms is not None
        pairs += zip(layer.norm_parameters, wide_layer.norms, live_layer.norms, strict=True)
    wide_groups, live_groups = _groups(decoder, masters), _groups(decoder, live)
    for (group, wide_part), (_, live_part) in zip(wide_groups, live_groups, strict=True):
        weights = [_linear(layer) for layer in group.layers]
        pairs += zip(
            [_parameter(linear.weight) for linear in weights],
            _split(wide_part.weight_OI, group),
            _split(live_part.weight_OI, group),
            strict=True,
        )
        if wide_part.bias_O is not None:
            pairs += zip(
                [_parameter(linear.bias) for linear in weights],
                _split(wide_part.bias_O, group),
                _split(live_part.bias_O, group),
                strict=True,
            )
    with torch.no_grad():
        for parameter, wide_values, live_values in pairs:
            assert wide_values is not None
            assert live_values is not None
            wide_values.copy_(parameter)
            parameter.data = live_values
    assert live.table_VD is not None
    assert live.head_VD is not None
    return replace(
        decoder,
        table_VD=live.table_VD,
        head_VD=live.head_VD,
        layers=tuple(
            replace(
                layer,
                **{
                    name: replace(getattr(layer, name), weight_OI=getattr(part, name).weight_OI)
                    for name in GROUPS
                },
            )
            for layer, part in zip(decoder.layers, live.layers, strict=True)
        ),
    )


def _linear(layer: nn.Linear | LoraLinear) -> nn.Linear:
    return layer.linear if isinstance(layer, LoraLinear) else layer


def _parameter(tensor: Tensor | None) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor


def _split(tensor: Tensor | None, group: Joined) -> list[Tensor]:
    assert tensor is not None
    return list(torch.split(tensor, list(group.widths)))
