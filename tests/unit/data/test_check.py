"""A check finds every defect that was planted, at its line, and nothing else."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from tests.assets import tiny_tokenizer as tiny
from tests.assets.planted import (
    CODES,
    CONVERSATION_DEFECTS,
    PAIR_DEFECTS,
    TWINS,
    Planted,
    Sentences,
    dump,
    planted_conversations,
    planted_pairs,
)

from outcrop.data.check import (
    MAX_LISTED,
    TEST,
    TRAINING,
    VALIDATION,
    Check,
    DataFile,
    check_files,
)
from outcrop.data.defects import KINDS, Severity
from outcrop.data.examples import read_examples
from outcrop.data.render import Renderer
from outcrop.data.sources import local_file
from outcrop.errors import DataError, ObjectStoreError, SettingsError
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, shipped_models

MODELS = {model.model_id: model for model in shipped_models()}
EXPRESS = MODELS["amazon.titan-text-express-v1"]
NOVA = MODELS["amazon.nova-micro-v1:0"]
HAIKU = MODELS["anthropic.claude-3-haiku-20240307-v1:0"]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Renderer(
        tiny.write_tokenizer(folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, eos="<|im_end|>")
    )


def data_file(content: bytes, role: str = TRAINING, name: str = "") -> DataFile:
    @contextmanager
    def reading() -> Iterator[BinaryIO]:
        yield io.BytesIO(content)

    return DataFile(name or f"{role}.jsonl", role, reading, len(content))


def jsonl(*values: object) -> bytes:
    return b"".join(dump(value) + b"\n" for value in values)


def pairs(*values: tuple[str, str]) -> bytes:
    return jsonl(*({"prompt": prompt, "completion": answer} for prompt, answer in values))


def found(check: Check, *ignored: str) -> dict[int | None, list[tuple[str, int | None]]]:
    """Line -> (code, line of the twin) of what was found in the first file, advice left out."""
    lines: dict[int | None, list[tuple[str, int | None]]] = {}
    for defect in check.defects:
        of_first = defect.place.file == check.files[0].name
        if of_first and defect.severity is not Severity.ADVICE and defect.code not in ignored:
            twin = defect.twin.line if defect.twin else None
            lines.setdefault(defect.place.line, []).append((defect.code, twin))
    return lines


def expected(planted: Planted) -> dict[int, list[tuple[str, int | None]]]:
    return {line: [entry] for line, entry in planted.expected.items()}


# -- planted defects


@pytest.mark.parametrize("seed", range(4))
def test_every_defect_that_was_planted_into_pairs_is_found_and_nothing_else(
    seed: int, renderer: Renderer
) -> None:
    planted = planted_pairs(seed)
    check = check_files([data_file(planted.content)], base=EXPRESS, renderer=renderer)
    assert found(check, "language_mix") == expected(planted)
    assert check.verdict == "rejected"


@pytest.mark.parametrize("seed", range(4))
def test_every_defect_that_was_planted_into_conversations_is_found_and_nothing_else(
    seed: int, renderer: Renderer
) -> None:
    planted = planted_conversations(seed)
    check = check_files([data_file(planted.content)], base=NOVA, renderer=renderer)
    assert found(check, "language_mix") == expected(planted)


def test_every_planted_defect_has_its_usual_severity(renderer: Renderer) -> None:
    check = check_files([data_file(planted_pairs(9).content)], base=EXPRESS, renderer=renderer)
    names = {CODES.get(name, name) for name in (*PAIR_DEFECTS, *TWINS)}
    assert names - set(check.counts) == set()
    for code, counts in check.counts.items():
        assert KINDS[code].severity in counts


def test_the_generator_plants_each_of_its_defects() -> None:
    planted = Counter(code for code, _ in planted_pairs(1, num_each=2).expected.values())
    assert set(planted) == {CODES.get(name, name) for name in (*PAIR_DEFECTS, *TWINS)}
    planted = Counter(code for code, _ in planted_conversations(1).expected.values())
    assert set(planted) == set(CONVERSATION_DEFECTS)


@pytest.mark.parametrize("seed", range(2))
def test_a_clean_set_is_clean(seed: int, renderer: Renderer) -> None:
    sentences = Sentences(seed)
    content = jsonl(*(sentences.pair() for _ in range(300)))
    check = check_files([data_file(content)], base=EXPRESS, renderer=renderer)
    assert (check.defects, check.verdict) == ((), "clean")


# -- a check and a job


@pytest.mark.parametrize("name", sorted(PAIR_DEFECTS))
def test_a_job_fails_exactly_where_a_check_rejects(name: str, renderer: Renderer) -> None:
    sentences = Sentences(5)
    content = dump(sentences.pair()) + b"\n" + PAIR_DEFECTS[name](sentences) + b"\n"
    check = check_files([data_file(content)], base=EXPRESS, renderer=renderer)
    code = CODES.get(name, name)
    assert [entry for entry, _ in found(check)[2]] == [code]
    error = None
    try:
        read_examples(io.BytesIO(content), "f", EXPRESS, renderer, role=TRAINING, batch_size=1)
    except DataError as raised:
        error = raised
    assert check.is_rejected == (error is not None)
    assert error is None or (error.code, error.line) == (code, 2)


# -- files


def test_facts_of_a_file_are_counted() -> None:
    content = b"\xef\xbb\xbf" + pairs(("a b", " c"), ("d e", " f")) + b"\n{}\n"
    check = check_files([data_file(content)])
    (facts,) = check.files
    assert (facts.num_bytes, facts.num_lines, facts.num_records, facts.num_usable) == (
        len(content),
        4,
        3,
        2,
    )
    assert facts.num_characters == len("a b c" + "d e f")
    assert (facts.format, facts.formats) == ("prompt-completion", {"prompt-completion": 2, "": 1})
    assert facts.digest == hashlib.sha256(content).hexdigest()


def test_a_packed_file_is_checked_and_its_digest_is_of_the_bytes_as_they_are() -> None:
    plain = planted_pairs(3).content
    packed = gzip.compress(plain)
    one, other = (check_files([data_file(content)]) for content in (plain, packed))
    assert one.defects == other.defects
    assert one.files[0].digest != other.files[0].digest
    assert other.files[0].num_bytes == len(packed)


def test_a_packed_file_that_breaks_off_is_a_defect_of_the_file() -> None:
    packed = gzip.compress(planted_pairs(3).content)
    check = check_files([data_file(packed[: len(packed) // 2])])
    assert "invalid_gzip" in check.counts
    assert check.is_rejected


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_rejected(content: bytes) -> None:
    check = check_files([data_file(content)])
    assert check.counts["empty_file"] == {Severity.REJECT: 1}


def test_a_directory_and_a_missing_file_are_rejected_by_name(tmp_path: Path) -> None:
    for path, says in ((tmp_path, "is a directory"), (tmp_path / "gone", "cannot be read")):
        check = check_files([local_file(path)])
        (defect,) = (item for item in check.defects if item.severity is Severity.REJECT)
        assert (defect.code, defect.place.line) == ("unreadable_file", None)
        assert says in defect.message


def test_a_file_that_changes_while_it_is_read_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(planted_pairs(1).content)

    def change(num_bytes: int) -> None:
        with path.open("ab") as stream:
            stream.write(b"{}\n")

    check = check_files([local_file(path)], progress=change)
    assert check.counts["changed_while_read"] == {Severity.REJECT: 1}


def test_a_file_that_goes_away_while_it_is_read_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(pairs(("a b", " c")))
    check = check_files([local_file(path)], progress=lambda num_bytes: path.unlink(missing_ok=True))
    (defect,) = (item for item in check.defects if item.severity is Severity.REJECT)
    assert "it is gone" in defect.message


def test_an_object_that_vanishes_half_way_is_told_as_the_store_tells_it() -> None:
    class Vanishing(io.BytesIO):
        """Gives one block, then breaks off."""

        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise ObjectStoreError("NoSuchKey", "s3://b/k broke off after 9 bytes")
            return super().read(9)

    file = DataFile("s3://b/k", TRAINING, lambda: nullcontext(Vanishing(b"{}\n" * 9)))
    with pytest.raises(ObjectStoreError, match="broke off after 9 bytes"):
        check_files([file])


def test_a_validation_file_alone_can_be_checked(renderer: Renderer) -> None:
    check = check_files(
        [data_file(planted_pairs(2).content, VALIDATION)], base=EXPRESS, renderer=renderer
    )
    assert check.tokens is None
    assert found(check, "language_mix") == expected(planted_pairs(2))


def test_other_processes_find_what_this_one_finds(renderer: Renderer) -> None:
    files = [
        data_file(b"".join(planted_pairs(seed).content for seed in range(4))),
        data_file(planted_pairs(0).content, TEST),
    ]
    checks = [
        check_files(files, base=EXPRESS, renderer=renderer, workers=workers) for workers in (0, 2)
    ]
    one, other = (replace(check, seconds=0.0) for check in checks)
    assert one == other


def test_a_tokenizer_that_cannot_be_loaded_elsewhere_is_a_model_error(
    renderer: Renderer, tmp_path: Path
) -> None:
    folder = tiny.write_tokenizer(
        tmp_path / "t", tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, eos="<|im_end|>"
    )
    lost = Renderer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Exception, match="tokenizer"):
        check_files([data_file(pairs(("a", "b")))], base=EXPRESS, renderer=lost, workers=1)


def test_defects_are_listed_up_to_a_bound_and_counted_exactly() -> None:
    content = b"nothing\n" * 250
    check = check_files([data_file(content), data_file(content, VALIDATION)])
    assert check.counts["invalid_json"] == {Severity.REJECT: 500}
    listed = [defect.place for defect in check.defects if defect.code == "invalid_json"]
    assert [place.line for place in listed] == list(range(1, MAX_LISTED + 1))
    assert {place.file for place in listed} == {"training.jsonl"}


# -- formats


def test_without_a_model_the_format_is_what_most_records_have() -> None:
    sentences = Sentences(1)
    values = [sentences.conversation() for _ in range(5)]
    content = jsonl(sentences.pair(), *values)
    check = check_files([data_file(content)])
    assert found(check) == {1: [("mixed_schema", None)]}


def test_a_wrong_model_is_said_with_what_the_data_look_like() -> None:
    content = jsonl(*(Sentences(seed).pair() for seed in range(3)))
    check = check_files([data_file(content)], base=NOVA)
    assert check.counts["mixed_schema"] == {Severity.REJECT: 3}
    said = [item.message for item in check.defects if item.code == "mixed_schema"]
    assert said == ["This looks like a prompt/completion record."] * 3


def test_raw_text_is_named_where_pairs_are_wanted_and_the_other_way_round() -> None:
    text, pair = jsonl({"input": "a b c"}), pairs(("a", "b"))
    wrong = check_files([data_file(text)], base=EXPRESS)
    assert "This looks like continued pre-training data." in wrong.defects[-1].message
    wrong = check_files([data_file(pair)], base=EXPRESS, customization_type=CONTINUED_PRE_TRAINING)
    assert "This looks like a prompt/completion record." in wrong.defects[-1].message


@pytest.mark.parametrize(
    ("kind", "good", "bad", "code"),
    [
        (
            "DISTILLATION",
            {
                "schemaVersion": "bedrock-conversation-2024",
                "messages": [{"role": "user", "content": [{"text": "q"}]}],
            },
            {"prompt": "q", "completion": "a"},
            "mixed_schema",
        ),
        (
            "REINFORCEMENT_FINE_TUNING",
            {"messages": [{"role": "user", "content": "q"}], "reference_answer": 4, "more": 1},
            {"messages": [{"role": "system", "content": "q"}], "reference_answer": 4},
            "role_order",
        ),
        (
            "EVALUATION",
            {"prompt": "q", "referenceResponse": "a", "category": "c"},
            {"prompt": "q", "referenceResponse": 5},
            "wrong_type",
        ),
        (
            "EVALUATION",
            {"prompt": "q", "modelResponses": [{"response": "a", "modelIdentifier": "m"}]},
            {"prompt": "q", "modelResponses": []},
            "wrong_type",
        ),
        ("BATCH_INFERENCE", {"modelInput": {"a": 1}}, {"recordId": "1"}, "missing_model_input"),
        (
            "DISTILLATION",
            {
                "schemaType": "ModelInvocationLog",
                "modelId": "m",
                "operation": "Converse",
                "input": {"inputBodyJson": {}},
                "output": {"outputBodyJson": {}},
            },
            {"schemaType": "ModelInvocationLog", "modelId": "m", "operation": "o", "input": {}},
            "missing_prompt",
        ),
        (
            "FINE_TUNING",
            {"image-ref": "s3://bucket/a.png", "caption": "c"},
            {"image-ref": "s3://bucket/a.tiff", "caption": "c"},
            "bad_image",
        ),
    ],
)
def test_other_formats_are_checked_for_what_they_demand(
    kind: str, good: dict[str, Any], bad: dict[str, Any], code: str
) -> None:
    content = jsonl(good, {**good, "x": 1} if code == "role_order" else good, bad)
    check = check_files([data_file(content)], customization_type=kind)
    rejected = {
        defect.place.line: defect.code
        for defect in check.defects
        if defect.severity is Severity.REJECT
    }
    assert rejected == {3: code}


def test_an_image_is_for_a_person_to_decide_without_a_model_and_refused_by_one() -> None:
    value = Sentences(2).conversation()
    source = {"s3Location": {"uri": "s3://bucket/a.png"}}
    value["messages"][0]["content"].append({"image": {"format": "png", "source": source}})
    content = jsonl(value)
    severities = [
        check_files([data_file(content)], base=base).counts["unsupported_block"]
        for base in (None, NOVA)
    ]
    assert severities == [{Severity.REVIEW: 1}, {Severity.REJECT: 1}]


def test_claude_takes_no_further_keys() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    check = check_files([data_file(jsonl({"messages": turns, "id": 1}))], base=HAIKU)
    assert check.counts["extra_keys"] == {Severity.REJECT: 1}


def test_an_unknown_type_and_a_threshold_out_of_bounds_are_refused() -> None:
    file = data_file(pairs(("a", "b")))
    with pytest.raises(DataError, match="FINE_TUNE is not known"):
        check_files([file], customization_type="FINE_TUNE")
    with pytest.raises(SettingsError, match="threshold"):
        check_files([file], near_threshold=0.1)


# -- several files


def test_leaks_are_found_between_training_validation_and_test() -> None:
    sentences = Sentences(4)
    values = [sentences.pair() for _ in range(40)]
    near = {**values[1], "prompt": values[1]["prompt"].upper()}
    same_prompt = {**values[2], "completion": " something else"}
    files = [
        data_file(jsonl(values[0], values[5], near), TEST),
        data_file(jsonl(values[3], values[5], same_prompt), VALIDATION),
        data_file(jsonl(*values[:5], *values[6:])),
    ]
    check = check_files(files)
    leaks = [
        (defect.code, defect.place.file, defect.place.line, defect.twin)
        for defect in check.defects
        if defect.code.endswith("_leak")
    ]
    named = [
        (code, file, line, twin and (twin.file, twin.line)) for code, file, line, twin in leaks
    ]
    assert named == [
        ("test_leak", "training.jsonl", 1, ("test.jsonl", 1)),
        ("test_leak", "training.jsonl", 2, ("test.jsonl", 3)),
        ("validation_leak", "training.jsonl", 3, ("validation.jsonl", 3)),
        ("validation_leak", "training.jsonl", 4, ("validation.jsonl", 1)),
        ("test_leak", "validation.jsonl", 2, ("test.jsonl", 2)),
    ]
    assert check.counts["test_leak"] == {Severity.DROP: 3}


def test_an_instruction_that_all_prompts_share_makes_no_near_duplicates() -> None:
    sentences = Sentences(6)
    instruction = sentences.text(300, 300)
    values = [
        {"prompt": f"{instruction} {sentences.text(6, 9)}", "completion": " the same answer"}
        for _ in range(80)
    ]
    check = check_files([data_file(jsonl(*values))])
    assert check.num_near_duplicates == 0


# -- amounts, tokens, labels


def test_quotas_of_records_are_refused() -> None:
    content = pairs(*((f"word{n} number", f" a{n}") for n in range(12)))
    files = [data_file(content), data_file(content, VALIDATION)]
    check = check_files(files, base=EXPRESS, max_training_records=10)
    assert check.counts["too_many_records"] == {Severity.REJECT: 1}
    small = replace(EXPRESS, records=replace(EXPRESS.records, max_total=20, max_training=15))
    check = check_files(files, base=small)
    (defect,) = (item for item in check.defects if item.code == "too_many_records")
    assert "at most 20 together" in defect.message


def test_tokens_are_those_that_a_job_trains_on(renderer: Renderer) -> None:
    content = jsonl(*(Sentences(seed).pair() for seed in range(8)))
    check = check_files([data_file(content)], base=EXPRESS, renderer=renderer)
    examples = read_examples(
        io.BytesIO(content), "f", EXPRESS, renderer, role=TRAINING, batch_size=1
    ).examples
    assert check.tokens is not None
    assert check.tokens.epoch_tokens == sum(len(example.input_ids) for example in examples)
    assert check.tokens.output is not None
    assert check.tokens.output.total > sum(sum(example.loss_mask) for example in examples)
    assert check.tokens.total.maximum == max(len(example.input_ids) for example in examples)
    assert check.tokens.limit == 4096
    assert sum(check.tokens.total.histogram.counts) == 8


def test_the_limit_is_that_of_the_batch_size(renderer: Renderer) -> None:
    text = "\x01" * 2500  # one token each to this tokenizer
    content = pairs((text, " yes"))
    codes = [
        "too_long"
        in check_files(
            [data_file(content)], base=EXPRESS, renderer=renderer, batch_size=size
        ).counts
        for size in (1, 2)
    ]
    assert codes == [False, True]


def test_a_prompt_that_fills_the_limit_leaves_no_label(renderer: Renderer) -> None:
    content = pairs(("\x01" * 5000, " yes"), ("yes", "\x01" * 5000))
    check = check_files([data_file(content)], base=EXPRESS, renderer=renderer)
    first, second = (item for item in check.defects if item.code == "too_long")
    assert "nothing of the completion would be left to learn" in first.message
    assert "nothing of the completion" not in second.message


def test_more_characters_than_bedrock_takes_are_refused_without_counting_tokens() -> None:
    check = check_files([data_file(pairs(("a " * 13_000, " b")))], base=EXPRESS)
    (defect,) = (item for item in check.defects if item.code == "too_long")
    assert "24,576" in defect.message


def test_documents_are_cut_and_so_never_too_long(renderer: Renderer) -> None:
    content = jsonl({"input": "word " * 20_000}, {"input": "the end"})
    check = check_files(
        [data_file(content)],
        base=EXPRESS,
        renderer=renderer,
        customization_type=CONTINUED_PRE_TRAINING,
    )
    assert "too_long" not in check.counts
    assert check.tokens is not None
    assert check.tokens.input is None


def test_labels_are_counted_and_their_imbalance_is_said() -> None:
    values = [(f"prompt number {n} of many", " often") for n in range(60)]
    values += [("another prompt altogether", " rare")]
    check = check_files([data_file(pairs(*values))])
    assert check.labels is not None
    assert dict(check.labels.counts) == {"often": 60, "rare": 1}
    assert check.counts["label_imbalance"] == {Severity.ADVICE: 1}


def test_completions_that_differ_are_no_labels() -> None:
    sentences = Sentences(3)
    check = check_files([data_file(jsonl(*(sentences.pair() for _ in range(60))))])
    assert check.labels is None


def test_a_letter_is_low_information_unless_others_have_it_too() -> None:
    choices = [(f"choose {n} of these", " A" if n % 2 else " B") for n in range(40)]
    check = check_files([data_file(pairs(*choices, ("what is it then", " q")))])
    assert [line for line, codes in found(check).items() if codes[0][0] == "low_information"] == [
        41
    ]


def test_a_length_far_from_all_others_is_for_review(renderer: Renderer) -> None:
    sentences = Sentences(7)
    values = [sentences.pair() for _ in range(80)]
    values[30]["completion"] = " " + sentences.text(400, 400)
    check = check_files([data_file(jsonl(*values))])
    assert found(check) == {31: [("outlier_length", None)]}


def test_advice_follows_from_amounts_and_hyperparameters() -> None:
    few = pairs(*((f"word{n} number", f" a{n}") for n in range(12)))
    check = check_files(
        [data_file(few)],
        base=replace(HAIKU, data_formats=("prompt-completion",)),
        hyper_parameters={"epochCount": "11", "learningRateMultiplier": "1.0"},
    )
    advice = {code for code, counts in check.counts.items() if Severity.ADVICE in counts}
    assert advice == {
        *("too_few_records", "many_epochs", "small_set_multiplier", "no_validation"),
    }
    assert check.verdict == "clean"
    (defect,) = (item for item in check.defects if item.code == "too_few_records")
    assert "Bedrock refuses fewer than 32" in defect.message


def test_advice_about_raw_text_counts_tokens(renderer: Renderer) -> None:
    check = check_files(
        [data_file(jsonl({"input": "a few words"}))],
        base=EXPRESS,
        renderer=renderer,
        customization_type=CONTINUED_PRE_TRAINING,
    )
    assert check.counts["too_few_tokens"] == {Severity.ADVICE: 1}


def test_an_answer_that_its_context_does_not_hold_is_said() -> None:
    sentences = Sentences(8)
    context = "Paris became the capital of France; its largest river crosses the centre of it."
    grounded = "The capital of France is crossed by the largest river, which became a centre."
    prompt = "<context>{}</context> " + sentences.text(8, 8)
    content = pairs(
        (prompt.format(context), f" {grounded}"),
        (
            prompt.format(context) + " please",
            " Elephants usually forget nothing whatsoever, never.",
        ),
    )
    check = check_files([data_file(content)])
    lines = [item.place.line for item in check.defects if item.code == "ungrounded_answer"]
    assert lines == [2]


def test_another_language_is_named_with_its_first_record() -> None:
    sentences = Sentences(2)
    values = [sentences.pair() for _ in range(60)]
    german = "Die Rechnung wurde gestern zweimal abgebucht, und niemand konnte mir sagen warum. "
    values[20:24] = [
        {"prompt": f"{german * 2}{n} {sentences.text(3, 4)}", "completion": f" Antwort {n} ja"}
        for n in range(4)
    ]
    check = check_files([data_file(jsonl(*values))])
    (defect,) = (item for item in check.defects if item.code == "language_mix")
    assert (defect.place.line, defect.value) == (21, "de")
    assert next(iter(check.languages)) == "en"


def test_no_finding_holds_what_a_terminal_obeys() -> None:
    content = json.dumps({"prompt": "\x1b[31m\x07" * 50, "completion": " \x1b]0;x\x07"}).encode()
    check = check_files([data_file(content), data_file(b"\x1b[2J\n", VALIDATION)])
    assert check.defects
    for defect in check.defects:
        assert defect.message.isprintable()
        assert defect.value.isprintable()
