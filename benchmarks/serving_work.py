"""What engines are asked, as a page of JSON, so that several can be asked exactly the same.

A page names the weights, the adapters and the rows. A row is so many prompts, as tokens, that are
asked at the same time, each for so many new tokens; answers are greedy and have their full length,
because no end token is taken as one. `outcrop_serving.py` asks Outcrop's engine,
`llama_serving.py`, `openvino_serving.py` and `transformers_serving.py` the others, each in the
environment that it is started in. Each writes a page:

    rows      of each row a list of times: seconds from the first request to the last answer; first,
              the seconds to the first token (median of the streams) or null; decoding, tokens a
              second after the last first token, or null
    answer    the first answer of the first row, as tokens or as text
    start     seconds from the beginning of loading to ready
    peak      bytes, the most that the process had resident

Knows nothing of which engines are compared, nor of tables.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.running import busy_seconds, child_seconds
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
RANK = 16
NUM_ADAPTERS = 8
TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many"
)
PROGRAMS = {
    "llama.cpp": "llama_serving.py",
    "OpenVINO": "openvino_serving.py",
    "transformers": "transformers_serving.py",
}


@dataclass(frozen=True)
class Work:
    """What is asked at the same time."""

    streams: int
    prompt_tokens: int = 256
    new_tokens: int = 64
    adapters: int = 0
    """Different ones, in turn over the streams; 0 asks the base."""
    common_tokens: int = 0
    """That all prompts begin with."""
    repeats: int = 1
    """How often a round asks it, with other prompts."""


ONE, EIGHT, MANY = "1 stream", "8 streams", "32 streams"
ONE_ADAPTER, MIXED = "32 streams, one adapter", "32 streams, 8 adapters"
DECODE_HEAVY = "32 streams, 32-token prompts, 256 new tokens"
IN_COMMON = "32 streams, 200 tokens in common"
ROWS: Mapping[str, Work] = {
    ONE: Work(1, repeats=3),
    EIGHT: Work(8),
    MANY: Work(32),
    ONE_ADAPTER: Work(32, adapters=1),
    MIXED: Work(32, adapters=NUM_ADAPTERS),
    DECODE_HEAVY: Work(32, 32, 256),
    IN_COMMON: Work(32, common_tokens=200),
}


@dataclass(frozen=True)
class Contender:
    """An engine with its settings."""

    name: str
    engine: str
    """"Outcrop"; "vLLM", through the same seam; or one of `PROGRAMS`."""
    precision: str
    """Class of the weights; only those of one class are compared."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What its program reads."""
    rows: Sequence[str] = (ONE, EIGHT, MANY, ONE_ADAPTER, MIXED, DECODE_HEAVY)
    """That it is asked."""


def draw_prompts(tokenizer: Tokenizer, work: Work, seed: str) -> list[list[int]]:
    """Return a row's prompts: words in the order that a seed draws, cut to so many tokens."""
    seeds = random.Random(seed)
    common = _draw(tokenizer, seeds, work.common_tokens)
    return [
        common + _draw(tokenizer, seeds, work.prompt_tokens - work.common_tokens)
        for _ in range(work.streams)
    ]


def draw_words(seeds: random.Random, count: int) -> str:
    """Return so many words, which are at least as many tokens."""
    return " ".join(seeds.choices(TEXT.split(), k=count))


def _draw(tokenizer: Tokenizer, seeds: random.Random, count: int) -> list[int]:
    words = draw_words(seeds, count)
    ids: list[int] = tokenizer.encode(words, add_special_tokens=False).ids
    return ids[:count]


def make_page(
    weights: Path, adapters: Sequence[Path], rows: Sequence[str], threads: int, round_number: int
) -> dict[str, Any]:
    """Return the page of one round; the same numbers give the same prompts."""
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    asked = []
    for name in rows:
        work = ROWS[name]
        for repeat in range(work.repeats):
            prompts = draw_prompts(tokenizer, work, f"{name} {round_number} {repeat}")
            asked.append(
                {
                    "name": name,
                    "prompts": prompts,
                    "new_tokens": work.new_tokens,
                    "adapters": work.adapters,
                }
            )
    return {
        "weights": str(weights),
        "adapters": [str(adapter) for adapter in adapters],
        "threads": threads,
        "warm_up": draw_prompts(tokenizer, Work(2, 64), "warm-up"),
        "rows": asked,
    }


def run_contender(
    contender: Contender, page: Mapping[str, Any], python: Path, folder: Path
) -> dict[str, Any]:
    """Have an engine do a page in a process of its own, and return the page that it wrote.

    Beside it `others`: how many cores everything else on the machine used meanwhile.

    Args:
        python: of the environment that has the engine.
        folder: receives the pages and the process's messages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work, answer, log = folder / "work.json", folder / "result.json", folder / "log.txt"
    work.write_text(json.dumps({**page, "options": dict(contender.options)}), encoding="utf-8")
    answer.unlink(missing_ok=True)
    if contender.engine in PROGRAMS:
        command = [str(python), str(ROOT / "benchmarks" / PROGRAMS[contender.engine])]
    else:
        command = [str(python), "-m", "benchmarks.outcrop_serving"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),  # vLLM's environment does not have Outcrop installed
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": str(page["threads"]),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    started, busy, own = time.perf_counter(), busy_seconds(), child_seconds()
    with log.open("wb") as stream:
        code = subprocess.run(
            [*command, str(work), str(answer)],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code != 0 or not answer.exists():
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise SystemExit("\n".join([f"{contender.name} ended with code {code}; see {log}", *last]))
    seconds = time.perf_counter() - started
    others = (busy_seconds() - busy - (child_seconds() - own)) / seconds
    result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return {**result, "others": max(0.0, others)}
