"""Adding an operator's folder: what is in it is checked, recorded, and looked at again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tests.assets import tiny_tokenizer as tiny
from tests.assets.architectures import ARCHITECTURES
from tests.assets.smollm2 import place_smollm2
from torch import nn
from transformers.pytorch_utils import Conv1D

from outcrop.errors import ModelError, ValidationException
from outcrop.models.catalog import ALL_LINEARS, load_catalog
from outcrop.models.describe import add_model, describe_model
from outcrop.models.lora import LoraLinear, attach
from outcrop.models.operator import catalog_folder
from outcrop.models.weights import ensure_weights, file_digest, weights_folder
from outcrop.settings import Settings
from outcrop.train.plan import make_plan

MODEL_ID = "mylab.small-v1:0"


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that passes every check; the weights themselves are never looked at here."""
    folder = tmp_path / 'a model with "quotes"'
    tiny.write_tokenizer(folder, None, ("<s>", "</s>"), bos="<s>", eos="</s>")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 400,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


def test_an_added_folder_is_offered_under_its_id(settings: Settings, folder: Path) -> None:
    add_model(settings, folder, MODEL_ID, license="mit", family="titan-text", provider="My Lab")
    base = load_catalog(settings).resolve(MODEL_ID)
    assert base is not None
    assert (base.license, base.provider_name, base.full_name) == ("mit", "My Lab", folder.name)
    assert base.model_name == folder.name[:20]
    assert (base.family, base.body_family) == ("titan-text", "titan")
    assert base.context_tokens == base.max_output_tokens == 2048
    assert ensure_weights(settings, base.weights) == folder
    assert weights_folder(settings, base.weights) == folder


def test_a_description_names_licence_digest_and_precision(settings: Settings, folder: Path) -> None:
    base = add_model(settings, folder, MODEL_ID, license="mit")
    described = describe_model(settings, base)
    assert described["license"] == "mit"
    assert described["weights"] == {
        "origin": "a folder of the operator",
        "precision": "as in the folder (float32)",
        "folder": str(folder),
        "digest": file_digest(folder / "model.safetensors"),
    }
    assert json.loads(json.dumps(described)) == described


def test_a_shipped_id_keeps_its_bounds_and_gets_the_folders_weights(
    settings: Settings, folder: Path
) -> None:
    before = load_catalog(settings).resolve("meta.llama3-1-8b-instruct-v1:0")
    after = add_model(settings, folder, "meta.llama3-1-8b-instruct-v1:0", license="llama3.1")
    assert before is not None
    assert after.hyper_parameters == before.hyper_parameters
    assert after.customization_id == before.customization_id
    assert after.weights != before.weights
    assert len(load_catalog(settings).models) == len(load_catalog(Settings(data_dir=folder)).models)


def test_the_shipped_model_is_described_before_and_after_its_conversion(settings: Settings) -> None:
    base = load_catalog(settings).resolve("amazon.titan-text-express-v1")
    assert base is not None
    described = describe_model(settings, base)
    assert described["realModel"] == "SmolLM2-135M-Instruct"
    assert described["weights"]["digest"].startswith("not converted yet")
    assert described["weights"]["precision"] == "dequantized from Q4_1, token embeddings Q8_0"
    folder = place_smollm2(settings.data_dir)
    digest = describe_model(settings, base)["weights"]["digest"]
    assert digest == file_digest(folder / "model.safetensors")


def test_a_folder_that_changed_is_not_used(settings: Settings, folder: Path) -> None:
    base = add_model(settings, folder, MODEL_ID, license="mit")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is gone; it had \d+ bytes when"):
        ensure_weights(settings, base.weights)
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"model\.safetensors has 5 bytes now and had \d+ when"):
        ensure_weights(settings, base.weights)


def test_sharded_weights_have_one_digest(settings: Settings, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index: dict[str, dict[str, str]] = {"weight_map": {}}
    for place in ("1", "2"):
        name = f"model-0000{place}-of-00002.safetensors"
        save_file({f"layer.{place}": np.ones(4, np.float32)}, folder / name)
        index["weight_map"][f"layer.{place}"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    base = add_model(settings, folder, MODEL_ID, license="mit")
    assert len(describe_model(settings, base)["weights"]["digest"]) == 64
    assert ensure_weights(settings, base.weights) == folder


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _write(name: str, content: str = "x") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_remove("config.json"), r"config\.json cannot be read"),
        (_write("config.json", "{"), "is not JSON"),
        (_write("config.json", "[]"), "is not a JSON object"),
        (_config(architectures=["BloomForCausalLM"]), "architecture BloomForCausalLM"),
        (_config(architectures=[]), "architecture none"),
        (_config(quantization_config={}), "are quantized"),
        (_config(auto_map={"AutoModel": "x.y"}), "code of its own"),
        (_config(vocab_size=10), "do not belong together"),
        (_config(vocab_size=None), r"config\.json has no whole number vocab_size"),
        (_config(max_position_embeddings="8k"), r"json has no whole number max_position_embedd"),
        (_write("modeling.py"), r"code of its own \(modeling\.py\)"),
        (_write("pytorch_model.bin"), r"pytorch_model\.bin\. Such files can run code"),
        (_remove("tokenizer.json"), r"has no tokenizer\.json"),
        (_remove("model.safetensors"), "safetensors only"),
        (_write("model.safetensors", "not one"), "is not a safetensors file"),
        (_cut, "it is damaged"),
        (_write("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}'), "has no x"),
        (_write("model.safetensors.index.json", '{"weight_map": {}}'), "names no files"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(
    spoil: Callable[[Path], object], says: str, settings: Settings, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=says):
        add_model(settings, folder, MODEL_ID, license="mit")
    assert load_catalog(settings).resolve(MODEL_ID) is None


@pytest.mark.parametrize(
    ("model_id", "family", "says"),
    [
        ("No Model", None, "is no model id"),
        (MODEL_ID, "gpt", "no family 'gpt'"),
        ("amazon.titan-text-express-v1:0:8k", None, "is another name of"),
        ("amazon.titan-text-express-v1", "llama", "is of the family titan-text"),
    ],
)
def test_an_id_that_cannot_be_used_is_refused(
    model_id: str, family: str | None, says: str, settings: Settings, folder: Path
) -> None:
    with pytest.raises(ModelError, match=says):
        add_model(settings, folder, model_id, license="mit", family=family)


def test_a_model_without_a_licence_or_a_folder_is_refused(settings: Settings, folder: Path) -> None:
    with pytest.raises(ModelError, match="licence"):
        add_model(settings, folder, MODEL_ID)
    with pytest.raises(ModelError, match="is not a folder"):
        add_model(settings, folder / "nothing", MODEL_ID, license="mit")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_adapters_layers_are_found_in_the_weights_of_every_architecture(
    kind: str, settings: Settings, folder: Path
) -> None:
    architecture = ARCHITECTURES[kind]
    model = architecture.model(dtype=torch.float32)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    base = add_model(settings, folder, MODEL_ID, license="mit")
    assert sorted(base.lora.targets) == sorted(architecture.linears)
    assert base.context_tokens == 512
    assert (
        make_plan(base, "FINE_TUNING", {}, has_validation=False).lora_targets == base.lora.targets
    )
    attach(model, base.lora, seed=0)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    linear = {
        name.removesuffix(".linear")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    head = model.get_output_embeddings()
    assert adapted == {name for name in linear if model.get_submodule(name) is not head}


def test_a_job_names_the_layers_that_the_model_has(settings: Settings, folder: Path) -> None:
    ARCHITECTURES["gpt2"].model(dtype=torch.float32).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    base = add_model(settings, folder, MODEL_ID, license="mit")
    sent = {"adapterTargets": "c_proj,c_attn"}
    plan = make_plan(base, "FINE_TUNING", sent, has_validation=False)
    assert plan.lora_targets == ("c_attn", "c_proj")
    with pytest.raises(ValidationException, match="out of c_attn, c_fc, c_proj"):
        make_plan(base, "FINE_TUNING", {"adapterTargets": "q_proj"}, has_validation=False)
    assert describe_model(settings, base)["adapter"]["targets"] == ["c_attn", "c_fc", "c_proj"]


def test_an_entry_that_names_no_layers_has_those_of_its_family(
    settings: Settings, folder: Path
) -> None:
    base = add_model(settings, folder, MODEL_ID, license="mit")
    assert base.lora.targets == ALL_LINEARS
    (entry,) = catalog_folder(settings).glob("*.toml")
    assert "adapter_targets" not in entry.read_text()
