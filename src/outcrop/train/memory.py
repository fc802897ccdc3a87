"""The memory of a run: bounded, and made less where it does not suffice.

A training process runs under a bound of its own, so that it meets an error that it can catch
before the kernel ends it. It then cuts its steps into smaller portions: first fewer records at a
time, then activations that are computed again for the backward pass instead of being kept. Neither
changes what is computed, only in which order sums are rounded.
"""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from outcrop.train.portions import gibibytes
from outcrop.train.threads import num_primitives

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_FULL = re.compile(
    # torch's allocator on the CPU; the C++ library; oneDNN, whose scratch memory was refused.
    r"can't allocate memory|not enough memory|bad_alloc|Cannot allocate memory"
    r"|out of memory|could not create a memory object",
    re.IGNORECASE,
)

_PAGE_BYTES = resource.getpagesize()
KERNEL_BYTES = 64 << 20
"""Of the bound that are left to oneDNN's kernels, a sixteenth of a small one."""
RESERVED_A_PRIMITIVE = 2 << 20
"""What a shape that oneDNN keeps code for costs in memory that is reserved and, for the most part,
not resident: the code's own room, and holes that stay where it chose among descriptions. Measured:
1.3 MiB, as the least that goes on for hundreds of steps without growing."""
_NO_PRIMITIVE = re.compile(r"could not (create|execute) a primitive")
"""What is left of oneDNN's error when it had no memory for a kernel that it writes at run time."""
_bound: int | None = None
"""What `bounded_memory` has set for this process."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was refused: torch's on a CPU or a GPU, or Python's.

    torch raises a plain RuntimeError on the CPU, so its text is looked at.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None


def spoils_the_process(error: BaseException) -> bool:
    """Return whether an error says that oneDNN could not write a kernel for want of memory: then it
    writes none any more in this thread, so another process has to go on.

    Ask while the error is being handled: what the failed computation holds is part of the evidence.

    Source: Xbyak, which oneDNN writes kernels with, remembers its error for each thread, and oneDNN
    does not clear it (seen with oneDNN 3.12, and that later kernels fail with memory to spare).
    """
    if not isinstance(error, RuntimeError) or _NO_PRIMITIVE.search(str(error)) is None:
        return False
    bound = bound_bytes()
    return bound is not None and bound - held_bytes() < 2 * KERNEL_BYTES


def check_room() -> None:
    """Refuse memory before the bound does, so that what is left suffices for oneDNN's kernels.

    Takes some microseconds; meant to be called between layers.

    Raises:
        MemoryError: there is a bound, and less than KERNEL_BYTES are left.
    """
    if _bound is None:
        return
    bound, held = bound_bytes(), held_bytes()
    if bound is not None and held > bound - min(KERNEL_BYTES, _bound // 16):
        raise MemoryError(f"{gibibytes(held)} of {gibibytes(bound)} are in use")


def give_memory_back() -> None:
    """Let go of what nothing refers to any more, also in torch's store of GPU memory.

    What the C library keeps in scattered pieces for its next allocations is not resident any more
    then, but still counts against the bound, and is of no use to whoever asks the system itself, as
    oneDNN does for each new kernel. So the bound is moved out by as much.
    """
    gc.collect()
    if _bound is not None:
        free = _trim()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        room = _bound + free if hard == resource.RLIM_INFINITY else min(_bound + free, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (room, hard))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class _MallInfo(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _trim() -> int:
    """Have the C library give free memory back, and return how many bytes it could only empty.

    Source: mallinfo(3) of glibc; 0 with another C library.
    """
    library = ctypes.CDLL(None)
    trim_heap()
    try:
        library.mallinfo2.restype = _MallInfo
        return int(library.mallinfo2().fordblks)
    except AttributeError:
        return 0


def trim_heap() -> None:
    """Have the C library give back the memory of holes in its heap; takes about 10 ms at 2 GB.

    For each new shape, oneDNN takes and frees megabytes while it chooses how to compute it. Without
    this, holes of that make up a fifth of what a training process has resident.

    Source: malloc_trim(3) of glibc; does nothing with another C library.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@contextmanager
def bounded_memory(num_bytes: int, threads: int = 0) -> Iterator[None]:
    """Let this process take so many bytes more than it has; what is beyond is refused it.

    Linux counts what may be written to (RLIMIT_DATA), whether it is resident or not. macOS knows
    the limit and does not enforce it for the memory that programs take today, so there is no bound
    there: what was foretold decides alone. The memory of a GPU is not bounded by this.

    Args:
        threads: that torch will compute with; they are started before.
    Source: getrlimit(2), RLIMIT_DATA: since Linux 4.7 it also holds for private writable mmap.
    """
    global _bound
    if sys.platform != "linux":
        yield
        return
    import torch

    if threads:
        torch.set_num_threads(threads)
    _warm_up()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    bound = held_bytes() + num_bytes
    if before[1] != resource.RLIM_INFINITY:
        bound = min(bound, before[1])
    _bound = bound
    resource.setrlimit(resource.RLIMIT_DATA, (bound, before[1]))
    try:
        yield
    finally:
        _bound = None
        resource.setrlimit(resource.RLIMIT_DATA, before)


def reserved_bytes(threads: int) -> int:
    """Return what a bound must allow beyond what is foretold, because it counts what is reserved
    and was never written to, too."""
    return RESERVED_A_PRIMITIVE * num_primitives(threads)


def _warm_up() -> None:
    """Have torch make what cannot be made later: its threads, because one that cannot be started
    ends the process, and oneDNN's general kernels, because one that could not be written once is
    not tried again.
    """
    import torch

    torch.ones(1 << 20).sum()  # large enough to be shared out among the threads
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(192, 192, dtype=dtype)
        for left in (square, square.t()):
            for right in (square, square.t()):
                torch.addmm(square, left, right)
                torch.bmm(left[None], right[None])


def held_bytes() -> int:
    """Return how much this process may write to now, which is what the bound is held against.

    0 where the system does not say.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:  # noqa: PTH123 - it is quicker
            return int(stream.read().split()[5]) * _PAGE_BYTES
    except FileNotFoundError:
        return 0


def bound_bytes() -> int | None:
    """Return the bound that this process is under; None for none."""
    bound = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return None if bound == resource.RLIM_INFINITY else bound


def peak_memory_bytes() -> int:
    """Return the most that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux


def layers_of(model: LlamaForCausalLM) -> list[Any]:
    """Return a model's layers: what transformers says can be computed again for itself."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def recomputed_layers(model: LlamaForCausalLM) -> Iterator[None]:
    """Let the layers of a forward pass inside this `with` compute their activations again later."""
    from torch.utils.checkpoint import checkpoint

    layers = layers_of(model)
    for layer in layers:
        # Nothing is drawn at random in a layer, so there is no generator to set back.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
