"""The learning rate of each step, and after which steps the validation loss is taken.

Pure functions of step numbers; torch-free.
"""

from __future__ import annotations

import math

EVALUATIONS_PER_EPOCH = 4
"""At most so many validation losses an epoch, the one at its end included."""
VALIDATION_COST = 2
"""Training records for each validation record between two evaluations.

Evaluating a record costs about a third of training on it, so validation takes at most about a
sixth of the time of training (but for the one evaluation that every epoch ends with)."""


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of a step: a linear rise to the peak, then a linear fall to zero.

    The rise takes `warmup_steps` steps and does not begin at zero, so that no step is lost; the
    fall would reach zero one step after the last. A run shorter than its warm-up only rises.

    Args:
        step: counts from 0, below total_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    return peak * (total_steps - step) / (total_steps - warmup_steps)


def evaluation_steps(steps_per_epoch: int, batch_size: int, num_validation: int) -> set[int]:
    """Return after how many steps of an epoch the validation loss is taken; its end is among them.

    Args:
        steps_per_epoch: at least 1.
        batch_size: training records a step.
        num_validation: validation records; the more there are, the rarer they are evaluated.
    """
    if num_validation == 0:
        return set()
    interval = max(
        math.ceil(steps_per_epoch / EVALUATIONS_PER_EPOCH),
        math.ceil(VALIDATION_COST * num_validation / batch_size),
    )
    points = set(range(interval, steps_per_epoch, interval))
    # Two evaluations close together tell nothing new: the last regular one gives way to the end's.
    if points and steps_per_epoch - max(points) < interval / 2:
        points.remove(max(points))
    return points | {steps_per_epoch}
