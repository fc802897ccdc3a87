"""`outcrop estimate` counts a file as the job would, and says whether the job fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.assets import tiny_tokenizer as tiny
from tests.assets.tiny_model import write_tiny_model

from outcrop.cli import main
from outcrop.cli.estimate import FITS, REFUSED
from outcrop.models.describe import add_model
from outcrop.settings import Settings

MODEL_ID = "mylab.tiny-v1:0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a model of two layers, and two files of data beside it."""
    root = tmp_path_factory.mktemp("estimate")
    folder = write_tiny_model(root / "model", vocab_size=400)
    tiny.write_tokenizer(folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, eos="<|im_end|>")
    (root / "data").mkdir()
    add_model(Settings(data_dir=root / "data"), folder, MODEL_ID, license="mit",
              family="titan-text")  # fmt: skip
    for name, count in (("train", 6), ("validation", 2)):
        lines = [json.dumps({"prompt": "question", "completion": " yes"})] * count
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def run(place: Path, *arguments: str) -> int:
    file = str(place / "train.jsonl")
    return main(["estimate", file, "--for", MODEL_ID, "--data-dir", str(place / "data"),
                 *arguments])  # fmt: skip


def test_tokens_are_counted_for_all_epochs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--set", "epochCount=3", "--json") == FITS
    told = json.loads(capsys.readouterr().out)
    assert told["tokensPerEpoch"] == 6 * told["longestTokens"], "the records are alike"
    assert told["numTokens"] == 18 * told["longestTokens"]
    assert told["storagePrice"] == "1.95"
    assert run(place, "--json", "--validation", str(place / "validation.jsonl")) == FITS
    more = json.loads(capsys.readouterr().out)
    assert more["disk"]["dataBytes"] > told["disk"]["dataBytes"]
    assert more["tokensPerEpoch"] == told["tokensPerEpoch"], "validation is not charged"


def test_it_says_what_is_not_known_and_what_does_not_fit(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(place) == FITS
    out = capsys.readouterr().out
    assert "no job of this model has measured its speed" in out
    assert "price: the price book has none for training this model" in out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert run(place) == REFUSED
    assert "The job does not fit onto the disk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--set", "epochCount"), "write NAME=VALUE"),
        (("--set", "epochCount=1", "--set", "epochCount=2"), "epochCount stands twice"),
        (("--set", "epochCount=0"), "epochCount is '0'"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert run(place, *arguments) == 1
    assert says in capsys.readouterr().err
