"""One training run as a page of JSON, so that several trainers can do exactly the same work.

A page names the base weights, the rendered records, their order, the adapter's first values and the
settings. `benchmarks.outcrop_training` does it with Outcrop, `trl_training.py` with TRL or with a
plain loop, in whatever environment that is started in. Each writes one page of JSON:

    seconds   of each step, from the end of the one before; the first from the start of training
    cpu       seconds of all threads, likewise
    tokens    real ones of each step, none of padding
    losses    of each step, nats a token
    peak      bytes, the most that the process had resident
    artifact  the folder that was written, or null

Knows nothing of which trainers are compared, nor of tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from outcrop.data.records import Example
from outcrop.models.weights import SHIPPED_KEY, convert_shipped
from outcrop.train.threads import training_environment

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".run" / "benchmarks"
"""Where converted weights and unfinished measurements lie; git does not see it."""
SHARED_DATA = Path(os.environ.get("BEDROCK_DATA_DIR", ROOT.parent / "shared" / "data"))
"""The real data sets; the tests look at the same place."""
TRL_PROGRAM = Path(__file__).parent / "trl_training.py"
OWN_MODULE = "benchmarks.outcrop_training"


@dataclass(frozen=True)
class Contender:
    """Somebody who does the work."""

    name: str
    trainer: str = "outcrop"
    """"outcrop", "trl" or "reference" (a plain float32 loop over transformers and peft)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `train(...)`, a type by its name, and `without` with a name from `tricks.py`; or of TRL's
    SFTConfig."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What is to be done; the files are named by their paths."""

    weights: str
    examples: str
    """A file with the records, as `write_examples` writes them, in the order of the data file."""
    validation: str | None = None
    order: Sequence[int] | None = None
    """The places of the records in the order in which one pass takes them; None: the trainer's."""
    method: str = "adapter"
    rank: int = 16
    alpha: float = 32.0
    start: str | None = None
    """Folder of an adapter with the first values; Outcrop draws the same ones from the seed."""
    learning_rate: float = 2e-4
    """At the first step; it falls linearly to zero over the run, and there is no warm-up."""
    batch_size: int = 8
    epochs: int = 1
    seed: int = 0
    threads: int = 2
    output: str | None = None
    """Folder for the artifact; None for none."""
    catalogue: Mapping[str, Any] | None = None
    """For Outcrop: {"base_model", "hyper_parameters"}: the plan that a job with these would have,
    whatever the settings above say; None: as they say."""


def run_work(
    work: Work, contender: Contender, trl_python: Path | None, folder: Path
) -> dict[str, Any]:
    """Do the work in a process of its own and return the page that it wrote.

    Args:
        folder: receives the pages and the process's messages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, answer, log = folder / "work.json", folder / "result.json", folder / "log.txt"
    described = {**asdict(work), "trainer": contender.trainer, "options": dict(contender.options)}
    page.write_text(json.dumps(described), encoding="utf-8")
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1"}
    if contender.trainer == "outcrop":
        command = [sys.executable, "-m", OWN_MODULE, str(page), str(answer)]
        environment |= training_environment(work.threads)  # as the service starts it
    else:
        assert trl_python is not None, f"{contender.name} needs --trl-python"
        command = [str(trl_python), str(TRL_PROGRAM), str(page), str(answer)]
    with log.open("wb") as stream:
        code = subprocess.run(
            command,
            cwd=ROOT,
            env=environment | dict(contender.environment),
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code != 0 or not answer.exists():
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise SystemExit("\n".join([f"{contender.name} ended with code {code}; see {log}", *last]))
    result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result


def shipped_weights(given: Path | None) -> Path:
    """Return the folder of SmolLM2's weights: the given one, or one that is converted once."""
    folder = given or CACHE / SHIPPED_KEY
    if given is None:
        convert_shipped(folder)
    return folder


def write_examples(file: Path, examples: Sequence[Example]) -> Path:
    """Write rendered records for other processes; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [[example.input_ids, [int(bit) for bit in example.loss_mask]] for example in examples]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def read_examples(file: Path) -> list[Example]:
    """Read what `write_examples` wrote."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [Example(ids, [bool(bit) for bit in mask]) for ids, mask in rows]


def peak_bytes() -> int:
    """Return the most that this process has had resident.

    The kernel's count of the memory map and not getrusage's, which a child begins with the peak of
    the process that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell a process's peak memory")


def step_flops(config: Mapping[str, Any], method: str, rank: int) -> float:
    """Return the useful operations of one token's training step in the linear layers.

    A multiplication and an addition count as two. Frozen weights are used twice (forward, and
    backward to the inputs), trained ones three times. Attention, the embedding, the head and
    everything computed elementwise are left out, and padding never counts.
    """
    weights = adapter = 0
    for inputs, outputs in linear_shapes(config):
        weights += inputs * outputs
        adapter += rank * (inputs + outputs)
    layers = int(config["num_hidden_layers"])
    if method == "full":
        return 6.0 * weights * layers
    return (4.0 * weights + 6.0 * adapter) * layers


def linear_shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the linear layers of one block of a Llama-shaped model."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, groups = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    width = int(config.get("head_dim") or hidden // heads)
    return [
        (hidden, heads * width),
        (hidden, groups * width),
        (hidden, groups * width),
        (heads * width, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
