"""The adapters' vote on the test samples: the voters and their weights, the second round, and votes.jsonl."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.contract.errors import DataError
from stages.contract.recipe import Recipe, Vote
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.infer.rounds import Variant
from stages.infer.vote import Answers, Decision, Electorate, choose_greedily, decide
from stages.tasks.task import Task

VOTE = Variant("vote")
"""The variant under which the vote's predictions are written, beside those of the adapters."""

Say = Callable[[str], None]
"""A function that prints a line on the console."""


@dataclass(frozen=True)
class Election:
    """The first round of a vote."""

    electorate: Electorate
    """The voters and their weights."""
    scores: dict[str, float]
    """Every trained adapter's mean score on the validation samples, 0..1; 0 without validation samples."""
    compared: int
    """Number of validation samples."""
    path: list[float]
    """With `adapters: greedy`, the vote's score (0..1) on the validation samples after each adapter is added."""
    ballots: list[Answers]
    """The voters' answers to each test sample."""
    decisions: list[Decision]
    """The result of the vote on each test sample."""

    @property
    def voters(self) -> list[str]:
        """Names of the voters, sorted."""
        return sorted(self.electorate.weights)


def refuse_impossible_vote(vote: Vote, adapters: Collection[str], compared: int) -> None:
    """Raise DataError if the recipe's vote is impossible. infer calls this before any sample is answered.

    `adapters` are the names of the trained adapters, `compared` is the number of validation samples.
    """
    if not compared and (vote.adapters == "greedy" or vote.weights == "validation"):
        raise DataError(
            "infer.vote: there are no validation samples by which to choose or weight adapters; set"
            " data.validation_fraction above 0, or infer.vote.adapters to all and infer.vote.weights to uniform"
        )
    if isinstance(vote.adapters, list) and not set(vote.adapters) & set(adapters):
        raise DataError(f"infer.vote.adapters: none of {', '.join(vote.adapters)} is trained; name trained adapters")


def hold_election(
    recipe: Recipe,
    task: Task,
    samples: Mapping[Variant, list[Sample]],
    predictions: Mapping[Variant, list[Prediction]],
    say: Say,
) -> Election:
    """Choose the voters and let them vote on every test sample. Returns the first round of the vote.

    `samples` and `predictions` are by variant, and a variant has both in the same order. If the recipe names adapters
    that are not trained, prints a line with `say`. Call `refuse_impossible_vote` first.
    """
    vote = recipe.infer.vote
    assert vote is not None
    names = sorted(variant.adapter for variant in predictions if variant.adapter and variant.asks == "validation")
    compared = samples[Variant(names[0], asks="validation")]
    validation = {name: _valid_answers(predictions[Variant(name, asks="validation")]) for name in names}
    by_sample = [{name: validation[name][place] for name in names} for place in range(len(compared))]
    right = [_answer_scores(recipe, task, sample, given) for sample, given in zip(compared, by_sample, strict=True)]
    scores = {
        name: _mean([known.get(a or "", 0.0) for known, a in zip(right, validation[name], strict=True)])
        for name in names
    }
    path: list[float] = []
    voters = names
    if vote.adapters == "greedy":
        voters, path = choose_greedily(by_sample, right, scores, vote.weights == "validation")
    elif vote.adapters != "all":
        voters = [name for name in vote.adapters if name in names]
        absent = sorted(set(vote.adapters) - set(voters))
        if absent:
            say(f"not trained and therefore without a vote: {', '.join(absent)}")
    electorate = Electorate({name: scores[name] if vote.weights == "validation" else 1.0 for name in voters}, scores)
    answers = {name: _valid_answers(predictions[Variant(name)]) for name in voters}
    count = len(samples[Variant(None)])
    ballots: list[Answers] = [{name: answers[name][place] for name in voters} for place in range(count)]
    decisions = [decide(ballot, electorate) for ballot in ballots]
    return Election(electorate, scores, len(compared), path, ballots, decisions)


def samples_to_vote_again(
    recipe: Recipe, task: Task, tested: list[Sample], election: Election, say: Say
) -> list[Sample]:
    """The samples of a second round, with the leading answers as the only choices.

    They are the samples without a majority that have at least two leading answers and whose choices can be reduced to
    these. Prints with `say` how many there are or why there are none. Without a second round in the recipe, returns an
    empty list and prints nothing.
    """
    assert recipe.infer.vote is not None
    if not recipe.infer.vote.second_round:
        return []
    narrowed = [
        task.narrowed_sample(sample, decision.leading)
        for sample, decision in zip(tested, election.decisions, strict=True)
        if decision.by not in ("majority", "nobody") and len(decision.leading) > 1
    ]
    again = [sample for sample in narrowed if sample is not None]
    if again:
        say(f"second round on {len(again)} of {len(tested)} samples, which have no majority in the first")
    else:
        say("no second round: " + ("no question can have fewer choices" if narrowed else "none is needed"))
    return again


def count_votes(
    election: Election,
    tested: list[Sample],
    again: list[Sample],
    predictions: Mapping[Variant, list[Prediction]],
) -> list[dict[str, Any]]:
    """Count the votes of both rounds. Returns the lines of votes.jsonl, one for each test sample.

    `again` has the samples of the second round, `predictions` the voters' predictions on them by variant. If all voters
    abstain on a sample in the second round, the first one decides.
    """
    second: dict[str, tuple[Answers, Decision]] = {}
    for place, sample in enumerate(again):
        answers = {variant.adapter: _valid_answers(found)[place] for variant, found in predictions.items()}
        ballot = {name: answers[name] for name in election.voters}
        second[sample["id"]] = ballot, decide(ballot, election.electorate)
    return [
        _vote_line(sample, ballot, decision, second.get(sample["id"]))
        for sample, ballot, decision in zip(tested, election.ballots, election.decisions, strict=True)
    ]


def describe_election(vote: Vote, election: Election, rows: Sequence[Mapping[str, Any]], again: int) -> dict[str, Any]:
    """Describe a vote for the manifest: voters, weights, scores (0..1), and how many samples each rule decided.

    `rows` are the lines of votes.jsonl, `again` is the number of samples in the second round.
    """
    names, weights = sorted(election.scores), election.electorate.weights
    return {
        "adapters": election.voters,
        "chosen": vote.adapters if isinstance(vote.adapters, str) else "by name",
        "weights": {name: round(weights[name], 6) for name in election.voters},
        "validation": {name: round(election.scores[name], 6) for name in names} if election.compared else {},
        "validation samples": election.compared,
        "best": election.electorate.ranking()[0],
        "greedy path": [round(score, 6) for score in election.path],
        "decided by": dict(Counter(row["by"] for row in rows)),
        "second round": again,
    }


def election_reason(vote: Vote, election: Election) -> str:
    """The reason for the voters and their weights, for the decision in the manifest."""
    why = f"{vote.weights} weights; ties by validation score" if election.compared else "uniform weights; ties by name"
    return f"{vote.adapters if election.path else 'infer.vote'}; {why}"


def vote_predictions(rows: Sequence[Mapping[str, Any]]) -> list[Prediction]:
    """Return the vote's predictions, one for each line of votes.jsonl."""
    return [_vote_prediction(row) for row in rows]


def _answer_scores(recipe: Recipe, task: Task, sample: Sample, given: Answers) -> dict[str, float]:
    """The score, 0..1, of each answer that adapters gave to a validation sample, by the task's first metric."""
    scored = {answer: task.score(recipe, answer, sample) for answer in given.values() if answer is not None}
    return {answer: next(iter(metrics.values())) for answer, metrics in scored.items()}


def _valid_answers(predictions: list[Prediction]) -> list[str | None]:
    """The answer of each prediction; None if it failed."""
    return [None if prediction["error"] else prediction["answer"] for prediction in predictions]


def _mean(values: list[float]) -> float:
    """The mean of the values; 0 without values."""
    return math.fsum(values) / len(values) if values else 0.0


def _vote_line(
    sample: Sample, ballot: Answers, decision: Decision, second: tuple[Answers, Decision] | None
) -> dict[str, Any]:
    """A sample's line of votes.jsonl, with the votes and the decision of the first round.

    If a second round decided the sample, the line has the second round's instead, and the first round's in
    `first_round`.
    """
    first = {"votes": dict(sorted(ballot.items())), **asdict(decision), "leading": list(decision.leading)}
    if second is None or second[1].answer is None:  # if all abstain in the second round, the first decides
        return {"id": sample["id"], "round": 1, **first}
    votes, again = second
    decided = {"votes": dict(sorted(votes.items())), **asdict(again), "leading": list(again.leading)}
    return {"id": sample["id"], "round": 2, **decided, "first_round": first}


def _vote_prediction(row: Mapping[str, Any]) -> Prediction:
    """The vote's prediction for one sample. Its text is the answer that won; it is failed if all voters abstained."""
    if row["answer"] is None:
        return failed_prediction(row["id"], "no adapter gave a valid answer")
    return {**failed_prediction(row["id"], ""), "answer": row["answer"], "text": row["answer"], "error": None}
