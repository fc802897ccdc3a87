"""Turn a native prompt, one string, into messages.

Some families' callers write turns into the prompt itself: Titan's `User:` and `Bot:`, the control
tokens of Llama 2, Llama 3 and Mistral. The real model has other control tokens, so that mark-up is
taken apart here and written anew by the model's own chat template. A prompt without mark-up, or
with mark-up that does not add up, is one user turn, as it stands.

Source: the prompt formats on the pages of Amazon Titan Text, Meta Llama and Mistral AI models in
the Bedrock user guide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from outcrop.data.records import Message

_LLAMA3_HEADER = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>(?:\n\n|\n)?")
_LLAMA3_END = re.compile(r"<\|eot_id\|>|<\|end_of_text\|>")
_INST = re.compile(r"\[INST\](.*?)\[/INST\]", re.DOTALL)
_BETWEEN_TURNS = re.compile(r"(?:</s>\s*)?<s>\s*(?=\[INST\])|\s*</s>\s*(?=\[INST\]|\Z)")
_SYS = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*", re.DOTALL)
_TITAN_OPEN = re.compile(r"(?:\A|\n)Bot:\s*\Z")
_TITAN_TURN = re.compile(r"(?:\A|(?<=\n))(User|Bot):")


def parse_prompt(family: str, prompt: str) -> tuple[Message, ...]:
    """Return the messages of a prompt; the last is the user's, or an answer to go on with.

    Args:
        family: the body family: titan, llama, mistral; all others have no mark-up.
    """
    parse = _PARSERS.get(family)
    messages = parse(prompt) if parse else None
    return messages or (Message("user", prompt),)


def _titan(prompt: str) -> tuple[Message, ...] | None:
    """Read `User: ...\\nBot: ...\\nUser: ...\\nBot:`; what stands before it is the system's."""
    if "Bot:" not in prompt or not _TITAN_OPEN.search(prompt):
        return None
    before, *parts = _TITAN_TURN.split(prompt)
    turns = [
        Message("user" if name == "User" else "assistant", text.strip())
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return _conversation([Message("system", before.strip()), *turns[:-1]])


def _llama(prompt: str) -> tuple[Message, ...] | None:
    return _llama3(prompt) if "<|start_header_id|>" in prompt else _inst(prompt)


def _llama3(prompt: str) -> tuple[Message, ...] | None:
    """Read headers, each with its turn; the last header is open: it asks for an answer."""
    before, *parts = _LLAMA3_HEADER.split(prompt.strip().removeprefix("<|begin_of_text|>"))
    turns = []
    for place, (role, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        content, *rest = _LLAMA3_END.split(text)
        is_open = place == len(parts) // 2 - 1
        if len(rest) != (0 if is_open else 1) or "".join(rest).strip():
            return None
        turns.append(Message(role, content.strip()))
    if before.strip() or turns[-1].role != "assistant":
        return None
    return _conversation(turns if turns[-1].text else turns[:-1])


def _inst(prompt: str) -> tuple[Message, ...] | None:
    """Read `<s>[INST] <<SYS>>...<</SYS>> ... [/INST] answer </s><s>[INST] ... [/INST]`."""
    if "[INST]" not in prompt:  # most prompts have no mark-up, and the search for it costs more
        return None
    before, *parts = _INST.split(_BETWEEN_TURNS.sub("", prompt.strip()))
    if before.strip() or not parts:
        return None
    turns = [
        Message("assistant" if place % 2 else "user", text.strip())
        for place, text in enumerate(parts)
    ]
    found = _SYS.match(parts[0])
    if found:
        turns[:1] = [
            Message("system", found[1].strip()),
            Message("user", parts[0][found.end() :].strip()),
        ]
    return _conversation(turns if turns[-1].text else turns[:-1])


def _conversation(turns: list[Message]) -> tuple[Message, ...] | None:
    """Return the turns where they alternate from the user on and none is empty, else None."""
    if turns and turns[0].role == "system" and not turns[0].text:
        turns = turns[1:]
    first = 1 if turns and turns[0].role == "system" else 0
    expected = ["assistant" if place % 2 else "user" for place in range(len(turns) - first)]
    if not expected or [turn.role for turn in turns[first:]] != expected:
        return None
    return tuple(turns) if all(turn.text for turn in turns) else None


_PARSERS: Mapping[str, Callable[[str], tuple[Message, ...] | None]] = {
    "titan": _titan,
    "llama": _llama,
    "mistral": _inst,
}
