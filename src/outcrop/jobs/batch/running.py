"""The inference of a batch job: many records asked at a time, answers kept in groups.

As many requests are under way as an engine answers at once, and a few that wait for a place, so
that none stands empty. Answers are collected for a moment, put on the disk together, and then told
of.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import anyio
import anyio.to_thread
from sqlalchemy.exc import SQLAlchemyError

from outcrop.errors import ModelErrorException
from outcrop.jobs.batch.asking import Asker
from outcrop.jobs.batch.inputs import BatchFile, record_of
from outcrop.jobs.batch.journal import Answer, Journal
from outcrop.serve.fairness import Limits

logger = logging.getLogger("outcrop.attempt")

NUM_UNDER_WAY = Limits().slots + 8
"""Requests at a time: those that are answered, and some that wait."""
KEEP_SECONDS = 0.2
"""So long answers are collected before they are put on the disk together."""
TELL_SECONDS = 1.0
"""How often the row is told how far the job is."""
LOOK_SECONDS = 0.1
"""How often it is asked whether to stop: at every look."""
GRACE_SECONDS = 3600.0
"""What a request may take beyond the job's time: the job's end, not the server's, is to end it."""


@dataclass
class Outcome:
    """How the inference ended."""

    kind: Literal["done", "stopped", "expired", "failed"]
    error: Exception | None = None


@dataclass
class Run:
    """The inference of one attempt."""

    asker: Asker
    journal: Journal
    files: list[BatchFile]
    begin: Callable[[], None]
    """Called once, when the first record is asked."""
    tell: Callable[[], None]
    """Tells the job's row how far it is."""
    publish: Callable[[BatchFile], None]
    """Writes the output of a file all of whose records are answered."""
    should_stop: Callable[[], bool]
    expires_at: datetime | None
    published: set[str] = field(default_factory=set)
    """Names of the files whose output is written."""
    _answers: list[Answer] = field(default_factory=list)
    _outcome: Outcome = field(default_factory=lambda: Outcome("done"))
    _num_left: list[int] = field(default_factory=list)

    async def run(self) -> Outcome:
        """Ask for what is not answered yet, until all is, or something ends it.

        Raises:
            LeaseLost: another attempt holds the job.
            OSError, ObjectStoreError: a disk or the store failed.
        """
        self._num_left = [
            sum(number not in self.journal for number, _ in file.records()) for file in self.files
        ]
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._look, group.cancel_scope)
                group.start_soon(self._keep)
                group.start_soon(self._ask_all, group.cancel_scope)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        await self._put_on_disk()
        if self._outcome.kind == "done":
            assert not any(self._num_left), "every record has its answer"
            self._publish_what_is_whole()
        return self._outcome

    async def _ask_all(self, scope: anyio.CancelScope) -> None:
        records = self._records()
        try:
            if any(self._num_left):
                await self.asker.find_server()
            await anyio.to_thread.run_sync(self.begin)
            async with anyio.create_task_group() as group:
                for _ in range(NUM_UNDER_WAY):
                    group.start_soon(self._ask, records)
        except* ModelErrorException as errors:
            error = errors.exceptions[0]
            assert isinstance(error, Exception)
            self._outcome = Outcome("failed", error)
        scope.cancel()

    async def _ask(self, records: Iterator[tuple[int, bytes]]) -> None:
        for number, line in records:
            given = record_of(line)["modelInput"]
            answer = await self.asker.answer(number, given, self._seconds_left())
            self._answers.append(answer)  # not before: the list is another one from time to time

    def _records(self) -> Iterator[tuple[int, bytes]]:
        for file in self.files:
            for number, line in file.records():
                if number not in self.journal:
                    yield number, line

    def _seconds_left(self) -> float:
        if self.expires_at is None:
            return GRACE_SECONDS
        return max(0.0, (self.expires_at - datetime.now(UTC)).total_seconds()) + GRACE_SECONDS

    async def _look(self, scope: anyio.CancelScope) -> None:
        """End it where it is to stop or its time is up."""
        while True:
            await anyio.sleep(LOOK_SECONDS)
            if self.should_stop():
                self._outcome = Outcome("stopped")
            elif self.expires_at is not None and datetime.now(UTC) >= self.expires_at:
                self._outcome = Outcome("expired")
            if self._outcome.kind != "done":
                scope.cancel()

    async def _keep(self) -> None:
        """Put answers on the disk, tell of them, and publish what is whole."""
        told_at = time.monotonic()
        while True:
            await anyio.sleep(KEEP_SECONDS)
            await self._put_on_disk()
            await anyio.to_thread.run_sync(self._publish_what_is_whole)
            if time.monotonic() - told_at >= TELL_SECONDS:
                told_at = time.monotonic()
                # A database that is away for a moment: the journal knows, and is told of later.
                with suppress(SQLAlchemyError):
                    await anyio.to_thread.run_sync(self.tell)
                    await self.asker.touch()

    async def _put_on_disk(self) -> None:
        """Not to be left half done, so nothing cancels it."""
        answers, self._answers = self._answers, []
        if not answers:
            return
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.journal.add, answers)
        for answer in answers:
            for place, file in enumerate(self.files):
                if file.first <= answer.number < file.first + file.num_records:
                    self._num_left[place] -= 1

    def _publish_what_is_whole(self) -> None:
        for place, file in enumerate(self.files):
            if not self._num_left[place] and file.name not in self.published:
                self.publish(file)
                self.published.add(file.name)


def _first(error: BaseException) -> BaseException:
    """Return what went wrong first among tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
