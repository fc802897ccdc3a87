"""The training loop: turns a plan, a folder of weights and rendered records into an artifact.

Every step is one batch of the plan's size, cut into packed micro-batches of bounded length; its
gradient is that of the mean loss over all tokens of the batch that carry loss, however it was cut.
The same inputs, thread count and machine give the same artifact to the last byte.

The loop knows nothing of jobs, buckets or databases: it reports through callbacks.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from outcrop.data.pack import pack
from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, NonFiniteLossError, StopRequested
from outcrop.evaluate.attention import packed_attention
from outcrop.evaluate.likelihood import (
    MAX_MICRO_BATCH_TOKENS,
    evaluate_likelihood,
    num_loss_tokens,
    perplexity,
    token_losses,
)
from outcrop.models.load import load_base
from outcrop.train.memory import KEPT_TOKENS, recomputed_layers
from outcrop.train.methods import Trainable, make_trainable
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import TrainPlan
from outcrop.train.schedule import evaluation_steps, learning_rate
from outcrop.train.threads import available_cores

MAX_GRADIENT_NORM = 1.0
"""Gradients are scaled down to this norm. Source: Llama 2 (arXiv 2307.09288), section 2.2."""
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
"""Source: Kingma and Ba, Adam (arXiv 1412.6980), algorithm 1."""
WEIGHT_DECAY = 0.0
ARTIFACT = "artifact"
NOT_FINITE_ADVICE = "Nothing was published. A smaller learningRate or a larger batchSize may help."


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind."""

    artifact: Path
    """Folder of the adapter, or of the whole model, below the run's output folder."""
    digest: str
    """SHA-256 over the artifact's file names and bytes, in hex."""
    training_loss: float
    """Mean over the tokens of the last epoch that carry loss, in nats a token."""
    validation_loss: float | None
    """The last one taken; None where there are no validation records."""
    steps: int
    """Optimizer steps taken."""
    num_tokens: int
    """Tokens trained on, with or without loss, each epoch counted."""
    seconds: float
    """Wall time of loading, training, validation and writing."""
    stopped_early: bool
    """Whether early stopping ended the run before its last step."""


def train(
    plan: TrainPlan,
    folder: Path,
    examples: Sequence[Example],
    validation: Sequence[Example],
    output: Path,
    *,
    on_step: Callable[[StepRow], None] = lambda row: None,
    on_validation: Callable[[ValidationRow], None] = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
    seed: int = 0,
    threads: int = 0,
    dtype: torch.dtype | None = None,
    micro_batch_tokens: int = MAX_MICRO_BATCH_TOKENS,
) -> TrainResult:
    """Train and write the artifact below `output`.

    Args:
        plan: made by `make_plan`.
        folder: the base model's weights, read only.
        examples: rendered training records; loss is taken where their masks say so.
        validation: rendered validation records; may be empty.
        output: folder that receives the artifact; made where it does not exist.
        on_step: called after every optimizer step.
        on_validation: called with the base's loss (step 0) before the first step, then some times
            an epoch and at its end.
        should_stop: asked between micro-batches; an unfinished step is thrown away.
        seed: decides the order of the records and the adapter's first values.
        threads: threads to compute with; 0 means all cores of this process.
        dtype: the type of the frozen weights; None takes this machine's fastest.
        micro_batch_tokens: tokens of one forward and backward pass. It bounds memory, and the time
            until `should_stop` is heard; but for rounding it does not change the result.
    Raises:
        EmptyLossError: no token of the records, or of one batch, carries loss.
        NonFiniteLossError: a loss or gradient became NaN or infinite; the message names the step.
        StopRequested: `should_stop` answered True. Nothing is written.
        ModelError: the base cannot be loaded.
    """
    started = time.perf_counter()
    if not any(num_loss_tokens(example) for example in examples):
        raise EmptyLossError(
            "No token of the training data carries loss: there is nothing to learn."
        )
    torch.set_num_threads(threads or available_cores())
    torch.manual_seed(seed)
    model = load_base(folder, dtype)
    trainable = make_trainable(model, plan, seed)
    run = _Run(plan, trainable, micro_batch_tokens, should_stop)
    watch = _Watch(plan)

    def evaluate(epoch: int) -> None:
        likelihood = evaluate_likelihood(model, validation, should_stop=should_stop)
        if not math.isfinite(likelihood.loss):
            raise NonFiniteLossError(
                f"Step {run.steps}: the validation loss became {likelihood.loss}. "
                f"{NOT_FINITE_ADVICE}"
            )
        row = ValidationRow(run.steps, epoch, likelihood.loss, likelihood.perplexity)
        on_validation(row)
        watch.see(row.validation_loss)

    if validation:
        evaluate(0)
    steps_per_epoch = math.ceil(len(examples) / plan.batch_size)
    run.total_steps = plan.num_epochs * steps_per_epoch
    evaluations = evaluation_steps(steps_per_epoch, plan.batch_size, len(validation))
    last_epoch = _Mean()
    for epoch in range(plan.num_epochs):
        last_epoch = _Mean()
        order = shuffled(len(examples), seed, epoch)
        for step_of_epoch in range(steps_per_epoch):
            first = step_of_epoch * plan.batch_size
            batch = [examples[place] for place in order[first : first + plan.batch_size]]
            row, num_labels = run.step(batch, epoch)
            last_epoch.add(row.training_loss, num_labels)
            on_step(row)
            if step_of_epoch + 1 in evaluations:
                evaluate(epoch)
                if watch.is_over:
                    break
        if watch.is_over:
            break
    if should_stop():
        raise StopRequested
    artifact = output / ARTIFACT
    trainable.save(artifact, folder)
    return TrainResult(
        artifact=artifact,
        digest=folder_digest(artifact),
        training_loss=last_epoch.value,
        validation_loss=watch.last,
        steps=run.steps,
        num_tokens=run.num_tokens,
        seconds=time.perf_counter() - started,
        stopped_early=run.steps < run.total_steps,
    )


class _Run:
    """A model on its way: takes steps and counts them."""

    def __init__(
        self,
        plan: TrainPlan,
        trainable: Trainable,
        micro_batch_tokens: int,
        should_stop: Callable[[], bool],
    ) -> None:
        self.total_steps = 0
        self.steps = 0
        self.num_tokens = 0
        self._plan = plan
        self._trainable = trainable
        self._micro_batch_tokens = micro_batch_tokens
        self._should_stop = should_stop
        self._optimizer = torch.optim.AdamW(
            trainable.masters,
            lr=plan.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPSILON,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def step(self, batch: Sequence[Example], epoch: int) -> tuple[StepRow, int]:
        """Take one optimizer step; return its row and how many tokens carried loss."""
        started = time.perf_counter()
        try:
            loss, num_labels = gather_gradients(
                self._trainable, batch, self._micro_batch_tokens, self._should_stop
            )
            self._update()
        except (NonFiniteLossError, EmptyLossError) as error:
            raise type(error)(f"Step {self.steps}: {error}") from None
        num_tokens = sum(len(example.input_ids) for example in batch)
        row = StepRow(
            step_number=self.steps,
            epoch_number=epoch,
            training_loss=loss,
            perplexity=perplexity(loss),
            num_tokens=num_tokens,
            seconds=time.perf_counter() - started,
        )
        self.steps += 1
        self.num_tokens += num_tokens
        return row, num_labels

    def _update(self) -> None:
        masters = self._trainable.masters
        norm = float(torch.nn.utils.clip_grad_norm_(masters, MAX_GRADIENT_NORM))
        if not math.isfinite(norm):
            raise NonFiniteLossError(f"the norm of the gradient became {norm}. {NOT_FINITE_ADVICE}")
        rate = learning_rate(
            self.steps, self.total_steps, self._plan.warmup_steps, self._plan.learning_rate
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._trainable.apply_masters()
        self._trainable.drop_gradients()


def gather_gradients(
    trainable: Trainable,
    batch: Sequence[Example],
    micro_batch_tokens: int = MAX_MICRO_BATCH_TOKENS,
    should_stop: Callable[[], bool] = lambda: False,
    kept_tokens: int = KEPT_TOKENS,
) -> tuple[float, int]:
    """Add the gradients of a batch's mean loss to the masters', micro-batch by micro-batch.

    Args:
        kept_tokens: a micro-batch of more tokens than this computes its activations twice.
    Returns:
        (loss, num_tokens): the mean over the batch's tokens that carry loss, in nats a token, and
        how many those are.
    Raises:
        EmptyLossError: no token of the batch carries loss.
        NonFiniteLossError: the loss is NaN or infinite.
        StopRequested: `should_stop` answered True; it is asked before each micro-batch.
    """
    num_labels = sum(num_loss_tokens(example) for example in batch)
    if num_labels == 0:
        raise EmptyLossError("no token of its records carries loss.")
    total = 0.0
    with packed_attention(trainable.model):
        for micro_batch in pack(batch, micro_batch_tokens):
            if should_stop():
                raise StopRequested
            is_long = len(micro_batch.input_ids) > kept_tokens
            with recomputed_layers(trainable.model) if is_long else nullcontext():
                losses = token_losses(trainable.model, micro_batch)
            if losses.numel() == 0:
                continue
            loss_sum = losses.sum()
            total += float(loss_sum.detach())
            if not math.isfinite(total):
                raise NonFiniteLossError(f"the training loss became {total}. {NOT_FINITE_ADVICE}")
            (loss_sum / num_labels).backward()
            trainable.collect_gradients()
    return total / num_labels, num_labels


class _Watch:
    """Remembers validation losses and says when early stopping ends the run.

    It ends when so many evaluations in a row as the patience says improved the best loss by less
    than the threshold. The base's loss before the first step is the first best.
    """

    def __init__(self, plan: TrainPlan) -> None:
        self.last: float | None = None
        self.is_over = False
        self._early_stopping = plan.early_stopping
        self._best = math.inf
        self._stale = 0

    def see(self, loss: float) -> None:
        """Take the next validation loss."""
        self.last = loss
        if self._early_stopping is None:
            return
        if self._best - loss >= self._early_stopping.threshold and loss < self._best:
            self._best = loss
            self._stale = 0
            return
        self._stale += 1
        self.is_over = self._stale >= self._early_stopping.patience


class _Mean:
    def __init__(self) -> None:
        self._total, self._weight = 0.0, 0

    def add(self, value: float, weight: int) -> None:
        self._total += value * weight
        self._weight += weight

    @property
    def value(self) -> float:
        return self._total / self._weight


def shuffled(num_examples: int, seed: int, epoch: int) -> list[int]:
    """Return the places of the records in the order in which an epoch takes them."""
    order = list(range(num_examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def folder_digest(folder: Path) -> str:
    """Return a SHA-256 in hex over the names and bytes of the files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
