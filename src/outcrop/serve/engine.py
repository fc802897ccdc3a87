"""The engine: requests in, events out, on one model and the custom models that belong to it.

The seam is `interface.Engine`: the server knows nothing else, so another engine can stand there.
`BatchEngine` is ours: one thread, whose passes take all active requests together, each with its own
custom model. What computes a pass is a backend (`backend.py`).

A request's life: (1) `submit` renders the prompt in the caller's thread and refuses what does not
fit; (2) it waits for its turn, which `fairness.py` decides; (3) it becomes active when its custom
model and its first pages have room; (4) each pass takes a part of its prompt, or its newest token;
(5) events go to `deliver`, from the engine's thread; the last is a Generation or an error. A
cancelled request gets no further event. Where pages or slots run out for one that comes before it,
a request gives its own back and waits again; what it had is computed anew, to the same numbers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path

import torch

from outcrop.data.records import Message, Tool
from outcrop.data.render import Renderer
from outcrop.errors import (
    ApiError,
    ModelError,
    ModelErrorException,
    ModelTimeoutException,
    ServiceUnavailableException,
    ThrottlingException,
)
from outcrop.serve.adapters import MAX_ADAPTER_BYTES
from outcrop.serve.backend import Backend, Part, Scores
from outcrop.serve.fairness import (
    CLASSES,
    RETRY_SECONDS,
    FairQueue,
    Limits,
    class_of,
)
from outcrop.serve.histogram import Histogram
from outcrop.serve.interface import ClassStats, Deliver, EngineStats
from outcrop.serve.kept import KeptMatrices
from outcrop.serve.packed import FEW_BITS
from outcrop.serve.paged import MAX_PAGE_BYTES, PagedBackend, can_be_paged
from outcrop.serve.pages import PagePool, PageTable
from outcrop.serve.plain import PlainBackend
from outcrop.serve.prompt import encode_prompt, fit_request, render_prompt
from outcrop.serve.rate import RateMeter
from outcrop.serve.request import Generation, GenerationRequest
from outcrop.serve.sequence import TokenSequence
from outcrop.serve.sharing import batch_beside, rows_beside, share_prompts
from outcrop.serve.task import Task

logger = logging.getLogger("outcrop.model-server")

SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Bounds of the histograms."""
MAX_ACTIVE = Limits().slots
"""Requests that are answered at the same time."""
QUIET_SECONDS = 5.0
"""After so long without a request the rate of full batches is measured, once."""


class BatchEngine:
    """Our engine; see the module's text for how it works."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        dtype: torch.dtype | None = None,
        precision: str = "auto",
        limits: Limits | None = None,
        meter: RateMeter | None = None,
        max_adapter_bytes: int = MAX_ADAPTER_BYTES,
        backend: Backend | None = None,
        kept: KeptMatrices | None = None,
    ) -> None:
        """Load the model and start the thread.

        Args:
            folder: the base model's, in Hugging Face's layout.
            threads: that a pass computes with.
            dtype: of the weights; None takes this machine's fastest.
            precision: what the compiled pass holds matrices in, one of packed.PRECISIONS.
            limits: what there is to share among requests.
            meter: knows the rate of full batches; None assumes one and measures nothing.
            backend: what computes; None takes the compiled pass where it covers the model.
            kept: where the compiled pass keeps packed matrices.
        Raises:
            ModelError: the folder's weights or tokenizer cannot be used.
        """
        self.renderer = Renderer(folder)
        self._backend = backend or open_backend(
            folder,
            threads=threads,
            dtype=dtype,
            precision=precision,
            max_adapter_bytes=max_adapter_bytes,
            kept=kept,
        )
        self.max_context = self._backend.max_context
        self._pool = PagePool(
            self._backend.num_pages,
            self._backend.page_tokens,
            shares=self._backend.shares_pages,
        )
        self._limits = limits or Limits()
        self._meter = meter or RateMeter()
        self._lock = threading.Condition()
        self._numbers = count(1)
        self._tasks: dict[int, Task] = {}
        self._queue = FairQueue(self._limits, rate=lambda: self._meter.rates.tokens_per_second)
        self._served = dict.fromkeys(CLASSES, 0)
        self._closing = False
        self._num_requests = self._input_tokens = self._output_tokens = 0
        self._num_passes = self._num_preempted = 0
        self._last_used = time.monotonic()
        self._first_token_seconds, self._token_seconds = Histogram(SECONDS), Histogram(SECONDS)
        self._pass_tokens = Histogram(TOKENS)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> int:
        """See `Engine.submit`."""
        with self._lock:
            self._check(request)
        prompt_ids, max_tokens = fit_request(
            self.renderer, request, self.max_context, self._backend.vocabulary
        )
        sequence = TokenSequence(
            *(prompt_ids, request.sampling, max_tokens, self.renderer.end_token_ids),
            *(self.renderer.tokenizer, request.shown),
        )
        with self._lock:
            self._check(request)
            number = next(self._numbers)
            displaced = self._queue.enter(number, request.owner)
            if displaced is not None:
                self._tasks[displaced].refusal = _displaced()
            self._tasks[number] = Task(request, sequence, deliver)
            self._lock.notify()
        return number

    def cancel(self, number: int) -> None:
        """See `Engine.cancel`."""
        with self._lock:
            if task := self._tasks.get(number):
                task.cancelled = True

    def count_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: str | None = None
    ) -> int:
        """See `Engine.count_tokens`."""
        if prompt is not None:
            return len(encode_prompt(self.renderer, prompt, self.max_context, spells_control=True))
        return len(render_prompt(self.renderer, messages, self.max_context, tools))

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._lock:
            free = self._pool.num_available - self._pool.num_kept
            idle = 0.0 if self._tasks else time.monotonic() - self._last_used
            return EngineStats(
                num_active=self._queue.num_active,
                num_waiting=self._queue.num_waiting,
                num_requests=self._num_requests,
                input_tokens=self._input_tokens,
                output_tokens=self._output_tokens,
                base_bytes=self._backend.base_bytes,
                num_own=self._backend.num_own,
                own_bytes=self._backend.own_bytes,
                num_adapters=self._backend.num_adapters,
                adapter_bytes=self._backend.adapter_bytes,
                num_adapter_loads=self._backend.num_loads,
                num_passes=self._num_passes,
                prefix_tokens=self._pool.tokens_taken_over,
                num_preempted=self._num_preempted,
                num_pages=self._pool.num_pages,
                num_pages_kept=self._pool.num_kept,
                num_pages_free=free,
                page_bytes=(self._pool.num_pages - free) * self._backend.page_bytes,
                idle_seconds=idle,
                first_token_seconds=self._first_token_seconds.counts(),
                token_seconds=self._token_seconds.counts(),
                pass_tokens=self._pass_tokens.counts(),
                classes={name: self._class_stats(name) for name in self._served},
                reservations=self._queue.used(),
                full_batch_tokens_per_second=self._meter.rates.tokens_per_second,
            )

    def _class_stats(self, name: str) -> ClassStats:
        active, waiting = self._queue.counts(name)
        return ClassStats(active, waiting, self._queue.num_throttled[name], self._served[name])

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join()

    def _check(self, request: GenerationRequest) -> None:
        if self._closing:
            raise _ending()
        self._queue.check(request.owner)

    def _run(self) -> None:
        while self._wait():
            self._drop_what_ended()
            self._admit()
            self._pass()
        self._end_all()
        self._backend.close()

    def _wait(self) -> bool:
        """Wait for requests; False where the engine is to end."""
        while True:
            with self._lock:
                if self._closing or self._tasks:
                    return not self._closing
                quiet = time.monotonic() - self._last_used
                if not self._meter.can_measure or quiet < QUIET_SECONDS:
                    left = QUIET_SECONDS - quiet if self._meter.can_measure else None
                    self._lock.wait(left)
                    continue
            self._meter.measure(
                *(self._backend, self._pool, self._limits.slots),
                stop=lambda: self._closing or bool(self._tasks),
            )

    def _drop_what_ended(self) -> None:
        """End requests that were cancelled or whose time is up, waiting ones included."""
        for number, task in list(self._tasks.items()):
            if task.cancelled:
                self._end(number)
            elif task.refusal is not None:
                self._fail(number, task.refusal)
            elif task.is_late():
                self._fail(
                    number,
                    ModelTimeoutException(
                        f"The model did not finish within {task.request.timeout_seconds:g} s; it "
                        f"had written {task.sequence.output_tokens} tokens. Ask for fewer tokens."
                    ),
                )

    def _admit(self) -> None:
        """Make waiting requests active, each in its turn, while there is room."""
        while True:
            with self._lock:
                number = self._queue.next()
            if number is None or not self._take_in(number):
                return

    def _take_in(self, number: int) -> bool:
        """Make a waiting request active; False where it has to wait on."""
        task = self._tasks[number]
        while not self._find_room(number, task):
            with self._lock:
                victim = self._queue.victim(number) if number in self._queue else None
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _find_room(self, number: int, task: Task) -> bool:
        """Make a request active, or end it, unless others hold what it needs."""
        with self._lock:
            active = self._queue.active
        if len(active) >= self._limits.slots:
            return False
        in_use = {
            artifact
            for other in active
            if (artifact := self._tasks[other].request.adapter) is not None
        }
        try:
            request = task.request
            is_loaded = self._backend.load(request.adapter, in_use, request.adapter_digest)
        except Exception as error:
            self._fail(number, self._explain(task, error))
            return True
        if not is_loaded and active:
            return False
        task.table = self._open(task)
        if active and not self._has_room(task, len(task.sequence.ids), len(active)):
            self._pool.close(task.table)
            return False
        with self._lock:
            if number not in self._queue:  # it gave its place up meanwhile
                self._pool.close(task.table)
                return True
            self._queue.admit(number)
        task.sequence.num_computed = len(task.table.numbers) * self._backend.page_tokens
        # What others have computed is not charged.
        task.num_charged = max(task.num_charged, task.sequence.num_computed)
        return True

    def _open(self, task: Task) -> PageTable:
        """Return the pages that a request takes over."""
        if task.sequence.wants_prompt_scores:
            return PageTable(scope=task.scope)
        return self._pool.open(task.scope, task.sequence.ids)

    def _has_room(self, task: Task, num_tokens: int, num_active: int) -> bool:
        """Whether there is a page for each active request beside those of a new one."""
        more = -(-num_tokens // self._backend.page_tokens) - len(task.table.numbers)
        return more + num_active <= self._pool.num_available

    def _pass(self) -> None:
        """Compute the newest token of each answer, and as much of the prompts as fits beside."""
        numbers, parts = self._plan()
        if not parts:
            return
        self._num_passes += 1
        num_rows = sum(len(part.token_ids) for part in parts)
        num_answers = sum(self._tasks[number].num_left == 1 for number in numbers)
        self._pass_tokens.add(num_rows)
        started = time.perf_counter()
        try:
            found = self._backend.run(parts)
        # Whatever a library raises: the thread that ends with it answers all others.
        except Exception as error:
            found = [error] * len(parts)
        seconds = time.perf_counter() - started
        self._meter.note(num_answers, num_rows - num_answers, self._limits.slots, seconds)
        for number, part, scores in zip(numbers, parts, found, strict=True):
            task = self._tasks[number]
            if isinstance(scores, Exception):
                self._fail(number, self._explain(task, scores))
                continue
            task.sequence.num_computed += len(part.token_ids)
            self._charge_prompt(number, task)
            self._pool.record(task.table, task.sequence.ids[: task.sequence.num_computed])
            if scores is not None:
                self._accept(number, part, scores)

    def _plan(self) -> tuple[list[int], list[Part]]:
        """Return who takes part in the next pass, and with which tokens."""
        numbers: list[int] = []
        parts: list[Part] = []
        for number, length in self._share_pass():
            if not self._queue.is_active(number):  # it gave its pages to one before it
                continue
            task = self._tasks[number]
            first = task.sequence.num_computed
            if not self._make_room(number, first + length, numbers):
                continue
            parts.append(
                Part(
                    artifact=task.request.adapter,
                    token_ids=task.sequence.ids[first : first + length],
                    first_position=first,
                    pages=task.table.numbers,
                    num_scores=task.num_scores(length),
                    draw=task.sequence.next_draw() if length == task.num_left else None,
                    memory=task.memory,
                )
            )
            numbers.append(number)
        return numbers, parts

    def _share_pass(self) -> list[tuple[int, int]]:
        """Return how many tokens of whom the next pass takes.

        Those within reservations come first, batch jobs last, of each kind answers before prompts.
        """
        with self._lock:
            order, first = self._queue.order(), self._queue.within_reservations()
            batch = {number for number in order if self._queue.is_batch(number)}
        if len(batch) < len(order):
            beside = batch_beside(sorted(batch), self._limits.slots, self._num_passes)
            order = [number for number in order if number not in batch or number in beside]
        answers = [number for number in order if self._tasks[number].num_left == 1]
        begun: set[bytes] = set()
        prompts = [
            number
            for number in order
            if (task := self._tasks[number]).num_left > 1
            and not self._waits_for_another(task, begun)
        ]
        room, cost = self._backend.max_rows - len(answers), float(len(answers))
        prompt_cost = self._meter.rates.prompt_cost
        shared: list[tuple[int, int]] = []
        kinds = [0 if number in first else 2 if number in batch else 1 for number in order]
        kind_of = dict(zip(order, kinds, strict=True))
        for kind in (0, 1, 2):
            shared += [(number, 1) for number in answers if kind_of[number] == kind]
            turn = [number for number in prompts if kind_of[number] == kind]
            if kind > min(kinds, default=kind):
                room = min(room, rows_beside(self._limits.slots, cost, prompt_cost))
            wanted = [
                (self._tasks[number].request.owner.account, self._tasks[number].num_left)
                for number in turn
            ]
            lengths = share_prompts(wanted, room)
            shared += [pair for pair in zip(turn, lengths, strict=True) if pair[1]]
            room, cost = room - sum(lengths), cost + prompt_cost * sum(lengths)
        return shared

    def _waits_for_another(self, task: Task, begun: set[bytes]) -> bool:
        """Return whether another prompt of this pass begins alike: then its pages come for free."""
        sequence = task.sequence
        if not self._backend.shares_pages or sequence.wants_prompt_scores:
            return False
        if sequence.num_computed == len(task.table.numbers) * self._backend.page_tokens:
            # What others have computed since it became active.
            self._pool.close(task.table)
            task.table = self._open(task)
            sequence.num_computed = len(task.table.numbers) * self._backend.page_tokens
        key = self._pool.next_key(task.table, sequence.ids)
        if key is None or task.num_left <= self._backend.page_tokens:
            return False
        if key in begun:
            return True
        begun.add(key)
        return False

    def _make_room(self, number: int, num_tokens: int, planned: Collection[int]) -> bool:
        """Give a request pages, if need be those of one that comes after all others; False if it
        had to give up its own."""
        table = self._tasks[number].table
        while not self._pool.extend(table, num_tokens):
            with self._lock:
                order = self._queue.order()
            last = next(other for other in reversed(order) if other not in planned)
            self._preempt(last)
            if last == number:
                return False
        return True

    def _preempt(self, number: int) -> None:
        task = self._tasks[number]
        self._pool.close(task.table)
        task.memory.cache = None
        task.sequence.num_computed = 0
        self._num_preempted += 1
        with self._lock:
            self._queue.put_back(number)

    def _charge_prompt(self, number: int, task: Task) -> None:
        """Take into account what was computed of a prompt for the first time."""
        computed = min(task.sequence.num_computed, task.sequence.input_tokens)
        if (rows := computed - task.num_charged) > 0:
            task.num_charged = computed
            self._charge(number, task, rows, rows * self._meter.rates.prompt_cost)

    def _charge(self, number: int, task: Task, num_tokens: int, cost: float) -> None:
        with self._lock:
            self._queue.charge(number, cost)
            self._served[class_of(task.request.owner)] += num_tokens

    def _accept(self, number: int, part: Part, scores: Scores) -> None:
        """Draw a request's next token, once all before it is computed, and deliver what comes."""
        task = self._tasks[number]
        if task.cancelled:
            return
        try:
            if task.sequence.wants_prompt_scores and task.sequence.output_tokens == 0:
                task.sequence.read_prompt(scores, part.first_position)
            event = None
            if not task.num_left:
                event = task.sequence.accept(scores)
                self._note_token(task)
                self._charge(number, task, 1, 1.0)
            if event is not None:
                task.deliver(event)
        except Exception as error:
            self._fail(number, self._explain(task, error))
            return
        if isinstance(event, Generation):
            self._end(number)

    def _note_token(self, task: Task) -> None:
        now = time.monotonic()
        if task.last_token is None:
            self._first_token_seconds.add(now - task.started)
        else:
            self._token_seconds.add(now - task.last_token)
        task.last_token = now

    def _explain(self, task: Task, error: Exception) -> ApiError:
        """Return what the client is told; the rest is in the log."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, ModelError):
            logger.error("the custom model %s cannot be used: %s", task.request.adapter, error)
            return unusable()
        logger.error("a request failed", exc_info=error)
        return ModelErrorException("The model failed on this request; the server's log says why.")

    def _fail(self, number: int, error: ApiError) -> None:
        _deliver_last(self._tasks[number], error)
        self._end(number)

    def _end(self, number: int) -> None:
        with self._lock:
            task = self._tasks.pop(number)
            if number in self._queue:
                self._queue.leave(number)
            self._pool.close(task.table)
            self._num_requests += 1
            self._input_tokens += task.sequence.input_tokens
            self._output_tokens += task.sequence.output_tokens
            self._last_used = time.monotonic()

    def _end_all(self) -> None:
        with self._lock:
            tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            if not task.cancelled:
                _deliver_last(task, _ending())


def open_backend(
    folder: Path,
    *,
    threads: int,
    dtype: torch.dtype | None = None,
    precision: str = "auto",
    max_adapter_bytes: int = MAX_ADAPTER_BYTES,
    max_page_bytes: int = MAX_PAGE_BYTES,
    kept: KeptMatrices | None = None,
) -> Backend:
    """Return what computes the model of a folder fastest on this machine.

    Args:
        precision: what the compiled pass holds matrices in; torch holds them in `dtype`.
        max_page_bytes: for keys and values of all sequences, where they lie in pages; one of the
            longest always fits.
        kept: where the compiled pass keeps packed matrices.
    Raises:
        ModelError: the folder's weights cannot be used.
    """
    if can_be_paged(folder, dtype):
        return PagedBackend(
            folder,
            threads=threads,
            precision=precision,
            max_adapter_bytes=max_adapter_bytes,
            max_page_bytes=max_page_bytes,
            kept=kept,
        )
    if precision in FEW_BITS:
        logger.warning(
            "serve_weights is %s, but the compiled pass does not cover %s on this machine: it is "
            "served by torch, with its weights as they are",
            *(precision, folder.name),
        )
    return PlainBackend(folder, threads=threads, dtype=dtype, max_adapter_bytes=max_adapter_bytes)


def _deliver_last(task: Task, error: ApiError) -> None:
    """Deliver a request's error; one that takes no events must not end the engine's thread."""
    try:
        task.deliver(error)
    except Exception:
        logger.exception("an error could not be delivered: %s", error)


def _ending() -> ApiError:
    return ServiceUnavailableException("The model server is ending. Try again.")


def _displaced() -> ApiError:
    return ThrottlingException(
        "Too many requests of this account are waiting for this model. Please wait before trying "
        "again.",
        members={"retryAfterSeconds": RETRY_SECONDS},
    )


def unusable() -> ApiError:
    """Return the error for a custom model whose artifact cannot be used."""
    # The details hold paths of this machine; they are in the log.
    return ModelErrorException(
        "The weights of the custom model cannot be used: they are missing, changed or damaged, or "
        "do not fit the base model. The model server's log says which."
    )
