"""Turn a document of raw text into examples for continued pre-training.

A document begins with the model's beginning token where its tokenizer puts one before a text, and
ends with the token that ends a text. No chat template stands around it, and a control token's
spelling in it is plain text. Loss is on every token but the first.

A document that is too long is cut into the fewest pieces, of about the same length, each an example
of its own. A piece repeats the last token of the one before, without loss: so every token of the
document but the first is predicted exactly once.
"""

from __future__ import annotations

import itertools

from outcrop.data.records import Document, Example
from outcrop.errors import DataError, ModelError
from outcrop.models.tokenizer import Tokenizer


def render_document(document: Document, tokenizer: Tokenizer, max_tokens: int) -> list[Example]:
    """Return a document's examples, in order.

    Args:
        max_tokens: of one example, all of its tokens counted; at least 3.
    Raises:
        DataError: the text cannot be encoded; with file and line.
        ModelError: the model has no token that ends a text.
    """
    if tokenizer.document_end is None:
        raise ModelError(
            "The model has no token that ends a text (its tokenizer_config.json names no "
            "eos_token), so it cannot be pre-trained further."
        )
    try:
        ids = [*tokenizer.encode(document.text), tokenizer.document_end]
    except ValueError as error:
        raise DataError(
            f"{document.file}, line {document.line}: the text cannot be encoded: {error}.",
            code="lone_surrogate",
            file=document.file,
            line=document.line,
        ) from None
    start = list(tokenizer.document_start)
    examples = []
    for first, last in _pieces(len(ids), max_tokens - len(start)):
        head = [*start, *ids[max(first - 1, 0) : first]]
        piece = [*head, *ids[first:last]]
        mask = [False] * len(head) + [True] * (last - first)
        mask[0] = False
        examples.append(Example(piece, mask))
    return examples


def _pieces(num_tokens: int, width: int) -> list[tuple[int, int]]:
    """Cut a row of tokens; each piece has `width` at most, with one token of the piece before."""
    count = max(1, -(-(num_tokens - 1) // (width - 1)))
    size, rest = divmod(num_tokens, count)
    ends = [size * number + min(number, rest) for number in range(count + 1)]
    return list(itertools.pairwise(ends))
