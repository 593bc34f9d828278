"""Turn questions into samples, and write the rows that a submission must answer."""

from collections.abc import Mapping
from typing import Any

from stages.contract.errors import DataError
from stages.contract.files import write_jsonl
from stages.contract.recipe import Recipe
from stages.contract.records import Sample
from stages.contract.stage import Stage
from stages.preprocess.split import SPLITS
from stages.tasks.task import Found

ASKED = "validation_asked"
"""Validation samples without their answers: prompts for adapters that are chosen or weighed by their score on them."""


def write_samples(
    stage: Stage,
    task: Any,
    questions: list[Any],
    splits: Mapping[str, str | None],
    groups: Mapping[str, str],
    founds: Mapping[str, Found] | None,
) -> None:
    """Write the samples of each split, and the rows of a submission. Raises DataError if none is left to train on.

    `splits`, `groups` and `founds` are by question id; the last is None if the task reads no documents.
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
            tested.append(question)
        if split == "validation":
            samples[ASKED].append(_prompt_sample(recipe, task, question, found))
        if split != "test":
            samples[split] += _answered_samples(recipe, task, question, found, split)
    if not samples["train"]:
        raise DataError(
            f"{stage.run.data}: no question is left to train on; see {stage.path('log.txt')} for the skipped ones"
        )
    for split, members in samples.items():
        name = f"samples/{split}.jsonl"
        stage.outputs[name] = write_jsonl(stage.path(name), members)  # type: ignore[arg-type]
    for split in SPLITS:
        stage.counts[split] = len(samples[split])
    _check_test_samples(stage, samples["test"])
    rows = task.asked_rows(stage.run.data, tested)
    stage.outputs["asked.jsonl"] = write_jsonl(stage.path("asked.jsonl"), rows)


def _check_test_samples(stage: Stage, tested: list[Sample]) -> None:
    """Say which test samples have errors. Raises DataError if all of a data set have: its score would be 0, and mean
    nothing."""
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
    """A question's samples for training or validation, answer included."""
    members: list[Sample] = task.build_samples(recipe, question, found, split)
    for sample in members:
        target = sample["meta"].pop("target", sample["references"][0])
        sample["messages"] = [*sample["messages"], {"role": "assistant", "content": target}]
        sample["meta"]["source"] = question.source
    return members


def _prompt_sample(recipe: Recipe, task: Any, question: Any, found: Found | None, trained_on: bool = False) -> Sample:
    """A question's sample for inference, without the answer."""
    sample: Sample
    (sample,) = task.build_samples(recipe, question, found, "test")
    sample["meta"]["source"] = question.source
    if trained_on:
        sample["meta"]["trained_on"] = True
    if found is not None and not found.pages:  # it stays in the test set and counts as failed
        sample["meta"]["error"] = f"no readable page in {question.document}"
    return sample


def _reason_to_skip(question: Any, split: str | None, found: Found | None) -> tuple[str, str] | None:
    """Why a question becomes no sample, and the detail; None if it becomes one. No test question is skipped: each is
    scored or counted as failed."""
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
