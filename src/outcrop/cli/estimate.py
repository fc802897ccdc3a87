"""`outcrop estimate`: what a job on these files will take and cost on this machine.

Reads and counts them as the job would, here and now: no service need run. Exit codes are 0 where
the job fits and 2 where it would be refused.
"""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

from outcrop.cli.data_check import measured_speed, resolve_model
from outcrop.cli.data_source import open_data_file
from outcrop.data.examples import read_examples
from outcrop.data.limits import TRAINING, VALIDATION
from outcrop.data.render import Renderer
from outcrop.errors import SettingsError
from outcrop.jobs.estimate import Counts, describe_estimate, estimate_job
from outcrop.jobs.queue import job_needs
from outcrop.meter.prices import load_prices
from outcrop.models.catalog import BaseModel, load_catalog
from outcrop.models.weights import ensure_weights
from outcrop.settings import Settings
from outcrop.train.plan import TrainPlan, make_plan
from outcrop.train.portions import gibibytes

FITS, REFUSED = 0, 2


def estimate(settings: Settings, options: argparse.Namespace) -> int:
    """Print the estimate and return the exit code.

    Raises:
        DataError: a record cannot be trained on; with file and line.
        SettingsError, ValidationException: an option cannot be used.
    """
    catalog = load_catalog(settings)
    base = resolve_model(catalog, options.model)
    plan = make_plan(
        base,
        options.customization_type,
        _hyper_parameters(options.set),
        has_validation=options.validation is not None,
    )
    renderer = Renderer(ensure_weights(settings, base.weights))
    roles = [(options.file, TRAINING)]
    roles += [(options.validation, VALIDATION)] if options.validation else []
    read = [_read(settings, base, plan, renderer, options, *each) for each in roles]
    examples = read[0][0]
    training = examples if options.validation else plan.split(examples)[0]
    cores, _ = job_needs(settings, base, plan)
    found = estimate_job(
        *(settings, base, plan),
        cores=cores,
        data_bytes=sum(num_bytes for _, num_bytes in read),
        book=load_prices(settings.price_book, catalog.all_ids),
        counts=Counts(sum(training), max(examples, default=0)),
        speed=measured_speed(settings, base, plan.method),
    )
    described = describe_estimate(found)
    if options.json:
        print(json.dumps(described, indent=2, ensure_ascii=False))
    else:
        print(_in_words(described))
    return FITS if described["fits"] else REFUSED


def _read(
    settings: Settings,
    base: BaseModel,
    plan: TrainPlan,
    renderer: Renderer,
    options: argparse.Namespace,
    name: str,
    role: str,
) -> tuple[list[int], int]:
    """Return the tokens of each record of a file, and the bytes of the file."""
    quotas = {TRAINING: settings.max_training_records, VALIDATION: settings.max_validation_records}
    with open_data_file(name, role).open() as stream:
        content = stream.read()
    rendered = read_examples(
        io.BytesIO(content),
        name,
        base,
        renderer,
        role=role,
        batch_size=plan.batch_size,
        max_records=quotas[role],
        customization_type=options.customization_type,
    )
    return [len(example.input_ids) for example in rendered.examples], len(content)


def _hyper_parameters(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise SettingsError(f"--set {pair}: write NAME=VALUE, as in epochCount=2.")
        if name in found:
            raise SettingsError(f"--set {name} stands twice.")
        found[name] = value
    return found


def _in_words(told: dict[str, Any]) -> str:
    currency, memory, disk = told["currency"], told["memory"], told["disk"]
    lines = [
        f"tokens: {told['tokensPerEpoch']:,} an epoch, {told['numTokens']:,} in "
        f"{told['numEpochs']:,} epochs; the longest record has {told['longestTokens']:,}"
    ]
    if "seconds" in told:
        lines.append(
            f"time: about {told['seconds'] / 60:,.1f} minutes at the "
            f"{told['tokensPerSecond']:,.0f} tokens a second of job {told['measuredBy']}"
        )
    else:
        lines.append("time: no job of this model has measured its speed on this machine yet")
    lines.append(
        f"memory: about {gibibytes(memory['neededBytes'])}; {gibibytes(memory['allowedBytes'])} "
        f"are allowed, of {gibibytes(memory['machineBytes'])}"
    )
    lines.append(
        f"disk: about {gibibytes(disk['neededBytes'])}; {gibibytes(disk['freeBytes'])} are free"
    )
    if "trainingAmount" in told:
        lines.append(
            f"price: {told['trainingAmount']} {currency}, at {told['trainingPrice']} for 1,000 "
            "tokens"
        )
    else:
        lines.append("price: the price book has none for training this model")
    if "storagePrice" in told:
        lines.append(f"then for each month that the model is stored: {told['storagePrice']}")
    if "refusal" in told:
        lines.append(told["refusal"])
    return "\n".join(lines)
