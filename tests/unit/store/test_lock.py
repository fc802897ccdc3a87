"""One service a data directory, and the lock is never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from outcrop.errors import StoreError
from outcrop.store.lock import lock_data_dir

HOLDS = """
import sys, time
from pathlib import Path
from outcrop.store.lock import lock_data_dir
with lock_data_dir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_service_is_refused_and_told_who_holds_the_directory(data_dir: Path) -> None:
    with lock_data_dir(data_dir), pytest.raises(StoreError) as refused, lock_data_dir(data_dir):
        pass
    message = str(refused.value)
    assert f"process {os.getpid()}" in message
    assert str(data_dir) in message
    assert "--data-dir" in message


def test_lock_is_free_again_after_its_block(data_dir: Path) -> None:
    for _ in range(2):
        with lock_data_dir(data_dir):
            assert (data_dir / "lock").read_text() == f"{os.getpid()}\n"


def test_killed_holder_leaves_no_lock(data_dir: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=f"process {holder.pid}"), lock_data_dir(data_dir):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock_data_dir(data_dir):
        assert (data_dir / "lock").read_text() == f"{os.getpid()}\n"
