"""A model that is not served as it was trained is found before it is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_model import write_tiny_model
from tests.assets.tiny_plan import tiny_plan

from outcrop.data.records import Example
from outcrop.errors import ModelError, StopRequested, TrainingError
from outcrop.evaluate.parity import (
    LEAST_AGREEMENT,
    MAX_RECORDS,
    MAX_TOKENS,
    MOST_DIVERGENCE,
    Agreement,
    check_agreement,
    check_parity,
    choose_records,
    compare_backends,
    record_losses,
)
from outcrop.models.load import load_base
from outcrop.serve import forward
from outcrop.serve.backend import Backend, Part, Scores
from outcrop.serve.engine import open_backend
from outcrop.train.loop import TrainResult, train

ADAPTER = tiny_plan(num_epochs=4, lora_targets=("q_proj", "v_proj", "up_proj", "down_proj"))
PLANS = {"adapter": ADAPTER, "full": replace(ADAPTER, method="full", learning_rate=2e-3)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=PLANS)
def trained(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    return train(
        PLANS[request.param],
        folder,
        learnable_examples(40),
        learnable_examples(12, seed=1),
        tmp_path_factory.mktemp("output"),
        threads=1,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "torch"])
def test_what_was_trained_is_served(
    folder: Path, trained: TrainResult, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_compiled:
        monkeypatch.setattr(forward, "_library", lambda: None)
    parity = check_parity(folder, trained.artifact, trained.sample, threads=2)
    assert parity.served_loss == pytest.approx(parity.trained_loss, abs=0.03)
    assert parity.num_records == min(12, MAX_RECORDS)
    assert parity.num_tokens == sum(record.num_tokens for record in trained.sample)
    assert parity.largest_difference < 0.15


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_was_trained_is_served_in_few_bits_within_their_bounds(
    folder: Path, trained: TrainResult, precision: str
) -> None:
    if not forward.is_compiled():
        pytest.skip("there is no C compiler")
    parity = check_parity(folder, trained.artifact, trained.sample, threads=2, precision=precision)
    assert parity.served_loss == pytest.approx(parity.trained_loss, abs=0.03)
    assert parity.agreement is not None
    assert parity.agreement.num_tokens == parity.num_tokens
    assert LEAST_AGREEMENT[precision] <= parity.agreement.top1 <= 1
    assert 0 < parity.agreement.divergence <= MOST_DIVERGENCE[precision]


class AsTheBase:
    """A backend that leaves custom models out."""

    def __init__(self, backend: Backend) -> None:
        self.page_tokens, self.max_rows = backend.page_tokens, backend.max_rows
        self.backend = backend

    def run(self, parts: Sequence[Part]) -> list[Scores | Exception | None]:
        return self.backend.run([replace(part, artifact=None) for part in parts])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_another_adapter_in_few_bits_is_refused_with_the_figures(
    folder: Path, trained: TrainResult, precision: str
) -> None:
    """As a fault in what serves few bits would show: it answers as the base does."""
    examples = [record.example for record in trained.sample]
    exact = open_backend(folder, threads=1, max_page_bytes=1)
    other = AsTheBase(open_backend(folder, threads=1, max_page_bytes=1))
    artifact = str(trained.artifact)
    try:
        exact.load(artifact, ())
        same = compare_backends(exact, exact, artifact, examples)
        agreement = compare_backends(exact, cast(Backend, other), artifact, examples)
    finally:
        exact.close()
        other.backend.close()
    assert (same.top1, same.divergence) == (1.0, 0.0)
    check_agreement(same, precision)
    with pytest.raises(TrainingError, match=f"cannot be served in {precision}.*likeliest"):
        check_agreement(agreement, precision)
    with pytest.raises(TrainingError, match="nan"):
        check_agreement(Agreement(1.0, float("nan"), 9), precision)


def leave_out(artifact: Path) -> None:
    """Every change of one kind of layer."""
    for file in artifact.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "v_proj" in name:
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})


def mix_up(artifact: Path) -> None:
    """The two layers of the tiny model."""
    for file in artifact.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if ".layers.0." in name]:
            other = name.replace(".layers.0.", ".layers.1.")
            tensors[name], tensors[other] = tensors[other], tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})


def scale(artifact: Path) -> None:
    """What an adapter counts."""
    file = artifact / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lora_alpha": 4 * config["lora_alpha"]}))


@pytest.mark.parametrize("precision", ["auto", "int8"])
@pytest.mark.parametrize("spoil", [leave_out, mix_up, scale])
def test_a_model_that_is_served_otherwise_is_refused_with_the_figures(
    folder: Path,
    trained: TrainResult,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    precision: str,
) -> None:
    if spoil is scale and not (trained.artifact / "adapter_config.json").is_file():
        pytest.skip("whole weights have no scaling")
    artifact = tmp_path / "artifact"
    shutil.copytree(trained.artifact, artifact)
    spoil(artifact)
    with pytest.raises(TrainingError) as caught:
        check_parity(folder, artifact, trained.sample, threads=1, precision=precision)
    trained_loss = sum(one.loss * one.num_tokens for one in trained.sample) / sum(
        one.num_tokens for one in trained.sample
    )
    assert f"{trained_loss:.4f} as trained" in str(caught.value)
    assert "not of your data" in str(caught.value)


def test_losses_that_are_no_numbers_are_refused(folder: Path, trained: TrainResult) -> None:
    sample = [replace(trained.sample[0], loss=float("nan"))]
    with pytest.raises(TrainingError, match="nan as trained"):
        check_parity(folder, trained.artifact, sample, threads=1)


def test_an_artifact_that_cannot_be_served_is_said(
    folder: Path, trained: TrainResult, tmp_path: Path
) -> None:
    with pytest.raises(ModelError):
        check_parity(folder, tmp_path, trained.sample, threads=1)


def test_a_request_to_stop_is_heard_between_records(folder: Path, trained: TrainResult) -> None:
    answers = iter([False, True])
    with pytest.raises(StopRequested):
        check_parity(
            folder,
            trained.artifact,
            trained.sample,
            threads=1,
            should_stop=lambda: next(answers),
        )


def test_records_longer_than_a_pass_are_compared_whole(folder: Path) -> None:
    model = load_base(folder, torch.float32)
    ids = [(7 * place) % 90 + 3 for place in range(400)]
    example = Example(ids, [place > 100 for place in range(400)])
    (record,) = record_losses(model, [example], decoder=None)
    assert record.num_tokens == 299
    base = folder  # a whole model, as an artifact with weights of its own
    parity = check_parity(folder, base, [record], threads=2)
    assert parity.num_tokens == 299


def test_a_sample_is_a_few_records_that_carry_loss() -> None:
    silent = Example([3, 4, 5], [False, False, False])
    long = Example([3] * (MAX_TOKENS + 10), [False] * (MAX_TOKENS + 9) + [True])
    short = [Example([3, 4, 5, place], [False, False, True, True]) for place in range(3, 20)]

    def chosen(*examples: Example) -> list[Example]:
        return choose_records(examples)

    assert chosen(silent, *short) == short[:MAX_RECORDS]
    assert chosen(short[0], long, short[1]) == short[:2]
