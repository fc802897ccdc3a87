"""What every family's body is turned into, and its answer made of: the forms the rest knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from outcrop.data.records import Message, Tool, ToolCall
from outcrop.models.templates import ToolFormat
from outcrop.serve.request import Generation, SamplingParams
from outcrop.serve.tool_calls import Found

if TYPE_CHECKING:
    from outcrop.serve.prompt_formats.openai_answers import Reply

Choice = Literal["auto", "any", "tool", "none"]


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools."""

    tools: tuple[Tool, ...]
    choice: Choice = "auto"
    """Whether one is called: as the model likes, any, the one that `tool` names, or none."""
    tool: str = ""
    """The one that must be called."""
    id_prefix: str = "tooluse_"
    """What the ids of calls begin with."""
    format: ToolFormat | None = None
    """How the model writes calls; None until the model is known."""

    @property
    def start(self) -> str:
        """What an answer begins with that must be a call."""
        if self.format is None or self.choice not in ("any", "tool"):
            return ""
        before, after = self.format.starts
        return before if self.choice == "any" else before + self.tool + after


@dataclass(frozen=True)
class NativeRequest:
    """The body of a request, taken apart."""

    messages: tuple[Message, ...]
    sampling: SamplingParams
    prompt: str = ""
    """The prompt as sent, for families that repeat it in the answer."""
    num_generations: int = 1
    """Answers that are wanted, each drawn anew."""
    raw_prompt: str | tuple[int, ...] | None = None
    """What the model goes on with as it stands, instead of messages: `GenerationRequest.prompt`."""
    spells_control: bool = False
    """Whether the control tokens that the text of `raw_prompt` spells are those tokens."""
    reply: Reply | None = None
    """How an answer in OpenAI's form is headed; None where the body is of another form."""
    in_pieces: bool | None = None
    """Whether the body itself wants its answer in pieces; None where its family does not say."""
    tool_use: ToolUse | None = None
    """None where neither tools nor calls of them are in it."""


@dataclass(frozen=True)
class BlockPart:
    """What is new of one content block of an answer."""

    index: int
    text: str = ""
    call: ToolCall | None = None
    """The call that the block is; it comes in one part."""
    is_start: bool = False
    is_end: bool = False


@dataclass(frozen=True)
class Piece:
    """What is new of an answer that is streamed."""

    text: str
    """Text that no piece before had; may be empty."""
    input_tokens: int
    output_tokens: int
    """Tokens drawn so far."""
    number: int = 0
    """Which of several answers, from 0."""
    is_first: bool = False
    done: Generation | None = None
    """The whole answer, in its last piece."""
    blocks: tuple[BlockPart, ...] = ()
    """The same by content blocks, for families whose answers have them."""


class Blocks:
    """Numbers the content blocks of an answer as it comes: a text each, or a call."""

    def __init__(self) -> None:
        self._next = 0
        self._is_open = False
        """Whether the last block is a text that may get longer."""

    def add(self, found: Sequence[Found]) -> list[BlockPart]:
        """Return the parts that show more of an answer."""
        parts = []
        for item in found:
            if isinstance(item, str):
                parts.append(self._part(item))
            else:
                parts += self._close()
                parts.append(BlockPart(self._next, "", item, is_start=True, is_end=True))
                self._next += 1
        return parts

    def open(self) -> list[BlockPart]:
        """Return the part that begins a text, of which nothing is known yet."""
        return [] if self._is_open else [self._part("")]

    def finish(self) -> list[BlockPart]:
        """Return the parts that end an answer, which has one block at least."""
        return [*([] if self._next else self.open()), *self._close()]

    def _part(self, text: str) -> BlockPart:
        is_start = not self._is_open
        self._next += is_start
        self._is_open = True
        return BlockPart(self._next - 1, text, is_start=is_start)

    def _close(self) -> list[BlockPart]:
        if not self._is_open:
            return []
        self._is_open = False
        return [BlockPart(self._next - 1, is_end=True)]
