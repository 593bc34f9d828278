"""The outcome of the adapters' vote: who voted, how far they agree, and whether the vote beats the best of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stages.contract.files import read_jsonl
from stages.contract.records import BASE, VOTE, Prediction, Sample
from stages.contract.run import Run
from stages.eval.scores import overall_figures, score_models
from stages.results.intervals import Figures


@dataclass(frozen=True)
class Voter:
    """An adapter and its part in the vote."""

    name: str
    mix: str
    """Its data mix as text."""
    validation: float | None
    """Its score on the validation samples in percent, by which adapters are chosen, weighed and ranked."""
    weight: float | None
    """The weight of its vote; None if it does not vote."""
    agreement: float | None
    """Percent of the samples on which its first-round answer is the vote's final one; None if it does not vote."""
    abstained: int


@dataclass(frozen=True)
class VoteOutcome:
    """The vote on all test samples, including those without a reference."""

    voters: list[Voter]
    decided_by: dict[str, int]
    second_round: int
    """Samples with a second round."""
    agreement: float
    """Mean share of the voters that gave the first round's answer, in percent."""
    entropy: float
    """Mean entropy of the first round's votes, in bits."""
    best: str
    """The voter with the best validation score; without validation the first by name. Never chosen on the test set."""
    best_by: str
    """How that voter was chosen, as text."""
    over_best: Figures
    """Differences of the vote from that voter, paired, with intervals."""
    disagreements: list[dict[str, Any]]
    """Lines of votes.jsonl on which the voters disagreed in the first round, lowest agreement first. `votes`,
    `agreement` and `entropy` are the first round's, `answer` and `by` the final ones; `right` says whether the answer
    is right by the task's first metric, None without a reference."""


def vote_outcome(
    run: Run, task: Any, samples: Sequence[Sample], predictions: Mapping[str, list[Prediction]]
) -> VoteOutcome | None:
    """Return the vote's outcome; None if there was no vote. `samples` are those with references."""
    vote = (run.manifest("infer") or {}).get("vote")
    if vote is None or VOTE not in predictions:
        return None
    recipe = run.recipe
    rows = read_jsonl(run.path("infer", "votes.jsonl"))
    scores = score_models(task, recipe, samples, {BASE: predictions[vote["best"]], VOTE: predictions[VOTE]})
    _, differences = overall_figures(scores)
    first = scores.models[VOTE].values[:, 0]
    right = {sample["id"]: bool(value >= 1.0) for sample, value in zip(samples, first, strict=True)}
    rows = [_first_round_line(row) for row in rows]
    # abstaining lowers agreement, but if all abstain there is no answer to disagree on
    split = [{**row, "right": right.get(row["id"])} for row in rows if row["answer"] and row["agreement"] < 1]
    return VoteOutcome(
        voters=[_voter(adapter, vote, rows) for adapter in recipe.train.adapters],
        decided_by=vote["decided by"],
        second_round=vote["second round"],
        agreement=round(100 * fmean(row["agreement"] for row in rows), 4),
        entropy=round(fmean(row["entropy"] for row in rows), 4),
        best=vote["best"],
        best_by="the best by validation" if vote["validation"] else "the first by name, as nothing was validated",
        over_best=differences[VOTE],
        disagreements=sorted(split, key=lambda row: (row["agreement"], -row["entropy"], row["id"])),
    )


def _first_round_line(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of votes.jsonl with the votes, agreement and entropy of the first round. In a second round, voters see
    each other's answers, so its agreement says little."""
    first = row.get("first_round", row)
    return {**row, **{name: first[name] for name in ("votes", "agreement", "entropy")}}


def _voter(adapter: Any, vote: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Voter:
    """An adapter's part in the vote. `vote` is that in infer's manifest, `rows` the lines of votes.jsonl."""
    name = adapter.name
    score = vote["validation"].get(name)
    votes = name in vote["weights"]
    given = [row["votes"].get(name) for row in rows]
    agreeing = [answer is not None and answer == row["answer"] for answer, row in zip(given, rows, strict=True)]
    return Voter(
        name=name,
        mix=adapter.mix,
        validation=None if score is None else round(100 * score, 4),
        weight=vote["weights"].get(name),
        agreement=round(100 * fmean(agreeing), 4) if votes else None,
        abstained=sum(answer is None for answer in given) if votes else 0,
    )
