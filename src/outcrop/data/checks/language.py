"""A rule about the languages of a set, from a sample of its texts.

Short texts are not asked about: of those, a language is often guessed wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from outcrop.data.defects import Finding, Severity

MIN_LETTERS = 40
MIN_PROBABILITY = 0.99
MIN_SAMPLE = 50
MAX_SAMPLE = 400
MIN_SHARE = 0.01
"""Of the sample that another language must have to be named."""
MIN_MAIN_SHARE = 0.5


def languages(samples: Sequence[tuple[str, str]]) -> tuple[Counter[str], dict[str, str]]:
    """Guess the languages of texts.

    Args:
        samples: (what names the record, text).
    Returns:
        (language -> texts in it, language -> name of the first record in it).
    """
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    some = samples[:: max(1, len(samples) // MAX_SAMPLE)]
    long = [(name, text) for name, text in some if _num_letters(text) >= MIN_LETTERS]
    if len(long) < MIN_SAMPLE:
        return found, first
    for name, text in long:
        language, probability = _identifier().classify(text)
        if probability >= MIN_PROBABILITY:
            found[language] += 1
            first.setdefault(language, name)
    return found, first


def language_mix(counts: Counter[str]) -> list[tuple[str, Finding]]:
    """Return (language, finding) for each language that is not the one of most texts."""
    total = sum(counts.values())
    if not total:
        return []
    (main, most), *others = counts.most_common()
    if most < MIN_MAIN_SHARE * total:
        others = []  # many languages on purpose
    return [
        (
            language,
            Finding(
                "language_mix",
                Severity.REVIEW,
                f"{count} of {total} texts that were looked at seem to be in the language "
                f"{language}; most are in {main}.",
                language,
            ),
        )
        for language, count in others
        if count >= max(2, MIN_SHARE * total)
    ]


def _num_letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


@cache
def _identifier() -> Any:
    # Imported here: the model takes half a second to load, and a file that is refused needs none.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
