"""Turn messages into the tokens of a prompt that fits the model's context with its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from outcrop.data.records import Message, Tool
from outcrop.data.render import Renderer
from outcrop.errors import DataError, ModelErrorException, ValidationException
from outcrop.serve.request import GenerationRequest, SamplingParams


def render_prompt(
    renderer: Renderer,
    messages: Sequence[Message],
    max_context: int,
    tools: Sequence[Tool] = (),
    start: str = "",
) -> list[int]:
    """Return the prompt's tokens.

    Args:
        tools: what the model may call.
        start: with tools, what the answer begins with.
    Raises:
        ValidationException: the messages are in an order the model's template does not know, or
            are longer than any text of `max_context` tokens: what can never fit is not encoded,
            which would take many seconds for the longest body.
    """
    most = max_context * renderer.tokenizer.longest_token
    num_characters = sum(len(message.text) for message in messages)
    num_characters += sum(len(json.dumps(vars(tool), ensure_ascii=False)) for tool in tools)
    if num_characters > most:
        raise ValidationException(
            f"The prompt has {num_characters:,} characters, and the model's context holds "
            f"{max_context:,} tokens, which is {most:,} characters at the very most. Shorten the "
            "prompt."
        )
    try:
        return renderer.render_prompt(messages, tools, start)
    except DataError as error:
        raise ValidationException(error.message) from error


def fit_request(
    renderer: Renderer, request: GenerationRequest, max_context: int, vocabulary: int
) -> tuple[list[int], int]:
    """Return a request's prompt in tokens and how many may be drawn after it.

    Raises:
        ValidationException: they do not fit into `max_context` together.
        ModelErrorException: the tokenizer gives tokens that the model does not know.
    """
    sampling = request.sampling
    if request.prompt is not None:
        ids, max_tokens = check_prompt(
            *(renderer, request.prompt, sampling, max_context, vocabulary),
            spells_control=request.spells_control,
        )
    else:
        ids, max_tokens = fit_prompt(
            *(renderer, request.messages, sampling, max_context),
            *(request.tools, request.start),
        )
    if max(ids) >= vocabulary:
        raise ModelErrorException(
            f"The tokenizer gives tokens up to {max(ids)}, but the model knows only {vocabulary}."
        )
    return ids, max_tokens


def fit_prompt(
    renderer: Renderer,
    messages: Sequence[Message],
    sampling: SamplingParams,
    max_context: int,
    tools: Sequence[Tool] = (),
    start: str = "",
) -> tuple[list[int], int]:
    """Return the prompt's tokens and how many may be drawn after it.

    Args:
        tools: what the model may call; a prompt with tools is never cut.
        start: with tools, what the answer begins with.
    Raises:
        ValidationException: they do not fit into `max_context` together; names both numbers.
    """
    wanted = sampling.max_tokens
    if tools or any(message.calls for message in messages):
        sampling = replace(sampling, truncate="none")
    if wanted is not None and sampling.truncate != "none":
        messages = _shorten(renderer, messages, sampling, max_context)
    ids = render_prompt(renderer, messages, max_context, tools, start)
    if wanted is None:
        if len(ids) >= max_context:
            raise ValidationException(
                f"The prompt has {len(ids)} tokens, and the model's context holds {max_context} "
                "with the answer. Shorten the prompt."
            )
        return ids, max_context - len(ids)
    if len(ids) + wanted > max_context and sampling.truncate != "none" and wanted < max_context:
        ids = _cut(renderer, messages, max_context - wanted, sampling, ids)
    if len(ids) + wanted > max_context:
        raise ValidationException(
            f"The prompt has {len(ids)} tokens and up to {wanted} are asked for as the answer, but "
            f"the model's context holds {max_context} in all. Shorten the prompt or ask for fewer "
            "tokens."
        )
    return ids, wanted


def encode_prompt(
    renderer: Renderer, prompt: str, max_context: int, *, spells_control: bool
) -> list[int]:
    """Return the tokens of a text that a model goes on with; see `check_prompt`.

    Raises:
        ValidationException: it is longer than any text that fits into `max_context`.
    """
    most = max_context * renderer.tokenizer.longest_token
    if len(prompt) > most:
        raise ValidationException(
            f"The prompt has {len(prompt):,} characters; {most:,} are the most that fit into "
            f"the model's context of {max_context:,} tokens. Shorten the prompt."
        )
    start = renderer.tokenizer.document_start
    if spells_control:
        ids = renderer.tokenizer.encode_scaffold(prompt)
        return ids if tuple(ids[: len(start)]) == start else [*start, *ids]
    ids = renderer.tokenizer.encode(prompt)
    return [*start, *ids] if ids else ids


def check_prompt(
    renderer: Renderer,
    prompt: str | Sequence[int],
    sampling: SamplingParams,
    max_context: int,
    vocabulary: int,
    *,
    spells_control: bool = False,
) -> tuple[list[int], int]:
    """Return a prompt's tokens that is taken as it stands, and how many may be drawn after it.

    A text begins as the documents of continued pre-training do: with the beginning token, where the
    model's own tokenizer puts one. Token ids are all that there is.

    Args:
        spells_control: whether the control tokens that a text spells are those tokens.
    Raises:
        ValidationException: it is empty, has a token that the model does not know, or does not fit
            into `max_context` with the answer.
    """
    if isinstance(prompt, str):
        ids = encode_prompt(renderer, prompt, max_context, spells_control=spells_control)
    else:
        ids = list(prompt)
    if not ids:
        raise ValidationException("The prompt is empty. Give at least one token.")
    odd = next((token for token in ids if not 0 <= token < vocabulary), None)
    if odd is not None:
        raise ValidationException(
            f"The prompt has the token {odd}; the model knows those from 0 to {vocabulary - 1}."
        )
    wanted = max_context - len(ids) if sampling.max_tokens is None else sampling.max_tokens
    if len(ids) + max(1, wanted) > max_context:
        raise ValidationException(
            f"The prompt has {len(ids)} tokens and up to {max(1, wanted)} are asked for as the "
            f"answer, but the model's context holds {max_context} in all. Shorten the prompt or "
            "ask for fewer tokens."
        )
    return ids, wanted


def _shorten(
    renderer: Renderer, messages: Sequence[Message], sampling: SamplingParams, max_context: int
) -> Sequence[Message]:
    """Take off the last message's text what no context holds, without encoding it."""
    *before, last = messages
    most = max_context * renderer.tokenizer.longest_token
    room = max(0, most - sum(len(message.text) for message in before))
    if len(last.text) <= room:
        return messages
    text = last.text[:room] if sampling.truncate == "end" else last.text[len(last.text) - room :]
    return (*before, replace(last, text=text))


def _cut(
    renderer: Renderer,
    messages: Sequence[Message],
    limit: int,
    sampling: SamplingParams,
    ids: list[int],
) -> list[int]:
    """Take tokens off one end of the last message's text until the prompt has `limit` of them."""
    *before, last = messages
    text_ids = renderer.tokenizer.encode(last.text)
    # Text that is cut may take a token more when it is encoded anew, so it may need another round.
    while len(ids) > limit and text_ids:
        surplus = len(ids) - limit
        text_ids = text_ids[:-surplus] if sampling.truncate == "end" else text_ids[surplus:]
        text = renderer.decode(text_ids)
        ids = render_prompt(renderer, (*before, replace(last, text=text)), len(ids))
    return ids
