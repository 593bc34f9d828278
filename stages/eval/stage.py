"""eval: score base and every adapter on the test samples, with intervals; a table and a report for people."""

import os
from dataclasses import asdict
from typing import Any, cast

from stages.contract.errors import DataError
from stages.contract.files import read_jsonl, write_json
from stages.contract.records import Prediction, Sample
from stages.contract.stage import Stage
from stages.eval.ablation import Without, ablated, seconds_a_question
from stages.eval.report import with_interval, write_report
from stages.eval.scores import Figures, Scores, breakdown, overall, score_models
from stages.tasks import load_task


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe = stage.run.recipe
    samples = cast(list[Sample], read_jsonl(stage.run.path("preprocess", "samples", "test.jsonl")))
    predictions = _predictions(stage, {sample["id"] for sample in samples})
    scored = [sample for sample in samples if sample["references"]]
    stage.counts["samples"] = len(samples)
    stage.counts["scored"] = len(scored)
    stage.counts["without references"] = len(samples) - len(scored)
    if not scored:
        raise DataError(f"none of {len(samples)} test samples has a reference; give test questions an answer to score")
    if len(scored) < len(samples):
        stage.events.say(f"{len(samples) - len(scored)} of {len(samples)} test samples have no reference: not scored")

    task = load_task(recipe.task)
    scores = score_models(task, scored, predictions)
    stage.counts["failed"] = sum(error is not None for model in scores.models.values() for error in model.errors)
    stage.stop.check()
    figures, differences = overall(scores, recipe.eval.bootstrap, recipe.seed)
    groups = {key: breakdown(scores, key) for key in ("group", "kind")}
    _write(stage, "scores.json", figures)
    _write(stage, "differences.json", differences)
    _write(stage, "by_group.json", {name: {key: groups[key][name] for key in groups} for name in scores.models})
    without = ablated(stage, task, scored, predictions)
    if without:
        _write(stage, "ablations.json", {each.component: asdict(each) for each in without})
    stage.stop.check()
    write_report(stage, scores, figures, differences, groups, without)
    stage.outputs["report.html"] = None
    _show(stage, scores, figures, differences, without)


def _predictions(stage: Stage, ids: set[str]) -> dict[str, list[Prediction]]:
    """Predictions by model: base, the recipe's adapters in their order, then any other."""
    folder = stage.run.path("infer", "predictions")
    found = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if "base" not in found:
        raise DataError(f"{folder}: no base.jsonl; run infer again")
    order = ["base", *(adapter.name for adapter in stage.run.recipe.train.adapters)]
    predictions = {}
    for name in dict.fromkeys([name for name in order if name in found] + list(found)):
        predictions[name] = cast(list[Prediction], read_jsonl(found[name]))
        for prediction in predictions[name]:
            if prediction["id"] not in ids:
                raise DataError(f"{found[name]}: {prediction['id']!r} is no test sample; run infer again")
    return predictions


def _write(stage: Stage, name: str, value: Any) -> None:
    write_json(stage.path(name), value)
    stage.outputs[name] = None


def _show(
    stage: Stage,
    scores: Scores,
    figures: dict[str, Figures],
    differences: dict[str, Figures],
    without: list[Without],
) -> None:
    """Print a table of base against each adapter, one of what was ablated, and where the report is, on the real
    console."""
    from rich.console import Console

    with os.fdopen(os.dup(stage.console), "w", encoding="utf-8") as file:
        console = Console(file=file, width=100, highlight=False, markup=False, emoji=False)
        for name in [model for model in scores.models if model != "base"] or ["base"]:
            console.print(_table(name, figures, differences.get(name, {})))
        console.print("percent [95% interval]; failed answers score 0 and count in n", style="dim")
        times = {name: seconds_a_question(stage, name) for name in scores.models}
        known = ", ".join(f"{name} {took:g}" for name, took in times.items() if took is not None)
        if known:
            console.print(f"seconds a question: {known}", style="dim")
        if without:
            console.print(_ablation_table(stage.run.recipe.train.adapters[0].name, without))
            console.print("points against everything; with intervals in the report", style="dim")
    stage.events.say(f"report: {stage.path('report.html')}")


def _table(name: str, figures: dict[str, Figures], differences: Figures) -> Any:
    """Base against one adapter, or base alone, as a rich table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    models = list(dict.fromkeys(["base", name]))
    table = Table("metric", box=SIMPLE_HEAD, padding=0)
    for model in models:
        table.add_column(model, justify="right", overflow="fold", min_width=len("100.0 [100.0, 100.0]"))
    if differences:
        table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("failed", justify="right")
    for metric, base in figures["base"].items():
        cells = [with_interval(figures[model][metric]) for model in models]
        if differences:
            cells.append(with_interval(differences[metric], sign="+") if metric in differences else "")
        failed = " / ".join(str(figures[model][metric]["failed"]) for model in models)
        table.add_row(metric, *cells, str(base["n"]), failed)
    return table


def _ablation_table(adapter: str, without: list[Without]) -> Any:
    """By how much the answers are better without each component, as a rich table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    metrics = list(dict.fromkeys(metric for each in without for metric in each.difference))
    table = Table(f"{adapter} without", box=SIMPLE_HEAD, padding=0)
    for head in (*metrics, "changed", "failed", "s/question"):
        table.add_column(head, justify="right")
    for each in without:
        found = [each.difference.get(metric) for metric in metrics]
        cells = [f"{figure['value']:+.1f}" if figure else "" for figure in found]
        failed = max(figure["failed"] for figure in each.figures.values())
        seconds = "" if each.seconds is None else f"{each.seconds:g}"
        table.add_row(each.component, *cells, str(each.changed), str(failed), seconds)
    return table
