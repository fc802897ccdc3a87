"""The backend for every model that the compiled pass does not cover: torch, one part after another.

Also for GPUs, and for machines without a C compiler. Each sequence has a cache of its own, so its
pages are only counted; an answer's arithmetic never depends on what else is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from outcrop.serve.adapters import MAX_ADAPTER_BYTES, Adapters
from outcrop.serve.backend import Part, Scores
from outcrop.serve.network import load_network
from outcrop.serve.sampler import sample

logger = logging.getLogger("outcrop.model-server")

MAX_ROWS = 512
"""Tokens of a prompt in one step, so that a long one cannot hold up others for long."""
MAX_TOKENS = 32_768
"""Prompts and answers of all active requests together: 750 MB of cache for the shipped model."""
PAGE_TOKENS = 16


class PlainBackend:
    """See `backend.Backend`."""

    shares_pages = False
    page_tokens = PAGE_TOKENS

    def __init__(
        self,
        folder: Path,
        *,
        threads: int,
        dtype: torch.dtype | None = None,
        max_adapter_bytes: int = MAX_ADAPTER_BYTES,
    ) -> None:
        """
        Args:
            folder: the base model's, in Hugging Face's layout.
            dtype: of the weights; None takes this machine's fastest.
        Raises:
            ModelError: the folder's weights cannot be used.
        """
        network = load_network(folder, dtype)
        self._adapters = Adapters(network, dtype=dtype, max_bytes=max_adapter_bytes)
        self._threads = threads
        self.max_context = network.max_context
        self.vocabulary = network.vocabulary
        self.max_rows = MAX_ROWS
        self.num_pages = -(-max(MAX_TOKENS, self.max_context) // PAGE_TOKENS)

    @property
    def base_bytes(self) -> int:
        """See `Backend`."""
        return self._adapters.base_bytes

    @property
    def num_own(self) -> int:
        """See `Backend`."""
        return self._adapters.num_own

    @property
    def own_bytes(self) -> int:
        """See `Backend`."""
        return self._adapters.own_bytes

    @property
    def page_bytes(self) -> int:
        """See `Backend`; sequences have caches of their own, whose pages are only counted."""
        return 0

    @property
    def num_adapters(self) -> int:
        """See `Backend`."""
        return self._adapters.num_kept

    @property
    def adapter_bytes(self) -> int:
        """See `Backend`."""
        return self._adapters.num_bytes

    @property
    def num_loads(self) -> int:
        """See `Backend`."""
        return self._adapters.num_loaded

    def load(
        self, artifact: str | None, in_use: Collection[str], digest: str | None = None
    ) -> bool:
        """See `Backend`; an adapter that has to go is read again for its next part."""
        if artifact is not None:
            self._adapters.use(artifact, digest)
        return True

    def run(self, parts: Sequence[Part]) -> list[Scores | Exception | None]:
        """See `Backend`."""
        # OpenMP holds the number of threads for each thread that starts work.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        found: list[Scores | Exception | None] = [None] * len(parts)
        # Those of one adapter one after the other: to set another one takes about a token's time.
        for place in sorted(range(len(parts)), key=lambda place: parts[place].artifact or ""):
            try:
                found[place] = self._run(parts[place])
            # Whatever a library raises on one part: the others are answered all the same.
            except Exception as error:
                found[place] = error
        return found

    def close(self) -> None:
        """See `Backend`."""

    def _run(self, part: Part) -> Scores | None:
        network = self._adapters.use(part.artifact)
        if part.first_position == 0:
            part.memory.cache = network.new_cache()
        logits_NV = network.forward(part.token_ids, part.memory.cache, max(1, part.num_scores))
        if not part.num_scores:
            return None
        most_N, best_N = logits_NV.max(dim=-1)
        chosen = torch.where(torch.isfinite(most_N), best_N, -1).tolist()
        if part.draw is not None and chosen[-1] >= 0:
            chosen[-1] = sample(logits_NV[-1], part.draw)
        return Scores(logits_NV, chosen)
