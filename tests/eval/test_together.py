"""Samples that belong together: scored one by one, counted once, with the lowest of their scores."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages.contract.errors import Exit
from stages.contract.files import digest_of, read_json, read_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.contract.run import Run
from stages.eval.scores import Scores, breakdown, overall_figures, score_models, scores_by_question, worst_rows
from stages.eval.stage import work
from stages.host.runner import run_stage
from stages.results.intervals import mean_figures
from stages.tasks import patent_qa
from tests.conftest import REPOSITORY
from tests.eval.conftest import answer, make_sample

RECIPE = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny")

Build = Callable[..., Run]


def score(recipe: Any, given: str, sample: Sample) -> dict[str, float]:
    right = float(given in sample["references"])
    return {"letter": right} if sample["meta"]["kind"] == "turned" else {"read": right, "half": right / 2}


TASK = SimpleNamespace(score=score, facts=lambda sample: {}, together=lambda sample: sample["meta"]["question"])
"""Samples with the same question count once; half of its questions are scored by other metrics."""


def rotations(question: str, right: str, group: str = "one") -> list[Sample]:
    """A question asked once for each letter of `right`, which are the right answers."""
    return [
        {
            "id": f"{question}#{number}",
            "messages": [{"role": "user", "content": question}],
            "images": [],
            "references": [letter],
            "meta": {"group": group, "kind": "turned", "question": question, "source": "mmbench"},
        }
        for number, letter in enumerate(right)
    ]


def answers(samples: list[Sample], given: str) -> list[Prediction]:
    """Predictions with these letters as answers; `-` is a failure."""
    return [
        failed_prediction(sample["id"], "no answer") if letter == "-" else answer(sample, letter)
        for sample, letter in zip(samples, given, strict=True)
    ]


SAMPLES = [*rotations("q1", "ADCB"), *rotations("q2", "BA"), *rotations("q3", "CBA", "two")]


def scored(**given: str) -> Scores:
    return score_models(TASK, RECIPE, SAMPLES, {name: answers(SAMPLES, text) for name, text in given.items()})


def test_one_wrong_rotation_loses_the_question() -> None:
    scores = scores_by_question(scored(base="ADCBBACBA", tuned="ADCBBBCBA", luck="AAAAAAAAA"))
    assert [sample["id"] for sample in scores.samples] == ["q1#0", "q2#0", "q3#0"]
    assert {name: model.values[:, 0].tolist() for name, model in scores.models.items()} == {
        "base": [1, 1, 1],
        "tuned": [1, 0, 1],
        "luck": [0, 0, 0],  # a model that always says A is right in 3 of 9 rotations, and in no question
    }


def test_n_and_failures_are_of_questions() -> None:
    figures, differences = overall_figures(scored(base="ADCBBACBA", tuned="AD--BACB-"))
    assert {name: figure["letter"]["n"] for name, figure in figures.items()} == {"base": 3, "tuned": 3}
    assert figures["base"]["letter"]["value"] == 100
    assert figures["tuned"]["letter"]["failed"] == 2  # q1 twice, q3 once
    assert figures["tuned"]["letter"]["value"] == pytest.approx(33.3333)
    assert differences["tuned"]["letter"]["value"] == pytest.approx(-66.6667)


def test_the_interval_is_that_of_the_questions() -> None:
    samples = [sample for number in range(40) for sample in rotations(f"q{number}", "ABCD", f"g{number}")]
    given = {"base": answers(samples, "ABCD" * 20 + "ABCC" * 20)}
    scores = score_models(TASK, RECIPE, samples, given)
    figure = overall_figures(scores)[0]["base"]["letter"]
    coins = np.array([[1.0]] * 20 + [[0.0]] * 20)
    (expected,) = mean_figures(coins, [f"g{number}" for number in range(40)])
    assert figure == {**expected, "n": 40, "failed": 0, "empty": 0}
    assert (figure["value"], figure["groups"]) == (50, 40)


def test_groups_are_counted_by_questions() -> None:
    parts = breakdown(scored(base="ADCBBACBB"), "group")["base"]
    assert {name: (figures["letter"]["n"], figures["letter"]["value"]) for name, figures in parts.items()} == {
        "one": (2, 100),
        "two": (1, 0),
    }


def test_the_worst_answers_are_still_rotations() -> None:
    scores = scored(base="ADCBBACBB")
    assert [scores.samples[row]["id"] for row in worst_rows(scores, "base", 5)] == ["q3#2"]


def test_metrics_of_other_samples_stay_apart() -> None:
    reading = {**rotations("r", "Z")[0], "id": "r", "meta": {"kind": "read", "question": "r", "group": "one"}}
    samples: list[Sample] = [*SAMPLES, reading]  # type: ignore[list-item]
    scores = score_models(TASK, RECIPE, samples, {"base": answers(samples, "ADCBBACBAZ")})
    once = scores_by_question(scores)
    assert once.metrics == ["letter", "read", "half"]
    table = once.models["base"].values
    assert table[3].tolist()[1:] == [1, 0.5]
    assert math.isnan(table[3, 0])
    assert np.isnan(table[:3, 1:]).all()


def test_samples_that_were_not_asked_do_not_count() -> None:
    scores = score_models(
        TASK,
        RECIPE,
        SAMPLES,
        {"base": answers(SAMPLES, "ADCBBACBA"), "tuned": answers(SAMPLES[:4], "ADCB")},
        lambda name, sample: name == "base" or sample["meta"]["question"] == "q1",
    )
    figures, _ = overall_figures(scores)
    assert figures["tuned"]["letter"]["n"] == 1


def test_if_every_sample_counts_alone_the_scores_stay_the_same() -> None:
    sample = make_sample(0)
    scores = score_models(patent_qa, RECIPE, [sample], {"base": [answer(sample, "x")]})
    assert scores.together == [sample["id"]]
    assert scores_by_question(scores) is scores


# -- the stage -----------------------------------------------------------------------------------------------------


def test_the_stage_counts_together_and_writes_each_sample(
    build: Build, samples: list[Sample], predictions: dict[str, list[Prediction]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patent_qa, "together", lambda sample: sample["meta"]["group"])
    run = build(samples, predictions)
    assert run_stage(run, "eval", work) == Exit.DONE
    manifest = run.manifest("eval")
    assert manifest is not None
    assert manifest["counts"]["scored"] == 24
    assert manifest["counts"]["counted together"] == 6
    assert read_json(run.path("eval", "scores.json"))["tuned"]["exact_match"]["n"] == 6
    lines = read_jsonl(run.path("eval", "scored.jsonl"))
    assert [line["id"] for line in lines] == [sample["id"] for sample in samples]
    assert lines[7]["references"] == digest_of(samples[7]["references"])
    assert lines[7]["together"] == lines[7]["group"] == samples[7]["meta"]["group"]
    failed = lines[7]["models"]["tuned"]
    assert (failed["answer"], failed["error"]) == (None, "prompt of 1203 tokens does not fit in 1024")
    assert set(failed["scores"].values()) == {0}
    assert lines[0]["models"]["base"]["scores"]["exact_match"] == 1
    assert manifest["outputs"]["scored.jsonl"]["records"] == 24
    assert "24, counted as 6 of 6 documents" in run.path("eval", "report.html").read_text(encoding="utf-8")


def test_uploads_are_outputs_of_every_model(
    build: Build, samples: list[Sample], predictions: dict[str, list[Prediction]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def uploads(folder: Path, samples: list[Sample], predictions: dict[str, Prediction]) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "all.txt").write_text(f"{len(samples)} {len(predictions)}", encoding="utf-8")
        return ["all.txt"]

    monkeypatch.setattr(patent_qa, "uploads", uploads)
    samples[0]["references"] = []  # asked only: a server knows the answer
    run = build(samples, predictions)
    assert run_stage(run, "eval", work) == Exit.DONE
    manifest = run.manifest("eval")
    assert manifest is not None
    assert {"uploads/base/all.txt", "uploads/tuned/all.txt"} <= set(manifest["outputs"])
    assert run.path("eval", "uploads", "tuned", "all.txt").read_text(encoding="utf-8") == "24 24"


def test_without_references_there_are_still_uploads(
    build: Build,
    samples: list[Sample],
    predictions: dict[str, list[Prediction]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    def uploads(folder: Path, samples: list[Sample], predictions: dict[str, Prediction]) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "all.txt").write_text("", encoding="utf-8")
        return ["all.txt"]

    monkeypatch.setattr(patent_qa, "uploads", uploads)
    run = build([{**sample, "references": []} for sample in samples], predictions)
    assert run_stage(run, "eval", work) == Exit.DATA
    assert f"files to upload are in {run.path('eval', 'uploads')}" in capfd.readouterr().err
    assert run.path("eval", "uploads", "base", "all.txt").is_file()
    assert run.manifest("eval") is None
