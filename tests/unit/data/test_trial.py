"""A stranger's tokenizer and template are tried where they can do no harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.assets import tiny_tokenizer as tiny

from outcrop.data.trial import try_folder
from outcrop.errors import ModelError

WHERE = "s3://bucket/model/"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def with_template(folder: Path, template: str | None) -> Path:
    return tiny.write_tokenizer(folder, template, tiny.CHATML_TOKENS, eos="<|im_end|>")


def test_what_can_be_used_is_described(tmp_path: Path) -> None:
    found = try_folder(with_template(tmp_path, tiny.CHATML_TEMPLATE), WHERE)
    assert found.has_template
    assert found.vocabulary > 256


def test_a_folder_without_a_template_says_so(tmp_path: Path) -> None:
    assert not try_folder(with_template(tmp_path, None), WHERE).has_template


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LOOPS, "The chat template of s3://bucket/model/ runs away: it did not come to an end"),
        ("{{ 'a' * 100000000000 }}", "takes too much memory"),
        (
            "{% for m in messages %}{{ m.content }}{{ 'a' * 110000 }}{{ eos_token }}{% endfor %}",
            "tokens of a greeting; 100,000 are allowed",
        ),
        ("{% if %}", "cannot be read"),
    ],
)
def test_a_template_that_does_harm_is_refused_by_name(
    template: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as refused:
        try_folder(with_template(tmp_path, template), WHERE, cpu_seconds=2, memory_bytes=2 << 30)
    assert says in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = with_template(tmp_path, tiny.CHATML_TEMPLATE)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(ModelError, match="okenizer"):
        try_folder(folder, WHERE)
