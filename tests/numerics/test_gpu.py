"""What training on a GPU gives: near the CPU's exact numbers, and the same bytes each time.

Skipped by name where there is no GPU, so it says nothing there.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets.architectures import ARCHITECTURES, LLAMA_LINEARS
from tests.assets.pointwise_cases import CASES, ROWS, copies, tensors
from tests.assets.tiny_examples import learnable_examples, tiny_examples
from tests.assets.tiny_model import write_tiny_model
from tests.assets.tiny_plan import tiny_plan
from torch import Tensor

from outcrop.data.records import Example
from outcrop.evaluate.likelihood import evaluate_likelihood
from outcrop.models import flash
from outcrop.models.fused import Fused
from outcrop.models.lora import load_adapter
from outcrop.train.device import choose_device, default_portions, device_dtype, peak_device_bytes
from outcrop.train.gradients import gather_gradients
from outcrop.train.loop import TrainResult, train
from outcrop.train.methods import make_trainable
from outcrop.train.metrics import StepRow
from outcrop.train.portions import Portions
from outcrop.train.prediction import ModelShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    # What torch itself does while it compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
BY_HAND = [name for name, architecture in ARCHITECTURES.items() if architecture.by_hand]
PLAN = tiny_plan(num_epochs=2, batch_size=4, lora_targets=LLAMA_LINEARS)
SEPARATE = tiny_examples(8, longest=40)
SHARING = [
    Example([*range(3, 12), *example.input_ids], [*[False] * 9, *example.loss_mask])
    for example in SEPARATE
]
TRAINING, VALIDATION = learnable_examples(24), learnable_examples(8, seed=1)
METHODS = ("adapter", "full")


GO_ON = """
import sys
from pathlib import Path
from tests.numerics.test_gpu import run
method, folder, output, earlier = sys.argv[1], *map(Path, sys.argv[2:])
result, rows = run(folder, output, method, earlier=(earlier,))
print(rows[0].step_number, result.digest)
"""


class Died(Exception):
    """Stands for a kill."""


@pytest.fixture
def device() -> torch.device:
    torch.cuda.empty_cache()
    return choose_device("cuda")


def gradient(
    name: str,
    method: str,
    examples: list[Example],
    dtype: torch.dtype,
    device: torch.device,
    portions: Portions,
) -> tuple[float, Tensor]:
    model: Any = ARCHITECTURES[name].model(dtype=dtype)
    model.to(device)
    plan = dataclasses.replace(PLAN, method=method)
    trainable = make_trainable(model, plan, seed=0)
    (master,) = trainable.masters
    with torch.no_grad():
        # B begins as zero, which would hide most of the gradients.
        noise = torch.randn(master.shape, generator=torch.Generator().manual_seed(2))
        master += 0.05 * noise.to(device)
    trainable.apply_masters()
    loss, _ = gather_gradients(trainable, examples, portions)
    assert master.grad is not None
    return loss, master.grad.double().cpu()


@pytest.mark.parametrize("kept_tokens", [1000, 0], ids=["kept", "computed twice"])
@pytest.mark.parametrize("examples", [SEPARATE, SHARING], ids=["separate", "sharing a prefix"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BY_HAND)
def test_losses_and_gradients_are_near_the_exact_ones(
    name: str, method: str, examples: list[Example], kept_tokens: int, device: torch.device
) -> None:
    """bfloat16 on the GPU is about as far from float64 as bfloat16 on the CPU is."""
    portions, cpu = Portions(1000, kept_tokens), torch.device("cpu")
    loss, found = gradient(name, method, examples, torch.bfloat16, device, portions)
    plain_loss, plain = gradient(name, method, examples, torch.bfloat16, cpu, portions)
    exact_loss, exact = gradient(name, method, examples, torch.float64, cpu, portions)
    size = float(exact.norm())
    assert abs(loss - exact_loss) < max(2 * abs(plain_loss - exact_loss), 1e-2 * exact_loss)
    assert float((found - exact).norm()) < 1.5 * float((plain - exact).norm()) + 1e-2 * size


def test_float32_takes_no_flash_attention_and_agrees_closely(device: torch.device) -> None:
    cpu, portions = torch.device("cpu"), Portions(1000, 1000)
    loss, found = gradient("llama", "full", SHARING, torch.float32, device, portions)
    exact_loss, exact = gradient("llama", "full", SHARING, torch.float64, cpu, portions)
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert float((found - exact).norm()) < 1e-4 * float(exact.norm())


def test_this_gpu_takes_flash_attention(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) < flash.LEAST_CAPABILITY:
        pytest.skip("flash attention needs a GPU of compute capability 8.0")
    assert flash.fits(device, torch.bfloat16, 64)
    assert flash.fits(device, torch.bfloat16, 128)


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_give_the_numbers_of_the_plain_ones(
    name: str, caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    body, rows, arguments = CASES[name]
    compiled = Fused(body, rows)
    for count in (ROWS, 2, 5):
        mine, plain = (copies(arguments, rows, count, str(device)) for _ in range(2))
        found, expected = tensors(compiled(*mine)), tensors(body(*plain))
        changed = [argument for argument in mine if isinstance(argument, Tensor)]
        kept = [argument for argument in plain if isinstance(argument, Tensor)]
        for one, other in zip([*found, *changed], [*expected, *kept], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)
    assert not [record for record in caplog.records if record.name == "outcrop.models.fused"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_gradient_twice_is_the_same_to_the_last_bit(
    method: str, device: torch.device
) -> None:
    arguments = ("llama", method, SHARING, torch.bfloat16, device, Portions(1000, 1000))
    loss, found = gradient(*arguments)
    for _ in range(3):
        again, other = gradient(*arguments)
        assert again == loss
        assert torch.equal(other, found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base", hidden_size=64, head_dim=16)


def run(
    folder: Path,
    output: Path,
    method: str,
    *,
    die_after: int | None = None,
    earlier: tuple[Path, ...] = (),
) -> tuple[TrainResult, list[StepRow]]:
    rows: list[StepRow] = []

    def on_step(row: StepRow) -> None:
        rows.append(row)
        if row.step_number == die_after:
            raise Died

    result = train(
        dataclasses.replace(PLAN, method=method),
        *(folder, TRAINING, VALIDATION, output),
        device=choose_device("cuda"),
        on_step=on_step,
        checkpoints=output / "checkpoints",
        checkpoint_seconds=0.0,
        earlier=earlier,
    )
    return result, rows


@pytest.mark.parametrize("method", METHODS)
def test_the_same_job_twice_gives_the_same_bytes(
    method: str, folder: Path, tmp_path: Path, device: torch.device
) -> None:
    first, rows = run(folder, tmp_path / "1", method)
    second, again = run(folder, tmp_path / "2", method)
    assert first.digest == second.digest
    assert [row.training_loss for row in rows] == [row.training_loss for row in again]
    assert rows[-1].training_loss < rows[0].training_loss, "it learns"
    assert rows[0].peak_memory_bytes <= peak_device_bytes(device)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_died_goes_on_to_the_same_bytes(
    method: str, folder: Path, tmp_path: Path, device: torch.device
) -> None:
    expected, _ = run(folder, tmp_path / "1", method)
    with pytest.raises(Died):
        run(folder, tmp_path / "2", method, die_after=6)
    # In a process of its own, which compiles its kernels again and begins with other rows.
    paths = (folder, tmp_path / "3", tmp_path / "2" / "checkpoints")
    answer = subprocess.run(
        [sys.executable, "-c", GO_ON, method, *map(str, paths)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    first_step, digest = answer.stdout.split()[-2:]
    assert int(first_step) > 0, "it went on and did not begin again"
    assert digest == expected.digest


def test_an_adapter_that_was_trained_on_a_gpu_is_one_for_the_cpu(
    folder: Path, tmp_path: Path, device: torch.device
) -> None:
    result, _ = run(folder, tmp_path / "1", "adapter")
    adapter = load_adapter(result.artifact)
    for pair in adapter.tensors.values():
        assert {tensor.device.type for tensor in pair} == {"cpu"}
        assert all(torch.isfinite(tensor).all() for tensor in pair)


def test_validation_on_a_gpu_is_near_that_of_the_cpu(device: torch.device) -> None:
    model: Any = ARCHITECTURES["llama"].model(dtype=torch.float64)
    expected = evaluate_likelihood(model, SEPARATE)
    model.to(device, torch.bfloat16)
    found = evaluate_likelihood(model, SEPARATE)
    assert found.num_tokens == expected.num_tokens
    assert found.loss == pytest.approx(expected.loss, rel=2e-2)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "phi3"])
def test_other_architectures_train_through_autograd(name: str, device: torch.device) -> None:
    architecture = ARCHITECTURES[name]
    plan = dataclasses.replace(PLAN, lora_targets=architecture.linears)
    losses = []
    for where, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        model: Any = architecture.model(dtype=dtype)
        model.to(where)
        trainable = make_trainable(model, plan, seed=0)
        losses.append(gather_gradients(trainable, SEPARATE)[0])
        assert all(master.grad is not None for master in trainable.masters)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_refused_memory_is_met_by_smaller_portions(
    folder: Path, tmp_path: Path, device: torch.device
) -> None:
    """The gradient of a step that was refused memory once is computed in smaller portions."""
    told: list[Portions] = []
    refused = False

    def refuse_once() -> bool:
        nonlocal refused
        if not refused:
            refused = True
            free, _ = torch.cuda.mem_get_info(device)
            torch.empty(2 * free, dtype=torch.uint8, device=device)
        return False

    train(
        dataclasses.replace(PLAN, num_epochs=1),
        *(folder, TRAINING, [], tmp_path / "1"),
        device=device,
        should_stop=refuse_once,
        on_portions=lambda portions, message: told.append(portions),
    )
    (portions,) = told
    assert portions.tokens < 16384


def test_portions_suit_this_gpu(folder: Path, device: torch.device) -> None:
    portions = default_portions(device, ModelShape.read(folder), PLAN, longest=100, lanes=1)
    assert portions.tokens == portions.kept_tokens > 1024
    assert device_dtype(device) in (torch.bfloat16, torch.float32)
