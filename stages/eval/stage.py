"""eval: score base and every adapter on the test samples, with intervals; print the results and write a report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from stages.contract.errors import DataError
from stages.contract.files import read_jsonl, write_json, write_jsonl
from stages.contract.recipe import Recipe
from stages.contract.records import BASE, VOTE, Prediction, Sample, is_asked
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.eval.ablation import ablations
from stages.eval.console import print_results
from stages.eval.losses import HeldOut, loss_lines, read_held_out
from stages.eval.measures import measure_answers
from stages.eval.report import write_report
from stages.eval.scores import Asked, Scores, breakdown, overall_figures, score_models, scored_lines
from stages.eval.votes import vote_outcome
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
from stages.tasks import load_task


def work(stage: Stage) -> None:
    """Score the answers and write the report. `run_stage` calls this.

    Raises DataError if no test sample has a reference or a loss, or the predictions do not fit the samples, and
    InterruptedRunError if the stage is asked to stop.
    """
    recipe = stage.run.recipe
    samples = cast(list[Sample], read_jsonl(stage.run.path("preprocess", "samples", "test.jsonl")))
    predictions = _read_predictions(stage.run, {sample["id"] for sample in samples})
    scored = [sample for sample in samples if sample["references"] and is_asked(sample)]
    stage.counts["samples"] = len(samples)
    stage.counts["scored"] = len(scored)
    stage.counts["without references"] = len(samples) - len(scored)
    task = load_task(recipe.task)
    uploads = _write_uploads(stage, task, samples, predictions)
    held_out = _write_losses(stage, samples)
    if not scored and held_out is None:
        written = f" (files to upload are in {stage.path('uploads')})" if uploads else ""
        raise DataError(
            f"{stage.run.path('preprocess', 'samples', 'test.jsonl')}: none of {len(samples)} test samples has a"
            f" reference{written}; add answers to the test questions"
        )
    if len(scored) < len(samples) and held_out is None:
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
    _count_trained_on(stage, scored or samples)
    _count_answers(stage, scores)
    stage.stop.check()
    figures, differences = overall_figures(scores)
    groups = {key: breakdown(scores, key) for key in ("group", "kind")}
    _write_output(stage, "scores.json", figures)
    _write_output(stage, "differences.json", differences)
    _write_output(stage, "by_group.json", {name: {key: groups[key][name] for key in groups} for name in scores.models})
    ablated = ablations(stage.run, task, scored, predictions, asked)
    if ablated:
        _write_output(stage, "ablations.json", {each.component: asdict(each) for each in ablated})
    vote = vote_outcome(stage.run, task, scored, predictions) if scored else None
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
    write_report(
        stage, scores, figures, differences, groups, ablated, vote, measures, held_out, predictions, notes, suspicious
    )
    stage.outputs["report.html"] = None
    print_results(stage, scores, figures, differences, ablated, vote, held_out, notes, suspicious)


def _write_losses(stage: Stage, samples: Sequence[Sample]) -> HeldOut | None:
    """Write the figures of the held-out losses and the losses themselves, and count them. Returns them; None if infer
    wrote none, or no model has any."""
    found = read_held_out(stage.run, samples, [adapter.name for adapter in stage.run.recipe.train.adapters])
    if found is None or not found.figures:
        return None
    lines = loss_lines(found)
    stage.counts["with a loss"] = len(lines)
    if found.missing:
        stage.counts["without a loss"] = len(found.missing)
    _write_output(stage, "losses.json", found.figures)
    stage.outputs["losses.jsonl"] = write_jsonl(stage.path("losses.jsonl"), lines)
    return found


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


def _count_answers(stage: Stage, scores: Scores) -> None:
    """Count the failed and the empty answers of all models."""
    stage.counts["failed"] = sum(error is not None for model in scores.models.values() for error in model.errors)
    stage.counts["empty"] = sum(sum(model.empty) for model in scores.models.values())


def _count_trained_on(stage: Stage, samples: Sequence[Sample]) -> None:
    """Count the samples that are also trained on, if any are."""
    trained_on = sum(bool(sample["meta"].get("trained_on")) for sample in samples)
    if trained_on:
        stage.counts["scored on training data"] = trained_on


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
    metrics = list(figures[BASE])  # those of all samples; None for one that no sample of an adapter has
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
                    "metrics": {metric: own[metric]["value"] if metric in own else None for metric in metrics},
                    "failed": max((figure["failed"] for figure in own.values()), default=0),
                    "empty": max((figure["empty"] for figure in own.values()), default=0),
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
