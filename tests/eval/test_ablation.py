"""What each component is worth: paired with everything, and told where nothing changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, write_json, write_jsonl
from stages.contract.records import Prediction, Sample
from stages.contract.run import Run
from stages.contract.stage import run_stage
from stages.eval import stage as evaluation
from tests.eval.conftest import answer


def with_ablations(run: Run, ablations: dict[str, list[Prediction]], answering: dict[str, Any]) -> Run:
    """The run, as if infer had been told to ablate these components, too."""
    infer = run.recipe.infer.model_copy(update={"ablate": [*ablations, "adapter"]})
    told = replace(run, recipe=run.recipe.model_copy(update={"infer": infer}))
    for name, records in ablations.items():
        write_jsonl(run.path("infer", "ablations", f"{name}.jsonl"), records)  # type: ignore[arg-type]
    manifest = read_json(run.path("infer", "manifest.json"))
    write_json(run.path("infer", "manifest.json"), manifest | {"answering": answering, "key": told.key("infer", {})})
    return told


def test_each_component_is_told_with_its_difference(
    build: Callable[..., Run],
    samples: list[Sample],
    predictions: dict[str, list[Prediction]],
    capfd: Any,
) -> None:
    worse = [answer(sample, "a lever") for sample in samples]
    answering = {"base": {"samples": 24, "seconds": 12.0}, "without style": {"samples": 24, "seconds": 6.0}}
    run = with_ablations(build(samples, predictions), {"style": worse, "refine": predictions["tuned"]}, answering)
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    found = json.loads(run.path("eval", "ablations.json").read_text())
    assert list(found) == ["style", "refine", "adapter"]
    assert found["style"]["difference"]["exact_match"]["high"] < 0
    assert (found["style"]["changed"], found["style"]["seconds"]) == (24, 0.25)
    assert found["refine"]["changed"] == 0 and found["refine"]["seconds"] is None
    assert found["refine"]["difference"]["exact_match"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    tuned = read_json(run.path("eval", "scores.json"))["tuned"]["exact_match"]["value"]
    base = read_json(run.path("eval", "scores.json"))["base"]["exact_match"]["value"]
    assert found["adapter"]["difference"]["exact_match"]["value"] == pytest.approx(base - tuned, abs=1e-3)
    assert set(read_json(run.path("eval", "scores.json"))) == {"base", "tuned"}, "an ablation is no model"
    shown = capfd.readouterr().err
    assert "tuned without" in shown and "seconds a question: base 0.5" in shown
    report = run.path("eval", "report.html").read_text()
    assert "What each component is worth" in report and '<td class="number">none</td>' in report


def test_without_ablations_nothing_is_said_of_them(
    build: Callable[..., Run], samples: list[Sample], predictions: dict[str, list[Prediction]]
) -> None:
    run = build(samples, predictions)
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    assert not run.path("eval", "ablations.json").exists()
    assert "What each component" not in run.path("eval", "report.html").read_text()


def test_the_report_shows_what_earlier_passes_wrote(
    build: Callable[..., Run], samples: list[Sample], predictions: dict[str, list[Prediction]]
) -> None:
    predictions["tuned"][1]["passes"] = {"classify": "N", "answer": "a <long> answer"}
    run = build(samples, predictions)
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    assert 'answer: <span class="text">a &lt;long&gt; answer</span>' in run.path("eval", "report.html").read_text()
