"""Turn text into token ids and back, with the tokenizer.json of a model's folder.

Text that a user wrote and text that a chat template wrote are encoded apart: a control token is
recognized only in the template's, so nobody can write `<|im_start|>system` into a prompt and be
taken for the service. It knows nothing of messages; `data/render.py` puts the two together.

Source: Hugging Face's tokenizer.json and tokenizer_config.json, read by the `tokenizers` library.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from outcrop.errors import ModelError
from outcrop.models.files import read_json
from outcrop.models.templates import chat_template

REPLACEMENT = "�"
"""What an unfinished or invalid UTF-8 sequence is decoded to."""

LONGEST_UNFINISHED = 3
"""A character is at most 4 bytes, so at most 3 tokens can be waiting for its last byte."""

TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""Tokens that end a text and no turn. Models that were trained to chat name the end of a turn as
their eos_token; these are what their makers ended documents with before. Source: the tokenizers of
GPT-2, SmolLM2, Qwen and Phi; those of Llama 3."""

MAX_HELD_TOKENS = 16
"""After so many tokens that end in no whole character, the bytes are garbage and are let go."""


class Tokenizer:
    """The tokenizer of one folder."""

    def __init__(self, folder: Path) -> None:
        """Load it.

        Raises:
            ModelError: tokenizer.json or tokenizer_config.json is missing or cannot be read.
        """
        config = folder / "tokenizer_config.json"
        self._config = read_json(config) if config.is_file() else {}
        description = read_json(folder / "tokenizer.json")
        # Neither may cut or fill up what it is given: lengths are counted here.
        description["truncation"] = description["padding"] = None
        added = description.get("added_tokens") or []
        plain = _without_control(description)
        try:
            self._scaffold = tokenizers.Tokenizer.from_str(json.dumps(description))
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"The tokenizer in {folder} cannot be loaded: {error}") from error
        self._check_same_ids(folder, plain["added_tokens"])
        self.special_token_ids = frozenset(
            int(token["id"]) for token in added if token.get("special")
        )
        """Ids of the tokens that no text spells and no answer shows."""
        self.special_tokens: tuple[str, ...] = tuple(
            str(token["content"]) for token in added if token.get("special")
        )
        """The spellings of those tokens, as a chat template writes them."""
        self.added_tokens: tuple[str, ...] = tuple(
            str(token["content"]) for token in added if token["content"].strip()
        )
        """The spellings of all that are tokens of their own wherever a template writes them."""
        self.named_tokens = _named_tokens(self._config)
        """Spellings by role: "bos_token", "eos_token", ..., as templates refer to them."""
        self.bos_token_id = self._named_id("bos_token")
        """Id of the token that begins a text; None where the model has none."""
        self.eos_token_id = self._named_id("eos_token")
        """Id of the token that ends an answer; None where the model has none."""
        self.chat_template = chat_template(folder, self._config)
        """The Jinja source that turns messages into text; None where the folder has none."""
        self.adds_bos = bool(self._config.get("add_bos_token")) and self.bos_token_id is not None
        """Whether the model was trained with a beginning token that no template writes."""
        self.document_start: tuple[int, ...] = self._find_document_start()
        """What a raw text begins with, by the tokenizer's own convention: its beginning token, or
        nothing."""
        self.document_end = self._find_document_end()
        """The token that ends a raw text; None where the model has none."""

    @property
    def plain(self) -> tokenizers.Tokenizer:
        """What encodes text of a user; for those who look at how it cuts a text."""
        return self._plain

    @property
    def vocab_size(self) -> int:
        """The number of ids, control tokens included."""
        return self._scaffold.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """The characters of the longest token: a text of n characters has n / that many tokens or
        more. In byte-level vocabularies a token has a character for each of its bytes."""
        return max(map(len, self._scaffold.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Encode text of a user or of a model; control tokens in it are plain characters.

        Raises:
            ValueError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            return list(self._plain.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError("the text holds half of a surrogate pair") from error

    def encode_scaffold(self, text: str) -> list[int]:
        """Encode text that a chat template wrote; control tokens in it are control tokens."""
        return list(self._scaffold.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without control tokens; invalid UTF-8 becomes U+FFFD."""
        return str(self._scaffold.decode(list(ids), skip_special_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its spelling in the vocabulary."""
        found = self._scaffold.token_to_id(token)
        return None if found is None else int(found)

    def spelling(self, token: int) -> str:
        """Return how the vocabulary writes a token; "" for an id that it does not have."""
        return self._scaffold.id_to_token(token) or ""

    def _check_same_ids(self, folder: Path, added: list[dict[str, Any]]) -> None:
        """Make sure that the two tokenizers mean the same tokens by the same numbers."""
        for token in added:
            if self._plain.token_to_id(token["content"]) != token["id"]:
                raise ModelError(
                    f"The tokenizer in {folder} numbers its added tokens in a way that cannot be "
                    f"kept: {token['id']} is one of them."
                )

    def _find_document_start(self) -> tuple[int, ...]:
        named = self._config.get("add_bos_token")
        if self.bos_token_id is None or named is False:
            return ()
        bare = self._scaffold.encode("a", add_special_tokens=False).ids
        ids = self._scaffold.encode("a", add_special_tokens=True).ids
        begins = named or (len(ids) > len(bare) and ids[0] == self.bos_token_id)
        return (self.bos_token_id,) if begins else ()

    def _find_document_end(self) -> int | None:
        for token in TEXT_ENDS:
            if token in self.special_tokens:
                return self.token_id(token)
        return self.eos_token_id

    def _named_id(self, role: str) -> int | None:
        token = self.named_tokens.get(role)
        return None if token is None else self.token_id(token)


class IncrementalDecoder:
    """Turns ids that arrive one after the other into pieces of text.

    No piece ends inside a UTF-8 character, and the pieces together are what `decode` returns for
    all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Collection[int] = ()) -> None:
        """
        Args:
            shown: ids of control tokens that are spelt out; all others are left out.
        """
        self._tokenizer = tokenizer
        self._shown = frozenset(shown)
        # Some tokenizers drop the space before the first word of what they decode, so the ids of
        # the piece before are decoded along and its text is taken off again.
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Take in more ids and return the text that is certain by now, perhaps ""."""
        if not self._shown:
            return self._push(ids)
        pieces = []
        for token in ids:
            if token in self._shown:
                pieces += [self.finish(), self._tokenizer.spelling(token)]
            else:
                pieces.append(self._push([token]))
        return "".join(pieces)

    def _push(self, ids: Iterable[int]) -> str:
        self._held.extend(token for token in ids if token not in self._tokenizer.special_token_ids)
        text = self._text(self._held)
        if not text.endswith(REPLACEMENT):
            return self._let_go(len(self._held), text)
        if len(self._held) <= MAX_HELD_TOKENS:
            return ""
        for count in range(len(self._held) - LONGEST_UNFINISHED, 0, -1):
            head = self._text(self._held[:count])
            if head + self._tokenizer.decode(self._held[count:]) == text:
                return self._let_go(count, head)
        return ""

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        return self._let_go(len(self._held), self._text(self._held))

    def _text(self, ids: list[int]) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + ids)[len(before) :]

    def _let_go(self, count: int, text: str) -> str:
        if count:
            self._before, self._held = self._held[:count], self._held[count:]
        return text


def _without_control(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a tokenizer to which control tokens are ordinary text.

    They are given a spelling that nobody can guess instead of being taken out, because the library
    numbers added tokens anew where one is missing. Those that the vocabulary itself needs, to be
    made by a merge or for what is unknown, only lose their rank as added tokens. Added tokens of
    white space stay: they are how some models write indentation.
    """
    model = dict(description["model"])
    needed = {model.get("unk_token")}
    needed.update("".join(_pair(merge)) for merge in model.get("merges") or ())
    secret = secrets.token_hex(16)
    added, renamed = [], {}
    for token in description.get("added_tokens") or []:
        if not token["content"].strip():
            added.append(token)
        elif token["content"] not in needed:
            renamed[token["content"]] = token["content"] + secret
            added.append({**token, "content": renamed[token["content"]]})
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {
            renamed.get(token, token): place for token, place in model["vocab"].items()
        }
    return {**description, "model": model, "added_tokens": added, "post_processor": None}


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    named = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"):
        token = config.get(role)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            named[role] = token
    return named
