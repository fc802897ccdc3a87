"""Numbers about generated answers: how far they agree with the answers that were wanted.

Knows nothing of models: it compares texts. Words are runs of letters and digits in lower case; a
character of a script that is written without spaces (Chinese, Japanese, Thai, ...) is a word of
its own.

Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries (2004), section 3, with beta 1
(the F1 form that `rouge-score` prints), without stemming.
"""

from __future__ import annotations

import re

_WORD = re.compile(
    # scripts without spaces: Thai to Myanmar, kana, Han, compatibility forms
    "[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    "|"
    "[^\\W_\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]+"
)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether two answers are equal but for white space around them."""
    return prediction.strip() == reference.strip()


def rouge_l(prediction: str, reference: str) -> float:
    """Return ROUGE-L F1, from 0 to 1: the longest common subsequence of words against both lengths.

    Two texts without words agree fully; one without words and one with do not agree at all.
    """
    predicted, wanted = words(prediction), words(reference)
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = _longest_common_subsequence(predicted, wanted)
    return 2.0 * common / (len(predicted) + len(wanted))


def _longest_common_subsequence(left: list[str], right: list[str]) -> int:
    lengths = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
