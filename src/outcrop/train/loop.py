"""The training loop: turns a plan, a folder of weights and rendered records into an artifact.

Every step is one batch of the plan's size, cut into packed micro-batches of bounded length; its
gradient is that of the mean loss over all tokens of the batch that carry loss, however it was cut.
The same inputs, thread count and machine give the same artifact to the last byte.

The loop knows nothing of jobs, buckets or databases: it reports through callbacks.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from outcrop.data.pack import pack
from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, NonFiniteLossError, StopRequested, TrainingError
from outcrop.evaluate.attention import packed_attention
from outcrop.evaluate.likelihood import (
    MAX_MICRO_BATCH_TOKENS,
    evaluate_likelihood,
    num_loss_tokens,
    perplexity,
    token_losses,
)
from outcrop.models.artifact import folder_digest as folder_digest
from outcrop.models.artifact import read_artifact
from outcrop.models.load import compute_dtype, load_base
from outcrop.models.lora import load_adapter
from outcrop.train.checkpoint import Keeper, RunState, newest_checkpoint, run_identity
from outcrop.train.memory import KEPT_TOKENS, peak_memory_bytes, recomputed_layers
from outcrop.train.methods import Trainable, make_trainable
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import EarlyStopping, TrainPlan
from outcrop.train.schedule import evaluation_steps, learning_rate
from outcrop.train.threads import available_cores

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

logger = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 1.0
"""Gradients are scaled down to this norm. Source: Llama 2 (arXiv 2307.09288), section 2.2."""
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
"""Source: Kingma and Ba, Adam (arXiv 1412.6980), algorithm 1."""
WEIGHT_DECAY = 0.0
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each tensor, besides the number of steps."""
ARTIFACT = "artifact"
MAX_NAMED_RECORDS = 16
"""So many records of a batch are named in a message."""
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
    parent: Path | None = None,
    on_step: Callable[[StepRow], None] = lambda row: None,
    on_validation: Callable[[ValidationRow], None] = lambda row: None,
    on_resume: Callable[[Sequence[StepRow], Sequence[ValidationRow]], None] = lambda *rows: None,
    should_stop: Callable[[], bool] = lambda: False,
    seed: int = 0,
    threads: int = 0,
    dtype: torch.dtype | None = None,
    micro_batch_tokens: int = MAX_MICRO_BATCH_TOKENS,
    checkpoints: Path | None = None,
    checkpoint_seconds: float = 30.0,
    earlier: Sequence[Path] = (),
) -> TrainResult:
    """Train and write the artifact below `output`.

    Args:
        plan: made by `make_plan`.
        folder: the base model's weights, read only.
        examples: rendered training records; loss is taken where their masks say so.
        validation: rendered validation records; may be empty.
        output: folder that receives the artifact; made where it does not exist.
        parent: artifact of the custom model to go on from; None starts from the base model.
        on_step: called after every optimizer step.
        on_validation: called with the base's loss (step 0) before the first step, then some times
            an epoch and at its end.
        on_resume: called with all rows of the earlier tries where the run goes on from there.
        should_stop: asked between micro-batches; an unfinished step is thrown away.
        seed: decides the order of the records and the adapter's first values.
        threads: threads to compute with; 0 means all cores of this process.
        dtype: the type of the frozen weights; None takes this machine's fastest.
        micro_batch_tokens: tokens of one forward and backward pass. It bounds memory, and the time
            until `should_stop` is heard; but for rounding it does not change the result.
        checkpoints: folder that receives the run's state now and then, and when it is stopped;
            None for no checkpoints.
        checkpoint_seconds: least time between two of them; it grows so that writing them takes a
            hundredth of the run at most.
        earlier: folders with checkpoints of earlier tries. The run goes on from the newest one
            that is whole and of a run with the same plan, data and settings, as if it had never
            been interrupted; they are removed once there is a newer one.
    Raises:
        EmptyLossError: no token of the records, or of one batch, carries loss.
        NonFiniteLossError: a loss or gradient became NaN or infinite; the message names the step.
        StopRequested: `should_stop` answered True. No artifact is written.
        TrainingError: the data is not what the newest checkpoint was made with.
        ModelError: the base cannot be loaded.
    """
    started = time.perf_counter()
    if not any(num_loss_tokens(example) for example in examples):
        raise EmptyLossError(
            "No token of the training data carries loss: there is nothing to learn."
        )
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    dtype = dtype or compute_dtype()
    model, trainable = _load(plan, folder, parent, dtype, seed)
    identity = run_identity(
        *(plan, examples, validation),
        seed=seed,
        threads=threads,
        dtype=dtype,
        micro_batch_tokens=micro_batch_tokens,
        parent=None if parent is None else folder_digest(parent),
    )
    found = newest_checkpoint(earlier, identity)
    if found is not None and not found.has_same_data:
        raise TrainingError(
            f"The training or validation data changed after step {found.state.steps}: it is not "
            "what this job began with. Nothing was published. Create the job again."
        )
    state = found.state if found is not None else RunState()
    run = _Run(plan, trainable, state, micro_batch_tokens, should_stop)
    if found is not None:
        run.restore(found.tensors)
        logger.info("going on after step %d", state.steps)
        on_resume(state.step_rows, state.validation_rows)
    keeper = (
        Keeper(
            *(checkpoints, identity, state.steps),
            least_seconds=checkpoint_seconds,
            replaces=earlier,
        )
        if checkpoints is not None
        else None
    )

    steps_per_epoch = math.ceil(len(examples) / plan.batch_size)
    run.total_steps = plan.num_epochs * steps_per_epoch
    evaluations = evaluation_steps(steps_per_epoch, plan.batch_size, len(validation))

    def evaluate_if_due() -> None:
        epoch, last_step = divmod(max(0, state.steps - 1), steps_per_epoch)
        is_due = state.steps == 0 or last_step + 1 in evaluations
        if validation and is_due and not state.is_evaluated:
            likelihood = evaluate_likelihood(model, validation, should_stop=should_stop)
            if not math.isfinite(likelihood.loss):
                raise NonFiniteLossError(
                    f"Step {state.steps}: the validation loss became {likelihood.loss}. "
                    f"{NOT_FINITE_ADVICE}"
                )
            row = ValidationRow(state.steps, epoch, likelihood.loss, likelihood.perplexity)
            state.validation_rows.append(row)
            watch(state, plan.early_stopping)
            on_validation(row)
        state.is_evaluated = True

    try:
        evaluate_if_due()
        while state.steps < run.total_steps and not is_over(state, plan.early_stopping):
            epoch, step_of_epoch = divmod(state.steps, steps_per_epoch)
            order = shuffled(len(examples), seed, epoch)
            first = step_of_epoch * plan.batch_size
            places = order[first : first + plan.batch_size]
            if step_of_epoch == 0:
                state.epoch_loss, state.epoch_labels = 0.0, 0
            try:
                row = run.step([examples[place] for place in places], epoch)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error} {describe_batch(places)}") from None
            on_step(row)
            evaluate_if_due()
            if keeper is not None and keeper.is_due():
                keeper.save(state, run.tensors())
        if should_stop():
            raise StopRequested
    except StopRequested:
        if keeper is not None and state.steps > keeper.saved_step:
            keeper.save(state, run.tensors())
        raise
    artifact = output / ARTIFACT
    trainable.save(artifact, folder)
    return TrainResult(
        artifact=artifact,
        digest=folder_digest(artifact),
        training_loss=state.epoch_loss / state.epoch_labels,
        validation_loss=state.validation_rows[-1].validation_loss if validation else None,
        steps=state.steps,
        num_tokens=state.num_tokens,
        seconds=time.perf_counter() - started,
        stopped_early=state.steps < run.total_steps,
    )


def _load(
    plan: TrainPlan, folder: Path, parent: Path | None, dtype: torch.dtype, seed: int
) -> tuple[LlamaForCausalLM, Trainable]:
    """Load what is trained: the base model, or the custom model that training goes on from."""
    if parent is None:
        model = load_base(folder, dtype)
        return model, make_trainable(model, plan, seed)
    artifact = read_artifact(parent)
    model = load_base(artifact.weights or folder, dtype)
    start = None if artifact.adapter is None else load_adapter(artifact.adapter)
    return model, make_trainable(model, plan, seed, start=start, whole=artifact.weights)


class _Run:
    """A model on its way: takes steps and counts them."""

    def __init__(
        self,
        plan: TrainPlan,
        trainable: Trainable,
        state: RunState,
        micro_batch_tokens: int,
        should_stop: Callable[[], bool],
    ) -> None:
        self.total_steps = 0
        self._state = state
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

    def step(self, batch: Sequence[Example], epoch: int) -> StepRow:
        """Take one optimizer step and return its row."""
        started, state = time.perf_counter(), self._state
        try:
            loss, num_labels = gather_gradients(
                self._trainable, batch, self._micro_batch_tokens, self._should_stop
            )
            rate, norm = self._update()
        except (NonFiniteLossError, EmptyLossError) as error:
            raise type(error)(f"Step {state.steps}: {error}") from None
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
            peak_memory_bytes=peak_memory_bytes(),
        )
        state.steps += 1
        state.num_tokens += num_tokens
        state.epoch_loss += loss * num_labels
        state.epoch_labels += num_labels
        state.step_rows.append(row)
        state.is_evaluated = False
        return row

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained and the optimizer's moments, for a checkpoint."""
        found = {}
        for number, master in enumerate(self._trainable.masters):
            found[f"{number}.value"] = master.detach()
            moments = self._optimizer.state[master]
            found |= {f"{number}.{name}": moments[name] for name in MOMENTS}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a checkpoint."""
        with torch.no_grad():
            for number, master in enumerate(self._trainable.masters):
                master.copy_(tensors[f"{number}.value"])
                self._optimizer.state[master] = {
                    # A tensor of its own on the CPU, as AdamW makes it.
                    "step": torch.tensor(float(self._state.steps)),
                    **{name: tensors[f"{number}.{name}"].to(master.device) for name in MOMENTS},
                }
        self._trainable.apply_masters()

    def _update(self) -> tuple[float, float]:
        """Move the masters; return the learning rate and the gradient's uncut length."""
        masters = self._trainable.masters
        norm = float(torch.nn.utils.clip_grad_norm_(masters, MAX_GRADIENT_NORM))
        if not math.isfinite(norm):
            raise NonFiniteLossError(f"the norm of the gradient became {norm}. {NOT_FINITE_ADVICE}")
        rate = learning_rate(
            self._state.steps, self.total_steps, self._plan.warmup_steps, self._plan.learning_rate
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._trainable.apply_masters()
        self._trainable.drop_gradients()
        return rate, norm


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


def watch(state: RunState, early_stopping: EarlyStopping | None) -> None:
    """Take the newest validation loss into account for early stopping.

    The base's loss before the first step is the first best.
    """
    if early_stopping is None:
        return
    loss, best = state.validation_rows[-1].validation_loss, state.best_loss
    if best is None or (best - loss >= early_stopping.threshold and loss < best):
        state.best_loss, state.stale = loss, 0
    else:
        state.stale += 1


def is_over(state: RunState, early_stopping: EarlyStopping | None) -> bool:
    """Say whether early stopping ends the run: as many evaluations in a row as its patience says
    improved the best loss by less than its threshold.
    """
    return early_stopping is not None and state.stale >= early_stopping.patience


def shuffled(num_examples: int, seed: int, epoch: int) -> list[int]:
    """Return the places of the records in the order in which an epoch takes them."""
    order = list(range(num_examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def describe_batch(places: Sequence[int]) -> str:
    """Say which training records a batch held, counted from 1, for a message."""
    numbers = sorted(place + 1 for place in places)
    shown = ", ".join(map(str, numbers[:MAX_NAMED_RECORDS]))
    more = len(numbers) - MAX_NAMED_RECORDS
    return (
        f"The batch held the training records {shown}"
        + (f" and {more} more" if more > 0 else "")
        + ", counted without blank lines and without those drawn off for validation."
    )
