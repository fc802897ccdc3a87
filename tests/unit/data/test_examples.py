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
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, shipped_models

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
    ).examples
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
        ).examples
    assert len(examples) in (100, 200)
    assert all(any(example.loss_mask) for example in examples)


def test_a_document_longer_than_the_limit_becomes_several_examples_of_one_record(
    renderer: Renderer,
) -> None:
    content = lines({"input": "short"}, {"input": "\x01" * 5000})
    read = read_examples(
        *(content, FILE, EXPRESS, renderer),
        role="training",
        batch_size=2,
        max_records=2,
        customization_type=CONTINUED_PRE_TRAINING,
    )
    assert read.num_records == 2
    assert len(read.examples) == 1 + 3
    assert max(len(example.input_ids) for example in read.examples) <= 2048, "at batch size 2"


@pytest.mark.parametrize(
    ("customization_type", "value", "says"),
    [
        (
            CONTINUED_PRE_TRAINING,
            pair("a"),
            'must follow \'{"input": "<raw text>"}\' format. Line 1: This looks like a '
            "prompt/completion record. Labelled records are for jobs of customizationType "
            "FINE_TUNING.",
        ),
        (
            "FINE_TUNING",
            {"input": "a"},
            "Line 1: This looks like continued pre-training data. Raw text is for jobs of "
            "customizationType CONTINUED_PRE_TRAINING.",
        ),
    ],
)
def test_data_of_the_other_customization_type_is_refused_by_name(
    renderer: Renderer, customization_type: str, value: dict[str, str], says: str
) -> None:
    with pytest.raises(DataError) as raised:
        read_examples(
            *(lines(value), FILE, EXPRESS, renderer),
            role="training",
            batch_size=1,
            customization_type=customization_type,
        )
    assert says in str(raised.value)
    assert raised.value.code == "mixed_schema"


def test_documents_have_a_quota_of_their_own(renderer: Renderer) -> None:
    content = lines(*({"input": "a"} for _ in range(10_001)))
    read = read_examples(
        *(content, FILE, EXPRESS, renderer),
        role="training",
        batch_size=1,
        customization_type=CONTINUED_PRE_TRAINING,
    )
    assert read.num_records == 10_001, "one more than fine-tuning may have"


TURNS = (("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))


@pytest.mark.parametrize(
    ("model_id", "value"),
    [
        (
            "amazon.nova-micro-v1:0",
            {
                "schemaVersion": "bedrock-conversation-2024",
                "messages": [{"role": role, "content": [{"text": text}]} for role, text in TURNS],
            },
        ),
        (
            "anthropic.claude-3-haiku-20240307-v1:0",
            {"messages": [{"role": role, "content": text} for role, text in TURNS]},
        ),
    ],
)
def test_loss_is_on_every_answer_of_a_conversation_and_on_nothing_else(
    renderer: Renderer, model_id: str, value: dict[str, object]
) -> None:
    (example,) = read_examples(
        *(lines(value), FILE, MODELS[model_id], renderer), role="training", batch_size=8
    ).examples
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    end = renderer.tokenizer.token_id("<|im_end|>")
    answers = [*renderer.tokenizer.encode("one"), end, *renderer.tokenizer.encode("two"), end]
    assert [token for token, carries in pairs if carries] == answers


@pytest.mark.parametrize(
    ("data", "num_records"),
    [("cpt-aws-s3-guide.jsonl", 1457), ("cpt-ja-wikipedia.jsonl", 118)],
)
def test_real_documents_become_examples(data: str, num_records: int, shared_data: Path) -> None:
    from tests.assets.smollm2 import smollm2_folder

    with (shared_data / data).open("rb") as stream:
        read = read_examples(
            *(stream, data, EXPRESS, Renderer(smollm2_folder())),
            role="training",
            batch_size=1,
            customization_type=CONTINUED_PRE_TRAINING,
        )
    assert read.num_records == num_records <= len(read.examples)
    assert max(len(example.input_ids) for example in read.examples) <= 4096
    if "ja" in data:
        assert len(read.examples) > num_records, "articles of 37,000 characters are cut"
