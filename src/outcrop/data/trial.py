"""Try a stranger's tokenizer and chat template, in a process that may die of them:
`python -m outcrop.data.trial FOLDER`.

A chat template is a program, and a tokenizer has patterns that can take any time. Both are tried
with the conversations that everybody has, under a limit on computing time and on memory, before
anything else loads them. What was found goes to the standard output, one JSON object.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outcrop.errors import DataError, ModelError

if TYPE_CHECKING:
    from outcrop.data.render import Renderer

CPU_SECONDS = 20
MEMORY_BYTES = 4 << 30
WALL_SECONDS = 120
MAX_PROMPT_TOKENS = 100_000
"""Of a prompt that says "Hello"."""
_HELLO = "Hello, how are you? 1 + 2 = 3, naïve, 你好."


@dataclass(frozen=True)
class Trial:
    """What was found of a tokenizer and a chat template."""

    vocabulary: int
    """Ids, control tokens included."""
    has_template: bool
    """Whether the folder has a chat template."""


def try_folder(
    folder: Path,
    where: str,
    *,
    cpu_seconds: int = CPU_SECONDS,
    memory_bytes: int = MEMORY_BYTES,
) -> Trial:
    """Try the tokenizer and the chat template of a folder in a process of its own.

    Args:
        where: what the folder is called in errors.
        cpu_seconds: computing time that it may take.
        memory_bytes: address space that it may take.
    Raises:
        ModelError: they cannot be used, or take too much; the message says which of the two.
    """
    command = [sys.executable, "-m", "outcrop.data.trial", str(folder)]
    limits = (str(cpu_seconds), str(memory_bytes))
    try:
        done = subprocess.run(
            [*command, *limits],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _too_long(where, _last(error.stdout or b""), WALL_SECONDS) from None
    said = _last(done.stdout)
    if "error" in said and said["error"] is None:
        raise ModelError(
            f"The tokenizer or the chat template of {where} takes too much memory: more than "
            f"{memory_bytes:,} bytes. It was tried with a greeting."
        )
    if "error" in said:
        raise ModelError(str(said["error"]).replace(str(folder), where.rstrip("/")))
    if done.returncode == 0 and "vocabulary" in said:
        return Trial(int(said["vocabulary"]), bool(said["has_template"]))
    if done.returncode < 0:  # the kernel's signal for too much computing time, or SIGKILL
        raise _too_long(where, said, cpu_seconds)
    reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no reason given"]
    told = reason[0].replace(str(folder), where.rstrip("/"))[:300]
    raise ModelError(f"The {_what(said)} of {where} cannot be used: {told}")


def main(arguments: list[str]) -> int:
    """Try the folder; see the module's docstring."""
    folder, cpu_seconds, memory_bytes = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    from outcrop.data.render import Renderer

    if sys.platform == "linux":  # elsewhere such a limit is refused, or is none
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    try:
        _say(stage="tokenizer")
        from outcrop.models.tokenizer import Tokenizer

        tokenizer = Tokenizer(folder)
        tokenizer.decode(tokenizer.encode(_HELLO))
        _say(stage="chat template")
        _render(Renderer(folder))
    except (ModelError, DataError, MemoryError, RecursionError) as error:
        cause = error.__cause__ if isinstance(error, ModelError) else error
        too_much = isinstance(cause, MemoryError | RecursionError)
        _say(error=None if too_much else str(error))
        return 0
    _say(vocabulary=tokenizer.vocab_size, has_template=tokenizer.chat_template is not None)
    return 0


def _render(renderer: Renderer) -> None:
    """Render the conversations that everybody has; those that a template may refuse, it may."""
    from outcrop.data.records import Message, Tool

    user, answer = Message("user", _HELLO), Message("assistant", _HELLO)
    length = len(renderer.render_prompt((user,)))
    if length > MAX_PROMPT_TOKENS:
        raise ModelError(
            f"The chat template of {renderer.folder} makes {length:,} tokens of a greeting; "
            f"{MAX_PROMPT_TOKENS:,} are allowed."
        )
    renderer.render_example((user, answer))
    tool = Tool("look", "Looks.", {"type": "object", "properties": {}})
    for messages, tools in (
        ((Message("system", _HELLO), user), ()),
        ((user, answer, user), ()),
        ((user,), (tool,)),
    ):
        try:
            renderer.render_prompt(messages, tools)
        except DataError:
            continue


def _say(**found: object) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def _last(output: bytes) -> dict[str, Any]:
    lines = output.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def _what(said: dict[str, Any]) -> str:
    return str(said.get("stage", "tokenizer"))


def _too_long(where: str, said: dict[str, Any], seconds: int) -> ModelError:
    return ModelError(
        f"The {_what(said)} of {where} runs away: it did not come to an end within {seconds} s. It "
        "was tried with a greeting."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
