"""What memory a run takes: refused, cut, foretold."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets.smollm2 import smollm2_folder
from tests.assets.tiny_examples import learnable_examples
from tests.assets.tiny_model import tiny_model, write_tiny_model
from tests.assets.tiny_plan import tiny_plan
from transformers import GPT2Config, GPTNeoXConfig

from outcrop.data.records import Example
from outcrop.errors import OutOfMemoryError, StopRequested
from outcrop.models.attention import BLOCK_ROWS, KEPT_KEYS
from outcrop.models.catalog import LoraConfig
from outcrop.models.load import compute_dtype
from outcrop.models.passes import HEAD_CHUNK_TOKENS
from outcrop.train import loop, prediction
from outcrop.train.checkpoint import Keeper
from outcrop.train.loop import TrainResult, train
from outcrop.train.memory import (
    bound_bytes,
    bounded_memory,
    check_room,
    held_bytes,
    is_out_of_memory,
    spoils_the_process,
)
from outcrop.train.metrics import StepRow, ValidationRow
from outcrop.train.portions import Portions
from outcrop.train.prediction import SHIPPED_SHAPE, ModelShape, computing_bytes, predict_memory

REPOSITORY = Path(__file__).parents[3]
PLAN = tiny_plan()
TRAINING, VALIDATION = learnable_examples(36), learnable_examples(8, seed=1)
REFUSED = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
needs_a_bound = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux holds a process to a bound of its memory"
)


# --- portions ------------------------------------------------------------------------------------


def test_the_most_expensive_micro_batch_is_cut_until_nothing_is_left_to_cut() -> None:
    portions = Portions(100, 200)
    lengths = [[40, 50], [150], [300]]
    seen = []
    while True:
        smaller = portions.smaller(lengths)
        if smaller is None:
            break
        assert smaller.tokens <= portions.tokens
        assert smaller.kept_tokens <= portions.kept_tokens
        seen.append(smaller)
        portions = smaller
        if portions.tokens < 90:
            lengths = [[40], [50], [150], [300]]
    # The record of 150 tokens first (that of 300 is computed twice already), then the row of two
    # records, then what is left one by one.
    assert seen == [Portions(100, 149), Portions(45, 149), Portions(45, 49), Portions(45, 39)]


def test_the_bound_is_halved_to_what_a_micro_batch_really_had() -> None:
    assert Portions(1024, 2048).smaller([[200, 200], [390]]) == Portions(200, 2048)


# --- errors --------------------------------------------------------------------------------------


@needs_a_bound
def test_a_bounded_process_is_refused_memory_by_errors_that_are_known() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded_memory(256 << 20, threads=2):
        assert held_bytes() < (bound_bytes() or 0) <= held_bytes() + (257 << 20)
        for take in (
            lambda: torch.empty(1 << 30),
            lambda: bytearray(1 << 30),
            lambda: (
                torch.ones(9000, 9000, dtype=torch.bfloat16) @ torch.ones(9000, 9000).bfloat16()
            ),
        ):
            with pytest.raises((MemoryError, RuntimeError)) as refused:
                take()
            assert is_out_of_memory(refused.value)
        assert torch.ones(1000).sum() == 1000, "it goes on"
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@needs_a_bound
def test_memory_is_refused_before_the_bound_so_that_kernels_can_still_be_written() -> None:
    with bounded_memory(256 << 20, threads=2):
        check_room()
        near = bytearray((bound_bytes() or 0) - held_bytes() - (8 << 20))
        with pytest.raises(MemoryError, match="are in use"):
            check_room()
        error = RuntimeError("could not create a primitive")
        assert spoils_the_process(error)
        del near
        check_room()
        assert not spoils_the_process(error), "it is for another reason, with memory to spare"
    check_room()


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


# --- a run that is refused memory ----------------------------------------------------------------


class Machine:
    """Refuses to compute micro-batches of more than so many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, largest: int, kept: int = 1 << 20) -> None:
        self.largest, self.kept = largest, kept
        self.refusals = 0
        self._gather = vars(loop)["gather_gradients"]
        monkeypatch.setattr(loop, "gather_gradients", self.gather)

    def gather(self, trainable, batch, portions, should_stop, lanes):  # type: ignore[no-untyped-def]
        found = self._gather(trainable, batch, portions, should_stop, lanes)
        if portions.tokens > self.largest or portions.kept_tokens > self.kept:
            self.refusals += 1
            raise RuntimeError(REFUSED)  # with the gradients of the unfinished step in place
        return found


def run(
    folder: Path,
    output: Path,
    training: Sequence[Example] = TRAINING,
    **options: Any,
) -> tuple[TrainResult, list[StepRow], list[Portions]]:
    rows: list[StepRow] = []
    told: list[Portions] = []
    arguments: dict[str, Any] = {
        "on_step": rows.append,
        "on_portions": lambda portions, message: told.append(portions),
        "threads": 1,
        "dtype": torch.float32,
        **options,
    }
    result = train(PLAN, folder, training, VALIDATION, output, **arguments)
    return result, rows, told


def test_a_step_that_is_refused_memory_is_done_again_in_smaller_portions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, rows, told = run(folder, tmp_path / "1")
    assert told == []
    machine = Machine(monkeypatch, largest=20)
    result, found, told = run(folder, tmp_path / "2")

    assert machine.refusals == len(told), "each step after the first goes well at once"
    assert [portions.tokens for portions in told] == sorted(
        {portions.tokens for portions in told}, reverse=True
    )
    assert told[-1].tokens <= 20
    assert {row.micro_batch_tokens for row in found} == {told[-1].tokens}
    assert [row.training_loss for row in found] == pytest.approx(
        [row.training_loss for row in rows], rel=1e-5
    )
    assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)
    assert "did not fit into memory" in caplog.text


def test_one_record_that_is_refused_memory_computes_its_activations_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _, _ = run(folder, tmp_path / "1", micro_batch_tokens=1)
    machine = Machine(monkeypatch, largest=1, kept=5)
    result, found, told = run(folder, tmp_path / "2", micro_batch_tokens=1)
    assert machine.refusals == len(told)
    assert found[-1].kept_tokens == told[-1].kept_tokens <= 5
    assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)


def test_a_run_that_fits_in_no_portions_fails_with_the_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, largest=0)
    with pytest.raises(OutOfMemoryError) as caught:
        run(folder, tmp_path)
    for text in (
        "Step 0: the memory does not suffice",
        "longest record of the batch has 8 tokens",
        "GiB are needed",
        "its peak was",
        "Nothing was published",
        "you tried to allocate 64 bytes",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / loop.ARTIFACT).exists()


def test_an_evaluation_that_is_refused_memory_is_done_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _, _ = run(folder, tmp_path / "1")
    evaluate = vars(loop)["evaluate_likelihood"]

    def refuse(*arguments, micro_batch_tokens, **options):  # type: ignore[no-untyped-def]
        if micro_batch_tokens > 20:
            raise MemoryError
        return evaluate(*arguments, micro_batch_tokens=micro_batch_tokens, **options)

    monkeypatch.setattr(loop, "evaluate_likelihood", refuse)
    result, _, told = run(folder, tmp_path / "2")
    assert told
    assert told[-1].tokens <= 20
    assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)


def test_smaller_portions_are_kept_when_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "is_due", lambda self: True)
    machine = Machine(monkeypatch, largest=20)
    expected, _, _ = run(folder, tmp_path / "whole")
    checkpoints = tmp_path / "1" / "checkpoints"

    def die(row: StepRow) -> None:
        if row.step_number == 2:
            raise StopRequested

    with pytest.raises(StopRequested):
        run(folder, tmp_path / "1", on_step=die, checkpoints=checkpoints)
    machine.refusals = 0
    resumed: list[Sequence[ValidationRow]] = []
    result, found, told = run(
        folder,
        tmp_path / "2",
        checkpoints=tmp_path / "2" / "checkpoints",
        earlier=[checkpoints],
        on_resume=lambda rows, validations: resumed.append(validations),
    )
    assert (machine.refusals, told, len(resumed)) == (0, [], 1)
    assert max(row.micro_batch_tokens for row in found) <= 20
    assert result.digest == expected.digest, "exactly, with the portions that it had"


def test_an_earlier_death_for_memory_cuts_the_portions_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "is_due", lambda self: True)
    _, rows, _ = run(folder, tmp_path / "0", micro_batch_tokens=64)
    assert {row.micro_batch_tokens for row in rows} == {64}
    checkpoints = tmp_path / "1" / "checkpoints"

    def die(row: StepRow) -> None:
        if row.step_number == 2:
            raise StopRequested

    with pytest.raises(StopRequested):
        run(folder, tmp_path / "1", on_step=die, checkpoints=checkpoints, micro_batch_tokens=64)
    options: dict[str, Any] = {"cuts": 1, "micro_batch_tokens": 64, "earlier": [checkpoints]}
    second = tmp_path / "2" / "checkpoints"
    with pytest.raises(StopRequested):
        run(
            folder,
            tmp_path / "2",
            on_step=lambda row: die(replace(row, step_number=row.step_number - 1)),
            checkpoints=second,
            **options,
        )
    _, rows, told = run(folder, tmp_path / "3", **{**options, "earlier": [second]})
    assert told == [], "the checkpoint knows of it"
    assert len({row.micro_batch_tokens for row in rows}) == 1
    assert 16 <= rows[0].micro_batch_tokens <= 32


BOUNDED = """
import json, sys
from pathlib import Path
from tests.unit.train.test_memory import LONG, PLAN
from outcrop.train.loop import train
from outcrop.train.memory import bounded_memory
import transformers.models.llama.modeling_llama
rows = []
with bounded_memory(int(sys.argv[3]), threads=1):
    result = train(PLAN, Path(sys.argv[1]), LONG, [], Path(sys.argv[2]), on_step=rows.append,
                   threads=1)
print(json.dumps([[row.training_loss, row.micro_batch_tokens] for row in rows]))
"""
LONG = [
    Example(
        [(place * 7 + number) % 90 + 3 for place in range(250)], [place > 9 for place in range(250)]
    )
    for number in range(16)
]


@needs_a_bound
def test_a_bounded_process_goes_on_in_smaller_portions(tmp_path: Path) -> None:
    """A real bound, a real refusal: the run ends with the losses of one that had all it wanted."""
    folder = write_tiny_model(
        tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=12
    )

    def losses_and_portions(megabytes: int) -> tuple[list[float], list[int]]:
        output = str(tmp_path / str(megabytes))
        command = [sys.executable, "-c", BOUNDED, str(folder), output, str(megabytes << 20)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout.splitlines()[-1])
        return [loss for loss, _ in rows], [tokens for _, tokens in rows]

    free, tokens = losses_and_portions(4096)
    assert set(tokens) == {1024}
    for megabytes in (250, 200, 160, 130):
        bounded, tokens = losses_and_portions(megabytes)
        if max(tokens) < 1024:
            break
    assert max(tokens) < 1024, "none of the bounds was too small for 1024 tokens"
    assert bounded == pytest.approx(free, rel=1e-2)


# --- foretold ------------------------------------------------------------------------------------


def test_the_shapes_number_of_parameters_is_the_models() -> None:
    for changes in ({}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}):
        model = tiny_model(**changes)
        shape = ModelShape.of(model.config.to_dict())
        matrices = {id(p): p.numel() for p in model.parameters() if p.dim() == 2}
        assert shape.parameters == sum(matrices.values())


def test_other_families_names_are_understood() -> None:
    gpt2 = ModelShape.of(GPT2Config(n_embd=96, n_layer=3, n_head=4, vocab_size=77).to_dict())
    assert (gpt2.width, gpt2.layers, gpt2.heads, gpt2.inner_width) == (96, 3, 4, 384)
    neox = ModelShape.of(GPTNeoXConfig(hidden_size=64, num_attention_heads=4).to_dict())
    assert (neox.width, neox.key_width, neox.is_tied) == (64, 64, False)


def test_the_shipped_shape_is_that_of_the_shipped_weights() -> None:
    assert ModelShape.read(smollm2_folder()) == SHIPPED_SHAPE


def test_an_adapters_size_is_counted() -> None:
    shape = ModelShape.of(tiny_model().config.to_dict())
    assert shape.adapter_parameters(LoraConfig(4, 8.0, ("q_proj",))) == 2 * 4 * (64 + 64)
    assert shape.adapter_parameters(LoraConfig(4, 8.0, ("k_proj", "down_proj"))) == 2 * 4 * (
        64 + 32 + 96 + 64
    )


def test_the_size_of_a_number_is_told_without_torch_as_torch_tells_it() -> None:
    if not Path("/proc/cpuinfo").is_file():
        assert computing_bytes() == 4
        return
    assert computing_bytes() == torch.finfo(compute_dtype()).bits // 8


def test_what_is_counted_is_what_the_passes_hold() -> None:
    assert HEAD_CHUNK_TOKENS["cpu"] == prediction.HEAD_TOKENS
    assert prediction.KEPT_KEYS == KEPT_KEYS == 2 * BLOCK_ROWS


def test_more_work_is_foretold_to_take_more_memory() -> None:
    least = predict_memory(SHIPPED_SHAPE, "adapter", 256, 26)
    assert least < predict_memory(SHIPPED_SHAPE, "adapter", 1024, 26)
    assert least < predict_memory(SHIPPED_SHAPE, "adapter", 256, 256)
    assert least < predict_memory(SHIPPED_SHAPE, "full", 256, 26)
    assert predict_memory(
        SHIPPED_SHAPE, "adapter", 4096, 4096, is_recomputed=True
    ) < predict_memory(SHIPPED_SHAPE, "adapter", 4096, 4096)
