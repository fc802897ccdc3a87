"""Functions of torch's operations as single kernels of a GPU, compiled when they are first needed.

torch.compile writes them with Triton. The same arguments must give the same bytes in every process,
also in one that goes on from a checkpoint and so begins with other rows. Therefore a function is
compiled for any number of rows at once, on made-up ones, and never on what happens to come first;
and nothing is chosen by measuring.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

COMPILED_ROWS = 1024
"""Rows that functions are compiled with. Any number of them is computed with the same kernel."""
OPTIONS = {
    # Reductions are cut the same way in every process: by rule, not by what was faster once.
    "deterministic": True,
    "batch_invariant": True,
    # Few and small: worker processes would take longer to start, and memory.
    "compile_threads": 1,
}


class Fused:
    """A function that is compiled where its first argument is on a GPU."""

    def __init__(
        self,
        body: Callable[..., Any],
        rows: tuple[int, ...],
        *,
        plain: Callable[..., Any] | None = None,
        device_type: str = "cuda",
    ) -> None:
        """
        Args:
            body: takes tensors and constants, and may change its arguments.
            rows: places of the arguments whose first axis is the rows; the first argument is one.
            plain: does the same without being compiled; None takes `body`.
            device_type: where it is compiled; elsewhere the plain one runs.
        """
        self._body, self._plain, self._rows = body, plain or body, frozenset(rows)
        self._device_type = device_type
        self._compiled: dict[tuple[object, ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Compute; the first call with arguments of new widths and types compiles, for seconds."""
        first: Tensor = arguments[0]
        # Of a single row torch.compile would make a kernel of its own.
        if first.device.type != self._device_type or first.shape[0] < 2:
            return self._plain(*arguments)
        # All that torch.compile looks at, but for the number of rows: where any of it differs, it
        # would compile anew by itself, and for that number of rows alone.
        key = tuple(
            argument
            if not isinstance(argument, Tensor)
            else (
                argument.dtype,
                argument.stride(),
                *argument.shape[1 if place in self._rows else 0 :],
            )
            for place, argument in enumerate(arguments)
        )
        with torch.no_grad():
            function = self._compiled.get(key)
            if function is None:
                function = self._compiled[key] = self._compile(arguments)
            if function is not self._plain:
                self._leave_open(arguments)
            return function(*arguments)

    def _compile(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        import torch._inductor.config as inductor

        name = getattr(self._body, "__name__", "a function")
        options: dict[str, Any] = {
            key: value for key, value in OPTIONS.items() if hasattr(inductor, key)
        }
        try:
            compiled: Callable[..., Any] = torch.compile(
                self._body, fullgraph=True, dynamic=False, options=options
            )
            made_up = [self._made_up(*item) for item in enumerate(arguments)]
            self._leave_open(made_up)
            compiled(*made_up)
        except Exception as error:  # whatever Triton, its compiler or the driver lack
            if "out of memory" in str(error):
                raise
            logger.warning("%s could not be compiled, training is slower: %s", name, error)
            return self._plain
        return compiled

    def _made_up(self, place: int, argument: Any) -> Any:
        if place not in self._rows or not isinstance(argument, Tensor):
            return argument.clone() if isinstance(argument, Tensor) else argument
        # Views stay views of rows that are as far apart: strides are compiled in.
        return torch.empty_strided(
            (COMPILED_ROWS, *argument.shape[1:]),
            argument.stride(),
            dtype=argument.dtype,
            device=argument.device,
        ).zero_()

    def _leave_open(self, arguments: Sequence[Any]) -> None:
        """Say that the number of rows may be any, also where torch.compile has to do it again: for
        more numbers than 32 bits can count."""
        for place in self._rows:
            if isinstance(arguments[place], Tensor):
                torch._dynamo.maybe_mark_dynamic(arguments[place], 0)
