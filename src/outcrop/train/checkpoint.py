"""The state of a run between two steps, on disk, so that a later process goes on from there.

A checkpoint is a folder `step-<number>` with the tensors (what is trained, and the optimizer's
moments) and a page of JSON with everything else. It is written beside its place, synced and
renamed, so it is whole or not there; the page holds the digest of the tensors, so a damaged one is
found and the one before it is taken. Knows nothing of jobs: which folders to look into is said by
the caller.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from outcrop.data.records import Example
from outcrop.store.files import sync
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.plan import TrainPlan
from outcrop.train.portions import Portions
from outcrop.train.stopping import BEST, file_digest, same_file

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the files; another one is not read."""
LARGEST_SHARE = 0.01
"""Of the run's time that writing them may take: the pause grows with what the last one took."""
KEPT = 2
"""The newest ones that stay: should one be damaged, there is another."""
TENSORS, PAGE = "state.safetensors", "state.json"
_NAME = re.compile(r"step-([0-9]+)")


@dataclass
class RunState:
    """Where a run is: everything but the tensors."""

    steps: int = 0
    """Optimizer steps taken."""
    num_tokens: int = 0
    """Tokens trained on."""
    is_evaluated: bool = False
    """Whether the evaluation that is due after these steps, if one is, has been done."""
    epoch_loss: float = 0.0
    """Sum over the epoch under way of the loss of each token that carries one."""
    epoch_labels: int = 0
    """How many tokens those are."""
    best_loss: float | None = None
    """The best validation loss that counts for early stopping; None before the first."""
    stale: int = 0
    """Evaluations in a row that did not improve it enough."""
    lowest_loss: float | None = None
    """The lowest validation loss of all, where early stopping is on."""
    published_step: int | None = None
    """After how many steps it was taken; that state is published."""
    best_digest: str | None = None
    """SHA-256 of the file that holds that state."""
    portions: Portions = field(default_factory=Portions)
    """Into how small parts a step is cut by now."""
    cuts: int = 0
    """How many of an earlier attempt's deaths for memory `portions` accounts for."""
    step_rows: list[StepRow] = field(default_factory=list)
    validation_rows: list[ValidationRow] = field(default_factory=list)


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on from a checkpoint exactly."""

    data: str
    """Digest of the rendered records, training and validation."""
    run: str
    """Digest of plan, seed, threads, number type, micro-batch and versions."""


def run_identity(
    plan: TrainPlan,
    examples: Sequence[Example],
    validation: Sequence[Example],
    **settings: object,
) -> Identity:
    """Return the identity of a run; `settings` is whatever else decides its numbers."""
    digest = hashlib.sha256()
    for name, records in (("training", examples), ("validation", validation)):
        digest.update(f"{name} {len(records)}\n".encode())
        for record in records:
            digest.update(json.dumps([record.input_ids, record.loss_mask]).encode())
    described = {
        "plan": asdict(plan),
        "settings": {key: str(value) for key, value in settings.items()},
        "torch": torch.__version__,
        "version": VERSION,
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return Identity(digest.hexdigest(), hashlib.sha256(text.encode()).hexdigest())


class Keeper:
    """Writes a run's checkpoints into a folder, as often as they are worth their time."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        saved_step: int = 0,
        *,
        least_seconds: float,
        replaces: Sequence[Path] = (),
        best: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            saved_step: up to here the run can be gone on from already.
            least_seconds: between two checkpoints.
            replaces: folders of earlier tries, removed when this one has a checkpoint of its own.
            best: where the best state is, once there is one: each checkpoint holds it too.
        """
        self._folder, self._identity, self._clock = folder, identity, clock
        self._replaces, self._best = replaces, best
        self._pause = self._least = least_seconds
        self._saved_at = clock()
        self.saved_step = saved_step

    def is_due(self) -> bool:
        """Return whether it is time for the next one."""
        return self._clock() - self._saved_at >= self._pause

    def save(self, state: RunState, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint. A full disk, or want of memory, costs the checkpoint, not the run."""
        started = self._clock()
        try:
            save_checkpoint(self._folder, self._identity, state, tensors, self._best)
        except (OSError, SafetensorError, MemoryError) as error:
            logger.warning("the checkpoint of step %d was not written: %s", state.steps, error)
        else:
            self.saved_step = state.steps
            for folder in self._replaces:
                shutil.rmtree(folder, ignore_errors=True)
            self._replaces = ()
        self._saved_at = self._clock()
        self._pause = max(self._least, (self._saved_at - started) / LARGEST_SHARE)


def save_checkpoint(
    folder: Path,
    identity: Identity,
    state: RunState,
    tensors: Mapping[str, Tensor],
    best: Path | None = None,
) -> Path:
    """Write one checkpoint and remove all but the newest ones of the folder.

    Args:
        best: the file of the best state; it is part of the checkpoint where `state` names one.
    Raises:
        OSError, SafetensorError: it could not be written; what was there before stays.
    """
    place = folder / f"step-{state.steps}"
    unfinished = folder / f".step-{state.steps}.{os.getpid()}"
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / TENSORS
        )
        if best is not None and state.best_digest is not None:
            same_file(best, unfinished / BEST)
        page = {
            "version": VERSION,
            "identity": asdict(identity),
            "sha256": file_digest(unfinished / TENSORS),
            "state": asdict(state),
        }
        (unfinished / PAGE).write_text(json.dumps(page), encoding="utf-8")
        for path in (unfinished / TENSORS, unfinished / PAGE, unfinished):
            sync(path)
        shutil.rmtree(place, ignore_errors=True)
        unfinished.rename(place)
        sync(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for _, old in _checkpoints(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return place


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from."""

    state: RunState
    tensors: dict[str, Tensor]
    has_same_data: bool
    """Whether it was made from the same records; where not, it cannot be gone on from."""
    best: Path | None = None
    """The file of the best state, where early stopping has one."""


def newest_checkpoint(folders: Sequence[Path], identity: Identity | None) -> Checkpoint | None:
    """Return the checkpoint with the most steps that is whole and of this run; None for none.

    Args:
        folders: where to look; those that are not there are passed over.
        identity: of the run; None takes any run's, to publish what was trained as it is.
    """
    found = sorted((item for folder in folders for item in _checkpoints(folder)), reverse=True)
    for _, place in found:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, SafetensorError):
            page = json.loads((place / PAGE).read_text(encoding="utf-8"))
            if page.get("version") != VERSION:
                logger.info("%s is of another version and not gone on from", place)
                continue
            if identity is not None and page["identity"]["run"] != identity.run:
                logger.info("%s is of another run and not gone on from", place)
                continue
            if page["sha256"] != file_digest(place / TENSORS):
                raise ValueError("the digest is another one")
            state = _read_state(page["state"])
            best = place / BEST if state.best_digest is not None else None
            if best is not None and state.best_digest != file_digest(best):
                raise ValueError("the digest of the best state is another one")
            return Checkpoint(
                state,
                load_file(place / TENSORS),
                identity is None or page["identity"]["data"] == identity.data,
                best,
            )
        logger.warning("%s is damaged and not gone on from", place)
    return None


def _read_state(fields: dict[str, Any]) -> RunState:
    step_rows = [StepRow(**row) for row in fields.pop("step_rows")]
    validation_rows = [ValidationRow(**row) for row in fields.pop("validation_rows")]
    portions = Portions(**fields.pop("portions"))
    return RunState(
        **fields, portions=portions, step_rows=step_rows, validation_rows=validation_rows
    )


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a folder with their steps, the newest first."""

    def found() -> Iterator[tuple[int, Path]]:
        with contextlib.suppress(FileNotFoundError):
            for path in folder.iterdir():
                name = _NAME.fullmatch(path.name)
                if name:
                    yield int(name[1]), path

    return sorted(found(), reverse=True)
