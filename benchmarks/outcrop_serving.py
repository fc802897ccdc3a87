"""Does one page of work (see `serving_work.py`) with Outcrop's engine, as a model server has it.

    python -m benchmarks.outcrop_serving WORK.json RESULT.json

The engine runs in this process, without socket and gateway.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.serving_work import RANK
from benchmarks.training_work import peak_bytes

from outcrop.data.records import Message
from outcrop.serve.engine import BatchEngine
from outcrop.serve.request import Event, Generation, GenerationRequest, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from outcrop.serve.vllm import VllmEngine

AnyEngine: TypeAlias = "BatchEngine | VllmEngine"


@dataclass(frozen=True)
class Asked:
    """What came of prompts that were asked at the same time."""

    seconds: float
    """From the first request to the last answer."""
    first: float
    """Seconds to the first token, median over the streams."""
    decoding: float
    """Tokens a second after the last first token."""
    answers: Sequence[str]

    @property
    def figures(self) -> dict[str, float]:
        """Return those that a page has."""
        return {"seconds": self.seconds, "first": self.first, "decoding": self.decoding}


def start_engine(weights: Path, threads: int, options: Mapping[str, Any]) -> AnyEngine:
    """Return an engine whose answers have their full length.

    Args:
        options: of `BatchEngine`; or {"engine": "vllm", "dtype": ...} for vLLM through the same
            seam, in an environment that has it; its own variables say how many threads it has.
    """
    if options.get("engine") == "vllm":
        from outcrop.serve.vllm import VllmEngine
        from outcrop.serve.vllm_library import open_vllm

        dtype = str(options.get("dtype", "auto"))
        engine: AnyEngine = VllmEngine(
            weights,
            lambda: open_vllm(weights, max_rank=RANK, memory_percent=90, dtype=dtype),
            max_rank=RANK,
        )
    else:
        engine = BatchEngine(weights, threads=threads, **options)
    engine.renderer.end_token_ids = ()
    return engine


def cut(engine: AnyEngine, text: str, num_tokens: int) -> str:
    """Return as much of a text as makes a prompt of so many tokens, with the template."""
    words = text.split()
    while words and engine.count_tokens((Message("user", " ".join(words)),)) > num_tokens:
        words.pop()
    return " ".join(words)


def ask(
    engine: AnyEngine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    adapters: Sequence[str] = (),
    temperature: float = 0.0,
) -> Asked:
    """Send all requests at once and wait for their ends.

    Args:
        adapters: in turn over the prompts; none asks the base.
    """
    firsts, ends = [0.0] * len(prompts), [0.0] * len(prompts)
    answers, counts = [""] * len(prompts), [0] * len(prompts)
    done = threading.Semaphore(0)

    def taker(place: int) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            now = time.perf_counter()
            firsts[place] = firsts[place] or now
            if isinstance(event, Generation):
                ends[place], counts[place] = now, event.output_tokens
                answers[place] = event.text
                done.release()
            elif not isinstance(event, TokenEvent):
                raise SystemExit(f"a request failed: {event}")

        return take

    sampling = SamplingParams(
        temperature=temperature,
        top_p=0.9 if temperature else 1.0,
        max_tokens=new_tokens,
        seed=1,
    )
    started = time.perf_counter()
    for place, prompt in enumerate(prompts):
        adapter = adapters[place % len(adapters)] if adapters else None
        request = GenerationRequest((), sampling, adapter, prompt=tuple(prompt))
        engine.submit(request, taker(place))
    for _ in prompts:
        if not done.acquire(timeout=600):
            raise SystemExit("an answer did not come in ten minutes")
    if set(counts) != {new_tokens}:
        raise SystemExit(f"answers have {sorted(set(counts))} tokens")
    end = max(ends)
    return Asked(
        seconds=end - started,
        first=statistics.median(first - started for first in firsts),
        decoding=len(prompts) * (new_tokens - 1) / max(1e-9, end - max(firsts)),
        answers=answers,
    )


def main() -> None:
    """Read the page and do what it says."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    started = time.perf_counter()
    engine = start_engine(Path(work["weights"]), work["threads"], work["options"])
    start = time.perf_counter() - started
    for adapter in [None, *work["adapters"]]:
        ask(engine, work["warm_up"], 8, [adapter] if adapter else ())
    rows: dict[str, list[dict[str, float]]] = {}
    answer = ""
    for row in work["rows"]:
        times = rows.setdefault(row["name"], [])
        asked = ask(engine, row["prompts"], row["new_tokens"], work["adapters"][: row["adapters"]])
        times.append(asked.figures)
        answer = answer or asked.answers[0]
        print(row["name"], times[-1], flush=True)
    engine.close()
    result = {"rows": rows, "answer": answer, "start": start, "peak": peak_bytes()}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
