"""How fast the serving engine answers: one stream and many, with adapters, with a common beginning.

    python -m benchmarks.serving_speed [--weights FOLDER] [--threads 2] [--rounds 5] [--engine vllm]

The engine runs in this process, as in a model server, without socket and gateway. Prompts are words
drawn by a seed, cut to so many tokens with the template; answers are greedy and have their full
length, because no end token is taken as one. Each round measures every row once, so that what else
the machine does falls on all of them alike; the page has the medians. vLLM is asked through the
same seam; its own variables say how many threads it has.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.running import write_result
from benchmarks.training_work import shipped_weights

from outcrop.data.records import Message
from outcrop.serve.engine import BatchEngine
from outcrop.serve.request import Event, Generation, GenerationRequest, SamplingParams, TokenEvent
from outcrop.serve.vllm import VllmEngine
from outcrop.serve.vllm_library import open_vllm

TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many"
)
RANK = 16
AnyEngine = BatchEngine | VllmEngine


@dataclass(frozen=True)
class Work:
    """What is asked at the same time."""

    streams: int
    prompt_tokens: int
    new_tokens: int
    adapters: int = 0
    common_tokens: int = 0
    """That all prompts begin with."""
    temperature: float = 0.0


@dataclass(frozen=True)
class Measured:
    """Of one time."""

    tokens_a_second: float
    """New tokens of all streams, over the time from the first request to the last answer."""
    first_token_seconds: float
    """Median over the streams."""
    decode_tokens_a_second: float
    """New tokens but the first of each, over the time from the last first token to the end."""


ROWS = {
    "1 stream": Work(1, 256, 64),
    "8 streams": Work(8, 256, 64),
    "32 streams": Work(32, 256, 64),
    "32 streams, drawn at 0.7 and top-p 0.9": Work(32, 256, 64, temperature=0.7),
    "8 streams, 8 adapters": Work(8, 256, 64, adapters=8),
    "32 streams, 8 adapters": Work(32, 256, 64, adapters=8),
    "32 streams, 32-token prompts, 256 new tokens": Work(32, 32, 256),
    "32 streams, 200 tokens in common": Work(32, 256, 64, common_tokens=200),
}


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, help="default: the shipped model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=("own", "vllm"), default="own")
    parser.add_argument("--dtype", default="auto", help="of the weights in vLLM")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    options = parser.parse_args()
    folder = shipped_weights(options.weights)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = write_adapters(folder, Path(scratch), 8)
        started = time.perf_counter()
        engine = open_engine(folder, options)
        seconds_to_start = time.perf_counter() - started
        engine.renderer.end_token_ids = ()  # so that every answer has its full length
        found: dict[str, list[Measured]] = {name: [] for name in options.rows}
        seeds = random.Random(0)
        ask(engine, Work(1, 64, 8, adapters=8), adapters, seeds)  # warm-up
        for _ in range(options.rounds):
            for name in options.rows:
                found[name].append(ask(engine, ROWS[name], adapters, seeds))
                print(name, found[name][-1], flush=True)
        stats = engine.stats()
        engine.close()
    rows = [
        (
            "asked at the same time",
            "new tokens a second",
            "first token, s",
            "decoding, tokens a second",
        )
    ]
    for name, times in found.items():
        rows.append(
            (
                name,
                median(times, lambda one: one.tokens_a_second, "{:.0f}"),
                median(times, lambda one: one.first_token_seconds, "{:.3f}"),
                median(times, lambda one: one.decode_tokens_a_second, "{:.0f}"),
            )
        )
    write_result(
        "serving_speed" if options.engine == "own" else "serving_speed_vllm",
        f"The engine alone ({described(options)}), {options.rounds} rounds; 256-token prompts "
        "and 64 new tokens where nothing else is said. New tokens a second include the time of the "
        f"prompts. Adapters of rank {RANK} on all linear layers. Median, and the least and the "
        "greatest of the rounds.",
        rows,
        f"The engine was ready {seconds_to_start:.2f} s after it was asked for. It computed "
        f"{stats.num_passes} passes and took {stats.prefix_tokens} tokens of prompts over.",
    )


def open_engine(folder: Path, options: argparse.Namespace) -> AnyEngine:
    """Start the engine that is to be measured."""
    if options.engine == "own":
        return BatchEngine(folder, threads=options.threads)
    return VllmEngine(
        folder,
        lambda: open_vllm(folder, max_rank=RANK, memory_percent=90, dtype=options.dtype),
        max_rank=RANK,
    )


def described(options: argparse.Namespace) -> str:
    """Say in words which engine it is."""
    if options.engine == "own":
        return f"our own, {options.threads} threads"
    import vllm

    return f"vLLM {vllm.__version__}, weights in {options.dtype}"


def ask(engine: AnyEngine, work: Work, adapters: Sequence[str], seeds: random.Random) -> Measured:
    """Send all requests at once and wait for their ends."""
    common = cut(engine, draw_words(seeds, work.common_tokens), work.common_tokens)
    prompts = []
    for _ in range(work.streams):
        text = f"{common} {draw_words(seeds, work.prompt_tokens)}".strip()
        prompts.append(cut(engine, text, work.prompt_tokens))
    firsts, ends, counts = [0.0] * work.streams, [0.0] * work.streams, [0] * work.streams
    done = threading.Semaphore(0)

    def taker(place: int) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            now = time.perf_counter()
            firsts[place] = firsts[place] or now
            if isinstance(event, Generation):
                ends[place], counts[place] = now, event.output_tokens
                done.release()
            elif not isinstance(event, TokenEvent):
                raise SystemExit(f"a request failed: {event}")

        return take

    sampling = SamplingParams(temperature=work.temperature, max_tokens=work.new_tokens, seed=1)
    started = time.perf_counter()
    for place, prompt in enumerate(prompts):
        adapter = adapters[place % work.adapters] if work.adapters else None
        request = GenerationRequest((Message("user", prompt),), sampling, adapter)
        engine.submit(request, taker(place))
    for _ in prompts:
        done.acquire()
    end = max(ends)
    return Measured(
        tokens_a_second=sum(counts) / (end - started),
        first_token_seconds=statistics.median(first - started for first in firsts),
        decode_tokens_a_second=(sum(counts) - work.streams) / max(1e-9, end - max(firsts)),
    )


def draw_words(seeds: random.Random, count: int) -> str:
    """Return so many words, which are at least as many tokens."""
    return " ".join(seeds.choices(TEXT.split(), k=count))


def cut(engine: AnyEngine, text: str, num_tokens: int) -> str:
    """Return as much of a text as makes a prompt of so many tokens, with the template."""
    words = text.split()
    while words and engine.count_tokens((Message("user", " ".join(words)),)) > num_tokens:
        words.pop()
    return " ".join(words)


def write_adapters(folder: Path, scratch: Path, count: int) -> list[str]:
    """Write adapters that change the model a little, and return their folders."""
    import torch

    from outcrop.models.load import load_base
    from outcrop.models.lora import ALL_LINEARS, LoraConfig, adapter_of, attach, save_adapter

    model = load_base(folder)
    config = LoraConfig(rank=RANK, alpha=2.0 * RANK, targets=ALL_LINEARS)
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in attach(model, config, seed):
                if parameter.shape[1] == RANK:
                    parameter.normal_(0, 1e-3, generator=generator)
        save_adapter(adapter_of(model, config), scratch / str(seed), "benchmark")
        found.append(str(scratch / str(seed)))
    return found


def median(times: Sequence[Measured], of: Callable[[Measured], float], form: str) -> str:
    """Return the median with the least and the greatest."""
    values = sorted(map(of, times))
    shown = [form.format(value) for value in (statistics.median(values), values[0], values[-1])]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    main()
