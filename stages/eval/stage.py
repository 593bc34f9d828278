"""eval: score base and every adapter on the test samples, with intervals; a table and a report for people."""

import os
from dataclasses import asdict
from typing import Any, cast

from stages.contract.errors import DataError
from stages.contract.files import read_jsonl, write_json
from stages.contract.records import Prediction, Sample
from stages.contract.stage import Stage
from stages.eval.ablation import EVERYTHING, Ablation, ablations, seconds_a_question
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
    ablated = ablations(stage, task, scored, predictions)
    if ablated:
        _write(stage, "ablations.json", {each.component: asdict(each) for each in ablated})
    stage.stop.check()
    write_report(stage, scores, figures, differences, groups, ablated)
    stage.outputs["report.html"] = None
    _show(stage, scores, figures, differences, ablated)


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
    ablated: list[Ablation],
) -> None:
    """Print a table of base against each adapter, one of what was ablated, and where the report is, on the real
    console."""
    from rich.console import Console

    seconds = {name: seconds_a_question(stage, name) for name in scores.models}
    with os.fdopen(os.dup(stage.console), "w", encoding="utf-8") as file:
        console = Console(file=file, width=100, highlight=False, markup=False, emoji=False)
        for name in [model for model in scores.models if model != "base"] or ["base"]:
            console.print(_table(name, figures, differences.get(name, {}), seconds))
        console.print("percent [95% interval]; failed answers score 0 and count in n", style="dim")
        if ablated:
            console.print(_ablation_table(stage.run.recipe.train.adapters[0].name, ablated))
            console.print("percent, then points better or worse; * where the 95% interval leaves out 0", style="dim")
    stage.events.say(f"report: {stage.path('report.html')}")


def _table(name: str, figures: dict[str, Figures], differences: Figures, seconds: dict[str, float | None]) -> Any:
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
    if any(seconds[model] is not None for model in models):
        table.add_row("seconds a question", *(_seconds(seconds[model]) for model in models))
    return table


def _seconds(took: float | None) -> str:
    return "" if took is None else f"{took:.3g}"


def _ablation_table(adapter: str, ablated: list[Ablation]) -> Any:
    """The adapter's figures with everything, and by how much they are better without each component, as a rich
    table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    metrics = list(ablated[0].figures)
    names = [each.component if each.component == EVERYTHING else f"without {each.component}" for each in ablated]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(adapter, overflow="fold", vertical="bottom", min_width=max(map(len, names)))
    for head in (*metrics, "answers_changed", "failed", "seconds_a_question"):
        table.add_column(head.replace("_", "\n"), justify="right", vertical="bottom")
    for name, each in zip(names, ablated, strict=True):
        everything = each.component == EVERYTHING
        cells = [
            f"{each.figures[metric]['value']:.1f} " if everything else _points(each.difference[metric])
            for metric in metrics
        ]
        changed = "" if everything else str(each.changed or "none")
        failed = max(figure["failed"] for figure in each.figures.values())
        table.add_row(name, *cells, changed, str(failed), _seconds(each.seconds))
    return table


def _points(gain: dict[str, Any]) -> str:
    return f"{gain['value']:+.1f}{'*' if gain['low'] > 0 or gain['high'] < 0 else ' '}"
