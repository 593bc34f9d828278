"""MMBench: reading the TSV, circular groups and answers worked by hand, and the upload."""

import base64
import csv
import io
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openpyxl
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contract.errors import DataError
from stages.contract.recipe import load_recipe
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.eval.scores import breakdown, overall_figures, score_models
from stages.tasks import better_synth
from stages.tasks.better_synth.mmbench import (
    ASKS,
    ASKS_IN_CHINESE,
    LETTERS,
    MMBenchRow,
    has_rotations,
    incomplete_questions,
    picture_bytes,
    prompt,
    read_rows,
    rounds,
    upload_row,
    write_xlsx,
)
from stages.tasks.common.json_lines import BadRecordError
from tests.conftest import REPOSITORY
from tests.eval.conftest import answer

PICTURE = base64.b64encode(bytes(range(256))).decode()
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
COLUMNS += ["comment", "split"]


def tsv(path: Path, rows: list[dict[str, Any]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def line(index: int, options: str = "cat dog bird", right: str = "A", **changes: Any) -> dict[str, Any]:
    texts = dict(zip(LETTERS, options.split(), strict=False))
    held = {"index": index, "question": f"What is in picture {index}?", "answer": right, "image": PICTURE}
    return {**held, "category": "animal", "l2-category": "coarse", "split": "dev", **texts, **changes}


Skipped = list[tuple[str, ...]]


def read(path: Path) -> tuple[list[MMBenchRow], Skipped]:
    skipped: Skipped = []
    return list(read_rows(path, lambda *why: skipped.append(why))), skipped


def row_of(options: str, right: str | None = "A", index: int = 5) -> MMBenchRow:
    texts = tuple(options.split())
    return MMBenchRow(index, "What is it?", "", texts, right, "c", "l", PICTURE, {}, "x.tsv:2")


# -- the TSV -------------------------------------------------------------------------------------------------------


def test_rows_are_read_unchanged(tmp_path: Path) -> None:
    rows = [
        line(5, hint="Look\tclosely.", question='He said "no"\nand left?'),
        line(6, "红 蓝", "B", question="什么颜色？", hint="nan"),
        line(7, "x y z w", "D", image="5"),
    ]
    found, skipped = read(tsv(tmp_path / "dev.tsv", rows))
    assert skipped == []
    assert found[0].question == 'He said "no"\nand left?'
    assert (found[0].hint, found[0].options, found[0].answer) == ("Look\tclosely.", ("cat", "dog", "bird"), "A")
    assert picture_bytes(found[0]) == bytes(range(256))
    assert (found[1].options, found[1].hint, found[1].question) == (("红", "蓝"), "", "什么颜色？")
    assert [row.picture_of for row in found] == [5, 6, 5]
    assert [row.where for row in found] == ["dev.tsv:3", "dev.tsv:4", "dev.tsv:5"]
    assert (found[0].category, found[0].l2_category) == ("animal", "coarse")


EMPTY = ["", " ", "nan", "NaN", "None", "none", "NA", "N/A", "n/a", "null", "NULL", "#N/A", "<NA>", "-nan"]


@pytest.mark.parametrize("empty", EMPTY)
def test_options_end_at_the_first_empty_one(tmp_path: Path, empty: str) -> None:
    found, _ = read(tsv(tmp_path / "a.tsv", [line(1, "w x y z", C=empty)]))
    assert found[0].options == ("w", "x")


@pytest.mark.parametrize("empty", EMPTY)
def test_empty_cells_are_empty_in_every_column(tmp_path: Path, empty: str) -> None:
    path = tsv(
        tmp_path / "a.tsv", [line(1, hint=empty, answer=empty, category=empty, split=empty), line(2, image=empty)]
    )
    (found,), skipped = read(path)
    assert (found.hint, found.answer, found.category, found.uploaded["split"]) == ("", None, "", "")
    assert [why[:2] for why in skipped] == [("a.tsv:3", "no image")]


def test_cells_are_empty_where_pandas_reads_them_as_empty(tmp_path: Path) -> None:
    words = [*EMPTY, "Na", "N.A.", "Null", "no", "0", "-", "+nan", "-1.#IND", "1.#QNAN", "cat"]
    path = tsv(tmp_path / "a.tsv", [line(number, hint=word) for number, word in enumerate(words)])
    hints = [row.hint for row in read(path)[0]]
    by_pandas = pandas.read_csv(path, sep="\t")["hint"]
    for word, hint, cell in zip(words, hints, by_pandas, strict=True):
        if pandas.isna(cell):
            assert hint == "", word
        elif word.strip().lower() not in ("", "none", "nan"):  # these are empty for LLaVA's reader
            assert hint == word


@pytest.mark.parametrize("right", ["Ｂ", "b", " B ", "ｂ"])
def test_a_right_letter_of_any_width_and_case_is_read(tmp_path: Path, right: str) -> None:
    assert read(tsv(tmp_path / "a.tsv", [line(1, right=right)]))[0][0].answer == "B"


def test_a_row_without_an_answer_is_not_scored(tmp_path: Path) -> None:
    columns = [name for name in COLUMNS if name not in ("answer", "hint", "comment")]
    held = {name: value for name, value in line(1).items() if name in columns}
    found, skipped = read(tsv(tmp_path / "test.tsv", [held], columns))
    assert (found[0].answer, found[0].hint, skipped) == (None, "", [])
    assert {turned.answer for turned in rounds(found[0])} == {None}


def test_unusable_rows_are_skipped_with_their_lines(tmp_path: Path) -> None:
    bad = [
        {**line(1), "index": "one"},
        line(2, question=""),
        line(3, image=""),
        line(4, "only"),
        line(5, right="D"),
        line(6),
        line(6),
    ]
    found, skipped = read(tsv(tmp_path / "a.tsv", bad))
    assert [row.index for row in found] == [6]
    assert [why[:2] for why in skipped] == [
        ("a.tsv:2", "index is not a number"),
        ("a.tsv:3", "no question"),
        ("a.tsv:4", "no image"),
        ("a.tsv:5", "fewer than two options"),
        ("a.tsv:6", "answer is not an option"),
        ("a.tsv:8", "duplicate index"),
    ]
    with pytest.raises(BadRecordError):
        picture_bytes(replace(found[0], image="not base64!"))


@pytest.mark.parametrize("index", ["²", "٣", "1" * 5_000, "-1", "1e3", ""])
def test_a_row_whose_index_is_not_a_number_is_skipped(tmp_path: Path, index: str) -> None:
    path = tsv(tmp_path / "a.tsv", [{**line(1), "index": index}, line(2)])
    assert not has_rotations(path)
    found, skipped = read(path)
    assert [row.index for row in found] == [2]
    assert [why[:2] for why in skipped] == [("a.tsv:2", "index is not a number")]


def test_a_row_that_ends_before_its_index_is_skipped(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", [line(1)], ["question", *[name for name in COLUMNS if name != "question"]])
    path.write_text(f"{path.read_text(encoding='utf-8')}alone\n", encoding="utf-8")
    assert not has_rotations(path)
    found, skipped = read(path)
    assert [row.index for row in found] == [1]
    assert [why[:2] for why in skipped] == [("a.tsv:3", "index is not a number")]


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "utf-8-sig"])
@pytest.mark.parametrize("changes", [{"question": "什么颜色？"}, {"hint": "看图"}, {"B": "蓝色"}])
def test_a_table_in_another_encoding_is_read(tmp_path: Path, changes: dict[str, str], encoding: str) -> None:
    """GBK, as Windows writes Chinese; UTF-16, as Excel writes text with tabs."""
    path = tsv(tmp_path / "a.tsv", [line(1, **changes), line(2)])
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    found, skipped = read(path)
    assert [row.index for row in found] == [1, 2] and skipped == []
    texts = {"question": found[0].question, "hint": found[0].hint, "B": found[0].options[1]}
    assert changes.items() <= texts.items()


def test_a_row_that_is_not_utf8_is_skipped(tmp_path: Path) -> None:
    """Bytes that are of no encoding."""
    path = tsv(tmp_path / "a.tsv", [line(1, question="什么颜色？"), line(2), line(3, question="它是什么？")])
    path.write_bytes(path.read_bytes().replace("什么颜色".encode(), b"\xff\xfe"))
    found, skipped = read(path)
    assert [row.index for row in found] == [2, 3]
    assert [why[:2] for why in skipped] == [("a.tsv:2", "not UTF-8")]


@pytest.mark.parametrize(
    ("answers", "letters"),
    [
        (["B.", "(B)", "b", "Ｂ", "B、", "（B）", "dog", "B. dog"], "BBBBBBBB"),
        (["0", "2", "1"], "ACB"),
        (["1", "3", "2"], "ACB"),
        (["A", "", "nan", "None"], "A   "),
    ],
)
def test_an_answer_may_be_written_in_other_ways(tmp_path: Path, answers: list[str], letters: str) -> None:
    rows = [line(number, right=answer) for number, answer in enumerate(answers, 1)]
    found, skipped = read(tsv(tmp_path / "a.tsv", rows))
    assert "".join(row.answer or " " for row in found) == letters and skipped == []


@pytest.mark.parametrize("answer", ["AB", "BC", "D", "4", "(E)", "A or B"])
def test_an_answer_that_is_no_option_is_skipped(tmp_path: Path, answer: str) -> None:
    found, skipped = read(tsv(tmp_path / "a.tsv", [line(1, right=answer), line(2)]))
    assert [row.index for row in found] == [2]
    assert [why[:2] for why in skipped] == [("a.tsv:2", "answer is not an option")]


@pytest.mark.parametrize("missing", ["index", "question", "A", "B", "image"])
def test_a_table_without_a_column_is_refused(tmp_path: Path, missing: str) -> None:
    columns = [name for name in COLUMNS if name != missing]
    with pytest.raises(DataError, match=f"no column '{missing}'"):
        read(tsv(tmp_path / "a.tsv", [], columns))


def test_a_file_is_read_without_loading_it_whole(tmp_path: Path) -> None:
    big = base64.b64encode(bytes(1_500_000)).decode()  # 2 MB, far above csv's own limit of a field
    path = tsv(tmp_path / "a.tsv", [line(index, image=big) for index in range(20)])
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    try:
        count = sum(1 for row in read_rows(path, lambda *why: None) if row.options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20
    assert peak < 16_000_000


# -- circular evaluation -------------------------------------------------------------------------------------------


def test_rotations_by_hand() -> None:
    found = rounds(row_of("cat dog bird", "B"))
    assert [list(turned.options.values()) for turned in found] == [
        ["cat", "dog", "bird"],
        ["dog", "bird", "cat"],
        ["bird", "cat", "dog"],
    ]
    assert [turned.answer for turned in found] == ["B", "A", "C"]
    assert [turned.meant["A"] for turned in found] == ["A", "B", "C"]
    assert [turned.id for turned in found] == ["5", "5#1", "5#2"]
    assert [list(turned.options) for turned in found] == [["A", "B", "C"]] * 3


@given(st.integers(2, 8), st.data())
def test_the_right_option_is_right_in_every_rotation(count: int, data: st.DataObject) -> None:
    right = data.draw(st.sampled_from(LETTERS[:count]))
    row = row_of(" ".join(f"text{letter}" for letter in LETTERS[:count]), right)
    found = rounds(row)
    assert len(found) == count
    assert {turned.options[str(turned.answer)] for turned in found} == {f"text{right}"}
    assert sorted(str(turned.answer) for turned in found) == list(LETTERS[:count])  # once at every place
    assert {turned.meant[str(turned.answer)] for turned in found} == {right}


def test_a_tsv_that_contains_rotations_is_not_rotated_again(tmp_path: Path) -> None:
    plain = tsv(tmp_path / "plain.tsv", [line(1), line(2)])
    turned = tsv(tmp_path / "turned.tsv", [line(1), line(1_000_001, "dog bird cat", "C"), line(2_000_001)])
    assert not has_rotations(plain)
    assert has_rotations(turned)
    found, _ = read(turned)
    assert [row.group for row in found] == [1, 1, 1]
    assert [[one.id for one in rounds(row, rotate=False)] for row in found] == [["1"], ["1000001"], ["2000001"]]
    assert rounds(found[1], rotate=False)[0].answer == "C"


def test_questions_that_lack_a_rotation_are_found() -> None:
    assert incomplete_questions([(1, 3), (1, 3), (1, 3), (2, 2), (3, 4), (3, 4), (4, 2), (4, 2)]) == [2, 3]


GROUPS = [
    # options, right letter, completion in each round, whether the question is a hit
    ("cat dog", "A", ["A", "B"], True),
    ("cat dog", "B", ["B", "A"], True),
    ("cat dog", "A", ["A", "A"], False),  # always A
    ("cat dog bird", "C", ["C", "B", "A"], True),
    ("cat dog bird", "C", ["C", "C", "A"], False),
    ("cat dog bird", "A", ["(A)", "C. cat", "Answer: B"], True),
    ("cat dog bird", "A", ["cat", "cat", "a cat."], True),  # by its text alone
    ("cat dog bird hen", "B", ["B", "A", "D", "C"], True),
    ("cat dog bird hen", "B", ["B", "A", "D", "no idea"], False),  # no match counts as wrong
    ("cat dog bird hen", "D", ["D", "C", "B", None], False),  # a failure
    ("cat dog bird hen", "D", ["D", "C", "B", "A"], True),
    ("cat dog bird hen", "A", ["B", "A", "D", "C"], False),  # right in none
    ("红 蓝", "B", ["选B", "答案是A"], True),
    ("红 蓝", "A", ["红色", "红"], True),
    ("one two three four five", "E", ["E", "D", "C", "B", "A"], True),
]
"""Circular groups worked by hand. Each round moves the right letter one to the left, and from A to the last."""


def circular(groups: list[tuple[str, str, list[str | None], bool]]) -> tuple[list[Sample], list[Prediction]]:
    """The groups as in a run: a sample for each round, and a prediction with the letter read out of the completion."""
    samples: list[Sample] = []
    predictions: list[Prediction] = []
    for index, (options, right, said, _) in enumerate(groups):
        row = row_of(options, right, index)
        for turned, text in zip(rounds(row), said, strict=True):
            meta = {"group": str(row.group), "kind": f"{len(row.options)} options", "row": row.group}
            references = [str(turned.answer)]
            samples.append({"id": turned.id, "messages": [], "images": [], "references": references, "meta": meta})
            letter = None if text is None else letter_in(text, turned.options)
            failed = failed_prediction(turned.id, "no answer")
            predictions.append(failed if letter is None else answer(samples[-1], letter))
    return samples, predictions


TASK = SimpleNamespace(
    score=lambda recipe, given, sample: {"mmbench": float(given in sample["references"])},
    facts=lambda sample: {},
    together=lambda sample: str(sample["meta"]["row"]),
)
RECIPE = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny")


def hits(groups: list[tuple[str, str, list[str | None], bool]]) -> float:
    samples, predictions = circular(groups)
    figures, _ = overall_figures(score_models(TASK, RECIPE, samples, {"base": predictions}))
    assert figures["base"]["mmbench"]["n"] == len(groups)
    return float(figures["base"]["mmbench"]["value"])


@pytest.mark.parametrize("group", GROUPS)
def test_a_circular_group_by_hand(group: tuple[str, str, list[str | None], bool]) -> None:
    assert hits([group]) == 100 * group[3]


def test_accuracy_is_hit_groups_over_groups_also_by_category() -> None:
    assert len(GROUPS) >= 12
    assert hits(GROUPS) == pytest.approx(100 * 10 / 15, abs=1e-3)
    samples, predictions = circular(GROUPS)
    parts = breakdown(score_models(TASK, RECIPE, samples, {"base": predictions}), "kind")["base"]
    assert {kind: (figures["mmbench"]["value"], figures["mmbench"]["n"]) for kind, figures in parts.items()} == {
        "2 options": (80, 5),
        "3 options": (75, 4),
        "4 options": (40, 5),
        "5 options": (100, 1),
    }
    assert parts["4 options"]["mmbench"]["failed"] == 2


# -- the letter in an answer ---------------------------------------------------------------------------------------


def letter_in(said: str, options: Mapping[str, str]) -> str | None:
    """The letter that the task reads in a completion."""
    meta = {"group": "g", "source": "mmbench", "options": dict(options)}
    return better_synth.read_answer(
        said,
        {"id": "q", "messages": [], "images": [], "references": ["A"], "meta": meta},  # type: ignore[typeddict-item]
    )


OPTIONS = {"A": "cat", "B": "dog", "C": "hot dog", "D": "red"}

SAID = [
    ("B", "B"),
    (" b.\n", "B"),
    ("(B)", "B"),
    ("Ｂ", "B"),
    ("（Ｂ）", "B"),
    ("B. dog", "B"),
    ("B) dog", "B"),
    ("[C]: a hot dog", "C"),
    ("Answer: B", "B"),
    ("answer:B", "B"),
    ("The answer is (C).", "C"),
    ("The correct option is **C**.", "C"),
    ("Option D", "D"),
    ("答案是B", "B"),
    ("答案：（C）", "C"),
    ("选项D", "D"),
    ("I believe (C), since it is long", "C"),
    ("It must be D.", "D"),
    ("dog", "B"),
    ("A dog", "B"),  # an article, not a letter
    ("The answer is a dog.", "B"),
    ("It is a hot dog!", "C"),  # the longer option, not the one inside it
    ("HOT  DOG", "C"),
    ("(A) or (B)", None),
    ("B, C", None),
    ("cat and dog", None),
    ("cats", None),  # not a whole word
    ("E", None),
    ("(E)", None),
    ("The answer is E.", None),
    ("I cannot tell", None),
    ("", None),
    ("\N{REPLACEMENT CHARACTER}", None),
    ("Looking at it for a long time I begin to think of a dog that I had when I was young", None),  # much longer
    ("B is correct", "B"),
    ("B is right, because it barks", "B"),
    ("B seems right", "B"),
    ("B best describes the picture", "B"),
    ("A best describes the picture", "A"),
    ("A is correct", "A"),
    ("A rather than B", "A"),
    ("A best friend", None),
    ("\\boxed{B}", "B"),
    ("$\\boxed{\\text{B}}$", "B"),
    ("A is wrong, and C. Thus $\\boxed{B}$.", "B"),
    ("{B}", "B"),
    ("[[B]]", "B"),
    ("**B**", "B"),
    ("**Answer:** B", "B"),
    ("<answer>B</answer>", "B"),
    ("#### B", "B"),
    ("`B`", "B"),
    ("B.dog", "B"),
    ("B - dog", "B"),
    ("The best choice would be B (cat)", "B"),
    ("I'd go with B.", "B"),
    ("The picture matches option B, I think", "B"),
    ("answer is b", "B"),
    ("the answer is a.", "A"),
    ("The answer to the question is B", "B"),
    ("B\nBecause A is a cat and C is food.", "B"),
    ("Comparing A, C and D to it.\n\nB", "B"),
    ("Options A, C and D are wrong. The answer is B.", "B"),
    ("Among A, B, C and D, the correct answer is B.", "B"),
    ("A and C are incorrect; B is correct", "B"),
    ("Option A is a cat, which is wrong. Option B is right.", "B"),
    ("It's not A, C, or D, so it must be B", "B"),
    ("Excluding A and C, B remains", "B"),
    ("The answer is not A. It is B.", "B"),
    ("The answer is B, A and C are wrong", "B"),
    ("B. A is wrong because it is a cat. C is food.", "B"),
    ("B. The others (A, C, D) are wrong.", "B"),
    ("B, not A", "B"),
    ("A or B? B.", "B"),
    ("It is B, isn't it?", "B"),
    ("It is not a cat but a dog", "B"),
    ("not B", None),
    ("B is wrong", None),
    ("B is not correct", None),
    ("It isn't B", None),
    ("I don't think it is B", None),
    ("Is it B?", None),
    ("I rule out A, C and D", None),
    ("Not a dog", None),
    ("The answer is B or C", None),
    ("A. cat\nB. dog\nC. hot dog\nD. red", None),
    ("A. cat B. dog C. hot dog D. red. Answer: B", "B"),
    ("A) No. B) Yes.", None),
    ("the B-52 bomber", None),
]


@pytest.mark.parametrize(("said", "letter"), SAID)
def test_letters_by_rule(said: str, letter: str | None) -> None:
    assert letter_in(said, OPTIONS) == letter


IN_CHINESE = {"A": "狗", "B": "猫", "C": "红、蓝", "D": "B超"}

SAID_IN_CHINESE = [
    ("D。", "D"),
    ("D｡", "D"),
    ("B、", "B"),
    ("B；", "B"),
    ("B，因为它有胡须", "B"),
    ("B、猫", "B"),
    ("B。图中是一只小动物", "B"),
    ("B选项", "B"),
    ("B 选项是对的", "B"),
    ("应该是B选项。", "B"),
    ("【B】", "B"),
    ("「B」", "B"),
    ("『B』猫", "B"),
    ("“B”", "B"),
    ("答案为【B】。", "B"),
    ("答案是“B”", "B"),
    ("是B", "B"),
    ("应该是B。", "B"),
    ("正确的是【B】", "B"),
    ("B猫", "B"),
    ("B猫。", "B"),
    ("红、蓝。", "C"),
    ("这是B超", "D"),  # the text of D, not a letter
    ("A猫", None),  # the text of another option
    ("不是B", None),
    ("不是B选项", None),
    ("不选B", None),
    ("A、B", None),
    ("【A】「B」", None),
    ("B类", None),
    ("B是正确的", "B"),
    ("B正确", "B"),
    ("最佳选择是B（猫）", "B"),
    ("答案应该是B", "B"),
    ("\\boxed{B}", "B"),
    ("选项A、C、D都不对，答案是B", "B"),
    ("A和C是错误的，B正确", "B"),
    ("A，C，D错误，所以选B", "B"),
    ("选B，A不对", "B"),
    ("排除A和C，选B", "B"),
    ("不是A，而是B", "B"),
    ("B不对", None),
    ("B是错的", None),
    ("B吗", None),
    ("答案是A还是B？", None),
    ("维生素B", None),
    ("E。", None),
]


@pytest.mark.parametrize(("said", "letter"), SAID_IN_CHINESE)
def test_letters_as_chinese_writes_them(said: str, letter: str | None) -> None:
    assert letter_in(said, IN_CHINESE) == letter


def test_the_first_letter_of_an_english_word_is_no_answer() -> None:
    assert letter_in("bus", {"A": "cat", "B": "us"}) is None


def test_an_option_whose_text_ends_in_a_letter_is_read_by_its_text() -> None:
    vitamins = {"A": "vitamin B", "B": "vitamin C", "C": "vitamin D"}
    assert letter_in("Vitamin C.", vitamins) == "B"
    assert letter_in("C", vitamins) == "C"
    assert letter_in("The answer is vitamin C", vitamins) == "B"
    assert letter_in("B. vitamin C", vitamins) == "B"
    points = {"A": "Point B", "B": "Point A"}
    assert letter_in("The answer is Point A", points) == "B"


TEXTS = {"A": "cat", "B": "dog", "C": "horse", "D": "bird"}
FORMS = [
    *("{}", "({})", "{}:", "{}. {text}", "({}) {text}", "{} ({text})", "{text} ({})", "{text}. {}", "[{}]", "*{}*"),
    *(
        "Answer:{}",
        "ANSWER {}",
        "Ans. {}",
        "The answer is: {}",
        "The answer would be {}.",
        "The correct option is ({}).",
    ),
    *("It is {}, {text}.", "It's {}.", "I think it's {}, {text}.", "I guess {}", "Probably {}", "So, {}.", "Hence {}."),
    *(
        "{} it is",
        "{} is the answer",
        "{} is the best choice.",
        "{} would be correct",
        "{} fits best",
        "{} since it fits",
    ),
    *("Based on the image, I would say {}.", "Of the given choices, {} fits.", "The most suitable option is {}."),
    *("We see a {text}, so {}.", "There is a {text} here, option {}.", "Only {} is correct.", "Let me think. {}"),
    *("{others} are incorrect, so {}.", "Not {others}. It is {}.", "{others} are wrong. The answer is {}."),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_with_every_letter(form: str) -> None:
    for right, text in TEXTS.items():
        first, second, third = (letter for letter in TEXTS if letter != right)
        said = form.format(right, text=text, others=f"{first}, {second} and {third}")
        assert letter_in(said, TEXTS) == right, said


@pytest.mark.parametrize("text", ["A and B ", "B, ", "A or ", "not ", "the answer to the ", "is ", "(", "answer is "])
def test_a_long_completion_is_read(text: str) -> None:
    assert letter_in(text * 4000, OPTIONS) in {None, *OPTIONS}  # with backtracking, it would not end


def test_options_with_the_same_text_are_ambiguous() -> None:
    assert letter_in("dog", {"A": "dog", "B": "Dog."}) is None


@given(st.text(), st.dictionaries(st.sampled_from("ABCD"), st.text(min_size=1), min_size=2))
def test_only_letters_of_options_are_read(said: str, options: dict[str, str]) -> None:
    assert letter_in(said, options) in {None, *options}


# -- the prompt ----------------------------------------------------------------------------------------------------


def test_the_prompt_is_llavas() -> None:
    options = {"A": "cat", "B": "dog"}
    assert prompt("What is it?", "", options) == f"What is it?\nA. cat\nB. dog\n{ASKS}"
    assert prompt("What is it?", "A pet.", options) == f"A pet.\nWhat is it?\nA. cat\nB. dog\n{ASKS}"
    assert prompt("这是什么？", "", {"A": "猫", "B": "狗"}) == f"这是什么？\nA. 猫\nB. 狗\n{ASKS_IN_CHINESE}"


# -- the upload ----------------------------------------------------------------------------------------------------


def cells(path: Path) -> list[list[str | int | None]]:
    """The cells of the sheet, as a spreadsheet program reads them."""
    sheet = openpyxl.load_workbook(io.BytesIO(path.read_bytes())).active
    return [[cell.value for cell in row] for row in sheet.rows]


def rows_of(path: Path, said: Mapping[int, str | None]) -> list[dict[str, str | int]]:
    found, _ = read(path)
    return [upload_row(row.uploaded, said[row.index]) for row in found]


def test_the_upload_has_llavas_columns(tmp_path: Path) -> None:
    path = tsv(tmp_path / "test.tsv", [line(5, "cat dog", D="", question="1 < 2 & 'x'?"), line(1_000_005, "a b c d")])
    rows = rows_of(path, {5: "(B) dog", 1_000_005: " I do not know\n"})
    write_xlsx(tmp_path / "up" / "mmbench.xlsx", rows)
    assert cells(tmp_path / "up" / "mmbench.xlsx") == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        [5, "1 < 2 & 'x'?", "cat", "dog", None, None, "(B) dog", "A", "dev"],
        [1000005, "What is in picture 1000005?", "a", "b", "c", "d", "I do not know", "A", "dev"],
    ]


@pytest.mark.parametrize("short", [0, 1])
def test_rows_with_stripped_trailing_tabs_are_uploaded(tmp_path: Path, short: int) -> None:
    path = tsv(tmp_path / "dev.tsv", [line(1, split=""), line(2, split="")])
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1 + short] = lines[1 + short].rstrip("\t")
    assert lines[1 + short].count("\t") < lines[0].count("\t")
    path.write_text("\n".join(lines), encoding="utf-8")
    write_xlsx(tmp_path / "a.xlsx", rows_of(path, {1: "A", 2: "B"}))
    assert cells(tmp_path / "a.xlsx") == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        [1, "What is in picture 1?", "cat", "dog", "bird", None, "A", "A", None],
        [2, "What is in picture 2?", "cat", "dog", "bird", None, "B", "A", None],
    ]


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    rows: list[dict[str, str | int]] = [{"index": 1, "question": " 什么 \n<b>", "A": "=1+1", "prediction": "B"}]
    for name in ("a.xlsx", "b.xlsx"):
        write_xlsx(tmp_path / name, rows)
    assert (tmp_path / "a.xlsx").read_bytes() == (tmp_path / "b.xlsx").read_bytes()
    assert cells(tmp_path / "a.xlsx")[1] == [1, " 什么 \n<b>", "=1+1", "B"]


def test_control_characters_do_not_break_it(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "a.xlsx", [{"question": "图\x00 \x1b]"}])
    assert len(cells(tmp_path / "a.xlsx")) == 2


def test_the_upload_holds_the_models_own_words(tmp_path: Path) -> None:
    (row,), _ = read(tsv(tmp_path / "a.tsv", [line(5)]))
    (turned, *_) = rounds(row)
    meta = {"group": "g", "source": "mmbench", "options": turned.options, "round": 0, "uploaded": row.uploaded}
    sample: Any = {"id": "mmbench/5", "messages": [], "images": [], "references": ["A"], "meta": meta}
    for said in ("B is correct, since it barks.", "none of them", "x" * 40_000):
        prediction = {**answer(sample, str(better_synth.read_answer(said, sample))), "text": said}
        assert better_synth.uploads(tmp_path, [sample], {"mmbench/5": prediction}) == ["mmbench.xlsx"]  # type: ignore[dict-item]
        header, cell = cells(tmp_path / "mmbench.xlsx")
        assert cell[header.index("prediction")] == said[:32_767]


def test_a_text_that_is_too_long_for_a_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.xlsx: text of 32768 characters, but an xlsx cell holds 32767"):
        write_xlsx(tmp_path / "a.xlsx", [{"question": "x" * 32_768}])
    assert list(tmp_path.iterdir()) == []
