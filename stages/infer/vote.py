"""How adapters vote on an answer. Nothing here depends on the order in which they are listed.

An adapter that gave no valid answer does not vote. The answer with the most votes (or the most weight) wins; a tie goes
to the answer whose voters are together the better ones, then to that of the best single adapter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Answers = Mapping[str, str | None]
"""What each adapter answers, None where it has no valid answer."""

By = Literal["majority", "plurality", "better voters", "best adapter", "nobody"]


@dataclass(frozen=True)
class Decision:
    """What came of a vote."""

    answer: str | None
    """None where nobody voted."""
    by: By
    """`majority`: of more than half of the valid votes; `plurality`: of the most; the others decide ties."""
    agreement: float
    """Share of all voters, abstentions included, that gave this answer."""
    entropy: float
    """Of the valid votes, unweighted, in bits; 0 where all are alike."""
    leading: tuple[str, ...]
    """The answers to choose between again where there is no majority: those with the most votes, and with the next most
    where that is one alone. Sorted."""


@dataclass(frozen=True)
class Electorate:
    """Who votes and what for."""

    weights: Mapping[str, float]
    """What each adapter's vote counts; its keys are the voters. Where all that vote count nothing, they count alike."""
    scores: Mapping[str, float]
    """How good each adapter is on the validation samples, in 0..1; equal ones where that is not known."""

    def ranking(self) -> list[str]:
        """The voters, the best first; equally good ones by name."""
        return sorted(self.weights, key=lambda name: (-self.scores[name], name))


def decide(answers: Answers, electorate: Electorate) -> Decision:
    """Hold the vote."""
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
    """In whatever order; scores are fractions, and what is equal but for the rounding of 1/10 is a tie."""
    return round(math.fsum(values), 12)


def _leading(totals: Mapping[str, float]) -> tuple[str, ...]:
    levels = sorted(set(totals.values()), reverse=True)
    first = [answer for answer, total in totals.items() if total == levels[0]]
    second = [answer for answer, total in totals.items() if len(levels) > 1 and total == levels[1]]
    return tuple(sorted(first if len(first) > 1 else first + second))


def chosen_greedily(
    answers: Sequence[Answers], right: Sequence[Mapping[str, float]], scores: Mapping[str, float], weighted: bool
) -> tuple[list[str], list[float]]:
    """Which adapters should vote, by how well they would have on the validation samples.

    The best single adapter begins; then always the one is added with which the vote is best (equally good ones by
    score, then by name), until all are in. Of the electorates on the way the best one is chosen, of equally good ones
    the largest: errors of more voters even out. An adapter is never in it twice. (Forward selection as by Caruana et
    al. 2004, 'Ensemble selection from libraries of models', without stopping at the first step that does not help:
    the second voter never outvotes the first.)

    `right` has the score in 0..1 of every answer that any adapter gave to a sample. Returns the voters in the order in
    which they came in, and the vote's score with each of them.
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
