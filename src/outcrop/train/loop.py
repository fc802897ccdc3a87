"""The training loop: turns a plan, a folder of weights and rendered records into an artifact.

Every step is one batch of the plan's size, cut into packed micro-batches of bounded length; its
gradient is that of the mean loss over all tokens of the batch that carry loss, however it was cut.
The same inputs, thread count and machine give the same artifact to the last byte.

The loop knows nothing of jobs, buckets or databases: it reports through callbacks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, NonFiniteLossError, StopRequested, TrainingError
from outcrop.evaluate.likelihood import evaluate_likelihood, num_loss_tokens
from outcrop.evaluate.parity import RecordLoss, choose_records, record_losses
from outcrop.models.artifact import folder_digest as folder_digest
from outcrop.models.artifact import read_artifact
from outcrop.models.kernels import are_compiled
from outcrop.models.lanes import Lanes
from outcrop.models.load import load_base
from outcrop.models.lora import load_adapter
from outcrop.train.batches import describe_batch, shuffled
from outcrop.train.checkpoint import Keeper, RunState, newest_checkpoint, run_identity
from outcrop.train.device import choose_device, default_portions, device_dtype, device_name
from outcrop.train.gradients import gather_gradients, micro_batches
from outcrop.train.memory import check_room, trim_heap
from outcrop.train.methods import Trainable, make_trainable
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import TrainPlan
from outcrop.train.portions import Portions
from outcrop.train.prediction import ModelShape
from outcrop.train.run import NOT_FINITE_ADVICE, Run
from outcrop.train.schedule import evaluation_steps
from outcrop.train.stopping import (
    BEST,
    is_over,
    keep_if_best,
    read_best,
    take_over_best,
    watch,
)
from outcrop.train.threads import available_cores
from outcrop.train.tuning import ThreadPlan, assumed_threads, choose_threads

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

logger = logging.getLogger(__name__)

ARTIFACT = "artifact"


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
    """Of the state that is published; None where there are no validation records."""
    steps: int
    """Optimizer steps taken."""
    num_tokens: int
    """Tokens trained on, with or without loss, each epoch counted."""
    seconds: float
    """Wall time of loading, training, validation and writing."""
    stopped_early: bool
    """Whether early stopping ended the run before its last step."""
    sample: tuple[RecordLoss, ...]
    """Losses of a few validation records, or training records where there are none, under the
    model as it is published."""
    published_step: int
    """After how many steps the model was as it is published: with early stopping, where the
    validation loss was lowest, 0 being the base model; else after the last one."""


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
    on_portions: Callable[[Portions, str], None] = lambda *portions: None,
    should_stop: Callable[[], bool] = lambda: False,
    seed: int = 0,
    threads: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    micro_batch_tokens: int | None = None,
    kept_tokens: int | None = None,
    cuts: int = 0,
    thread_plan: ThreadPlan | None = None,
    thread_plans: Path | None = None,
    on_thread_plan: Callable[[ThreadPlan], None] = lambda plan: None,
    checkpoints: Path | None = None,
    checkpoint_seconds: float = 30.0,
    earlier: Sequence[Path] = (),
    continued: Sequence[Path] = (),
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
        on_portions: called when memory did not suffice and steps are computed in smaller portions
            from now on, with what is to be said about it.
        should_stop: asked before each layer of both passes; an unfinished step is thrown away.
        seed: decides the order of the records and the adapter's first values.
        threads: threads to compute with; 0 means all cores of this process.
        device: where to compute; None takes a GPU if there is one.
        dtype: the type of the frozen weights; None takes the device's fastest.
        micro_batch_tokens: tokens of one forward and backward pass. It bounds memory, and the time
            until `should_stop` is heard; but for rounding it does not change the result. None
            takes what suits the device.
        kept_tokens: a micro-batch of more tokens than this computes its activations twice; None
            likewise.
        cuts: how often an earlier try was ended for its memory; portions are made smaller as often.
        thread_plan: how the cores are used, as an earlier try used them; None takes the one that is
            kept for this machine and model, or measures it.
        thread_plans: folder where measured plans are kept; None measures nothing, so that the plan
            depends on the number of threads alone.
        on_thread_plan: called with the plan in use before the first step.
        checkpoints: folder that receives the run's state now and then, and when it is stopped;
            None for no checkpoints.
        checkpoint_seconds: least time between two of them; it grows so that writing them takes a
            hundredth of the run at most.
        earlier: folders with checkpoints of earlier tries. The run goes on from the newest one
            that is whole and of a run with the same plan, data and settings, as if it had never
            been interrupted; they are removed once there is a newer one.
        continued: folders with checkpoints of another job that this run must go on from. They are
            only read.
    Raises:
        EmptyLossError: no token of the records, or of one batch, carries loss.
        NonFiniteLossError: a loss or gradient became NaN or infinite; the message names the step.
        OutOfMemoryError: one record alone does not fit into memory.
        StopRequested: `should_stop` answered True. No artifact is written.
        TrainingError: the data is not what the newest checkpoint was made with, there is none in
            `continued` that fits, or the device is not there.
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
    device = device or choose_device()
    dtype = dtype or device_dtype(device)
    model, trainable = load_trainable(plan, folder, parent, dtype, device, seed)
    longest = max(len(example.input_ids) for example in examples)
    shape = ModelShape.of(model.config.to_dict())
    portions = default_portions(device, shape, plan, longest, threads)
    portions = Portions(
        portions.tokens if micro_batch_tokens is None else micro_batch_tokens,
        portions.kept_tokens if kept_tokens is None else kept_tokens,
    )
    if device.type == "cuda":
        # One row at a time, whatever the job used before on a CPU.
        thread_plan = assumed_threads(1, has_lanes=False)
    elif thread_plan is None:
        if threads == 1 or thread_plans is None:
            thread_plan = assumed_threads(threads, has_lanes=trainable.flat is not None)
        else:
            thread_plan = choose_threads(trainable, threads, thread_plans)
    on_thread_plan(thread_plan)
    torch.set_num_threads(thread_plan.row_threads)
    lanes = Lanes(thread_plan.lanes, thread_plan.largest_share)
    identity = run_identity(
        *(plan, examples, validation),
        seed=seed,
        threads=threads,
        device=device_name(device),
        dtype=dtype,
        micro_batch_tokens=portions.tokens,
        kept_tokens=portions.kept_tokens,
        thread_plan=thread_plan,
        compiled=device.type == "cpu" and are_compiled(dtype),
        parent=None if parent is None else folder_digest(parent),
    )
    found = newest_checkpoint([*earlier, *continued], identity)
    if found is None and continued:
        raise TrainingError(
            "The checkpoint that the job was to go on from cannot be used: its files are damaged "
            "or gone, or it was made by another version, or on another kind of processor. Nothing "
            "was published. Create a job from the beginning, or a model of the checkpoint."
        )
    if found is not None and not found.has_same_data:
        raise TrainingError(
            f"The training or validation data changed after step {found.state.steps}: it is not "
            "what this job began with. Nothing was published. Create the job again."
        )
    state = found.state if found is not None else RunState()
    steps_per_epoch = math.ceil(len(examples) / plan.batch_size)
    total_steps = plan.num_epochs * steps_per_epoch
    evaluations = evaluation_steps(steps_per_epoch, plan.batch_size, len(validation))

    def is_to_stop() -> bool:
        check_room()
        return should_stop()

    def gather(batch: Sequence[Example], portions: Portions) -> tuple[float, int]:
        return gather_gradients(trainable, batch, portions, is_to_stop, lanes)

    def lay(records: Sequence[Example], portions: Portions) -> list[list[int]]:
        return micro_batches(trainable, records, portions, lanes)

    if found is None:
        state.portions = portions
    run = Run(plan, trainable, state, total_steps, gather, lay, on_portions)
    if found is not None:
        run.restore(found.tensors)
        if found.best is not None:
            take_over_best(found.best, output)
        logger.info("going on after step %d", state.steps)
        on_resume(state.step_rows, state.validation_rows)
    while state.cuts < cuts:
        state.cuts += 1
        largest = sorted(examples, key=lambda example: len(example.input_ids))[-plan.batch_size :]
        run.cut(largest, "An earlier attempt was ended by the system for its memory.")
    keeper = (
        Keeper(
            # A stop shall leave one of its own here, whatever another job has.
            *(checkpoints, identity, 0 if continued else state.steps),
            least_seconds=checkpoint_seconds,
            replaces=earlier,
            best=output / BEST,
        )
        if checkpoints is not None
        else None
    )

    def evaluate_if_due() -> None:
        epoch, last_step = divmod(max(0, state.steps - 1), steps_per_epoch)
        is_due = state.steps == 0 or last_step + 1 in evaluations
        if validation and is_due and not state.is_evaluated:
            likelihood = run.within_memory(
                validation,
                lambda portions: evaluate_likelihood(
                    model,
                    validation,
                    should_stop=is_to_stop,
                    micro_batch_tokens=portions.tokens,
                    decoder=None if trainable.flat is None else trainable.flat.decoder,
                    lanes=lanes,
                ),
            )
            if not math.isfinite(likelihood.loss):
                raise NonFiniteLossError(
                    f"Step {state.steps}: the validation loss became {likelihood.loss}. "
                    f"{NOT_FINITE_ADVICE}"
                )
            row = ValidationRow(state.steps, epoch, likelihood.loss, likelihood.perplexity)
            state.validation_rows.append(row)
            watch(state, plan.early_stopping)
            if plan.early_stopping is not None:
                keep_if_best(state, run.values(), output)
            on_validation(row)
        state.is_evaluated = True

    try:
        evaluate_if_due()
        logger.info("step %d of %d begins", state.steps, total_steps)
        while state.steps < total_steps and not is_over(state, plan.early_stopping):
            epoch, step_of_epoch = divmod(state.steps, steps_per_epoch)
            order = shuffled(len(examples), seed, epoch)
            first = step_of_epoch * plan.batch_size
            places = order[first : first + plan.batch_size]
            if step_of_epoch == 0:
                state.epoch_loss, state.epoch_labels = 0.0, 0
            try:
                row = run.step([examples[place] for place in places], epoch)
            except (NonFiniteLossError, EmptyLossError) as error:
                raise type(error)(f"{error} {describe_batch(places)}") from None
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
    validation_loss = state.validation_rows[-1].validation_loss if validation else None
    published_step = state.steps
    if state.published_step is not None:
        published_step, validation_loss = state.published_step, state.lowest_loss
        if published_step != state.steps:
            run.restore_values(read_best(state, output))
            logger.info("the state after step %d was the best one", published_step)
    # What steps computed in is not needed any more: one record at a time then fits in any case.
    trainable.drop_gradients()
    for workspace in lanes.workspaces:
        workspace.forget()
    trim_heap()
    sample = record_losses(
        model,
        choose_records(validation or examples),
        decoder=None if trainable.flat is None else trainable.flat.decoder,
        lanes=lanes,
        should_stop=should_stop,
    )
    artifact = output / ARTIFACT
    trainable.save(artifact, folder)
    return TrainResult(
        artifact=artifact,
        digest=folder_digest(artifact),
        training_loss=state.epoch_loss / state.epoch_labels,
        validation_loss=validation_loss,
        steps=state.steps,
        num_tokens=state.num_tokens,
        seconds=time.perf_counter() - started,
        stopped_early=state.steps < total_steps,
        sample=sample,
        published_step=published_step,
    )


def load_trainable(
    plan: TrainPlan,
    folder: Path,
    parent: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[LlamaForCausalLM, Trainable]:
    """Load what is trained: the base model, or the custom model that training goes on from."""
    if parent is None:
        model = load_base(folder, dtype, device)
        return model, make_trainable(model, plan, seed)
    artifact = read_artifact(parent)
    model = load_base(artifact.weights or folder, dtype, device)
    start = None if artifact.adapter is None else load_adapter(artifact.adapter)
    return model, make_trainable(model, plan, seed, start=start, whole=artifact.weights)
