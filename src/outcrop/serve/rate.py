"""How fast a machine answers with a model in full batches: assumed, measured once, then kept.

Model units are shares of this rate. It is measured by a few passes of more and more answers, up to
a full batch, while nobody asks, and given up as soon as somebody does. Other work on the machine
can only make it look slower, so a full batch of real requests that was faster counts from then on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from outcrop.models.compiled import processor
from outcrop.serve.backend import Backend, Memory, Part
from outcrop.serve.pages import PagePool, PageTable
from outcrop.store.files import write_private

logger = logging.getLogger("outcrop.model-server")

VERSION = 1
"""Of the kept files; raised when passes change so much that old ones mislead."""
PROMPT_TOKENS = 16
"""Of each sequence that is measured with."""
MAX_PASSES = 16
"""Passes of answers that are measured; the last half of them have as many as the largest one."""
PASS_SECONDS, MEASURED_SECONDS = 0.25, 2.0
"""No larger pass is tried after one that took so long, because a request may come and wait for it;
and for how long prompts are measured, and then answers."""
OBSERVED_PASSES = 16
"""Passes of real answers in a row that tell a rate."""
FASTER = 1.05
"""A rate that was observed counts where it is so many times the one before."""


@dataclass(frozen=True)
class Rates:
    """What a machine computes in full batches of one model."""

    tokens_per_second: float
    """Of answers."""
    prompt_tokens_per_second: float

    @property
    def prompt_cost(self) -> float:
        """What a token of a prompt costs, in tokens of answers: 1 at most."""
        return min(1.0, self.tokens_per_second / self.prompt_tokens_per_second)


ASSUMED = Rates(100.0, 400.0)
"""Until it is measured: less than the shipped model answers on two cores."""


class RateMeter:
    """The rates as far as they are known. Changed by the engine's thread only."""

    def __init__(self, file: Path | None = None, *, fixed: int = 0) -> None:
        """
        Args:
            file: where they are kept; None measures nothing.
            fixed: what the operator says of answers, in tokens a second; 0 measures.
        """
        self.rates = ASSUMED
        self.can_measure = False
        """Whether they are still to be measured."""
        self._file = file
        self._fixed = bool(fixed)
        self._passes, self._tokens, self._seconds = 0, 0, 0.0
        if fixed:
            ratio = ASSUMED.prompt_tokens_per_second / ASSUMED.tokens_per_second
            self.rates = Rates(float(fixed), fixed * ratio)
        elif file is not None:
            found = _read(file)
            self.rates, self.can_measure = found or ASSUMED, found is None

    def measure(
        self, backend: Backend, pool: PagePool, slots: int, stop: Callable[[], bool]
    ) -> None:
        """Measure and keep the rates; whoever stops it has it measured again later."""
        started = time.perf_counter()
        try:
            found = measure_rates(backend, pool, slots, stop)
        # Whatever a library raises: requests are answered without it.
        except Exception:
            logger.exception("the rate of full batches could not be measured")
            self.can_measure = False
            return
        if found is not None:
            self.can_measure = False
            self._keep(found)
            logger.info("measured in %.1f s: %s", time.perf_counter() - started, found)

    def note(self, answers: int, prompt_rows: int, slots: int, seconds: float) -> None:
        """Note a pass of real requests: a full batch that was faster than the rate corrects it."""
        if prompt_rows or 2 * answers < slots or self._fixed:
            self._passes, self._tokens, self._seconds = 0, 0, 0.0
            return
        self._passes += 1
        self._tokens += answers
        self._seconds += seconds
        if self._passes < OBSERVED_PASSES:
            return
        rate = self._tokens / self._seconds
        self._passes, self._tokens, self._seconds = 0, 0, 0.0
        if rate > FASTER * self.rates.tokens_per_second:
            prompts = max(rate, self.rates.prompt_tokens_per_second)
            self._keep(Rates(rate, prompts))

    def _keep(self, rates: Rates) -> None:
        self.rates = rates
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_private(self._file, json.dumps(asdict(rates)).encode(), replace=True)
        except OSError as error:
            logger.warning("%s could not be kept: %s", self._file.name, error)


def rate_file(folder: Path, weights_key: str, threads: int) -> Path:
    """Return where the rates of a model on this machine are kept.

    Args:
        folder: may be removed any time.
        threads: that a pass computes with.
    """
    described = json.dumps([VERSION, processor(), threads, weights_key])
    return folder / f"rates-{hashlib.sha256(described.encode()).hexdigest()[:20]}.json"


def measure_rates(
    backend: Backend, pool: PagePool, slots: int, stop: Callable[[], bool]
) -> Rates | None:
    """Compute made-up answers, as many at a time as there are slots, and return how fast that went.

    Where a pass of fewer takes long already, such as on the torch backend, which computes one after
    the other, more at a time would not be faster, and it is left at that.

    Args:
        stop: asked before each pass, whether to give up.
    Returns:
        None where it was given up, or where no two sequences find room.
    """
    tables: list[PageTable] = []
    try:
        while len(tables) < slots:
            table = PageTable()
            if not pool.extend(table, PROMPT_TOKENS + MAX_PASSES):
                break
            tables.append(table)
        if len(tables) < 2 or backend.max_context < PROMPT_TOKENS + MAX_PASSES:
            return None
        sequences = [
            _Sequence(
                [(31 * number + 7 * place) % backend.vocabulary for place in range(PROMPT_TOKENS)],
                table,
            )
            for number, table in enumerate(tables)
        ]
        prompt_rate = _measure_prompts(backend, sequences, stop)
        rate = _measure_answers(backend, sequences, stop)
        return Rates(rate, prompt_rate) if rate and prompt_rate else None
    finally:
        for table in tables:
            pool.close(table)


@dataclass
class _Sequence:
    """A made-up prompt and its answer."""

    next_ids: list[int]
    table: PageTable
    num_computed: int = 0
    memory: Memory = field(default_factory=Memory)


def _measure_prompts(
    backend: Backend, sequences: list[_Sequence], stop: Callable[[], bool]
) -> float:
    """Return how many tokens of prompts the best pass computed in a second; 0 if given up."""
    best, total, size, place = 0.0, 0.0, 1, 0
    while place < len(sequences) and (total < MEASURED_SECONDS or place < 2):
        if stop():
            return 0.0
        group = sequences[place : place + size]
        seconds = _run(backend, group)
        best = max(best, len(group) * PROMPT_TOKENS / seconds)
        total, place = total + seconds, place + len(group)
        if seconds < PASS_SECONDS:
            size = min(2 * size, max(1, backend.max_rows // PROMPT_TOKENS))
    return best


def _measure_answers(
    backend: Backend, sequences: list[_Sequence], stop: Callable[[], bool]
) -> float:
    """Return how many tokens of answers the largest passes computed in a second; 0 if given up."""
    ready = [sequence for sequence in sequences if sequence.num_computed]
    size, total, tokens, spent = 1, 0.0, 0, 0.0
    for number in range(MAX_PASSES):
        if stop():
            return 0.0
        seconds = _run(backend, ready[:size])
        spent += seconds
        is_larger_tried = number < MAX_PASSES // 2 and size < len(ready) and seconds < PASS_SECONDS
        if is_larger_tried:
            size, total, tokens = min(2 * size, len(ready)), 0.0, 0
        else:
            total, tokens = total + seconds, tokens + size
        if not is_larger_tried and spent > MEASURED_SECONDS:
            break
    return tokens / total


def _run(backend: Backend, sequences: list[_Sequence]) -> float:
    """Compute the next tokens of sequences; returns the seconds that it took."""
    parts = [
        Part(
            artifact=None,
            token_ids=sequence.next_ids,
            first_position=sequence.num_computed,
            pages=sequence.table.numbers,
            num_scores=1,
            memory=sequence.memory,
        )
        for sequence in sequences
    ]
    started = time.perf_counter()
    found = backend.run(parts)
    seconds = time.perf_counter() - started
    for sequence, scores in zip(sequences, found, strict=True):
        if isinstance(scores, Exception):
            raise scores
        assert scores is not None
        sequence.num_computed += len(sequence.next_ids)
        sequence.next_ids = [max(0, scores.chosen[-1])]
    return seconds


def _read(file: Path) -> Rates | None:
    """Return the rates that are kept, or None where there are none that can be used."""
    try:
        rates = Rates(**json.loads(file.read_text(encoding="utf-8")))
        usable = min(rates.tokens_per_second, rates.prompt_tokens_per_second) > 0
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be used and is measured again: %s", file.name, error)
        return None
    return rates if usable else None
