"""Scan chunks in several processes, and hand the results out in the order of the chunks.

The processes are programs of their own (`python -m outcrop.data.pool`) that talk over their
standard input and output. Python's own pools would import the caller's main module again, which a
script without a guard does not survive.

Each has one chunk at work and one that waits, so memory is bounded whatever the file's size.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import IO, Any

from outcrop.data.read import Chunk
from outcrop.data.render import Renderer
from outcrop.data.scanning import Context, Scanned, Scanner
from outcrop.errors import ModelError

AHEAD = 2
"""Chunks under way for each process."""
_SIZE = struct.Struct("<Q")


def scan_in_order(
    chunks: Iterable[Chunk],
    context: Context,
    workers: int,
    renderer: Renderer | None = None,
) -> Iterator[Scanned]:
    """Yield what became of each chunk, in order.

    Args:
        workers: processes beside this one; 0 scans here.
        renderer: that of the context's folder, if it is loaded already.
    Raises:
        ModelError: the tokenizer cannot be used.
    """
    if workers == 0:
        scanner = Scanner(context, renderer)
        for chunk in chunks:
            yield scanner.scan(chunk)
        return
    with _Workers(context, workers) as pool:
        waiting: deque[Future[Scanned]] = deque()
        for chunk in chunks:
            waiting.append(pool.scan(chunk))
            while len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Workers:
    """Some processes, and a thread for each that speaks with it."""

    def __init__(self, context: Context, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="check")
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", "outcrop.data.pool"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.append(process)
            self._free.put(process)
        for process in self._processes:
            assert process.stdin is not None
            _send(process.stdin, context)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *raised: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()

    def scan(self, chunk: Chunk) -> Future[Scanned]:
        return self._threads.submit(self._ask, chunk)

    def _ask(self, chunk: Chunk) -> Scanned:
        process = self._free.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, chunk)
            answer = _receive(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise ModelError(
                f"A process that checks data ended with {process.wait()}. Where the machine is "
                "short of memory, check with fewer workers."
            ) from error
        finally:
            self._free.put(process)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Scanned)
        return answer


def _send(stream: IO[bytes], value: object) -> None:
    content = pickle.dumps(value, protocol=5)
    stream.write(_SIZE.pack(len(content)))
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Read one value.

    Raises:
        EOFError: the other side has ended.
    """
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        raise EOFError
    content = stream.read(_SIZE.unpack(head)[0])
    return pickle.loads(content)


def main() -> None:
    """Answer chunks until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints beside the answers
    questions = sys.stdin.buffer
    try:
        scanner: Scanner | Exception = Scanner(_receive(questions))
    except ModelError as error:
        scanner = error
    while True:
        try:
            chunk = _receive(questions)
        except EOFError:
            return
        _send(answers, scanner if isinstance(scanner, Exception) else scanner.scan(chunk))


if __name__ == "__main__":
    main()
