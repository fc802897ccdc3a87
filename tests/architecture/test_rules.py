"""The rules of the code base that no linter knows: sizes, docstrings, printing, the environment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "outcrop"
MODULES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 600

ENVIRONMENT_READERS = {
    "settings.py": "the one place that reads settings, and makes the environment of children",
    "processes/spawn.py": "a child without an environment of its own inherits the whole of ours",
    "processes/ready.py": "the pipe's descriptor, which the parent's spawn hands over",
    "serve/server.py": "a default for OpenMP, which reads it when torch is loaded",
}
"""Modules that may touch os.environ, each with its reason."""


def named(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_is_not_too_long(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES, f"{named(path)} has {num_lines} lines; split it by its nouns"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(tree(path))
    assert docstring, f"{named(path)} has no docstring"
    assert docstring.splitlines()[0].strip()


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_annotations_are_postponed(path: Path) -> None:
    body = tree(path).body
    if len(body) <= 1:  # a docstring and nothing else
        return
    first = body[1]
    assert isinstance(first, ast.ImportFrom), f"{named(path)} does not begin with its imports"
    assert first.module == "__future__"
    assert [alias.name for alias in first.names] == ["annotations"]


def test_every_folder_of_modules_is_a_package_with_a_docstring() -> None:
    for folder in {path.parent for path in MODULES}:
        package = folder / "__init__.py"
        assert package.is_file(), f"{folder.relative_to(SOURCE)} has no __init__.py"
        assert ast.get_docstring(tree(package)), f"{named(package)} has no docstring"


def test_no_room_is_called_after_nothing() -> None:
    nouns = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}
    for path in MODULES:
        assert not nouns & {part.removesuffix(".py") for part in path.parts}, named(path)


def test_only_the_command_line_prints() -> None:
    for path in MODULES:
        if path.parent.name == "cli":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{named(path)}:{node.lineno} prints"


def touches_environment(path: Path) -> bool:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
            if names & {"environ", "environb", "getenv"}:
                return True
    return False


def test_only_named_modules_touch_the_environment() -> None:
    assert {named(path) for path in MODULES if touches_environment(path)} == set(
        ENVIRONMENT_READERS
    )


def test_imports_are_absolute() -> None:
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{named(path)}:{node.lineno} imports relatively"


def test_nothing_is_left_for_later() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X:", "Not" + "ImplementedError")
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        for mark in marks:
            assert mark not in text, f"{named(path)} holds {mark}"


BROAD = {
    "api/app.py": "a start or a health check that fails is reported, not a crash",
    "api/event_stream.py": "becomes the stream's last frame",
    "api/handlers.py": "becomes InternalServerException with the request id",
    "api/log_spool.py": "a record that cannot be kept or sent must not end the thread of all",
    "api/openai.py": "the same, in OpenAI's form",
    "api/s3.py": "the same, in S3's form",
    "jobs/events.py": "a fault while one event is told must not end the telling",
    "models/fused.py": "whatever keeps torch from compiling a function, the plain one runs",
    "serve/connections.py": "a request that fails is told so, and the log why",
    "serve/engine.py": "one request fails as ModelErrorException, the others go on",
    "serve/plain.py": "one part of a pass fails, the others go on",
    "serve/rate.py": "a rate that cannot be measured is assumed, and requests are answered",
    "serve/vllm.py": "as serve/engine.py",
}
"""Modules that may catch every exception and go on, each with its reason."""


def swallows_everything(path: Path) -> bool:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
            names = [node.type] if node.type is not None else []
            if isinstance(node.type, ast.Tuple):
                names = list(node.type.elts)
            found = {name.id for name in names if isinstance(name, ast.Name)}
            if not names or found & {"Exception", "BaseException"}:
                return True
    return False


def test_only_named_modules_swallow_every_exception() -> None:
    found = {named(path) for path in MODULES if swallows_everything(path)}
    assert found == set(BROAD)
