"""From Bedrock's hyperparameters, strings to strings, to a plan that the loop can follow.

Everything a user may set is one row of the catalogue's table: name, kind, bounds, default. This
module checks against that table, completes it with the defaults, and turns the result into the
numbers of the method that really trains. What Bedrock has no parameter for is in
`own_parameters.py`. It needs no torch, so the gateway refuses a bad value before a job exists.

`learningRate` is in the units of full fine-tuning, as in Bedrock's examples. An adapter needs a
larger one for the same effect: the catalogue's factor for the family and method says how much, and
small batches take less of it; docs/learning-rate.md says how that was chosen.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from outcrop.errors import ValidationException
from outcrop.models.catalog import OWN_HYPER_PARAMETERS
from outcrop.train.own_parameters import OWN_NAMES, REPORT, Choice, choose
from outcrop.train.own_parameters import Parent as Parent

if TYPE_CHECKING:
    from outcrop.models.catalog import BaseModel, Hyperparameter

T = TypeVar("T")

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
DEFAULT_WARMUP_STEPS = 5
"""For families without learningRateWarmupSteps: the default of Titan, which has it."""
FULL_RATE_BATCH = 8
"""Smaller batches of records train adapters at as much smaller a rate: one record's answer is a
few dozen tokens, and a step at the full rate learns them by heart. Measured: docs/learning-rate.md.
Pieces of raw text carry loss on every token, and take the full rate."""
SPLIT_SEED = 0
"""Which records become validation records must not change between two tries of one job."""


@dataclass(frozen=True)
class EarlyStopping:
    """When a run ends before its last step."""

    threshold: float
    """The least improvement of the validation loss that counts, in nats a token."""
    patience: int
    """The run ends after so many evaluations in a row without such an improvement."""


@dataclass(frozen=True)
class TrainPlan:
    """All that the loop needs to know, checked."""

    base_model: str
    """The name of the real base model, for the artifact's description."""
    method: str
    """"adapter" or "full"."""
    num_epochs: int
    """Passes over the training records."""
    batch_size: int
    """Records of one optimizer step."""
    learning_rate: float
    """The optimizer's peak rate: the user's, times the factor of family and method, times the share
    of small batches."""
    warmup_steps: int
    """Steps of the linear rise to the peak."""
    lora_rank: int
    lora_alpha: float
    lora_targets: tuple[str, ...]
    early_stopping: EarlyStopping | None
    """None where the family has none, or no validation records exist to watch."""
    evaluation_percentage: float | None
    """Share of the training records, in percent, to take as validation records; None for none."""
    hyper_parameters: Mapping[str, str]
    """In effect: the user's as they were sent, and defaults in Bedrock's form. Those of our own are
    there only where they were sent: who compares with Bedrock's tables finds no strange name."""
    data_policy: str = REPORT
    """REPORT trains on the data as they stand, CLEAN on what cleaning makes of them."""

    def total_steps(self, num_examples: int) -> int:
        """Return the number of optimizer steps for so many training records."""
        return self.num_epochs * math.ceil(num_examples / self.batch_size)

    def split(self, examples: Sequence[T]) -> tuple[list[T], list[T]]:
        """Return (training, validation): the share for validation is drawn by a fixed seed.

        Each part keeps the order of the records. Nothing is taken where that would leave one of
        the parts empty.
        """
        if self.evaluation_percentage is None or len(examples) < 2:
            return list(examples), []
        wanted = round(len(examples) * self.evaluation_percentage / 100)
        count = min(max(wanted, 1), len(examples) - 1)
        taken = set(random.Random(SPLIT_SEED).sample(range(len(examples)), count))
        training = [example for place, example in enumerate(examples) if place not in taken]
        validation = [example for place, example in enumerate(examples) if place in taken]
        return training, validation


def make_plan(
    base: BaseModel,
    customization_type: str,
    hyper_parameters: Mapping[str, str],
    *,
    has_validation: bool,
    parent: Parent | None = None,
) -> TrainPlan:
    """Check the hyperparameters of a job against the catalogue and make its plan.

    Args:
        customization_type: "FINE_TUNING" or "CONTINUED_PRE_TRAINING".
        hyper_parameters: as sent; names and values are strings.
        has_validation: whether the job names validation data.
        parent: the custom model that the job starts from; None starts from the base model.
    Raises:
        ValidationException: the model cannot be customized so, a name is unknown, a value is not a
            number of the wanted kind or out of bounds, a parameter without a default is missing,
            or the adapter has no room for the parent's. All findings about parameters are in one
            message.
    """
    if customization_type not in base.customizations:
        raise ValidationException(
            f"{base.model_id} does not support {customization_type}. It supports "
            f"{', '.join(base.customizations) or 'no customization'}."
        )
    table = {row.name: row for row in base.hyper_parameters}
    findings = [
        f"Hyperparameter {name!r} is unknown. {base.model_id} knows {', '.join(table)}; besides "
        f"Bedrock's, there are {', '.join(OWN_NAMES)}."
        for name in hyper_parameters
        if name not in table and name not in OWN_NAMES
    ]

    def read(row: Hyperparameter, text: str) -> float | None:
        value = parse_number(text, row.kind)
        if value is not None and row.minimum <= value <= row.maximum:
            return value
        findings.append(f"Hyperparameter {row.name} is {_shown(text)}; it must be {_allowed(row)}.")
        return None

    effective: dict[str, str] = {}
    values: dict[str, float] = {}
    for row in table.values():
        text = hyper_parameters.get(row.name)
        if text is None:
            if row.default is None:
                findings.append(
                    f"Hyperparameter {row.name} has no default and must be given: {_allowed(row)}."
                )
                continue
            text = canonical(row.default, row.kind)
        value = read(row, text)
        if value is not None:
            effective[row.name] = text
            values[row.name] = value
    own = {row.name: row for row in OWN_HYPER_PARAMETERS}
    choice, wrong = choose(base, hyper_parameters, parent, lambda name, text: read(own[name], text))
    findings += wrong
    if findings:
        raise ValidationException(" ".join(findings))
    effective |= {name: hyper_parameters[name] for name in OWN_NAMES if name in hyper_parameters}
    return _plan(base, customization_type, choice, values, effective, has_validation)


def _plan(
    base: BaseModel,
    customization_type: str,
    choice: Choice,
    values: Mapping[str, float],
    effective: Mapping[str, str],
    has_validation: bool,
) -> TrainPlan:
    rate = values.get("learningRate")
    if rate is None:
        assert base.base_learning_rate is not None, f"{base.family} has no rate to multiply"
        rate = base.base_learning_rate * values.get("learningRateMultiplier", 1.0)
    batch_size = int(values.get("batchSize", base.batch_size))
    rate *= base.learning_rate_factor[choice.method]
    if choice.method == "adapter" and customization_type == "FINE_TUNING":
        rate *= min(1.0, batch_size / FULL_RATE_BATCH)
    percentage = None if has_validation else values.get("evalPercentage")
    early_stopping = None
    if "earlyStoppingPatience" in values and (has_validation or percentage):
        early_stopping = EarlyStopping(
            threshold=values["earlyStoppingThreshold"],
            patience=int(values["earlyStoppingPatience"]),
        )
    return TrainPlan(
        base_model=base.full_name,
        method=choice.method,
        num_epochs=int(values["epochCount"]),
        batch_size=batch_size,
        learning_rate=rate,
        warmup_steps=int(values.get("learningRateWarmupSteps", DEFAULT_WARMUP_STEPS)),
        lora_rank=choice.lora.rank,
        lora_alpha=choice.lora.alpha,
        lora_targets=choice.lora.targets,
        early_stopping=early_stopping,
        evaluation_percentage=percentage,
        hyper_parameters=dict(effective),
        data_policy=choice.data_policy,
    )


def parse_number(text: str, kind: str) -> int | float | None:
    """Return the number a hyperparameter's text means, or None where it means none.

    Decimal and scientific notation are read for kind "float"; an "int" is digits only. White
    space, "nan", "inf" and digits of other scripts are no numbers. A value too large for a float
    comes back as infinity, which no bound admits.
    """
    if kind == "int":
        return int(text) if _INTEGER.fullmatch(text) else None
    return float(text) if _NUMBER.fullmatch(text) else None


def canonical(value: float, kind: str) -> str:
    """Return a default as Bedrock fills it in: "5", "20.0", "1.0E-5".

    Source: recorded answers of the live service; the form is Java's Double.toString, which takes
    an exponent below 1e-3 and from 1e7 on.
    """
    if kind == "int":
        return str(int(value))
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        return repr(float(value))
    digits, exponent = _shortest(value)
    return f"{digits}E{exponent}"


def _shortest(value: float) -> tuple[str, int]:
    """Return mantissa and exponent of the shortest form that reads back as the same number."""
    for precision in range(1, 18):
        mantissa, _, exponent = f"{value:.{precision}e}".partition("e")
        if float(f"{mantissa}e{exponent}") == value:
            return mantissa.rstrip("0").ljust(mantissa.index(".") + 2, "0"), int(exponent)
    raise AssertionError(value)


def _allowed(row: Hyperparameter) -> str:
    kind = "a whole number" if row.kind == "int" else "a number"
    low, high = canonical(row.minimum, row.kind), canonical(row.maximum, row.kind)
    return f"{kind} from {low} to {high}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
