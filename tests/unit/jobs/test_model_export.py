"""An exported model answers as the served one, in each form; and half an export is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from sqlalchemy import Engine
from tests.assets import tiny_tokenizer as tiny
from tests.assets.tiny_model import write_tiny_model
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.jobs.test_chaining import MODEL_ID, Workshop
from tests.unit.store.build import ACCOUNT, claimed, new_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from outcrop.cli.export import export_model
from outcrop.data.render import FALLBACK_TEMPLATE
from outcrop.errors import LeaseLost, ModelError, ValidationException
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, new_id, role_arn
from outcrop.jobs import artifacts, exporting, model_export
from outcrop.jobs.exporting import write_export
from outcrop.jobs.parents import describe_parent
from outcrop.jobs.subjects import UPLOADING, WRITING, describe_subject
from outcrop.models import gguf_file
from outcrop.models.artifact import read_artifact
from outcrop.models.catalog import load_catalog
from outcrop.models.convert import convert_gguf
from outcrop.models.describe import add_model
from outcrop.models.exported import check_form
from outcrop.models.weights import weights_folder
from outcrop.serve.backend import Memory, Part, Scores
from outcrop.serve.engine import open_backend
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import EXPORT, CustomModel, Job

PROMPTS = ([5, 9, 77, 130], [301, 12, 12, 8, 260], [40])
NUM_TOKENS = 12
STRONG = {"learningRate": "0.1", "epochCount": "3"}
FULL = {"learningRate": "0.001", "epochCount": "3", "method": "full"}
"""So that the model does not answer as its base."""
TIE = 0.03
"""Logits that are closer may change places: the same sums are made in another order, and on some
machines models are served in bfloat16."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer cuts text as SmolLM2's does."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), vocab_size=400)
    tiny.write_tokenizer(
        *(folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS),
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    cuts = {"type": "Digits", "individual_digits": True}
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [cuts, {**described["pre_tokenizer"], "use_regex": True}],
    }
    file.write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from bootstrapped(Settings(data_dir=tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def workshop(engine: Engine, folder: Path) -> Workshop:
    assert engine.url.database is not None
    settings = Settings(data_dir=Path(engine.url.database).parent)
    add_model(settings, folder, MODEL_ID, license="MIT", family="titan-text", name="Tiny")
    return Workshop(settings, engine)


@pytest.fixture(scope="module")
def one(workshop: Workshop) -> CustomModel:
    """A model that is an adapter."""
    return workshop.make("one", parameters=STRONG)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def base_folder(workshop: Workshop) -> Path:
    base = load_catalog(workshop.settings).resolve(MODEL_ID)
    assert base is not None
    return weights_folder(workshop.settings, base.weights)


def written(
    workshop: Workshop, model: CustomModel, form: str, data_type: str | None = None
) -> Path:
    """The folder of an export."""
    folder = workshop.settings.data_dir / "exports" / new_id()
    subject = describe_subject(model)
    artifact = workshop.artifact(model)
    write_export(workshop.settings, subject, artifact, folder, form, check_form(form, data_type))
    return folder


def served(workshop: Workshop, model: CustomModel) -> list[list[int]]:
    """What a model server answers greedily."""
    weights, artifact = base_folder(workshop), str(workshop.artifact(model))
    backend = open_backend(weights, threads=1, precision="auto", max_page_bytes=1 << 24)
    try:
        backend.load(artifact, ())
        found = []
        for prompt in PROMPTS:
            memory, answer, part, first = Memory(), list[int](), list(prompt), 0
            pages = range(-(-(len(prompt) + NUM_TOKENS) // backend.page_tokens))
            while len(answer) < NUM_TOKENS:
                asked = Part(artifact, part, first, pages, num_scores=1, memory=memory)
                (scores,) = backend.run([asked])
                assert isinstance(scores, Scores)
                first += len(part)
                part = [int(scores.logits_NV[-1].argmax())]
                answer += part
            found.append(answer)
        return found
    finally:
        backend.close()


def farthest(model: Any, answers: list[list[int]]) -> float:
    """How far, by the model as transformers computes it, a token of the answers is behind the one
    that is likeliest there; 0 where all are what it would answer greedily.
    """
    gaps = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        chosen_T = logits_TV.gather(1, torch.tensor(answer)[:, None])[:, 0]
        gaps.append(float((logits_TV.max(1).values - chosen_T).max()))
    return max(gaps)


def in_peft_terms(base: Any, folder: Path) -> Any:
    """Add an adapter to a model as peft's documents say, without anything of this project.

    Source: peft, LoRA: W + lora_alpha / r * B A, tensors named after the module's path below
    base_model.model.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = dict(base.named_parameters())
    added = set()
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            assert target.split(".")[-2] in config["target_modules"]
            with torch.no_grad():
                weights[target] += (b @ a) * (config["lora_alpha"] / config["r"])
            added.add(target)
    assert 2 * len(added) == len(tensors)
    return base


def load(folder: Path) -> Any:
    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["adapter", "whole", "adapter over a whole"])
def test_each_form_answers_as_the_served_model(
    workshop: Workshop, one: CustomModel, kind: str
) -> None:
    model = one
    if kind == "whole":
        model = workshop.make("whole", parameters=FULL)
    if kind == "adapter over a whole":
        parent = workshop.make("below", parameters=FULL)
        model = workshop.make("above", parent, parameters=STRONG)
    answers = served(workshop, model)
    assert farthest(load(base_folder(workshop)), answers) > 10 * TIE, "the model is not its base"

    merged = load(written(workshop, model, "merged"))
    assert farthest(merged, answers) < TIE

    if kind == "whole":
        with pytest.raises(ModelError, match="has no adapter: all its weights are its own"):
            written(workshop, model, "adapter")
    else:
        folder = written(workshop, model, "adapter")
        own = kind != "adapter"
        assert (folder / "base_model").is_dir() is own
        base = load(folder / "base_model" if own else base_folder(workshop))
        assert farthest(in_peft_terms(base, folder), answers) < TIE

    file = written(workshop, model, "gguf") / "model.gguf"
    state = merged.state_dict()
    tensors = dequantized(file)
    assert set(tensors) == {
        gguf_file._tensor_name(name) for name in state if name != "lm_head.weight"
    }
    for name, tensor in state.items():
        if name == "lm_head.weight":  # tied
            continue
        found = tensors[gguf_file._tensor_name(name)]
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        np.testing.assert_array_equal(unpermuted(found, heads), tensor.numpy())


def dequantized(file: Path) -> dict[str, npt.NDArray[np.float32]]:
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in GGUFReader(file).tensors
    }


def unpermuted(values: npt.NDArray[np.float32], heads: int | None) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's order of the rows: it rotates neighbours, the other one halves."""
    if heads is None:
        return values
    rows = len(values) // heads
    order = [
        head * rows + 2 * (row % (rows // 2)) + row // (rows // 2)
        for head in range(heads)
        for row in range(rows)
    ]
    return values[order]


@pytest.mark.parametrize(
    ("data_type", "relative"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.0)]
)
def test_fewer_bits_round_and_nothing_else(
    workshop: Workshop, one: CustomModel, data_type: str, relative: float
) -> None:
    model = one
    exact = dequantized(written(workshop, model, "gguf") / "model.gguf")
    rounded = dequantized(written(workshop, model, "gguf", data_type) / "model.gguf")
    assert exact.keys() == rounded.keys()
    for name, values in exact.items():
        if values.ndim == 1:
            np.testing.assert_array_equal(rounded[name], values)
        elif data_type == "q8_0":
            blocks, found = values.reshape(-1, 32), rounded[name].reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            # Half a step for the number, and half a place of float16 for what the step is held in.
            most = step / 2 + np.abs(blocks) * 2**-11
            assert (np.abs(found - blocks) <= most * 1.001 + 1e-6).all(), name
        else:
            np.testing.assert_allclose(rounded[name], values, rtol=relative, atol=1e-7)
    if data_type != "q8_0":
        merged = load_file(written(workshop, model, "merged", data_type) / "model.safetensors")
        assert {str(value.dtype) for value in merged.values()} == {
            {"f16": "torch.float16", "bf16": "torch.bfloat16"}[data_type]
        }


def test_what_was_written_as_gguf_reads_back_as_the_same_model_and_tokenizer(
    workshop: Workshop, one: CustomModel, tmp_path: Path
) -> None:
    model = one
    back = tmp_path / "back"
    back.mkdir()
    converted = convert_gguf(written(workshop, model, "gguf", "bf16") / "model.gguf", back)
    assert (converted.name, converted.license) == ("one", "MIT")
    merged = written(workshop, model, "merged", "bf16")
    ours, theirs = load_file(merged / "model.safetensors"), load_file(back / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loader: Any = AutoTokenizer
    tokenizer_of_ours, other = loader.from_pretrained(merged), loader.from_pretrained(back)
    text = "the user asks 12345 : yes , na\u00efve \u65e5\u672c\n\n  no"
    assert tokenizer_of_ours.encode(text) == other.encode(text)
    messages = [{"role": "user", "content": text}]
    said = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for tokenizer in (tokenizer_of_ours, other)
    ]
    assert said[0] == said[1]
    assert said[0].endswith("<|im_start|>assistant\n")
    header = GGUFReader(written(workshop, model, "gguf") / "model.gguf").fields
    assert header["tokenizer.ggml.add_bos_token"].contents() is False
    assert header["tokenizer.ggml.eos_token_id"].contents() == tokenizer_of_ours.eos_token_id


def test_the_card_says_base_licence_digest_and_how_it_was_made(
    workshop: Workshop, one: CustomModel
) -> None:
    model = one
    folder = written(workshop, model, "adapter")
    card = (folder / "README.md").read_text()
    base = load_catalog(workshop.settings).resolve(MODEL_ID)
    assert base is not None
    weights = hashlib.sha256((base_folder(workshop) / "model.safetensors").read_bytes()).hexdigest()
    data = model.spec["data"][0]
    for part in (
        *("license: mit\n", "# one\n", "| Tiny |", weights, model.artifact_digest, model.arn),
        *(data["role"], "an adapter (LoRA) beside frozen weights", data["sha256"]),
        f"{model.metrics['trainingMetrics']['trainingLoss']:.4f}",
    ):
        assert part in card, part
    assert data["s3Uri"] not in card, "where the owner keeps data is nobody else's business"


def test_a_folder_without_a_template_is_exported_with_the_one_that_it_is_served_with(
    workshop: Workshop, one: CustomModel
) -> None:
    config = base_folder(workshop) / "tokenizer_config.json"
    whole = config.read_text()
    described = json.loads(whole)
    described.pop("chat_template")
    model = one
    config.write_text(json.dumps(described))
    try:
        folder = written(workshop, model, "merged")
        header = GGUFReader(written(workshop, model, "gguf") / "model.gguf").fields
    finally:
        config.write_text(whole)
    template = (folder / "chat_template.jinja").read_text()
    assert header["tokenizer.chat_template"].contents() == template
    assert template == FALLBACK_TEMPLATE.replace(exporting._BEGINNING, "")


def held(workshop: Workshop, model: CustomModel, form: str = "adapter", **changes: Any) -> Job:
    """An export that was just claimed."""
    spec = {
        "format": form,
        "dataType": "f32",
        "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
        "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out/"},
        "subject": describe_subject(model),
        "parent": describe_parent(model),
        **changes,
    }
    stages = (WRITING, UPLOADING)
    with transaction(workshop.engine) as connection:
        new = new_task(new_id(), kind=EXPORT, spec=spec, stages=stages)
        return claimed(connection, jobs.create_job(connection, new))


def run(workshop: Workshop, export: Job) -> Job:
    model_export.run(
        workshop.settings, workshop.engine, export, lambda: False, objects=workshop.objects
    )
    with workshop.engine.connect() as connection:
        now = jobs.get_job_by_id(connection, export.id)
    assert now is not None
    return now


def objects_of(workshop: Workshop, export: Job) -> dict[str, bytes]:
    folder = artifacts.export_folder(S3Uri(BUCKET, "out/"), export.id)
    return {
        uri.key.removeprefix(f"{folder.key}/"): content
        for uri, content in workshop.objects.content.items()
        if uri.key.startswith(f"{folder.key}/")
    }


class Breaking(MemoryStore):
    """A store that is gone after some writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.left = writes

    def write(self, uri: S3Uri, content: bytes | Path) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt  # as abrupt as a kill: nothing of ours catches it
        super().write(uri, content)


def test_a_killed_export_has_no_manifest_and_the_next_attempt_writes_the_same_bytes(
    workshop: Workshop, one: CustomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = one
    whole = run(workshop, held(workshop, model, "merged"))
    assert whole.status == "completed"
    wanted = objects_of(workshop, whole)
    assert list(wanted)[-1] == "manifest.json", "written last"
    manifest = json.loads(wanted["manifest.json"])
    assert {row["name"] for row in manifest["files"]} == set(wanted) - {"manifest.json"}
    for row in manifest["files"]:
        assert hashlib.sha256(wanted[row["name"]]).hexdigest() == row["sha256"]
    assert whole.result is not None
    assert [row["name"] for row in whole.result["outputs"]] == [
        row["name"] for row in manifest["files"]
    ]

    export = held(workshop, model, "merged")
    breaking = Breaking(len(wanted))  # the test of the place, and all but the manifest
    monkeypatch.setattr(workshop, "objects", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(workshop, export)
    assert set(objects_of(workshop, export)) == set(wanted) - {"manifest.json"}
    breaking.left = 100
    with transaction(workshop.engine) as connection:
        assert jobs.requeue(connection, export.id, export.fence, "killed")
        now = jobs.get_job_by_id(connection, export.id)
        assert now is not None
        again = claimed(connection, now)
    assert run(workshop, again).status == "completed"
    assert objects_of(workshop, again) == wanted


def test_an_attempt_that_lost_its_lease_writes_nothing(
    workshop: Workshop, one: CustomModel
) -> None:
    export = held(workshop, one)
    with transaction(workshop.engine) as connection:
        assert jobs.requeue(connection, export.id, export.fence, "taken away")
    with pytest.raises(LeaseLost):
        run(workshop, export)
    assert not objects_of(workshop, export)


def test_what_the_role_may_not_write_the_export_may_not(
    workshop: Workshop, one: CustomModel
) -> None:
    export = held(workshop, one, roleArn=role_arn(ACCOUNT, "nobody"))
    with pytest.raises(ValidationException, match="nobody"):
        run(workshop, export)
    assert not objects_of(workshop, export)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "has no name here for how its tokenizer cuts"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "not byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused_by_name(
    folder: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    described = {**json.loads((folder / "tokenizer.json").read_text()), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    config = json.loads((folder / "config.json").read_text())
    assert gguf_file.check_gguf(config, folder) == "llama"
    with pytest.raises(ModelError, match=says):
        gguf_file.check_gguf(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "the architecture is gpt2"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "of type yarn"),
    ],
)
def test_an_architecture_that_llama_cpp_would_compute_otherwise_is_refused_by_name(
    folder: Path, change: dict[str, Any], says: str
) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **change}
    with pytest.raises(ModelError, match=says):
        gguf_file.check_gguf(config, folder)


def test_the_command_writes_a_whole_folder_and_takes_none_that_is_in_use(
    workshop: Workshop, one: CustomModel, tmp_path: Path
) -> None:
    model = one
    place = tmp_path / "exports" / "one"
    where, manifest = export_model(workshop.settings, "one", str(place), "merged", "bf16")
    assert where == str(place)
    assert json.loads((place / "manifest.json").read_text()) == manifest
    assert manifest["artifactDigest"] == model.artifact_digest
    assert {path.name for path in place.iterdir()} > {"config.json", "model.safetensors"}
    assert [path.name for path in place.parent.iterdir()] == ["one"], "nothing beside it"
    with pytest.raises(ModelError, match="is there already"):
        export_model(workshop.settings, "one", str(place), "merged", None)
    with pytest.raises(ModelError, match="no custom model two"):
        export_model(workshop.settings, "two", str(tmp_path / "two"), "merged", None)
    with pytest.raises(ValidationException, match="cannot be of dataType 'q8_0'"):
        export_model(workshop.settings, "one", str(tmp_path / "two"), "merged", "q8_0")
    with pytest.raises(ModelError, match="names no place"):
        export_model(workshop.settings, "one", "s3://", "merged", None)


class Uploads:
    """The part of a client of S3 that is used; remembers the keys."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def upload_file(self, file: str, bucket: str, key: str) -> None:
        assert Path(file).is_file()
        self.keys.append(f"{bucket}/{key}")


def test_the_command_writes_objects_with_the_manifest_last(
    workshop: Workshop, one: CustomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads()
    monkeypatch.setattr("boto3.client", lambda service: uploads)
    where, manifest = export_model(workshop.settings, one.arn, "s3://mine/a/", "adapter", None)
    assert where == "s3://mine/a/"
    names = [row["name"] for row in manifest["files"]]
    assert uploads.keys == [f"mine/a/{name}" for name in (*names, "manifest.json")]


def test_a_changed_artifact_is_not_exported(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.make("changed")
    adapter = read_artifact(workshop.artifact(model)).adapter
    assert adapter is not None
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ModelError, match="not what was published"):
        export_model(workshop.settings, "changed", str(tmp_path / "two"), "merged", None)
