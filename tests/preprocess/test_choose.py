"""Which documents and groups are held out."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contract.errors import DataError
from stages.contract.recipe import Data
from stages.preprocess import stage as preprocess_stage
from stages.preprocess.split import SPLITS, split_groups, split_questions

vectors = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=8).map(
    lambda rows: np.array(rows, np.float32)
)
scored_pages = st.dictionaries(st.integers(1, 50), st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]), max_size=12)


# -- splits --------------------------------------------------------------------------------------------------------

names = st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=30)
fractions = st.floats(0.01, 0.9)


def free(groups: set[str]) -> dict[str, str | None]:
    return dict.fromkeys(groups)


@given(names, fractions, st.floats(0, 0.9), st.integers(0, 5))
def test_every_group_is_in_one_split_and_train_and_test_have_one(groups, test, validation, seed) -> None:  # type: ignore[no-untyped-def]
    data = Data(path="x", test_fraction=test, validation_fraction=validation)
    splits = split_groups(groups, free(groups), data, seed)
    assert set(splits) == groups
    assert set(splits.values()) <= set(SPLITS)
    assert {"train", "test"} <= set(splits.values())
    held_out = sum(split == "test" for split in splits.values())
    assert held_out >= min(test * len(groups), len(groups) - 1)
    assert splits == split_groups(groups, free(groups), data, seed)


@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=30, unique=True), st.randoms())
def test_the_split_does_not_depend_on_the_order_of_the_groups(groups, random) -> None:  # type: ignore[no-untyped-def]
    data = Data(path="x")
    shuffled = groups.copy()
    random.shuffle(shuffled)
    assert split_groups(set(groups), free(set(groups)), data, 1) == split_groups(
        set(shuffled), free(set(shuffled)), data, 1
    )


def test_the_seed_changes_the_split() -> None:
    groups = {f"d{number}" for number in range(30)}
    data = Data(path="x")
    assert split_groups(groups, free(groups), data, 1) != split_groups(groups, free(groups), data, 2)


@given(names, st.data())
def test_given_splits_are_kept(groups, data) -> None:  # type: ignore[no-untyped-def]
    ordered = sorted(groups)
    count = data.draw(st.integers(1, len(ordered) - 1))
    given_splits: dict[str, str | None] = {g: "test" if i < count else "train" for i, g in enumerate(ordered)}
    splits = split_groups(groups, given_splits, Data(path="x"), 0)
    for group, split in splits.items():
        assert (split == "test") == (given_splits[group] == "test")
    assert "train" in splits.values()


@pytest.mark.parametrize("groups", [set(), {"only"}])
def test_too_few_documents_to_hold_one_out(groups: set[str]) -> None:
    with pytest.raises(DataError, match="both need at least one"):
        split_groups(groups, free(groups), Data(path="x"), 0)


@pytest.mark.parametrize("split", ["train", "test"])
def test_given_splits_that_leave_one_empty_are_refused(split: str) -> None:
    with pytest.raises(DataError, match="both need at least one"):
        split_groups({"a", "b"}, {"a": split, "b": split}, Data(path="x"), 0)


def test_two_documents_are_enough() -> None:
    splits = split_groups({"a", "b"}, free({"a", "b"}), Data(path="x"), 0)
    assert sorted(splits.values()) == ["test", "train"]


def test_no_validation_without_a_validation_fraction() -> None:
    groups = {f"d{number}" for number in range(20)}
    splits = split_groups(groups, free(groups), Data(path="x", validation_fraction=0), 0)
    assert "validation" not in splits.values()


def test_documents_of_one_content_fall_into_one_split(new_stage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A copy under another name must not carry training text into the test set."""
    documents = {}
    for name, content in (("a", "x"), ("copy of a", "x"), ("b", "y"), ("c", "z"), ("d", "w")):
        (tmp_path / name).write_text(content)
        documents[name] = tmp_path / name
    for seed in range(20):
        stage = new_stage(f"seed={seed}", "data.test_fraction=0.4")
        splits = splits_of(stage, [question(name, name) for name in documents], documents)
        assert splits["a"] == splits["copy of a"]
    given_splits = [
        question("a", "a", "test"),
        question("copy of a", "copy of a", "train"),
        question("b", "b", "train"),
    ]
    assert splits_of(stage, given_splits, documents) == {"a": "test", "copy of a": None, "b": "train"}


def question(name: str, document: str, split: str | None = None, source: str = "questions") -> Any:
    return SimpleNamespace(id=name, document=document, group=document, split=split, source=source)


def splits_of(stage: Any, questions: list[Any], documents: dict[str, Path]) -> dict[str, str | None]:
    groups = preprocess_stage._group_questions(questions, documents, stage.path(".hashes.json"))
    return split_questions(questions, groups, stage.run.recipe.data, stage.run.recipe.seed, stage.skip)


def split(questions: list[Any], **data: Any) -> dict[str, str | None]:
    groups = {each.id: each.group for each in questions}
    return split_questions(questions, groups, Data(path="x", **data), 1, lambda *_: None)


def test_every_data_set_is_split_by_itself() -> None:
    questions = [question(f"{source}{n}", f"{source}{n}", source=source) for source in "ab" for n in range(8)]
    splits = split(questions)
    for source in "ab":
        assert Counter(splits[f"{source}{n}"] for n in range(8)) == {"test": 2, "validation": 1, "train": 5}


def test_a_data_set_that_cannot_be_split_is_skipped_with_the_reason_if_others_can() -> None:
    many = [question(f"a{n}", f"a{n}", source="a") for n in range(8)]
    few = [question(f"b{n}", "same", source="b") for n in range(3)]
    skipped: list[tuple[str, ...]] = []
    groups = {each.id: each.group for each in (*many, *few)}
    splits = split_questions([*many, *few], groups, Data(path="x"), 1, lambda *words: skipped.append(words))
    assert set(splits) == {f"a{n}" for n in range(8)}
    assert [words[:2] for words in skipped] == [(f"b{n}", "nothing of b can be held out") for n in range(3)]
    with pytest.raises(DataError, match="both need at least one"):
        split(few)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_question_with_a_given_split_sets_the_split_of_its_group_in_any_order(order: tuple[int, int]) -> None:
    """If the data name training questions but no test question, there is nothing to score."""
    questions = [question(f"q{n}-{part}", f"g{n}", ("train", None)[part]) for n in range(8) for part in order]
    with pytest.raises(DataError, match="8 to train on and 0 to test on"):
        split(questions, validation_fraction=0.0)


def test_a_group_of_two_data_sets_falls_into_one_split() -> None:
    shared = [f"g{n}" for n in range(10)]
    questions = [question(f"{source}{group}", group, source=source) for source in "ab" for group in shared]
    questions += [question(f"only{n}", f"only{n}", source="b") for n in range(10)]
    splits = split(questions)
    assert all(splits[f"a{group}"] == splits[f"b{group}"] for group in shared)


def test_guessed_labels_are_only_trained_on_and_never_where_their_group_is_scored() -> None:
    questions = [question(f"q{n}", f"g{n}") for n in range(8)]
    guessed = [question(f"guess{n}", f"g{n}", "train only", "guesses") for n in range(8)]
    strangers = [question(f"more{n}", f"h{n}", "train only", "guesses") for n in range(8)]
    splits = split([*questions, *guessed, *strangers])
    assert all(splits[f"guess{n}"] == ("train" if splits[f"q{n}"] == "train" else None) for n in range(8))
    assert {splits[f"more{n}"] for n in range(8)} == {"train"}


def test_a_question_without_an_answer_is_only_asked_and_does_not_affect_the_split() -> None:
    questions = [question(f"q{n}", f"g{n}") for n in range(8)]
    asked = [question(f"asked{n}", f"a{n}", "asked", "test") for n in range(3)]
    splits = split([*questions, *asked])
    assert {splits[f"asked{n}"] for n in range(3)} == {"test"}
    assert splits | split(questions) == splits


def test_training_data_is_scored_only_with_evaluate_on_training() -> None:
    questions = [question(f"q{n}", f"g{n}") for n in range(4)]
    with pytest.raises(DataError, match=r"set data\.evaluate_on_training to score the training data"):
        split(questions, test_fraction=0.0)
    assert set(split(questions, evaluate_on_training=True).values()) == {"train", "validation"}
