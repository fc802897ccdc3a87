"""Real records for measurements of speed: which AWS operation does a description belong to?

They are made of the service models that come with botocore, so every machine that can run Outcrop
has them, and one version of botocore always gives the same ones.
"""

from __future__ import annotations

import html
import random
import re

from botocore.loaders import Loader

from outcrop.data.records import Example, Message
from outcrop.data.render import Renderer

LEAST_WORDS, MOST_WORDS = 8, 200
LEAST_TOKENS, MOST_TOKENS = 30, 350
SEED = 0
_TAG = re.compile(r"<[^>]*>")


def operation_records() -> list[dict[str, str]]:
    """Return all records in a fixed random order: {"prompt", "completion"}, no prompt twice."""
    loader = Loader()
    found: dict[str, str] = {}
    for service in loader.list_available_services("service-2"):
        model = loader.load_service_model(service, "service-2")
        for operation, described in sorted(model["operations"].items()):
            words = plain_text(described.get("documentation", "")).split()[:MOST_WORDS]
            if len(words) >= LEAST_WORDS:
                found.setdefault(" ".join(words), f"{service}:{operation}")
    records = [
        {"prompt": f"Which AWS operation does this describe?\n\n{text}", "completion": answer}
        for text, answer in found.items()
    ]
    random.Random(SEED).shuffle(records)
    return records


def operation_examples(renderer: Renderer, count: int) -> list[Example]:
    """Return so many records of 30 to 350 tokens, rendered as the service renders them."""
    examples: list[Example] = []
    for record in operation_records():
        example = renderer.render_example(
            (Message("user", record["prompt"]), Message("assistant", record["completion"]))
        )
        if LEAST_TOKENS <= len(example.input_ids) <= MOST_TOKENS:
            examples.append(example)
        if len(examples) == count:
            return examples
    raise SystemExit(f"botocore describes only {len(examples)} such operations, not {count}")


def plain_text(documentation: str) -> str:
    """Return a description without tags, entities and line breaks."""
    return " ".join(html.unescape(_TAG.sub(" ", documentation)).split())
