"""Rules about how much data there is, and advice from published guidance.

Source of the amounts: what AWS publishes on customizing models (50 to 10,000 pairs; 100,000 tokens
to a billion of raw text; a multiplier of 0.1 for small sets); quotas are the catalogue's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from outcrop.data.defects import Finding, Severity
from outcrop.data.formats import DISTILLATION, REINFORCEMENT_FINE_TUNING
from outcrop.data.limits import record_quota
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, FINE_TUNING, BaseModel

MIN_PAIRS, MAX_PAIRS = 50, 10_000
MIN_TOKENS, SOME_TOKENS, MANY_TOKENS = 100_000, 10_000_000, 1_000_000_000
"""Of raw text: below the first, little more than style is learnt; from the second on, a domain's
words; the third is what knowledge of a new domain is said to need."""
MANY_EPOCHS = 10
SMALL_SET = 1_000
SMALL_SET_MULTIPLIER = 0.1
PROMPTS: Mapping[str, tuple[int, int]] = {
    DISTILLATION: (100, 15_000),
    REINFORCEMENT_FINE_TUNING: (100, 20_000),
}
"""Prompts that Bedrock takes, at least and at most."""


def record_quotas(
    base: BaseModel | None,
    customization_type: str,
    counts: Mapping[str, int],
    settings: Mapping[str, int],
) -> Iterator[tuple[str, Finding]]:
    """Yield (role, finding) for each quota that is exceeded.

    Args:
        counts: role -> records, of training and validation.
        settings: role -> the operator's quota; 0 keeps the family's.
    """
    if base is not None and customization_type in (FINE_TUNING, CONTINUED_PRE_TRAINING):
        for role, count in counts.items():
            setting = settings.get(role, 0)
            quota = record_quota(base, role, setting, customization_type)
            if quota is not None and count > quota:
                whose = "This server takes" if setting else f"{base.model_id} takes"
                yield (
                    role,
                    _too_many(
                        f"There are {count:,} {role} records. {whose} at most {quota:,} in a job; "
                        f"the setting max_{role}_records changes that."
                    ),
                )
        total = base.record_quota(customization_type).max_total
        sum_of = sum(counts.values())
        single = any(
            count > (record_quota(base, role, 0, customization_type) or count)
            for role, count in counts.items()
        )
        if total is not None and sum_of > total and not any(settings.values()) and not single:
            yield (
                next(iter(counts)),
                _too_many(
                    f"There are {sum_of:,} records in all files. {base.model_id} takes at most "
                    f"{total:,} together; the settings max_training_records and "
                    "max_validation_records change that."
                ),
            )
    for role, count in counts.items():
        _, most = PROMPTS.get(customization_type, (0, count))
        if count > most:
            yield role, _too_many(f"There are {count:,} prompts. At most {most:,} are taken.")


def amount(
    base: BaseModel | None, customization_type: str, num_records: int, num_tokens: int | None
) -> Iterator[Finding]:
    """Yield advice about the training records.

    Args:
        num_tokens: of all of them; None where they were not counted.
    """
    if customization_type == FINE_TUNING:
        least = (base.records.min_training if base else None) or 0
        if num_records < max(least, MIN_PAIRS):
            bedrock = f" Bedrock refuses fewer than {least}." if num_records < least else ""
            yield _advice(
                "too_few_records",
                f"There are {num_records:,} records; guidance asks for {MIN_PAIRS} to "
                f"{MAX_PAIRS:,}.{bedrock}",
            )
        if num_records > MAX_PAIRS:
            yield _advice(
                "large_set",
                f"There are {num_records:,} records; guidance asks for {MIN_PAIRS} to "
                f"{MAX_PAIRS:,}.",
            )
    least, _ = PROMPTS.get(customization_type, (0, 0))
    if num_records < least:
        yield _advice(
            "too_few_records", f"There are {num_records:,} prompts; Bedrock refuses under {least}."
        )
    if customization_type == CONTINUED_PRE_TRAINING and num_tokens is not None:
        yield from _raw_text(num_tokens)


def _raw_text(num_tokens: int) -> Iterator[Finding]:
    if num_tokens < MIN_TOKENS:
        what = f"With less than {MIN_TOKENS:,}, little more than style is learnt."
    elif num_tokens < SOME_TOKENS:
        what = f"A domain's words want {SOME_TOKENS:,} or more."
    elif num_tokens < MANY_TOKENS:
        what = f"Knowledge of a new domain wants {MANY_TOKENS:,}."
    else:
        return
    yield _advice("too_few_tokens", f"There are {num_tokens:,} tokens. {what}")


def training_plan(
    hyper_parameters: Mapping[str, str], num_records: int, *, has_validation: bool
) -> Iterator[Finding]:
    """Yield advice about how a job would train on the records.

    Args:
        hyper_parameters: the job's, as strings; a value that is no number is passed over, because
            the job's creation refuses it.
    """
    epochs = _number(hyper_parameters.get("epochCount"))
    if epochs is not None and epochs > MANY_EPOCHS:
        yield _advice(
            "many_epochs", f"epochCount is {epochs:g}; more than {MANY_EPOCHS} tend to over-fit."
        )
    multiplier = _number(hyper_parameters.get("learningRateMultiplier"))
    if multiplier is not None and multiplier > SMALL_SET_MULTIPLIER and num_records < SMALL_SET:
        yield _advice(
            "small_set_multiplier",
            f"learningRateMultiplier is {multiplier:g} with {num_records:,} records; for a small "
            f"set begin with {SMALL_SET_MULTIPLIER}.",
        )
    if hyper_parameters and not has_validation and "evalPercentage" not in hyper_parameters:
        yield _advice("no_validation", "No validation file is named.")


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _too_many(message: str) -> Finding:
    return Finding("too_many_records", Severity.REJECT, message)


def _advice(code: str, message: str) -> Finding:
    return Finding(code, Severity.ADVICE, message)
