"""The catalogue: complete, honest, and within the limits of Bedrock's own service model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from tests.assets.architectures import ARCHITECTURES

from outcrop.data.formats import CLAUDE_MESSAGES, CONVERSATION, PROMPT_COMPLETION
from outcrop.errors import ModelError
from outcrop.ids import custom_model_arn, customization_job_arn, foundation_model_arn
from outcrop.models.catalog import DOCUMENTS, BaseModel, load_catalog, shipped_models
from outcrop.models.operator import KNOWN_ARCHITECTURES, catalog_folder
from outcrop.models.weights import SHIPPED_KEY
from outcrop.settings import Settings
from outcrop.train.plan import make_plan

MODELS = shipped_models()
PUBLISHED = {
    "amazon.titan-text-express-v1": "amazon.titan-text-express-v1:0:8k",
    "amazon.titan-text-lite-v1": "amazon.titan-text-lite-v1:0:4k",
    "amazon.titan-text-premier-v1:0": "amazon.titan-text-premier-v1:0",
    "cohere.command-light-text-v14": "cohere.command-light-text-v14:7:4k",
    "cohere.command-text-v14": "cohere.command-text-v14:7:4k",
    "meta.llama2-13b-v1": "meta.llama2-13b-v1:0:4k",
    "meta.llama2-70b-v1": "meta.llama2-70b-v1:0:4k",
    "meta.llama3-8b-instruct-v1:0": "meta.llama3-8b-instruct-v1:0:8k",
    "meta.llama3-1-8b-instruct-v1:0": "meta.llama3-1-8b-instruct-v1:0:128k",
    "anthropic.claude-3-haiku-20240307-v1:0": "anthropic.claude-3-haiku-20240307-v1:0:200k",
    "anthropic.claude-3-sonnet-20240229-v1:0": "anthropic.claude-3-sonnet-20240229-v1:0:200k",
    "amazon.nova-micro-v1:0": "amazon.nova-micro-v1:0:128k",
    "mistral.mistral-7b-instruct-v0:2": "mistral.mistral-7b-instruct-v0:2",
    "huggingfacetb.smollm2-135m-instruct-v1:0": "huggingfacetb.smollm2-135m-instruct-v1:0:8k",
}
"""Ids of published examples and the forms that ARNs carry."""


def names(models: tuple[BaseModel, ...]) -> list[str]:
    return [model.model_id for model in models]


every_model = pytest.mark.parametrize("base", MODELS, ids=names(MODELS))


@pytest.fixture(scope="module")
def shapes() -> Any:
    return botocore.session.get_session().get_service_model("bedrock")


def test_published_ids_resolve_with_and_without_their_context_suffix(data_dir: Path) -> None:
    catalog = load_catalog(Settings(data_dir=data_dir))
    for model_id, customization_id in PUBLISHED.items():
        for identifier in (
            model_id,
            customization_id,
            foundation_model_arn("us-east-1", model_id),
            foundation_model_arn("us-east-1", customization_id),
        ):
            base = catalog.resolve(identifier)
            assert base is not None, identifier
            assert (base.model_id, base.customization_id) == (model_id, customization_id)


@pytest.mark.parametrize(
    "identifier",
    [
        "",
        "amazon.titan-text-express",
        "amazon.titan-text-express-v1:9:8k",
        "amazon.titan-text-express-v1/x",
        "arn:aws:bedrock:us-east-1:123456789012:foundation-model/amazon.titan-text-express-v1",
        "arn:aws:bedrock:us-east-1::custom-model/amazon.titan-text-express-v1",
        "arn:aws:s3:us-east-1::foundation-model/amazon.titan-text-express-v1",
    ],
)
def test_what_is_not_an_id_of_the_catalogue_is_not_found(identifier: str, data_dir: Path) -> None:
    assert load_catalog(Settings(data_dir=data_dir)).resolve(identifier) is None


def test_an_arn_of_another_region_is_not_found(data_dir: Path) -> None:
    catalog = load_catalog(Settings(data_dir=data_dir))
    arn = "arn:aws:bedrock:eu-west-1::foundation-model/amazon.titan-text-express-v1"
    assert catalog.resolve(arn, region="eu-west-1") is not None
    assert catalog.resolve(arn, region="us-east-1") is None


def test_no_two_models_share_an_id() -> None:
    ids = [identifier for model in MODELS for identifier in model.ids]
    assert len(ids) == len(set(ids))
    assert set(PUBLISHED) == set(names(MODELS))


@every_model
def test_names_and_ids_are_within_the_service_models_limits(base: BaseModel, shapes: Any) -> None:
    summary = shapes.shape_for("FoundationModelSummary").members
    for member, value in (("modelName", base.model_name), ("providerName", base.provider_name)):
        assert 1 <= len(value) <= summary[member].metadata["max"]
    for identifier in base.ids:
        arn = foundation_model_arn("us-east-1", identifier)
        for member, value in (("modelId", identifier), ("modelArn", arn)):
            assert re.fullmatch(summary[member].metadata["pattern"], value), value
        for shape in ("BaseModelIdentifier", "ModelIdentifier"):
            pattern = shapes.shape_for(shape).metadata["pattern"]
            assert re.fullmatch(pattern, identifier), identifier
            assert re.fullmatch(pattern, arn), arn
    suffixed = base.customization_id
    job = customization_job_arn("us-east-1", "123456789012", suffixed, "a" * 12)
    assert re.fullmatch(shapes.shape_for("ModelCustomizationJobArn").metadata["pattern"], job)
    model = custom_model_arn("us-east-1", "123456789012", suffixed, "a" * 12)
    assert re.fullmatch(shapes.shape_for("CustomModelArn").metadata["pattern"], model)


@every_model
def test_an_entry_is_complete_and_says_what_really_serves_it(base: BaseModel) -> None:
    assert (base.model_name, base.provider_name) == ("SmolLM2-135M (Q4_1)", "HuggingFaceTB")
    assert base.weights == SHIPPED_KEY
    assert base.license == "apache-2.0"
    assert "dequantized from Q4_1" in base.quantization
    assert base.sources
    assert 0 < base.max_output_tokens <= base.context_tokens == 8192
    assert base.body_family in ("titan", "cohere", "llama", "claude", "mistral", "nova")
    assert set(base.data_formats) <= {PROMPT_COMPLETION, CONVERSATION, CLAUDE_MESSAGES}
    assert set(base.customizations) <= {"FINE_TUNING", "CONTINUED_PRE_TRAINING"}
    assert [limit.max_batch_size for limit in base.token_limits] == sorted(
        limit.max_batch_size for limit in base.token_limits
    )


@every_model
def test_what_can_be_fine_tuned_has_all_that_this_takes(base: BaseModel) -> None:
    if "FINE_TUNING" not in base.customizations:
        assert base.hyper_parameters == ()
        return
    assert base.data_formats
    assert set(base.learning_rate_factor) == {"adapter", "full"}
    rows = {row.name: row for row in base.hyper_parameters}
    assert "epochCount" in rows
    assert ("learningRate" in rows) != ("learningRateMultiplier" in rows)
    assert ("learningRateMultiplier" in rows) == (base.base_learning_rate is not None)
    assert "batchSize" not in rows or rows["batchSize"].default == base.batch_size
    for row in rows.values():
        assert row.minimum <= row.maximum
        assert row.default is None or row.minimum <= row.default <= row.maximum
        assert row.unit
        assert row.source


def test_the_families_that_bedrock_names_can_be_pre_trained_further() -> None:
    able = {base.family for base in MODELS if "CONTINUED_PRE_TRAINING" in base.customizations}
    assert able == {"titan-text", "smollm2"}
    for base in MODELS:
        if "CONTINUED_PRE_TRAINING" not in base.customizations:
            assert base.family not in able or "premier" in base.model_id
            continue
        assert base.formats("CONTINUED_PRE_TRAINING") == (DOCUMENTS,)
        assert base.formats("FINE_TUNING") == base.data_formats
        assert base.record_quota("CONTINUED_PRE_TRAINING").max_total == 100_000
        assert base.record_quota("FINE_TUNING") == base.records


@every_model
def test_every_bound_of_a_table_is_accepted(base: BaseModel) -> None:
    """A batch size inside the table in particular, whatever the token limits' last row is."""
    for row in base.hyper_parameters:
        for value in {row.minimum, row.maximum}:
            text = str(int(value)) if row.kind == "int" else repr(value)
            plan = make_plan(base, "FINE_TUNING", {row.name: text}, has_validation=True)
            assert plan.hyper_parameters[row.name] == text
            assert base.token_limits == () or base.token_limit(plan.batch_size) is not None


def test_bounds_are_those_that_bedrock_documents(data_dir: Path) -> None:
    catalog = load_catalog(Settings(data_dir=data_dir))

    def table(model_id: str) -> dict[str, tuple[float, float, float | None]]:
        base = catalog.resolve(model_id)
        assert base is not None
        return {row.name: (row.minimum, row.maximum, row.default) for row in base.hyper_parameters}

    assert table("amazon.titan-text-lite-v1") == {
        "epochCount": (1, 10, 5),
        "batchSize": (1, 64, 1),
        "learningRate": (0, 1, 1e-5),
        "learningRateWarmupSteps": (0, 250, 5),
    }
    assert table("amazon.titan-text-premier-v1:0") == {
        "epochCount": (1, 5, 2),
        "batchSize": (1, 1, 1),
        "learningRate": (1e-7, 1e-5, 1e-6),
        "learningRateWarmupSteps": (0, 20, 5),
    }
    light = {
        "epochCount": (1, 100, 1),
        "batchSize": (8, 32, 8),
        "learningRate": (5e-6, 0.1, 1e-5),
        "earlyStoppingThreshold": (0, 0.1, 0.01),
        "earlyStoppingPatience": (1, 10, 6),
        "evalPercentage": (5, 50, 20),
    }
    assert table("cohere.command-light-text-v14") == light
    assert table("cohere.command-text-v14") == {**light, "batchSize": (8, 8, 8)}
    assert table("meta.llama2-13b-v1") == table("meta.llama3-1-8b-instruct-v1:0")
    assert table("meta.llama2-13b-v1") == {
        "epochCount": (1, 10, 5),
        "batchSize": (1, 1, 1),
        "learningRate": (5e-6, 0.1, 1e-4),
    }
    assert table("anthropic.claude-3-haiku-20240307-v1:0") == {
        "epochCount": (1, 10, 2),
        "batchSize": (4, 256, 32),
        "learningRateMultiplier": (0.1, 2, 1),
        "earlyStoppingThreshold": (0, 0.1, 0.001),
        "earlyStoppingPatience": (1, 10, 2),
    }
    assert table("amazon.nova-micro-v1:0") == {
        "epochCount": (1, 5, 2),
        "learningRate": (1e-6, 1e-4, 1e-5),
        "learningRateWarmupSteps": (0, 100, 10),
    }


def test_above_the_last_row_of_token_limits_that_row_holds(data_dir: Path) -> None:
    express = load_catalog(Settings(data_dir=data_dir)).resolve("amazon.titan-text-express-v1")
    assert express is not None
    limits = [express.token_limit(size) for size in (1, 2, 4, 5, 64)]
    assert [limit.total for limit in limits if limit] == [4096, 2048, 2048, 2048, 2048]


def test_a_shipped_models_adapter_is_on_all_its_linear_layers() -> None:
    assert MODELS[0].lora.targets == (
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )


def test_the_known_architectures_are_those_that_are_compared_with_transformers() -> None:
    assert set(KNOWN_ARCHITECTURES) == {found.name for found in ARCHITECTURES.values()}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_id =", "cannot be read as TOML"),
        ('model_id = "a.b"\nfamily = "llama"', "has no context_tokens"),
        ('model_id = "a.b"\nfamily = "x"', "names the family 'x'. Known are"),
    ],
)
def test_a_broken_entry_of_the_operator_is_refused_by_name(
    text: str, says: str, data_dir: Path
) -> None:
    settings = Settings(data_dir=data_dir)
    catalog_folder(settings).mkdir(parents=True)
    (catalog_folder(settings) / "mine.toml").write_text(text)
    with pytest.raises(ModelError, match=says) as raised:
        load_catalog(settings)
    assert "mine.toml" in str(raised.value)
