"""The engine: requests in, events out, on one model and the adapters that belong to it.

`Engine` is the seam: the server knows nothing else, so another engine can stand behind it.
`TorchEngine` is the plain one: one thread, every request with a cache of its own, a few tokens of
each in turn. There is no batching, so an answer never depends on what else is asked.

A request's life: (1) `submit` renders the prompt in the caller's thread and refuses what does not
fit; (2) it waits in a bounded queue, first come first served; (3) it becomes active when there is
room in memory; (4) active requests take turns; (5) events go to `deliver`, from the engine's
thread; the last is a Generation or an error. A cancelled request gets no further event.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

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
from outcrop.serve.adapters import MAX_ADAPTER_BYTES, Adapters
from outcrop.serve.network import load_network
from outcrop.serve.prompt import fit_prompt, render_prompt
from outcrop.serve.request import Event, Generation, GenerationRequest
from outcrop.serve.sequence import TokenSequence

logger = logging.getLogger("outcrop.model-server")

Deliver = Callable[[Event], None]

MAX_WAITING = 64
"""Requests that may wait; the next one is told to try again."""
MAX_ACTIVE = 8
MAX_ACTIVE_TOKENS = 32_768
"""Prompts and answers of all active requests together: 750 MB of cache for the shipped model."""
TURN_STEPS = 8
"""Steps of one request before the next has its turn; changing the adapter costs about one."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done and is doing."""

    num_active: int
    num_waiting: int
    num_requests: int
    """Finished in any way since the start, cancelled ones included."""
    input_tokens: int
    output_tokens: int
    num_adapters: int
    """Adapters in memory."""
    adapter_bytes: int
    num_adapter_loads: int
    idle_seconds: float
    """Since the last request ended; 0 while there is one."""


class Engine(Protocol):
    """What a model server needs of an engine. Every method may be called from any thread."""

    def submit(self, request: GenerationRequest, deliver: Deliver) -> int:
        """Take a request and return its number; events follow from another thread.

        Raises:
            ValidationException: the prompt and the answer do not fit the context.
            ThrottlingException: too many requests are waiting.
        """

    def cancel(self, number: int) -> None:
        """Give up a request before its next token; one that has ended is left alone."""

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Return how many tokens the prompt has.

        Raises:
            ValidationException: the messages cannot be rendered.
        """

    def stats(self) -> EngineStats:
        """Return the figures of this moment."""

    def close(self) -> None:
        """End all requests with an error, and the engine."""


class _Task:
    """A request inside the engine."""

    def __init__(
        self, request: GenerationRequest, sequence: TokenSequence, deliver: Deliver
    ) -> None:
        self.request, self.sequence, self.deliver = request, sequence, deliver
        self.started = time.monotonic()
        self.cancelled = False

    @property
    def max_context_tokens(self) -> int:
        return self.sequence.input_tokens + self.sequence.max_tokens

    def is_late(self) -> bool:
        limit = self.request.timeout_seconds
        return limit is not None and time.monotonic() - self.started > limit


class TorchEngine:
    """The plain engine on torch; see the module's text for how it works."""

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        dtype: torch.dtype | None = None,
        max_waiting: int = MAX_WAITING,
        max_adapter_bytes: int = MAX_ADAPTER_BYTES,
    ) -> None:
        """Load the model and start the thread.

        Args:
            folder: the base model's, in Hugging Face's layout.
            threads: that torch computes with.
        Raises:
            ModelError: the folder's weights or tokenizer cannot be used.
        """
        self.renderer = Renderer(folder)
        network = load_network(folder, dtype)
        self.max_context = network.max_context
        self._adapters = Adapters(network, dtype=dtype, max_bytes=max_adapter_bytes)
        self._threads = threads
        self._max_waiting = max_waiting
        self._lock = threading.Condition()
        self._numbers = count(1)
        self._tasks: dict[int, _Task] = {}
        self._waiting: deque[int] = deque()
        self._active: deque[int] = deque()
        self._closing = False
        self._num_requests = self._input_tokens = self._output_tokens = 0
        self._last_used = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> int:
        """See `Engine.submit`."""
        sampling = request.sampling
        with self._lock:
            self._check_room()
        prompt_ids, max_tokens = fit_prompt(
            self.renderer, request.messages, sampling, self.max_context
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
                num_adapters=self._adapters.num_kept,
                adapter_bytes=self._adapters.num_bytes,
                num_adapter_loads=self._adapters.num_loaded,
                idle_seconds=idle,
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
        # OpenMP holds the number of threads for each thread that starts work.
        torch.set_num_threads(self._threads)
        while True:
            with self._lock:
                while not (self._closing or self._waiting or self._active):
                    self._lock.wait()
                if self._closing:
                    break
                self._admit()
                number = self._active.popleft()
                task = self._tasks[number]
            done = self._turn(task)
            with self._lock:
                if done:
                    self._end(number, task)
                else:
                    self._active.append(number)
        self._end_all()

    def _admit(self) -> None:
        """Move waiting requests to the active ones, in order, while there is room."""
        tokens = sum(self._tasks[number].max_context_tokens for number in self._active)
        while self._waiting and len(self._active) < MAX_ACTIVE:
            tokens += self._tasks[self._waiting[0]].max_context_tokens
            if self._active and tokens > MAX_ACTIVE_TOKENS:
                return
            self._active.append(self._waiting.popleft())

    def _turn(self, task: _Task) -> bool:
        """Run some steps of a request; returns whether it has ended."""
        try:
            network = self._adapters.use(task.request.adapter)
            for _ in range(TURN_STEPS):
                if task.cancelled:
                    return True
                if task.is_late():
                    raise ModelTimeoutException(
                        f"The model did not finish within {task.request.timeout_seconds:g} s; it "
                        f"had written {task.sequence.output_tokens} tokens. Ask for fewer tokens."
                    )
                event = task.sequence.step(network)
                if event is not None:
                    task.deliver(event)
                if isinstance(event, Generation):
                    return True
        except ApiError as error:
            _deliver_last(task, error)
            return True
        except ModelError as error:
            logger.error("the custom model %s cannot be used: %s", task.request.adapter, error)
            _deliver_last(task, _unusable())
            return True
        # Whatever a library raises on one request: the thread that ends with it answers all others.
        except Exception:
            logger.exception("a request failed")
            _deliver_last(
                task,
                ModelErrorException("The model failed on this request; the server's log says why."),
            )
            return True
        return False

    def _end(self, number: int, task: _Task) -> None:
        del self._tasks[number]
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
        "The weights of the custom model cannot be used: they are missing, damaged or do not fit "
        "the base model. The model server's log says which."
    )
