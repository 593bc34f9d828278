"""Step 3 of infer: read the predictions out of the journals, and write predictions and submissions."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError
from stages.contract.files import read_jsonl, write_jsonl
from stages.contract.records import Prediction, Sample, failed_prediction, is_empty
from stages.contract.run import Run
from stages.infer.journal import Journals
from stages.infer.prompts import Prompts
from stages.infer.rounds import Round, Variant
from stages.tasks import load_task
from stages.tasks.task import Task

NO_ANSWER = "no valid answer in the completion"
"""Start of a prediction's error if the task finds no answer in the completion, so that the model abstains."""


def predict_round(
    asked: Round, prompts: Prompts, journals: Journals, task: Task
) -> tuple[dict[Variant, list[Prediction]], dict[str, dict[str, float]]]:
    """Return a round's predictions by variant, in the order of the samples, and the time that they took.

    Requires that all samples are answered. The times are by the variant's name: `samples` is the number of samples that
    no shard had answered, `seconds` is how long their completions took over all starts, without the engine's start. A
    completion that variants share counts for each of them. A variant that shards answered completely has no entry.
    """
    found: dict[Variant, list[Prediction]] = {}
    took: dict[str, dict[str, float]] = {}
    for variant, samples in asked.samples.items():
        known = asked.from_shards[variant]
        found[variant] = [known.get(s["id"]) or _prediction(variant, s, prompts, journals, task) for s in samples]
        if own := asked.unanswered_by_shards(variant):
            steps = [step for sample in own for step in prompts.steps(variant, sample, journals)]
            seconds = sum(float(step.record["seconds"]) for step in steps if step.record is not None)
            took[variant.name] = {"samples": len(own), "seconds": round(seconds, 3)}
    return found, took


def _prediction(variant: Variant, sample: Sample, prompts: Prompts, journals: Journals, task: Task) -> Prediction:
    """The prediction for one sample, from the records of its passes. The last pass has the answer."""
    if "error" in sample["meta"]:
        return failed_prediction(sample["id"], sample["meta"]["error"])
    records = {step.name: step.record for step in prompts.steps(variant, sample, journals)}
    found = [record for record in records.values() if record is not None]
    assert len(found) == len(records), f"{sample['id']} of {variant.name} has a pass without an answer"
    last = found[-1]
    prompt_tokens = sum(record["prompt_tokens"] for record in found)
    if last["error"] is not None:
        return failed_prediction(sample["id"], last["error"], prompt_tokens)
    answer = task.read_answer(last["text"], sample)
    times = f", asked {len(found)} times" if len(found) > 1 else ""
    return {
        "id": sample["id"],
        "answer": answer,
        "text": last["text"],
        "finish_reason": last["finish_reason"],
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sum(record["completion_tokens"] for record in found),
        "error": None if answer is not None else f"{NO_ANSWER}{times}",
        "passes": {name: record["text"] for name, record in records.items() if record is not last and record},
    }


@dataclass
class WrittenFiles:
    """What `write_predictions` wrote, for the manifest."""

    outputs: dict[str, int] = field(default_factory=dict)
    """Number of records in each file, by its name relative to the stage's folder."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of `answered` and `failed` predictions; `empty` counts the answers without text, `abstained` the failed
    predictions whose completion has no valid answer."""
    submissions: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of `lines` in each variant's submission, and of lines `without answer`."""


def write_predictions(
    run: Run,
    folder: Path,
    predictions: Mapping[Variant, list[Prediction]],
    submits: bool,
    say: Callable[[str], None],
) -> WrittenFiles:
    """Write each variant's predictions into the stage's folder. Returns what was written.

    With `submits`, also writes the submissions of base, adapters and vote, but none for ablations and validation
    samples. Prints with `say` how many lines lack an answer, if any do. Raises DataError if asked.jsonl does not name
    each predicted question exactly once, or if the file on the disk differs from what was written.
    """
    written = WrittenFiles()
    for variant, found in predictions.items():
        written.outputs[variant.output] = write_jsonl(folder / variant.output, found)  # type: ignore[arg-type]
        outcomes = Counter("failed" if prediction["error"] else "answered" for prediction in found)
        outcomes["abstained"] = sum((prediction["error"] or "").startswith(NO_ANSWER) for prediction in found)
        outcomes["empty"] = sum(is_empty(prediction) for prediction in found)
        written.counts.update(+outcomes)
        if submits and variant.without is None and variant.asks == "test":
            lines, empty = _submission_lines(run, variant, {prediction["id"]: prediction for prediction in found})
            path = folder / variant.submission
            written.outputs[variant.submission] = write_jsonl(path, lines)
            if read_jsonl(path) != lines:
                raise DataError(f"{path}: differs from what was written; check the disk, then run again")
            written.submissions[variant.name] = {"lines": len(lines), "without answer": empty}
            if empty:
                say(f"{variant.submission}: {empty} of {len(lines)} lines have no answer")
    return written


def _submission_lines(
    run: Run, variant: Variant, predictions: Mapping[str, Prediction]
) -> tuple[list[dict[str, Any]], int]:
    """Return a submission's lines, in the order of asked.jsonl, and how many lack the answer to one of their questions.

    A row of asked.jsonl with `"line": false` makes no line. With `infer.answers: own sources`, an adapter's submission
    has only the lines with a question that it answered. Raises DataError if asked.jsonl does not name each predicted
    question exactly once.
    """
    task = load_task(run.recipe.task)
    rows = read_jsonl(run.path("preprocess", "asked.jsonl"))
    asked = [row for row in rows if row.get("line", True)]
    if run.recipe.infer.answers == "own sources" and variant.adapter is not None:
        asked = [row for row in asked if not predictions.keys().isdisjoint(row["ids"])]
    named = [name for row in rows for name in row["ids"]]
    surplus = sorted(set(predictions) - set(named))
    if surplus:
        raise DataError(
            f"{variant.submission}: asked.jsonl has no line for {', '.join(surplus[:3])}; run preprocess again"
        )
    if len(set(named)) < len(named):
        raise DataError(f"{variant.submission}: asked.jsonl names a question twice; run preprocess again")
    answered = {name for name, prediction in predictions.items() if prediction["answer"]}
    empty = sum(not answered.issuperset(row["ids"]) or not row["ids"] for row in asked)
    return [task.submission(row, predictions) for row in asked], empty
