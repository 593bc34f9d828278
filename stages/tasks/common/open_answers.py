"""Scores of open answers, such as a chat's: chrF and ROUGE-L, and exact match and F1 where answers are short.

They compare texts, and say little about whether another wording is right. Where there is one, judge by the held-out
loss (`infer.losses`).
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from stages.tasks.common.metrics import bag_f1, best_score, character_exact_match

SHORT = 10
"""Most words of a short answer, where a character of a script without spaces counts as a word."""

_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # kana, Chinese characters
)
"""Characters of scripts without spaces between words, as ranges of a regular expression."""

_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+")

NOTE = (
    "chrF2 is sacrebleu's; ROUGE-L is the F measure over words, and over characters of scripts without spaces such as"
    f" Chinese; exact match and F1 are only of samples whose references all have at most {SHORT} words or characters"
)
"""How `open_scores` scores, for console and report."""


def open_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """The scores of one answer by name, each in 0..1 and the best over all references: chrf, rouge_l and, if the
    references are short, exact_match and f1. Raises ValueError if there are no references."""
    found = {
        "chrf": best_score(chrf, answer, references),
        "rouge_l": best_score(rouge_l, answer, references),
    }
    if all(map(is_short, references)):
        found["exact_match"] = best_score(character_exact_match, answer, references)
        found["f1"] = best_score(word_f1, answer, references)
    return found


def is_short(text: str) -> bool:
    """Whether a text is a short answer: one line of at most SHORT words."""
    return "\n" not in text.strip() and len(words(text)) <= SHORT


def words(text: str) -> list[str]:
    """The words of a text, without regard to case and width (NFKC), and without punctuation. Each character of a script
    without spaces is a word. If there are none, each character that is not white space is one."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(folded) or [character for character in folded if not character.isspace()]


def chrf(answer: str, reference: str) -> float:
    """chrF2 of one answer (Popović 2015, 'chrF: character n-gram F-score for automatic MT evaluation'), by sacrebleu:
    character n-grams up to 6, recall weighs twice as much as precision, white space does not count."""
    return float(_chrf().sentence_score(answer, [reference]).score) / 100


@cache
def _chrf() -> Any:
    """sacrebleu's chrF2."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L of one answer (Lin 2004, 'ROUGE: A Package for Automatic Evaluation of Summaries'): the F measure of the
    longest common subsequence of words. See `words`.

    rouge-score, whose words are ASCII by default, gives the same for English without its stemmer.
    """
    from rapidfuzz.distance import LCSseq

    own, wanted = words(answer), words(reference)
    total = len(own) + len(wanted)
    return 2 * float(LCSseq.similarity(own, wanted)) / total if total else 1.0


def word_f1(answer: str, reference: str) -> float:
    """F1 over bags of words. See `words`."""
    return bag_f1(words(answer), words(reference))
