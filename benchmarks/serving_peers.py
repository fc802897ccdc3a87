"""Outcrop's engine and others are asked the same, on the same machine, in turn.

    python -m benchmarks.serving_peers --peer-python FOLDER/bin/python [--rounds 5] [--only NAME]

Each contender is a process of its own that ends before the next one begins: A B C A B C ... Each
round has prompts of its own, the same for all of them. Only weights of the same class of precision
are compared. Every finished round is kept in `.run/benchmarks/`, so that rounds can be added later
(`--keep`) and the page written anew (`--rounds 0 --keep`). Without --peer-python only Outcrop is
measured. How to make the peers' environment stands in `requirements-peers.txt`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from benchmarks.adapter_files import write_adapters, write_gguf_adapter
from benchmarks.running import table_lines, write_result
from benchmarks.serving_work import (
    DECODE_HEAVY,
    EIGHT,
    IN_COMMON,
    MANY,
    MIXED,
    NUM_ADAPTERS,
    ONE,
    ONE_ADAPTER,
    PROGRAMS,
    RANK,
    ROOT,
    ROWS,
    Contender,
    make_page,
    run_contender,
)
from benchmarks.training_work import CACHE, shipped_weights
from tokenizers import Tokenizer

from outcrop.models.weights import shipped_gguf

FULL, EIGHT_BITS, FOUR_BITS = "16 and 32 bits", "8 bits", "4 bits"
BASE_ROWS = (ONE, EIGHT, MANY, DECODE_HEAVY)
ADAPTER_ROWS = (ONE_ADAPTER, MIXED)
OWN_ROWS = (*BASE_ROWS, *ADAPTER_ROWS, IN_COMMON)
CONTENDERS = (
    Contender("Outcrop", "Outcrop", FULL, rows=OWN_ROWS),
    Contender("llama.cpp f16", "llama.cpp", FULL, {"kind": "f16"}),
    Contender("llama.cpp bf16", "llama.cpp", FULL, {"kind": "bf16"}),
    Contender("llama.cpp f32", "llama.cpp", FULL, {"kind": "f32"}),
    Contender("OpenVINO fp16", "OpenVINO", FULL, {"kind": "fp16"}, BASE_ROWS),
    Contender(
        *("OpenVINO fp16, adapters", "OpenVINO", FULL),
        *({"kind": "fp16", "with_adapters": True}, ADAPTER_ROWS),
    ),
    Contender(
        *("vLLM bfloat16", "vLLM", FULL),
        *({"engine": "vllm", "dtype": "bfloat16"}, (*BASE_ROWS, *ADAPTER_ROWS)),
    ),
    Contender("transformers float32", "transformers", FULL, {"dtype": "float32"}, BASE_ROWS),
    Contender(
        *("transformers float32, adapters", "transformers", FULL),
        *({"dtype": "float32", "with_adapters": True}, ADAPTER_ROWS),
    ),
    Contender("Outcrop int8", "Outcrop", EIGHT_BITS, {"precision": "int8"}, OWN_ROWS),
    Contender("llama.cpp q8_0", "llama.cpp", EIGHT_BITS, {"kind": "q8_0"}),
    Contender("OpenVINO int8", "OpenVINO", EIGHT_BITS, {"kind": "int8"}, BASE_ROWS),
    Contender(
        *("OpenVINO int8, adapters", "OpenVINO", EIGHT_BITS),
        *({"kind": "int8", "with_adapters": True}, ADAPTER_ROWS),
    ),
    Contender("Outcrop int4", "Outcrop", FOUR_BITS, {"precision": "int4"}, OWN_ROWS),
    Contender("llama.cpp q4_0", "llama.cpp", FOUR_BITS, {"kind": "q4_0"}),
)
MEASURES = (
    # name, row, what of it, how it is written, whether more is better
    ("1 stream: decoding, tokens a second", ONE, "decoding", "{:.1f}", True),
    ("1 stream: first token after, s", ONE, "first", "{:.3f}", False),
    ("8 streams: new tokens a second", EIGHT, "rate", "{:.0f}", True),
    ("32 streams: new tokens a second", MANY, "rate", "{:.0f}", True),
    ("32 streams, one adapter for all", ONE_ADAPTER, "rate", "{:.0f}", True),
    ("32 streams over 8 adapters", MIXED, "rate", "{:.0f}", True),
    ("32 streams, 32-token prompts, 256 new tokens", DECODE_HEAVY, "rate", "{:.0f}", True),
    ("32 streams, 200 of 256 tokens in common", IN_COMMON, "rate", "{:.0f}", True),
)
NUM_WEIGHTS = 134.5e6
"""Of the shipped model. Source: the tensors of its file; the head is the embedding."""
Runs = dict[str, list[dict[str, Any]]]
"""By the names of contenders; one a round."""


def main() -> None:
    """Measure the rounds and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, help="default: the shipped model")
    parser.add_argument("--peer-python", type=Path, help="python of the peers' environment")
    parser.add_argument("--vllm-python", type=Path, help="of an environment with vLLM")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="add to the rounds measured before")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="contenders, by their names; * for anything"
    )
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    options = parser.parse_args()
    weights = shipped_weights(options.weights)
    folder = CACHE / "serving_peers"
    kept = folder / "rounds.json"
    runs: Runs = {}
    rates: list[float] = []
    if options.keep and kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
        runs, rates = before["runs"], before["rates"]
    adapters = write_adapters(weights, folder / "adapters", NUM_ADAPTERS)
    pythons = dict.fromkeys(PROGRAMS, options.peer_python)
    pythons |= {"Outcrop": Path(sys.executable), "vLLM": options.vllm_python}
    contenders = [
        prepare(contender, weights, adapters, options.peer_python, folder)
        for contender in CONTENDERS
        if pythons[contender.engine] is not None
        if any(fnmatch(contender.name, pattern) for pattern in options.only)
    ]
    for _ in range(options.rounds):
        for contender in contenders:
            rows = [name for name in options.rows if name in contender.rows]
            if not rows:
                continue
            mine = runs.setdefault(contender.name, [])
            page = make_page(weights, adapters, rows, options.threads, len(mine))
            place = folder / contender.name.replace(" ", "-").replace(",", "")
            mine.append(run_contender(contender, page, pythons[contender.engine], place))
            print(f"{contender.name}, round {len(mine)}: {brief(mine[-1])}", flush=True)
            kept.write_text(json.dumps({"runs": runs, "rates": rates}), encoding="utf-8")
        rates.append(memory_rate(options.threads))
        kept.write_text(json.dumps({"runs": runs, "rates": rates}), encoding="utf-8")
    report(runs, rates, options, weights)


def prepare(
    contender: Contender,
    weights: Path,
    adapters: Sequence[Path],
    peer_python: Path | None,
    folder: Path,
) -> Contender:
    """Write what an engine reads, unless it is there, and return the contender with its files."""
    options = dict(contender.options)
    kind = options.pop("kind", None)
    if contender.engine == "llama.cpp":
        file = folder / f"{kind}.gguf"
        convert(contender.engine, peer_python, shipped_gguf(), kind, file)
        options |= {"file": str(file), "adapters": []}
        for adapter in adapters:
            target = adapter.with_suffix(".gguf")
            if not target.exists():
                write_gguf_adapter(weights, adapter, target)
            options["adapters"].append(str(target))
    elif contender.engine == "OpenVINO":
        model = folder / f"openvino-{kind}"
        convert(contender.engine, peer_python, weights, kind, model)
        options["model"] = str(model)
    return replace(contender, options=options)


def convert(engine: str, peer_python: Path | None, source: Path, kind: str, target: Path) -> None:
    """Have a peer's program write the model in its own form; a half-written one is never used."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f"half-{target.name}")
    if half.is_dir():
        shutil.rmtree(half)
    program = ROOT / "benchmarks" / PROGRAMS[engine]
    subprocess.run(
        [str(peer_python), str(program), "--convert", str(source), kind, str(half)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    half.rename(target)


def brief(result: Mapping[str, Any]) -> str:
    """Return a line about one round of a contender."""
    parts = [f"others took {result['others']:.2f} cores"]
    for name, row, what, form, _ in MEASURES:
        if values := of_round(result, row, what):
            parts.append(f"{name} {form.format(statistics.median(values))}")
    return "; ".join(parts)


def of_round(result: Mapping[str, Any], row: str, what: str) -> list[float]:
    """Return the values of a measure in one round of one contender."""
    times = result["rows"].get(row, [])
    if what == "rate":
        work = ROWS[row]
        return [work.streams * work.new_tokens / one["seconds"] for one in times]
    return [one[what] for one in times if one[what] is not None]


def of_all(runs: Runs, contender: str, row: str, what: str) -> list[float]:
    """Return the values of a measure in all rounds."""
    found = [of_round(result, row, what) for result in runs.get(contender, [])]
    return [value for values in found for value in values]


def memory_rate(threads: int) -> float:
    """Return how many bytes a second the machine reads from memory, the best of some times."""
    torch.set_num_threads(threads)
    numbers = torch.ones(2**27)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - started))
    return best


def report(runs: Runs, rates: Sequence[float], options: argparse.Namespace, weights: Path) -> None:
    """Write the page, and the rounds beside it."""
    classes = [
        kind
        for kind in dict.fromkeys(item.precision for item in CONTENDERS)
        if any(item.precision == kind and item.name in runs for item in CONTENDERS)
    ]
    tables = {kind: table_of(runs, kind) for kind in classes}
    first, *others = classes
    more = ["\n".join([f"Weights of {kind}:", "", *table_lines(tables[kind])]) for kind in others]
    most = max(map(len, runs.values()))
    path = write_result(
        "serving_peers",
        f"Each engine alone, without a server around it, {options.threads} threads, "
        f"up to {most} rounds in turn; 256-token prompts and 64 new tokens where nothing else is "
        "said, greedy. New tokens a second include the time of the prompts. Adapters of rank "
        f"{RANK} on all linear layers. Median, and the least and the greatest of all values. The "
        "last column compares Outcrop's median with the best of the others in its table.\n\n"
        f"Weights of {first}:",
        tables[first],
        "\n\n".join([*more, notes(runs, rates, weights)]),
    )
    page = {"rates": rates, "runs": runs}
    path.with_suffix(".json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


def table_of(runs: Runs, precision: str) -> list[list[str]]:
    """Return the table of one class: a measure a row, an engine a column."""
    columns: dict[str, list[str]] = {}
    for contender in CONTENDERS:
        # What is asked with adapters and without may be two processes of one engine.
        if contender.precision == precision and contender.name in runs:
            columns.setdefault(contender.name.partition(",")[0], []).append(contender.name)
    table = [["", *columns, "Outcrop to the best"]]
    for label, row, what, form, more_is_better in MEASURES:
        medians: dict[str, float] = {}
        cells = [label]
        for column, names in columns.items():
            values = [value for name in names for value in of_all(runs, name, row, what)]
            cells.append(spread(values, form))
            if values:
                medians[column] = statistics.median(values)
        own = {name: value for name, value in medians.items() if name.startswith("Outcrop")}
        peers = [value for name, value in medians.items() if name not in own]
        if own and peers:
            ratio = max(own.values()) / max(peers)
            if not more_is_better:
                ratio = min(own.values()) / min(peers)
            cells.append(f"{ratio:.2f}")
        else:
            cells.append("")
        if medians:
            table.append(cells)
    for label, key, scale, form in (
        ("from the start to ready, s", "start", 1.0, "{:.1f}"),
        ("peak memory, MB", "peak", 1e6, "{:.0f}"),
        ("cores that others used, at most", "others", 1.0, "{:.2f}"),
    ):
        cells = [label]
        for names in columns.values():
            values = [result[key] / scale for name in names for result in runs[name]]
            cells.append(form.format(max(values)))
        table.append([*cells, ""])
    return table


def spread(values: Sequence[float], form: str) -> str:
    """Return the median with the least and the greatest."""
    if not values:
        return ""
    shown = [form.format(value) for value in (statistics.median(values), min(values), max(values))]
    if len(values) == 1:
        return f"{shown[0]} (once)"
    return f"{shown[0]} ({shown[1]} to {shown[2]}, {len(values)} times)"


def notes(runs: Runs, rates: Sequence[float], weights: Path) -> str:
    """Return what a reader has to bear in mind."""
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    texts = {
        name: [
            result["answer"]
            if isinstance(result["answer"], str)
            else tokenizer.decode(result["answer"])
            for result in results
            if ONE in result["rows"]
        ]
        for name, results in runs.items()
    }
    own = texts.get("Outcrop", [])
    alike = []
    for name, found in texts.items():
        compared = list(zip(found, own, strict=False))
        if name != "Outcrop" and compared:
            alike.append(f"{name} {sum(a == b for a, b in compared)} of {len(compared)}")
    said = (
        "llama.cpp and OpenVINO answer streams of 8 adapters adapter by adapter, because neither "
        "computes several in one batch; transformers with peft does. llama.cpp is driven through "
        "its C interface, all streams in one batch, with keys and values apart for each. OpenVINO "
        "does not say when a stream of many had its first token. The weights are those of the "
        "shipped model, which has 4 bits: each wider form holds the same values, and smaller ones "
        "are rounded again."
    )
    if rates:
        # A stream reads all weights for each token; those of the shipped model are 134.5 million.
        fastest = max(rates)
        limits = " and ".join(f"{fastest / (size * NUM_WEIGHTS):.0f}" for size in (2, 1))
        said += (
            f" The machine read {fastest / 1e9:.0f} GB/s from memory, so one stream cannot have "
            f"more than {limits} tokens a second with weights of 16 and of 8 bits."
        )
    if alike:
        said += (
            f" First answers of the rounds that are Outcrop's to the letter: {', '.join(alike)}."
        )
    return said


if __name__ == "__main__":
    main()
