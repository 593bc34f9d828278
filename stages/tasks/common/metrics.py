"""Metrics that more than one task uses. Each scores one answer in 0..1."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def _current_name(value: Any) -> Any:
    """The name of a normalisation. `seed_001`, used in older recipes, becomes `original`."""
    return "original" if value == "seed_001" else value


Normalization = Annotated[Literal["squad", "original"], BeforeValidator(_current_name)]
"""How answer and reference are normalised before they are compared: by SQuAD's rules, or by `normalize_original` and
then SQuAD's rules."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def normalize(text: str) -> str:
    """The text normalised by SQuAD's steps: lower case, then no ASCII punctuation, no articles, single spaces.

    Source: the official SQuAD v1.1 evaluation script (Rajpurkar et al. 2016).
    """
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def normalize_original(text: str) -> str:
    """The text normalised by the steps of extractive_qa's original: lower case, then one space for each run of
    characters that are neither letters nor digits, no articles, single spaces.

    More texts become equal than by SQuAD's rules, such as 3.5% and "3 5", and words are lost: "N/A" becomes "n".
    """
    text = re.sub(r"[\W_]+", " ", text.lower())
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if both are equal after normalisation, else 0 (SQuAD v1.1)."""
    return float(normalize(answer) == normalize(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 over bags of white-space tokens after normalisation (SQuAD). 0 if they share no token, but 1 if neither has
    one.

    In the second case SQuAD's script of version 2.0 also gives 1, and that of version 1.1 gives 0. Chinese text has no
    spaces: a phrase is one token, which makes this an exact match. See `character_f1`.
    """
    return bag_f1(normalize(answer).split(), normalize(reference).split())


def character_exact_match(answer: str, reference: str) -> float:
    """1 if the characters that count are the same in both, in order, else 0. See `characters`."""
    return float(characters(answer) == characters(reference))


def character_f1(answer: str, reference: str) -> float:
    """F1 over bags of the characters that count. See `characters`."""
    return bag_f1(characters(answer), characters(reference))


def best_score(metric: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The best score over all references. Raises ValueError if there are none."""
    if not references:
        raise ValueError("references: empty, so the answer cannot be scored; pass at least one")
    return max(metric(answer, reference) for reference in references)


_THOUSANDS = re.compile(r"(?<![\d.,，])(?:[0-9]{1,3}(?:,[0-9]{3})+|[０-９]{1,3}(?:，[０-９]{3})+)(?![,，]?\d)")
_SAME_SIGNS = str.maketrans("‐‑‒–—−、;", "------,,")
_IN_NUMERALS = re.compile(
    r"(?<=\d)[^\w\s](?=\d)|(?<=\d)\s*,\s*(?=\d)"  # 3.5, 1/2, 10:30, 14, 16
    r"|(?<![a-z\d-])-(?=\.?\d)|(?<![a-z\d])\.(?=\d)"  # -5, .5, but not A-5 and No.5
    r"|(?<=\d)\s*[%‰′″]"
)
"""Punctuation that changes a numeral."""


def characters(text: str) -> list[str]:
    """The characters of a text that count in Lorry's own scores: all but white space and punctuation. Case and width do
    not matter (NFKC and case folding).

    Punctuation that changes a numeral counts: 3.5 is not 35, and -5 is not 5. Commas between groups of three digits do
    not: 1,000 is 1000. If nothing is left, all that is not white space counts.
    """
    text = _THOUSANDS.sub(lambda match: re.sub("[,，]", "", match.group()), text)
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_SAME_SIGNS)
    kept = {place for match in _IN_NUMERALS.finditer(folded) for place in range(*match.span())}
    visible = [place for place, character in enumerate(folded) if not character.isspace()]
    counted = [place for place in visible if place in kept or not unicodedata.category(folded[place]).startswith("P")]
    return [folded[place] for place in counted or visible]


def bag_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens; 0 if they share none, but 1 if both are empty."""
    shared = sum((Counter(answer) & Counter(reference)).values())
    if shared == 0:
        return float(not answer and not reference)
    precision, recall = shared / len(answer), shared / len(reference)
    return 2 * precision * recall / (precision + recall)
