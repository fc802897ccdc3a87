"""What an exported model consists of: its forms, its model card and its manifest. Loads no torch.

The card says where the model came from and how it was made, for whoever gets it without this
service. The manifest names every file with its digest and is written last: a folder or a prefix
without it is not whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcrop import __version__
from outcrop.errors import ValidationException

ADAPTER, MERGED, GGUF = "adapter", "merged", "gguf"
F32, F16, BF16, Q8_0 = "f32", "f16", "bf16", "q8_0"
DATA_TYPES: Mapping[str, tuple[str, ...]] = {
    ADAPTER: (F32,),
    MERGED: (F32, F16, BF16),
    GGUF: (F32, F16, BF16, Q8_0),
}
"""Of each form what its numbers can be held in; the first is the default."""
CARD, MANIFEST = "README.md", "manifest.json"
GGUF_FILE = "model.gguf"
BASE_FOLDER = "base_model"
"""Beside an adapter over weights that are the custom model's own: these weights."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

_USE = {
    ADAPTER: """An adapter (LoRA) in peft's layout. It changes nothing by itself: load it over the
weights that it belongs to, {base}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{where}")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```
""",
    MERGED: """A whole model in Hugging Face's layout, in {data_type}, with its tokenizer and chat
template.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
""",
    GGUF: """A whole model in one GGUF file, matrices in {data_type}, with its tokenizer and chat
template.

```
llama-cli -m model.gguf
```
""",
}


@dataclass(frozen=True)
class Origin:
    """Where an exported model came from, and how it was made."""

    model_name: str
    model_arn: str
    artifact_digest: str
    base_name: str
    """Full name of the open model at the root."""
    base_license: str
    base_origin: str
    base_precision: str
    base_digest: str
    """SHA-256 of its weights as they are used here."""
    customization_type: str
    created_at: str
    job_name: str | None
    method: str
    """"adapter" or "full": whether there is an adapter, or all weights are the model's own."""
    has_own_weights: bool
    """Whether weights of its own lie below the adapter, or are the model."""
    hyper_parameters: Mapping[str, str]
    metrics: Mapping[str, Any]
    data: tuple[Mapping[str, Any], ...]
    """Role, SHA-256 and size of each file that it was trained on."""


def check_form(form: str, data_type: str | None) -> str:
    """Return what the numbers of an export are held in: as asked for, or the form's default.

    Raises:
        ValidationException: there is no such form, or it cannot hold that.
    """
    if form not in DATA_TYPES:
        raise ValidationException(
            f"The format {form!r} is not known. Known are {', '.join(DATA_TYPES)}."
        )
    allowed = DATA_TYPES[form]
    if data_type is None:
        return allowed[0]
    if data_type not in allowed:
        raise ValidationException(
            f"An export of format {form} cannot be of dataType {data_type!r}; it can be "
            f"{', '.join(allowed)}."
        )
    return data_type


def model_card(origin: Origin, form: str, data_type: str) -> str:
    """Return README.md; its first lines are what model hubs read."""
    where = BASE_FOLDER if origin.has_own_weights else "FOLDER_OF_THE_BASE_MODEL"
    base = (
        f"which lie beside it in `{BASE_FOLDER}/`"
        if origin.has_own_weights
        else f"those of the base model with the SHA-256 `{origin.base_digest}`"
    )
    use = _USE[form].format(base=base, where=where, data_type=data_type)
    loss = (origin.metrics.get("trainingMetrics") or {}).get("trainingLoss")
    measured = f"| Training loss, mean of the last epoch | {loss:.4f} |\n" if loss else ""
    for row in origin.metrics.get("validationMetrics") or ():
        measured += f"| Validation loss | {row['validationLoss']:.4f} |\n"
    parameters = ", ".join(f"{name} {value}" for name, value in origin.hyper_parameters.items())
    data = "\n".join(
        f"| {row['role']} | `{row['sha256']}` | {row.get('numBytes', '')} |" for row in origin.data
    )
    return f"""---
license: {origin.base_license.lower() if " " not in origin.base_license else "other"}
library_name: {"peft" if form == ADAPTER else "gguf" if form == GGUF else "transformers"}
pipeline_tag: text-generation
tags: [outcrop, {origin.customization_type.lower().replace("_", "-")}]
---

# {origin.model_name}

{use}
| What | |
|---|---|
| Base model | {origin.base_name} |
| Licence of the base model | {origin.base_license}; what is made from it is bound by it |
| Origin of the base weights | {origin.base_origin} |
| Precision of the base weights | {origin.base_precision} |
| SHA-256 of the base weights | `{origin.base_digest}` |
| Made by | {origin.customization_type}, {_METHODS[origin.method]} |
| Job | {origin.job_name or "none: it was not trained here"} |
| Made at | {origin.created_at} |
| Hyperparameters | {parameters or "defaults"} |
{measured}| Custom model | `{origin.model_arn}` |
| SHA-256 of its artifact | `{origin.artifact_digest}` |
| Exported by | Outcrop {__version__}, as {form} in {data_type} |

The base weights are those that were used, with the precision above; weights that are published
under the same name elsewhere may be others, and an adapter does not fit those exactly. The losses
are means in nats a token, measured on the job's own records. Nothing else was measured here: no
benchmark, no test of safety or bias.

## Data

| Role | SHA-256 | Bytes |
|---|---|---|
{data or "| not recorded | | |"}
"""


_METHODS = {"adapter": "an adapter (LoRA) beside frozen weights", "full": "all weights are its own"}


def write_manifest(folder: Path, origin: Origin, form: str, data_type: str) -> dict[str, Any]:
    """Write the manifest of a folder whose other files are there; returns its content."""
    files = []
    for path in files_of(folder):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        files.append({"name": name, "sha256": digest, "numBytes": path.stat().st_size})
    manifest = {
        "modelName": origin.model_name,
        "modelArn": origin.model_arn,
        "artifactDigest": origin.artifact_digest,
        "format": form,
        "dataType": data_type,
        "baseModel": origin.base_name,
        "baseLicense": origin.base_license,
        "baseDigest": origin.base_digest,
        "exportedBy": f"outcrop {__version__}",
        "files": files,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in the order of their names, the manifest last."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    yield from (path for path in found if path != folder / MANIFEST)
    yield from (path for path in found if path == folder / MANIFEST)
