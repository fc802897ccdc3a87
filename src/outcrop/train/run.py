"""A model on its way: takes optimizer steps, and takes them again in smaller portions where memory
does not suffice.

A step that was refused memory leaves nothing behind: its gradients are thrown away, and nothing
else has been changed by then. The same batch is then computed in smaller portions, which is the
same mathematics in another order of sums, and the portions stay that small for the rest of the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, NonFiniteLossError, OutOfMemoryError
from outcrop.evaluate.likelihood import perplexity
from outcrop.models.catalog import LoraConfig
from outcrop.train.device import peak_device_bytes
from outcrop.train.memory import (
    bound_bytes,
    give_memory_back,
    held_bytes,
    is_out_of_memory,
    peak_memory_bytes,
    trim_heap,
)
from outcrop.train.metrics import StepRow
from outcrop.train.portions import Portions, gibibytes
from outcrop.train.prediction import ModelShape, predict_memory
from outcrop.train.schedule import learning_rate

if TYPE_CHECKING:
    from outcrop.train.checkpoint import RunState
    from outcrop.train.methods import Trainable
    from outcrop.train.plan import TrainPlan

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_GRADIENT_NORM = 1.0
"""Gradients are scaled down to this norm. Source: Llama 2 (arXiv 2307.09288), section 2.2."""
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
"""Source: Kingma and Ba, Adam (arXiv 1412.6980), algorithm 1."""
WEIGHT_DECAY = 0.0
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each tensor, besides the number of steps."""
TIDY_SECONDS = 1.0
"""Between two times at which holes in the heap are given back; takes some 10 ms."""
NOT_FINITE_ADVICE = "Nothing was published. A smaller learningRate or a larger batchSize may help."
OUT_OF_MEMORY_ADVICE = (
    "Nothing was published. Shorter records, a smaller model, adapters instead of full "
    "fine-tuning, fewer jobs at once or more memory may help."
)

Gather = Callable[[Sequence[Example], Portions], tuple[float, int]]
"""Adds the gradients of a batch's mean loss to the masters'; returns the loss and the number of
tokens that carry it."""
Lay = Callable[[Sequence[Example], Portions], list[list[int]]]
"""Returns the lengths of the records in each micro-batch that records are cut into."""


class Run:
    """Takes steps and counts them."""

    def __init__(
        self,
        plan: TrainPlan,
        trainable: Trainable,
        state: RunState,
        total_steps: int,
        gather: Gather,
        lay: Lay,
        on_portions: Callable[[Portions, str], None],
    ) -> None:
        """
        Args:
            on_portions: called when portions became smaller, with what is to be said about it.
        """
        self._total_steps = total_steps
        self._state = state
        self._plan = plan
        self._trainable = trainable
        self._gather, self._lay, self._on_portions = gather, lay, on_portions
        self._optimizer = torch.optim.AdamW(
            trainable.masters,
            lr=plan.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPSILON,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        self._tidied = time.monotonic()
        # Made now, as AdamW itself would at the first step: so that a step, once it moves the
        # masters, asks for no memory any more and cannot be cut off half-way.
        for master in trainable.masters:
            self._set_moments(master, {name: torch.zeros_like(master) for name in MOMENTS})

    def step(self, batch: Sequence[Example], epoch: int) -> StepRow:
        """Take one optimizer step and return its row.

        Raises:
            NonFiniteLossError, EmptyLossError, OutOfMemoryError: the message names the step.
        """
        started, state = time.perf_counter(), self._state

        def compute(portions: Portions) -> tuple[float, int, float]:
            loss, num_labels = self._gather(batch, portions)
            return loss, num_labels, self._clip()

        try:
            loss, num_labels, norm = self.within_memory(batch, compute)
        except (NonFiniteLossError, EmptyLossError) as error:
            raise type(error)(f"Step {state.steps}: {error}") from None
        rate = self._update()
        num_tokens = sum(len(example.input_ids) for example in batch)
        row = StepRow(
            step_number=state.steps,
            epoch_number=epoch,
            training_loss=loss,
            perplexity=perplexity(loss),
            num_tokens=num_tokens,
            seconds=time.perf_counter() - started,
            learning_rate=rate,
            gradient_norm=norm,
            peak_memory_bytes=peak_device_bytes(self._trainable.masters[0].device),
            micro_batch_tokens=state.portions.tokens,
            kept_tokens=state.portions.kept_tokens,
        )
        self._tidy()
        state.steps += 1
        state.num_tokens += num_tokens
        state.epoch_loss += loss * num_labels
        state.epoch_labels += num_labels
        state.step_rows.append(row)
        state.is_evaluated = False
        return row

    def within_memory(self, records: Sequence[Example], compute: Callable[[Portions], T]) -> T:
        """Return what `compute` returns, after as many tries with smaller portions as it needs.

        Args:
            records: what it computes with.
            compute: must leave nothing behind but gradients when it is refused memory.
        Raises:
            OutOfMemoryError: the smallest portions are too large.
        """
        while True:
            try:
                return compute(self._state.portions)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                refused = str(error) or "memory was refused"
            # Only here, where the error is gone, and with it the frames that hold the activations.
            self._trainable.drop_gradients()
            give_memory_back()
            self.cut(records, refused)

    def cut(self, records: Sequence[Example], refused: str) -> None:
        """Make the portions smaller for the rest of the run.

        Raises:
            OutOfMemoryError: they are the smallest already.
        """
        before = self._state.portions
        micro_batches = self._lay(records, before)
        portions = before.smaller(micro_batches)
        longest = max(map(sum, micro_batches))
        if portions is None:
            raise OutOfMemoryError(self._too_small(records, refused))
        self._state.portions = portions
        message = (
            f"Step {self._state.steps} did not fit into memory and is computed in smaller "
            f"portions, as all steps after it: {portions.tokens} instead of {before.tokens} tokens "
            f"at a time; from {portions.kept_tokens + 1} tokens on, activations are computed twice."
            f" The largest micro-batch had {longest} tokens; {_figures()}"
        )
        logger.warning("%s %s", message, refused)
        self._on_portions(portions, message)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained and the optimizer's moments, on the CPU, for a checkpoint."""
        found = self.values()
        for number, master in enumerate(self._trainable.masters):
            moments = self._optimizer.state[master]
            found |= {f"{number}.{name}": moments[name].cpu() for name in MOMENTS}
        return found

    def values(self) -> dict[str, Tensor]:
        """Return what is trained, on the CPU."""
        masters = self._trainable.masters
        return {f"{number}.value": master.detach().cpu() for number, master in enumerate(masters)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a checkpoint."""
        self.restore_values(tensors)
        for number, master in enumerate(self._trainable.masters):
            self._set_moments(
                master, {name: tensors[f"{number}.{name}"].to(master.device) for name in MOMENTS}
            )

    def restore_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what was trained, without the optimizer's moments."""
        restore_values(self._trainable, tensors)

    def _set_moments(self, master: Tensor, moments: Mapping[str, Tensor]) -> None:
        # The number of steps is a tensor of its own on the CPU, as AdamW makes it; on a GPU, its
        # fused form wants it there.
        device = master.device if master.is_cuda else "cpu"
        steps = torch.tensor(float(self._state.steps), device=device)
        self._optimizer.state[master] = {"step": steps, **moments}

    def _clip(self) -> float:
        """Cut the gradients to their greatest length; return the length that they had."""
        masters = self._trainable.masters
        gradients = [master.grad for master in masters if master.grad is not None]
        length = torch.nn.utils.get_total_norm(gradients)
        norm = float(length)
        if not math.isfinite(norm):
            raise NonFiniteLossError(f"the norm of the gradient became {norm}. {NOT_FINITE_ADVICE}")
        if norm > MAX_GRADIENT_NORM * 0.999:  # below, every number would be multiplied by one
            torch.nn.utils.clip_grads_with_norm_(masters, MAX_GRADIENT_NORM, length)
        return norm

    def _update(self) -> float:
        """Move the masters; return the learning rate."""
        rate = learning_rate(
            self._state.steps, self._total_steps, self._plan.warmup_steps, self._plan.learning_rate
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._trainable.apply_masters()
        self._trainable.drop_gradients()
        return rate

    def _tidy(self) -> None:
        now = time.monotonic()
        if not self._trainable.masters[0].is_cuda and now >= self._tidied + TIDY_SECONDS:
            trim_heap()
            self._tidied = now

    def _too_small(self, records: Sequence[Example], refused: str) -> str:
        longest = max(len(example.input_ids) for example in records)
        shape = ModelShape.of(self._trainable.model.config.to_dict())
        with_loss = max(sum(example.loss_mask) for example in records)
        needed = predict_memory(
            *(shape, self._plan.method, longest, with_loss),
            adapter=LoraConfig(
                self._plan.lora_rank, self._plan.lora_alpha, self._plan.lora_targets
            ),
            is_recomputed=True,
        )
        return (
            f"Step {self._state.steps}: the memory does not suffice, even with one record at a "
            "time and activations that are computed twice. The longest record of the batch has "
            f"{longest} tokens, for which about {gibibytes(needed)} are needed; {_figures()} "
            f"The last thing that was refused: {refused[:300]} {OUT_OF_MEMORY_ADVICE}"
        )


def restore_values(trainable: Trainable, tensors: Mapping[str, Tensor]) -> None:
    """Take over what was trained."""
    with torch.no_grad():
        for number, master in enumerate(trainable.masters):
            master.copy_(tensors[f"{number}.value"])
    trainable.apply_masters()


def _figures() -> str:
    """Say what the process has and may have."""
    bound = bound_bytes()
    allowed = (
        f"the process may hold {gibibytes(bound)} and holds {gibibytes(held_bytes())}"
        if bound is not None
        else "the system refused more"
    )
    return f"{allowed}; its peak was {gibibytes(peak_memory_bytes())}."
