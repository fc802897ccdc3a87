"""InvokeModel bodies of each model family, to messages and sampling parameters, and answers back.

Each family is one file; which one a model speaks stands in the catalogue. A Converse request is
read for all of them in `converse.py`. Knows neither weights nor sockets; imports no torch.

Source: "Inference request parameters and response fields for foundation models", user guide.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outcrop.errors import ValidationException
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats import claude, cohere, imported, llama, mistral, nova, titan
from outcrop.serve.prompt_formats.native import NativeRequest, Piece
from outcrop.serve.prompt_formats.schema import Fields, parse_object
from outcrop.serve.request import Generation, SamplingParams

__all__ = ["FAMILIES", "Family", "NativeRequest", "Piece", "format_body", "parse_body"]


@dataclass(frozen=True)
class Family:
    """One family's bodies."""

    parse: Callable[[BaseModel, dict[str, Any], int], NativeRequest]
    """(base, body, most tokens an answer may have)"""
    format: Callable[[BaseModel, NativeRequest, list[Generation]], Any]
    """The answer in one piece."""
    chunks: Callable[[BaseModel, NativeRequest, Piece], list[dict[str, Any]]]
    """What a piece of a streamed answer becomes, in order; the last one may be added to."""
    sampling: Callable[[BaseModel, dict[str, Any], int], SamplingParams]
    """(base, checked body, most tokens an answer may have); the prompt need not be there."""
    fields: Fields
    prompt_keys: tuple[str, ...]
    """Keys that Converse has its own members for, or no meaning."""
    inference: Mapping[str, tuple[str, ...]]
    """Member of Converse's inferenceConfig -> where the same stands in a body."""


FAMILIES: Mapping[str, Family] = {
    "titan": Family(
        *(titan.parse, titan.format, titan.chunks, titan.sampling, titan.FIELDS),
        prompt_keys=("inputText",),
        inference={
            "maxTokens": ("textGenerationConfig", "maxTokenCount"),
            "temperature": ("textGenerationConfig", "temperature"),
            "topP": ("textGenerationConfig", "topP"),
            "stopSequences": ("textGenerationConfig", "stopSequences"),
        },
    ),
    "cohere": Family(
        *(cohere.parse, cohere.format, cohere.chunks, cohere.sampling, cohere.FIELDS),
        prompt_keys=("prompt", "stream", "num_generations"),
        inference={
            "maxTokens": ("max_tokens",),
            "temperature": ("temperature",),
            "topP": ("p",),
            "stopSequences": ("stop_sequences",),
        },
    ),
    "llama": Family(
        *(llama.parse, llama.format, llama.chunks, llama.sampling, llama.FIELDS),
        prompt_keys=("prompt",),
        inference={
            "maxTokens": ("max_gen_len",),
            "temperature": ("temperature",),
            "topP": ("top_p",),
        },
    ),
    "claude": Family(
        *(claude.parse, claude.format, claude.chunks, claude.sampling, claude.FIELDS),
        prompt_keys=("messages", "system", "tools", "tool_choice"),
        inference={
            "maxTokens": ("max_tokens",),
            "temperature": ("temperature",),
            "topP": ("top_p",),
            "stopSequences": ("stop_sequences",),
        },
    ),
    "mistral": Family(
        *(mistral.parse, mistral.format, mistral.chunks, mistral.sampling, mistral.FIELDS),
        prompt_keys=("prompt",),
        inference={
            "maxTokens": ("max_tokens",),
            "temperature": ("temperature",),
            "topP": ("top_p",),
            "stopSequences": ("stop",),
        },
    ),
    "nova": Family(
        *(nova.parse, nova.format, nova.chunks, nova.sampling, nova.FIELDS),
        prompt_keys=("messages", "system", "schemaVersion", "toolConfig"),
        inference={
            "maxTokens": ("inferenceConfig", "maxTokens"),
            "temperature": ("inferenceConfig", "temperature"),
            "topP": ("inferenceConfig", "topP"),
            "stopSequences": ("inferenceConfig", "stopSequences"),
        },
    ),
    "imported": Family(
        *(imported.parse, imported.format, imported.chunks, imported.sampling, imported.FIELDS),
        prompt_keys=("prompt", "logprobs"),
        inference={
            "maxTokens": ("max_gen_len",),
            "temperature": ("temperature",),
            "topP": ("top_p",),
            "stopSequences": ("stop",),
        },
    ),
}


def parse_body(base: BaseModel, body: bytes, *, streamed: bool = False) -> NativeRequest:
    """Read an InvokeModel body in the form of the model's family.

    Args:
        streamed: whether the answer can come in pieces, as a body of Cohere's may want it.
    Raises:
        ValidationException: the body cannot be read, has missing or unknown keys, or a value of a
            wrong type or out of range; the message names the key, the value and what is allowed.
    """
    family = FAMILIES[base.body_family]
    request = family.parse(base, parse_object(body), base.max_output_tokens)
    if request.in_pieces and not streamed:
        raise ValidationException(
            "stream is true, but InvokeModel answers in one piece. Leave stream out, set it to "
            "false, or use InvokeModelWithResponseStream."
        )
    return request


def format_body(
    base: BaseModel, request: NativeRequest, generations: Sequence[Generation]
) -> bytes:
    """Return the answer in the form of the model's family.

    Args:
        generations: as many as `request.num_generations`, at least one.
    """
    return dump(FAMILIES[base.body_family].format(base, request, list(generations)))


def dump(value: Any) -> bytes:
    """Return an answer's JSON."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8")
