"""Logic problems through the real commands with the real small model: three adapters of different mixes, their vote
with a second round, a submission, the ledger; then another vote, which asks the model nothing."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stages.contract.files import read_json, read_jsonl, write_jsonl
from tests.conftest import MODELS, REPOSITORY, Lorry, need_model

pytestmark = pytest.mark.long

DATA = REPOSITORY / "recipes" / "data" / "logic-choice"
ADAPTERS = {
    "plain": "[{source: train, count: 24, seed: 1}]",
    "more": "[{source: train, count: 16, seed: 2}, more#8]",
    "guessed": "[{source: train, count: 12, seed: 3}, guessed-a]",
}
SETTINGS = (
    "data.path=logic",
    f"train.adapters=[{', '.join(f'{{name: {name}, data: {data}}}' for name, data in ADAPTERS.items())}]",
    # the last layers are enough to learn the form of an answer
    *(r"train.target_modules=.*\.layers\.2[0-9]\..*_proj", "train.epochs=1", "train.effective_batch=4"),
    "train.checkpoint_every=100",
    *("infer.vote.second_round=true", "infer.passes.retries=1"),
)


class Job:
    """The finished run, and its command."""

    def __init__(self, lorry: Lorry, asked: list[dict[str, Any]]) -> None:
        self.lorry, self.asked = lorry, asked

    def run(self, *more: str) -> str:
        sets = (word for setting in (*SETTINGS, *more) for word in ("--set", setting))
        finished = self.lorry("entrypoints.lorry", "run", "logic-choice", "--profile", "tiny", "--run", "votes", *sets)
        assert finished.code == 0, finished.output
        return finished.output

    def path(self, *parts: str) -> Path:
        return self.lorry.runs.joinpath("votes", *parts)

    def predictions(self, name: str) -> dict[str, str | None]:
        return {row["id"]: row["answer"] for row in read_jsonl(self.path("infer", "predictions", f"{name}.jsonl"))}

    def trained(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.path("train", "adapters", name, "training.json"))
        return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    need_model("SmolLM2-135M-Instruct")
    root = tmp_path_factory.mktemp("logic")
    data = root / "data" / "logic"
    for folder in ("sources", "labels"):
        (data / folder).mkdir(parents=True)
    test = read_jsonl(DATA / "test.jsonl")[:5]
    # in another order; one id is a number, and one sub-question has a single option
    asked = [{**test[0], "id": 77}, *reversed(test[1:])]
    asked[3] = {**asked[3], "questions": [{"question": "?", "options": ["only"]}, *asked[3]["questions"]]}
    unchanged = {one["id"] for one in test} - {test[0]["id"], asked[3]["id"]}
    labels = [row for row in read_jsonl(DATA / "labels" / "guessed-a.jsonl") if row["id"] in unchanged]
    write_jsonl(data / "test.jsonl", asked)
    write_jsonl(data / "train.jsonl", read_jsonl(DATA / "train.jsonl")[:30])
    write_jsonl(data / "sources" / "more.jsonl", read_jsonl(DATA / "sources" / "more.jsonl")[:12])
    write_jsonl(data / "labels" / "guessed-a.jsonl", labels)
    made = Job(Lorry(root / "data", MODELS, root / "runs", {"LORRY_TARGET": "cpu"}), asked)
    made.run()
    return made


def test_every_mix_has_an_adapter_that_has_learnt_to_answer(job: Job) -> None:
    for name in ADAPTERS:
        log = [row["loss"] for row in job.trained(name)["log"] if "loss" in row]
        assert min(log[-3:]) < log[0] / 1.5, name
        answers = job.predictions(name)
        assert sum(answer is not None for answer in answers.values()) >= 0.9 * len(answers), name
    kept = {name: job.trained(name)["samples"]["train"] for name in ADAPTERS}
    labelled = [
        row for row in read_jsonl(job.path("preprocess", "samples", "train.jsonl")) if row["meta"]["label_source"]
    ]
    assert kept == {"plain": 24, "more": 24, "guessed": 12 + len(labelled)} and labelled
    assert {row["meta"]["label_source"] for row in labelled} == {"guessed-a"}


def test_the_vote_is_the_majoritys_answer(job: Job) -> None:
    given, vote = {name: job.predictions(name) for name in ADAPTERS}, job.predictions("vote")
    tested = read_jsonl(job.path("preprocess", "samples", "test.jsonl"))
    assert set(vote) == {sample["id"] for sample in tested} and len(vote) >= 15
    majorities = 0
    for sample in tested:
        name = sample["id"]
        valid = Counter(answers[name] for answers in given.values() if answers[name])
        if valid and valid.most_common(1)[0][1] > valid.total() / 2:
            assert vote[name] == valid.most_common(1)[0][0], name
            majorities += 1
        assert vote[name] is None or vote[name] in sample["meta"]["options"]
    assert majorities >= len(tested) / 2
    held = read_json(job.path("infer", "manifest.json"))["vote"]
    assert sum(held["decided by"].values()) == len(tested) and held["validation samples"] > 0


def test_the_submission_has_every_problem_in_the_order_of_the_file(job: Job) -> None:
    lines, vote = read_jsonl(job.path("infer", "submission", "vote.jsonl")), job.predictions("vote")
    assert [line["id"] for line in lines] == [problem["id"] for problem in job.asked]
    assert lines[0]["id"] == 77
    for line, problem in zip(lines, job.asked, strict=True):
        places = [f"{problem['id']}/{index}" for index in range(len(problem["questions"]))]
        assert [one["answer"] for one in line["questions"]] == [vote.get(place) or "" for place in places]
    assert lines[3]["questions"][0]["answer"] == "", "it has no second option, so it is not asked"


def test_the_ledger_shows_mix_adapter_score_and_part_in_the_vote(job: Job) -> None:
    shown = job.lorry("entrypoints.lorry", "ledger", "--format", "csv", "--sort", "adapter")
    rows = {row["adapter"]: row for row in csv.DictReader(io.StringIO(shown.output))}
    assert list(rows) == ["base", "guessed", "more", "plain", "vote"]
    scores = read_json(job.path("eval", "scores.json"))
    for name, row in rows.items():
        assert 0 <= float(row["score"]) <= 100
        assert int(row["groups"]) < 5 and row["low"] == row["high"] == "", "too few problems for an interval"
        assert row["in_vote"] == ("yes" if name in ADAPTERS else ""), name
        assert float(row["score"]) == pytest.approx(scores[name]["accuracy"]["value"])
    assert "more#8" in rows["more"]["data_mix"] and rows["guessed"]["steps"] == str(job.trained("guessed")["steps"])


def test_another_vote_asks_nothing_again(job: Job) -> None:
    before = {name: job.path("infer", "predictions", f"{name}.jsonl").read_bytes() for name in ("base", *ADAPTERS)}
    output = job.run("infer.vote.weights=validation", "infer.vote.second_round=false")
    assert "train: up to date" in output
    held = read_json(job.path("infer", "manifest.json"))["vote"]
    assert held["weights"] == held["validation"] and held["second round"] == 0
    assert {name: job.path("infer", "predictions", f"{name}.jsonl").read_bytes() for name in before} == before
