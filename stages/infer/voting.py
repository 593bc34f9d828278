"""The adapters' vote as inference holds it: who votes, what their votes count, and what is written of it."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from stages.contract.errors import DataError
from stages.contract.files import write_jsonl
from stages.contract.recipe import Vote
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.contract.stage import Stage
from stages.infer.asking import Variant
from stages.infer.vote import Answers, Decision, Electorate, chosen_greedily, decide
from stages.tasks import load_task

VOTE = Variant("vote")
"""The adapters' common answer, among the predictions of the adapters."""

AskAgain = Callable[[dict[Variant, list[Sample]]], dict[Variant, list[Prediction]]]
"""Asks adapters about samples with fewer answers to choose from."""


def refuse_impossible_vote(vote: Vote, adapters: Collection[str], compared: int) -> None:
    """Raise DataError where the recipe's way to vote cannot be gone: before anything is asked.

    `adapters` are those that have been trained, `compared` is the number of validation samples.
    """
    if not compared and (vote.adapters == "greedy" or vote.weights == "validation"):
        raise DataError(
            "infer.vote: adapters are to be chosen or weighed by validation samples, and there are none; set"
            " data.validation_fraction, or infer.vote to adapters all and weights uniform"
        )
    if isinstance(vote.adapters, list) and not set(vote.adapters) & set(adapters):
        raise DataError(f"infer.vote: none of {', '.join(vote.adapters)} has been trained")


def hold_vote(
    stage: Stage,
    asked: Mapping[Variant, list[Sample]],
    found: Mapping[Variant, list[Prediction]],
    ask_again: AskAgain,
) -> list[Prediction]:
    """The adapters' common answer to every test sample, in their order. Writes votes.jsonl, and tells the manifest who
    voted and why. The vote is possible, by `refuse_impossible_vote`."""
    task, recipe = load_task(stage.run.recipe.task), stage.run.recipe
    vote = recipe.infer.vote
    assert vote is not None
    names = sorted(variant.adapter for variant in found if variant.adapter and variant.asks == "validation")
    compared = asked[Variant(names[0], asks="validation")]
    right = [_right(stage, task, sample, found, names, place) for place, sample in enumerate(compared)]
    validation = {name: _answers_of(found[Variant(name, asks="validation")]) for name in names}
    by_sample = [{name: validation[name][place] for name in names} for place in range(len(compared))]
    scores = {name: _mean([right[n].get(a or "", 0.0) for n, a in enumerate(validation[name])]) for name in names}
    path: list[float] = []
    voters = names
    if vote.adapters == "greedy":
        voters, path = chosen_greedily(by_sample, right, scores, vote.weights == "validation")
    elif vote.adapters != "all":
        voters = [name for name in vote.adapters if name in names]
        absent = sorted(set(vote.adapters) - set(voters))
        if absent:
            stage.events.say(f"not trained, so without a vote: {', '.join(absent)}")
    electorate = Electorate({name: scores[name] if vote.weights == "validation" else 1.0 for name in voters}, scores)
    tested = asked[Variant(None)]
    answers = {name: _answers_of(found[Variant(name)]) for name in voters}
    ballots: list[Answers] = [{name: answers[name][place] for name in voters} for place in range(len(tested))]
    decisions = [decide(ballot, electorate) for ballot in ballots]
    second = _second_round(stage, task, tested, decisions, electorate, ask_again) if vote.second_round else {}
    rows = [
        _row(sample, ballot, decision, second.get(sample["id"]))
        for sample, ballot, decision in zip(tested, ballots, decisions, strict=True)
    ]
    stage.outputs["votes.jsonl"] = write_jsonl(stage.path("votes.jsonl"), rows)
    stage.facts["vote"] = {
        "adapters": sorted(voters),
        "chosen": vote.adapters if isinstance(vote.adapters, str) else "by name",
        "weights": {name: round(electorate.weights[name], 6) for name in sorted(voters)},
        "validation": {name: round(scores[name], 6) for name in names} if compared else {},
        "validation samples": len(compared),
        "best": electorate.ranking()[0],
        "greedy path": [round(score, 6) for score in path],
        "decided by": dict(Counter(row["by"] for row in rows)),
        "second round": len(second),
    }
    why = f"{vote.weights} weights; ties by validation score" if compared else "uniform weights; ties by name"
    stage.decide("voters", ", ".join(sorted(voters)), f"{vote.adapters if path else 'infer.vote'}; {why}")
    return [_prediction(row) for row in rows]


def _right(
    stage: Stage, task: Any, sample: Sample, found: Mapping[Variant, list[Prediction]], names: list[str], place: int
) -> dict[str, float]:
    """The task's first metric of each answer that an adapter gave to a validation sample."""
    given = {found[Variant(name, asks="validation")][place]["answer"] for name in names}
    scored = {answer: task.score(stage.run.recipe, answer, sample) for answer in given if answer is not None}
    return {answer: next(iter(metrics.values())) for answer, metrics in scored.items()}


def _answers_of(predictions: list[Prediction]) -> list[str | None]:
    return [None if prediction["error"] else prediction["answer"] for prediction in predictions]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _second_round(
    stage: Stage,
    task: Any,
    tested: list[Sample],
    decisions: list[Decision],
    electorate: Electorate,
    ask_again: AskAgain,
) -> dict[str, tuple[dict[str, str | None], Decision]]:
    """The votes and decisions of a second round, by sample: of those where no answer had more than half of the votes,
    between the leading answers."""
    narrowed = {
        sample["id"]: task.narrowed(sample, decision.leading)
        for sample, decision in zip(tested, decisions, strict=True)
        if decision.by not in ("majority", "nobody") and len(decision.leading) > 1
    }
    again = [sample for sample in narrowed.values() if sample is not None]
    if not again:
        stage.events.say("no second round: " + ("no question can be narrowed" if narrowed else "none is needed"))
        return {}
    stage.events.say(
        f"second round: {len(again)} of {len(tested)} samples have no majority, and fewer answers to choose from"
    )
    variants = {name: Variant(name, asks="second round") for name in sorted(electorate.weights)}
    found = ask_again(dict.fromkeys(variants.values(), again))
    rounds = {}
    for place, sample in enumerate(again):
        ballot = {name: _answers_of(found[variant])[place] for name, variant in variants.items()}
        rounds[sample["id"]] = ballot, decide(ballot, electorate)
    return rounds


def _row(
    sample: Sample, ballot: Answers, decision: Decision, second: tuple[dict[str, str | None], Decision] | None
) -> dict[str, Any]:
    """A line of votes.jsonl. Where the second round decided, its decision stands, and the first one's beside it."""
    first = {"votes": dict(sorted(ballot.items())), **asdict(decision), "leading": list(decision.leading)}
    if second is None or second[1].answer is None:  # who abstains from a second round leaves it to the first
        return {"id": sample["id"], "round": 1, **first}
    votes, again = second
    decided = {"votes": dict(sorted(votes.items())), **asdict(again), "leading": list(again.leading)}
    return {"id": sample["id"], "round": 2, **decided, "first_round": first}


def _prediction(row: Mapping[str, Any]) -> Prediction:
    if row["answer"] is None:
        return failed_prediction(row["id"], "no adapter gave a valid answer")
    tally = Counter(answer if answer is not None else "abstained" for answer in row["votes"].values())
    text = ", ".join(f"{answer}: {count}" for answer, count in tally.most_common())
    return {**failed_prediction(row["id"], ""), "answer": row["answer"], "text": text, "error": None}
