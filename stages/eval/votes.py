"""What the adapters' vote was like: who voted, how far they agree, and whether it is better than the best of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stages.contract.files import read_jsonl
from stages.contract.records import BASE, VOTE, Prediction, Sample
from stages.contract.stage import Stage
from stages.eval.scores import overall, score_models
from stages.results.intervals import Figures


@dataclass(frozen=True)
class Voter:
    """An adapter, and its part in the vote."""

    name: str
    mix: str
    """Its data mix in words."""
    validation: float | None
    """Its score on the validation samples in percent, by which adapters are chosen, weighed and ranked."""
    weight: float | None
    """What its vote counts; None where it does not vote."""
    agreement: float | None
    """Percent of the samples on which its own answer is the vote's; None where it does not vote."""
    abstained: int


@dataclass(frozen=True)
class VoteReport:
    """The vote on all test samples, also on those without a reference."""

    voters: list[Voter]
    decided_by: dict[str, int]
    second_round: int
    """Samples that were asked again."""
    agreement: float
    """Mean share of the voters that gave the first round's answer, in percent."""
    entropy: float
    """Mean entropy of the first round's votes, in bits."""
    best: str
    """The voter with the best validation score, never chosen by the test set; without validation the first by name."""
    best_by: str
    """How it was chosen, in words."""
    over_best: Figures
    """By how much the vote is better than that one, paired, with intervals."""
    disagreements: list[dict[str, Any]]
    """Lines of votes.jsonl in whose first round the voters did not all give the same answer, the least agreement first.
    `votes`, `agreement` and `entropy` are the first round's, `answer` and `by` what was decided; `right` is whether
    that was right by the task's first metric, or None without a reference."""


def vote_report(
    stage: Stage, task: Any, samples: Sequence[Sample], predictions: Mapping[str, list[Prediction]]
) -> VoteReport | None:
    """The vote's report, if there was one. `samples` are those with references."""
    held = (stage.run.manifest("infer") or {}).get("vote")
    if held is None or VOTE not in predictions:
        return None
    recipe = stage.run.recipe
    rows = read_jsonl(stage.run.path("infer", "votes.jsonl"))
    scores = score_models(task, recipe, samples, {BASE: predictions[held["best"]], VOTE: predictions[VOTE]})
    _, differences = overall(scores, recipe.eval.bootstrap, recipe.seed)
    first = scores.models[VOTE].values[:, 0]
    right = {sample["id"]: bool(value >= 1.0) for sample, value in zip(samples, first, strict=True)}
    rows = [_by_first_round(row) for row in rows]
    # who abstains does not agree; where all do, there is no answer to disagree on
    split = [{**row, "right": right.get(row["id"])} for row in rows if row["answer"] and row["agreement"] < 1]
    return VoteReport(
        voters=[_voter(adapter, held, rows) for adapter in recipe.train.adapters],
        decided_by=held["decided by"],
        second_round=held["second round"],
        agreement=round(100 * fmean(row["agreement"] for row in rows), 4),
        entropy=round(fmean(row["entropy"] for row in rows), 4),
        best=held["best"],
        best_by="the best by validation" if held["validation"] else "the first by name, as nothing was validated",
        over_best=differences[VOTE],
        disagreements=sorted(split, key=lambda row: (row["agreement"], -row["entropy"], row["id"])),
    )


def _by_first_round(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of votes.jsonl with what the voters said by themselves: a second round makes them agree."""
    first = row.get("first_round", row)
    return {**row, **{name: first[name] for name in ("votes", "agreement", "entropy")}}


def _voter(adapter: Any, held: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Voter:
    name = adapter.name
    score = held["validation"].get(name)
    votes = name in held["weights"]
    given = [row["votes"].get(name) for row in rows]
    agreeing = [answer is not None and answer == row["answer"] for answer, row in zip(given, rows, strict=True)]
    return Voter(
        name=name,
        mix=adapter.mix,
        validation=None if score is None else round(100 * score, 4),
        weight=held["weights"].get(name),
        agreement=round(100 * fmean(agreeing), 4) if votes else None,
        abstained=sum(answer is None for answer in given) if votes else 0,
    )
