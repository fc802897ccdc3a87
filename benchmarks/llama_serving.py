"""Does one page of work (see `serving_work.py`) with llama.cpp, through its C interface.

    FOLDER/bin/python benchmarks/llama_serving.py WORK.json RESULT.json
    FOLDER/bin/python benchmarks/llama_serving.py --convert FROM.gguf TYPE TO.gguf

Runs in an environment of its own (`requirements-peers.txt`), so it imports nothing of Outcrop. All
sequences are computed together: prompts eight at a time, then one token of each a pass. Each has a
stream of keys and values of its own, which is twice as fast with 32 of them as a common one. A
context has one adapter at a time, so streams of several are answered adapter by adapter.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found]
import numpy as np

STREAMS, BATCH_TOKENS, STREAM_TOKENS = 32, 2048, 384
TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3}
"""Source: llama.h, llama_ftype."""


class Context:
    """A model that is loaded, with room for so many sequences."""

    def __init__(self, file: str, threads: int) -> None:
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(
            file.encode(), llama.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {file}")
        settings = llama.llama_context_default_params()
        settings.n_ctx = STREAMS * STREAM_TOKENS
        settings.n_batch, settings.n_seq_max = BATCH_TOKENS, STREAMS
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = False
        self.context = llama.llama_init_from_model(self.model, settings)
        self.memory = llama.llama_get_memory(self.context)
        vocabulary = llama.llama_model_get_vocab(self.model)
        self.num_words = llama.llama_vocab_n_tokens(vocabulary)
        self.batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.adapters: dict[str, Any] = {}

    def use(self, adapter: str | None) -> None:
        """Have the context compute with an adapter, or with none."""
        if adapter is None:
            llama.llama_set_adapters_lora(self.context, None, 0, None)
            return
        if adapter not in self.adapters:
            self.adapters[adapter] = llama.llama_adapter_lora_init(self.model, adapter.encode())
            if not self.adapters[adapter]:
                raise SystemExit(f"llama.cpp does not load {adapter}")
        found = (llama.llama_adapter_lora_p_ctypes * 1)(self.adapters[adapter])
        scale = (ctypes.c_float * 1)(1.0)
        if llama.llama_set_adapters_lora(self.context, found, 1, scale) != 0:
            raise SystemExit(f"llama.cpp does not take {adapter}")

    def likeliest(self, parts: list[tuple[int, list[int], int]]) -> list[int]:
        """Compute (sequence, tokens, first position) and return what follows each."""
        batch, at, ends = self.batch, 0, []
        for sequence, tokens, first in parts:
            for place, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, first + place
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = place == len(tokens) - 1
                at += 1
            ends.append(at - 1)
        batch.n_tokens = at
        if code := llama.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode ended with {code}")
        return [
            int(
                np.ctypeslib.as_array(
                    llama.llama_get_logits_ith(self.context, end), (self.num_words,)
                ).argmax()
            )
            for end in ends
        ]

    def answer(
        self, prompts: list[list[int]], new_tokens: int
    ) -> tuple[list[list[int]], list[float], float]:
        """Return the answers, when each had its first token, and when the last one had."""
        llama.llama_memory_clear(self.memory, True)
        answers: list[list[int]] = []
        firsts: list[float] = []
        together = max(1, BATCH_TOKENS // len(prompts[0]))
        for first in range(0, len(prompts), together):
            group = prompts[first : first + together]
            found = self.likeliest([(first + n, prompt, 0) for n, prompt in enumerate(group)])
            answers += [[token] for token in found]
            firsts += [time.perf_counter()] * len(group)
        for _ in range(new_tokens - 1):
            parts = [
                (number, answer[-1:], len(prompts[number]) + len(answer) - 1)
                for number, answer in enumerate(answers)
            ]
            for answer, token in zip(answers, self.likeliest(parts), strict=True):
                answer.append(token)
        return answers, firsts, max(firsts)


def measure(context: Context, row: dict[str, Any], adapters: list[str]) -> dict[str, Any]:
    """Ask what a row says once."""
    prompts, new_tokens, kinds = row["prompts"], row["new_tokens"], row["adapters"]
    started = time.perf_counter()
    firsts: list[float] = []
    answers: list[list[int]] = []
    decoding = 0.0
    for kind in range(max(1, kinds)):
        context.use(adapters[kind] if kinds else None)
        group = prompts[kind :: max(1, kinds)]
        found, found_firsts, last_first = context.answer(group, new_tokens)
        decoding += time.perf_counter() - last_first
        answers += found
        firsts += found_firsts
    return {
        "seconds": time.perf_counter() - started,
        "first": statistics.median(first - started for first in firsts),
        "decoding": len(prompts) * (new_tokens - 1) / decoding,
        "answer": answers[0],
    }


def convert(source: str, kind: str, target: str) -> None:
    """Write a model's file with its matrices in another type."""
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize, settings.pure = TYPES[kind], True, True
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)) != 0:
        raise SystemExit(f"llama.cpp does not convert {source} to {kind}")


def main() -> None:
    """Read the page and do what it says."""
    if sys.argv[1] == "--convert":
        convert(*sys.argv[2:5])
        return
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    started = time.perf_counter()
    context = Context(work["options"]["file"], work["threads"])
    start = time.perf_counter() - started
    context.answer(work["warm_up"], 8)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in work["rows"]:
        times = rows.setdefault(row["name"], [])
        times.append(measure(context, row, work["options"].get("adapters", [])))
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
