"""What the benchmarks of serving count and draw is right; nothing is measured here."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from benchmarks import pictures
from benchmarks.adapter_files import write_adapters, write_gguf_adapter
from benchmarks.serving_page import fill
from benchmarks.serving_peers import of_round, table_of
from benchmarks.serving_soak import growth, is_last
from benchmarks.serving_work import MANY, MIXED, ONE, ROWS, draw_prompts
from tests.unit.serve.tiny_chat import write_tiny_chat
from tokenizers import Tokenizer

from outcrop.models.lora import load_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("row", list(ROWS))
def test_prompts_have_their_lengths_and_come_again_by_their_seed(folder: Path, row: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    work = ROWS[row]
    prompts = draw_prompts(tokenizer, work, "a")
    assert [len(prompt) for prompt in prompts] == [work.prompt_tokens] * work.streams
    assert prompts == draw_prompts(tokenizer, work, "a") != draw_prompts(tokenizer, work, "b")
    begin = {tuple(prompt[: work.common_tokens + 40]) for prompt in prompts}
    assert len(begin) == work.streams
    assert len({tuple(prompt[: work.common_tokens]) for prompt in prompts}) == 1


def test_an_adapter_in_gguf_turns_what_llama_cpp_turns(folder: Path, tmp_path: Path) -> None:
    [place] = write_adapters(folder, tmp_path, 1, rank=4)
    assert write_adapters(folder, tmp_path, 1, rank=4) == [place]
    write_gguf_adapter(folder, place, tmp_path / "adapter.gguf")
    found = {
        tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors
    }
    own = load_adapter(place).tensors
    assert len(found) == 2 * len(own)
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    a_RI, b_OR = own["model.layers.0.self_attn.q_proj"]
    assert np.array_equal(found["blk.0.attn_q.weight.lora_a"], a_RI.numpy())
    # Halves of a head become neighbours: row 1 of a head there is the first of its second half.
    half = b_OR.shape[0] // heads // 2
    turned = found["blk.0.attn_q.weight.lora_b"]
    assert np.array_equal(turned[1], b_OR[half].numpy())
    assert np.array_equal(turned[2], b_OR[1].numpy())
    _, other_b = own["model.layers.0.mlp.down_proj"]
    assert np.array_equal(found["blk.0.ffn_down.weight.lora_b"], other_b.numpy())
    assert not torch.all(other_b == 0)


def test_medians_are_compared_within_one_class_of_precision() -> None:
    def result(seconds: float, first: float) -> dict[str, object]:
        one = {"seconds": seconds, "first": first, "decoding": 10 / first}
        return {
            "rows": {ONE: [one], MANY: [one]},
            "start": 1.0,
            "peak": 1e6,
            "others": 0.0,
            "answer": [],
        }

    runs = {
        "Outcrop": [result(2.0, 0.1)],
        "llama.cpp f16": [result(4.0, 0.2)],
        "OpenVINO fp16": [result(8.0, 0.05)],
        "llama.cpp q8_0": [result(1.0, 0.01)],
    }
    assert of_round(runs["Outcrop"][0], MANY, "rate") == [32 * 64 / 2.0]
    assert of_round(runs["Outcrop"][0], MIXED, "rate") == []
    heading, *rows = table_of(runs, "16 and 32 bits")
    assert heading == ["", "Outcrop", "llama.cpp f16", "OpenVINO fp16", "Outcrop to the best"]
    ratios = {row[0]: row[-1] for row in rows}
    assert ratios["32 streams: new tokens a second"] == "2.00"
    assert ratios["1 stream: first token after, s"] == "2.00"
    assert ratios["1 stream: decoding, tokens a second"] == "0.50"


def test_memory_that_grows_is_told_by_its_slope() -> None:
    flat = [(2.0 * n, 100.0 if n > 10 else 10.0 * n) for n in range(300)]
    assert growth(flat, 600.0) == pytest.approx((100.0, 100.0, 0.0))
    leaking = [(2.0 * n, 100.0 + 0.5 * n) for n in range(300)]
    first, last, slope = growth(leaking, 600.0)
    assert slope == pytest.approx(15.0)
    assert last > first


def test_a_stream_has_ended_with_its_last_event_only() -> None:
    assert is_last("metadata", b"{}")
    assert not is_last("contentBlockDelta", b"{}")
    assert is_last("chunk", b'{"bytes":"eyJhbWF6b24tYmVkcm9jay1pbnZvY2F0aW9uTWV0cmljcyI6e319"}')
    assert not is_last("chunk", b'{"bytes":"eyJvdXRwdXRUZXh0IjoiYSJ9"}')


def test_pictures_are_whole_and_hold_every_value() -> None:
    curve = pictures.curves(
        "memory", "seconds", {"gateway": [(0.0, 1.0), (9.0, 80.0)], "b": [(0, 3)]}
    )
    bars = pictures.histogram("times", "seconds", [0.01, 0.02, 0.5, 4.0], {"p50": 0.02})
    root = ET.fromstring(pictures.picture([curve, bars], "two pictures"))
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert len(root.findall(".//svg:polyline", space)) == 2
    bars_drawn = root.findall(".//svg:g[2]/svg:rect", space)
    heights = sorted(float(bar.attrib["height"]) for bar in bars_drawn)
    assert len([height for height in heights if height > 0]) == 4
    for bar in bars_drawn:
        assert float(bar.attrib["y"]) >= pictures.TOP - 0.1


def test_the_page_takes_the_newest_tables_and_leaves_what_was_not_measured(tmp_path: Path) -> None:
    table = "| a | b |\n|---|---|\n| 1 | {} |"
    for day, value in (("2026-01-02", "old"), ("2026-02-03", "new")):
        text = f"# T\n\nhow\n\nWeights of 8 bits:\n\n{table.format(value)}\n\nnotes | not a table\n"
        (tmp_path / f"{day}_2-cores-x_speed.md").write_text(text)
    page = (
        "before\n<!-- measured: speed -->\nx\n<!-- end -->\n"
        "<!-- measured: other -->\nkept\n<!-- end -->\n"
    )
    filled = fill(page, tmp_path)
    assert "| 1 | new |" in filled
    assert "old" not in filled
    assert "Weights of 8 bits:" in filled
    assert "notes" not in filled
    assert "kept" in filled
    assert fill(filled, tmp_path) == filled
