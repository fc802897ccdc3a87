"""The one stage that makes a custom model of a stopped job's last checkpoint.

The data are not needed any more: what was learnt of them is in the checkpoint, and their digests in
the row. What would serve the model is compared with it on a fixed text.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine

from outcrop.data.documents import render_document
from outcrop.data.records import Document, Example
from outcrop.errors import LeaseLost, ModelError, StopRequested
from outcrop.jobs import artifacts
from outcrop.jobs.checkpoints import CONTINUES, STAGE, continued_folders
from outcrop.jobs.customization import publish
from outcrop.jobs.inputs import validation_uri
from outcrop.jobs.parents import parent_artifact, plan_parent
from outcrop.models.catalog import load_catalog
from outcrop.models.tokenizer import Tokenizer
from outcrop.models.weights import ensure_weights
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job
from outcrop.train.plan import make_plan

_TEXT = (
    "A checkpoint is the state of a run between two steps. This text is read by the model as it "
    "was trained and by what will serve it. Both must find it equally likely: 1, 2, 3, 5, 8, 13."
)
_TEXT_TOKENS = 256


def run(settings: Settings, engine: Engine, job: Job, should_stop: Callable[[], bool]) -> None:
    """Take a task from its row to its model.

    Raises:
        ModelError, TrainingError: the task fails, with the error's text as its reason.
        StopRequested: `should_stop` answered True.
        LeaseLost: another attempt holds the task.
    """
    spec = job.spec
    base = load_catalog(settings).resolve(spec["baseModelId"])
    if base is None:
        raise ModelError(f"The base model {spec['baseModelId']} is not in the catalogue any more.")
    with transaction(engine) as connection:
        if not jobs.advance_stage(connection, job.id, job.fence, STAGE, "InProgress"):
            raise LeaseLost
    weights = ensure_weights(settings, spec["weights"])
    plan = make_plan(
        base,
        spec["customizationType"],
        spec["userHyperParameters"],
        has_validation=validation_uri(spec) is not None,
        parent=plan_parent(spec),
    )
    parent = parent_artifact(settings, spec)
    # Here, because it brings torch and transformers, which takes seconds.
    from outcrop.evaluate.parity import check_parity
    from outcrop.models.compiled import kernel_folder
    from outcrop.models.kernels import keep_kernels_in
    from outcrop.train.device import choose_device
    from outcrop.train.publish import publish_checkpoint

    keep_kernels_in(kernel_folder(settings))
    result = publish_checkpoint(
        plan,
        weights,
        continued_folders(settings, spec),
        _sample(Tokenizer(weights)),
        artifacts.work_folder(settings, job.id, job.fence),
        parent=parent,
        threads=job.cores,
        device=choose_device(settings.train_device),
    )
    if should_stop():
        raise StopRequested
    parity = check_parity(
        weights,
        result.artifact,
        result.sample,
        threads=job.cores,
        precision=settings.serve_weights,
        should_stop=should_stop,
    )
    continued = spec[CONTINUES]
    publish(
        *(settings, engine, job, base, plan, spec["dataFiles"], result, parity),
        trained_by=(continued["jobArn"], continued["jobName"]),
    )


def _sample(tokenizer: Tokenizer) -> list[Example]:
    if tokenizer.document_end is not None:
        return render_document(Document(_TEXT, "", 1), tokenizer, _TEXT_TOKENS)
    ids = tokenizer.encode(_TEXT)[:_TEXT_TOKENS]
    return [Example(ids, [False, *[True] * (len(ids) - 1)])]
