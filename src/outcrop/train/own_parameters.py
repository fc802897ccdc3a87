"""The hyperparameters that Bedrock has none of: what is trained, and in which shape.

    method          "adapter" or "full"
    adapterRank     width of the adapter
    adapterAlpha    the adapter is multiplied by adapterAlpha / adapterRank
    adapterTargets  the layers that have one, separated by commas
    dataPolicy      "report" or "clean": whether the data are trained on as they stand

What a job leaves out is the catalogue's, or that of the adapter it starts from: training goes on
from the values of that one, so the new one must have room for it. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from outcrop.models.catalog import ADAPTER, FULL, OWN_HYPER_PARAMETERS, BaseModel, LoraConfig

METHOD, TARGETS, POLICY = "method", "adapterTargets", "dataPolicy"
REPORT, CLEAN = "report", "clean"
"""What becomes of data that can be trained on and have something to drop or to repair: it is
reported and nothing else, or it is dropped and repaired before training."""
RANK, ALPHA = (row.name for row in OWN_HYPER_PARAMETERS)
OWN_NAMES = (METHOD, RANK, ALPHA, TARGETS, POLICY)


@dataclass(frozen=True)
class Parent:
    """The custom model that a job starts from, as far as its plan must know it."""

    name: str
    adapter: LoraConfig | None
    """The shape of its adapter; None where it was trained as a whole and has none."""


@dataclass(frozen=True)
class Choice:
    """What a job trains."""

    method: str
    lora: LoraConfig
    """The adapter's shape; without meaning where all weights are trained."""
    data_policy: str
    """REPORT or CLEAN."""


def choose(
    base: BaseModel,
    sent: Mapping[str, str],
    parent: Parent | None,
    read: Callable[[str, str], float | None],
) -> tuple[Choice, list[str]]:
    """Return what is trained, and what is wrong with the parameters that were sent.

    Args:
        sent: the hyperparameters as they were sent, Bedrock's own among them.
        read: gives the number that (name, text) means; None where it is none that is allowed, and
            then has said so already.
    """
    findings: list[str] = []
    method = sent.get(METHOD, base.method)
    if method not in (ADAPTER, FULL):
        findings.append(f"Hyperparameter {METHOD} is {method[:40]!r}; it must be adapter or full.")
    policy = sent.get(POLICY, REPORT)
    if policy not in (REPORT, CLEAN):
        findings.append(
            f"Hyperparameter {POLICY} is {policy[:40]!r}; it must be {REPORT} or {CLEAN}."
        )
    start = base.lora if parent is None or parent.adapter is None else parent.adapter
    rank = _given(sent, RANK, read)
    alpha = _given(sent, ALPHA, read)
    targets = start.targets
    if TARGETS in sent:
        targets, wrong = _targets(sent[TARGETS], base)
        findings += wrong
    given = [name for name in (RANK, ALPHA, TARGETS) if name in sent]
    if method == FULL and given:
        findings.append(
            f"{METHOD} is full, so there is no adapter: leave out {', '.join(given)}, or set "
            f"{METHOD} to adapter."
        )
    width = start.rank if rank is None else int(rank)
    # The scaling stays as it is, because the learning rate was chosen for it.
    lora = LoraConfig(width, start.scaling * width if alpha is None else alpha, targets)
    if method == ADAPTER and parent is not None and parent.adapter is not None and not findings:
        findings += _too_small(lora, parent.name, parent.adapter)
    return Choice(method, lora, policy), findings


def _given(
    sent: Mapping[str, str], name: str, read: Callable[[str, str], float | None]
) -> float | None:
    return read(name, sent[name]) if name in sent else None


def _targets(text: str, base: BaseModel) -> tuple[tuple[str, ...], list[str]]:
    """Return the layers that a text names, in the catalogue's order, and what is wrong with it."""
    named = [name.strip() for name in text.split(",")]
    known = base.lora.targets
    wrong = [name for name in named if name not in known]
    if not wrong and len(set(named)) == len(named):
        return tuple(name for name in known if name in named), []
    shown = repr(text if len(text) <= 80 else text[:77] + "...")
    return known, [
        f"Hyperparameter {TARGETS} is {shown}; it must name layers, each once and separated by "
        f"commas, out of {', '.join(known)}."
    ]


def _too_small(lora: LoraConfig, name: str, old: LoraConfig) -> list[str]:
    """Say where an adapter has no room for the one that it goes on from."""
    findings = []
    if lora.rank < old.rank:
        findings.append(
            f"Hyperparameter {RANK} is {lora.rank}; the custom model {name}, which the job starts "
            f"from, has an adapter of rank {old.rank}. Leave {RANK} out or set it to {old.rank} or "
            f"more, or set {METHOD} to full."
        )
    missing = [target for target in old.targets if target not in lora.targets]
    if missing:
        findings.append(
            f"Hyperparameter {TARGETS} lacks {', '.join(missing)}; the custom model {name}, which "
            f"the job starts from, has an adapter there. Leave {TARGETS} out or add them, or set "
            f"{METHOD} to full."
        )
    return findings
