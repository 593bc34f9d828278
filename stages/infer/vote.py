"""How adapters vote on an answer. The order of the adapters in the recipe has no effect.

An adapter without a valid answer abstains. The answer with the largest sum of weights wins. In a tie, the answer whose
voters have the higher sum of scores wins, then the answer of the best single adapter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Answers = Mapping[str, str | None]
"""Each adapter's answer by its name; None if it has no valid answer."""

By = Literal["majority", "plurality", "better voters", "best adapter", "nobody"]


@dataclass(frozen=True)
class Decision:
    """The result of a vote."""

    answer: str | None
    """The answer that won; None if all voters abstained."""
    by: By
    """What decided: `majority`, more than half of the weight of the valid votes; `plurality`, the most weight; `better
    voters` or `best adapter`, a tie; `nobody`, no valid vote."""
    agreement: float
    """Share of the voters that gave this answer, 0..1. Voters that abstain count."""
    entropy: float
    """Entropy of the valid votes, unweighted, in bits; 0 if all agree."""
    leading: tuple[str, ...]
    """The sorted answers that a second round would choose from: those with the most weight and, if that is only one,
    those with the second most."""


@dataclass(frozen=True)
class Electorate:
    """The voters and the weights of their votes."""

    weights: Mapping[str, float]
    """The weight of each voter's vote, by name. If all who do not abstain have weight 0, each of them gets weight 1."""
    scores: Mapping[str, float]
    """Each adapter's mean score on the validation samples, 0..1; all equal without validation samples."""

    def ranking(self) -> list[str]:
        """The names of the voters, the best score first; equal scores are sorted by name."""
        return sorted(self.weights, key=lambda name: (-self.scores[name], name))


def decide(answers: Answers, electorate: Electorate) -> Decision:
    """Count the votes on one sample. Returns the result. `answers` must have every voter's answer."""
    votes = {name: answer for name in electorate.weights if (answer := answers[name]) is not None}
    if not votes:
        return Decision(None, "nobody", 0.0, 0.0, ())
    weights = electorate.weights if any(electorate.weights[name] for name in votes) else dict.fromkeys(votes, 1.0)
    totals = {answer: _total_weight(votes, answer, weights) for answer in set(votes.values())}
    most = max(totals.values())
    tied = {answer for answer, total in totals.items() if total == most}
    others = _rounded_sum(weights[name] for name, answer in votes.items() if answer not in tied)
    by: By = "majority" if most > others else "plurality"
    if len(tied) > 1:
        together = {answer: _total_weight(votes, answer, electorate.scores) for answer in tied}
        best = {answer for answer in tied if together[answer] == max(together.values())}
        by = "better voters" if len(best) == 1 else "best adapter"
        tied = best if len(best) == 1 else {next(votes[n] for n in electorate.ranking() if votes.get(n) in best)}
    (answer,) = tied
    given = [list(votes.values()).count(each) for each in totals]
    return Decision(
        answer=answer,
        by=by,
        agreement=list(votes.values()).count(answer) / len(electorate.weights),
        entropy=abs(math.fsum(n / len(votes) * math.log2(n / len(votes)) for n in sorted(given))),
        leading=_leading_answers(totals),
    )


def _total_weight(votes: Mapping[str, str], answer: str, weights: Mapping[str, float]) -> float:
    """The sum of the weights of the voters that gave this answer."""
    return _rounded_sum(weights[name] for name, given in votes.items() if given == answer)


def _rounded_sum(values: Iterable[float]) -> float:
    """The sum of the values, rounded to 12 decimals: neither their order nor rounding errors can break a tie."""
    return round(math.fsum(values), 12)


def _leading_answers(totals: Mapping[str, float]) -> tuple[str, ...]:
    """The answers that a second round would choose from: see `Decision.leading`. `totals` has each answer's weight."""
    levels = sorted(set(totals.values()), reverse=True)
    first = [answer for answer, total in totals.items() if total == levels[0]]
    second = [answer for answer, total in totals.items() if len(levels) > 1 and total == levels[1]]
    return tuple(sorted(first if len(first) > 1 else first + second))


def choose_greedily(
    answers: Sequence[Answers], right: Sequence[Mapping[str, float]], scores: Mapping[str, float], weighted: bool
) -> tuple[list[str], list[float]]:
    """Choose the adapters whose vote is best on the validation samples, by forward selection (Caruana et al. 2004,
    'Ensemble selection from libraries of models').

    Returns the voters in the order in which they were added, and the vote's score (0..1) after each step, until all
    adapters are added. `answers` has the adapters' answers to each sample, `right` the score (0..1) of each of these
    answers, and `scores` each adapter's mean score. With `weighted`, a vote's weight is its adapter's score, else 1.

    The selection starts with the best single adapter. Each step adds the adapter with which the vote scores best; among
    equals, the adapter with the highest score of its own, then the first by name. A step that does not help does not
    end the selection, because a second voter can never outvote the first. The voters are those chosen up to the best
    step. If several steps are equally good, the last of them counts, because the errors of more voters even out. No
    adapter votes twice.
    """
    left = sorted(scores, key=lambda name: (-scores[name], name))
    chosen: list[str] = []
    path: list[float] = []

    def score_with(name: str) -> float:
        """The sum of the vote's scores over all samples, with `name` as one more voter."""
        voters = [*chosen, name]
        electorate = Electorate({each: scores[each] if weighted else 1.0 for each in voters}, scores)
        decisions = [decide(each, electorate).answer for each in answers]
        return math.fsum(known.get(answer or "", 0.0) for known, answer in zip(right, decisions, strict=True))

    while left:
        best = max(left, key=score_with) if chosen else left[0]  # at equal scores, the first in `left`
        path.append(score_with(best) / max(len(answers), 1))
        chosen.append(best)
        left.remove(best)
    size = max(range(len(path)), key=lambda place: (path[place], place)) + 1
    return chosen[:size], path
