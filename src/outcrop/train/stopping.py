"""Early stopping: when a run ends before its last step, and the best state that it then publishes.

The best state is the one with the lowest validation loss of all, whatever the threshold; the base
model before the first step counts. Its values are a file of their own, written beside its place and
renamed, and its digest is part of the run's state: a run that goes on after a death finds it again,
because each checkpoint holds a second name of that file (train/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor

from outcrop.errors import TrainingError
from outcrop.store.files import sync

if TYPE_CHECKING:
    from outcrop.train.checkpoint import RunState
    from outcrop.train.plan import EarlyStopping

BEST = "best.safetensors"
"""The values of the best state, in the output folder and in each checkpoint."""


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


def keep_if_best(state: RunState, values: Mapping[str, Tensor], folder: Path) -> None:
    """Keep what is trained, where the newest validation loss is the lowest so far.

    Raises:
        OSError, SafetensorError: it could not be written; the best before it is still there.
    """
    loss = state.validation_rows[-1].validation_loss
    if state.lowest_loss is not None and loss >= state.lowest_loss:
        return
    folder.mkdir(parents=True, exist_ok=True)
    place, unfinished = folder / BEST, folder / f".{BEST}.{os.getpid()}"
    try:
        save_file({name: value.contiguous() for name, value in values.items()}, unfinished)
        sync(unfinished)
        digest = file_digest(unfinished)
        unfinished.rename(place)
        sync(folder)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    state.lowest_loss, state.published_step, state.best_digest = loss, state.steps, digest


def take_over_best(found: Path, folder: Path) -> None:
    """Give a best state of an earlier try a name of this one's own: that try's folder will go."""
    folder.mkdir(parents=True, exist_ok=True)
    same_file(found, folder / BEST)


def same_file(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system knows no second names."""
    target.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
    sync(target)


def read_best(state: RunState, folder: Path) -> dict[str, Tensor]:
    """Return the values of the best state.

    Raises:
        TrainingError: they are not what was written.
    """
    place = folder / BEST
    if file_digest(place) != state.best_digest:
        raise TrainingError(
            f"The best state, of step {state.published_step}, was damaged on disk ({place}). "
            "Nothing was published. Create the job again."
        )
    return load_file(place)


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
