"""eval: score base and every adapter on the test samples, with intervals; print tables and write a report."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from stages.contract.errors import DataError
from stages.contract.files import read_jsonl, write_json, write_jsonl
from stages.contract.recipe import Recipe
from stages.contract.records import VOTE, Prediction, Sample
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.eval.ablation import EVERYTHING, Ablation, ablated_adapter, ablations, seconds_per_question
from stages.eval.measures import measure_answers
from stages.eval.report import ON_TRAINING_DATA, format_interval, write_report
from stages.eval.scores import Asked, Scores, breakdown, overall_figures, score_models, scored_lines
from stages.eval.votes import VoteOutcome, vote_outcome
from stages.results.comparison import evaluated_run, suspicions
from stages.results.intervals import Figures
from stages.results.summary import (
    SUMMARY,
    build_summary,
    dataset_name,
    dataset_result,
    stage_seconds,
    training_facts,
)
from stages.results.uncertainty import documents_note, is_clear, star_note
from stages.tasks import load_task


def work(stage: Stage) -> None:
    """Score the answers and write the report. `run_stage` calls this.

    Raises DataError if no test sample has a reference or the predictions do not fit the samples, and
    InterruptedRunError if the stage is asked to stop.
    """
    recipe = stage.run.recipe
    samples = cast(list[Sample], read_jsonl(stage.run.path("preprocess", "samples", "test.jsonl")))
    predictions = _read_predictions(stage.run, {sample["id"] for sample in samples})
    scored = [sample for sample in samples if sample["references"]]
    stage.counts["samples"] = len(samples)
    stage.counts["scored"] = len(scored)
    stage.counts["without references"] = len(samples) - len(scored)
    task = load_task(recipe.task)
    uploads = _write_uploads(stage, task, samples, predictions)
    if not scored:
        written = f" (files to upload are in {stage.path('uploads')})" if uploads else ""
        raise DataError(
            f"{stage.run.path('preprocess', 'samples', 'test.jsonl')}: none of {len(samples)} test samples has a"
            f" reference{written}; add answers to the test questions"
        )
    if len(scored) < len(samples):
        stage.events.say(
            f"{len(samples) - len(scored)} of {len(samples)} test samples have no reference and are not scored"
        )

    asked = _asked_function(recipe)
    scores = score_models(task, recipe, scored, predictions, asked)
    together = len(set(scores.together))
    if together < len(scored):
        stage.counts["counted together"] = together
        stage.events.say(
            f"{len(scored)} test samples are scored and count as {together}: samples of one question count once"
        )
    lines = scored_lines(scores)
    stage.outputs["scored.jsonl"] = write_jsonl(stage.path("scored.jsonl"), lines)
    trained_on = sum(bool(sample["meta"].get("trained_on")) for sample in scored)
    if trained_on:
        stage.counts["scored on training data"] = trained_on
    stage.counts["failed"] = sum(error is not None for model in scores.models.values() for error in model.errors)
    stage.stop.check()
    figures, differences = overall_figures(scores)
    groups = {key: breakdown(scores, key) for key in ("group", "kind")}
    _write_output(stage, "scores.json", figures)
    _write_output(stage, "differences.json", differences)
    _write_output(stage, "by_group.json", {name: {key: groups[key][name] for key in groups} for name in scores.models})
    ablated = ablations(stage.run, task, scored, predictions, asked)
    if ablated:
        _write_output(stage, "ablations.json", {each.component: asdict(each) for each in ablated})
    vote = vote_outcome(stage.run, task, scored, predictions)
    if vote is not None:
        _write_output(stage, "vote.json", asdict(vote))
    measures = measure_answers(task, recipe, scores)
    if measures:
        by_model = {name: {key: asdict(one) for key, one in each.items()} for name, each in measures.items()}
        _write_output(stage, "measures.json", by_model)
    suspicious = suspicions([evaluated_run(stage.run, figures, lines)])
    _write_summary(stage, figures, suspicious)
    stage.stop.check()
    notes = task.score_notes(recipe, scored)
    write_report(stage, scores, figures, differences, groups, ablated, vote, measures, notes, suspicious)
    stage.outputs["report.html"] = None
    _print_tables(stage, scores, figures, differences, ablated, vote, notes, suspicious)


def _write_uploads(
    stage: Stage, task: Any, samples: list[Sample], predictions: Mapping[str, list[Prediction]]
) -> list[str]:
    """Write every model's files for a benchmark's own server. Returns the files' paths in the stage's folder."""
    written = []
    for name, records in predictions.items():
        by_id = {prediction["id"]: prediction for prediction in records}
        written += [f"uploads/{name}/{file}" for file in task.uploads(stage.path("uploads", name), samples, by_id)]
    stage.outputs.update(dict.fromkeys(written))
    return written


def _asked_function(recipe: Recipe) -> Asked:
    """Return a function that says whether a model was asked a sample, which `infer.answers` decides."""
    adapters = {adapter.name: adapter for adapter in recipe.train.adapters}

    def was_asked(model: str, sample: Sample) -> bool:
        """Whether a model was asked a sample. Base and the vote are asked every sample."""
        own = recipe.infer.answers == "own sources" and model in adapters
        return not own or adapters[model].covers(sample["meta"]["source"])

    return was_asked


def _write_summary(stage: Stage, figures: Mapping[str, Figures], suspicious: Sequence[str]) -> None:
    """Write summary.json again after each adapter, with the results so far, as train does."""
    run, infer = stage.run, stage.run.manifest("infer") or {}
    untrained = (run.manifest("train") or {}).get("untrained", {})
    batch = run.recipe.infer.batch_size
    for made in infer.get("decisions", []):
        batch = made["value"] if made["what"] == "batch size" else batch
    earlier = [manifest for name in ("train", "infer") if (manifest := run.manifest(name)) is not None]
    start = earlier[0]["starts"][0] if earlier else stage.starts[0]
    before = sum(map(stage_seconds, earlier))
    results: list[dict[str, Any]] = []
    for adapter in run.recipe.train.adapters:
        result: dict[str, Any] = {"error": untrained.get(adapter.name)}
        if adapter.name not in untrained:
            own = figures.get(adapter.name, {})
            took = infer.get("answering", {}).get(adapter.name)
            counts = infer.get("submission", {}).get(adapter.name)
            result = {
                "training": training_facts(run, adapter, run.path("train", "adapters", adapter.name)),
                "evaluation": {
                    "dataset_name": dataset_name(adapter),
                    "evaluation_time": took and took["seconds"],
                    "eval_samples": max((figure["n"] for figure in own.values()), default=0),
                    "batch_size": batch,
                    "metrics": {metric: figure["value"] for metric, figure in own.items()},
                    "failed": max((figure["failed"] for figure in own.values()), default=0),
                    "lines_in_submission": counts and counts["lines"],
                    "generation_kwargs": _generation_settings(run.recipe),
                },
            }
        results.append(dataset_result(run, adapter, result))
        summary = build_summary(run, results, start, before, stage.starts[0])
        write_json(stage.path(SUMMARY), {**summary, "suspicious": list(suspicious)})


def _generation_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings with which answers were generated, under transformers' names. Those of a task's passes, which may
    sample, are in `passes`."""
    return {
        "max_new_tokens": recipe.infer.max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_length": recipe.infer.max_length,
        "passes": recipe.infer.passes,
    }


def _read_predictions(run: Run, ids: set[str]) -> dict[str, list[Prediction]]:
    """Return the predictions by model: base, the vote, the adapters in the recipe's order, then any others.

    `ids` are those of the test samples. Raises DataError for a prediction of another sample, or if base has no file.
    """
    folder = run.path("infer", "predictions")
    found = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if "base" not in found:
        raise DataError(f"{folder}: no base.jsonl; run infer again")
    order = ["base", VOTE, *(adapter.name for adapter in run.recipe.train.adapters)]
    predictions = {}
    for name in dict.fromkeys([name for name in order if name in found] + list(found)):
        predictions[name] = cast(list[Prediction], read_jsonl(found[name]))
        for prediction in predictions[name]:
            if prediction["id"] not in ids:
                raise DataError(f"{found[name]}: {prediction['id']!r} is not a test sample; run infer again")
    return predictions


def _write_output(stage: Stage, name: str, value: Any) -> None:
    """Write a JSON file, and record it as an output of the stage."""
    write_json(stage.path(name), value)
    stage.outputs[name] = None


def _print_tables(
    stage: Stage,
    scores: Scores,
    figures: dict[str, Figures],
    differences: dict[str, Figures],
    ablated: list[Ablation],
    vote: VoteOutcome | None,
    notes: Sequence[str],
    suspicious: Sequence[str],
) -> None:
    """Print the results to the console: a table of base against each other model, notes on the scores, tables of the
    vote and of the ablations if there are any, warnings of suspicious answers, and the path of the report."""
    from rich.console import Console

    seconds = {name: seconds_per_question(stage.run, name) for name in scores.models}
    with os.fdopen(os.dup(stage.console), "w", encoding="utf-8") as file:
        console = Console(file=file, width=100, highlight=False, markup=False, emoji=False)

        def print_table(table: Any) -> None:
            """Print a table. If samples are training data, its caption says so."""
            table.caption = ON_TRAINING_DATA if stage.counts["scored on training data"] else None
            console.print(table)

        if stage.counts["scored on training data"]:
            console.print(ON_TRAINING_DATA, style="bold")
        for name in [model for model in scores.models if model != "base"] or ["base"]:
            print_table(_model_table(name, figures, differences.get(name, {}), seconds))
        console.print("percent [95% interval]; failed answers score 0 and count in n", style="dim")
        for each in notes:
            console.print(each, style="dim")
        if differences:
            console.print(star_note(len(differences)), style="dim")
        if vote is not None:
            print_table(_vote_table(vote, figures))
            console.print(_vote_line(vote), style="dim")
        if ablated:
            print_table(_ablation_table(str(ablated_adapter(stage.run.recipe, scores.models)), ablated))
            stars = star_note(len(ablated) - 1, "components")
            console.print(f"percent, then gain or loss in points; {stars}", style="dim")
        note = documents_note(figure["groups"] for each in figures.values() for figure in each.values())
        if note:
            console.print(note, style="bold")
        for line in suspicious:
            console.print(f"suspicious: {line}", style="bold red")
    stage.events.say(f"report: {stage.path('report.html')}")


def _model_table(name: str, figures: dict[str, Figures], differences: Figures, seconds: dict[str, float | None]) -> Any:
    """Base against another model, or base alone, as a rich table. `seconds` has the seconds per question by model."""
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
    for metric in [metric for metric in figures["base"] if metric in figures[name]]:
        cells = [format_interval(figures[model][metric]) for model in models]
        if differences:
            cells.append(_gain_text(differences[metric]) if metric in differences else "")
        failed = " / ".join(str(figures[model][metric]["failed"]) for model in models)
        table.add_row(metric, *cells, str(figures[name][metric]["n"]), failed)
    if any(seconds[model] is not None for model in models):
        table.add_row("seconds per question", *(_format_seconds(seconds[model]) for model in models))
    return table


def _vote_table(vote: VoteOutcome, figures: dict[str, Figures]) -> Any:
    """Each adapter and its part in the vote, as a rich table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    metric = next(iter(figures[VOTE]))
    table = Table("adapter", "data mix", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in (f"{metric}\nvalidation", f"{metric}\ntest", "weight", "agrees\n%"):
        table.add_column(head, justify="right")
    for voter in vote.voters:
        test = figures.get(voter.name, {}).get(metric)
        cells = [voter.validation, test and test["value"], None, voter.agreement]
        texts = ["" if cell is None else f"{cell:.1f}" for cell in cells]
        texts[2] = "no vote" if voter.weight is None else f"{voter.weight:.2f}"
        table.add_row(voter.name, voter.mix, *texts)
    return table


def _vote_line(vote: VoteOutcome) -> str:
    """One line on the vote: its difference from the best voter, how it was decided, agreement, entropy, and the number
    of samples with a second round."""
    metric, gain = next(iter(vote.over_best.items()))
    decided = ", ".join(f"{by} {count}" for by, count in sorted(vote.decided_by.items()))
    return (
        f"vote over {vote.best}, {vote.best_by}: {metric} {_gain_text(gain).rstrip()}; decided by {decided};"
        f" mean agreement {vote.agreement:.1f}%, entropy {vote.entropy:.2f} bits; {vote.second_round} in a second round"
    )


def _format_seconds(took: float | None) -> str:
    """Format seconds with three significant digits. Returns an empty text if they are not recorded."""
    return "" if took is None else f"{took:.3g}"


def _ablation_table(adapter: str, ablated: list[Ablation]) -> Any:
    """The adapter's figures with everything, then its gain or loss without each component, as a rich table. Each row
    also has the number of failed answers and the seconds per question, and without a component the number of changed
    answers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    metrics = list(ablated[0].figures)
    names = [each.component if each.component == EVERYTHING else f"without {each.component}" for each in ablated]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(adapter, overflow="fold", vertical="bottom", min_width=max(map(len, names)))
    for head in (*metrics, "answers_changed", "failed", "seconds_per_question"):
        table.add_column(head.replace("_", "\n"), justify="right", vertical="bottom")
    for name, each in zip(names, ablated, strict=True):
        everything = each.component == EVERYTHING
        cells = [
            f"{each.figures[metric]['value']:.1f} " if everything else _format_points(each.difference[metric])
            for metric in metrics
        ]
        changed = "" if everything else str(each.changed or "none")
        failed = max(figure["failed"] for figure in each.figures.values())
        table.add_row(name, *cells, changed, str(failed), _format_seconds(each.seconds))
    return table


def _gain_text(gain: dict[str, Any]) -> str:
    """A difference with its interval, then a star if it is clear, else a blank for alignment."""
    return format_interval(gain, sign="+") + ("*" if is_clear(gain) else " ")


def _format_points(gain: dict[str, Any]) -> str:
    """Format a difference in percentage points, then a star if it is clear, else a blank for alignment."""
    return f"{gain['value']:+.1f}{'*' if is_clear(gain) else ' '}"
