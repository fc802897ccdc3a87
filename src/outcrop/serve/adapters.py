"""What a request may ask of a model server: the base, an adapter on it, or weights of its own.

Adapters are read from their artifacts when they are first asked for and kept up to a number of
bytes; the one that was not used for longest goes first. A custom model that was trained as a whole
(no adapter_config.json, but a config.json) is a second network beside the base, and only the last
one asked for is kept. The base's weights are never changed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path

import torch

from outcrop.errors import ModelError
from outcrop.models.lora import ADAPTER_CONFIG, Adapter, load_adapter, set_adapter
from outcrop.serve.network import Network, load_network

logger = logging.getLogger("outcrop.model-server")

MAX_ADAPTER_BYTES = 512 * 2**20
"""Memory for adapters that are kept: about 25 of rank 16 on all layers of the shipped model."""


class Adapters:
    """The networks of one model server. Used from one thread."""

    def __init__(
        self, base: Network, *, dtype: torch.dtype | None, max_bytes: int = MAX_ADAPTER_BYTES
    ) -> None:
        self._base = base
        self._dtype = dtype
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        self._set: str | None = None
        self._own: tuple[str, Network] | None = None
        self.num_loaded = 0
        """How often an artifact was read."""

    @property
    def num_kept(self) -> int:
        """Adapters in memory."""
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Memory of the adapters that are kept."""
        return sum(map(_num_bytes, list(self._kept.values())))

    def load(self, artifact: str) -> Network:
        """Bring an artifact into memory, unless it is there, and return the network it runs on.

        Raises:
            ModelError: the artifact is missing, damaged, or does not fit the base.
        """
        if self._own is not None and self._own[0] == artifact:
            return self._own[1]
        if artifact in self._kept:
            self._kept.move_to_end(artifact)
            return self._base
        folder = Path(artifact)
        if not (folder / ADAPTER_CONFIG).is_file() and (folder / "config.json").is_file():
            network = load_network(folder, self._dtype)
            self.num_loaded += 1
            self._own = (artifact, network)
            return network
        self._kept[artifact] = load_adapter(folder)
        self.num_loaded += 1
        logger.info("adapter %s read, %d kept", folder.parent.name, len(self._kept))
        while len(self._kept) > 1 and self.num_bytes > self._max_bytes:
            self._kept.popitem(last=False)
        return self._base

    def use(self, artifact: str | None) -> Network:
        """Return the network, ready to answer as the artifact, or as the base where it is None.

        Holds until the next call.

        Raises:
            ModelError: as `load`.
        """
        network = self._base if artifact is None else self.load(artifact)
        if network is not self._base or artifact == self._set:
            return network
        try:
            set_adapter(network.module, None if artifact is None else self._kept[artifact])
        except ModelError:
            self._kept.pop(artifact or "", None)
            raise
        self._set = artifact
        return network


def _num_bytes(adapter: Adapter) -> int:
    return sum(a.nbytes + b.nbytes for a, b in adapter.tensors.values())
