"""Custom models for a service that is to be measured, without training each of them.

Artifacts are placed in the data directory and published in the database as a job does, then bought
a provisioned throughput each through boto3, as a user does. Files are linked, so a thousand models
take the room of a few.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.running import Running
from benchmarks.training_work import shipped_weights

from outcrop.ids import custom_model_arn, foundation_model_arn, new_id
from outcrop.models.artifact import folder_digest
from outcrop.models.catalog import shipped_models
from outcrop.models.weights import SHIPPED_KEY
from outcrop.settings import Settings
from outcrop.store import models
from outcrop.store.database import connect, transaction
from outcrop.store.rows import NewCustomModel

BASE_MODEL = "amazon.titan-text-express-v1"
IN_SERVICE_SECONDS = 120


def place_weights(data_dir: Path) -> None:
    """Give a data directory the shipped model's weights, so that no service converts them again."""
    folder = data_dir / "models" / "base" / SHIPPED_KEY
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        folder.symlink_to(shipped_weights(None).resolve(), target_is_directory=True)


def publish(data_dir: Path, adapters: Sequence[Path], count: int) -> list[str]:
    """Publish custom models on the shipped model and return their ARNs.

    Args:
        adapters: artifacts, taken in turn; their files are linked.
    """
    settings = Settings(data_dir=data_dir)
    base = next(model for model in shipped_models() if model.model_id == BASE_MODEL)
    digests = [folder_digest(adapter) for adapter in adapters]
    base_arn = foundation_model_arn(settings.region, BASE_MODEL)
    engine = connect(settings.effective_database_url)
    arns = []
    try:
        with transaction(engine) as connection:
            for number in range(count):
                model_id = new_id()
                path = f"models/custom/{model_id}/1"
                (data_dir / path).mkdir(parents=True)
                for file in sorted(adapters[number % len(adapters)].iterdir()):
                    os.link(file, data_dir / path / file.name)
                arn = custom_model_arn(
                    settings.region, settings.account, base.customization_id, model_id
                )
                new = NewCustomModel(
                    id=model_id,
                    account=settings.account,
                    region=settings.region,
                    arn=arn,
                    name=f"custom-{number}",
                    base_model_id=base.customization_id,
                    base_model_arn=base_arn,
                    foundation_model_arn=base_arn,
                    customization_type="FINE_TUNING",
                    hyper_parameters={"epochCount": "1"},
                    spec={"weights": base.weights},
                    metrics={},
                    artifact_path=path,
                    artifact_digest=digests[number % len(adapters)],
                )
                models.insert_model(connection, new)
                arns.append(arn)
    finally:
        engine.dispose()
    return arns


def buy(bedrock: Any, models_arns: Sequence[str]) -> list[str]:
    """Buy a provisioned throughput for each model and return their ARNs once all are InService."""
    found = [
        bedrock.create_provisioned_model_throughput(
            provisionedModelName=f"throughput-{number}", modelId=arn, modelUnits=1
        )["provisionedModelArn"]
        for number, arn in enumerate(models_arns)
    ]
    deadline = time.monotonic() + IN_SERVICE_SECONDS
    for arn in found:
        while True:
            status = bedrock.get_provisioned_model_throughput(provisionedModelId=arn)["status"]
            if status == "InService":
                break
            if status != "Creating" or time.monotonic() > deadline:
                raise SystemExit(f"the throughput {arn} is {status}")
            time.sleep(0.2)
    return found


def allowed(count: int, **settings: str) -> dict[str, str]:
    """Return the settings that let an account hold so many models with a model unit each.

    One unit more is left for requests on demand.

    Args:
        settings: further ones, as environment variables.
    """
    return {
        "OUTCROP_MAX_CUSTOM_MODELS": str(count),
        "OUTCROP_MAX_PROVISIONED_MODELS": str(count),
        "OUTCROP_MACHINE_MODEL_UNITS": str(count + 1),
        **settings,
    }


def process_of(service: Running, part: str) -> int:
    """Return the id of the service's process whose command line holds `part`."""
    found = [pid for pid, command in processes(service.pid).items() if part in command]
    if not found:
        raise SystemExit(f"the service has no process with {part}")
    return found[0]


def processes(root: int) -> dict[int, str]:
    """Return the command lines of a process and of all below it."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The name in the second field may hold blanks and brackets.
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
            commands[int(folder.name)] = command.strip()
    found = {}
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        if pid in commands:
            found[pid] = commands[pid]
        waiting += [child for child, parent in parents.items() if parent == pid]
    return found


def resident_bytes(pid: int) -> int:
    """Return how much memory a process has resident; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
