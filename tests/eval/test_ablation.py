"""What each component is worth: paired with everything, and shown also if no answer changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, write_json, write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.records import Prediction, Sample
from stages.contract.run import Run
from stages.eval import stage as evaluation
from stages.host.runner import run_stage
from tests.eval.conftest import RECIPE, answer


def with_ablations(run: Run, ablations: dict[str, list[Prediction]], answering: dict[str, Any]) -> Run:
    """The run, as if infer had also ablated these components."""
    infer = run.recipe.infer.model_copy(update={"ablate": [*ablations, "adapter"]})
    ablated = replace(run, recipe=run.recipe.model_copy(update={"infer": infer}))
    for name, records in ablations.items():
        write_jsonl(run.path("infer", "ablations", f"{name}.jsonl"), records)  # type: ignore[arg-type]
    manifest = read_json(run.path("infer", "manifest.json"))
    write_json(run.path("infer", "manifest.json"), manifest | {"answering": answering, "key": ablated.key("infer", {})})
    return ablated


def test_each_component_is_shown_with_its_difference(
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
    assert list(found) == ["everything", "style", "refine", "adapter"]
    scores = read_json(run.path("eval", "scores.json"))
    everything = found["everything"]["figures"]
    assert everything and all(figure == scores["tuned"][metric] for metric, figure in everything.items())
    assert (found["everything"]["difference"], found["everything"]["changed"]) == ({}, 0)
    assert found["style"]["difference"]["exact_match"]["high"] < 0
    assert (found["style"]["changed"], found["style"]["seconds"]) == (24, 0.25)
    assert found["refine"]["changed"] == 0 and found["refine"]["seconds"] is None
    same = found["refine"]["difference"]["exact_match"]
    assert (same["value"], same["p"]) == (0, 1) and same["low"] == -same["high"] < 0
    tuned, base = (scores[name]["exact_match"]["value"] for name in ("tuned", "base"))
    assert found["adapter"]["difference"]["exact_match"]["value"] == pytest.approx(base - tuned, abs=1e-3)
    assert found["adapter"]["figures"]["exact_match"] == scores["base"]["exact_match"]
    assert found["adapter"]["seconds"] == 0.5
    assert set(scores) == {"base", "tuned"}, "an ablation is not a model"
    shown = capfd.readouterr().out.splitlines()
    rows = {" ".join(words[:2]): words for words in (line.split() for line in shown) if words}
    seconds = [line.strip() for line in shown].index("seconds per question")
    assert shown[seconds + 1].split() == ["base", "0.5"]
    style, refine = rows["without style"], rows["without refine"]
    assert style[2] == f"{found['style']['difference']['exact_match']['value']:+.1f}*" and style[-4:] == [
        "24",
        "0",
        "0",
        "0.25",
    ]
    assert refine[2] == "+0.0" and refine[-3:] == ["none", "1", "0"]
    report = run.path("eval", "report.html").read_text()
    assert "What each component is worth" in report and '<td class="number">none</td>' in report
    assert "Leaving these out changed no answer: refine." in report
    assert "base 0.5" in report


def test_without_ablations_the_report_has_no_section_on_them(evaluated: Run) -> None:
    assert not evaluated.path("eval", "ablations.json").exists()
    assert "What each component" not in evaluated.path("eval", "report.html").read_text()


def test_ablating_the_adapter_is_shown_although_infer_writes_no_file_for_it(
    build: Callable[..., Run], samples: list[Sample], predictions: dict[str, list[Prediction]]
) -> None:
    run = build(samples, predictions)
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    ablated = with_ablations(run, {}, {})
    assert run_stage(ablated, "eval", evaluation.work) == Exit.DONE
    assert list(json.loads(run.path("eval", "ablations.json").read_text())) == ["everything", "adapter"]


def test_only_scored_samples_count_as_changed(
    build: Callable[..., Run], samples: list[Sample], predictions: dict[str, list[Prediction]]
) -> None:
    samples[0]["references"] = []
    other = [{**predictions["tuned"][0], "answer": "a lever"}, *predictions["tuned"][1:]]
    run = with_ablations(build(samples, predictions), {"style": other}, {})
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    assert json.loads(run.path("eval", "ablations.json").read_text())["style"]["changed"] == 0


def test_an_adapter_with_a_long_name_and_many_metrics_fits_the_console(
    build: Callable[..., Run], samples: list[Sample], predictions: dict[str, list[Prediction]], capfd: Any
) -> None:
    recipe = load_recipe(RECIPE, "tiny", ("train.adapters=[{name: an-adapter-whose-name-does-not-fit-its-column}]",))
    (adapter,) = recipe.train.adapters
    run = build(samples, {"base": predictions["base"], adapter.name: predictions["tuned"]}, recipe=recipe)
    run = with_ablations(run, {"position_hint": predictions["tuned"]}, {})
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    shown = capfd.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "without position_hint" in " ".join(shown.split()) and "…" not in shown


def test_the_report_shows_what_earlier_passes_wrote(
    build: Callable[..., Run], samples: list[Sample], predictions: dict[str, list[Prediction]]
) -> None:
    predictions["tuned"][1]["passes"] = {"classify": "N", "answer": "a <long> answer"}
    run = build(samples, predictions)
    assert run_stage(run, "eval", evaluation.work) == Exit.DONE
    assert 'answer: <span class="text">a &lt;long&gt; answer</span>' in run.path("eval", "report.html").read_text()
