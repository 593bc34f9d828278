"""The rules of the vote, for any ballots: no order matters, nothing invalid wins, one voter is no vote."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stages.infer.vote import Answers, Electorate, choose_greedily, decide

SAMPLES = 10
"""Validation samples behind a score: scores are fractions of them."""

names = st.sampled_from("abcdefghi")
ballots = st.dictionaries(names, st.sampled_from([None, "A", "B", "C", "D"]), min_size=1)
fractions = st.integers(0, SAMPLES).map(lambda right: right / SAMPLES)


@st.composite
def votes(draw: Any, weighted: bool | None = None) -> tuple[Answers, Electorate]:
    """A ballot and who votes with what; equal scores and weights of nothing are common."""
    ballot = draw(ballots)
    scores = {name: draw(fractions) for name in ballot}
    by_score = draw(st.booleans()) if weighted is None else weighted
    weights = {name: scores[name] if by_score else 1.0 for name in ballot}
    return ballot, Electorate(weights, scores)


def shuffled(mapping: Any, random: Any) -> Any:
    pairs = list(mapping.items())
    random.shuffle(pairs)
    return dict(pairs)


def electorate(ballot: Answers, **scores: float) -> Electorate:
    known = {name: scores.get(name, 0.5) for name in ballot}
    return Electorate(dict.fromkeys(ballot, 1.0), known)


# -- what the issue promises ---------------------------------------------------------------------------------------


@given(votes(), st.randoms(use_true_random=False))
def test_the_order_of_the_adapters_never_matters(vote: tuple[Answers, Electorate], random: Any) -> None:
    ballot, who = vote
    other = Electorate(shuffled(who.weights, random), shuffled(who.scores, random))
    assert decide(shuffled(ballot, random), other) == decide(ballot, who)
    assert other.ranking() == who.ranking()


@given(votes())
def test_an_invalid_vote_never_wins(vote: tuple[Answers, Electorate]) -> None:
    ballot, who = vote
    decision = decide(ballot, who)
    valid = {answer for answer in ballot.values() if answer is not None}
    if valid:
        assert decision.answer in valid
        assert set(decision.leading) <= valid
    else:
        assert (decision.answer, decision.by, decision.agreement, decision.leading) == (None, "nobody", 0.0, ())


@given(st.sampled_from([None, "A", "B"]), fractions, st.booleans())
def test_one_adapter_equals_no_vote(answer: str | None, score: float, weighted: bool) -> None:
    decision = decide({"a": answer}, Electorate({"a": score if weighted else 1.0}, {"a": score}))
    assert decision.answer == answer
    assert decision.by == ("nobody" if answer is None else "majority")
    assert (decision.agreement, decision.entropy) == (0.0 if answer is None else 1.0, 0.0)


@given(votes())
def test_an_abstention_changes_no_vote(vote: tuple[Answers, Electorate]) -> None:
    ballot, who = vote
    valid = {name: answer for name, answer in ballot.items() if answer is not None}
    assume(valid)
    without = Electorate({name: who.weights[name] for name in valid}, {name: who.scores[name] for name in valid})
    with_all, with_valid = decide(ballot, who), decide(valid, without)
    assert (with_all.answer, with_all.by, with_all.leading) == (with_valid.answer, with_valid.by, with_valid.leading)
    assert with_all.entropy == with_valid.entropy
    assert with_all.agreement == pytest.approx(with_valid.agreement * len(valid) / len(ballot)), "but counts as a voter"


@given(votes(), st.sampled_from([0.001, 1 / 3, 3.0, 7.0, 1000.0]))
def test_scaling_all_weights_changes_nothing(vote: tuple[Answers, Electorate], factor: float) -> None:
    ballot, who = vote
    scaled = Electorate({name: weight * factor for name, weight in who.weights.items()}, who.scores)
    assert decide(ballot, scaled) == decide(ballot, who)


# -- majorities and ties -------------------------------------------------------------------------------------------


@given(votes(weighted=False))
def test_a_majority_is_more_than_half_of_the_valid_votes(vote: tuple[Answers, Electorate]) -> None:
    ballot, who = vote
    tally = Counter(answer for answer in ballot.values() if answer is not None)
    assume(tally)
    decision = decide(ballot, who)
    (first, most), *rest = tally.most_common()
    assert (decision.by == "majority") == (2 * most > tally.total())
    if not rest or rest[0][1] < most:
        assert decision.answer == first
        assert decision.by in ("majority", "plurality")
    else:
        assert decision.by in ("better voters", "best adapter")
        assert tally[decision.answer] == most


@given(votes())
def test_the_answer_has_the_most_weight_and_of_those_the_better_voters(vote: tuple[Answers, Electorate]) -> None:
    """Counted in whole validation samples, which no rounding touches."""
    ballot, who = vote
    valid = {name: answer for name, answer in ballot.items() if answer is not None}
    assume(valid)
    scores = {name: round(SAMPLES * who.scores[name]) for name in valid}
    weights = {name: round(SAMPLES * who.weights[name]) for name in valid}
    if not any(weights.values()):
        weights = dict.fromkeys(valid, 1)

    def total(answer: str, of: dict[str, int]) -> int:
        return sum(of[name] for name, given in valid.items() if given == answer)

    decision = decide(ballot, who)
    assert decision.answer is not None
    first = max(total(answer, weights) for answer in valid.values())
    leading = {answer for answer in valid.values() if total(answer, weights) == first}
    assert decision.answer in leading
    assert (decision.by == "majority") == (len(leading) == 1 and 2 * first > sum(weights.values()))
    if len(leading) > 1:
        best = max(total(answer, scores) for answer in leading)
        better = {answer for answer in leading if total(answer, scores) == best}
        assert decision.answer in better
        assert (decision.by == "better voters") == (len(better) == 1)
        if len(better) > 1:
            ranked = [name for name in who.ranking() if valid.get(name) in better]
            assert decision.answer == valid[ranked[0]]


def test_a_tie_goes_to_the_voters_with_the_higher_sum_of_scores() -> None:
    ballot = {"a": "A", "b": "A", "c": "B", "d": "B"}
    decision = decide(ballot, electorate(ballot, a=0.9, b=0.1, c=0.6, d=0.6))
    assert (decision.answer, decision.by) == ("B", "better voters"), "together, though the best one says A"


def test_a_tie_of_equal_sums_goes_to_the_best_single_adapter() -> None:
    ballot = {"a": "A", "b": "A", "c": "B", "d": "B"}
    decision = decide(ballot, electorate(ballot, a=0.5, b=0.5, c=0.2, d=0.8))
    assert (decision.answer, decision.by) == ("B", "best adapter")
    alike = {"b": "B", "a": "A"}
    level = decide(alike, electorate(alike))
    assert (level.answer, level.by) == ("A", "best adapter"), "of equally good ones the first by name"


def test_the_best_adapter_decides_no_tie_between_answers_of_others() -> None:
    ballot = {"a": "A", "b": "A", "c": "B", "d": "B", "e": "C", "f": None}
    decision = decide(ballot, electorate(ballot, e=0.9, f=1.0, c=0.7, d=0.3))
    assert (decision.answer, decision.by) == ("B", "best adapter")


def test_exactly_half_is_no_majority() -> None:
    ballot = {"a": "A", "b": "A", "c": "B", "d": "C"}
    assert decide(ballot, electorate(ballot)).by == "plurality"
    assert decide({**ballot, "e": "A"}, electorate({**ballot, "e": "A"})).by == "majority"


@pytest.mark.parametrize(
    ("one", "others"), [(0.3, (0.1, 0.2)), (0.8, (0.1, 0.7)), (2 / 3, (1 / 3, 1 / 3)), (1 / 6, (1 / 12, 1 / 12))]
)
def test_sums_that_differ_by_rounding_only_are_a_tie(one: float, others: tuple[float, float]) -> None:
    weights = {"a": one, "b": others[0], "c": others[1]}
    tie = decide({"a": "A", "b": "B", "c": "B"}, Electorate(weights, dict.fromkeys("abc", 0.5)))
    assert (tie.answer, tie.by) == ("B", "better voters")
    assert decide({"a": "A", "b": "B", "c": "C"}, Electorate(weights, weights)).by == "plurality", "exactly half"


def test_weights_that_are_all_zero_count_equally() -> None:
    ballot = {"a": "A", "b": "B", "c": "B"}
    nothing, alike = dict.fromkeys(ballot, 0.0), dict.fromkeys(ballot, 1.0)
    decision = decide(ballot, Electorate(nothing, nothing))
    assert decision == decide(ballot, Electorate(alike, nothing))
    assert decision.answer == "B", "not that of the first by name"


def test_a_weight_of_zero_never_outvotes_another() -> None:
    ballot = {"a": "A", "b": "B", "c": "B"}
    weights = {"a": 0.1, "b": 0.0, "c": 0.0}
    decision = decide(ballot, Electorate(weights, weights))
    assert (decision.answer, decision.by) == ("A", "majority")


def test_only_the_electorate_votes() -> None:
    assert decide({"a": "A", "b": "B", "c": "B"}, Electorate({"a": 1.0}, {"a": 0.1, "b": 0.9, "c": 0.9})).answer == "A"


# -- agreement, entropy, leading answers ----------------------------------------------------------------------------


@given(votes())
def test_agreement_and_entropy_are_in_their_ranges(vote: tuple[Answers, Electorate]) -> None:
    ballot, who = vote
    decision = decide(ballot, who)
    tally = Counter(answer for answer in ballot.values() if answer is not None)
    assert decision.agreement == (tally[decision.answer] / len(ballot) if decision.answer else 0.0)
    assert 0.0 <= decision.entropy <= math.log2(max(len(tally), 1)) + 1e-12
    assert (decision.entropy == 0.0) == (len(tally) <= 1)


def test_entropy_is_in_bits_and_agreement_is_of_all() -> None:
    ballot = {"a": "A", "b": "A", "c": "B", "d": "B", "e": None}
    decision = decide(ballot, electorate(ballot))
    assert decision.entropy == pytest.approx(1.0)
    assert decision.agreement == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("given", "leading"),
    [
        ("AABC", ("A", "B", "C")),
        ("AABBC", ("A", "B")),
        ("AAABBC", ("A", "B")),
        ("ABC", ("A", "B", "C")),
        ("BBA", ("A", "B")),
        ("AAA", ("A",)),
    ],
)
def test_the_leading_answers_are_the_first_and_if_that_is_one_the_second(given: str, leading: tuple[str, ...]) -> None:
    ballot = dict(zip("uvwxyz", given, strict=False))
    assert decide(ballot, electorate(ballot)).leading == leading


@given(votes())
def test_the_answer_is_always_among_the_leading(vote: tuple[Answers, Electorate]) -> None:
    ballot, who = vote
    decision = decide(ballot, who)
    assert decision.leading == tuple(sorted(set(decision.leading)))
    assert decision.answer is None or decision.answer in decision.leading
    if decision.by in ("plurality", "better voters", "best adapter"):
        assert len(decision.leading) > 1, "there is something to vote on again"


# -- the greedy choice ---------------------------------------------------------------------------------------------


@st.composite
def validations(draw: Any) -> tuple[list[dict[str, str | None]], list[dict[str, float]], dict[str, float]]:
    """Answers of some adapters to validation samples, which of them are right, and the adapters' scores."""
    adapters = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    answers = [
        {name: draw(st.sampled_from([None, "A", "B", "C"])) for name in adapters}
        for _ in range(draw(st.integers(1, SAMPLES)))
    ]
    right = [{draw(st.sampled_from("ABC")): 1.0} for _ in answers]
    scores = {name: sum(scored(answers, right, name)) / len(answers) for name in adapters}
    return answers, right, scores


def scored(answers: Any, right: Any, name: str) -> list[float]:
    return [known.get(given[name] or "", 0.0) for given, known in zip(answers, right, strict=True)]


def score_of(voters: list[str], answers: Any, right: Any, scores: dict[str, float], weighted: bool) -> float:
    who = Electorate({name: scores[name] if weighted else 1.0 for name in voters}, scores)
    decisions = [decide(each, who).answer for each in answers]
    return sum(known.get(answer or "", 0.0) for known, answer in zip(right, decisions, strict=True)) / len(answers)


@given(validations(), st.booleans(), st.randoms(use_true_random=False))
def test_the_greedy_choice_does_not_depend_on_any_order(validation: Any, weighted: bool, random: Any) -> None:
    answers, right, scores = validation
    expected = choose_greedily(answers, right, scores, weighted)
    order = list(range(len(answers)))
    random.shuffle(order)
    again = choose_greedily(
        [shuffled(answers[place], random) for place in order],
        [right[place] for place in order],
        shuffled(scores, random),
        weighted,
    )
    assert again == expected


@given(validations(), st.booleans())
def test_the_electorate_is_never_worse_than_the_best_single_adapter(validation: Any, weighted: bool) -> None:
    answers, right, scores = validation
    voters, path = choose_greedily(answers, right, scores, weighted)
    best = sorted(scores, key=lambda name: (-scores[name], name))[0]
    assert voters[0] == best
    assert path[0] == pytest.approx(scores[best]), "the first one alone: no vote"
    assert len(path) == len(scores), "all were tried"
    assert len(set(voters)) == len(voters) and set(voters) <= set(scores)
    found = score_of(voters, answers, right, scores, weighted)
    assert found == pytest.approx(path[len(voters) - 1]) == pytest.approx(max(path))
    assert found >= scores[best] - 1e-12
    assert all(score < max(path) for score in path[len(voters) :]), "of equally good ones the largest"


@given(validations(), st.booleans())
def test_each_step_adds_the_adapter_that_gives_the_best_vote(validation: Any, weighted: bool) -> None:
    answers, right, scores = validation
    voters, path = choose_greedily(answers, right, scores, weighted)
    for size in range(1, len(voters)):
        others = [name for name in scores if name not in voters[:size]]
        tried = [score_of([*voters[:size], name], answers, right, scores, weighted) for name in others]
        assert path[size] == pytest.approx(max(tried))


def test_three_with_different_errors_beat_one_and_a_harmful_adapter_is_left_out() -> None:
    """Each of three is wrong on another of three samples; two are always wrong, as many as can outvote nobody."""
    answers = [
        {name: "B" if name in (wrong, "x", "y") else "A" for name in ("one", "two", "three", "x", "y")}
        for wrong in ("one", "two", "three")
    ]
    scores = {"one": 2 / 3, "two": 2 / 3, "three": 2 / 3, "x": 0.0, "y": 0.0}
    voters, path = choose_greedily(answers, [{"A": 1.0}] * 3, scores, weighted=False)
    assert path == pytest.approx([2 / 3, 2 / 3, 1.0, 1.0, 0.0]), "the second voter never outvotes the first"
    assert voters == ["one", "three", "two", "x"], "of equally good electorates the largest"


def test_without_samples_all_vote() -> None:
    assert choose_greedily([], [], {"b": 0.0, "a": 0.0}, weighted=False) == (["a", "b"], [0.0, 0.0])
