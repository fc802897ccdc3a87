"""vLLM behind the seam `interface.Engine`: base models and adapters on a GPU.

What vLLM is asked is tokens in, tokens out. Prompts are rendered by our own renderer, so that
training and serving are one template, and texts, stop sequences and ends of answers are found by
`sequence.py`, as in our own engine. vLLM schedules, batches requests of different adapters, keeps
pages and shares prefixes. It runs as AsyncLLM in this process, its event loop in a thread of its
own; its engine is a child process that it starts and ends.

Source: vLLM's documentation, "AsyncLLM", "SamplingParams", "LoRA adapters".
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

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
from outcrop.models.artifact import check_digest, read_artifact
from outcrop.models.files import read_json
from outcrop.models.lora import load_adapter
from outcrop.models.operator import context_tokens
from outcrop.models.tokenizer import Tokenizer
from outcrop.serve.backend import Scores
from outcrop.serve.engine import SECONDS, TOKENS, unusable
from outcrop.serve.fairness import BATCH, ON_DEMAND, PROVISIONED, class_of
from outcrop.serve.histogram import Counts, Histogram
from outcrop.serve.interface import Deliver, EngineStats
from outcrop.serve.prompt import encode_prompt, fit_request, render_prompt
from outcrop.serve.request import Generation, GenerationRequest, SamplingParams, TokenLogprob
from outcrop.serve.sequence import TokenSequence
from outcrop.serve.vllm_library import MAX_ADAPTERS_KEPT, Library

logger = logging.getLogger("outcrop.model-server")

PRIORITIES = {PROVISIONED: 0, ON_DEMAND: 1, BATCH: 2}
"""Of two requests that wait, vLLM takes the one with the lower number."""
MAX_WAITING = 256
"""Requests that may wait for their first token; the next one is told to try again."""
START_SECONDS = 1800.0
"""A first start compiles for minutes."""


@dataclass
class _Task:
    request: GenerationRequest
    sequence: TokenSequence
    deliver: Deliver
    started: float = field(default_factory=time.monotonic)
    last_token: float | None = None
    running: asyncio.Task[None] | None = None
    cancelled: bool = False


class VllmEngine:
    """See the module's text; takes the base and its adapters, not models with other weights."""

    def __init__(
        self,
        folder: Path,
        open_library: Callable[[], Library],
        *,
        max_rank: int,
        max_waiting: int = MAX_WAITING,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """Start vLLM.

        Args:
            folder: the base model's, in Hugging Face's layout.
            open_library: called once, inside the event loop.
            max_rank: the greatest rank of an adapter that vLLM was started for.
            max_waiting: requests that may be under way without a first token.
            on_death: called once if vLLM's process has died: all requests fail from then on.
        Raises:
            ModelError: the folder cannot be used, or vLLM does not start on it.
        """
        self.renderer = Renderer(folder)
        config = read_json(folder / "config.json")
        self.max_context = context_tokens(folder, config)
        self._vocabulary = int(config["vocab_size"])
        self._max_rank, self._max_waiting, self._on_death = max_rank, max_waiting, on_death
        self._lock = threading.Lock()
        self._numbers, self._adapter_numbers = count(1), count(1)
        self._tasks: dict[int, _Task] = {}
        self._adapters: dict[str, asyncio.Future[Any]] = {}
        self._closing = False
        self._num_requests = self._input_tokens = self._output_tokens = 0
        self._adapter_bytes = self._num_loads = self._prefix_tokens = 0
        self._last_used = time.monotonic()
        self._first_token_seconds, self._token_seconds = Histogram(SECONDS), Histogram(SECONDS)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            opening = asyncio.run_coroutine_threadsafe(_call(open_library), self._loop)
            self._library = opening.result(START_SECONDS)
        except Exception as error:
            self._stop_loop()
            raise ModelError(
                f"vLLM does not start on {folder}: {type(error).__name__}: {error}. Set "
                "serve_engine to own to serve it without vLLM."
            ) from error

    def takes(self, artifact: str | None) -> bool:
        """Return whether vLLM can answer for a custom model: an adapter of no more than its rank.

        Raises:
            ModelError: the artifact cannot be read.
        """
        if artifact is None:
            return True
        found = read_artifact(Path(artifact))
        if found.weights is not None or found.adapter is None:
            return False
        described = read_json(found.adapter / "adapter_config.json")
        rank = described.get("r")
        is_plain = not described.get("fan_in_fan_out")
        return is_plain and isinstance(rank, int) and rank <= self._max_rank

    def submit(self, request: GenerationRequest, deliver: Deliver) -> int:
        """See `Engine.submit`."""
        with self._lock:
            self._check_room()
        ids, max_tokens = fit_request(self.renderer, request, self.max_context, self._vocabulary)
        # Log-probabilities are vLLM's, so the sequence has no scores of its own to tell them by.
        sampling = replace(request.sampling, logprobs=False, prompt_logprobs=False)
        sequence = TokenSequence(
            *(ids, sampling, max_tokens, self.renderer.end_token_ids),
            *(self.renderer.tokenizer, request.shown),
        )
        with self._lock:
            self._check_room()
            number = next(self._numbers)
            self._tasks[number] = _Task(request, sequence, deliver)
        self._loop.call_soon_threadsafe(self._start, number)
        return number

    def cancel(self, number: int) -> None:
        """See `Engine.cancel`."""
        with self._lock:
            task = self._tasks.get(number)
            if task is None:
                return
            task.cancelled = True
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: task.running and task.running.cancel())

    def count_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: str | None = None
    ) -> int:
        """See `Engine.count_tokens`."""
        if prompt is not None:
            return len(encode_prompt(self.renderer, prompt, self.max_context, spells_control=True))
        return len(render_prompt(self.renderer, messages, self.max_context, tools))

    def stats(self) -> EngineStats:
        """See `Engine.stats`; what vLLM alone knows is read from its own metrics."""
        figures = self._library.figures()
        passes = figures.get("vllm:iteration_tokens_total")
        used = float(figures.get("vllm:kv_cache_usage_perc", 0.0))
        with self._lock:
            waiting = sum(task.last_token is None for task in self._tasks.values())
            idle = 0.0 if self._tasks else time.monotonic() - self._last_used
            return EngineStats(
                num_active=len(self._tasks) - waiting,
                num_waiting=waiting,
                num_requests=self._num_requests,
                input_tokens=self._input_tokens,
                output_tokens=self._output_tokens,
                # vLLM does not tell what its weights and pages take.
                base_bytes=0,
                num_own=0,
                own_bytes=0,
                page_bytes=0,
                num_adapters=min(len(self._adapters), MAX_ADAPTERS_KEPT),
                adapter_bytes=self._adapter_bytes,
                num_adapter_loads=self._num_loads,
                num_passes=0 if passes is None else int(passes.count),
                prefix_tokens=self._prefix_tokens,
                num_preempted=int(figures.get("vllm:num_preemptions", 0)),
                num_pages=self._library.num_pages,
                num_pages_kept=0,
                num_pages_free=round(self._library.num_pages * (1 - used)),
                idle_seconds=idle,
                first_token_seconds=self._first_token_seconds.counts(),
                token_seconds=self._token_seconds.counts(),
                pass_tokens=_counts(passes),
            )

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop).result()
        self._library.client.shutdown()
        self._stop_loop()

    def _check_room(self) -> None:
        if self._closing:
            raise _ending()
        waiting = sum(task.last_token is None for task in self._tasks.values())
        if waiting >= self._max_waiting:
            raise ThrottlingException(
                f"Too many requests: {waiting} are waiting for this model. Please wait before "
                "trying again."
            )

    def _start(self, number: int) -> None:
        task = self._tasks[number]
        if self._closing:
            self._fail(number, task, _ending())
        elif task.cancelled:
            self._end(number, task)
        else:
            task.running = self._loop.create_task(self._answer(number, task))

    async def _answer(self, number: int, task: _Task) -> None:
        try:
            async with asyncio.timeout(task.request.timeout_seconds):
                await self._generate(number, task)
        except asyncio.CancelledError:
            if self._closing and not task.cancelled:
                self._deliver(task, _ending())
        except TimeoutError:
            self._deliver(
                task,
                ModelTimeoutException(
                    f"The model did not finish within {task.request.timeout_seconds:g} s; it had "
                    f"written {task.sequence.output_tokens} tokens. Ask for fewer tokens."
                ),
            )
        # Whatever a library raises: others are answered by the same thread.
        except Exception as error:
            self._deliver(task, self._explain(task, error))
        finally:
            self._end(number, task)

    async def _generate(self, number: int, task: _Task) -> None:
        request, sequence = task.request, task.sequence
        artifact = request.adapter
        adapter = None if artifact is None else await self._adapter(artifact, request)
        params = self._library.sampling(
            **sampling_arguments(request.sampling, sequence.max_tokens, self.renderer.end_token_ids)
        )
        told = _Told(self.renderer.tokenizer, request.sampling, sequence)
        answer = self._library.client.generate(
            *({"prompt_token_ids": list(sequence.ids)}, params, str(number)),
            lora_request=adapter,
            priority=PRIORITIES[class_of(request.owner)],
        )
        async with aclosing(answer) as outputs:
            async for output in outputs:
                if task.last_token is None:
                    self._prefix_tokens += output.num_cached_tokens or 0
                if output.prompt_logprobs:
                    told.read_prompt(output.prompt_logprobs)
                completion = output.outputs[0]
                for place, token in enumerate(completion.token_ids):
                    self._note_token(task)
                    told.read_token(
                        token, (completion.logprobs or {}) and completion.logprobs[place]
                    )
                    event = sequence.accept(Scores(_NO_SCORES, [token]))
                    if isinstance(event, Generation):
                        task.deliver(told.put_into(event))
                        return
                    if event is not None:
                        task.deliver(event)
        raise ModelErrorException("The model ended its answer before it was finished.")

    async def _adapter(self, artifact: str, request: GenerationRequest) -> Any:
        """Return vLLM's name for an adapter, which is checked and read when first asked for."""
        known = self._adapters.get(artifact)
        if known is None:
            known = self._adapters[artifact] = self._loop.create_future()
            known.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                known.set_result(await self._read_adapter(artifact, request.adapter_digest))
            except BaseException as error:
                del self._adapters[artifact]  # the next request looks at it again
                if isinstance(error, asyncio.CancelledError):
                    known.cancel()
                else:
                    known.set_exception(error)
                raise
        try:
            return await asyncio.shield(known)
        except asyncio.CancelledError:
            if not known.cancelled():
                raise
            return await self._adapter(artifact, request)  # its first reader went away

    async def _read_adapter(self, artifact: str, digest: str | None) -> Any:
        path = Path(artifact)
        size = await asyncio.to_thread(_checked_bytes, path, digest)
        found = self._library.lora(artifact, next(self._adapter_numbers), artifact)
        try:
            await self._library.client.add_lora(found)
        except Exception as error:
            raise ModelError(f"vLLM cannot use the adapter in {path}: {error}") from error
        self._adapter_bytes += size
        self._num_loads += 1
        logger.info("adapter %s read, %d known", path.parent.name, len(self._adapters))
        return found

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
            return unusable()
        logger.error("a request failed", exc_info=error)
        if getattr(self._library.client, "errored", False):
            died, self._on_death = self._on_death, lambda: None
            died()
        return ModelErrorException("The model failed on this request; the server's log says why.")

    def _deliver(self, task: _Task, error: ApiError) -> None:
        try:
            task.deliver(error)
        except Exception:
            logger.exception("an error could not be delivered: %s", error)

    def _fail(self, number: int, task: _Task, error: ApiError) -> None:
        self._deliver(task, error)
        self._end(number, task)

    def _end(self, number: int, task: _Task) -> None:
        with self._lock:
            self._tasks.pop(number, None)
            self._num_requests += 1
            self._input_tokens += task.sequence.input_tokens
            self._output_tokens += task.sequence.output_tokens
            self._last_used = time.monotonic()

    async def _end_all(self) -> None:
        running = [task.running for task in self._tasks.values() if task.running]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Told:
    """Collects the log-probabilities of a prompt and an answer, in our own form."""

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, sequence: TokenSequence
    ) -> None:
        self._decode, self._sampling, self._sequence = tokenizer.decode, sampling, sequence
        self._prompt: list[TokenLogprob] = []
        self._answer: list[TokenLogprob] = []

    def read_prompt(self, places: Sequence[Mapping[int, Any] | None]) -> None:
        for token, given in zip(self._sequence.ids, places, strict=False):
            self._prompt.append(self._one(token, given or {}))

    def read_token(self, token: int, given: Mapping[int, Any]) -> None:
        if given:
            self._answer.append(self._one(token, given))

    def put_into(self, generation: Generation) -> Generation:
        # The end token is drawn too, and not told.
        shown = generation.output_tokens - (generation.finish_reason == "stop")
        return replace(
            generation,
            logprobs=tuple(self._answer[:shown]) if self._sampling.logprobs else None,
            prompt_logprobs=tuple(self._prompt) if self._sampling.prompt_logprobs else None,
        )

    def _one(self, token: int, given: Mapping[int, Any]) -> TokenLogprob:
        own = given.get(token)
        ranked = sorted(given.items(), key=lambda item: (-item[1].logprob, item[0]))
        top = [(self._decode([other]), float(of.logprob)) for other, of in ranked]
        return TokenLogprob(
            self._decode([token]),
            None if own is None else float(own.logprob),
            tuple(top[: self._sampling.top_logprobs]) if given else (),
        )


def sampling_arguments(
    sampling: SamplingParams, max_tokens: int, end_token_ids: Sequence[int]
) -> dict[str, Any]:
    """Return what vLLM's SamplingParams is made with.

    Stop sequences are not among them: they are found in our own text, in which no character is
    cut. Only our own end tokens end an answer.
    """
    wanted: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or 0,
        "seed": None if sampling.seed is None else sampling.seed % 2**63,
        "max_tokens": max_tokens,
        "stop_token_ids": list(end_token_ids),
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": sampling.top_logprobs if sampling.logprobs else None,
        "prompt_logprobs": sampling.top_logprobs if sampling.prompt_logprobs else None,
    }
    if sampling.top_p == 0 or sampling.top_k == 1:
        # The fewest tokens are one. vLLM takes no top_p of 0.
        wanted |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    return wanted


async def _call(open_library: Callable[[], Library]) -> Library:
    return open_library()


def _checked_bytes(artifact: Path, digest: str | None) -> int:
    """Make sure that an adapter is what was published and whole; returns the bytes of it."""
    check_digest(artifact, digest)
    adapter = load_adapter(artifact)
    return sum(a.nbytes + b.nbytes for a, b in adapter.tensors.values())


def _counts(histogram: Any) -> Counts:
    """Return vLLM's histogram of the tokens of its passes, whose buckets are cumulative."""
    if histogram is None:
        return Histogram(TOKENS).counts()
    bounds = [(float(bound), int(number)) for bound, number in histogram.buckets.items()]
    bounds.sort()
    counts = [
        number - before
        for (_, number), (_, before) in zip(bounds, [(0.0, 0), *bounds], strict=False)
    ]
    return Counts(
        tuple(bound for bound, _ in bounds if bound != float("inf")),
        tuple(counts),
        float(histogram.sum),
    )


def _ending() -> ApiError:
    return ServiceUnavailableException("The model server is ending. Try again.")


_NO_SCORES = torch.empty(0)
