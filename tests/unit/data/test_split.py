"""Splitting a file: proportions, groups, labels, and what decides who goes where."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.data.formats import formats_for
from outcrop.data.near import NearIndex
from outcrop.data.sources import local_file
from outcrop.data.split import Split, choose, split_file
from outcrop.errors import DataError
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, FINE_TUNING

ANY = formats_for(None, FINE_TUNING)
WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("na", "rek", "sol", "tim")]


def sentence(rng: random.Random, num_words: int = 25) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def split(source: Path, **options: Any) -> tuple[Split, list[Any], list[Any]]:
    training, validation = source.with_name("t.jsonl"), source.with_name("v.jsonl")
    formats = options.pop("formats", ANY)
    found = split_file(local_file(source), training, validation, formats, force=True, **options)
    sides = [
        [json.loads(line) for line in path.read_bytes().splitlines()]
        for path in (training, validation)
    ]
    return found, sides[0], sides[1]


def pairs(number: int, labels: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "prompt": sentence(rng),
            "completion": f" label{rng.randrange(labels)}" if labels else " " + sentence(rng),
        }
        for _ in range(number)
    ]


def test_a_tenth_goes_to_validation_and_every_line_is_copied_once(tmp_path: Path) -> None:
    records = pairs(200)
    source = write(tmp_path / "all.jsonl", records)
    found, training, validation = split(source)
    assert (found.num_training, found.num_validation) == (180, 20)
    assert (len(training), len(validation)) == (180, 20)
    assert training == [record for record in records if record not in validation]
    assert found.labels == {}
    lines = source.read_bytes().splitlines()
    assert set(source.with_name("t.jsonl").read_bytes().splitlines()) <= set(lines)


def test_each_label_is_split_in_the_same_proportion(tmp_path: Path) -> None:
    records = [
        {"prompt": sentence(random.Random(place)), "completion": f" {name}"}
        for place, name in enumerate(["yes"] * 300 + ["no"] * 100 + ["perhaps"] * 40 + ["rare"] * 3)
    ]
    found, _, _ = split(write(tmp_path / "all.jsonl", records))
    assert found.num_validation == 44
    assert found.labels["yes"] == (270, 30)
    assert found.labels["no"] == (90, 10)
    assert found.labels["perhaps"] == (36, 4)
    assert found.labels["rare"] == (3, 0)


def test_near_duplicates_stay_on_one_side_also_with_another_answer(tmp_path: Path) -> None:
    records = pairs(60, labels=3)
    for place in range(0, 60, 2):
        records.append({"prompt": records[place]["prompt"].upper(), "completion": " label9"})
        records.append({"prompt": records[place]["prompt"] + " thanks", "completion": " label0"})
    for seed in range(4):
        found, training, validation = split(
            write(tmp_path / "all.jsonl", records), seed=seed, share=0.3
        )
        sides = [{record["prompt"] for record in side} for side in (training, validation)]
        for place in range(0, 60, 2):
            prompt = records[place]["prompt"]
            family = {prompt, prompt.upper(), prompt + " thanks"}
            assert family <= sides[0] or family <= sides[1]
        assert found.num_validation == 36
        with NearIndex() as index:
            index.add_texts([record["prompt"] for record in (*training, *validation)])
            assert not index.twins(of=range(len(training)), among=range(len(training), len(index)))


def test_the_seed_decides_and_order_and_names_do_not(tmp_path: Path) -> None:
    records = pairs(100, labels=4)
    source = write(tmp_path / "all.jsonl", records)
    found, _, validation = split(source, seed=3)
    again, _, _ = split(source, seed=3)
    assert again == found
    shuffled = records[::-1]
    (tmp_path / "other").mkdir()
    _, _, reversed_validation = split(write(tmp_path / "other" / "b.jsonl", shuffled), seed=3)
    assert sorted(map(str, reversed_validation)) == sorted(map(str, validation))
    assert split(source, seed=4)[2] != validation


def test_documents_and_conversations_can_be_split(tmp_path: Path) -> None:
    rng = random.Random(1)
    documents = [{"input": sentence(rng)} for _ in range(30)]
    found, _, _ = split(
        write(tmp_path / "d.jsonl", documents), formats=formats_for(None, CONTINUED_PRE_TRAINING)
    )
    assert (found.num_training, found.num_validation) == (27, 3)
    conversations = [
        {"messages": [{"role": role, "content": sentence(rng)} for role in ("user", "assistant")]}
        for _ in range(10)
    ]
    found, _, _ = split(write(tmp_path / "c.jsonl", conversations), share=0.25)
    assert (found.num_training, found.num_validation) == (8, 2)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=2, max_size=60),
    st.fractions(Fraction(1, 50), Fraction(49, 50)),
    st.integers(0, 2**32),
)
def test_groups_stay_whole_and_the_share_is_met_as_near_as_they_allow(
    drawn: list[tuple[int, int]], share: Fraction, seed: int
) -> None:
    groups = np.array([group for group, _ in drawn], np.int64)
    labels = np.array([label for _, label in drawn], np.int32)
    keys = np.random.default_rng(seed).integers(0, 2**63, len(drawn)).astype(np.uint64)
    if len(set(groups.tolist())) < 2:
        with pytest.raises(DataError, match="At least two"):
            choose(groups, labels, share, keys)
        return
    chosen = choose(groups, labels, share, keys)
    assert 0 < chosen.sum() < len(drawn)
    for group in set(groups.tolist()):
        assert len(set(chosen[groups == group].tolist())) == 1
    sizes = np.unique(groups, return_counts=True)[1]
    target = min(max(round(len(drawn) * share), 1), len(drawn) - 1)
    # Every label keeps a group in training, which costs at most the records of those groups.
    kept = len(set(labels.tolist())) * int(sizes.max())
    assert abs(int(chosen.sum()) - target) <= max(kept, int(sizes.max()))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 80), st.fractions(Fraction(1, 50), Fraction(49, 50)))
def test_without_groups_or_labels_the_share_is_exact(number: int, share: Fraction) -> None:
    keys = np.random.default_rng(number).integers(0, 2**63, number).astype(np.uint64)
    chosen = choose(np.arange(number), np.zeros(number, np.int32), share, keys)
    assert chosen.sum() == min(max(round(number * share), 1), number - 1)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(DataError, match="above 0 and below 1"):
        split(write(tmp_path / "a.jsonl", pairs(4)), share=share)


def test_what_cannot_be_split_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    one = json.dumps(pairs(1)[0])
    for content, said in (
        ("", "holds no record"),
        (one, "At least two"),
        (f"{one}\n{one}\n", "At least two"),
        (f"{one}\n{{\n", "Line 2"),
        (f'{one}\n{{"input": "x"}}\n', "continued pre-training"),
    ):
        source.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=said):
            split(source)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pairs(4))
    with pytest.raises(DataError, match="is read"):
        split_file(local_file(source), tmp_path / "t", source, ANY, force=True)
    with pytest.raises(DataError, match="Name two files"):
        split_file(local_file(source), tmp_path / "t", tmp_path / "t", ANY)
