"""What a request may ask of a model server: the base, an adapter on it, or weights of its own.

Adapters are read from their artifacts when they are first asked for and kept up to a number of
bytes; the one that was not used for longest goes first. A custom model that has weights of its own
is a second network beside the base, with its adapter where it has one too; such networks are kept
up to a number of bytes as well, the last one in any case. The base's weights are never changed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path

import torch

from outcrop.errors import ModelError
from outcrop.models.artifact import check_digest, read_artifact
from outcrop.models.lora import Adapter, load_adapter, set_adapter
from outcrop.serve.network import Network, load_network

logger = logging.getLogger("outcrop.model-server")

MAX_ADAPTER_BYTES = 512 * 2**20
"""Memory for adapters that are kept: about 25 of rank 16 on all layers of the shipped model."""
MAX_OWN_BYTES = 2 * 2**30
"""Memory for networks of custom models with weights of their own: seven of the shipped model's
size in bfloat16."""


class Adapters:
    """The networks of one model server. Used from one thread."""

    def __init__(
        self,
        base: Network,
        *,
        dtype: torch.dtype | None,
        max_bytes: int = MAX_ADAPTER_BYTES,
        max_own_bytes: int = MAX_OWN_BYTES,
    ) -> None:
        """
        Args:
            max_bytes: of adapters that are kept.
            max_own_bytes: of networks with weights of their own that are kept.
        """
        self._base = base
        self._dtype = dtype
        self._max_bytes, self._max_own_bytes = max_bytes, max_own_bytes
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        self._set: str | None = None
        self._own: OrderedDict[str, Network] = OrderedDict()
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

    @property
    def base_bytes(self) -> int:
        """Memory of the base's weights."""
        return _network_bytes(self._base)

    @property
    def num_own(self) -> int:
        """Networks with weights of their own in memory."""
        return len(self._own)

    @property
    def own_bytes(self) -> int:
        """Memory of those."""
        return sum(map(_network_bytes, list(self._own.values())))

    def load(self, artifact: str, digest: str | None = None) -> Network:
        """Bring an artifact into memory, unless it is there, and return the network it runs on.

        Args:
            digest: what its `folder_digest` must be; None takes it as it is.
        Raises:
            ModelError: the artifact is missing, damaged, or does not fit the base.
        """
        if artifact in self._own:
            self._own.move_to_end(artifact)
            return self._own[artifact]
        if artifact in self._kept:
            self._kept.move_to_end(artifact)
            return self._base
        check_digest(Path(artifact), digest)
        found = read_artifact(Path(artifact))
        name = Path(artifact).parent.name
        if found.weights is not None:
            # Before, so that what is kept and what is read are never both in memory.
            _make_room(self._own, self._max_own_bytes - _network_bytes(self._base))
            network = load_network(found.weights, self._dtype)
            if found.adapter is not None:
                set_adapter(network.module, load_adapter(found.adapter))
            self._own[artifact] = network
            self.num_loaded += 1
            logger.info("custom model %s read, %d with weights of their own", name, len(self._own))
            return network
        assert found.adapter is not None
        self._kept[artifact] = load_adapter(found.adapter)
        self.num_loaded += 1
        logger.info("adapter %s read, %d kept", name, len(self._kept))
        while len(self._kept) > 1 and self.num_bytes > self._max_bytes:
            self._kept.popitem(last=False)
        return self._base

    def use(self, artifact: str | None, digest: str | None = None) -> Network:
        """Return the network, ready to answer as the artifact, or as the base where it is None.

        Holds until the next call.

        Args:
            digest: as in `load`.

        Raises:
            ModelError: as `load`.
        """
        network = self._base if artifact is None else self.load(artifact, digest)
        if network is not self._base or artifact == self._set:
            return network
        try:
            set_adapter(network.module, None if artifact is None else self._kept[artifact])
        except ModelError:
            self._kept.pop(artifact or "", None)
            raise
        self._set = artifact
        return network


def _make_room(networks: OrderedDict[str, Network], max_bytes: int) -> None:
    """Let go of what was not used for longest, until the rest is small enough."""
    while networks and sum(map(_network_bytes, networks.values())) > max_bytes:
        networks.popitem(last=False)


def _network_bytes(network: Network) -> int:
    return sum(parameter.nbytes for parameter in network.module.parameters())


def _num_bytes(adapter: Adapter) -> int:
    return sum(a.nbytes + b.nbytes for a, b in adapter.tensors.values())
