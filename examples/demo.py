"""Start Outcrop in a temporary folder, run customize.py against it, and end it again.

`make demo` runs this. What it does can be done by hand: `outcrop serve` in one terminal, the
output of `outcrop env` in another, and there any program that speaks to Bedrock.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
OUTCROP = (sys.executable, "-m", "outcrop")
START_SECONDS, STOP_SECONDS = 120, 15


def main() -> int:
    """Run the demo and return its exit code."""
    # A `kill` is to clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="outcrop-demo-"))
    failed = False
    try:
        with service(folder / "service") as variables:
            make_data = (sys.executable, HERE / "operation_data.py", folder / "data")
            subprocess.run(make_data, check=True)
            program = (sys.executable, HERE / "customize.py", folder / "data")
            code = subprocess.run(program, env=variables, check=False).returncode
        failed = code != 0
        return code
    except KeyboardInterrupt:
        print("\nInterrupted. The service is ended and its files are removed.")
        return 130
    finally:
        if failed:
            print(f"The demo failed; the service's logs are in {folder / 'service' / 'logs'}")
        else:
            shutil.rmtree(folder)


@contextmanager
def service(data_dir: Path) -> Iterator[dict[str, str]]:
    """Run `outcrop serve`; yield an environment in which AWS clients speak to it."""
    data_dir.mkdir()
    log = data_dir.parent / "serve.log"
    started = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            (*OUTCROP, "serve", "--port", "0", "--data-dir", data_dir),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for this program, which then ends the service
        )
    try:
        url = wait_ready(process, log)
        print(f"outcrop serve is ready after {time.monotonic() - started:.1f} s at {url}")
        yield client_environment(data_dir)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_ready(process: subprocess.Popen[str], log: Path) -> str:
    """Return the URL of the line `ready URL` that the service prints when all of it answers."""
    assert process.stdout is not None
    signal.signal(signal.SIGALRM, lambda number, frame: process.terminate())
    signal.alarm(START_SECONDS)
    line = process.stdout.readline()
    signal.alarm(0)
    word, _, url = line.strip().partition(" ")
    if word != "ready":
        sys.exit(f"The service did not start:\n{log.read_text(encoding='utf-8')}")
    return url


def client_environment(data_dir: Path) -> dict[str, str]:
    """Return our environment with what `outcrop env` sets and unsets."""
    command = (*OUTCROP, "env", "--data-dir", data_dir, "--shell", "json")
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    environment = dict(os.environ)
    for name, value in json.loads(answer.stdout).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment


if __name__ == "__main__":
    sys.exit(main())
