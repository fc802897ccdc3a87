"""C that is compiled on the machine it runs on, once, and kept.

A library's name tells what it was made of (source, flags, processor) and the digest of its bytes,
so a file that is there is the right one and whole. Whoever needs one goes on without where there is
no compiler. Loads no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import platformdirs

from outcrop.settings import Settings

logger = logging.getLogger(__name__)

COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 60.0
_folder: Path | None = platformdirs.user_cache_path("outcrop") / "kernels"


class NoCompilerError(Exception):
    """There is no C compiler, and what it would make has not been kept either."""

    def __init__(self) -> None:
        super().__init__(f"no C compiler ({', '.join(COMPILERS)})")


def kernel_folder(settings: Settings) -> Path:
    """Return where a service keeps what it compiled on this machine; may be removed any time."""
    return settings.data_dir / "cache" / "kernels"


def keep_libraries_in(folder: Path | None) -> None:
    """Say where compiled libraries are kept, for this process; None means that none are used.

    Before, it is a folder of this user's cache.
    """
    global _folder
    _folder = folder


def library_folder() -> Path | None:
    """Return where compiled libraries are kept."""
    return _folder


def load_library(
    package: str, source_name: str, flags: Sequence[str], machine_flags: Sequence[Sequence[str]]
) -> ctypes.CDLL | None:
    """Return a library made of one C file of a package; None where none are to be used.

    Args:
        machine_flags: further flags, in the order of preference: the first that the compiler takes
            are used.
    Raises:
        NoCompilerError: there is none, and no kept library.
        OSError, subprocess.SubprocessError: compiling or loading failed.
    """
    folder = _folder
    if folder is None:
        return None
    source = (resources.files(package) / source_name).read_bytes()
    key = hashlib.sha256(source + repr((flags, machine_flags, processor())).encode()).hexdigest()
    stem = f"{Path(source_name).stem}-{key[:20]}"
    file = find_kept(folder, stem)
    if file is None:
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            raise NoCompilerError
        file = compile_library(compiler, flags, machine_flags, source, folder, stem)
    return ctypes.CDLL(str(file))


def find_kept(folder: Path, stem: str) -> Path | None:
    """Return the library that was compiled before, if it is whole; its name tells its digest.

    A machine that lost power may have kept a name without all of the content, and to load that
    would end the process.
    """
    for file in sorted(folder.glob(f"{stem}-*.so")):
        if file.stem == f"{stem}-{_digest(file)}":
            return file
        logger.warning("%s is damaged; it is compiled again", file)
        file.unlink(missing_ok=True)
    return None


def compile_library(
    compiler: str,
    flags: Sequence[str],
    machine_flags: Sequence[Sequence[str]],
    source: bytes,
    folder: Path,
    stem: str,
) -> Path:
    """Write the shared library, whole or not at all; others may do the same at the same time.

    Returns:
        Where it is.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        code, made, linked = (Path(scratch, f"kernels.{kind}") for kind in ("c", "o", "so"))
        code.write_bytes(source)
        for more_flags in machine_flags:
            refused = _run([compiler, *flags, *more_flags, "-c", str(code), "-o", str(made)])
            if not refused:
                break
        # Not linked with OpenMP: torch has brought its own, and two would fight for the cores.
        refused = refused or _run([compiler, "-shared", str(made), "-o", str(linked), "-lm"])
        if refused:
            raise OSError(f"{Path(compiler).name} failed: {refused}")
        return linked.rename(folder / f"{stem}-{_digest(linked)}.so")


def processor() -> str:
    """Return what decides which machine code runs here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU part")
    return repr((platform.machine(), [line for line in lines if line.startswith(names)][:2]))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:20]


def _run(command: Sequence[str]) -> str:
    """Run a compiler; return the end of what it complained of, nothing where it succeeded."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
    )
    return "" if done.returncode == 0 else done.stderr[-500:] or f"exit code {done.returncode}"
