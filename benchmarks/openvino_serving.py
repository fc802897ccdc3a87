"""Does one page of work (see `serving_work.py`) with OpenVINO GenAI's continuous batching.

    FOLDER/bin/python benchmarks/openvino_serving.py WORK.json RESULT.json
    FOLDER/bin/python benchmarks/openvino_serving.py --convert WEIGHTS PRECISION FOLDER

Runs in an environment of its own (`requirements-peers.txt`), so it imports nothing of Outcrop. The
pipeline decides itself who is computed together. An adapter holds for a whole call, so streams of
several are answered adapter by adapter. When a stream had its first token is not told where many
are asked, so only one stream has a time to it: that of an answer of one token.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]

CACHE_GIGABYTES = 2


class Pipeline:
    """A model that is loaded, with its adapters where the page has some."""

    def __init__(self, work: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs = CACHE_GIGABYTES, 32
        scheduler.enable_prefix_caching = False
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": work["threads"],
            **work["options"].get("properties", {}),
        }
        self.adapters = []
        if work["options"].get("with_adapters"):
            files = [Path(folder) / "adapter_model.safetensors" for folder in work["adapters"]]
            self.adapters = [genai.Adapter(str(file)) for file in files]
            known = genai.AdapterConfig()
            for adapter in self.adapters:
                known.add(adapter, 1.0)
            settings["adapters"] = known
        model = work["options"]["model"]
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", settings)

    def answer(
        self, prompts: list[list[int]], new_tokens: int, adapter: int | None = None
    ) -> list[list[int]]:
        """Return the answers to prompts that are asked at the same time."""
        wanted = genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = new_tokens
        wanted.ignore_eos, wanted.do_sample = True, False
        if self.adapters:
            chosen = genai.AdapterConfig()
            if adapter is not None:
                chosen.add(self.adapters[adapter], 1.0)
            wanted.adapters = chosen
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        found = self.pipeline.generate(inputs, [wanted] * len(inputs))
        answers = [[int(token) for token in one.m_generation_ids[0]] for one in found]
        if any(len(answer) != new_tokens for answer in answers):
            raise SystemExit(f"answers have {sorted({len(answer) for answer in answers})} tokens")
        return answers


def measure(pipeline: Pipeline, row: dict[str, Any]) -> dict[str, Any]:
    """Ask what a row says once; one stream twice, for its first token alone too."""
    prompts, new_tokens, kinds = row["prompts"], row["new_tokens"], row["adapters"]
    first = None
    if len(prompts) == 1:
        started = time.perf_counter()
        pipeline.answer(prompts, 1)
        first = time.perf_counter() - started
    started = time.perf_counter()
    if kinds:
        answers = []
        for kind in range(kinds):
            answers += pipeline.answer(prompts[kind::kinds], new_tokens, kind)
    else:
        answers = pipeline.answer(prompts, new_tokens)
    seconds = time.perf_counter() - started
    decoding = None if first is None else (new_tokens - 1) / (seconds - first)
    return {"seconds": seconds, "first": first, "decoding": decoding, "answer": answers[0]}


def convert(weights: str, precision: str, folder: str) -> None:
    """Write a model of Hugging Face's layout in OpenVINO's, its weights as fp16 or int8."""
    from optimum.intel import (  # type: ignore[import-not-found]
        OVModelForCausalLM,
        OVWeightQuantizationConfig,
    )

    smaller = OVWeightQuantizationConfig(bits=8) if precision == "int8" else None
    model = OVModelForCausalLM.from_pretrained(
        weights, export=True, load_in_8bit=False, quantization_config=smaller, compile=False
    )
    if precision == "fp16":
        model.half()
    model.save_pretrained(folder)
    from openvino_tokenizers import convert_tokenizer  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights)
    there, back = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(there, Path(folder) / "openvino_tokenizer.xml")
    openvino.save_model(back, Path(folder) / "openvino_detokenizer.xml")


def main() -> None:
    """Read the page and do what it says."""
    if sys.argv[1] == "--convert":
        convert(*sys.argv[2:5])
        return
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    started = time.perf_counter()
    pipeline = Pipeline(work)
    start = time.perf_counter() - started
    pipeline.answer(work["warm_up"], 8, 0 if pipeline.adapters else None)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in work["rows"]:
        times = rows.setdefault(row["name"], [])
        times.append(measure(pipeline, row))
        print(row["name"], {name: times[-1][name] for name in ("seconds", "first")}, flush=True)
    answer = next(iter(rows.values()))[0]["answer"]
    for times in rows.values():
        for one in times:
            del one["answer"]
    result = {"rows": rows, "answer": answer, "start": start, "peak": peak_bytes()}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def peak_bytes() -> int:
    """Return the most that this process has had resident."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell a process's peak memory")


if __name__ == "__main__":
    main()
