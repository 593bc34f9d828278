"""Failures, figures with their intervals, and the order of the worst answers."""

import pytest

from stages.contract.errors import DataError
from stages.contract.recipe import load_recipe
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.eval.scores import breakdown, failure_reason, overall_figures, score_models, worst_rows
from stages.results.uncertainty import is_clear
from stages.tasks import patent_qa
from tests.conftest import REPOSITORY
from tests.eval.conftest import answer, make_sample

RECIPE = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny")


def test_a_failed_answer_scores_0_even_if_an_empty_one_would_score() -> None:
    # SQuAD's exact match calls '' and 'the' equal: a failure taken as an empty answer would score
    sample = make_sample(0, references=["the"])
    failed: Prediction = failed_prediction(sample["id"], "out of memory")
    empty = answer(sample, "")
    scores = score_models(patent_qa, RECIPE, [sample], {"base": [empty], "tuned": [failed], "lost": []})
    assert scores.models["base"].values[0, 0] == 1
    assert scores.models["tuned"].values[0, :3].tolist() == [0, 0, 0]
    assert scores.models["lost"].values[0, :3].tolist() == [0, 0, 0]
    assert scores.models["tuned"].errors == ["out of memory"]
    assert scores.models["lost"].errors == ["no prediction"]
    figures, _ = overall_figures(scores)
    assert [figures[name]["f1"]["failed"] for name in figures] == [0, 1, 1]
    assert all(figures[name]["retrieval_recall"]["failed"] == 0 for name in figures)


def test_a_record_with_neither_answer_nor_error_has_failed() -> None:
    sample = make_sample(0)
    assert failure_reason({**answer(sample, ""), "answer": None}) == "neither answer nor error"
    assert failure_reason(answer(sample, "")) is None


def test_two_predictions_of_one_sample_are_refused() -> None:
    sample = make_sample(0)
    with pytest.raises(
        DataError, match=r"infer/predictions/base.jsonl: two predictions of 'US0000001A-q0'; run infer again"
    ):
        score_models(patent_qa, RECIPE, [sample], {"base": [answer(sample, "a"), answer(sample, "b")]})


def test_facts_count_only_the_samples_that_have_them() -> None:
    samples = [make_sample(1), make_sample(2, evidence=[])]
    scores = score_models(patent_qa, RECIPE, samples, {"base": [answer(sample, "x") for sample in samples]})
    figures, _ = overall_figures(scores)
    recall = {
        "value": 100.0,
        "low": None,
        "high": None,
        "groups": 1,
        "n": 1,
        "failed": 0,
        "empty": 0,
    }  # too few documents
    assert figures["base"]["retrieval_recall"] == recall
    assert figures["base"]["f1"]["n"] == 2
    assert "retrieval_recall" not in breakdown(scores, "kind")["base"]["position"]


def test_no_facts_at_all() -> None:
    samples = [make_sample(1, evidence=[])]
    scores = score_models(patent_qa, RECIPE, samples, {"base": [answer(samples[0], "x")]})
    assert scores.facts == []
    own = ["character_exact_match", "character_f1"]
    assert list(overall_figures(scores)[0]["base"]) == ["exact_match", "f1", *own]


# -- intervals ---------------------------------------------------------------------------------------------------


def test_differences_are_paired() -> None:
    # both models swing with the document, together: each interval is wide, that of the difference is not
    samples = [make_sample(number, references=["x y"]) for number in range(40)]
    base = [answer(s, "x" if i // 4 % 2 else "q") for i, s in enumerate(samples)]
    scores = score_models(patent_qa, RECIPE, samples, {"base": base, "tuned": base})
    figures, differences = overall_figures(scores)
    assert figures["base"]["f1"]["high"] - figures["base"]["f1"]["low"] > 40
    own = ["character_exact_match", "character_f1"]
    cmrc = ["cmrc_exact_match", "cmrc_f1"]  # every third document is Chinese
    assert list(differences["tuned"]) == ["exact_match", "f1", *cmrc, *own]
    figure = differences["tuned"]["f1"]
    assert (figure["value"], figure["groups"], figure["p"]) == (0, 10, 1)
    assert -20 < figure["low"] == -figure["high"] < 0


def test_adapters_are_corrected_for_each_other_by_metric() -> None:
    samples = [make_sample(number, references=["x y"]) for number in range(48)]
    base = [answer(s, "q") for s in samples]
    some = [answer(s, "x y" if i % 8 < 3 else "q") for i, s in enumerate(samples)]
    given = {"base": base, **{f"tuned-{number}": some for number in range(4)}}
    alone = overall_figures(score_models(patent_qa, RECIPE, samples, {"base": base, "tuned-0": some}))[1]["tuned-0"][
        "f1"
    ]
    differences = overall_figures(score_models(patent_qa, RECIPE, samples, given))[1]
    assert {*differences} == {f"tuned-{number}" for number in range(4)}
    assert is_clear(alone)
    for each in differences.values():
        assert each["f1"] == {**alone, "p": pytest.approx(4 * alone["p"], abs=1e-5)}
        assert not is_clear(each["f1"])


# -- worst -------------------------------------------------------------------------------------------------------


def test_worst_first_failures_before_all_and_no_right_answer() -> None:
    samples: list[Sample] = [make_sample(number, references=["abcd"]) for number in range(6)]
    answers = ["abcd", "abc", "q", "z", "ab"]
    predictions = [answer(sample, text) for sample, text in zip(samples, answers, strict=False)]
    predictions.append(failed_prediction(samples[5]["id"], "lost"))
    scores = score_models(patent_qa, RECIPE, samples, {"base": predictions})
    assert worst_rows(scores, "base", 10) == [5, 2, 3, 4, 1]
    assert worst_rows(scores, "base", 2) == [5, 2]
    assert worst_rows(scores, "base", 0) == []


def test_the_worst_answers_are_those_of_all_samples_whatever_metrics_they_have() -> None:
    samples = [make_sample(number) for number in (0, 1, 8, 9)]  # two in English and two in Chinese
    given = ["q", "the locking", "踏板支", "架"]
    scores = score_models(patent_qa, RECIPE, samples, {"base": list(map(answer, samples, given))})
    assert worst_rows(scores, "base", 10) == [0, 3, 1, 2]
