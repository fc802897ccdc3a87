"""The gradient of a batch: cut into rows, computed in lanes, summed up in a fixed order.

However a batch is cut, its gradient is that of the mean loss over all tokens of the batch that
carry loss; only the order of sums differs. Llama-shaped models take the passes of
models/decoder.py, every other model transformers' own code and autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from outcrop.data.pack import (
    MAX_MICRO_BATCH_TOKENS,
    deal,
    last_loss_place,
    lay_row,
    num_row_tokens,
    pack,
)
from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, NonFiniteLossError, StopRequested
from outcrop.evaluate.attention import packed_attention
from outcrop.evaluate.likelihood import num_loss_tokens, token_losses
from outcrop.models.lanes import Lanes
from outcrop.models.passes import row_gradients
from outcrop.models.rows import Row
from outcrop.models.workspace import Workspace
from outcrop.train.flat import FlatTensors, Gradients
from outcrop.train.memory import layers_of, recomputed_layers
from outcrop.train.methods import Trainable
from outcrop.train.portions import Portions
from outcrop.train.run import NOT_FINITE_ADVICE

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def gather_gradients(
    trainable: Trainable,
    batch: Sequence[Example],
    portions: Portions = Portions(),  # noqa: B008 - frozen
    should_stop: Callable[[], bool] = lambda: False,
    lanes: Lanes | None = None,
) -> tuple[float, int]:
    """Add the gradients of a batch's mean loss to the masters'.

    Args:
        portions: how many tokens are in work at the same time at most, in all lanes together.
        lanes: where the rows are computed; None means in this thread.
    Returns:
        (loss, num_tokens): the mean over the batch's tokens that carry loss, in nats a token, and
        how many those are.
    Raises:
        EmptyLossError: no token of the batch carries loss.
        NonFiniteLossError: the loss is NaN or infinite.
        StopRequested: `should_stop` answered True; it is asked before each layer of both passes.
    """
    num_labels = sum(num_loss_tokens(example) for example in batch)
    if num_labels == 0:
        raise EmptyLossError("no token of its records carries loss.")
    check = partial(_check, should_stop)
    if trainable.flat is None:
        total = _by_autograd(trainable, batch, num_labels, portions, check)
    else:
        total = _by_hand(
            trainable.flat, trainable.rooms, batch, num_labels, portions, check, lanes or Lanes(1)
        )
    return total / num_labels, num_labels


def waves(batch: Sequence[Example], portions: Portions, lanes: Lanes) -> list[list[list[Example]]]:
    """Cut a batch into waves of hands: the hands of a wave are rows in work at the same time.

    Records without a token that carries loss are left out. A record too long for a lane is a wave
    of its own, and so is what cannot be dealt evenly: all threads then compute on one row.
    """
    num_lanes = lanes.count
    limit = max(1, portions.tokens // num_lanes)
    useful = [example for example in batch if last_loss_place(example)]
    long = [example for example in useful if last_loss_place(example) > limit]
    short = [example for example in useful if last_loss_place(example) <= limit]
    found = [[[example]] for example in long]
    if not short:
        return found
    num_waves = 1
    while True:
        hands = [hand for hand in deal(short, num_waves * num_lanes) if hand]
        costs = [num_row_tokens(hand) for hand in hands]
        if max(costs) <= limit:
            break
        num_waves += 1
    if num_waves == 1 and max(costs) > lanes.largest_share * sum(costs):
        return [*found, [short]]
    return [
        *found,
        *(hands[place : place + num_lanes] for place in range(0, len(hands), num_lanes)),
    ]


def micro_batches(
    trainable: Trainable, batch: Sequence[Example], portions: Portions, lanes: Lanes
) -> list[list[int]]:
    """Return the tokens of the records that are in work at the same time, for each such time."""
    if trainable.flat is None:
        limit = _autograd_tokens(trainable, portions)
        return [micro_batch.lengths for micro_batch in pack(batch, limit)]
    return [
        [last_loss_place(example) for hand in wave for example in hand]
        for wave in waves(batch, portions, lanes)
    ]


def _autograd_tokens(trainable: Trainable, portions: Portions) -> int:
    """Return how long a row may be. On a CPU, portions that give several lanes long rows would only
    take memory here, where there is one row at a time."""
    if trainable.masters[0].is_cuda:
        return portions.tokens
    return min(portions.tokens, MAX_MICRO_BATCH_TOKENS)


def _check(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise StopRequested


def _by_hand(
    flat: FlatTensors,
    rooms: list[Gradients],
    batch: Sequence[Example],
    num_labels: int,
    portions: Portions,
    check: Callable[[], None],
    lanes: Lanes,
) -> float:
    total, num_layers = 0.0, len(flat.decoder.layers)

    def one(room: Gradients, row: Row, workspace: Workspace, kept_layers: int) -> float:
        losses = row_gradients(
            *(flat.decoder, room.tensors, row, 1 / num_labels),
            kept_layers=kept_layers,
            check=check,
            workspace=workspace,
        )
        return float(losses.double().sum())

    for wave in waves(batch, portions, lanes):
        check()
        rows = [lay_row(hand) for hand in wave]
        is_kept = sum(len(row.input_ids) for row in rows) <= portions.kept_tokens
        while len(rooms) < len(rows):
            rooms.append(flat.new_gradients())
        tasks = [
            partial(one, room, row, workspace, num_layers if is_kept else 0)
            for room, row, workspace in zip(rooms, rows, lanes.workspaces, strict=False)
        ]
        total += sum(lanes.run(tasks))
        _check_finite(total)
        flat.collect(rooms[: len(rows)])
    flat.scale_gradient()
    return total


def _by_autograd(
    trainable: Trainable,
    batch: Sequence[Example],
    num_labels: int,
    portions: Portions,
    check: Callable[[], None],
) -> float:
    total = 0.0
    with packed_attention(trainable.model), _checked_layers(trainable.model, check):
        for micro_batch in pack(batch, _autograd_tokens(trainable, portions)):
            check()
            is_long = len(micro_batch.input_ids) > portions.kept_tokens
            with recomputed_layers(trainable.model) if is_long else nullcontext():
                losses = token_losses(trainable.model, micro_batch)
            if losses.numel() == 0:
                continue
            loss_sum = losses.sum()
            total += float(loss_sum.detach())
            _check_finite(total)
            (loss_sum / num_labels).backward()
            trainable.collect_gradients()
    return total


@contextmanager
def _checked_layers(model: LlamaForCausalLM, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before each layer's forward and backward pass inside a `with`."""

    def look(*_: Any) -> None:
        check()

    def look_on_the_way_back(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(look)

    handles = []
    for layer in layers_of(model):
        handles += [
            layer.register_forward_pre_hook(look),
            layer.register_forward_hook(look_on_the_way_back),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(total: float) -> None:
    if not math.isfinite(total):
        raise NonFiniteLossError(f"the training loss became {total}. {NOT_FINITE_ADVICE}")
