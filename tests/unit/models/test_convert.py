"""The converted model is the model in the GGUF file, weight by weight and token by token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets.smollm2 import smollm2_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from outcrop.errors import ModelError
from outcrop.models import weights
from outcrop.models.convert import convert_gguf
from outcrop.models.tokenizer import Tokenizer
from outcrop.models.weights import RECORD_FILE, SHIPPED_KEY, ensure_weights, file_digest
from outcrop.settings import Settings

# transformers reads the file's header several times, seconds each; more on a busy machine.
PATIENT = pytest.mark.timeout(600)

CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "  leading and trailing  \t spaces \n\n\n and   runs  of\r\nthem ",
    "def f(x):\n\treturn {'a': [1, 22, 333], \"b\": x ** 2.5e-10}  # comment\n\n",
    "1234567890 3.14159 1,000,000 2024-07-26 +81-90-1234-5678",
    "\u6771\u4eac\u90fd\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\u30ab\u30bf\u30ab\u30ca\u3000\u5168\u89d2",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00e9\u0301 \u202etext\u202c \u200b",
    "don't you'll I'VE we're it's",
    'https://example.com/a?b=c&d=%20#e <p class="x">html</p>',
    "\x00\x01\x7f\ufffd\uffff",
    "Grüße, Ørsted; ¿qué? Привет мир, שלום, مرحبا, สวัสดี",
    "",
    " ",
    "\n",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    """The converted model."""
    return smollm2_folder()


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same file as transformers itself reads it, in float32."""
    file = str(weights.shipped_gguf())
    # Only the frame is ours: every weight in it is replaced, as the check below makes sure.
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_folder(), dtype=torch.float32, local_files_only=True
    )
    read = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


@pytest.mark.slow
@PATIENT
def test_every_weight_is_what_transformers_reads_from_the_gguf(
    folder: Path, reference: Any
) -> None:
    ours = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True
    ).state_dict()
    theirs = reference.state_dict()
    assert ours.keys() == theirs.keys()
    different = [
        name for name in ours if not torch.equal(ours[name], theirs[name].to(torch.bfloat16))
    ]
    assert different == []


@pytest.mark.slow
@PATIENT
def test_the_logits_are_those_of_transformers_own_gguf_loading(
    folder: Path, reference: Any
) -> None:
    ids = torch.tensor([Tokenizer(folder).encode("The capital of France is the city of")])
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert ours.config.rms_norm_eps == 1e-5
    assert ours.config.rope_parameters["rope_theta"] == 100_000
    # Only the weights are rounded: a cast of the whole model would round its rotations too.
    with torch.inference_mode():
        exact = reference(ids).logits
        for parameter in reference.parameters():
            parameter.copy_(parameter.bfloat16().float())
        expected, found = reference(ids).logits, ours(ids).logits
    assert torch.equal(found, expected)
    # What rounding to bfloat16 costs: the same word comes first, and the odds hardly move.
    assert found[0, -1].argmax() == exact[0, -1].argmax()
    torch.testing.assert_close(found.softmax(-1), exact.softmax(-1), rtol=0, atol=0.05)


@pytest.mark.slow
@PATIENT
def test_token_ids_are_those_of_transformers_own_gguf_conversion(folder: Path) -> None:
    file = weights.shipped_gguf()
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    ours = Tokenizer(folder)
    for text in CORPUS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == expected, text


def test_each_digit_is_a_token_in_any_script(folder: Path) -> None:
    """As llama.cpp's `smollm` splits (\\p{N}); transformers' GGUF conversion leaves that out."""
    tokenizer = Tokenizer(folder)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("a2024 7")] == [
        *("a", "2", "0", "2", "4", " ", "7")
    ]
    assert tokenizer.encode(" \u0663")[0] == tokenizer.encode(" ")[0]


def test_every_text_comes_back_from_its_tokens(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_reads_the_same_tokenizer_from_the_folder(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = Tokenizer(folder)
    chat = "<|im_start|>user\nHello 123<|im_end|>\n"
    assert theirs(chat)["input_ids"] == ours.encode_scaffold(chat)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert "SmolLM" in theirs.chat_template


def test_an_answer_ends_at_the_turns_end_or_the_documents(folder: Path) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    tokenizer = Tokenizer(folder)
    assert config["eos_token_id"] == [
        tokenizer.token_id("<|im_end|>"),
        tokenizer.token_id("<|endoftext|>"),
    ]


def test_the_record_says_where_the_weights_came_from(folder: Path) -> None:
    record = json.loads((folder / RECORD_FILE).read_text())
    assert record["digest"] == file_digest(folder / "model.safetensors")
    assert record["source"]["digest"] == file_digest(weights.shipped_gguf())
    assert record["license"] == "apache-2.0"
    assert record["quantization"] == "dequantized from Q4_1, token embeddings Q8_0"
    assert record["numParameters"] == 134_515_008


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model" * 100)
    with pytest.raises(ModelError, match=r"model\.gguf cannot be read as GGUF"):
        convert_gguf(file, tmp_path)


@pytest.mark.slow
@PATIENT
def test_two_processes_that_ask_at_once_convert_once(data_dir: Path) -> None:
    """Each says whether it converted: exactly one does, and both find the whole folder."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from outcrop.models import weights\n"
        "from outcrop.settings import Settings\n"
        "inner = weights._convert\n"
        "def convert(source, folder):\n"
        "    print('converts', flush=True)\n"
        "    inner(source, folder)\n"
        "weights._convert = convert\n"
        "folder = weights.ensure_weights(Settings(data_dir=Path(sys.argv[1])), sys.argv[2])\n"
        "print(weights.weights_record(folder)['digest'])\n"
    )
    command = [sys.executable, "-c", program, str(data_dir), SHIPPED_KEY]

    def run(_: int) -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
        return done.stdout.split()

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(run, range(2)))
    assert sorted(len(words) for words in said) == [1, 2]
    assert said[0][-1] == said[1][-1]
    assert [path.name for path in (data_dir / "models" / "base").iterdir() if path.is_dir()] == [
        SHIPPED_KEY
    ]


@pytest.mark.slow
@PATIENT
def test_a_conversion_that_was_killed_is_done_again(data_dir: Path) -> None:
    """A process is killed while it writes: what it left is neither used nor kept."""
    settings = Settings(data_dir=data_dir)
    base = data_dir / "models" / "base"
    left = base / f".{SHIPPED_KEY}.tmp-{os.getpid()}-killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    half = base / SHIPPED_KEY
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    folder = ensure_weights(settings, SHIPPED_KEY)
    assert (folder / "model.safetensors").stat().st_size > 200_000_000
    assert not left.exists()


def test_complete_weights_are_found_without_another_look(data_dir: Path) -> None:
    folder = data_dir / "models" / "base" / SHIPPED_KEY
    folder.mkdir(parents=True)
    (folder / RECORD_FILE).write_text("{}")
    assert ensure_weights(Settings(data_dir=data_dir), SHIPPED_KEY) == folder


def test_unknown_weights_are_refused_by_name(data_dir: Path) -> None:
    with pytest.raises(ModelError, match="weights nothing-like-it"):
        ensure_weights(Settings(data_dir=data_dir), "nothing-like-it")
