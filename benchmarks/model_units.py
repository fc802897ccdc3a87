"""What a model unit is worth while four other accounts ask for as much as they can.

    python -m benchmarks.model_units [--weights FOLDER] [--threads 2] [--seconds 25]

The engine runs in this process, as in a model server, without socket and gateway. Each client asks
again as soon as it is answered. Four accounts have 32 clients each, with answers of 64 tokens; a
fifth has prompts and answers of 64 tokens, first on demand, then with model units. Of the rate
count answers and prompts, these at their cost. A throttled client waits for as long as it is told.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from benchmarks.outcrop_serving import cut
from benchmarks.running import write_result
from benchmarks.serving_work import draw_words
from benchmarks.training_work import shipped_weights

from outcrop.data.records import Message
from outcrop.errors import ThrottlingException
from outcrop.serve.engine import BatchEngine
from outcrop.serve.fairness import Limits
from outcrop.serve.rate import RateMeter, measure_rates
from outcrop.serve.request import Event, Generation, GenerationRequest, Owner, SamplingParams

ANSWER_TOKENS = 64
FLOOD = [Owner(f"account {number}", "base") for number in range(4)]
CLIENTS = 32


@dataclass
class Account:
    """What one account saw."""

    tokens: int = 0
    first_seconds: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    throttled: int = 0
    prompt_tokens: int = 0


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, help="default: the shipped model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of the flood")
    options = parser.parse_args()
    folder = shipped_weights(options.weights)
    meter = RateMeter()
    engine = BatchEngine(folder, threads=options.threads, limits=Limits(), meter=meter)
    engine.renderer.end_token_ids = ()  # so that every answer has its full length
    found = measure_rates(engine._backend, engine._pool, Limits().slots, stop=lambda: False)
    assert found is not None
    meter.rates = found
    rows = [
        (
            "beside the flood",
            "its answers, tokens a second",
            "of the rate",
            "first token, median s",
            "between tokens, 95 % below s",
            "throttled",
            "each account of the flood, tokens a second",
        )
    ]
    for name, owner, clients in (
        ("a fifth account on demand", Owner("fifth", "base"), CLIENTS),
        ("1 unit of 2", Owner("fifth", "base", "one", 1), CLIENTS),
        ("2 units of 2", Owner("fifth", "base", "two", 2), 2 * CLIENTS),
    ):
        accounts = run(engine, owner, clients, options.seconds, options.prompt_tokens)
        fifth = accounts.pop(owner.account)
        rate = fifth.tokens / options.seconds
        cost = rate + found.prompt_cost * fifth.prompt_tokens / options.seconds
        others = [account.tokens / options.seconds for account in accounts.values()]
        rows.append(
            (
                f"{name}, {clients} clients",
                f"{rate:.0f}",
                f"{cost / found.tokens_per_second:.0%}",
                f"{statistics.median(fifth.first_seconds or [0.0]):.2f}",
                f"{percentile(fifth.gaps, 0.95):.2f}",
                str(fifth.throttled),
                f"{min(others):.0f} to {max(others):.0f}",
            )
        )
        print(rows[-1], flush=True)
    engine.close()
    write_result(
        "model_units",
        f"The engine alone, {options.threads} threads, {options.seconds:g} s a row, of which the "
        "first fifth is not counted. The rate of full batches was measured before: "
        f"{found.tokens_per_second:.0f} tokens a second of answers, "
        f"{found.prompt_tokens_per_second:.0f} of prompts.",
        rows,
        f"The accounts of the flood had 32 clients each, prompts of {options.prompt_tokens} tokens "
        "and answers of 64. "
        "What the other work on the machine took is in the load average.",
    )


def run(
    engine: BatchEngine, owner: Owner, clients: int, seconds: float, flood_tokens: int
) -> dict[str, Account]:
    """Let all clients ask for so long, and return what each account saw."""
    seeds = random.Random(0)
    accounts = {one.account: Account() for one in (*FLOOD, owner)}
    begin = time.perf_counter() + seconds / 5
    end = begin + seconds
    numbers = count(10**6)
    left = threading.Semaphore(0)
    lock = threading.Lock()

    def client(one: Owner, prompts: list[str]) -> None:
        for number in range(10**6):
            if time.perf_counter() > end or not ask(one, prompts[number % len(prompts)]):
                break
        left.release()

    def ask(one: Owner, prompt: str) -> bool:
        account = accounts[one.account]
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
        unique = f"{next(numbers)} {prompt}"  # so that nothing is taken over from another prompt
        request = GenerationRequest((Message("user", unique),), sampling, owner=one)
        over = threading.Event()
        asked = time.perf_counter()
        try:
            number = engine.submit(request, taker(account, asked, over))
        except ThrottlingException as error:
            with lock:
                account.throttled += 1
            wait = error.members["retryAfterSeconds"]
            assert isinstance(wait, float)
            time.sleep(min(wait, max(0.0, end - time.perf_counter())))
            return True
        if not over.wait(max(0.0, end - time.perf_counter())):
            engine.cancel(number)
            return False
        return True

    def taker(account: Account, asked: float, over: threading.Event) -> Callable[[Event], None]:
        last = [asked, 0.0]  # when its last token came, and how many have come

        def take(event: Event) -> None:
            now = time.perf_counter()
            if isinstance(event, Exception):
                over.set()
                return
            if begin < now < end:
                account.tokens += event.output_tokens - int(last[1])
                times = account.gaps if last[1] else account.first_seconds
                times.append(now - last[0])
                account.prompt_tokens += 0 if last[1] else event.input_tokens
            last[0], last[1] = now, event.output_tokens
            if isinstance(event, Generation):
                over.set()

        return take

    threads = []
    for one, length, how_many in (
        *((each, flood_tokens, CLIENTS) for each in FLOOD),
        (owner, 64, clients),
    ):
        prompts = [cut(engine, draw_words(seeds, length), length) for _ in range(16)]
        for number in range(how_many):
            turned = prompts[number % 16 :] + prompts[: number % 16]
            threads.append(threading.Thread(target=client, args=(one, turned)))
    for thread in threads:
        thread.start()
    for _ in threads:
        left.acquire()
    for thread in threads:
        thread.join()
    while engine.stats().num_active or engine.stats().num_waiting:
        time.sleep(0.05)
    return accounts


def percentile(values: list[float], part: float) -> float:
    """Return the value below which so large a part of them is."""
    return sorted(values)[int(part * (len(values) - 1))] if values else 0.0


if __name__ == "__main__":
    main()
