"""How fast the serving engine answers: one stream and many, with adapters, with a common beginning.

    python -m benchmarks.serving_speed [--weights FOLDER] [--threads 2] [--rounds 5] [--engine vllm]

The engine runs in this process, as in a model server, without socket and gateway. Prompts are words
drawn by a seed, cut to so many tokens; answers are greedy and have their full length, because no
end token is taken as one. Each round measures every row once, so that what else the machine does
falls on all of them alike; the page has the medians. At the end some prompts are asked once more,
each alone: their answers must be those of the batch. vLLM is asked through the same seam; its own
variables say how many threads it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.adapter_files import write_adapters
from benchmarks.outcrop_serving import Asked, ask, start_engine
from benchmarks.running import write_result
from benchmarks.serving_work import (
    IN_COMMON,
    MANY,
    MIXED,
    NUM_ADAPTERS,
    RANK,
    ROWS,
    Work,
    draw_prompts,
)
from benchmarks.training_work import CACHE, shipped_weights
from tokenizers import Tokenizer

DRAWN = "32 streams, drawn at 0.7 and top-p 0.9"
MORE_ROWS = {DRAWN: Work(32), "8 streams, 8 adapters": Work(8, adapters=NUM_ADAPTERS)}
ALL_ROWS = {**ROWS, **MORE_ROWS}
ALONE = 8
"""Prompts of each of the compared rows that are asked again, each alone."""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, help="default: the shipped model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=tuple(ALL_ROWS), default=tuple(ALL_ROWS))
    parser.add_argument("--engine", choices=("own", "vllm"), default="own")
    parser.add_argument("--dtype", default="auto", help="of the weights in vLLM")
    parser.add_argument("--options", type=json.loads, default={}, help="of BatchEngine, as JSON")
    options = parser.parse_args()
    if options.engine == "vllm":
        options.options = {"engine": "vllm", "dtype": options.dtype}
    folder = shipped_weights(options.weights)
    adapters = [str(place) for place in write_adapters(folder, CACHE / "adapters", NUM_ADAPTERS)]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    started = time.perf_counter()
    engine = start_engine(folder, options.threads, options.options)
    seconds_to_start = time.perf_counter() - started
    found: dict[str, list[Asked]] = {name: [] for name in options.rows}
    ask(engine, draw_prompts(tokenizer, Work(NUM_ADAPTERS, 64), "warm-up"), 8, adapters)
    for number in range(options.rounds):
        for name in options.rows:
            work = ALL_ROWS[name]
            prompts = draw_prompts(tokenizer, work, f"{name} {number} 0")
            temperature = 0.7 if name == DRAWN else 0.0
            asked = ask(engine, prompts, work.new_tokens, adapters[: work.adapters], temperature)
            found[name].append(asked)
            print(name, asked.figures, flush=True)
    stats = engine.stats()
    engine.close()
    same, compared = compare_with_alone(folder, tokenizer, adapters, found, options)
    rows = [
        (
            "asked at the same time",
            "new tokens a second",
            "first token, s",
            "decoding, tokens a second",
        )
    ]
    for name, times in found.items():
        work = ALL_ROWS[name]
        num_tokens = work.streams * work.new_tokens
        rows.append(
            (
                name,
                median([num_tokens / one.seconds for one in times], "{:.0f}"),
                median([one.first for one in times], "{:.3f}"),
                median([one.decoding for one in times], "{:.0f}"),
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
        f"{stats.num_passes} passes and took {stats.prefix_tokens} tokens of prompts over. Of "
        f"{compared} greedy answers that were asked again, each alone, {same} are to the letter "
        "those of the batch.",
    )


def described(options: argparse.Namespace) -> str:
    """Say in words which engine it is."""
    if options.engine == "own":
        return f"our own, {options.threads} threads"
    import vllm

    return f"vLLM {vllm.__version__}, weights in {options.dtype}"


def compare_with_alone(
    folder: Path,
    tokenizer: Tokenizer,
    adapters: Sequence[str],
    found: Mapping[str, Sequence[Asked]],
    options: argparse.Namespace,
) -> tuple[int, int]:
    """Ask some prompts again, each alone, of an engine that has computed nothing before.

    Returns:
        (same, compared): how many answers are those of the batch, of how many.
    """
    engine = start_engine(folder, options.threads, options.options)
    same, compared = 0, 0
    for name in (MANY, MIXED, IN_COMMON):
        if not found.get(name):
            continue
        work = ALL_ROWS[name]
        prompts = draw_prompts(tokenizer, work, f"{name} 0 0")
        for place in range(0, work.streams, work.streams // ALONE - 1):
            chosen = [adapters[place % work.adapters]] if work.adapters else []
            alone = ask(engine, [prompts[place]], work.new_tokens, chosen)
            same += alone.answers[0] == found[name][0].answers[place]
            compared += 1
    engine.close()
    return same, compared


def median(values: Sequence[float], form: str) -> str:
    """Return the median with the least and the greatest."""
    shown = [form.format(value) for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    main()
