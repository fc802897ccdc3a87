"""What computes for the engine: parts of sequences in, scores of their next tokens out.

The engine decides who takes part in a pass and keeps count of pages; a backend has the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from outcrop.serve.sampler import Draw


@dataclass
class Memory:
    """What a backend remembers of one sequence, beside its pages."""

    cache: Any = None


@dataclass(frozen=True)
class Part:
    """Some tokens of one sequence, all before them having been computed."""

    artifact: str | None
    """Folder of the custom model; None is the base."""
    token_ids: Sequence[int]
    first_position: int
    pages: Sequence[int]
    """From the sequence's first token on; they cover this part."""
    num_scores: int
    """Of so many of its last tokens the scores of the tokens after them are wanted."""
    draw: Draw | None = None
    """How the token after the last one is drawn; None takes the likeliest."""
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True)
class Scores:
    """Of the tokens after those that were asked for."""

    logits_NV: Tensor
    chosen: Sequence[int]
    """The tokens drawn, -1 where scores are not finite numbers."""


class Backend(Protocol):
    """Used from one thread."""

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that the model can hold."""

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""

    @property
    def max_rows(self) -> int:
        """Tokens of a pass, at most."""

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""

    @property
    def num_pages(self) -> int:
        """Pages for all sequences."""

    @property
    def shares_pages(self) -> bool:
        """Whether a sequence can take over the pages of another."""

    @property
    def base_bytes(self) -> int:
        """Memory of the base's matrices."""

    @property
    def num_own(self) -> int:
        """Custom models in memory that have weights of their own."""

    @property
    def own_bytes(self) -> int:
        """Memory of those."""

    @property
    def page_bytes(self) -> int:
        """Memory of one page's keys and values."""

    @property
    def num_adapters(self) -> int:
        """Custom models in memory that are an adapter on the base."""

    @property
    def adapter_bytes(self) -> int:
        """Memory of those."""

    @property
    def num_loads(self) -> int:
        """How often an artifact was read."""

    def load(
        self, artifact: str | None, in_use: Collection[str], digest: str | None = None
    ) -> bool:
        """Bring a custom model into memory, unless it is there.

        Args:
            in_use: custom models that must stay.
            digest: what the artifact's `folder_digest` must be; None takes it as it is.
        Returns:
            False where those leave no room; the model is not loaded then.
        Raises:
            ModelError: the artifact is missing, damaged, or does not fit the base.
        """

    def run(self, parts: Sequence[Part]) -> list[Scores | Exception | None]:
        """Compute parts, whose models are loaded.

        Returns:
            For each part its scores, None where none are wanted, or why it failed.
        """

    def close(self) -> None:
        """End its threads and give its memory back."""
