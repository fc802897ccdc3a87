"""A file becomes examples, or a refusal that names the file and the line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tests.assets import tiny_tokenizer as tiny

from outcrop.data.examples import read_examples
from outcrop.data.render import Renderer
from outcrop.errors import DataError
from outcrop.models.catalog import shipped_models

FILE = "s3://bucket/train.jsonl"
MODELS = {model.model_id: model for model in shipped_models()}
EXPRESS = MODELS["amazon.titan-text-express-v1"]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Renderer(
        tiny.write_tokenizer(folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, eos="<|im_end|>")
    )


def lines(*values: object) -> io.BytesIO:
    return io.BytesIO("\n".join(json.dumps(value) for value in values).encode())


def pair(prompt: str, completion: str = " yes") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_a_file_becomes_examples_in_order(renderer: Renderer) -> None:
    examples = read_examples(
        lines(pair("one"), pair("User: two\nBot:", "no")),
        FILE,
        EXPRESS,
        renderer,
        role="training",
        batch_size=1,
    )
    assert [renderer.decode(example.input_ids) for example in examples] == [
        "user\none\nassistant\n yes\n",
        "user\ntwo\nassistant\nno\n",
    ]


def test_the_first_record_too_many_stops_the_reading(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="holds more than 2 records") as raised:
        read_examples(
            lines(pair("a"), pair("b"), pair("c"), "not read any more"),
            FILE,
            EXPRESS,
            renderer,
            role="training",
            batch_size=1,
            max_records=2,
        )
    assert raised.value.code == "too_many_records"


def test_a_record_that_is_too_long_is_refused_at_its_line(renderer: Renderer) -> None:
    content = lines(pair("a"), pair("\x01" * 5000))
    with pytest.raises(DataError, match="exceeds total limit of 4096") as raised:
        read_examples(content, FILE, EXPRESS, renderer, role="training", batch_size=1)
    assert (raised.value.code, raised.value.file, raised.value.line) == ("too_long", FILE, 2)


def test_prompt_and_answer_are_counted_apart(renderer: Renderer) -> None:
    light = MODELS["cohere.command-light-text-v14"]
    for record, says in (
        (pair("\x01" * 4090, "y"), "Maximum input token count 41"),
        (pair("x", "\x01" * 2048), "Maximum output token count 2050 exceeds limit of 2048"),
    ):
        with pytest.raises(DataError, match=says):
            read_examples(lines(record), FILE, light, renderer, role="training", batch_size=8)


def test_what_the_models_template_refuses_is_refused_at_its_line(tmp_path: Path) -> None:
    renderer = Renderer(
        tiny.write_tokenizer(
            tmp_path, tiny.MISTRAL_TEMPLATE, tiny.MISTRAL_TOKENS, bos="<s>", eos="</s>"
        )
    )
    content = lines(pair("a"), pair("Be kind.\nUser: a\nBot:"))
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: .*must alternate") as raised:
        read_examples(content, FILE, EXPRESS, renderer, role="training", batch_size=1)
    assert (raised.value.file, raised.value.line) == (FILE, 2)


@pytest.mark.parametrize(
    ("data", "model_id"),
    [
        ("banking77-validation.jsonl", "cohere.command-light-text-v14"),
        ("mts-dialog-validation.jsonl", "amazon.titan-text-express-v1"),
        ("ja-jsquad-validation.jsonl", "meta.llama2-13b-v1"),
        ("gsm8k-conversation-validation.jsonl", "amazon.nova-micro-v1:0"),
    ],
)
def test_real_data_sets_become_examples(data: str, model_id: str, shared_data: Path) -> None:
    from tests.assets.smollm2 import smollm2_folder

    with (shared_data / data).open("rb") as stream:
        examples = read_examples(
            stream,
            data,
            MODELS[model_id],
            Renderer(smollm2_folder()),
            role="validation",
            batch_size=1,
        )
    assert len(examples) in (100, 200)
    assert all(any(example.loss_mask) for example in examples)
