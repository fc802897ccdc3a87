"""An import publishes a model that is whole, or fails with what was wrong and leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, REGION, claimed, new_job, new_model, new_task

from outcrop.errors import LeaseLost, ModelError, ValidationException
from outcrop.identity import accounts
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import (
    S3Uri,
    created_model_arn,
    import_job_arn,
    imported_model_arn,
    new_id,
    role_arn,
)
from outcrop.jobs import data_task, importing, incoming
from outcrop.jobs.attempt import StopFlag, run_attempt
from outcrop.jobs.gc import find_garbage
from outcrop.models.artifact import folder_digest
from outcrop.models.catalog import LoraConfig, load_catalog
from outcrop.models.describe import add_model
from outcrop.models.load import load_base
from outcrop.models.lora import Adapter, load_adapter, save_adapter
from outcrop.models.templates import tool_support_of
from outcrop.models.weights import ensure_weights
from outcrop.settings import Settings
from outcrop.store import imported_models, jobs, models, tags
from outcrop.store.database import transaction
from outcrop.store.rows import CREATION, IMPORT, CustomModel, ImportedModel, Job

PREFIX = "mine/"
WHERE = f"s3://{BUCKET}/{PREFIX}"
WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"
ROLE = role_arn(ACCOUNT, CUSTOMIZATION_ROLE)
POLICY = {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "*"}


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    yield from bootstrapped(settings)


@pytest.fixture
def files(folder: Path) -> dict[str, bytes]:
    """A tiny Llama with a tokenizer and a chat template."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def store_of(files: dict[str, bytes]) -> MemoryStore:
    return MemoryStore(**{PREFIX + name: content for name, content in files.items()})


def held(engine: Engine, **changes: Any) -> Job:
    """An import job that was just claimed."""
    job_id, model_id = new_id(), new_id()
    spec = {
        "importedModelName": "tiny",
        "importedModelId": model_id,
        "importedModelArn": imported_model_arn(REGION, ACCOUNT, model_id),
        "modelDataSource": {"s3DataSource": {"s3Uri": WHERE}},
        "roleArn": ROLE,
        "importedModelTags": [{"key": "team", "value": "a"}],
        **changes,
    }
    new = new_job(
        f"job-{job_id}",
        id=job_id,
        kind=IMPORT,
        arn=import_job_arn(REGION, ACCOUNT, job_id),
        spec=spec,
        stages=("import",),
        model_name="tiny",
    )
    with transaction(engine) as connection:
        return claimed(connection, jobs.create_job(connection, new))


def imported(engine: Engine) -> ImportedModel | None:
    with engine.connect() as connection:
        return imported_models.get_imported_model(connection, ACCOUNT, REGION, "tiny")


def garbage_models(settings: Settings, engine: Engine) -> list[Path]:
    found = find_garbage(settings, engine, young_seconds=0)
    return [item.path for item in found if settings.data_dir / "models" in item.path.parents]


def run(settings: Settings, engine: Engine, job: Job, objects: MemoryStore) -> None:
    importing.run_import(settings, engine, job, lambda: False, objects=objects)


def test_a_model_is_imported_whole_with_what_was_found_of_it(
    settings: Settings, engine: Engine, files: dict[str, bytes]
) -> None:
    job = held(engine)
    run(settings, engine, job, store_of({**files, "README.md": b"# no part of it"}))
    model = imported(engine)
    assert model is not None
    assert (model.architecture, model.instruct) == ("LlamaForCausalLM", True)
    assert (model.job_arn, model.job_name) == (job.arn, job.name)
    base = load_catalog(settings).resolve(model.weights)
    assert base is not None
    # Rows name it so; no request reaches it by that.
    assert load_catalog(settings).resolve(model.weights, region=REGION) is None
    assert (base.body_family, base.context_tokens, base.full_name) == ("imported", 512, "tiny")
    assert base.lora.targets == (
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
    )
    weights = ensure_weights(settings, model.weights)
    assert (weights / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert not (weights / "README.md").exists()
    assert folder_digest(weights) == model.digest
    load_base(weights)
    assert not tool_support_of(settings, model.weights).takes_tools
    with engine.connect() as connection:
        ended = jobs.get_job_by_id(connection, job.id)
        kept = tags.list_tags(connection, ACCOUNT, REGION, model.arn)
    assert ended is not None
    assert ended.status == "completed"
    assert kept == {"team": "a"}


def test_shards_are_taken_as_their_index_names_them(
    settings: Settings, engine: Engine, files: dict[str, bytes], tmp_path: Path
) -> None:
    sharded = sharded_files(files, tmp_path)
    run(settings, engine, held(engine), store_of(sharded))
    model = imported(engine)
    assert model is not None
    whole = load_base(ensure_weights(settings, model.weights)).state_dict()
    (tmp_path / WEIGHTS).write_bytes(files[WEIGHTS])
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        assert torch.equal(whole[name].float(), tensor)


def sharded_files(files: dict[str, bytes], tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "w").write_bytes(files[WEIGHTS])
    tensors = load_file(tmp_path / "w")
    names = sorted(tensors)
    halves = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    shards = {file: save({n: tensors[n] for n in half}) for file, half in halves.items()}
    rest = {name: content for name, content in files.items() if name != WEIGHTS}
    return {**rest, **shards, "model.safetensors.index.json": json.dumps(index).encode()}


def changed_json(content: bytes, **changes: Any) -> bytes:
    value = {**json.loads(content), **changes}
    return json.dumps({name: one for name, one in value.items() if one is not None}).encode()


def with_tensor(content: bytes, tmp_path: Path, tensor: torch.Tensor) -> bytes:
    (tmp_path / "w").write_bytes(content)
    return save({**load_file(tmp_path / "w"), LAYER: tensor})


BROKEN = {
    "a truncated file": (WEIGHTS, lambda f, p: f[WEIGHTS][:-100], "has .* bytes of data where"),
    "a mislabelled file": (WEIGHTS, lambda f, p: b"PK\3\4" + bytes(64), "not a safetensors file"),
    "another shape": (
        WEIGHTS,
        lambda f, p: with_tensor(f[WEIGHTS], p, torch.zeros(64, 96)),
        rf"{LAYER} has the shape \[64, 96\], and config.json says \[96, 64\]",
    ),
    "a number that is none": (
        WEIGHTS,
        lambda f, p: with_tensor(f[WEIGHTS], p, torch.full((96, 64), float("nan"))),
        rf"{LAYER} holds nan at place 0",
    ),
    "whole numbers for weights": (
        WEIGHTS,
        lambda f, p: with_tensor(f[WEIGHTS], p, torch.zeros(96, 64, dtype=torch.int8)),
        rf"{LAYER} has the dtype I8; allowed are F32, F16, BF16",
    ),
    "only pickles": (WEIGHTS, None, "There are no weights as safetensors beside them"),
    "code": ("modeling_mine.py", lambda f, p: b"print()", r"code of its own \(modeling_mine.py\)"),
    "remote code": (
        "config.json",
        lambda f, p: changed_json(f["config.json"], auto_map={"AutoModel": "x.Y"}),
        "config.json has auto_map",
    ),
    "an unknown architecture": (
        "config.json",
        lambda f, p: changed_json(f["config.json"], architectures=["MambaForCausalLM"]),
        "names the architecture MambaForCausalLM. Known are LlamaForCausalLM",
    ),
    "more layers than there are": (
        "config.json",
        lambda f, p: changed_json(f["config.json"], num_hidden_layers=3),
        "lacks 9 of the .* The first is model.layers.2",
    ),
    "too many layers to build": (
        "config.json",
        lambda f, p: changed_json(f["config.json"], num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000; it must be a whole number from 1 to 1,000",
    ),
    "no tokenizer": ("tokenizer.json", None, f"{WHERE} has no tokenizer.json"),
    "a tokenizer of another model": (
        "config.json",
        lambda f, p: changed_json(f["config.json"], vocab_size=100),
        "they do not belong together",
    ),
    "a configuration that is no JSON": (
        "config.json",
        lambda f, p: b"{",
        "config.json is not JSON",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_used_fails_the_job_and_leaves_nothing(
    what: str, settings: Settings, engine: Engine, files: dict[str, bytes], tmp_path: Path
) -> None:
    name, make, says = BROKEN[what]
    broken = dict(files)
    if make is None:
        content = broken.pop(name)
        if name == WEIGHTS:
            broken["pytorch_model.bin"] = content
    else:
        broken[name] = make(files, tmp_path)
    job = held(engine)
    with pytest.raises(ModelError, match=says) as refused:
        run(settings, engine, job, store_of(broken))
    assert WHERE in str(refused.value)
    assert str(settings.data_dir) not in str(refused.value)
    assert not (settings.data_dir / "models" / "imported").exists()
    assert imported(engine) is None


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("../secret.safetensors", r"is in '\.\./secret\.safetensors'"),
        ("model-3-of-3.safetensors", "lacks model-3-of-3.safetensors"),
        ("**.safetensors", r"is in '\*\*\.safetensors'"),
        (7, "is in '7'"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    entry: Any,
    says: str,
    settings: Settings,
    engine: Engine,
    files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    sharded = sharded_files(files, tmp_path)
    name = "model.safetensors.index.json"
    table = json.loads(sharded[name])
    table["weight_map"][LAYER] = entry
    sharded[name] = json.dumps(table).encode()
    with pytest.raises(ModelError, match=says):
        run(settings, engine, held(engine), store_of(sharded))


def test_a_prefix_with_ten_thousand_files_is_refused_before_any_is_read(
    settings: Settings, engine: Engine
) -> None:
    objects = store_of({f"{number}.safetensors": b"" for number in range(10_000)})
    with pytest.raises(ModelError, match=f"{WHERE} holds more than 2,000 objects"):
        run(settings, engine, held(engine), objects)


@pytest.mark.parametrize("action", ["s3:ListBucket", "s3:GetObject"])
def test_files_are_read_with_the_permissions_of_the_role(
    action: str, settings: Settings, engine: Engine, files: dict[str, bytes]
) -> None:
    policy = {"Version": "2012-10-17", "Statement": [{**POLICY, "Action": action}]}
    with transaction(engine) as connection:
        accounts.put_role_policy(
            connection, ACCOUNT, CUSTOMIZATION_ROLE, "Buckets", json.dumps(policy)
        )
    other = {"s3:ListBucket": "GetObject", "s3:GetObject": "ListBucket"}[action]
    with pytest.raises(ValidationException, match=f"Could not validate {other} permissions"):
        run(settings, engine, held(engine), store_of(files))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bytes(50), f"The header of {WHERE}{WEIGHTS} is not JSON"),
        (b'{"\\ud800": 3}', "the tensor ? must have dtype, shape and data_offsets"),
    ],
)
def test_a_failed_job_tells_the_reason_and_the_worker_lives(
    content: bytes, says: str, settings: Settings, engine: Engine, files: dict[str, bytes]
) -> None:
    job = held(engine)
    head = len(content).to_bytes(8, "little")
    objects = store_of({**files, WEIGHTS: head + content})

    def stages(settings: Settings, engine: Engine, job: Job, stop: StopFlag) -> None:
        importing.run_import(settings, engine, job, stop, objects=objects)

    assert run_attempt(settings, engine, job.id, job.fence, StopFlag(), run=stages) == 0
    with engine.connect() as connection:
        ended = jobs.get_job_by_id(connection, job.id)
    assert ended is not None
    assert ended.status == "failed"
    assert says in str(ended.failure_message)


class DyingStore(MemoryStore):
    """Counts what is read, and dies after some reads, as a killed attempt does."""

    def __init__(self, reads: int, **content: bytes) -> None:
        super().__init__(**content)
        self.left, self.read_names = reads, list[str]()

    def open(self, uri: S3Uri) -> Any:
        if self.left == 0:
            raise SystemExit
        self.left -= 1
        self.read_names.append(uri.key.removeprefix(PREFIX))
        return super().open(uri)


def test_what_a_killed_attempt_had_copied_whole_is_not_copied_again(
    settings: Settings, engine: Engine, files: dict[str, bytes]
) -> None:
    objects = DyingStore(3, **{PREFIX + name: content for name, content in files.items()})
    job = held(engine)
    with pytest.raises(SystemExit):
        run(settings, engine, job, objects)
    with transaction(engine) as connection:
        assert jobs.requeue(connection, job.id, job.fence, "killed")
        again = claimed(connection, job)
    copied, objects.left, objects.read_names = set(objects.read_names), -1, []
    run(settings, engine, again, objects)
    assert copied
    assert copied.isdisjoint(objects.read_names)
    assert imported(engine) is not None


def test_an_attempt_that_lost_its_lease_publishes_nothing(
    settings: Settings, engine: Engine, files: dict[str, bytes]
) -> None:
    job = held(engine)
    with transaction(engine) as connection:
        jobs.requeue(connection, job.id, job.fence, "lost")
        now = claimed(connection, job)
    with pytest.raises(LeaseLost):
        run(settings, engine, job, store_of(files))
    assert imported(engine) is None
    run(settings, engine, now, store_of(files))
    model = imported(engine)
    assert model is not None
    assert model.weights.endswith(f"-{now.fence}")
    assert garbage_models(settings, engine) == []
    # The same under the old fence again, now that the model is there: its folder is removed.
    with pytest.raises(LeaseLost):
        run(settings, engine, job, store_of(files))
    ensure_weights(settings, model.weights)


def test_a_full_disk_is_said_before_anything_is_copied(
    settings: Settings, engine: Engine, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "ROOM_BYTES", 1 << 60)
    with pytest.raises(ModelError, match=r"have .* bytes, and the disk of the data directory has"):
        run(settings, engine, held(engine), store_of(files))


def test_a_job_over_an_imported_model_is_accepted_by_its_validation(
    settings: Settings, engine: Engine, files: dict[str, bytes]
) -> None:
    run(settings, engine, held(engine), store_of(files))
    base = imported(engine)
    assert base is not None
    records = [{"prompt": f"question {number}", "completion": " yes"} for number in range(6)]
    objects = MemoryStore(**{"train.jsonl": "\n".join(map(json.dumps, records)).encode()})
    spec = {
        "kind": "preflight",
        "baseModelId": base.weights,
        "baseModelArn": base.arn,
        "weights": base.weights,
        "customizationType": "FINE_TUNING",
        "hyperParameters": {},
        "userHyperParameters": {"epochCount": "1", "batchSize": "2"},
        "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/train.jsonl"},
        "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
        "roleArn": ROLE,
        "jobNeeds": {"cores": 2, "memory_bytes": 4 << 30},
    }
    with transaction(engine) as connection:
        task = claimed(connection, jobs.create_job(connection, new_task(new_id(), spec=spec)))
        imported_models.delete_imported_model(connection, base)
    assert garbage_models(settings, engine) == []  # the task needs the weights
    data_task.run(settings, engine, task, lambda: False, objects=objects)
    with engine.connect() as connection:
        ended = jobs.get_job_by_id(connection, task.id)
    assert ended is not None
    assert ended.result is not None
    assert ended.result["verdict"] == "accepted"
    assert len(garbage_models(settings, engine)) == 1


# --- custom models of weights in S3 --------------------------------------------------------------


def creating(engine: Engine) -> Job:
    """A job that makes a custom model, just claimed, and the row of the model."""
    job_id, model_id = new_id(), new_id()
    arn = created_model_arn(REGION, ACCOUNT, model_id)
    spec = {
        "modelName": "mine",
        "modelArn": arn,
        "customModelId": model_id,
        "modelSourceConfig": {"s3DataSource": {"s3Uri": WHERE}},
        "roleArn": ROLE,
    }
    new = new_job(
        job_id,
        id=job_id,
        kind=CREATION,
        arn=f"{arn}-job",
        spec=spec,
        stages=("creation",),
        model_name="mine",
    )
    row = new_model(
        "mine",
        id=model_id,
        arn=arn,
        base_model_id="imported.unknown",
        base_model_arn=arn,
        foundation_model_arn=arn,
        customization_type="IMPORTED",
        spec=spec,
        artifact_path=f"models/custom/{model_id}/0",
    )
    with transaction(engine) as connection:
        job = jobs.create_job(connection, new)
        models.insert_model(connection, row, creation_job_id=job_id)
        return claimed(connection, job)


def custom(engine: Engine) -> CustomModel:
    with engine.connect() as connection:
        found = models.find_model(connection, ACCOUNT, REGION, "mine")
    assert found is not None
    return found


def create(settings: Settings, engine: Engine, job: Job, objects: MemoryStore) -> None:
    importing.run_creation(settings, engine, job, lambda: False, objects=objects)


def test_a_whole_model_becomes_a_custom_model_that_is_its_own_base(
    settings: Settings, engine: Engine, files: dict[str, bytes]
) -> None:
    job = creating(engine)
    with engine.connect() as connection:
        assert models.get_model(connection, ACCOUNT, REGION, "mine") is None  # it is Creating
    create(settings, engine, job, store_of(files))
    model = custom(engine)
    assert (model.status, model.is_own_base) == ("Active", True)
    base = load_catalog(settings).resolve(model.base_model_id)
    assert base is not None
    assert base.weights == model.spec["weights"]
    assert folder_digest(settings.data_dir / model.artifact_path) == model.artifact_digest
    assert garbage_models(settings, engine) == []


def test_a_model_that_cannot_be_made_is_failed_with_the_reason(
    settings: Settings, engine: Engine, files: dict[str, bytes]
) -> None:
    job = creating(engine)
    objects = store_of({**files, "config.json": b"{"})

    def stages(settings: Settings, engine: Engine, job: Job, stop: StopFlag) -> None:
        importing.run_creation(settings, engine, job, stop, objects=objects)

    assert run_attempt(settings, engine, job.id, job.fence, StopFlag(), run=stages) == 0
    model = custom(engine)
    assert model.status == "Failed"
    assert "config.json is not JSON" in str(model.failure_message)


def test_a_model_whose_attempts_keep_dying_is_failed(settings: Settings, engine: Engine) -> None:
    job = creating(engine)
    with transaction(engine) as connection:
        jobs.requeue(connection, job.id, job.fence, "it died")
        assert jobs.fail_exhausted(connection, 1) == [job.id]
    assert custom(engine).status == "Failed"


BASE_ID = "mylab.tiny-v1:0"
TARGETS = ("q_proj", "v_proj")


@pytest.fixture
def adapter(folder: Path, settings: Settings, tmp_path: Path) -> dict[str, bytes]:
    """An adapter over the tiny model, which is of the catalogue, as peft writes it."""
    add_model(settings, folder, BASE_ID, license="mit", family="cohere-command", name="Tiny")
    layers = [f"model.layers.{n}.self_attn.{t}" for n in range(2) for t in TARGETS]
    widths = {"q_proj": 64, "v_proj": 32}
    tensors = {
        name: (torch.randn(4, 64), torch.randn(widths[name.rpartition(".")[2]], 4))
        for name in layers
    }
    save_adapter(Adapter(LoraConfig(4, 8.0, TARGETS), tensors, False), tmp_path / "a", "hub/tiny")
    return {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}


def test_an_adapter_becomes_a_custom_model_over_the_base_it_names(
    settings: Settings, engine: Engine, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    pattern = changed_json(adapter["adapter_config.json"], target_modules=".*(q|v)_proj")
    create(
        settings, engine, creating(engine), store_of({**adapter, "adapter_config.json": pattern})
    )
    model = custom(engine)
    assert (model.status, model.base_model_id, model.is_own_base) == ("Active", BASE_ID, False)
    assert model.spec["adapter"] == {"rank": 4, "alpha": 8.0, "targets": list(TARGETS)}
    assert model.base_model_arn.endswith(f"foundation-model/{BASE_ID}")
    kept = load_adapter(settings.data_dir / model.artifact_path)
    for name, content in adapter.items():
        (tmp_path / name).write_bytes(content)
    for name, pair in load_adapter(tmp_path).tensors.items():
        assert all(torch.equal(*both) for both in zip(pair, kept.tensors[name], strict=True))


def test_an_adapter_goes_over_an_imported_model_by_name(
    settings: Settings, engine: Engine, files: dict[str, bytes], adapter: dict[str, bytes]
) -> None:
    run(settings, engine, held(engine), store_of(files))
    parent = imported(engine)
    assert parent is not None
    config = changed_json(adapter["adapter_config.json"], base_model_name_or_path="tiny")
    job = creating(engine)
    create(settings, engine, job, store_of({**adapter, "adapter_config.json": config}))
    model = custom(engine)
    assert (model.base_model_id, model.spec["weights"]) == (parent.weights, parent.weights)
    assert model.foundation_model_arn == parent.arn
    with transaction(engine) as connection:
        imported_models.delete_imported_model(connection, parent)
        assert f"models/imported/{parent.id}/1" in models.artifact_paths(connection)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_model_name_or_path": "hub/other"}, "base_model_name_or_path is 'hub/other', which"),
        ({"use_dora": True}, "use_dora is True. Only plain LoRA is served: false"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": 100_000}, "r is 100000; it must be from 1 to 256"),
        ({"r": 3}, "has shapes"),
        ({"lora_alpha": "big"}, "lora_alpha is big"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused_by_member(
    changes: dict[str, Any],
    says: str,
    settings: Settings,
    engine: Engine,
    adapter: dict[str, bytes],
) -> None:
    config = changed_json(adapter["adapter_config.json"], **changes)
    with pytest.raises(ModelError, match=says):
        create(
            *(settings, engine, creating(engine)),
            store_of({**adapter, "adapter_config.json": config}),
        )


def test_an_adapter_with_a_number_that_is_none_is_refused_by_layer(
    settings: Settings, engine: Engine, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    name = "adapter_model.safetensors"
    (tmp_path / "w").write_bytes(adapter[name])
    tensors = load_file(tmp_path / "w")
    key = next(key for key in tensors if "layers.1" in key)
    tensors[key][0, 0] = float("inf")
    save_file(tensors, tmp_path / "w")
    objects = store_of({**adapter, name: (tmp_path / "w").read_bytes()})
    with pytest.raises(ModelError, match=r"the adapter of model\.layers\.1\..* not finite"):
        create(settings, engine, creating(engine), objects)
