"""Journals of completions: whose they are, and when those of other weights are deleted."""

from pathlib import Path

from stages.engines.engine import Completion
from stages.infer.journal import Journals

QUESTION = ("q1", "answer", "0" * 64)


def test_answers_of_other_weights_stay_until_those_that_replace_them_are_written(tmp_path: Path) -> None:
    """An adapter that was replaced can come back: with `train.learning_rate` as before."""
    before = {None: "base.0.jsonl", "tuned": "tuned.0.jsonl"}
    with Journals(tmp_path, before, "key") as journals:
        journals.add("tuned", QUESTION, Completion("yes", 1, "stop"), None)
    after = {None: "base.0.jsonl", "tuned": "tuned.1.jsonl"}
    with Journals(tmp_path, after, "other key") as journals:
        assert journals.find("tuned", QUESTION) is None, "another adapter's answer"
    with Journals(tmp_path, before, "key") as journals:  # the start above was stopped
        found = journals.find("tuned", QUESTION)
        assert found is not None and found["text"] == "yes"
    with Journals(tmp_path, after, "other key") as journals:
        journals.remove_others()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.0.jsonl", "tuned.1.jsonl"]
