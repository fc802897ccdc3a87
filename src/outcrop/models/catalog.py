"""The base models on offer: what each id stands for, is bounded by, and really is.

Reads the data files beside this module and the operator's entries in the data directory. A file of
ours holds one family: the hyperparameter table, quotas and formats that Bedrock documents for it,
and its models. Who serves and trains them is a key into `weights.toml`. It knows names and numbers
only; weights are opened elsewhere.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from outcrop.errors import ModelError
from outcrop.ids import is_imported, parse_arn
from outcrop.models.imported import LIKE, imported_base
from outcrop.models.operator import OperatorEntry, operator_entries
from outcrop.settings import Settings

FINE_TUNING, CONTINUED_PRE_TRAINING = "FINE_TUNING", "CONTINUED_PRE_TRAINING"
"""Customization types, as Bedrock names them."""
ADAPTER, FULL = "adapter", "full"
"""What is trained: a change of low rank beside the frozen weights, or all the weights."""
DOCUMENTS = "continued-pre-training"
"""The one format of data for continued pre-training: raw text."""
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WEIGHTS_FILE = "weights.toml"
_FACTORS_FILE = "learning_rate_factors.toml"


@dataclass(frozen=True)
class Hyperparameter:
    """One row of a family's table; the names are Bedrock's."""

    name: str
    kind: Literal["int", "float"]
    minimum: float
    """The least value that is allowed."""
    maximum: float
    """The greatest value that is allowed."""
    default: float | None
    """What is taken where the user gives none; None means that it must be given."""
    unit: str
    source: str


@dataclass(frozen=True)
class TokenLimit:
    """How long a record may be at batch sizes up to `max_batch_size`, in tokens."""

    max_batch_size: int
    input: int | None = None
    output: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class RecordQuota:
    """How many records Bedrock takes; None means that no number is known."""

    min_training: int | None = None
    """Bedrock refuses fewer. Here fewer are trained on: a small try must be possible."""
    max_training: int | None = None
    max_validation: int | None = None
    max_total: int | None = None
    """Training and validation records together."""


@dataclass(frozen=True)
class LoraConfig:
    """Shape and reach of an adapter. Bedrock has no parameter for it; hyperparameters of our own
    do."""

    rank: int = 16
    """Width of the change, at least 1."""
    alpha: float = 32.0
    """The change is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ALL_LINEARS
    """Last part of the names of the linear layers that are adapted."""

    @property
    def scaling(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / self.rank


OWN_HYPER_PARAMETERS = (
    Hyperparameter(
        "adapterRank", "int", 1, 256, None, "width of the adapter", "our own: Bedrock has none"
    ),
    Hyperparameter(
        *("adapterAlpha", "float", 0.1, 1024.0, None),
        *("the adapter is multiplied by adapterAlpha / adapterRank", "our own: Bedrock has none"),
    ),
)
"""What every family takes besides Bedrock's own, as numbers. Defaults are the catalogue's adapter,
or that of the custom model a job starts from; see `train/own_parameters.py`."""


@dataclass(frozen=True)
class BaseModel:
    """One base model as Bedrock names it, and the open model that stands behind the name."""

    model_id: str
    """The id in published examples, such as `amazon.titan-text-express-v1`."""
    customization_id: str
    """The id with version and context, which ARNs of jobs and custom models carry."""
    aliases: tuple[str, ...]
    """Further ids for the same."""
    family: str
    """Whose hyperparameters and quotas it has."""
    body_family: str
    """Whose request and response bodies: titan, cohere, llama, claude, mistral or nova."""
    model_name: str
    """The real model's name, at most 20 characters."""
    provider_name: str
    """The real model's maker, at most 20 characters."""
    full_name: str
    license: str
    quantization: str
    """Where the numbers of the weights come from."""
    origin: str
    """Where the weights come from."""
    weights: str
    """Key of the weights, for `models/weights.py`. Models with the same key share them."""
    context_tokens: int
    """What the real model was made for, prompt and answer together."""
    bedrock_output_tokens: int
    """Tokens one invocation may ask for at Bedrock."""
    data_formats: tuple[str, ...]
    """For fine-tuning: "prompt-completion", "conversation", "claude-messages"."""
    customizations: tuple[str, ...]
    """Customization types that really work on it."""
    hyper_parameters: tuple[Hyperparameter, ...]
    records: RecordQuota
    """For fine-tuning."""
    token_limits: tuple[TokenLimit, ...]
    """By rising batch size; above the last row, that row holds."""
    batch_size: int
    """Records of one optimizer step where the family has no batchSize."""
    base_learning_rate: float | None
    """What learningRateMultiplier multiplies; None where the family has learningRate."""
    learning_rate_factor: Mapping[str, float]
    """Method ("adapter", "full") -> what turns the user's learning rate into the optimizer's."""
    method: str = ADAPTER
    """What a job trains that does not say."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter of a job that does not say. No other layers than these can have one."""
    pre_training_records: RecordQuota = field(default_factory=RecordQuota)
    """For continued pre-training."""
    sources: tuple[str, ...] = ()
    takes_messages: bool = True
    """Whether it answers conversations; an imported model without a chat template does not."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Every id it answers to, each once."""
        return tuple(dict.fromkeys((self.model_id, self.customization_id, *self.aliases)))

    @property
    def max_output_tokens(self) -> int:
        """Tokens one invocation may ask for: the lesser of Bedrock's limit and the context."""
        return min(self.bedrock_output_tokens, self.context_tokens)

    def formats(self, customization_type: str) -> tuple[str, ...]:
        """Return the data formats that a job of a type takes, the preferred first."""
        is_pre_training = customization_type == CONTINUED_PRE_TRAINING
        return (DOCUMENTS,) if is_pre_training else self.data_formats

    def record_quota(self, customization_type: str) -> RecordQuota:
        """Return how many records a job of a type may have."""
        is_pre_training = customization_type == CONTINUED_PRE_TRAINING
        return self.pre_training_records if is_pre_training else self.records

    def token_limit(self, batch_size: int) -> TokenLimit | None:
        """Return the limit at a batch size; None where Bedrock documents none."""
        for limit in self.token_limits:
            if batch_size <= limit.max_batch_size:
                return limit
        return self.token_limits[-1] if self.token_limits else None


@dataclass(frozen=True)
class Catalog:
    """All base models, in the order in which they are listed."""

    models: tuple[BaseModel, ...]
    settings: Settings | None = None
    """Where imported models lie, which no list shows; None knows of none."""

    @property
    def all_ids(self) -> tuple[str, ...]:
        """Every id of every model."""
        return tuple(identifier for model in self.models for identifier in model.ids)

    def resolve(self, identifier: str, *, region: str | None = None) -> BaseModel | None:
        """Find a model by id, context-suffixed id, alias or foundation-model ARN.

        Args:
            region: of who asks: an ARN of any other finds nothing. None takes them all, and is for
                ids that our own rows name: those of imported models, too, which belong to accounts.
        """
        if region is None and self.settings is not None and is_imported(identifier):
            like = next(model for model in shipped_models() if model.family == LIKE)
            return imported_base(self.settings, identifier, like)
        arn = parse_arn(identifier)
        if arn is not None:
            if region not in (None, arn.region):
                return None
            if (arn.service, arn.resource_type, arn.account) != ("bedrock", "foundation-model", ""):
                return None
            identifier = arn.resource_id
        for model in self.models:
            if identifier in model.ids:
                return model
        return None


def load_catalog(settings: Settings) -> Catalog:
    """Read the shipped files and the operator's entries.

    An operator's entry for an id that ships takes that id over: the same bounds, other weights.

    Raises:
        ModelError: an operator's entry cannot be used; the message names the file.
    """
    models = {model.model_id: model for model in shipped_models()}
    for entry in operator_entries(settings):
        model = _operator_model(entry, models)
        models[model.model_id] = model
    return Catalog(tuple(models.values()), settings)


@cache
def shipped_models() -> tuple[BaseModel, ...]:
    """Return the models of the data files."""
    weights, factors = _read(_WEIGHTS_FILE), _read(_FACTORS_FILE)
    return tuple(
        model
        for name in sorted(_files())
        if name not in (_WEIGHTS_FILE, _FACTORS_FILE)
        for model in _family(_read(name), weights, factors)
    )


def families() -> tuple[str, ...]:
    """Return the families whose bounds a model of an operator can have."""
    return tuple(dict.fromkeys(model.family for model in shipped_models()))


def _files() -> list[str]:
    folder = resources.files("outcrop.models") / "catalog_data"
    return [file.name for file in folder.iterdir() if file.name.endswith(".toml")]


def _read(name: str) -> dict[str, Any]:
    file = resources.files("outcrop.models") / "catalog_data" / name
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _family(
    table: Mapping[str, Any], weights: Mapping[str, Any], factors: Mapping[str, Any]
) -> Iterator[BaseModel]:
    for entry in table["models"]:
        real = weights[table["weights"]]
        yield BaseModel(
            model_id=entry["model_id"],
            customization_id=entry["customization_id"],
            aliases=tuple(entry.get("aliases", ())),
            family=table["family"],
            body_family=table["body_family"],
            model_name=real["model_name"],
            provider_name=real["provider_name"],
            full_name=real["full_name"],
            license=real["license"],
            quantization=real["quantization"],
            origin=real["origin"],
            weights=table["weights"],
            context_tokens=real["context_tokens"],
            bedrock_output_tokens=entry["max_output_tokens"],
            data_formats=tuple(table["data_formats"]),
            customizations=tuple(entry.get("customizations", table["customizations"])),
            hyper_parameters=tuple(_hyper_parameters(table, entry)),
            records=RecordQuota(**{**table["records"], **entry.get("records", {})}),
            token_limits=tuple(TokenLimit(**row) for row in entry["token_limits"]),
            batch_size=table["batch_size"],
            base_learning_rate=table.get("base_learning_rate"),
            learning_rate_factor=factors.get(entry["model_id"], factors.get(table["family"], {})),
            method=table.get("method", ADAPTER),
            lora=LoraConfig(**table.get("adapter", {})),
            pre_training_records=RecordQuota(
                **table.get("continued_pre_training", {}).get("records", {})
            ),
            sources=tuple(table["sources"]),
        )


def _hyper_parameters(
    table: Mapping[str, Any], entry: Mapping[str, Any]
) -> Iterator[Hyperparameter]:
    bounds = entry.get("hyper_parameters", {})
    for row in table.get("hyper_parameters", ()):
        values = {"default": None, "source": table["sources"][0], **row}
        yield Hyperparameter(**{**values, **bounds.get(row["name"], {})})


def _operator_model(entry: OperatorEntry, models: Mapping[str, BaseModel]) -> BaseModel:
    """Return an entry's model: the id's own bounds where it ships, its family's otherwise."""
    table = entry.table
    try:
        model_id = str(table["model_id"])
        like = models.get(model_id) or next(
            model for model in shipped_models() if model.family == table["family"]
        )
        context = int(table["context_tokens"])
        real: dict[str, Any] = {
            name: str(table[name])
            for name in (
                "model_name",
                "provider_name",
                "full_name",
                "license",
                "quantization",
                "origin",
            )
        }
    except KeyError as error:
        raise ModelError(
            f"{entry.file} has no {error.args[0]}. `outcrop models add` writes such files."
        ) from error
    except StopIteration:
        raise ModelError(
            f"{entry.file} names the family {table['family']!r}. Known are {', '.join(families())}."
        ) from None
    if model_id not in models:
        like = replace(like, model_id=model_id, customization_id=model_id, aliases=())
    # Entries from before other architectures than Llama's kin were known do not name the layers.
    targets = tuple(map(str, table.get("adapter_targets", like.lora.targets)))
    lora = replace(like.lora, targets=targets)
    return replace(like, **real, weights=entry.key, context_tokens=context, lora=lora)
