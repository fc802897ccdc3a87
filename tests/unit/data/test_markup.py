"""Mark-up of native prompts becomes turns; what does not add up stays one user turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.data.markup import parse_prompt

LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
LLAMA3_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def turns(family: str, prompt: str) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in parse_prompt(family, prompt)]


@pytest.mark.parametrize(
    ("family", "prompt", "expected"),
    [
        ("titan", "User: q\nBot:", [("user", "q")]),
        ("titan", "User: q\nBot: ", [("user", "q")]),
        (
            "titan",
            "Be kind.\n\nUser: q\nand more\nBot: a\nUser: r\nBot:",
            [("system", "Be kind."), ("user", "q\nand more"), ("assistant", "a"), ("user", "r")],
        ),
        ("llama", "<|begin_of_text|>" + LLAMA3_USER + LLAMA3_ASSISTANT, [("user", "q")]),
        (
            "llama",
            LLAMA3_SYSTEM
            + LLAMA3_USER
            + LLAMA3_ASSISTANT
            + "a<|eot_id|>\n"
            + LLAMA3_USER
            + LLAMA3_ASSISTANT,
            [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "q")],
        ),
        (
            "llama",
            LLAMA3_USER + LLAMA3_ASSISTANT + "Sure",
            [("user", "q"), ("assistant", "Sure")],
        ),
        ("llama", "<s>[INST] q [/INST]", [("user", "q")]),
        ("llama", "[INST]q[/INST]\n", [("user", "q")]),
        (
            "llama",
            "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST]",
            [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "r")],
        ),
        (
            "mistral",
            "<s>[INST] q [/INST] a</s>[INST] r [/INST]",
            [("user", "q"), ("assistant", "a"), ("user", "r")],
        ),
        ("mistral", "<s>[INST] <b>x</b> <s>y</s> [/INST]", [("user", "<b>x</b> <s>y</s>")]),
    ],
)
def test_mark_up_becomes_turns(family: str, prompt: str, expected: list[tuple[str, str]]) -> None:
    assert turns(family, prompt) == expected


@pytest.mark.parametrize(
    ("family", "prompt"),
    [
        ("titan", "Summarize:\nUser: hello\nBot: hi"),
        ("titan", "A Bot: is what?"),
        ("titan", "Bot:"),
        ("titan", "User: \nBot:"),
        ("titan", "User: a\nUser: b\nBot:"),
        ("llama", "plain"),
        ("llama", LLAMA3_USER),
        ("llama", LLAMA3_ASSISTANT),
        ("llama", "text before" + LLAMA3_USER + LLAMA3_ASSISTANT),
        ("llama", LLAMA3_USER + LLAMA3_USER + LLAMA3_ASSISTANT),
        ("llama", "<|start_header_id|>user<|end_header_id|>\n\nq" + LLAMA3_ASSISTANT),
        ("llama", LLAMA3_USER + "stray" + LLAMA3_ASSISTANT),
        ("llama", "[INST] q"),
        ("llama", "before [INST] q [/INST]"),
        ("mistral", "[INST] q [/INST] [INST] r [/INST]"),
        ("mistral", LLAMA3_USER + LLAMA3_ASSISTANT),
        ("cohere", "User: q\nBot:"),
        ("claude", "<s>[INST] q [/INST]"),
        ("", "User: q\nBot:"),
    ],
)
def test_what_does_not_add_up_is_one_user_turn_as_it_stands(family: str, prompt: str) -> None:
    assert turns(family, prompt) == [("user", prompt)]


PIECES = st.sampled_from(
    [
        *(
            "User:",
            "Bot:",
            "\n",
            "[INST]",
            "[/INST]",
            "<s>",
            "</s>",
            "<<SYS>>",
            "<</SYS>>",
            "x",
            " ",
        ),
        *("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),
        *(LLAMA3_ASSISTANT, LLAMA3_SYSTEM),
    ]
)


@given(st.sampled_from(["titan", "llama", "mistral", "nova"]), st.lists(PIECES, max_size=12))
def test_any_mixture_gives_turns_that_alternate(family: str, pieces: list[str]) -> None:
    prompt = "".join(pieces)
    roles = [role for role, _ in turns(family, prompt)]
    rest = roles[1:] if roles[0] == "system" else roles
    assert rest == ["assistant" if place % 2 else "user" for place in range(len(rest))]
    assert rest
