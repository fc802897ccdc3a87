"""InvokeModel bodies of each model family, to messages and sampling parameters, and answers back.

Each family is one file with `parse` and `format`; which one a model speaks stands in the
catalogue. Knows neither weights nor sockets; imports no torch.

Source: "Inference request parameters and response fields for foundation models", user guide.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats import claude, cohere, llama, mistral, nova, titan
from outcrop.serve.prompt_formats.native import NativeRequest
from outcrop.serve.prompt_formats.schema import parse_object
from outcrop.serve.request import Generation

__all__ = ["FAMILIES", "Family", "NativeRequest", "format_body", "parse_body"]


@dataclass(frozen=True)
class Family:
    """The two directions of one family's bodies."""

    parse: Callable[[BaseModel, dict[str, Any], int], NativeRequest]
    """(base, body, most tokens an answer may have)"""
    format: Callable[[BaseModel, NativeRequest, list[Generation]], Any]


FAMILIES: Mapping[str, Family] = {
    "titan": Family(titan.parse, titan.format),
    "cohere": Family(cohere.parse, cohere.format),
    "llama": Family(llama.parse, llama.format),
    "claude": Family(claude.parse, claude.format),
    "mistral": Family(mistral.parse, mistral.format),
    "nova": Family(nova.parse, nova.format),
}


def parse_body(base: BaseModel, body: bytes) -> NativeRequest:
    """Read an InvokeModel body in the form of the model's family.

    Raises:
        ValidationException: the body cannot be read, has missing or unknown keys, or a value of a
            wrong type or out of range; the message names the key, the value and what is allowed.
    """
    return FAMILIES[base.body_family].parse(base, parse_object(body), base.max_output_tokens)


def format_body(
    base: BaseModel, request: NativeRequest, generations: Sequence[Generation]
) -> bytes:
    """Return the answer in the form of the model's family.

    Args:
        generations: as many as `request.num_generations`, at least one.
    """
    value = FAMILIES[base.body_family].format(base, request, list(generations))
    return json.dumps(value, ensure_ascii=False).encode("utf-8")
