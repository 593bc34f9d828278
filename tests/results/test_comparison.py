"""Runs side by side: paired differences, other test sets refused, and what is suspicious about answers."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len

from stages.contract.errors import UsageError
from stages.contract.files import digest_of
from stages.results.comparison import (
    EvaluatedRun,
    comparison_rows,
    outdated_interval_notes,
    prompt_differences,
    reference_model,
    refuse_incomparable_runs,
    suspicions,
)
from stages.results.comparison_table import comparison_tables
from stages.results.intervals import difference_figures
from stages.results.uncertainty import interval_text, is_clear

COUNT = 40

REFERENCES = [f"word {number}" for number in range(COUNT)]

Answers = Callable[[int], str | None]
"""What a model answers to sample number so-and-so; None is a failure."""


def right(number: int) -> str:
    return REFERENCES[number]


def every(nth: int, other: Answers = lambda number: f"wrong {number}") -> Answers:
    """Wrong in every nth sample."""
    return lambda number: other(number) if number % nth == 0 else right(number)


def run_of(name: str, models: dict[str, Answers], count: int = COUNT, **changes: Any) -> EvaluatedRun:
    """A run that is scored by exact match; four samples make a group. `changes` are fields, or `references`."""
    references = changes.pop("references", REFERENCES)
    together = changes.pop("together", lambda number: f"s{number}")
    sources = changes.pop("sources", lambda number: "main")
    lines = []
    for number in range(count):
        answers = {model: answer(number) for model, answer in models.items()}
        lines.append(
            {
                "id": f"s{number}",
                "group": f"g{number // 4}",
                "source": sources(number),
                "together": together(number),
                "references": digest_of([references[number]]),
                "models": {
                    model: {
                        "answer": answer,
                        "error": "no answer" if answer is None else None,
                        "scores": {"exact": float(answer == references[number])},
                    }
                    for model, answer in answers.items()
                },
            }
        )
    figures: dict[str, Any] = {}
    for model in models:
        values = np.array([line["models"][model]["scores"]["exact"] for line in lines])  # type: ignore[index]
        cell = {
            "value": 100 * values.mean(),
            "low": 0.0,
            "high": 100.0,
            "groups": count // 4,
            "n": count,
            "failed": 0,
            "empty": 0,
        }
        figures[model] = {"exact": cell}
    fields: dict[str, Any] = {"task": "words", "scoring": {}, "shown": {}, "base_model": "b" * 64, **changes}
    return EvaluatedRun(name, figures=figures, lines=lines, **fields)


def test_other_prompts_are_reported() -> None:
    first, other = (run_of(name, {"base": every(2)}, shown={"ocr": ocr}) for name, ocr in (("a", True), ("b", False)))
    assert prompt_differences([first, other]) == [
        "b has other prompts than a (preprocess.samples: ocr False instead of True)"
    ]
    assert prompt_differences([first, first]) == []


# -- differences ---------------------------------------------------------------------------------------------------


def test_all_are_compared_with_one_model_of_the_first_run() -> None:
    first = run_of("baseline", {"base": every(2), "default": every(4)})
    other = run_of("custom", {"base": every(2), "default": every(8), "more": right})
    rows = {(row.run, row.model): row for row in comparison_rows([first, other])}
    gains = {place: row.difference and row.difference["value"] for place, row in rows.items()}
    assert gains == {
        ("baseline", "base"): -25,
        ("baseline", "default"): None,
        ("custom", "base"): -25,
        ("custom", "default"): 12.5,
        ("custom", "more"): 25,
    }
    assert rows["custom", "more"].figure["value"] == 100
    assert rows["custom", "default"].same_answers == 87.5
    assert rows["baseline", "default"].same_answers is None


def test_the_difference_is_paired_and_its_interval_that_of_groups() -> None:
    first, other = (run_of(name, {"base": every(nth)}) for name, nth in (("a", 2), ("b", 8)))
    row = comparison_rows([first, other])[1]
    paired = np.array([float(number % 2 == 0 and number % 8 != 0) for number in range(COUNT)])
    (expected,) = difference_figures([(paired, [f"g{number // 4}" for number in range(COUNT)])])
    assert row.difference == expected
    assert (expected["value"], expected["groups"]) == (37.5, 10)
    assert is_clear(expected)  # b is never worse; unpaired the interval would include 0


def test_models_are_corrected_for_each_other() -> None:
    first, other = run_of("a", {"base": every(4)}), run_of("b", {"base": right})
    (alone,) = [row.difference for row in comparison_rows([first, other]) if row.difference]
    assert is_clear(alone)
    more = run_of("c", {name: every(4, lambda number: "x") for name in ("base", "v", "w", "x", "y", "z")})
    (together,) = [row.difference for row in comparison_rows([first, other, more]) if row.difference and row.run == "b"]
    assert together == {**alone, "p": pytest.approx(7 * alone["p"], abs=1e-5)}
    assert not is_clear(together)


def test_four_documents_are_too_few() -> None:
    first, other = (run_of(name, {"base": every(nth)}, count=16) for name, nth in (("a", 2), ("b", 8)))
    row = comparison_rows([first, other])[1]
    assert row.difference == {"value": 37.5, "low": None, "high": None, "groups": 4, "n": 16, "p": None}


def test_intervals_of_an_older_version_are_reported() -> None:
    first, other = run_of("a", {"base": every(2)}), run_of("b", {"base": every(2)})
    for figures in other.figures.values():
        del figures["exact"]["groups"]
    assert outdated_interval_notes([first, other]) == [
        "b: intervals by the resampling of eval.bootstrap, too narrow with few documents; run eval again"
    ]


def test_what_counts_together_is_compared_once() -> None:
    by_four: dict[str, Any] = {"together": lambda number: f"q{number // 4}"}
    first, other = run_of("a", {"base": every(4)}, **by_four), run_of("b", {"base": right}, **by_four)
    row = comparison_rows([first, other])[1]
    (expected,) = difference_figures([(np.ones(10), [f"g{number}" for number in range(10)])])
    assert row.difference == expected  # one wrong in each four: no question is right


def test_the_order_of_samples_does_not_matter() -> None:
    first, other = run_of("a", {"base": every(4)}), run_of("b", {"base": every(8)})
    turned = EvaluatedRun(**{**vars(other), "lines": other.lines[::-1]})
    refuse_incomparable_runs([first, turned])
    assert comparison_rows([first, other]) == comparison_rows([first, turned])


def test_the_vote_is_what_is_compared_with_where_there_is_one() -> None:
    assert reference_model(run_of("a", {"base": right, "vote": right, "x": right})) == "vote"
    assert reference_model(run_of("a", {"base": right, "x": right, "y": right})) == "x"
    assert reference_model(run_of("a", {"base": right})) == "base"


# -- other test sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"count": 39}, "1 of 40 samples are in only one of them"),
        ({"references": ["other", *REFERENCES[1:]]}, r"1 of 40 samples .*the first is 's0'"),
        ({"together": lambda number: "all"}, "40 of 40 samples"),
        ({"task": "numbers"}, "b: has task numbers, but a has words; compare runs of one task"),
        ({"scoring": {"normalization": "original"}}, "b: scored by other rules than a"),
    ],
)
def test_another_test_set_is_refused(changes: dict[str, Any], told: str) -> None:
    first, other = run_of("a", {"base": right}), run_of("b", {"base": right}, **changes)
    with pytest.raises(UsageError, match=told):
        refuse_incomparable_runs([first, run_of("c", {"base": right}), other])


# -- what is suspicious --------------------------------------------------------------------------------------------


def test_honest_runs_are_not_suspicious() -> None:
    first = run_of("a", {"base": every(2), "x": every(5)})
    other = run_of("b", {"base": every(2), "x": every(7), "perfect": right, "also perfect": right})
    assert suspicions([first, other]) == []


def test_two_models_with_the_same_wrong_answers_are() -> None:
    first, other = run_of("a", {"base": every(2), "x": every(5)}), run_of("b", {"base": every(2), "y": every(5)})
    assert suspicions([first, other]) == [
        "a/x and b/y: all 40 answers are identical, wrong ones included; check that they are two models"
    ]


def test_many_models_with_the_same_wrong_answers_are_named_together() -> None:
    models = {"base": every(2), "x": every(5), "y": every(5), "z": every(5), "u": every(3), "v": every(3)}
    told = "all 40 answers are identical, wrong ones included; check that they are"
    assert suspicions([run_of("a", models)]) == [
        f"a/x, a/y and a/z: {told} 3 models",
        f"a/u and a/v: {told} two models",
    ]


def test_one_base_model_answers_alike_and_another_does_not() -> None:
    first, other = run_of("a", {"base": every(5)}), run_of("b", {"base": every(5)})
    assert suspicions([first, other]) == []
    assert len(suspicions([first, run_of("b", {"base": every(5)}, base_model="c" * 64)])) == 1


def test_a_vote_may_follow_a_voter_but_an_adapter_not_base() -> None:
    assert suspicions([run_of("a", {"base": every(3), "vote": every(5), "x": every(5)})]) == []
    assert len(suspicions([run_of("a", {"base": every(5), "x": every(5)})])) == 1


def test_few_answers_to_many_questions_are_suspicious() -> None:
    words = ("text", "unknown", "3")
    found = suspicions([run_of("a", {"base": lambda number: words[number % 3]})])
    assert found == ["a/base: only 3 distinct answers among 40, and 40 distinct references; check its prompts"]


def test_letters_are_few_by_nature_but_not_one() -> None:
    letters = ["ABCD"[number % 4] for number in range(COUNT)]
    choosing = run_of("a", {"base": lambda number: "DCBA"[number % 4]}, references=letters)
    assert suspicions([choosing]) == []
    always = run_of("a", {"base": lambda number: "A"}, references=letters)
    assert suspicions([always]) == [
        "a/base: only 1 distinct answer among 40, and 4 distinct references; check its prompts"
    ]


def test_data_sets_are_looked_at_one_by_one() -> None:
    def halves(number: int) -> str:
        return "read" if number < 20 else "asked"

    simulated = run_of("a", {"base": lambda number: "text" if number < 20 else f"own {number}"}, sources=halves)
    assert suspicions([simulated]) == [
        "a/base: only 1 distinct answer among 20 of read, and 20 distinct references; check its prompts"
    ]


def test_where_everything_failed_it_is_reported() -> None:
    assert suspicions([run_of("a", {"base": right, "x": lambda number: None})]) == ["a/x: all 40 answers failed"]


def test_where_one_data_set_failed_that_is_reported() -> None:
    run = run_of(
        "a",
        {"base": right, "x": lambda number: None if number < 20 else right(number)},
        sources=lambda number: "read" if number < 20 else "asked",
    )
    assert suspicions([run]) == ["a/x: all 20 answers of read failed"]


def test_a_handful_of_answers_says_nothing() -> None:
    assert suspicions([run_of("a", {"base": lambda n: "x", "x": lambda n: "x"}, count=9)]) == []


def test_where_all_answers_are_empty_it_is_reported() -> None:
    run = run_of("a", {"base": right, "x": lambda number: " "})
    assert suspicions([run]) == ["a/x: all 40 answers are empty; check its prompts"]


# -- the table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_of_many_models_with_long_names_fit_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = ["an-adapter-with-a-very-long-name-of-its-own", "名字很长的一个适配器", *(f"mix-{n}" for n in range(7))]
    models = {"base": every(2), **{name: every(3 + place) for place, name in enumerate(names)}}
    runs = [run_of("一个中文名字的运行", models), run_of("another-run-with-a-long-name", models)]
    *tables, _ = comparison_tables(runs, coloured=False)
    lines = [line for table in tables for line in table.splitlines()]
    assert max(map(cell_len, lines)) <= width
    expected = Counter()
    for row in comparison_rows(runs):
        for figure, sign in ((row.figure, ""), (row.difference, "+")):
            if figure is not None:
                expected[interval_text(figure["value"], figure["low"], figure["high"], sign)] += 1
    assert Counter(re.findall(r"[+-]?\d+\.\d \[[^\]\n]*\]", "\n".join(lines))) == expected, "no figure is broken"


def test_a_difference_over_fewer_samples_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    first, other = run_of("a", {"base": every(2)}), run_of("b", {"base": every(3)})
    for line in other.lines[:20]:
        del line["models"]["base"]
    table, *_ = comparison_tables([other, first], coloured=False)
    (row,) = [line for line in table.splitlines() if line.split()[:2] == ["a", "base"]]
    assert " n 20 " in row
