"""The artifact of a run that was stopped: what its last checkpoint holds, written as at its end.

With early stopping it is the best state so far, else the last one: what the run would have
published had it ended there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from outcrop.data.records import Example
from outcrop.errors import TrainingError
from outcrop.evaluate.parity import choose_records, record_losses
from outcrop.models.artifact import folder_digest
from outcrop.train.checkpoint import newest_checkpoint
from outcrop.train.device import choose_device, device_dtype
from outcrop.train.loop import ARTIFACT, TrainResult, load_trainable
from outcrop.train.plan import TrainPlan
from outcrop.train.run import restore_values


def publish_checkpoint(
    plan: TrainPlan,
    folder: Path,
    checkpoints: Sequence[Path],
    sample: Sequence[Example],
    output: Path,
    *,
    parent: Path | None = None,
    seed: int = 0,
    threads: int = 1,
    device: torch.device | None = None,
) -> TrainResult:
    """Write the artifact of the newest checkpoint below `output`.

    Args:
        plan: of the stopped job.
        folder: the base model's weights.
        checkpoints: folders to look into.
        sample: records to compare with what is served.
        parent: as `train` takes it.
    Raises:
        TrainingError: no checkpoint is whole, or it does not fit the plan.
        ModelError: the base cannot be loaded.
    """
    started = time.perf_counter()
    torch.set_num_threads(threads)
    found = newest_checkpoint(checkpoints, None)
    if found is None or found.state.steps == 0:
        raise TrainingError(
            "The checkpoint cannot be used: its files are damaged or gone, or it was made by "
            "another version. Nothing was published. Create the job again."
        )
    state, tensors = found.state, found.tensors
    published_step = state.steps
    if state.published_step is not None and state.published_step != state.steps:
        assert found.best is not None, "it is part of the checkpoint"
        published_step, tensors = state.published_step, load_file(found.best)
    device = device or choose_device()
    model, trainable = load_trainable(plan, folder, parent, device_dtype(device), device, seed)
    try:
        restore_values(trainable, tensors)
    except (KeyError, RuntimeError) as error:
        raise TrainingError(
            f"The checkpoint of step {state.steps} does not fit the job's plan: {error}. Nothing "
            "was published."
        ) from error
    losses = record_losses(
        model,
        choose_records(sample),
        decoder=None if trainable.flat is None else trainable.flat.decoder,
    )
    artifact = output / ARTIFACT
    trainable.save(artifact, folder)
    validation_loss = None
    if state.validation_rows:
        validation_loss = (
            state.validation_rows[-1].validation_loss
            if state.published_step is None
            else state.lowest_loss
        )
    return TrainResult(
        artifact=artifact,
        digest=folder_digest(artifact),
        training_loss=state.epoch_loss / state.epoch_labels,
        validation_loss=validation_loss,
        steps=state.steps,
        num_tokens=state.num_tokens,
        seconds=time.perf_counter() - started,
        stopped_early=True,
        sample=losses,
        published_step=published_step,
    )
