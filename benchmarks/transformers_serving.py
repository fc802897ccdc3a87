"""Does one page of work (see `serving_work.py`) with transformers' generate, and peft's adapters.

    FOLDER/bin/python benchmarks/transformers_serving.py WORK.json RESULT.json

Runs in an environment of its own (`requirements-peers.txt`), so it imports nothing of Outcrop.
Prompts of a row have one length, so a batch needs no padding. peft computes each adapter for its
own rows of a batch, so this is the one peer here that mixes adapters.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(work: dict[str, Any]) -> Any:
    """Return the model, with its adapters where the page has some."""
    model = AutoModelForCausalLM.from_pretrained(
        work["weights"], dtype=TYPES[work["options"]["dtype"]]
    )
    if work["options"].get("with_adapters"):
        from peft import PeftModel  # type: ignore[import-not-found]

        for number, folder in enumerate(work["adapters"]):
            if number:
                model.load_adapter(folder, str(number))
            else:
                model = PeftModel.from_pretrained(model, folder, "0")
    return model.eval()


def answer(
    model: Any, prompts: list[list[int]], new_tokens: int, names: list[str] | None
) -> list[list[int]]:
    """Return the answers to prompts that are asked at the same time."""
    ids = torch.tensor(prompts)
    chosen = {} if names is None else {"adapter_names": names}
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **chosen,
    )
    new: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return new


def measure(model: Any, row: dict[str, Any], with_adapters: bool) -> dict[str, Any]:
    """Ask what a row says once; one stream twice, for its first token alone too."""
    prompts, new_tokens, kinds = row["prompts"], row["new_tokens"], row["adapters"]
    names = None
    if with_adapters:
        names = [str(n % kinds) if kinds else "__base__" for n in range(len(prompts))]
    first = None
    if len(prompts) == 1:
        started = time.perf_counter()
        answer(model, prompts, 1, names)
        first = time.perf_counter() - started
    started = time.perf_counter()
    answers = answer(model, prompts, new_tokens, names)
    seconds = time.perf_counter() - started
    decoding = None if first is None else (new_tokens - 1) / (seconds - first)
    return {"seconds": seconds, "first": first, "decoding": decoding, "answer": answers[0]}


def main() -> None:
    """Read the page and do what it says."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    with_adapters = bool(work["options"].get("with_adapters"))
    started = time.perf_counter()
    model = load(work)
    start = time.perf_counter() - started
    rows: dict[str, list[dict[str, Any]]] = {}
    with torch.inference_mode():
        answer(model, work["warm_up"], 8, ["0", "1"] if with_adapters else None)
        for row in work["rows"]:
            times = rows.setdefault(row["name"], [])
            times.append(measure(model, row, with_adapters))
            print(row["name"], {name: times[-1][name] for name in ("seconds", "first")}, flush=True)
    found = next(iter(rows.values()))[0]["answer"]
    for times in rows.values():
        for one in times:
            del one["answer"]
    result = {"rows": rows, "answer": found, "start": start, "peak": peak_bytes()}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def peak_bytes() -> int:
    """Return the most that this process has had resident."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell a process's peak memory")


if __name__ == "__main__":
    main()
