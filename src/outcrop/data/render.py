"""Turn messages into token ids, for training, serving, counting and evaluation alike.

A model's own chat template decides what stands around the messages. It never sees what stands in
them: it is rendered with one private-use character in the place of each content, the result is cut
at those characters, and the template's pieces and the contents are encoded apart. So no token
crosses from a prompt into its completion, no content can be taken for scaffold, and white space in
contents stays as it is. A template thus renders the same for every conversation with the same
roles, and its pieces are encoded once.

Three things differ from what a template writes by itself. The system text that some add of their
own accord is left out: a plain prompt is one user turn and nothing else. White space between the
point where the model begins to write and a completion is left out, and so is white space between
the completion and the token that ends it: a completion is exactly what the model shall write.

A prompt with tools is put together in `tool_prompts.py`. Training data have none.

Source: Hugging Face's "Chat templates" page for the template's variables and environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outcrop.data.records import Example, Message, Tool
from outcrop.data.tool_prompts import render_tool_prompt, spelt_in_json
from outcrop.errors import DataError, ModelError
from outcrop.models.counting import TokenCounter
from outcrop.models.tokenizer import Tokenizer

FALLBACK_TEMPLATE = (
    "{{ bos_token if adds_bos else '' }}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last and loop.nextitem['role'] != 'assistant' %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}"
)
"""For a folder without a chat template: the texts one after the other, an empty line before each
turn that is not an answer, and the end token after each answer."""

TEMPLATE_DAY = datetime(2024, 7, 26, tzinfo=UTC)
"""What a template that asks for the date is told. The same bytes in must give the same tokens out
on every day; this is the date that Llama 3.1's template falls back to."""

_FIRST_MARK = 0xF0000
_LAST_MARK = 0xFFFFD
MAX_MESSAGES = _LAST_MARK - _FIRST_MARK + 1
_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")

MAX_CACHED_LAYOUTS = 256


@dataclass(frozen=True)
class _Scaffold:
    """Tokens of the template."""

    ids: tuple[int, ...]
    trained: bool


@dataclass(frozen=True)
class _Content:
    """The place of a message's content."""

    index: int
    trained: bool


_Piece = _Scaffold | _Content


class Renderer:
    """Renders for the model of one folder."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer and find out how the template begins and ends turns.

        Raises:
            ModelError: the tokenizer or the chat template cannot be used.
        """
        self.tokenizer = Tokenizer(folder)
        self._folder = folder
        self._template = _compile(self.tokenizer.chat_template or FALLBACK_TEMPLATE, folder)
        self._layouts: dict[tuple[tuple[str, ...], bool], tuple[_Piece, ...]] = {}
        self._control = re.compile(
            "|".join(
                re.escape(token)
                for token in sorted(self.tokenizer.special_tokens, key=len, reverse=True)
            )
            or "(?!)"
        )
        self._added_start, self._kept_start = self._find_added_start()
        self._end_token = self._find_end_token()
        self._end_id = self._token_id(self._end_token)
        self.end_token_ids = self._find_end_token_ids()
        """Ids at which an answer is over: the template's own first, then the folder's others."""

    @cached_property
    def counter(self) -> TokenCounter:
        """Counts tokens of plain texts, faster than encoding them."""
        return TokenCounter(self.tokenizer)

    @property
    def folder(self) -> Path:
        """The folder whose tokenizer and template these are."""
        return self._folder

    def render_prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), start: str = ""
    ) -> list[int]:
        """Return what a model is given so that it writes the next answer.

        Where the last message is the assistant's, the model goes on with that answer.

        Args:
            tools: what it may call.
            start: with tools, what the answer begins with, as the template would write it.
        Raises:
            DataError: the template refuses these roles in this order, or a text is not encodable.
        """
        if tools or any(message.calls or message.call_id for message in messages):
            return render_tool_prompt(self._render_tools, self.tokenizer, messages, tools, start)
        ids: list[int] = []
        for piece in self._layout(messages, complete=False):
            ids.extend(self._encode(piece, messages))
        return ids

    def render_example(self, messages: Sequence[Message]) -> Example:
        """Return the ids of a whole conversation and where its loss is taken.

        Loss is on the assistant's contents and on the token that ends each of them. The ids begin
        with exactly `render_prompt(messages[:-1])`.

        Raises:
            DataError: the last message is not the assistant's, the template refuses these roles
                in this order, or a text is not encodable.
        """
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise _refused("A conversation must end with an answer of the assistant.")
        ids: list[int] = []
        mask: list[bool] = []
        for piece in self._layout(messages, complete=True):
            encoded = self._encode(piece, messages)
            ids.extend(encoded)
            mask.extend([piece.trained] * len(encoded))
        return Example(ids, mask)

    def count_example(self, messages: Sequence[Message]) -> tuple[int, int]:
        """Return how long `render_example` makes a conversation, without rendering it.

        Returns:
            (tokens before the last answer, tokens of that answer and after it).
        Raises:
            DataError: as `render_example`.
        """
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise _refused("A conversation must end with an answer of the assistant.")
        num_input = num_output = 0
        last, answered = len(messages) - 1, False
        for piece in self._layout(messages, complete=True):
            if isinstance(piece, _Scaffold):
                count = len(piece.ids)
            else:
                count = self._count(piece, messages)
                answered = piece.index == last
            if answered:
                num_output += count
            else:
                num_input += count
        return num_input, num_output

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's ids; control tokens are left out."""
        return self.tokenizer.decode(ids)

    def _encode(self, piece: _Piece, messages: Sequence[Message]) -> Sequence[int]:
        if isinstance(piece, _Scaffold):
            return piece.ids
        try:
            return self.tokenizer.encode(messages[piece.index].text)
        except ValueError as error:
            raise _not_encodable(piece.index, messages, error) from None

    def _count(self, piece: _Content, messages: Sequence[Message]) -> int:
        try:
            return self.counter.count(messages[piece.index].text)
        except ValueError as error:
            raise _not_encodable(piece.index, messages, error) from None

    def _layout(self, messages: Sequence[Message], *, complete: bool) -> tuple[_Piece, ...]:
        """Return the pieces for these roles; the contents do not matter."""
        roles = tuple(message.role for message in messages)
        key = (roles, complete)
        if key not in self._layouts:
            if not 0 < len(roles) <= MAX_MESSAGES:
                raise _refused(
                    f"A conversation has 1 to {MAX_MESSAGES} messages, not {len(roles)}."
                )
            if len(self._layouts) >= MAX_CACHED_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self._example(roles) if complete else self._prompt(roles)
        return self._layouts[key]

    def _prompt(self, roles: tuple[str, ...]) -> tuple[_Piece, ...]:
        return tuple(self._cut(self._prompt_text(roles), roles))

    def _example(self, roles: tuple[str, ...]) -> tuple[_Piece, ...]:
        whole = self._render(roles)
        last = len(roles) - 1
        after = whole[whole.index(_mark(last)) + 1 :]
        return (
            *self._prompt(roles[:-1]),
            _Content(last, trained=True),
            *self._after_answer(after),
        )

    def _prompt_text(self, roles: tuple[str, ...]) -> str:
        """Return the scaffold up to where the model begins to write."""
        if roles[-1] == "assistant":
            text = self._render(roles)
            return text[: text.index(_mark(len(roles) - 1)) + 1]
        opened = self._render(roles, opened=True)
        try:
            answered = self._render((*roles, "assistant"))
        except DataError:  # it takes no answer here, yet it did open one
            return opened
        before = answered[: answered.index(_mark(len(roles)))]
        # Some templates write more before an answer than they write to ask for one, such as an
        # empty thought or, where they are old, the whole header. Then the model is given that too.
        glue = before.removeprefix(opened)
        return opened if before.startswith(opened) and not glue.strip() else before

    def _cut(self, text: str, roles: tuple[str, ...]) -> list[_Piece]:
        """Cut a rendered text at the marks and encode what the template wrote."""
        pieces: list[_Piece] = []
        start = 0
        answered = False
        for found in _MARK.finditer(text):
            index = ord(found[0]) - _FIRST_MARK
            scaffold = text[start : found.start()]
            if index and roles[index] == "assistant":
                opened = self._prompt_text(roles[:index])
                if text.startswith(opened) and not text[len(opened) : found.start()].strip():
                    scaffold = opened[start:]
            pieces.extend(self._after_answer(scaffold) if answered else self._scaffold(scaffold))
            answered = roles[index] == "assistant"
            pieces.append(_Content(index, trained=answered))
            start = found.end()
        rest = text[start:]
        # Where nothing follows an answer, the model is to go on with it: it is not ended.
        pieces.extend(self._after_answer(rest) if answered and rest else self._scaffold(rest))
        return pieces

    def _after_answer(self, text: str) -> list[_Piece]:
        """Encode what follows an answer: the token that ends it carries loss, the rest does not."""
        bare = text.lstrip()
        rest = bare.removeprefix(self._end_token) if bare.startswith(self._end_token) else text
        return [_Scaffold((self._end_id,), trained=True), *self._scaffold(rest)]

    def _scaffold(self, text: str) -> list[_Piece]:
        ids = tuple(self.tokenizer.encode_scaffold(text)) if text else ()
        return [_Scaffold(ids, trained=False)] if ids else []

    def _render(self, roles: tuple[str, ...], *, opened: bool = False) -> str:
        """Render marks in the place of contents, without system text of the template's own.

        Raises:
            DataError: the template refuses the roles, or does not show each message once.
        """
        text = self._render_raw(roles, opened=opened)
        if "system" not in roles and self._added_start and text.startswith(self._added_start):
            text = self._kept_start + text.removeprefix(self._added_start)
        found = _MARK.findall(text)
        if sorted(found) != [_mark(index) for index in range(len(roles))]:
            raise _refused(
                "The model's chat template does not show every message once. "
                f"The roles were: {', '.join(roles)}."
            )
        return text

    def _render_raw(self, roles: tuple[str, ...], *, opened: bool = False) -> str:
        messages = [{"role": role, "content": _mark(index)} for index, role in enumerate(roles)]
        try:
            return self._write(messages, None, opened)
        except jinja2.TemplateError as error:
            raise _refused(
                f"The model's chat template refuses the roles {', '.join(roles)}: {error}"
            ) from error
        except Exception as error:  # a template is somebody's program: it can fail in any way
            raise ModelError(
                f"The chat template of {self._folder} fails: {type(error).__name__}: {error}"
            ) from error

    def _render_tools(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        opened: bool,
    ) -> str:
        try:
            return self._write(messages, tools or None, opened)
        except Exception as error:  # what it fails on is what its user said of the tools
            raise _refused(
                "The model's chat template refuses these messages and tools: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        opened: bool,
    ) -> str:
        return self._template.render(
            messages=messages,
            add_generation_prompt=opened,
            adds_bos=self.tokenizer.adds_bos,
            tools=tools,
            documents=None,
            **{"bos_token": "", "eos_token": "", **self.tokenizer.named_tokens},
        )

    def _find_added_start(self) -> tuple[str, str]:
        """Return (what the template begins a plain prompt with, what of it is to be kept).

        The first user turn is compared with a later one. What the first has more is the text that
        the template adds by itself, apart from a token that begins the whole text: that is kept.
        """
        try:
            first = self._render_raw(("user",)).split(_mark(0))[0]
            answered = self._render_raw(("user", "assistant")).split(_mark(1))[-1]
            between = re.split(
                f"{_mark(1)}|{_mark(2)}", self._render_raw(("user", "assistant", "user"))
            )[1]
        except (DataError, IndexError):
            return "", ""
        header = between.removeprefix(answered)
        if first == header or not first.endswith(header) or not between.startswith(answered):
            return "", ""
        added = first.removesuffix(header)
        bos = self.tokenizer.named_tokens.get("bos_token", "")
        # SmolLM2 names `<|im_start|>` its beginning token, but there it begins a turn.
        begins_text = bool(bos) and added.startswith(bos) and not header.startswith(bos)
        return added, bos if begins_text else ""

    def _find_end_token(self) -> str:
        try:
            after = self._render_raw(("user", "assistant")).split(_mark(1))[-1]
        except DataError:
            after = ""
        found = self._control.match(after.lstrip())
        end = found[0] if found else self.tokenizer.named_tokens.get("eos_token")
        if not end:
            raise ModelError(
                f"The model in {self._folder} has no token that ends an answer: its chat template "
                "writes none, and tokenizer_config.json names no eos_token."
            )
        return end

    def _find_end_token_ids(self) -> tuple[int, ...]:
        ids = [self._end_id]
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        for name in ("generation_config.json", "config.json"):
            file = self._folder / name
            if file.is_file():
                named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
                ids.extend(named if isinstance(named, list) else [named])
        return tuple(dict.fromkeys(token for token in ids if token is not None))

    def _token_id(self, token: str) -> int:
        found = self.tokenizer.token_id(token)
        if found is None:
            raise ModelError(f"The tokenizer in {self._folder} does not know its {token}.")
        return found


def _mark(index: int) -> str:
    return chr(_FIRST_MARK + index)


def _not_encodable(index: int, messages: Sequence[Message], error: ValueError) -> DataError:
    return DataError(
        f"Message {index + 1} ({messages[index].role}) cannot be encoded: {error}.",
        code="lone_surrogate",
        file="",
    )


def _refused(message: str) -> DataError:
    return DataError(message, code="refused_by_template", file="")


class _GenerationBlock(Extension):
    """Lets `{% generation %}` pass, with which some templates mark what an assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it without ClassVar

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, folder: Path) -> jinja2.Template:
    """Compile a chat template; it can reach nothing but what it is given."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return spelt_in_json(json.dumps(value, ensure_ascii=ensure_ascii, indent=indent))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DAY.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"The chat template of {folder} cannot be read: {error}") from error
