"""How adapters vote on an answer. The order in which they are listed has no effect.

An adapter without a valid answer abstains. The answer with the most votes, or the most weight, wins. A tie goes to the
answer whose voters have the higher sum of scores, then to the answer of the best single adapter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Answers = Mapping[str, str | None]
"""The answer of each adapter; None if it is not valid."""

By = Literal["majority", "plurality", "better voters", "best adapter", "nobody"]


@dataclass(frozen=True)
class Decision:
    """The result of a vote."""

    answer: str | None
    """None if nobody voted."""
    by: By
    """`majority`: more than half of the valid votes; `plurality`: the most votes; the others decide ties."""
    agreement: float
    """Share of all voters, abstentions included, that gave this answer."""
    entropy: float
    """Of the valid votes, unweighted, in bits; 0 if all are equal."""
    leading: tuple[str, ...]
    """The answers of a second round: those with the most votes, and those with the second most if the first is one
    alone. Sorted."""


@dataclass(frozen=True)
class Electorate:
    """The voters and what their votes count."""

    weights: Mapping[str, float]
    """What each voter's vote counts. If the votes of all that do not abstain count 0, they count 1 each."""
    scores: Mapping[str, float]
    """Each adapter's mean score on the validation samples, in 0..1; equal if it is not known."""

    def ranking(self) -> list[str]:
        """The voters, best score first; equal ones by name."""
        return sorted(self.weights, key=lambda name: (-self.scores[name], name))


def decide(answers: Answers, electorate: Electorate) -> Decision:
    """The vote on one sample. `answers` has every voter."""
    votes = {name: answer for name in electorate.weights if (answer := answers[name]) is not None}
    if not votes:
        return Decision(None, "nobody", 0.0, 0.0, ())
    weights = electorate.weights if any(electorate.weights[name] for name in votes) else dict.fromkeys(votes, 1.0)
    totals = {answer: _total(votes, answer, weights) for answer in set(votes.values())}
    most = max(totals.values())
    tied = {answer for answer, total in totals.items() if total == most}
    others = _sum(weights[name] for name, answer in votes.items() if answer not in tied)
    by: By = "majority" if most > others else "plurality"
    if len(tied) > 1:
        together = {answer: _total(votes, answer, electorate.scores) for answer in tied}
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
        leading=_leading(totals),
    )


def _total(votes: Mapping[str, str], answer: str, weights: Mapping[str, float]) -> float:
    return _sum(weights[name] for name, given in votes.items() if given == answer)


def _sum(values: Iterable[float]) -> float:
    """The same in any order. Sums that differ only by rounding, as of 1/10, are a tie."""
    return round(math.fsum(values), 12)


def _leading(totals: Mapping[str, float]) -> tuple[str, ...]:
    levels = sorted(set(totals.values()), reverse=True)
    first = [answer for answer, total in totals.items() if total == levels[0]]
    second = [answer for answer, total in totals.items() if len(levels) > 1 and total == levels[1]]
    return tuple(sorted(first if len(first) > 1 else first + second))


def choose_greedily(
    answers: Sequence[Answers], right: Sequence[Mapping[str, float]], scores: Mapping[str, float], weighted: bool
) -> tuple[list[str], list[float]]:
    """Choose the adapters whose vote is best on the validation samples, by forward selection (Caruana et al. 2004,
    'Ensemble selection from libraries of models').

    It starts with the best single adapter and adds the one that gives the best vote (of equal ones the better, then by
    name), until all are in. It does not stop at the first step that does not help, since a second voter never outvotes
    the first. It returns the best electorate on the way, of equal ones the largest, because more voters' errors even
    out. No adapter votes twice.

    `answers` has each sample's answers, `right` the score in 0..1 of each of them, `scores` each adapter's mean score.
    Returns the voters in the order in which they were added, and the vote's score with each adapter added, in 0..1.
    """
    left = sorted(scores, key=lambda name: (-scores[name], name))
    chosen: list[str] = []
    path: list[float] = []

    def score_with(name: str) -> float:
        voters = [*chosen, name]
        electorate = Electorate({each: scores[each] if weighted else 1.0 for each in voters}, scores)
        decisions = [decide(each, electorate).answer for each in answers]
        return math.fsum(known.get(answer or "", 0.0) for known, answer in zip(right, decisions, strict=True))

    while left:
        best = max(left, key=score_with) if chosen else left[0]  # the first of equally good ones
        path.append(score_with(best) / max(len(answers), 1))
        chosen.append(best)
        left.remove(best)
    size = max(range(len(path)), key=lambda place: (path[place], place)) + 1
    return chosen[:size], path
