"""Memory that rows work in: nothing that lives is overwritten, and nothing grows for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.assets.architectures import ARCHITECTURES
from tests.assets.tiny_examples import tiny_examples
from tests.assets.tiny_model import write_tiny_model
from tests.numerics.test_architectures import trainable_of

from outcrop.data.pack import lay_row
from outcrop.errors import StopRequested
from outcrop.evaluate.likelihood import evaluate_likelihood
from outcrop.models.lanes import Lanes
from outcrop.models.passes import row_gradients, row_losses
from outcrop.models.workspace import ALIGNED_BYTES, Stack, Workspace
from outcrop.train.flat import FlatTensors
from outcrop.train.gradients import gather_gradients
from outcrop.train.threads import training_environment

REPOSITORY = Path(__file__).parents[3]
OWN_PASSES = ("llama", "qwen2", "qwen3", "mistral")
SHAPES = st.lists(
    st.tuples(
        st.integers(0, 9), st.integers(0, 9), st.sampled_from([torch.bfloat16, torch.float64])
    ),
    max_size=30,
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- a stack -------------------------------------------------------------------------------------


@given(SHAPES, SHAPES)
def test_rooms_do_not_overlap_and_begin_where_the_processor_likes_it(
    first: list[tuple[int, int, torch.dtype]], second: list[tuple[int, int, torch.dtype]]
) -> None:
    stack = Stack(256)
    for shapes in (first, second, first):
        stack.take_back()
        rooms = [stack.take(shape, dtype) for *shape, dtype in map(tuple, shapes)]  # type: ignore[arg-type]
        for number, room in enumerate(rooms):
            room.fill_(number)
        for number, (room, (rows, columns, dtype)) in enumerate(zip(rooms, shapes, strict=True)):
            assert (room.shape, room.dtype) == ((rows, columns), dtype)
            assert room.is_contiguous()
            assert room.data_ptr() % ALIGNED_BYTES == 0 or not room.numel()
            assert (room == number).all()


def held(stack: Stack) -> int:
    return sum(map(len, stack._chunks))


def test_what_was_taken_back_is_given_again() -> None:
    stack = Stack(1024)
    addresses = []
    for _ in range(3):
        stack.take_back()
        addresses.append([stack.take((10, 10), torch.float32).data_ptr() for _ in range(7)])
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(set(addresses[0])) == 7


def test_a_part_takes_back_only_what_was_taken_inside_it() -> None:
    stack = Stack(1024)
    before = stack.take((3,), torch.float32).fill_(1)
    with stack.part():
        inside = [stack.take((100,), torch.float32).fill_(2) for _ in range(5)]
    after = stack.take((100,), torch.float32)
    assert after.data_ptr() == inside[0].data_ptr()
    assert (before == 1).all()


def test_rows_that_grow_token_by_token_hold_what_the_longest_needs() -> None:
    stack = Stack(1)
    for tokens in range(1, 200):
        stack.take_back()
        for _ in range(10):
            stack.take((tokens, 16), torch.float32)
    assert held(stack) == 10 * 199 * 16 * 4


def test_forgotten_memory_is_not_held() -> None:
    stack = Stack(1024)
    stack.take((1000,), torch.float32)
    stack.forget()
    assert held(stack) == 0
    assert stack.take((5,), torch.float32).shape == (5,)


def test_what_a_layer_passes_on_outlives_it_by_one() -> None:
    workspace = Workspace()
    workspace.begin_row(torch.device("cpu"))
    passed = []
    for number in range(6):
        take = workspace.begin_layer(number)
        passed.append(take((8,), torch.float32).fill_(number))
        own = workspace.layer.take((8,), torch.float32).fill_(-1)
        if number:
            assert (passed[number - 1] == number - 1).all()
        assert own.data_ptr() != passed[number].data_ptr()


# --- the passes in it ----------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """Whatever is taken back becomes NaN at once, and so does what was never written to."""

    def poison(stack: Stack) -> None:
        take_back(stack)
        for chunk in stack._chunks[stack._place :]:
            chunk.fill_(0xFF)  # NaN in each type of numbers

    take_back, part, new = Stack.take_back, Stack.part, Stack._chunk

    @contextmanager
    def poisoning_part(stack: Stack) -> Iterator[None]:
        place, used = stack._place, stack._used
        with part(stack):
            yield
        for number, chunk in enumerate(stack._chunks[place:], place):
            chunk[used if number == place else 0 :].fill_(0xFF)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "_chunk", lambda stack, size: new(stack, size).fill_(0xFF))
        patch.setattr(Stack, "take_back", poison)
        patch.setattr(Stack, "part", poisoning_part)
        yield


def flat_of(name: str, method: str) -> FlatTensors:
    torch.manual_seed(0)
    trainable = trainable_of(ARCHITECTURES[name].model(), ARCHITECTURES[name], method)
    assert trainable.flat is not None
    for parameter in trainable.masters:
        parameter.data += torch.randn_like(parameter) * 0.02
    trainable.flat.refresh()
    return trainable.flat


@pytest.mark.parametrize("kept_layers", [0, 1, 99])
@pytest.mark.parametrize("method", ["adapter", "full"])
@pytest.mark.parametrize("name", OWN_PASSES)
def test_nothing_is_read_that_was_not_written_or_was_taken_back(
    name: str, method: str, kept_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outcrop.models.attention.KEPT_KEYS", 6)
    monkeypatch.setattr("outcrop.models.passes.BLOCK_ROWS", 4)
    monkeypatch.setattr("outcrop.models.passes.HEAD_CHUNK_TOKENS", {"cpu": 5})
    for part in ("ROW", "LAYER", "PASSED"):
        monkeypatch.setattr(f"outcrop.models.workspace.{part}_CHUNK_BYTES", 1 << 12)
    flat = flat_of(name, method)
    rows = [lay_row(tiny_examples(count)) for count in (3, 5, 2)]
    workspace = Workspace()
    for row in rows:
        fresh, again = flat.new_gradients(), flat.new_gradients()
        wanted = row_gradients(flat.decoder, fresh.tensors, row, 1.0, kept_layers=kept_layers)
        with poisoned():
            losses = row_gradients(
                *(flat.decoder, again.tensors, row, 1.0),
                kept_layers=kept_layers,
                workspace=workspace,
            )
            only_losses = row_losses(flat.decoder, row, workspace=workspace)
        assert torch.isfinite(losses).all()
        assert torch.equal(losses, wanted)
        assert torch.allclose(only_losses, wanted)
        assert torch.equal(again.matrices, fresh.matrices)
        assert torch.equal(again.rest, fresh.rest)


def test_a_task_that_fails_leaves_no_memory_to_its_lanes() -> None:
    trainable = trainable_of(ARCHITECTURES["llama"].model(), ARCHITECTURES["llama"], "adapter")
    lanes = Lanes(1)
    gather_gradients(trainable, tiny_examples(4), lanes=lanes)
    evaluate_likelihood(trainable.model, tiny_examples(4), lanes=lanes)
    (workspace,) = lanes.workspaces
    assert held(workspace.row) > 0
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(StopRequested):
        gather_gradients(trainable, tiny_examples(4), should_stop=stop, lanes=lanes)
    assert held(workspace.row) == held(workspace.layer) == 0
    gather_gradients(trainable, tiny_examples(4), lanes=lanes)
    assert held(workspace.row) > 0


GROWING = """
import json, random, sys
from dataclasses import replace
from pathlib import Path
import torch
from tests.assets.tiny_plan import tiny_plan
from outcrop.data.records import Example
from outcrop.train.loop import train
from outcrop.train.memory import held_bytes
draw = random.Random(0)
lengths = [draw.randrange(20, 240) for _ in range(8 * 40)]
examples = [
    Example([draw.randrange(3, 90) for _ in range(n)], [place > n - 20 for place in range(n)])
    for n in lengths
]
held = []
plan = replace(tiny_plan(), num_epochs=1, batch_size=8)
train(plan, Path(sys.argv[1]), examples, [], Path(sys.argv[2]), threads=2,
      on_step=lambda row: held.append(held_bytes()))
print(json.dumps(held))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process may write to")
def test_a_long_run_of_records_of_ever_other_lengths_does_not_grow(tmp_path: Path) -> None:
    folder = write_tiny_model(
        tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=4
    )
    command = [sys.executable, "-c", GROWING, str(folder), str(tmp_path / "output")]
    environment = {**os.environ, **training_environment(2)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    held_by_step = json.loads(done.stdout.splitlines()[-1])
    assert len(held_by_step) == 40
    assert held_by_step[-1] < 1.08 * held_by_step[19]
