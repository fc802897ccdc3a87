"""Turn messages into the tokens of a prompt that fits the model's context with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from outcrop.data.records import Message
from outcrop.data.render import Renderer
from outcrop.errors import DataError, ValidationException
from outcrop.serve.request import SamplingParams


def render_prompt(renderer: Renderer, messages: Sequence[Message]) -> list[int]:
    """Return the prompt's tokens.

    Raises:
        ValidationException: the messages are in an order the model's template does not know.
    """
    try:
        return renderer.render_prompt(messages)
    except DataError as error:
        raise ValidationException(error.message) from error


def fit_prompt(
    renderer: Renderer, messages: Sequence[Message], sampling: SamplingParams, max_context: int
) -> tuple[list[int], int]:
    """Return the prompt's tokens and how many may be drawn after it.

    Raises:
        ValidationException: they do not fit into `max_context` together; names both numbers.
    """
    ids = render_prompt(renderer, messages)
    wanted = sampling.max_tokens
    if wanted is None:
        if len(ids) >= max_context:
            raise ValidationException(
                f"The prompt has {len(ids)} tokens, and the model's context holds {max_context} "
                "with the answer. Shorten the prompt."
            )
        return ids, max_context - len(ids)
    if len(ids) + wanted > max_context and sampling.truncate != "none" and wanted < max_context:
        ids = _cut(renderer, messages, len(ids) + wanted - max_context, sampling, ids)
    if len(ids) + wanted > max_context:
        raise ValidationException(
            f"The prompt has {len(ids)} tokens and up to {wanted} are asked for as the answer, but "
            f"the model's context holds {max_context} in all. Shorten the prompt or ask for fewer "
            "tokens."
        )
    return ids, wanted


def _cut(
    renderer: Renderer,
    messages: Sequence[Message],
    surplus: int,
    sampling: SamplingParams,
    ids: list[int],
) -> list[int]:
    """Take tokens off one end of the last message's text until the prompt fits."""
    limit = len(ids) - surplus
    *before, last = messages
    text_ids = renderer.tokenizer.encode(last.text)
    # Text that is cut may take a token more when it is encoded anew, so it may need another round.
    while len(ids) > limit and text_ids:
        surplus = len(ids) - limit
        text_ids = text_ids[:-surplus] if sampling.truncate == "end" else text_ids[surplus:]
        text = renderer.decode(text_ids)
        ids = render_prompt(renderer, (*before, replace(last, text=text)))
    return ids
