"""What is the same of an invocation wherever it comes from: a client of now, or a batch job.

Reads a Converse request's members, refuses what is not offered, and says an answer in Converse's
form. Bodies of InvokeModel are `prompt_formats`' to read and write. Knows no caller and no socket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outcrop.errors import ValidationException
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats import NativeRequest
from outcrop.serve.prompt_formats.converse import (
    REASONS,
    check_paths,
    parse_converse,
    response_fields,
)
from outcrop.serve.prompt_formats.tools import converse_content
from outcrop.serve.request import Generation, GenerationRequest, Owner

GUARDRAILS = "Guardrails are not offered by this service."
NOT_SUPPORTED = {
    "guardrailConfig": GUARDRAILS,
    "outputConfig": "This model doesn't support the outputConfig field. Remove outputConfig and "
    "try again.",
    "promptVariables": "promptVariables is for prompts of Prompt management, which are not offered "
    "by this service. Remove promptVariables and try again.",
}
"""Members of Converse that change what is answered, and why they are refused."""


def read_converse(
    base: BaseModel, params: Mapping[str, Any], model_id: str, region: str
) -> NativeRequest:
    """Read a Converse request.

    Args:
        params: its members, as the service model has them.
        model_id, region: as messages name them.
    Raises:
        ValidationException: something in it is not offered or cannot be read; the message names it.
    """
    refuse_what_is_not_supported(params)
    latency = params.get("performanceConfig", {}).get("latency")
    check_ways(model_id, region, latency, params.get("serviceTier", {}).get("type"))
    check_paths(params.get("additionalModelResponseFieldPaths", ()))
    return parse_converse(base, params)


def refuse_what_is_not_supported(params: Mapping[str, Any]) -> None:
    """Refuse members of Converse that are not offered. Raises ValidationException."""
    for name, reason in NOT_SUPPORTED.items():
        if params.get(name):
            raise ValidationException(reason)


def check_ways(model_id: str, region: str, latency: str | None, tier: str | None) -> None:
    """Refuse ways of serving that there are not: each answer comes as fast as it can.

    Raises:
        ValidationException: names the model, what was asked for and what there is.
    """
    if latency not in (None, "standard"):
        raise ValidationException(
            f"Latency performance configuration is not supported for {model_id} in "
            f"{region}. Use standard."
        )
    if tier not in (None, "default"):
        raise ValidationException(
            f"The service tier {tier} is not supported for {model_id} in {region}. Use default."
        )


def converse_answer(
    base: BaseModel,
    native: NativeRequest,
    generation: Generation,
    params: Mapping[str, Any],
    latency_ms: int,
) -> dict[str, Any]:
    """Return the members of Converse's answer.

    Args:
        params: of the request.
        latency_ms: since the request came, in milliseconds.
    """
    message = {"role": "assistant", "content": converse_content(generation)}
    return {
        "output": {"message": message},
        **stopped(base, native, generation, params),
        **metadata(generation, params, latency_ms),
    }


def stopped(
    base: BaseModel, native: NativeRequest, generation: Generation, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the members that say why an answer ended, with the fields that were asked for."""
    found: dict[str, Any] = {"stopReason": REASONS[generation.finish_reason]}
    paths = params.get("additionalModelResponseFieldPaths", ())
    fields = response_fields(base, native, generation, paths) if paths else {}
    return found | ({"additionalModelResponseFields": fields} if fields else {})


def metadata(generation: Generation, params: Mapping[str, Any], latency_ms: int) -> dict[str, Any]:
    """Return the members that say what an answer took."""
    echoed = ("performanceConfig", "serviceTier")
    return {
        "usage": {
            "inputTokens": generation.input_tokens,
            "outputTokens": generation.output_tokens,
            "totalTokens": generation.input_tokens + generation.output_tokens,
        },
        "metrics": {"latencyMs": latency_ms},
        **{name: params[name] for name in echoed if name in params},
    }


def generation_request(
    native: NativeRequest,
    *,
    adapter: str | None,
    adapter_digest: str | None,
    owner: Owner,
    timeout_seconds: float | None = None,
) -> GenerationRequest:
    """Return what a model server is asked for one answer; see GenerationRequest."""
    use = native.tool_use
    return GenerationRequest(
        tools=use.tools if use else (),
        start=use.start if use else "",
        shown=(use.format.marker,) if use and use.format else (),
        messages=native.messages,
        sampling=native.sampling,
        adapter=adapter,
        adapter_digest=adapter_digest,
        timeout_seconds=timeout_seconds,
        prompt=native.raw_prompt,
        spells_control=native.spells_control,
        owner=owner,
    )
