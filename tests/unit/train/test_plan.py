"""From hyperparameters as strings to a checked plan."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.errors import ValidationException
from outcrop.models.catalog import (
    ALL_LINEARS,
    BaseModel,
    Hyperparameter,
    LoraConfig,
    shipped_models,
)
from outcrop.train.plan import (
    EarlyStopping,
    Parent,
    TrainPlan,
    canonical,
    make_plan,
    parse_number,
)

TITAN = "amazon.titan-text-express-v1"
COHERE = "cohere.command-light-text-v14"
CLAUDE = "anthropic.claude-3-haiku-20240307-v1:0"
LLAMA = "meta.llama2-13b-v1"


def base(model_id: str) -> BaseModel:
    return next(model for model in shipped_models() if model.model_id == model_id)


def plan(model_id: str, *, has_validation: bool = False, **hyper_parameters: str) -> TrainPlan:
    return make_plan(base(model_id), "FINE_TUNING", hyper_parameters, has_validation=has_validation)


def refusal(model_id: str, **hyper_parameters: str) -> str:
    with pytest.raises(ValidationException) as caught:
        make_plan(base(model_id), "FINE_TUNING", hyper_parameters, has_validation=False)
    return caught.value.message


def rows() -> list[tuple[BaseModel, Hyperparameter]]:
    return [
        (model, row)
        for model in shipped_models()
        if "FINE_TUNING" in model.customizations
        for row in model.hyper_parameters
    ]


def row_id(value: object) -> str:
    return value.model_id if isinstance(value, BaseModel) else getattr(value, "name", str(value))


def test_published_example_is_understood() -> None:
    made = plan(COHERE, epochCount="1", batchSize="8", learningRate="0.00001")
    assert (made.num_epochs, made.batch_size) == (1, 8)
    factor = base(COHERE).learning_rate_factor["adapter"]
    assert made.learning_rate == pytest.approx(1e-5 * factor)
    assert made.method == "adapter"
    assert made.total_steps(17) == 3


@pytest.mark.parametrize(
    "model", [model for model in shipped_models() if model.hyper_parameters], ids=row_id
)
def test_every_models_default_trains_adapters_at_the_same_rate(model: BaseModel) -> None:
    made = make_plan(model, "FINE_TUNING", {}, has_validation=True)
    assert made.learning_rate == pytest.approx(1.6e-3 * min(1.0, made.batch_size / 8))


def test_small_batches_of_records_train_adapters_at_a_smaller_rate() -> None:
    rates = {size: plan(TITAN, batchSize=str(size)).learning_rate for size in (1, 4, 8, 64)}
    full_rate = 1e-5 * base(TITAN).learning_rate_factor["adapter"]
    assert rates == pytest.approx({1: full_rate / 8, 4: full_rate / 2, 8: full_rate, 64: full_rate})


def test_raw_text_and_full_fine_tuning_take_the_rate_whatever_the_batch() -> None:
    whole = plan(TITAN, batchSize="1", method="full")
    assert whole.learning_rate == 1e-5
    text = make_plan(
        base(TITAN), "CONTINUED_PRE_TRAINING", {"batchSize": "1"}, has_validation=False
    )
    assert text.learning_rate == pytest.approx(1e-5 * base(TITAN).learning_rate_factor["adapter"])


def test_given_values_come_back_as_sent_and_defaults_in_bedrocks_form() -> None:
    made = plan(COHERE, learningRate="0.00001", epochCount="02")
    assert made.hyper_parameters == {
        "epochCount": "02",
        "batchSize": "8",
        "learningRate": "0.00001",
        "earlyStoppingThreshold": "0.01",
        "earlyStoppingPatience": "6",
        "evalPercentage": "20.0",
    }
    assert plan(COHERE).hyper_parameters["learningRate"] == "1.0E-5"
    assert plan(TITAN).hyper_parameters == {
        "epochCount": "5",
        "batchSize": "1",
        "learningRate": "1.0E-5",
        "learningRateWarmupSteps": "5",
    }
    assert plan(LLAMA).hyper_parameters["learningRate"] == "1.0E-4"


@pytest.mark.parametrize(("model", "row"), rows(), ids=row_id)
def test_bounds_themselves_are_allowed_in_both_notations(
    model: BaseModel, row: Hyperparameter
) -> None:
    for bound in (row.minimum, row.maximum):
        texts = [canonical(bound, row.kind)]
        if row.kind == "float":
            texts += [f"{bound:.20f}".rstrip("0"), f"{bound:e}"]
        for text in texts:
            made = make_plan(model, "FINE_TUNING", {row.name: text}, has_validation=True)
            assert made.hyper_parameters[row.name] == text


@pytest.mark.parametrize(("model", "row"), rows(), ids=row_id)
def test_what_lies_beyond_a_bound_is_refused_with_name_value_and_range(
    model: BaseModel, row: Hyperparameter
) -> None:
    step = 1 if row.kind == "int" else 1e-9
    low, high = canonical(row.minimum, row.kind), canonical(row.maximum, row.kind)
    for value in (row.minimum - step, row.maximum + step):
        text = canonical(value, row.kind)
        message = refusal(model.model_id, **{row.name: text})
        assert f"{row.name} is '{text}'" in message
        assert f"from {low} to {high}" in message


@pytest.mark.parametrize(
    "text",
    ["", " 5 ", "5.0", "five", "0x5", "5_0", "٥", "５", "1e1", "nan", "inf", "+5", "--5", "5\n"],
)
def test_text_that_is_no_whole_number_is_refused(text: str) -> None:
    message = refusal(TITAN, epochCount=text)
    assert f"epochCount is {text!r}; it must be a whole number from 1 to 10." in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 0.1",
        "0.1 ",
        "nan",
        "NaN",
        "inf",
        "-Infinity",
        "1e400",
        "0,1",
        "1e",
        ".",
        "1_0.0",
        "1f",
    ],
)
def test_text_that_is_no_number_is_refused(text: str) -> None:
    message = refusal(TITAN, learningRate=text)
    assert f"learningRate is {text!r}; it must be a number from 0.0 to 1.0." in message


@pytest.mark.parametrize("text", ["0.00001", "1e-5", "1E-5", "1.0E-05", ".00001", "0.1e-4"])
def test_decimal_and_scientific_notation_mean_the_same(text: str) -> None:
    assert plan(TITAN, learningRate=text).learning_rate == plan(TITAN).learning_rate
    assert plan(TITAN, learningRate=text).hyper_parameters["learningRate"] == text


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    message = refusal(TITAN, learning_rate="1e-5")
    assert "'learning_rate' is unknown" in message
    assert "epochCount, batchSize, learningRate, learningRateWarmupSteps" in message


def test_all_findings_are_in_one_message() -> None:
    message = refusal(TITAN, epochCount="0", batchSize="x", colour="red")
    assert all(name in message for name in ("epochCount", "batchSize", "colour"))


def test_endless_value_is_shown_shortened() -> None:
    assert len(refusal(TITAN, epochCount="9" * 10_000)) < 300


def test_eval_percentage_holds_only_without_validation_data() -> None:
    assert plan(COHERE).evaluation_percentage == 20.0
    assert plan(COHERE, has_validation=True).evaluation_percentage is None
    assert plan(TITAN).evaluation_percentage is None
    assert (
        plan(COHERE, has_validation=True, evalPercentage="30").hyper_parameters["evalPercentage"]
        == "30"
    )


def test_coheres_learning_rate_is_accepted_with_a_validation_set() -> None:
    made = plan(COHERE, has_validation=True, learningRate="0.00002")
    assert made.learning_rate == pytest.approx(2 * plan(COHERE).learning_rate)


def test_early_stopping_needs_validation_records_to_watch() -> None:
    made = plan(CLAUDE, has_validation=True, earlyStoppingThreshold="0.05")
    assert made.early_stopping == EarlyStopping(0.05, 2)
    assert plan(CLAUDE).early_stopping is None
    assert plan(COHERE).early_stopping == EarlyStopping(0.01, 6)
    assert plan(TITAN, has_validation=True).early_stopping is None


def test_learning_rate_multiplier_scales_the_familys_own_rate() -> None:
    assert plan(CLAUDE, learningRateMultiplier="0.5").learning_rate == pytest.approx(
        plan(CLAUDE).learning_rate / 2
    )
    assert plan(CLAUDE).batch_size == 32


def test_full_fine_tuning_takes_the_rate_as_it_is() -> None:
    made = plan(TITAN, method="full")
    assert (made.method, made.learning_rate) == ("full", 1e-5)


def test_our_own_parameters_come_back_only_where_they_were_sent() -> None:
    own = {"method", "adapterRank", "adapterAlpha", "adapterTargets", "dataPolicy"}
    assert not own & set(plan(TITAN).hyper_parameters)
    assert plan(TITAN).data_policy == "report"
    cleans = plan(TITAN, dataPolicy="clean")
    assert (cleans.data_policy, cleans.hyper_parameters["dataPolicy"]) == ("clean", "clean")
    sent = {"adapterTargets": "v_proj, q_proj", "adapterRank": "8"}
    made = make_plan(base(TITAN), "FINE_TUNING", sent, has_validation=False)
    assert made.hyper_parameters == {**plan(TITAN).hyper_parameters, **sent}
    assert (made.lora_rank, made.lora_targets) == (8, ("q_proj", "v_proj"))


def test_the_catalogues_adapter_is_taken_where_none_is_asked_for() -> None:
    made = plan(TITAN)
    assert made.method == "adapter"
    assert (made.lora_rank, made.lora_alpha, made.lora_targets) == (16, 32.0, ALL_LINEARS)


def test_a_rank_alone_keeps_the_scaling_that_the_learning_rate_was_chosen_for() -> None:
    made = plan(TITAN, adapterRank="64")
    assert made.lora_alpha / made.lora_rank == plan(TITAN).lora_alpha / plan(TITAN).lora_rank
    assert plan(TITAN, adapterRank="64", adapterAlpha="16").lora_alpha == 16.0


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({"method": "lora"}, "method is 'lora'; it must be adapter or full"),
        ({"method": ""}, "method is ''"),
        ({"dataPolicy": "drop"}, "dataPolicy is 'drop'; it must be report or clean"),
        ({"adapterRank": "0"}, "adapterRank is '0'; it must be a whole number from 1 to 256"),
        ({"adapterRank": "257"}, "adapterRank is '257'"),
        ({"adapterRank": "8.0"}, "adapterRank is '8.0'"),
        ({"adapterAlpha": "0"}, "adapterAlpha is '0'; it must be a number from 0.1 to 1024.0"),
        ({"adapterAlpha": "nan"}, "adapterAlpha is 'nan'"),
        ({"adapterTargets": ""}, "adapterTargets is ''; it must name layers, each once"),
        ({"adapterTargets": "q_proj,"}, "adapterTargets is 'q_proj,'"),
        ({"adapterTargets": "q_proj,q_proj"}, "adapterTargets is 'q_proj,q_proj'"),
        ({"adapterTargets": "lm_head"}, "out of q_proj, k_proj, v_proj"),
        ({"adapterTargets": "x" * 500}, "xxx...'; it must name layers"),
        (
            {"method": "full", "adapterRank": "8", "adapterTargets": "q_proj"},
            "method is full, so there is no adapter: leave out adapterRank, adapterTargets",
        ),
    ],
)
def test_our_own_parameters_are_checked(sent: dict[str, str], says: str) -> None:
    assert says in refusal(TITAN, **sent)


def test_findings_about_our_own_parameters_are_in_the_same_message() -> None:
    message = refusal(TITAN, epochCount="0", method="x", adapterRank="0", colour="red")
    assert all(name in message for name in ("epochCount", "method", "adapterRank", "colour"))


OLD = LoraConfig(8, 4.0, ("q_proj", "v_proj"))


def chained(parent: LoraConfig | None, **sent: str) -> TrainPlan:
    return make_plan(
        base(TITAN), "FINE_TUNING", sent, has_validation=False, parent=Parent("mine", parent)
    )


def test_a_chained_job_goes_on_with_its_parents_adapter() -> None:
    made = chained(OLD)
    assert made.method == "adapter"
    assert LoraConfig(made.lora_rank, made.lora_alpha, made.lora_targets) == OLD
    assert chained(None).lora_rank == plan(TITAN).lora_rank


def test_a_chained_job_may_have_a_larger_adapter() -> None:
    made = chained(OLD, adapterRank="32", adapterTargets="q_proj,o_proj,v_proj")
    assert (made.lora_rank, made.lora_alpha) == (32, 16.0)
    assert made.lora_targets == ("q_proj", "v_proj", "o_proj")
    assert chained(OLD, adapterAlpha="64").lora_alpha == 64.0


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({"adapterRank": "4"}, "adapterRank is 4; the custom model mine, which the job starts "),
        ({"adapterTargets": "q_proj"}, "adapterTargets lacks v_proj; the custom model mine"),
    ],
)
def test_a_chained_job_cannot_have_a_smaller_adapter(sent: dict[str, str], says: str) -> None:
    with pytest.raises(ValidationException, match=re.escape(says)):
        chained(OLD, **sent)
    assert chained(None, **sent).method == "adapter", "over whole weights any shape will do"


def test_a_chained_job_may_train_all_weights_whatever_its_parent_has() -> None:
    assert chained(OLD, method="full").method == "full"
    assert chained(None, method="full").method == "full"


def test_continued_pre_training_has_the_familys_table() -> None:
    made = make_plan(base(TITAN), "CONTINUED_PRE_TRAINING", {}, has_validation=False)
    assert made == dataclasses.replace(plan(TITAN), learning_rate=made.learning_rate)
    with pytest.raises(ValidationException, match="does not support CONTINUED_PRE_TRAINING"):
        make_plan(base(COHERE), "CONTINUED_PRE_TRAINING", {}, has_validation=False)


def test_customization_that_the_model_does_not_offer_is_refused() -> None:
    with pytest.raises(ValidationException, match="does not support DISTILLATION"):
        make_plan(base(TITAN), "DISTILLATION", {}, has_validation=False)


@given(st.integers(2, 200), st.sampled_from(["5", "20", "50"]))
def test_split_takes_its_share_once_and_keeps_the_order(count: int, percentage: str) -> None:
    made = plan(COHERE, evalPercentage=percentage)
    records = list(range(count))
    training, validation = made.split(records)
    assert sorted(training + validation) == records
    assert training == sorted(training)
    assert validation == sorted(validation)
    assert training
    assert abs(len(validation) - count * int(percentage) / 100) <= 1
    assert made.split(records) == (training, validation)


def test_split_without_a_percentage_or_of_one_record_takes_nothing() -> None:
    assert plan(TITAN).split([1, 2, 3]) == ([1, 2, 3], [])
    assert plan(COHERE).split([1]) == ([1], [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1.0E-5"),
        (1e-4, "1.0E-4"),
        (1.25e-7, "1.25E-7"),
        (0.001, "0.001"),
        (0.01, "0.01"),
        (0.0, "0.0"),
        (20.0, "20.0"),
        (1e7, "1.0E7"),
        (-2.5e-6, "-2.5E-6"),
    ],
)
def test_defaults_have_the_form_of_javas_double(value: float, text: str) -> None:
    assert canonical(value, "float") == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_form_reads_back_as_the_same_number(value: float) -> None:
    assert parse_number(canonical(value, "float"), "float") == value


def test_making_a_plan_needs_no_torch() -> None:
    code = (
        "import sys, outcrop.train.plan, outcrop.train.schedule, outcrop.train.metrics, "
        "outcrop.evaluate.generation; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
