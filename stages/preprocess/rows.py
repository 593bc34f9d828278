"""Write the samples that questions become, and the rows that a submission must have."""

from collections.abc import Mapping
from typing import Any

from stages.contract.errors import DataError
from stages.contract.files import write_jsonl
from stages.contract.recipe import Recipe
from stages.contract.records import Sample, escape_places, is_asked
from stages.contract.stage import Stage
from stages.preprocess.split import SPLITS
from stages.tasks.common.skips import commonest_reason
from stages.tasks.task import Found

ASKED = "validation_asked"
"""Validation samples without their answers. Their scores choose or weight the adapters of a vote."""


def write_samples(
    stage: Stage,
    task: Any,
    questions: list[Any],
    splits: Mapping[str, str | None],
    groups: Mapping[str, str],
    founds: Mapping[str, Found] | None,
) -> list[Sample]:
    """Write the samples of each split and the rows of a submission, and add them to outputs and counts. Questions that
    cannot be used go to `stage.skip`. Returns the training samples.

    `splits`, `groups` and `founds` are by question id; `founds` is None if the task reads no documents. Raises
    DataError if there is no training sample, or if no test question of a data set has a usable prompt.
    """
    recipe = stage.run.recipe
    learnt = {group for name, group in groups.items() if splits.get(name) == "train"}
    samples: dict[str, list[Sample]] = {split: [] for split in (*SPLITS, ASKED)}
    tested: list[Any] = []
    for question in questions:
        split, found = splits[question.id], founds[question.id] if founds is not None else None
        reason = _reason_to_skip(question, split, found)
        if reason is not None:
            stage.skip(question.id, *reason)
            continue
        assert split is not None
        on_training_data = recipe.data.evaluate_on_training
        scored_too = split == "train" and question.split != "train only" and on_training_data
        if split == "test" or scored_too:
            known = scored_too or (on_training_data and question.split == "test" and groups[question.id] in learnt)
            samples["test"].append(_prompt_sample(recipe, task, question, found, trained_on=known))
            if is_asked(samples["test"][-1]):
                tested.append(question)
        if split == "validation":
            samples[ASKED].append(_prompt_sample(recipe, task, question, found))
        if split != "test":
            samples[split] += _answered_samples(recipe, task, question, found, split)
    if not samples["train"]:
        raise DataError(f"{stage.run.data}: no question is left to train on; {commonest_reason(stage.skipped)}")
    for split, members in samples.items():
        name = f"samples/{split}.jsonl"
        stage.outputs[name] = write_jsonl(stage.path(name), members)  # type: ignore[arg-type]
    for split in SPLITS:
        stage.counts[split] = len(samples[split])
    _check_test_samples(stage, samples["test"])
    rows = task.asked_rows(stage.run.data, tested)
    stage.outputs["asked.jsonl"] = write_jsonl(stage.path("asked.jsonl"), rows)
    return samples["train"]


def _check_test_samples(stage: Stage, tested: list[Sample]) -> None:
    """Count and print, for each data set, the test samples with an error.

    Raises DataError if all test samples of a data set have errors: its score of 0 would be meaningless.
    """
    for source in sorted({str(sample["meta"]["source"]) for sample in tested}):
        members = [sample for sample in tested if sample["meta"]["source"] == source]
        broken = [sample for sample in members if sample["meta"].get("error")]
        if not broken:
            continue
        example = f"{broken[0]['id']}: {broken[0]['meta']['error']}"
        if len(broken) == len(members):
            raise DataError(
                f"{stage.run.data}: none of {len(members)} test questions of {source} has a usable prompt, such as"
                f" {example}; correct the data, or remove this data set"
            )
        stage.counts[f"{source} test samples that cannot be asked"] = len(broken)
        stage.events.say(f"{len(broken)} of {len(members)} test samples of {source} count as failed, such as {example}")


def _answered_samples(recipe: Recipe, task: Any, question: Any, found: Found | None, split: str) -> list[Sample]:
    """The samples of a question for training or validation. Each ends with a message that holds the answer, or is plain
    text."""
    members: list[Sample] = task.build_samples(recipe, question, found, split)
    for sample in members:
        sample["meta"]["source"] = question.source
        if "text" in sample or sample["messages"][-1]["role"] == "assistant":
            continue  # whole already
        target = sample["meta"].pop("target", None)
        answer = escape_places(sample["references"][0] if target is None else target)
        sample["messages"] = [*sample["messages"], {"role": "assistant", "content": answer}]
    return members


def _prompt_sample(recipe: Recipe, task: Any, question: Any, found: Found | None, trained_on: bool = False) -> Sample:
    """The sample of a question for inference, without the answer. It has an error if its document has no readable page.
    `trained_on`: whether the question is also in the training data."""
    sample: Sample
    (sample,) = task.build_samples(recipe, question, found, "test")
    sample["meta"]["source"] = question.source
    if trained_on:
        sample["meta"]["trained_on"] = True
    if found is not None and not found.pages:  # the sample stays in the test set and counts as failed
        sample["meta"]["error"] = f"no readable page in {question.document}"
    return sample


def _reason_to_skip(question: Any, split: str | None, found: Found | None) -> tuple[str, str] | None:
    """The reason for skipping a question, and its detail; None if the question is not skipped.

    Test questions are never skipped: each one is scored or counts as failed.
    """
    if split is None and found is not None:
        return "training question on a test document", f"{question.document}, by its content"
    if split is None:
        return "training question of a held-out group", f"{question.group}, from {question.source}"
    if split == "test":
        return None
    if found is not None and not found.pages:
        return "no readable page in its document", question.document
    if not question.answers:
        return "no answer to train on", ""
    return None
