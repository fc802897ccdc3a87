"""Clean sets of generated records, and defects planted into them at known lines.

Every choice comes from a seed. A defect is made from a clean record of its own, so that nothing but
the defect is wrong with its line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_WORDS = (
    "about above across after again against almost along already although among animal answer "
    "apple around autumn basket because before begin behind believe below between beyond bicycle "
    "blanket board borrow bottle bread bridge bright bring brother build busy butter button "
    "camera candle careful carry castle catch center certain chair change cheese children choose "
    "circle city clean clear climb close cloth cloud coffee collect color common company corner "
    "cotton country cousin cover cross dance daughter decide deep desert different dinner direct "
    "distance doctor double dream drive during early earth eight either engine enough evening "
    "every example explain family farmer father feather field finger finish floor flower follow "
    "forest forget forward fresh friend fruit garden gather gentle glass golden grandmother grass "
    "green ground guess hammer happen harbor harvest heavy history holiday honest horse hospital "
    "hundred hurry imagine important inside island journey kitchen ladder language large laugh "
    "leather lesson letter library listen little machine market matter meadow measure medicine "
    "middle minute mirror money morning mother mountain music narrow neighbor never night north "
    "notice number ocean office orange other outside paper parent pencil people picture pocket "
    "potato prepare present promise quarter question quiet rabbit railway rather reason remember "
    "repair river round sailor saturday school season second sentence several shadow sheep "
    "shoulder silver simple sister slowly soldier spring square station stone story straight "
    "street student sugar summer sunday supper surprise table teacher thirty thousand through "
    "thunder together tomorrow travel twelve uncle under valley vegetable village visit voice "
    "wagon water weather welcome whisper window winter without wonder wooden worker yellow "
    "yesterday young"
)
WORDS = tuple(_WORDS.split())


@dataclass
class Planted:
    """A file with defects, and what a check must say of it."""

    lines: list[bytes] = field(default_factory=list)
    """Without their line ends."""
    expected: dict[int, tuple[str, int | None]] = field(default_factory=dict)
    """Line from 1 -> (code, line of the twin)."""

    @property
    def content(self) -> bytes:
        """The file."""
        return b"\n".join(self.lines) + b"\n"


class Sentences:
    """Draws texts that are never nearly the same."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def text(self, low: int, high: int) -> str:
        """A sentence of so many words."""
        return " ".join(self.draw.choices(WORDS, k=self.draw.randint(low, high))) + "."

    def pair(self) -> dict[str, Any]:
        """A clean pair; some with characters beyond ASCII that are right as they are."""
        text = self.text(14, 40)
        if self.draw.random() < 0.2:
            text += self.draw.choice(
                (" Café Zoë — “yes”.", " 東京タワー", " 10\u00a0% 👩‍🔬", " 5 < 6 & 7")
            )
        return {
            "prompt": f"Please read this: {text}\n\nReply:",
            "completion": f" {self.text(6, 14)}",
        }

    def conversation(self) -> dict[str, Any]:
        """A clean conversation of one or two exchanges."""
        turns = []
        for _ in range(self.draw.randint(1, 2)):
            turns.append({"role": "user", "content": [{"text": self.text(14, 30)}]})
            turns.append({"role": "assistant", "content": [{"text": self.text(8, 14)}]})
        system = {"system": [{"text": "Be short."}]} if self.draw.random() < 0.5 else {}
        return {"schemaVersion": "bedrock-conversation-2024", **system, "messages": turns}


def dump(value: object) -> bytes:
    """A line."""
    return json.dumps(value, ensure_ascii=False).encode()


Maker = Callable[[Sentences], bytes]


def _pair(change: Callable[[dict[str, Any], Sentences], object]) -> Maker:
    def make(sentences: Sentences) -> bytes:
        value = sentences.pair()
        changed = change(value, sentences)
        return dump(changed if isinstance(changed, dict | list | str) else value)

    return make


def _bytes(change: Callable[[bytes, Sentences], bytes]) -> Maker:
    return lambda sentences: change(dump(sentences.pair()), sentences)


def _text(change: Callable[[str, Sentences], str], key: str = "prompt") -> Maker:
    return _pair(lambda value, sentences: {**value, key: change(value[key], sentences)})


def _inside(text: str, put: str, sentences: Sentences) -> str:
    place = sentences.draw.randrange(1, len(text) - 1)
    return text[:place] + put + text[place:]


def _one_of(*makers: Maker) -> Maker:
    return lambda sentences: sentences.draw.choice(makers)(sentences)


def _chosen(*values: Any) -> Callable[[Sentences], Any]:
    return lambda sentences: sentences.draw.choice(values)


_hidden = _chosen(
    "\x07", "\x1b[0m", "\u200b", "\u202e", "\u2009\u00a0", "\ufeff", "\u2028", "\u00ad"
)
_tags = _chosen(
    "<p>{}</p>", "{}<br/>", "<!-- x -->{}", '<a href="/">{}</a>', "{}&nbsp;", "<B>{}</B>"
)
_empty = _chosen("", " ", "\n\t", "\u3000", "\u200b\ufeff")
_wrong = _chosen(None, 7, 1.5, True, ["a"], {"a": "b"})
_garbled = _chosen("Über die Straße", "¿Qué pasó en Málaga?", "déjà vu à l’hôtel", "手数料はいくら")

PAIR_DEFECTS: dict[str, Maker] = {
    "invalid_json": _one_of(
        _bytes(lambda line, s: line[: s.draw.randrange(5, len(line) - 2)]),
        _bytes(lambda line, s: line + dump(s.pair())),
        _bytes(lambda line, s: line[:-1] + b",}"),
        _bytes(lambda line, s: b"# " + line),
        _bytes(lambda line, s: b"\xef\xbb\xbf" + line),
        _bytes(lambda line, s: b'{"a":' * s.draw.randint(2000, 200_000)),
        _bytes(lambda line, s: b'{"prompt": "a", "completion": 1e999}'),
        _bytes(lambda line, s: line.replace(b" ", b"\t", 1).replace(b"read ", b"read\t", 1)),
    ),
    "invalid_utf8": _bytes(lambda line, s: line.replace(b"read", b"re\xe9d", 1)),
    "null_byte": _bytes(lambda line, s: line.replace(b"read", b"re\x00d", 1)),
    "escaped_null_byte": _text(lambda text, s: _inside(text, "\0", s)),
    "not_an_object": _pair(lambda value, s: s.draw.choice(([1], "text", json.dumps(value)))),
    "mixed_schema": _one_of(
        _pair(lambda value, s: {"input": value["prompt"]}),
        _pair(lambda value, s: {**value, "input": "x"}),
        lambda s: dump(s.conversation()),
        _pair(lambda value, s: {"image-ref": "s3://a/b.png", "caption": "c"}),
        _pair(lambda value, s: {"recordId": "1", "modelInput": {}}),
    ),
    "wrong_keys": _pair(
        lambda value, s: s.draw.choice(
            ({}, {"Prompt": "a", "Completion": "b"}, {"question": "a", "answer": "b"})
        )
    ),
    "missing_prompt": _pair(lambda value, s: {"completion": value["completion"]}),
    "missing_completion": _pair(lambda value, s: {"prompt": value["prompt"]}),
    "empty_prompt": _pair(lambda value, s: {**value, "prompt": _empty(s)}),
    "empty_completion": _pair(lambda value, s: {**value, "completion": _empty(s)}),
    "wrong_type": _pair(
        lambda value, s: {**value, s.draw.choice(("prompt", "completion")): _wrong(s)}
    ),
    "too_long": _pair(lambda value, s: {**value, "prompt": s.text(6000, 20_000)}),
    "extra_keys": _pair(lambda value, s: {**value, "id": s.draw.randrange(9)}),
    "html": _text(lambda text, s: _tags(s).format(text)),
    "mojibake": _text(
        lambda text, s: f"{text} {_garbled(s).encode().decode('latin-1')} {s.text(1, 3)}"
    ),
    "control_characters": _text(lambda text, s: _inside(text, _hidden(s), s)),
    "stray_whitespace": _one_of(
        _text(lambda text, s: "  \n" + text),
        _text(lambda text, s: text + " \t\n  ", key="completion"),
    ),
    "lone_surrogate": _bytes(lambda line, s: line.replace(b"read", b"read \\ud83d", 1)),
    "crlf": _bytes(lambda line, s: line + b"\r"),
    "duplicate_key": _bytes(lambda line, s: b'{"prompt": "before", ' + line[1:]),
    "pii": _text(
        lambda text, s: (
            text + s.draw.choice((" a.b@mail.example", " +44 20 7946 0958", " 5500 0055 5555 5559"))
        )
    ),
    "low_information": _pair(
        lambda value, s: {
            **value,
            "completion": s.draw.choice((" TBD", " ...", " qwerty", " ha ha ha")),
        }
    ),
    "completion_repeats_prompt": _pair(
        lambda value, s: {**value, "completion": value["prompt"] + " and more."}
    ),
    "blank_line": lambda s: s.draw.choice((b"", b" ", b"\t  ")),
}
"""Code -> a line of pairs with that defect alone."""
CODES = {"escaped_null_byte": "null_byte"}
"""Where a defect's name is not its code."""


def _turn(change: Callable[[dict[str, Any], Sentences], object]) -> Maker:
    def make(sentences: Sentences) -> bytes:
        value = sentences.conversation()
        change(value, sentences)
        return dump(value)

    return make


CONVERSATION_DEFECTS: dict[str, Maker] = {
    "missing_schema_version": _turn(lambda value, s: value.pop("schemaVersion")),
    "bad_schema_version": _turn(lambda value, s: value.update(schemaVersion="2024")),
    "missing_messages": _turn(lambda value, s: value.pop("messages")),
    "empty_messages": _turn(lambda value, s: value.update(messages=[])),
    "missing_role": _turn(lambda value, s: value["messages"][0].pop("role")),
    "bad_role": _turn(lambda value, s: value["messages"][0].update(role="bot")),
    "missing_content": _turn(lambda value, s: value["messages"][-1].pop("content")),
    "role_order": _one_of(
        _turn(lambda value, s: value["messages"].reverse()),
        _turn(lambda value, s: value["messages"].pop()),
        lambda s: dump(s.conversation()["messages"][0]),
    ),
    "empty_content": _one_of(
        _turn(lambda value, s: value["messages"][0].update(content=[])),
        _turn(lambda value, s: value["messages"][0]["content"][0].update(text=" \u200b")),
    ),
    "wrong_type": _one_of(
        _turn(lambda value, s: value.update(messages={})),
        _turn(lambda value, s: value.update(system="text")),
        _turn(lambda value, s: value["messages"][0].update(content="text")),
        _turn(lambda value, s: value["messages"][0]["content"][0].update(text=7)),
    ),
    "unsupported_block": _turn(
        lambda value, s: value["messages"][0]["content"].append({"video": 1})
    ),
    "mixed_schema": lambda s: dump(s.pair()),
    "extra_keys": _turn(lambda value, s: value["messages"][0].update(name="x")),
    "empty_system": _turn(lambda value, s: value.update(system=[])),
    "html": _turn(lambda value, s: value["messages"][0]["content"].append({"text": "<b>x</b>"})),
}

TWINS: dict[str, Callable[[dict[str, Any], Sentences], bytes]] = {
    "exact_duplicate": lambda value, s: s.draw.choice(
        (
            dump(value),
            json.dumps({key: value[key] for key in reversed(value)}, indent=None).encode(),
        )
    ),
    "near_duplicate": lambda value, s: dump(
        {
            **value,
            "prompt": s.draw.choice((str.upper, _spaced, _wide, _with_a_word))(value["prompt"]),
        }
    ),
    "conflicting_label": lambda value, s: dump({**value, "completion": f" {s.text(6, 14)}"}),
}
"""Code -> the line that repeats or contradicts an earlier pair."""


def _spaced(text: str) -> str:
    return text.replace(" ", "  ").replace(".", " !")


def _wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalpha() else c for c in text)


def _with_a_word(text: str) -> str:
    return text + " Thanks"


@dataclass(eq=False)
class _Item:
    line: bytes
    code: str = ""
    twin: _Item | None = None


def planted_pairs(seed: int, *, num_clean: int = 120, num_each: int = 3) -> Planted:
    """Pairs with every defect of PAIR_DEFECTS and TWINS, so many times each, in random order."""
    sentences = Sentences(seed)
    items = [_Item(dump(sentences.pair())) for _ in range(num_clean)]
    items += [
        _Item(make(sentences), CODES.get(name, name))
        for name, make in PAIR_DEFECTS.items()
        for _ in range(num_each)
    ]
    sentences.draw.shuffle(items)
    for name, repeat in TWINS.items():
        for _ in range(num_each):
            value = sentences.pair()
            first = _Item(dump(value))
            place = sentences.draw.randrange(len(items))
            items.insert(place, first)
            later = sentences.draw.randint(place + 1, len(items))
            items.insert(later, _Item(repeat(value, sentences), name, first))
    return _planted(items)


def planted_conversations(seed: int, *, num_clean: int = 60, num_each: int = 3) -> Planted:
    """Conversations with every defect of CONVERSATION_DEFECTS, so many times each."""
    sentences = Sentences(seed)
    items = [_Item(dump(sentences.conversation())) for _ in range(num_clean)]
    items += [
        _Item(make(sentences), name)
        for name, make in CONVERSATION_DEFECTS.items()
        for _ in range(num_each)
    ]
    sentences.draw.shuffle(items)
    return _planted(items)


def _planted(items: list[_Item]) -> Planted:
    numbers = {id(item): number for number, item in enumerate(items, 1)}
    return Planted(
        [item.line for item in items],
        {
            numbers[id(item)]: (item.code, numbers[id(item.twin)] if item.twin else None)
            for item in items
            if item.code
        },
    )
