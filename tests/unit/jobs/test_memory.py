"""What memory a job asks for, is given, and dies of."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.assets.smollm2 import smollm2_folder

from outcrop.data.pack import MAX_MICRO_BATCH_TOKENS
from outcrop.data.records import Example
from outcrop.errors import ModelError, OutOfMemoryError
from outcrop.jobs import memory
from outcrop.jobs.memory import (
    asked_for,
    choose_portions,
    died_of_memory,
    given,
    machine_memory,
    memory_for_jobs,
    model_shape,
    oom_kills,
    portions_of_job,
)
from outcrop.models.catalog import load_catalog
from outcrop.models.weights import SHIPPED_KEY
from outcrop.settings import Settings
from outcrop.train.plan import TrainPlan, make_plan
from outcrop.train.portions import KEPT_TOKENS, LEAST_TOKENS, Portions
from outcrop.train.prediction import SHIPPED_SHAPE, ModelShape, predict_memory

BASE = load_catalog(Settings()).resolve("amazon.titan-text-express-v1")
assert BASE is not None
PLAN = make_plan(BASE, "FINE_TUNING", {}, has_validation=False)
LANES = 2
FULL = dataclasses.replace(PLAN, method="full")


def records(*lengths: int) -> list[Example]:
    return [Example([1] * length, [True] * length) for length in lengths]


def foretold(plan: TrainPlan, tokens: int, *, is_recomputed: bool = False) -> int:
    """For records so short that rows are computed in both lanes, or for a single long one."""
    record = tokens // LANES if tokens <= MAX_MICRO_BATCH_TOKENS else tokens
    return predict_memory(
        *(SHIPPED_SHAPE, plan.method, tokens, tokens),
        is_recomputed=is_recomputed,
        record_tokens=record,
    )


def test_a_job_asks_for_what_its_longest_records_would_take(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)  # whose weights are not converted yet
    assert BASE is not None
    for plan in (PLAN, FULL):
        asked = asked_for(settings, BASE, plan, LANES)
        for tokens, is_recomputed in ((1024, False), (KEPT_TOKENS, False), (4096, True)):
            assert asked > foretold(plan, tokens, is_recomputed=is_recomputed)
    assert asked_for(settings, BASE, FULL, LANES) > asked_for(settings, BASE, PLAN, LANES)


def test_the_shape_of_weights_is_read_from_their_folder(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    assert model_shape(settings, SHIPPED_KEY) == SHIPPED_SHAPE
    folder = data_dir / "models" / "base" / SHIPPED_KEY
    folder.mkdir(parents=True)
    text = (smollm2_folder() / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 30', '"layers": 30'))
    with pytest.raises(ModelError, match="num_hidden_layers"):
        model_shape(settings, SHIPPED_KEY)


def test_an_attempt_is_given_what_it_asks_for_or_what_the_machine_has() -> None:
    assert given(Settings(), 1 << 20) == 1 << 20
    assert given(Settings(), 1 << 60) == memory_for_jobs() < machine_memory()
    assert given(Settings(job_slots=1), 1 << 60) == machine_memory(), "the operator decided"


def test_a_container_has_no_more_memory_than_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (str(limit),))
    whole = machine_memory()
    limit.write_text("max\n")
    assert machine_memory() == whole
    limit.write_text(f"{1 << 30}\n")
    assert machine_memory() == 1 << 30
    assert memory_for_jobs() == 1 << 29


def test_with_memory_enough_the_portions_are_the_fastest() -> None:
    for longest, lanes, tokens in (
        (100, 1, MAX_MICRO_BATCH_TOKENS),
        (512, 2, MAX_MICRO_BATCH_TOKENS),
        (700, 2, 1400),  # one such record for each lane
        (4000, 2, 2 * MAX_MICRO_BATCH_TOKENS),
        (100, 8, 4096),
    ):
        found = choose_portions(SHIPPED_SHAPE, PLAN, records(100, longest), 1 << 40, lanes)
        assert found == Portions(tokens, max(KEPT_TOKENS, tokens))


def test_a_long_record_computes_its_activations_twice_before_the_others_get_smaller() -> None:
    # In float32 rows in both lanes take more than one longer row.
    allowed = max(foretold(PLAN, 1500), foretold(PLAN, MAX_MICRO_BATCH_TOKENS))
    found = choose_portions(SHIPPED_SHAPE, PLAN, records(100, 2000), allowed)
    assert found.tokens == MAX_MICRO_BATCH_TOKENS
    assert MAX_MICRO_BATCH_TOKENS <= found.kept_tokens < 2000


def test_the_largest_micro_batch_that_fits_is_chosen() -> None:
    for tokens in (512, 256):
        allowed = foretold(PLAN, tokens) + 1
        assert choose_portions(SHIPPED_SHAPE, PLAN, records(100, 90), allowed).tokens == tokens


def test_all_activations_are_computed_twice_where_nothing_else_fits() -> None:
    allowed = foretold(PLAN, LEAST_TOKENS) - 1
    found = choose_portions(SHIPPED_SHAPE, PLAN, records(100, 90), allowed)
    assert found.kept_tokens == 0
    assert found.tokens >= LEAST_TOKENS


def test_a_record_that_cannot_fit_is_refused_before_training_with_the_figures() -> None:
    allowed = foretold(PLAN, 4000, is_recomputed=True) - 1
    with pytest.raises(OutOfMemoryError) as caught:
        choose_portions(SHIPPED_SHAPE, PLAN, records(50, 4000, 60), allowed)
    needed = foretold(PLAN, 4000, is_recomputed=True)
    for text in (
        "Training record 2, the longest, has 4,000 tokens",
        f"needs about {needed / 2**30:.2f} GiB",
        f"{allowed / 2**30:.2f} GiB are allowed",
        f"{machine_memory() / 2**30:.2f} GiB that the machine has",
        "Nothing was trained",
    ):
        assert text in str(caught.value)


def test_a_job_that_a_gpu_may_train_is_not_refused_for_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GPU_FILES", (str(tmp_path / "driver"),))
    tight = (SHIPPED_SHAPE, PLAN, records(4000), 1 << 20, LANES)
    with pytest.raises(OutOfMemoryError):
        portions_of_job(Settings(), *tight)
    (tmp_path / "driver").touch()
    assert portions_of_job(Settings(), *tight) == Portions(LEAST_TOKENS, 0)
    with pytest.raises(OutOfMemoryError):
        portions_of_job(Settings(train_device="cpu"), *tight)


@pytest.mark.parametrize(
    ("code", "kill_was_seen", "peak", "died"),
    [
        (-signal.SIGKILL, True, 0, True),
        (-signal.SIGKILL, False, 1 << 40, False),
        (-signal.SIGTERM, True, 1 << 40, False),
        (1, True, 1 << 40, False),
        (-signal.SIGKILL, None, 95, True),
        (-signal.SIGKILL, None, 50, False),
    ],
)
def test_a_kill_counts_as_out_of_memory_only_with_evidence(
    code: int, kill_was_seen: bool | None, peak: int, died: bool
) -> None:
    assert died_of_memory(code, kill_was_seen, peak, allowed=100) is died


def test_the_kernels_count_of_kills_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmstat, events = tmp_path / "vmstat", tmp_path / "memory.events"
    monkeypatch.setattr(memory, "_KILL_COUNTS", (str(vmstat), str(events)))
    assert oom_kills() is None
    events.write_text("oom 4\noom_kill 3\noom_group_kill 0\n")
    assert oom_kills() == 3
    vmstat.write_text("pgfault 17\noom_kill 5\n")
    assert oom_kills() == 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such a score")
def test_an_attempt_is_ended_before_the_rest_of_the_service() -> None:
    program = (
        "from outcrop.jobs.memory import offer_to_be_killed_first as offer; offer();"
        "import sys; sys.stdout.write(open('/proc/self/oom_score_adj').read())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    before = int(Path(f"/proc/{os.getpid()}/oom_score_adj").read_text())
    assert int(done.stdout) == memory.OOM_SCORE > before


def test_a_shape_that_cannot_be_told_names_what_is_missing() -> None:
    with pytest.raises(ModelError, match="'hidden_size'"):
        ModelShape.of({"vocab_size": 5}, "/x")
