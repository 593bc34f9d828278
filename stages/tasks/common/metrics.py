"""Metrics that more than one task uses. Each scores one answer in 0..1."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def _current_name(value: Any) -> Any:
    """The value; `original` for `seed_001`, which is its name in older recipes."""
    return "original" if value == "seed_001" else value


Normalization = Annotated[Literal["squad", "original"], BeforeValidator(_current_name)]
"""How answer and reference are normalised before they are compared: by SQuAD's rules, or by `normalize_original` and
then SQuAD's rules."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def normalize(text: str) -> str:
    """The text normalised as SQuAD does, in its order: lower case, no ASCII punctuation, no articles, single spaces.

    Source: the official SQuAD v1.1 evaluation script (Rajpurkar et al. 2016).
    """
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def normalize_original(text: str) -> str:
    """The text normalised as the original of extractive_qa does, in its order: lower case, one space for each sequence
    of characters that are neither letters nor digits, no articles, single spaces.

    More texts become equal than by SQuAD's rules, such as 3.5% and "3 5", and words get lost: "N/A" becomes "n".
    """
    text = re.sub(r"[\W_]+", " ", text.lower())
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if both are equal after normalisation, else 0 (SQuAD v1.1)."""
    return float(normalize(answer) == normalize(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 over bags of white-space tokens after normalisation (SQuAD v1.1). 0 if they share no token, or are empty.

    Chinese text has no spaces: a phrase is one token, which makes this an exact match. See `character_f1`.
    """
    return _bag_f1(normalize(answer).split(), normalize(reference).split())


def character_f1(answer: str, reference: str) -> float:
    """F1 over bags of characters, after NFKC and case folding, without white space and punctuation."""
    return _bag_f1(_characters(answer), _characters(reference))


def best_score(metric: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The best score over all references. Raises ValueError if there are none."""
    if not references:
        raise ValueError("a sample without references cannot be scored")
    return max(metric(answer, reference) for reference in references)


def _characters(text: str) -> list[str]:
    """The characters that `character_f1` compares."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return [c for c in folded if not c.isspace() and not unicodedata.category(c).startswith("P")]


def _bag_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens; 0 if they share none."""
    shared = sum((Counter(answer) & Counter(reference)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(answer), shared / len(reference)
    return 2 * precision * recall / (precision + recall)
