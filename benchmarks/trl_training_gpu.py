"""Trains a random Llama with TRL for `training_gpu.py`, and writes what it took.

    PYTHON -m benchmarks.trl_training_gpu WORK.json RESULT.json

Runs in TRL's environment, so it imports nothing of Outcrop. Without trl or liger-kernel it writes
what is missing.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu_work import FIRST_IDS, LINEARS, Clock, make_model, peak_bytes

NEEDED = ("trl", "liger_kernel", "peft", "datasets")
IGNORED = -100


def main() -> None:
    """Read the page and do what it says."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    needed = [name for name in NEEDED if name != "liger_kernel" or work["liger"]]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    result = {"missing": missing} if missing else run(work)
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train with SFTTrainer, in bfloat16 and without padding."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from peft import LoraConfig  # type: ignore[import-not-found]
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    device = torch.device(work["device"])
    has_flash = importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if has_flash and device.type == "cuda" else "sdpa"
    model = make_model(work["shape"], device, getattr(torch, work["dtype"]), attention)
    clock = Clock(device)

    class Ticks(TrainerCallback):
        """Ends a step of the clock."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    records = [
        {
            "input_ids": ids,
            "labels": [token if bit else IGNORED for token, bit in zip(ids, mask, strict=True)],
        }
        for ids, mask in work["records"]
    ]
    options = {
        "per_device_train_batch_size": work["batch_size"]
        // work["options"].get("gradient_accumulation_steps", 1),
        "learning_rate": 1e-4,
        "num_train_epochs": 1,
        "padding_free": True,
        "max_length": None,
        "bf16": work["dtype"] == "bfloat16",
        "use_liger_kernel": work["liger"],
        "use_cpu": device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
    } | work["options"]
    with tempfile.TemporaryDirectory(prefix="trl-bench-") as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=scratch, **options),
            train_dataset=Dataset.from_list(records),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(
                r=work["rank"],
                lora_alpha=work["alpha"],
                lora_dropout=0.0,
                target_modules=list(LINEARS),
                task_type="CAUSAL_LM",
            )
            if work["method"] == "adapter"
            else None,
            callbacks=[Ticks()],
        )
        trainer.train()
    return {"seconds": clock.seconds, "peak": peak_bytes(device), "note": f"attention {attention}"}


def make_tokenizer() -> Any:
    """Return a tokenizer of a few words: the records are tokens already, but TRL asks for one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *map(str, range(FIRST_IDS, 16))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "</s>"))
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    main()
