"""Does one page of work (see `training_work.py`) with TRL, or with a plain float32 loop.

    FOLDER/bin/python benchmarks/trl_training.py WORK.json RESULT.json

Runs in an environment of its own (`requirements-trl.txt`), so it imports nothing of Outcrop. The
records come as tokens, with labels where loss is taken, so both sides train on the same ones.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_GRADIENT_NORM = 1.0
IGNORED = -100


def main() -> None:
    """Read the page and do what it says."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    torch.manual_seed(work["seed"])
    records = [
        {
            "input_ids": ids,
            "labels": [token if bit else IGNORED for token, bit in zip(ids, mask, strict=True)],
        }
        for ids, mask in json.loads(Path(work["examples"]).read_text(encoding="utf-8"))
    ]
    if work["order"] is not None:
        records = [records[place] for place in work["order"]]
    run = run_reference if work["trainer"] == "reference" else run_trl
    result = run(work, records) | {"peak": peak_bytes(), "threads": torch.get_num_threads()}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def run_trl(work: dict[str, Any], records: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Train with SFTTrainer and return the result's page."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    options = {
        "per_device_train_batch_size": work["batch_size"],
        "learning_rate": work["learning_rate"],
        "num_train_epochs": work["epochs"],
        "seed": work["seed"],
        "lr_scheduler_type": "linear",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        # In the given order; where there is none, shuffled by the seed as usual.
        "train_sampling_strategy": "random" if work["order"] is None else "sequential",
    } | work["options"]

    class Clock(TrainerCallback):
        """Notes when each step ends."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu: list[float] = []
            self.wall_mark, self.cpu_mark = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall_now, cpu_now = time.perf_counter(), time.process_time()
            self.seconds.append(wall_now - self.wall_mark)
            self.cpu.append(cpu_now - self.cpu_mark)
            self.wall_mark, self.cpu_mark = wall_now, cpu_now

    clock = Clock()
    with tempfile.TemporaryDirectory(prefix="trl-bench-") as scratch:
        trainer = SFTTrainer(
            model=work["weights"],
            args=SFTConfig(output_dir=scratch, **options),
            train_dataset=Dataset.from_list(records),
            processing_class=AutoTokenizer.from_pretrained(work["weights"]),
            peft_config=lora_config(work) if work["method"] == "adapter" else None,
            callbacks=[clock],
        )
        set_start(trainer.model, work)
        trainer.train()
        if work["output"]:
            trainer.save_model(work["output"])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    taken = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]  # packed rows, if it packs
    steps = range(len(clock.seconds))
    per_epoch = -(-len(lengths) // taken)
    tokens = [sum(lengths[step % per_epoch * taken :][:taken]) for step in steps]
    shuffles = work["order"] is None
    return {
        "seconds": clock.seconds,
        "cpu": clock.cpu,
        # In an order of its own only the sum is known.
        "tokens": [sum(lengths) / per_epoch] * len(steps) if shuffles else tokens,
        "losses": losses,
        "artifact": work["output"],
    }


def run_reference(work: dict[str, Any], records: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Train with the plainest loop: float32, one record at a time, nothing clever.

    The loss of a batch is the mean over its tokens that carry loss, as with the others; AdamW,
    clipping and the linear fall of the rate have the same numbers.
    """
    from peft import get_peft_model  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    assert work["order"] is not None
    assert work["epochs"] == 1
    started, started_cpu = time.perf_counter(), time.process_time()
    loaded: Any = AutoModelForCausalLM
    model = loaded.from_pretrained(work["weights"], dtype=torch.float32)
    if work["method"] == "adapter":
        model = get_peft_model(model, lora_config(work))
        set_start(model, work)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work["learning_rate"], weight_decay=0.0)
    batches = [
        records[first : first + work["batch_size"]]
        for first in range(0, len(records), work["batch_size"])
    ]
    losses, tokens, seconds, cpu = [], [], [], []
    for step, batch in enumerate(batches):
        count = sum(label != IGNORED for record in batch for label in record["labels"][1:])
        total = 0.0
        for record in batch:
            ids, labels = torch.tensor([record["input_ids"]]), torch.tensor(record["labels"])
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum"
            )
            total += float(loss.detach())
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = work["learning_rate"] * (len(batches) - step) / len(batches)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
        tokens.append(sum(len(record["input_ids"]) for record in batch))
        now, now_cpu = time.perf_counter(), time.process_time()
        seconds.append(now - started)
        cpu.append(now_cpu - started_cpu)
        started, started_cpu = now, now_cpu
    if work["output"]:
        model.save_pretrained(work["output"])
    return {
        "seconds": seconds,
        "cpu": cpu,
        "tokens": tokens,
        "losses": losses,
        "artifact": work["output"],
    }


def lora_config(work: dict[str, Any]) -> Any:
    """Return peft's description of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=work["rank"],
        lora_alpha=work["alpha"],
        lora_dropout=0.0,
        target_modules=list(ALL_LINEARS),
        task_type="CAUSAL_LM",
    )


def set_start(model: Any, work: dict[str, Any]) -> None:
    """Give the adapter the first values that the work names; B stays zero."""
    if work["start"] is None or work["method"] != "adapter":
        return
    from safetensors.torch import load_file

    given = load_file(Path(work["start"]) / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    for name, tensor in given.items():
        place = name.replace(".lora_A.weight", ".lora_A.default.weight")
        place = place.replace(".lora_B.weight", ".lora_B.default.weight")
        parameters[place].data.copy_(tensor)


def peak_bytes() -> int:
    """Return the most that this process has had resident; see `training_work.py`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell a process's peak memory")


if __name__ == "__main__":
    main()
