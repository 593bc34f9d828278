"""The metrics against SQuAD's rules, and their properties for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.data.metrics import squad_metrics  # the official SQuAD 2.0 script, as Hugging Face carries it

from stages.tasks.common.cmrc import cmrc_exact_match, cmrc_f1
from stages.tasks.common.metrics import (
    best_score,
    character_exact_match,
    character_f1,
    exact_match,
    normalize,
    normalize_original,
    token_f1,
)

TEXT = st.text(max_size=30) | st.lists(
    st.sampled_from(
        ["a", "an", "the", "The", "cat", "Cat's", "cat-flap", "14", "(14)", "踏板", "。", "É", "\u3000", ","]
    ),
    max_size=8,
).map(" ".join)

SUPER_BOWL = [
    "Santa Clara, California",
    "Levi's Stadium",
    "Levi's Stadium in the San Francisco Bay Area at Santa Clara, California.",
]
"""References of 'Where did Super Bowl 50 take place?', 56be4db0acb8001400a502ee, of SQuAD v1.1's development set."""


# -- SQuAD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Denver Broncos", "denver broncos"),
        ("Levi's Stadium", "levis stadium"),
        ("  Santa   Clara,\tCalifornia. ", "santa clara california"),
        ("a lever, an arm and the housing", "lever arm and housing"),
        ("theatre", "theatre"),  # an article is a whole word
        ("the", ""),
        ("well-known", "wellknown"),  # punctuation is removed before words are split
        ("U.S.A.", "usa"),
        ("A.", ""),
        ("$1,234.50", "123450"),
        ("an  a\nthe", ""),
        ("“the” lever", "“ ” lever"),  # only ASCII punctuation goes
        ("踏板，支架", "踏板，支架"),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize(text) == normal
    assert squad_metrics.normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "match", "f1"),
    [
        ("Levi's Stadium", 1.0, 1.0),
        ("santa clara california", 1.0, 1.0),
        ("the Levis stadium!", 1.0, 1.0),
        ("Santa Clara", 0.0, 0.8),  # 2 of 2 and 2 of 3
        ("Levi's Stadium in Santa Clara", 0.0, 0.625),  # best is the longest: 5 of 5 and 5 of 11
        ("California", 0.0, 0.5),
        ("Denver", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_squad_question_with_several_references(answer: str, match: float, f1: float) -> None:
    assert best_score(exact_match, answer, SUPER_BOWL) == match
    assert best_score(token_f1, answer, SUPER_BOWL) == pytest.approx(f1, abs=1e-15)
    assert max(squad_metrics.compute_f1(reference, answer) for reference in SUPER_BOWL) == pytest.approx(f1, abs=1e-15)


def test_a_repeated_token_counts_as_often_as_both_have_it() -> None:
    assert token_f1("cat cat cat", "cat dog") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert token_f1("cat cat", "cat cat dog") == 0.8


def test_where_nothing_is_left_f1_is_the_exact_match() -> None:
    # as the script of v2.0, which has questions without an answer; that of v1.1 gives an F1 of 0
    assert exact_match("", "the") == token_f1("", "the") == squad_metrics.compute_f1("", "the") == 1
    assert exact_match("", "lever") == token_f1("", "lever") == squad_metrics.compute_f1("", "lever") == 0


@given(TEXT, TEXT)
def test_agrees_with_the_official_script(answer: str, reference: str) -> None:
    assert normalize(answer) == squad_metrics.normalize_answer(answer)
    assert exact_match(answer, reference) == squad_metrics.compute_exact(reference, answer)
    assert token_f1(answer, reference) == squad_metrics.compute_f1(reference, answer)


# -- the original ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  U.S.-based, firm", "u s based firm"),
        ("3.5%", "3 5"),
        ("N/A", "n"),  # "a" is an article
        ("a", ""),
        ("snake_case", "snake case"),
        ("《红楼梦》，曹雪芹", "红楼梦 曹雪芹"),  # Chinese characters are letters
        ("Électricité  de\u3000France", "électricité de france"),
        ("...", ""),
    ],
)
def test_normalisation_of_the_original(text: str, normal: str) -> None:
    assert normalize_original(text) == normal


@given(TEXT)
def test_squads_normalisation_changes_nothing_after_that_of_the_original(text: str) -> None:
    assert normalize(normalize_original(text)) == normalize_original(text)


# -- Chinese -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("在上方", "在上方", 1.0),
        ("部件3在上方。", "在上方", 2 * (3 / 6) * 1 / (3 / 6 + 1)),
        ("上方", "下方", 0.5),
        ("踏板", "踏板支架", 2 * 1 * 0.5 / 1.5),
        ("１４", "14", 1.0),  # full-width digits
        ("接 水 盘", "接水盘", 1.0),
        ("《接水盘》！", "接水盘", 1.0),
        ("ＬＥＤ灯", "led灯", 1.0),
        ("左左", "左", 2 * 0.5 * 1 / 1.5),
        ("。", "，", 0.0),
        ("", "", 1.0),
    ],
)
def test_character_f1(answer: str, reference: str, f1: float) -> None:
    assert character_f1(answer, reference) == pytest.approx(f1, abs=1e-15)


def test_token_f1_sees_a_chinese_phrase_as_one_token() -> None:
    assert token_f1("踏板", "踏板支架") == 0
    assert token_f1("踏板支架", "踏板支架") == 1


# -- any text ----------------------------------------------------------------------------------------------------

METRICS = pytest.mark.parametrize(
    "metric",
    [exact_match, token_f1, character_exact_match, character_f1, cmrc_exact_match, cmrc_f1],
    ids=lambda m: str(m.__name__),
)


@METRICS
@given(answer=TEXT, reference=TEXT)
def test_scores_are_symmetric_and_between_0_and_1(metric, answer: str, reference: str) -> None:  # type: ignore[no-untyped-def]
    score = metric(answer, reference)
    assert 0 <= score <= 1
    assert score == pytest.approx(metric(reference, answer), abs=1e-12)


@given(TEXT, TEXT)
def test_an_exact_match_has_an_f1_of_1(answer: str, reference: str) -> None:
    if exact_match(answer, reference):
        assert token_f1(answer, reference) == 1
    if character_exact_match(answer, reference):
        assert character_f1(answer, reference) == 1


@given(TEXT)
def test_normalising_again_changes_no_score(text: str) -> None:
    assert exact_match(text, text) == 1
    assert token_f1(normalize(text), text) == 1


@METRICS
@given(answer=TEXT, references=st.lists(TEXT, min_size=1, max_size=4), another=TEXT)
def test_another_reference_never_lowers_the_best(  # type: ignore[no-untyped-def]
    metric, answer: str, references: list[str], another: str
) -> None:
    assert best_score(metric, answer, [*references, another]) == max(
        best_score(metric, answer, references), metric(answer, another)
    )
    assert best_score(metric, answer, references) == best_score(metric, answer, references[::-1])


@METRICS
def test_nothing_is_scored_without_references(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="references: empty, so the answer cannot be scored"):
        best_score(metric, "x", [])
