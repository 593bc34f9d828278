"""The whole stage, through `run_stage`, on a run folder of real files."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json
from stages.contract.records import Prediction, Sample
from stages.contract.run import Run
from stages.eval.stage import work
from stages.host.runner import run_stage
from tests.eval.conftest import answer, make_sample, make_samples

Predictions = dict[str, list[Prediction]]
Build = Callable[..., Run]


def scores_of(run: Run) -> dict[str, Any]:
    return dict(read_json(run.path("eval", "scores.json")))


def test_scores_have_the_promised_form(evaluated: Run, samples: list[Sample]) -> None:
    scores = scores_of(evaluated)
    assert list(scores) == ["base", "tuned"]
    chinese = ("cmrc_exact_match", "cmrc_f1")  # of two of the six documents
    for figures in scores.values():
        own = ["character_exact_match", "character_f1"]
        assert list(figures) == ["exact_match", "f1", *chinese, *own, "retrieval_recall"]
        for metric, figure in figures.items():
            assert list(figure) == ["value", "low", "high", "groups", "n", "failed", "empty"]
            if metric in chinese:
                assert (figure["groups"], figure["low"], figure["high"], figure["n"]) == (2, None, None, 8)
                continue
            assert figure["groups"] == 6
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 100
            assert figure["n"] == len(samples)
    assert scores["base"]["exact_match"]["value"] == round(100 * 4 / 24, 4)
    assert scores["tuned"]["exact_match"]["value"] == round(100 * 17 / 24, 4)
    assert scores["tuned"]["exact_match"]["failed"] == 1
    assert scores["base"]["retrieval_recall"] == scores["tuned"]["retrieval_recall"]
    manifest = evaluated.manifest("eval")
    assert manifest is not None
    assert set(manifest["outputs"]) == {
        "scores.json",
        "differences.json",
        "by_group.json",
        "scored.jsonl",
        "report.html",
    }
    assert manifest["counts"] == {"samples": 24, "scored": 24, "without references": 0, "failed": 1, "empty": 0}


def test_same_inputs_give_the_same_bytes(build: Build, samples: list[Sample], predictions: Predictions) -> None:
    run = build(samples, predictions)
    names = ("scores.json", "by_group.json", "differences.json", "scored.jsonl", "report.html")
    found = []
    for _ in range(2):
        assert run_stage(run, "eval", work, force=True) == Exit.DONE
        found.append([run.path("eval", name).read_bytes() for name in names])
    assert found[0] == found[1]


def test_order_of_predictions_does_not_matter(
    evaluated: Run, build: Build, samples: list[Sample], predictions: Predictions
) -> None:
    run = build(samples, {name: records[::-1] for name, records in predictions.items()})
    run_stage(run, "eval", work)
    assert scores_of(run) == scores_of(evaluated)


def test_a_missing_prediction_is_a_failure(build: Build, samples: list[Sample], predictions: Predictions) -> None:
    run = build(samples, {**predictions, "tuned": predictions["tuned"][:-2]})
    assert run_stage(run, "eval", work) == Exit.DONE
    figure = scores_of(run)["tuned"]["exact_match"]
    assert (figure["n"], figure["failed"]) == (24, 3)
    assert figure["value"] == round(100 * 15 / 24, 4)


def test_by_group_adds_up(evaluated: Run, samples: list[Sample]) -> None:
    parts = read_json(evaluated.path("eval", "by_group.json"))["tuned"]
    assert set(parts["group"]) == {sample["meta"]["group"] for sample in samples}
    assert set(parts["kind"]) == {"name", "number", "position", "function"}
    whole = scores_of(evaluated)["tuned"]["f1"]
    for part in parts.values():
        figures = [value["f1"] for value in part.values()]
        assert sum(figure["n"] for figure in figures) == whole["n"]
        assert sum(figure["failed"] for figure in figures) == whole["failed"]
        total = sum(figure["value"] * figure["n"] for figure in figures)
        assert total / whole["n"] == pytest.approx(whole["value"], abs=1e-3)


def test_samples_without_references_are_counted_and_shown(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    samples = [make_sample(0), make_sample(1, references=[])]
    run = build(samples, {"base": [answer(sample, "lever") for sample in samples]})
    assert run_stage(run, "eval", work) == Exit.DONE
    assert scores_of(run)["base"]["exact_match"]["n"] == 1
    assert run.manifest("eval")["counts"]["without references"] == 1  # type: ignore[index]
    assert "1 of 2 test samples have no reference and are not scored" in capfd.readouterr().err
    assert "1 of 2 test samples have no reference" in run.path("eval", "report.html").read_text(encoding="utf-8")


def test_no_reference_at_all_is_an_error(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    samples = [make_sample(0, references=[])]
    assert run_stage(build(samples, {"base": [answer(samples[0], "x")]}), "eval", work) == Exit.DATA
    assert (
        "test.jsonl: none of 1 test samples has a reference; add answers to the test questions"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: {**p, "tuned": [*p["tuned"], {**p["tuned"][0], "id": "stranger"}]},
            "'stranger' is not a test sample; run infer again",
        ),
        (
            lambda p: {**p, "tuned": [*p["tuned"], p["tuned"][0]]},
            "tuned.jsonl: two predictions of 'US0000001A-q0'; run infer again",
        ),
        (lambda p: {"tuned": p["tuned"]}, "no base.jsonl"),
    ],
)
def test_predictions_that_do_not_fit_are_named(
    build: Build,
    predictions: Predictions,
    change: Callable[[Predictions], Predictions],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_stage(build(make_samples(), change(predictions)), "eval", work) == Exit.DATA
    assert message in capfd.readouterr().err


def test_the_console_shows_base_against_each_adapter(
    build: Build, samples: list[Sample], predictions: Predictions, capfd: pytest.CaptureFixture[str]
) -> None:
    run = build(samples, {**predictions, "a-second-adapter-with-a-very-long-name-of-its-own": predictions["base"]})
    run_stage(run, "eval", work)
    shown = capfd.readouterr().out
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 100
    place = [line.strip() for line in lines].index("exact_match")
    base, tuned, *long_name = (" ".join(line.split()) for line in lines[place + 1 : place + 5])
    assert base.startswith("base 16.7 [") and base.endswith("] 24 0 0")
    assert tuned.startswith("tuned 70.8 [") and " +54.2 [" in tuned and tuned.endswith(" 24 1 0")
    assert long_name[0].startswith("a-second-adapter-with-") and " 16.7 [" in " ".join(long_name)
    assert "*: the 95% interval excludes 0, also after Holm's correction for 2 models" in lines
    few = "2 documents: too few for an interval, at least 5 are needed"  # those in Chinese, of CMRC's scores
    assert f"{few}; 6 documents: intervals are rough" in lines


@pytest.mark.parametrize(("mean", "alike"), [(0.5, 0.25), (0.9, 0.25)])
def test_intervals_of_six_documents_cover_the_true_score(
    build: Build, samples: list[Sample], mean: float, alike: float
) -> None:
    # 120 adapters that all answer with the same true score; their scores within a document correlate by `alike`
    generator = np.random.default_rng(4)
    predictions = {"base": [answer(sample, "lever") for sample in samples]}
    spread = 1 / alike - 1
    for number in range(120):
        chances = np.repeat(generator.beta(mean * spread, (1 - mean) * spread, 6), 4)
        right = generator.random(24) < chances
        predictions[f"a{number}"] = [
            answer(sample, sample["references"][0] if is_right else "lever")
            for sample, is_right in zip(samples, right, strict=True)
        ]
    run = build(samples, predictions, pictures=False)
    assert run_stage(run, "eval", work) == Exit.DONE
    figures = [figures["exact_match"] for name, figures in scores_of(run).items() if name != "base"]
    # a percentile bootstrap of documents covers 88% and 79% of them
    assert sum(figure["low"] <= 100 * mean <= figure["high"] for figure in figures) >= 0.93 * len(figures)


def test_three_documents_are_too_few_for_an_interval_and_a_star(
    build: Build, samples: list[Sample], capfd: pytest.CaptureFixture[str]
) -> None:
    tested = samples[:12]
    wrong = [answer(sample, "a lever") for sample in tested]
    run = build(tested, {"base": wrong, "tuned": [answer(sample, sample["references"][0]) for sample in tested]})
    assert run_stage(run, "eval", work) == Exit.DONE
    figure = scores_of(run)["tuned"]["exact_match"]
    assert figure == {"value": 100, "low": None, "high": None, "groups": 3, "n": 12, "failed": 0, "empty": 0}
    difference = read_json(run.path("eval", "differences.json"))["tuned"]["exact_match"]
    beside = {"value": 0, "low": None, "high": None, "groups": 3, "n": 12, "failed": 0, "empty": 0}
    assert difference == {"value": 100, "low": None, "high": None, "groups": 3, "n": 12, "p": None, "beside": beside}
    shown = capfd.readouterr().out
    assert "+100.0 [too few]" in shown and "[too few]*" not in shown
    note = "1 to 3 documents: too few for an interval, at least 5 are needed"  # one of them is in Chinese
    assert note in shown.splitlines()
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    assert f"<b>{note}.</b>" in report and "+100.0 [too few]" in report
    assert 'class="range"' not in report and '"number over muted"' in report


SAME = "patent-qa/base and patent-qa/tuned: all 24 answers are identical, wrong ones included; check that they are two"
FEW = "patent-qa/tuned: only 1 distinct answer among 24, and 24 distinct references; check its prompts"


@pytest.mark.parametrize("found", ["answers of base", "one answer", "nothing"])
def test_suspicious_answers_are_reported_at_the_end_of_a_run(
    build: Build, found: str, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = [make_sample(number, references=[f"gear {number}"]) for number in range(24)]
    base = [answer(sample, f"lever {number}") for number, sample in enumerate(samples)]
    right = [answer(sample, sample["references"][0]) for sample in samples]
    tuned = {"answers of base": base, "one answer": [answer(s, "lever") for s in samples], "nothing": right}[found]
    run = build(samples, {"base": base, "tuned": tuned})
    assert run_stage(run, "eval", work) == Exit.DONE
    line = {"answers of base": SAME, "one answer": FEW, "nothing": ""}[found]
    shown = " ".join(capfd.readouterr().out.split())
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    lines = read_json(run.path("eval", "summary.json")).get("suspicious")
    if found == "nothing":
        assert lines == [] and "suspicious:" not in shown and "Suspicious" not in report
        return
    assert f"suspicious: {line}" in shown
    assert f"Suspicious: {line}" in report
    assert len(lines) == 1 and lines[0].startswith(line)


def test_console_and_report_say_whose_the_scores_are(
    build: Build, samples: list[Sample], predictions: Predictions, capfd: pytest.CaptureFixture[str]
) -> None:
    run = build(samples, predictions)
    assert run_stage(run, "eval", work) == Exit.DONE
    note = (
        "SQuAD's: exact_match, f1; CMRC 2018's: cmrc_exact_match, cmrc_f1 (8 of 24 samples, in Chinese); Lorry's own:"
        " character_exact_match, character_f1"
    )
    assert note in " ".join(capfd.readouterr().out.split())
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    assert note.replace("'", "&#39;") in report
    assert "CMRC exact match" in report and "CMRC F1" in report


def test_nothing_is_done_twice(evaluated: Run) -> None:
    written = evaluated.path("eval", "report.html").stat().st_mtime_ns
    assert run_stage(evaluated, "eval", work) == Exit.DONE
    assert evaluated.path("eval", "report.html").stat().st_mtime_ns == written
