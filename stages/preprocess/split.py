"""Split questions by group (a document, a context, a problem), never row by row: training data must not be scored."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from stages.contract.errors import DataError
from stages.contract.recipe import Data
from stages.tasks.task import Skip

SPLITS = ("train", "validation", "test")


def split_questions(
    questions: list[Any], groups: Mapping[str, str], data: Data, seed: int, skip: Skip
) -> dict[str, str | None]:
    """Return the split of each question by id; None for a question that is neither trained on nor scored.

    `groups` has each question's group by id. Each data set is split separately and contributes its share to the test
    set, but a group in several data sets has one split. A data set for which `split_groups` raises DataError is not
    split: its questions go to `skip` and are not in the result, except those of split `asked`, `train only` or `test
    only`. Raises DataError if no data set can be split.
    """
    splits = {groups[question.id]: "test" for question in questions if question.split in ("test", "test only")}
    divided: dict[str, dict[str, str | None]] = {}
    learnt = {question.source for question in questions if question.split == "train" and data.evaluate_on_training}
    for question in questions:
        if question.split in (None, "train", "test"):
            given, group = divided.setdefault(question.source, {}), groups[question.id]
            if given.get(group) != "test":
                given[group] = question.split or given.get(group)
    lost: dict[str, DataError] = {}
    for source, given in divided.items():
        try:
            splits |= split_groups(set(given), given, data, seed, splits, source in learnt)
        except DataError as error:
            lost[source] = error
    if lost and len(lost) == len(divided):
        source, first = next(iter(lost.items()))
        raise DataError(f"{source if len(divided) > 1 else 'data.path'}: {first}") from first
    left = [
        question
        for question in questions
        if question.source not in lost or question.split in ("asked", "train only", "test only")
    ]
    for question in questions:
        if question.source in lost and question not in left:
            skip(question.id, f"nothing of {question.source} can be held out", str(lost[question.source]))
    return {question.id: _question_split(question, splits.get(groups[question.id]), data) for question in left}


def _question_split(question: Any, group_split: str | None, data: Data) -> str | None:
    """The split of a question whose group has the split `group_split`; None: neither trained on nor scored."""
    if question.split in ("asked", "test only"):
        return "test"  # a question of split `asked` has no answer, so it is not scored
    if question.split == "train only":
        return "train" if group_split in ("train", None) else None
    if question.split == "train" and group_split == "test":
        return "train" if data.evaluate_on_training else None
    return group_split


def split_groups(
    groups: set[str],
    given: Mapping[str, str | None],
    data: Data,
    seed: int,
    taken: Mapping[str, str] | None = None,
    learnt: bool = False,
) -> dict[str, str]:
    """Return the split of each group: `train`, `validation` or `test`.

    `given` has the splits in the data itself (`train`, `test` or None), `taken` the splits that groups already have in
    other data sets. A group that is `test` in either is for testing, and any other group in `taken` keeps its split. If
    `given` has no split at all, groups are held out until `data.test_fraction` of all are for testing, except with
    `data.evaluate_on_training`. Groups for testing and validation are chosen by a hash of seed and name, so a group's
    split does not depend on the order of the data.

    `learnt`: whether the data set has questions that are trained on even if no group is. Raises DataError if there is
    no group to train on and `learnt` is false, or no group to test on and `data.evaluate_on_training` is false.
    """
    taken = taken or {}
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).hexdigest())
    test = [group for group in order if "test" in (given.get(group), taken.get(group))]
    free = [group for group in order if group not in test and group not in taken]
    if not any(given.get(group) for group in groups) and data.test_fraction and not data.evaluate_on_training:
        wanted = min(max(math.ceil(len(order) * data.test_fraction), 1), len(order) - 1)
        count = max(wanted - len(test), 0)
        test, free = test + free[:count], free[count:]
    validated = [group for group in order if taken.get(group) == "validation"]
    if data.validation_fraction:
        wanted = min(max(round((len(order) - len(test)) * data.validation_fraction), 1), len(free) - 1)
        count = max(wanted - len(validated), 0)
        validated, free = validated + free[:count], free[count:]
    train = free + [group for group in order if taken.get(group) == "train"]
    if not (train or learnt) or not (test or data.evaluate_on_training):
        raise DataError(
            f"found questions on {len(groups)} document(s) or group(s), {len(train)} to train on and {len(test)} to"
            " test on, but both need at least one; add documents or groups, or set data.evaluate_on_training to"
            " score the training data, which every table then says"
        )
    named = {"train": train, "validation": validated, "test": test}
    return {group: split for split, members in named.items() for group in members}
