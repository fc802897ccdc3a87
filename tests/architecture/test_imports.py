"""What starts fast must not load torch, and a room imports only what stands below it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "outcrop"
HEAVY = ("torch", "transformers")

MAY_LOAD_TORCH = (
    "train/",
    "evaluate/",
    "models/attention.py",
    "models/decoder.py",
    "models/export.py",
    "models/flash.py",
    "models/fused.py",
    "models/kernels.py",
    "models/lanes.py",
    "models/load.py",
    "models/lora.py",
    "models/passes.py",
    "models/pointwise.py",
    "models/shapes.py",
    "models/workspace.py",
    "serve/adapters.py",
    "serve/backend.py",
    "serve/engine.py",
    "serve/formats.py",
    "serve/forward.py",
    "serve/network.py",
    "serve/packed.py",
    "serve/paged.py",
    "serve/plain.py",
    "serve/rate.py",
    "serve/sampler.py",
    "serve/sequence.py",
    "serve/task.py",
    "serve/vllm.py",
)
"""The rooms and modules that compute."""
MUST_NOT = {
    "evaluate/generation.py",
    "train/batches.py",
    "train/memory.py",
    "train/metrics.py",
    "train/plan.py",
    "train/portions.py",
    "train/prediction.py",
}
"""In those rooms, what others import."""

ENTRIES = (
    "outcrop.api.app",
    "outcrop.cli",
    "outcrop.cli.serve",
    "outcrop.data.check",
    "outcrop.data.examples",
    "outcrop.jobs.attempt",  # loads it when it begins to train
    "outcrop.jobs.worker",
    "outcrop.serve.client",
    "outcrop.train.plan",
)
"""What starts the processes, and what they lean on."""


@pytest.mark.parametrize("module", ENTRIES)
def test_importing_does_not_load_torch(module: str) -> None:
    program = f"import sys, {module}; print(sorted(sys.modules.keys() & set({HEAVY!r})))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def imported_at_once(path: Path) -> set[str]:
    """Return the modules that importing a file imports: not those inside functions or for types."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If):
                for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
                visit(node.orelse if for_types else [*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                visit([*node.body, *node.orelse, *node.finalbody])
            elif isinstance(node, ast.ClassDef | ast.With):
                visit(node.body)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def test_only_what_computes_loads_torch() -> None:
    imports = {path: imported_at_once(path) for path in SOURCE.rglob("*.py")}
    names = {
        ".".join(("outcrop", *path.relative_to(SOURCE).with_suffix("").parts)): path
        for path in imports
    }
    heavy = {
        path
        for path, modules in imports.items()
        if any(module.partition(".")[0] in HEAVY for module in modules)
    }
    while True:
        reached = {
            path
            for path, modules in imports.items()
            if any(names.get(module) in heavy for module in modules)
        }
        if reached <= heavy:
            break
        heavy |= reached
    found = {str(path.relative_to(SOURCE)) for path in heavy}
    assert {name for name in found if not name.startswith(MAY_LOAD_TORCH)} == set()
    assert found & MUST_NOT == set()


def layers() -> list[str]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = table["tool"]["importlinter"]["contracts"]
    (contract,) = (item for item in contracts if item["type"] == "layers")
    return [name.strip("()") for name in contract["layers"]]


def test_every_room_has_its_layer() -> None:
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(layers())


def test_a_room_imports_only_rooms_below_it() -> None:
    order = {name: place for place, name in enumerate(layers())}
    wrong = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in order:  # the package itself, which only re-exports
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
            else:
                continue
            for module in modules:
                first, _, rest = module.partition(".")
                other = rest.partition(".")[0]
                if first == "outcrop" and other in order and order[other] < order[room]:
                    wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno} imports {module}")
    assert not wrong, "\n".join(wrong)
