"""What is said of a job before it begins is what it takes, and what cannot fit is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, BASE_ARN, claimed, new_task

from outcrop.data.examples import read_examples
from outcrop.data.render import Renderer
from outcrop.errors import ModelError, ServiceQuotaExceededException, ValidationException
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import new_id, role_arn
from outcrop.jobs import data_task, memory
from outcrop.jobs.estimate import (
    KEPT_CHECKPOINTS,
    Counts,
    check_fits,
    describe_estimate,
    disk_need,
    estimate_job,
    memory_need,
)
from outcrop.meter.prices import published_prices
from outcrop.models.catalog import BaseModel, load_catalog
from outcrop.models.describe import add_model
from outcrop.models.load import compute_dtype, load_base
from outcrop.models.weights import weights_folder
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.train import checkpoint
from outcrop.train.methods import make_trainable
from outcrop.train.plan import EarlyStopping, TrainPlan, make_plan
from outcrop.train.prediction import ModelShape

MODEL_ID = "mylab.tiny-v1:0"
RECORDS = b"".join(
    json.dumps({"prompt": f"question {number}", "completion": " yes" * number}).encode() + b"\n"
    for number in range(1, 11)
)


class Usage(NamedTuple):
    """As shutil.disk_usage answers."""

    total: int
    used: int
    free: int


@pytest.fixture
def settings(data_dir: Path, folder: Path) -> Settings:
    settings = Settings(data_dir=data_dir)
    add_model(settings, folder, MODEL_ID, license="mit", family="cohere-command")
    return settings


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    yield from bootstrapped(settings)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def base_of(settings: Settings, model_id: str = MODEL_ID) -> BaseModel:
    base = load_catalog(settings).resolve(model_id)
    assert base is not None
    return base


def plan_of(base: BaseModel, **own: str) -> TrainPlan:
    return make_plan(base, "FINE_TUNING", {"epochCount": "2", **own}, has_validation=False)


def spec(settings: Settings, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "preflight",
        "baseModelId": MODEL_ID,
        "baseModelArn": BASE_ARN,
        "weights": base_of(settings).weights,
        "customizationType": "FINE_TUNING",
        "hyperParameters": {},
        "userHyperParameters": {"epochCount": "2", "batchSize": "8", "evalPercentage": "20"},
        "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/train.jsonl"},
        "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
        "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
        "customModelId": new_id(),
        "customModelName": "mine",
        "jobNeeds": {"cores": 1, "memory_bytes": 4 << 30},
        **changes,
    }


def preflight(settings: Settings, engine: Engine, objects: MemoryStore) -> dict[str, Any]:
    with transaction(engine) as connection:
        made = jobs.create_job(connection, new_task(new_id(), spec=spec(settings)))
        task = claimed(connection, made)
    data_task.run(settings, engine, task, lambda: False, objects=objects)
    with engine.connect() as connection:
        ended = jobs.get_job_by_id(connection, task.id)
    assert ended is not None
    assert ended.result is not None
    return ended.result


def test_a_preflight_counts_every_token_that_will_be_trained_on(
    settings: Settings, engine: Engine
) -> None:
    objects = MemoryStore(**{"train.jsonl": RECORDS})
    told = preflight(settings, engine, objects)["estimate"]
    base = base_of(settings)
    renderer = Renderer(weights_folder(settings, base.weights))
    rendered = read_examples(
        io.BytesIO(RECORDS), "f", base, renderer, role="training", batch_size=8
    )
    training, drawn_off = plan_of(base).split(rendered.examples)
    assert (len(training), len(drawn_off)) == (8, 2)
    tokens = sum(len(example.input_ids) for example in training)
    assert (told["tokensPerEpoch"], told["numTokens"]) == (tokens, 2 * tokens)
    assert told["longestTokens"] == max(len(example.input_ids) for example in rendered.examples)
    assert (told["fits"], told["disk"]["dataBytes"]) == (True, 2 * len(RECORDS))
    assert "trainingAmount" not in told, "nobody published a price for this model"


@pytest.mark.parametrize("method", ["adapter", "full"])
def test_the_disk_is_that_of_what_is_trained(
    settings: Settings, folder: Path, tmp_path: Path, method: str
) -> None:
    base = base_of(settings)
    plan = dataclasses.replace(plan_of(base), method=method, early_stopping=None)
    shape = memory.model_shape(settings, base.weights)
    need = disk_need(settings, base, plan, shape, 0)
    trainable = make_trainable(load_base(folder, compute_dtype(), torch.device("cpu")), plan, 0)
    num_trained = sum(master.numel() for master in trainable.masters)
    states = need.checkpoints / (4 * KEPT_CHECKPOINTS * 3)
    assert states == pytest.approx(num_trained, rel=0.01), "norms are not in the shape"
    trainable.save(tmp_path / "artifact", folder)
    files = [path.stat().st_size for path in (tmp_path / "artifact").glob("*.safetensors")]
    assert need.artifact <= sum(files) <= 1.2 * need.artifact, "names take some room, too"


def test_the_number_of_checkpoints_is_that_of_the_loop() -> None:
    assert KEPT_CHECKPOINTS == checkpoint.KEPT + 1


def test_full_fine_tuning_early_stopping_and_cleaning_take_more_disk(settings: Settings) -> None:
    base = base_of(settings)
    shape = memory.model_shape(settings, base.weights)
    plan = dataclasses.replace(plan_of(base), early_stopping=None)

    def need(**changes: Any) -> int:
        changed = dataclasses.replace(plan, **changes)
        return disk_need(settings, base, changed, shape, 1000).needed

    assert need(method="full") > need()
    assert need(early_stopping=EarlyStopping(0.1, 2)) > need()
    assert need(data_policy="clean") == need() + 2000


def test_an_adapter_over_a_custom_models_own_weights_is_published_with_those(
    settings: Settings, tmp_path: Path
) -> None:
    base = base_of(settings)
    shape = memory.model_shape(settings, base.weights)
    parent = tmp_path / "parent"
    (parent / "weights").mkdir(parents=True)
    (parent / "weights" / "model.safetensors").write_bytes(b"x" * 12_345)
    args = (settings, base, plan_of(base), shape, 0)
    without, over = disk_need(*args), disk_need(*args, parent)
    assert over.artifact == without.artifact + 12_345


def test_weights_that_are_still_to_be_converted_need_room(settings: Settings) -> None:
    base = base_of(settings, "amazon.titan-text-express-v1")
    shape = memory.model_shape(settings, base.weights)
    need = disk_need(settings, base, plan_of(base), shape, 0)
    assert need.weights == 2 * shape.parameters
    record = settings.data_dir / "models" / "base" / base.weights / "outcrop.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    assert disk_need(settings, base, plan_of(base), shape, 0).weights == 0


def small_machine(monkeypatch: pytest.MonkeyPatch, folder: Path, num_bytes: int) -> None:
    """A container that may have so much memory."""
    limit = folder / "memory.max"
    limit.write_text(f"{num_bytes}\n")
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (str(limit),))
    monkeypatch.setattr(memory, "_GPU_FILES", ())


def test_what_cannot_fit_into_memory_whatever_its_data_is_refused_with_the_figures(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(settings, "amazon.titan-text-express-v1")
    plan = plan_of(base, method="full")
    small_machine(monkeypatch, tmp_path, 1 << 30)
    need = memory_need(settings, base, plan, 2)
    with pytest.raises(ValidationException) as raised:
        check_fits(settings, base, plan, cores=2, data_bytes=10)
    for text in (
        "cannot fit into memory, whatever its data",
        f"at least {need.least / 2**30:.2f} GiB",
        "0.50 GiB are allowed, of 1.00 GiB that this machine has",
        "method = adapter",
        "refuse_unfit_jobs",
    ):
        assert text in str(raised.value)
    anyway = dataclasses.replace(settings, refuse_unfit_jobs=False)
    check_fits(anyway, base, plan, cores=2, data_bytes=10)
    gpu = tmp_path / "driver"
    gpu.touch()
    monkeypatch.setattr(memory, "_GPU_FILES", (str(gpu),))
    check_fits(settings, base, plan, cores=2, data_bytes=10)


def test_nothing_that_some_data_could_make_fit_is_refused_for_its_memory(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(settings, "amazon.titan-text-express-v1")
    shape: ModelShape = memory.model_shape(settings, base.weights)
    plan = plan_of(base)
    least = memory.least_needed(shape, plan, 2)
    assert least <= min(memory.needed_for(shape, plan, longest, least, 2)
                        for longest in (1, 100, 4000))  # fmt: skip
    small_machine(monkeypatch, tmp_path, 2 * least)
    check_fits(settings, base, plan, cores=2, data_bytes=10)
    small_machine(monkeypatch, tmp_path, 2 * (least - 1))
    with pytest.raises(ValidationException, match="whatever its data"):
        check_fits(settings, base, plan, cores=2, data_bytes=10)


def test_what_does_not_fit_onto_the_disk_is_refused_with_the_figures(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(settings)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9 << 30, 8 << 30, 1 << 30))
    check_fits(settings, base, plan_of(base), cores=1, data_bytes=(1 << 29) - (4 << 20))
    with pytest.raises(ServiceQuotaExceededException) as raised:
        check_fits(settings, base, plan_of(base), cores=1, data_bytes=1 << 30)
    for text in ("needs about 2.00 GiB", "copies of the data 2.00 GiB", "1.00 GiB are free",
                 "outcrop gc"):  # fmt: skip
        assert text in str(raised.value)


def test_a_preflight_on_a_full_disk_is_rejected_in_the_words_of_the_refusal(
    settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, 0))
    result = preflight(settings, engine, MemoryStore(**{"train.jsonl": RECORDS}))
    assert result["verdict"] == "rejected"
    assert "does not fit onto the disk" in result["rejection"]
    assert result["estimate"]["refusal"] == result["rejection"]
    assert result["estimate"]["fits"] is False


def test_a_price_book_that_became_wrong_since_the_start_fails_the_task_with_its_line(
    settings: Settings, engine: Engine, tmp_path: Path
) -> None:
    book = tmp_path / "prices.toml"
    book.write_text('currency = "money"\n')
    priced = dataclasses.replace(settings, price_book=str(book))
    with pytest.raises(ModelError, match=r"prices\.toml, line 1: currency is 'money'"):
        preflight(priced, engine, MemoryStore(**{"train.jsonl": RECORDS}))


def test_time_and_price_follow_from_what_was_counted(settings: Settings) -> None:
    base = base_of(settings, "amazon.titan-text-express-v1")
    found = estimate_job(
        *(settings, base, plan_of(base)),
        cores=2,
        data_bytes=100,
        book=published_prices(),
        counts=Counts(24_500, 300),
        speed=("earlier", 70.0),
    )
    told = describe_estimate(found)
    assert (told["numTokens"], told["seconds"], told["measuredBy"]) == (49_000, 700.0, "earlier")
    assert Decimal(told["trainingAmount"]) == Decimal("0.392")
    assert (told["trainingPrice"], told["storagePrice"], told["currency"]) == (
        *("0.008", "1.95"),
        "USD",
    )
    assert told["memory"]["leastBytes"] <= told["memory"]["neededBytes"]
    unread = describe_estimate(dataclasses.replace(found, counts=None))
    assert {"numTokens", "tokensPerEpoch", "seconds", "trainingAmount"}.isdisjoint(unread)
