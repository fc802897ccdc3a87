"""The engine: requests in, events out, on one model and the custom models that belong to it.

The seam is `interface.Engine`: the server knows nothing else, so another engine can stand there.
`BatchEngine` is ours: one thread, whose passes take all active requests together, each with its own
custom model. What computes a pass is a backend (`backend.py`).

A request's life: (1) `submit` renders the prompt in the caller's thread and refuses what does not
fit; (2) it waits in a bounded queue, first come first served; (3) it becomes active when its custom
model and its first pages have room; (4) each pass takes a part of its prompt, or its newest token;
(5) events go to `deliver`, from the engine's thread; the last is a Generation or an error. A
cancelled request gets no further event. Where pages run out, the youngest request gives its own
back and waits again; what it had is computed anew, to the same numbers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from outcrop.data.records import Message
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
from outcrop.serve.backend import Backend, Memory, Part, Scores
from outcrop.serve.histogram import Histogram
from outcrop.serve.interface import Deliver, EngineStats
from outcrop.serve.paged import MAX_PAGE_BYTES, PagedBackend, can_be_paged
from outcrop.serve.pages import PagePool, PageTable
from outcrop.serve.plain import PlainBackend
from outcrop.serve.prompt import check_prompt, fit_prompt, render_prompt
from outcrop.serve.request import Generation, GenerationRequest
from outcrop.serve.sequence import TokenSequence

logger = logging.getLogger("outcrop.model-server")

MAX_WAITING = 256
"""Requests that may wait; the next one is told to try again."""
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Bounds of the histograms."""
MAX_ACTIVE = 64
"""Requests that are answered at the same time."""


class _Task:
    """A request inside the engine."""

    def __init__(
        self, request: GenerationRequest, sequence: TokenSequence, deliver: Deliver
    ) -> None:
        self.request, self.sequence, self.deliver = request, sequence, deliver
        self.started = time.monotonic()
        self.last_token: float | None = None
        self.cancelled = False
        self.table = PageTable()
        self.memory = Memory()

    @property
    def scope(self) -> bytes:
        """What its keys and values depend on beside its tokens."""
        return f"of {self.request.adapter or 'the base'}".encode()

    @property
    def num_left(self) -> int:
        """Tokens that are to be computed before the next one can be drawn."""
        return len(self.sequence.ids) - self.sequence.num_computed

    def num_scores(self, length: int) -> int:
        """Return of how many of its next tokens the scores are wanted."""
        if self.sequence.wants_prompt_scores and self.sequence.output_tokens == 0:
            return length
        return int(length == self.num_left)

    def is_late(self) -> bool:
        limit = self.request.timeout_seconds
        return limit is not None and time.monotonic() - self.started > limit


class BatchEngine:
    """Our engine; see the module's text for how it works."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        dtype: torch.dtype | None = None,
        max_waiting: int = MAX_WAITING,
        max_adapter_bytes: int = MAX_ADAPTER_BYTES,
        backend: Backend | None = None,
    ) -> None:
        """Load the model and start the thread.

        Args:
            folder: the base model's, in Hugging Face's layout.
            threads: that a pass computes with.
            dtype: of the weights; None takes this machine's fastest.
            backend: what computes; None takes the compiled pass where it covers the model.
        Raises:
            ModelError: the folder's weights or tokenizer cannot be used.
        """
        self.renderer = Renderer(folder)
        self._backend = backend or open_backend(
            folder, threads=threads, dtype=dtype, max_adapter_bytes=max_adapter_bytes
        )
        self.max_context = self._backend.max_context
        self._pool = PagePool(
            self._backend.num_pages,
            self._backend.page_tokens,
            shares=self._backend.shares_pages,
        )
        self._max_waiting = max_waiting
        self._lock = threading.Condition()
        self._numbers = count(1)
        self._tasks: dict[int, _Task] = {}
        self._waiting: deque[int] = deque()
        self._active: list[int] = []
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
        sampling = request.sampling
        with self._lock:
            self._check_room()
        if request.prompt is None:
            prompt_ids, max_tokens = fit_prompt(
                self.renderer, request.messages, sampling, self.max_context
            )
        else:
            prompt_ids, max_tokens = check_prompt(
                self.renderer,
                request.prompt,
                sampling,
                self.max_context,
                self._backend.vocabulary,
            )
        if max(prompt_ids) >= self._backend.vocabulary:
            raise ModelErrorException(
                f"The tokenizer gives tokens up to {max(prompt_ids)}, but the model knows only "
                f"{self._backend.vocabulary}."
            )
        sequence = TokenSequence(
            prompt_ids, sampling, max_tokens, self.renderer.end_token_ids, self.renderer.tokenizer
        )
        with self._lock:
            self._check_room()
            number = next(self._numbers)
            self._tasks[number] = _Task(request, sequence, deliver)
            self._waiting.append(number)
            self._lock.notify()
        return number

    def cancel(self, number: int) -> None:
        """See `Engine.cancel`."""
        with self._lock:
            if task := self._tasks.get(number):
                task.cancelled = True

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """See `Engine.count_tokens`."""
        return len(render_prompt(self.renderer, messages, self.max_context))

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._lock:
            idle = 0.0 if self._tasks else time.monotonic() - self._last_used
            return EngineStats(
                num_active=len(self._tasks) - len(self._waiting),
                num_waiting=len(self._waiting),
                num_requests=self._num_requests,
                input_tokens=self._input_tokens,
                output_tokens=self._output_tokens,
                num_adapters=self._backend.num_adapters,
                adapter_bytes=self._backend.adapter_bytes,
                num_adapter_loads=self._backend.num_loads,
                num_passes=self._num_passes,
                prefix_tokens=self._pool.tokens_taken_over,
                num_preempted=self._num_preempted,
                num_pages=self._pool.num_pages,
                num_pages_kept=self._pool.num_kept,
                num_pages_free=self._pool.num_available - self._pool.num_kept,
                idle_seconds=idle,
                first_token_seconds=self._first_token_seconds.counts(),
                token_seconds=self._token_seconds.counts(),
                pass_tokens=self._pass_tokens.counts(),
            )

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join()

    def _check_room(self) -> None:
        if self._closing:
            raise _ending()
        if len(self._waiting) >= self._max_waiting:
            raise ThrottlingException(
                f"Too many requests: {len(self._waiting)} are waiting for this model. "
                "Please wait before trying again."
            )

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._closing or self._waiting or self._active):
                    self._lock.wait()
                if self._closing:
                    break
            self._drop_what_ended()
            self._admit()
            self._pass()
        self._end_all()
        self._backend.close()

    def _drop_what_ended(self) -> None:
        """End requests that were cancelled or whose time is up, waiting ones included."""
        for number, task in list(self._tasks.items()):
            if task.cancelled:
                self._end(number)
            elif task.is_late():
                self._fail(
                    number,
                    ModelTimeoutException(
                        f"The model did not finish within {task.request.timeout_seconds:g} s; it "
                        f"had written {task.sequence.output_tokens} tokens. Ask for fewer tokens."
                    ),
                )

    def _admit(self) -> None:
        """Move waiting requests to the active ones, in order, while there is room."""
        while self._waiting and len(self._active) < MAX_ACTIVE:
            number = self._waiting[0]
            task = self._tasks[number]
            in_use = {
                artifact
                for other in self._active
                if (artifact := self._tasks[other].request.adapter) is not None
            }
            try:
                request = task.request
                is_loaded = self._backend.load(request.adapter, in_use, request.adapter_digest)
                if not is_loaded and self._active:
                    return
            except Exception as error:
                self._fail(number, self._explain(task, error))
                continue
            ids = task.sequence.ids
            task.table = self._open(task)
            if self._active and not self._has_room(task, len(ids)):
                self._pool.close(task.table)
                return
            task.sequence.num_computed = len(task.table.numbers) * self._backend.page_tokens
            with self._lock:
                self._waiting.popleft()
                self._active.append(number)

    def _open(self, task: _Task) -> PageTable:
        """Return the pages that a request takes over."""
        if task.sequence.wants_prompt_scores:
            return PageTable(scope=task.scope)
        return self._pool.open(task.scope, task.sequence.ids)

    def _has_room(self, task: _Task, num_tokens: int) -> bool:
        """Whether there is a page for each active request beside those of a new one."""
        more = -(-num_tokens // self._backend.page_tokens) - len(task.table.numbers)
        return more + len(self._active) <= self._pool.num_available

    def _pass(self) -> None:
        """Compute the newest token of each answer, and as much of the prompts as fits beside."""
        numbers, parts = self._plan()
        if not parts:
            return
        self._num_passes += 1
        self._pass_tokens.add(sum(len(part.token_ids) for part in parts))
        try:
            found = self._backend.run(parts)
        # Whatever a library raises: the thread that ends with it answers all others.
        except Exception as error:
            found = [error] * len(parts)
        for number, part, scores in zip(numbers, parts, found, strict=True):
            task = self._tasks[number]
            if isinstance(scores, Exception):
                self._fail(number, self._explain(task, scores))
                continue
            task.sequence.num_computed += len(part.token_ids)
            self._pool.record(task.table, task.sequence.ids[: task.sequence.num_computed])
            if scores is not None:
                self._accept(number, part, scores)

    def _plan(self) -> tuple[list[int], list[Part]]:
        """Return who takes part in the next pass, and with which tokens."""
        numbers: list[int] = []
        parts: list[Part] = []
        for number, length in self._share_pass():
            if number not in self._active:  # it gave its pages to one before it
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
        """Return how many tokens of whom the next pass takes: answers first, then prompts."""
        tasks = {number: self._tasks[number] for number in self._active}
        answers = [number for number, task in tasks.items() if task.num_left == 1]
        begun: set[bytes] = set()
        prompts = [
            number
            for number, task in tasks.items()
            if task.num_left > 1 and not self._waits_for_another(task, begun)
        ]
        lengths = share_room(
            [tasks[number].num_left for number in prompts],
            self._backend.max_rows - len(answers),
        )
        return [
            *((number, 1) for number in answers),
            *((number, length) for number, length in zip(prompts, lengths, strict=True) if length),
        ]

    def _waits_for_another(self, task: _Task, begun: set[bytes]) -> bool:
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

    def _make_room(self, number: int, num_tokens: int, planned: Sequence[int]) -> bool:
        """Give a request pages, if need be the youngest's; False if it had to give up its own."""
        table = self._tasks[number].table
        while not self._pool.extend(table, num_tokens):
            youngest = next(other for other in reversed(self._active) if other not in planned)
            self._preempt(youngest)
            if youngest == number:
                return False
        return True

    def _preempt(self, number: int) -> None:
        task = self._tasks[number]
        self._pool.close(task.table)
        task.memory.cache = None
        task.sequence.num_computed = 0
        self._num_preempted += 1
        with self._lock:
            self._active.remove(number)
            self._waiting.appendleft(number)

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
            if event is not None:
                task.deliver(event)
        except Exception as error:
            self._fail(number, self._explain(task, error))
            return
        if isinstance(event, Generation):
            self._end(number)

    def _note_token(self, task: _Task) -> None:
        now = time.monotonic()
        if task.last_token is None:
            self._first_token_seconds.add(now - task.started)
        else:
            self._token_seconds.add(now - task.last_token)
        task.last_token = now

    def _explain(self, task: _Task, error: Exception) -> ApiError:
        """Return what the client is told; the rest is in the log."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, ModelError):
            logger.error("the custom model %s cannot be used: %s", task.request.adapter, error)
            return _unusable()
        logger.error("a request failed", exc_info=error)
        return ModelErrorException("The model failed on this request; the server's log says why.")

    def _fail(self, number: int, error: ApiError) -> None:
        _deliver_last(self._tasks[number], error)
        self._end(number)

    def _end(self, number: int) -> None:
        with self._lock:
            task = self._tasks.pop(number)
            if number in self._active:
                self._active.remove(number)
            else:
                self._waiting.remove(number)
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


def share_room(lengths: Sequence[int], room: int) -> list[int]:
    """Share a pass's rows among prompts: the shortest are done first, the oldest never waits.

    Args:
        lengths: tokens that are left of each prompt, the oldest first.
        room: rows for all of them.
    """
    shares = [0] * len(lengths)
    if lengths:
        shares[0] = min(lengths[0], -(-room // 4))
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        shares[place] += min(lengths[place] - shares[place], room - sum(shares))
    return shares


def open_backend(
    folder: Path,
    *,
    threads: int,
    dtype: torch.dtype | None = None,
    max_adapter_bytes: int = MAX_ADAPTER_BYTES,
    max_page_bytes: int = MAX_PAGE_BYTES,
) -> Backend:
    """Return what computes the model of a folder fastest on this machine.

    Args:
        max_page_bytes: for keys and values of all sequences, where they lie in pages; one of the
            longest always fits.
    Raises:
        ModelError: the folder's weights cannot be used.
    """
    if can_be_paged(folder, dtype):
        return PagedBackend(
            folder,
            threads=threads,
            max_adapter_bytes=max_adapter_bytes,
            max_page_bytes=max_page_bytes,
        )
    return PlainBackend(folder, threads=threads, dtype=dtype, max_adapter_bytes=max_adapter_bytes)


def _deliver_last(task: _Task, error: ApiError) -> None:
    """Deliver a request's error; one that takes no events must not end the engine's thread."""
    try:
        task.deliver(error)
    except Exception:
        logger.exception("an error could not be delivered: %s", error)


def _ending() -> ApiError:
    return ServiceUnavailableException("The model server is ending. Try again.")


def _unusable() -> ApiError:
    # The details hold paths of this machine; they are in the log.
    return ModelErrorException(
        "The weights of the custom model cannot be used: they are missing, changed or damaged, or "
        "do not fit the base model. The model server's log says which."
    )
