"""Scores of open answers: by hand and by the metrics' definitions, in English and Chinese."""

import math
from collections import Counter

import pytest

from stages.tasks.common.open_answers import chrf, is_short, open_scores, rouge_l, word_f1, words

pytest.importorskip("sacrebleu")
pytest.importorskip("rapidfuzz")


def chrf_by_hand(answer: str, reference: str) -> float:
    """chrF2 by its definition: precision and recall of character n-grams, averaged over n from 1 to 6."""
    own, wanted = ("".join(text.split()) for text in (answer, reference))
    precisions, recalls = [], []
    for n in range(1, 7):
        grams = [Counter(text[at : at + n] for at in range(len(text) - n + 1)) for text in (own, wanted)]
        if all(grams):
            shared = (grams[0] & grams[1]).total()
            precisions.append(shared / grams[0].total())
            recalls.append(shared / grams[1].total())
    precision, recall = (math.fsum(each) / len(each) for each in (precisions, recalls))
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


TEXTS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("踏板支架位于第二页", "踏板的支架在第二页"),
    ("Die Häuser sind grün.", "Das Haus ist grün."),
    ("def f(x):\n    return x + 1", "def f(y):\n    return y + 1"),
]


@pytest.mark.parametrize(("answer", "reference"), TEXTS)
def test_chrf_is_that_of_its_definition(answer: str, reference: str) -> None:
    assert chrf(answer, reference) == pytest.approx(chrf_by_hand(answer, reference), abs=1e-4)
    assert chrf(reference, reference) == 1.0
    assert chrf("", reference) == 0.0


def test_rouge_l_by_hand() -> None:
    # "the cat on the mat": 5 of 6 words of each
    assert rouge_l(*TEXTS[0]) == pytest.approx(5 / 6)
    # 踏板支架第二页: 7 of 9 characters of each
    assert rouge_l(*TEXTS[1]) == pytest.approx(7 / 9)
    # order counts: "a b" of three and three words
    assert rouge_l("c a b", "a b c") == pytest.approx(2 / 3)
    assert rouge_l("A b, C!", "a B c") == 1.0
    assert rouge_l("", "a") == rouge_l("x", "a") == 0.0


def test_chinese_words_are_characters_and_others_are_words() -> None:
    assert words("部件3是 BYD-Auto的，踏板！") == ["部", "件", "3", "是", "byd", "auto", "的", "踏", "板"]
    assert words("ＡＢＣ１２") == ["abc12"]
    assert words("東京タワー") == ["東", "京", "タ", "ワ", "ー"]
    assert words("Größe naïve") == ["grösse", "naïve"]
    assert words("👍 👎") == ["👍", "👎"], "something is left of a text without words"


def test_only_short_references_are_scored_by_exact_match_and_f1() -> None:
    assert list(open_scores("Paris", ["paris."])) == ["chrf", "rouge_l", "exact_match", "f1"]
    assert open_scores("Paris", ["paris."])["exact_match"] == 1.0
    long = "A lever holds the spring of the valve in its place near the piston."
    assert list(open_scores(long, [long])) == ["chrf", "rouge_l"]
    assert list(open_scores("Paris", ["Paris", long])) == ["chrf", "rouge_l"], "all references have to be short"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("one two three four five six seven eight nine ten", True),
        ("one two three four five six seven eight nine ten eleven", False),
        ("踏板支架位于第二页上", True),
        ("踏板支架位于第二页左上", False),
        ("a\nb", False),
        ("a\n", True),
    ],
)
def test_what_is_short(text: str, short: bool) -> None:
    assert is_short(text) == short


def test_the_best_reference_counts() -> None:
    found = open_scores("北京", ["Beijing", "北京"])
    assert found == {"chrf": 1.0, "rouge_l": 1.0, "exact_match": 1.0, "f1": 1.0}
    assert word_f1("Beijing, China", "Beijing") == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="references: empty"):
        open_scores("x", [])
