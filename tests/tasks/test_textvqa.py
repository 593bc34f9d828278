"""TextVQA: cases worked by hand from MMF's rules, and the files in the form of LLaVA's scripts."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract.errors import DataError
from stages.tasks.better_synth.textvqa import (
    PUNCTUATION,
    TextVqaQuestion,
    accuracy,
    clean,
    question_in,
    read_annotations,
    read_questions,
)
from stages.tasks.common.json_lines import BadRecordError

# -- cleaning: each case was worked by hand, rule by rule ----------------------------------------------------------

CLEANED = [
    # lower case, blanks
    ("Nokia", "nokia"),
    ("  STOP  \n", "stop"),
    ("coca\ncola", "coca cola"),
    ("coca\tcola", "coca cola"),
    ("new   york", "new york"),
    ("", ""),
    # commas and question marks are removed first, without a blank
    ("1,000", "1000"),
    ("june 4, 1976", "june 4 1976"),
    ("red,blue", "redblue"),
    ("why?", "why"),
    ("a?b", "ab"),
    # a blank before `'s`, so contractions with it are never found
    ("McDonald's", "mcdonald 's"),
    ("it's", "it 's"),
    ("let's go", "let 's go"),
    ("kids' shoes", "kids' shoes"),
    # punctuation that touches no blank becomes a blank
    ("e-mail", "e mail"),
    ("24/7", "24 7"),
    ("http://x", "http: x"),  # MMF's punctuation has no colon
    ("under_score", "under score"),
    ("50%", "50%"),
    ("at&t", "at&t"),
    ("(stop)", "stop"),
    ("-5", "5"),
    ("8:30", "8:30"),
    ("wow!", "wow"),
    # punctuation that touches a blank anywhere is removed everywhere
    ("e-mail - work", "email work"),
    ("24/7 /open", "247 open"),
    ('the "best"', "best"),
    ('"best" of', "best of"),
    ("a_b _c", "ab c"),
    ("x-y z-w", "x y z w"),
    ("(a) b", "b"),  # ")" touches a blank and is removed; "(" becomes a blank, which leaves the article
    # lone periods, except those before a digit
    ("dr. pepper", "dr pepper"),
    ("U.S.A.", "usa"),
    ("3.5", "3.5"),
    (".5", ".5"),
    ("5.", "5"),
    ("v1.2.", "v1.2"),
    ("...", ""),
    # number words up to ten, whole words only
    ("two", "2"),
    ("None", "0"),
    ("zero", "0"),
    ("ten", "10"),
    ("eleven", "eleven"),
    ("twenty-one", "twenty 1"),
    ("someone", "someone"),
    # articles
    ("The Cat", "cat"),
    ("an a the", ""),
    ("a1", "a1"),
    ("theatre", "theatre"),
    # contractions
    ("dont walk", "don't walk"),
    ("DONT", "don't"),
    ("wont", "won't"),
    ("yall'd've", "y'all'd've"),
    ("Im", "im"),  # MMF's table has a capital there, which no cleaned answer has
    ("somebody'd", "somebodyd"),  # MMF's table removes this apostrophe
    ("hes", "he's"),
    ("its", "its"),
    # several rules
    ("The two-door's, dont!", "2 door 's don't"),
    ("A. B.", "b"),  # first the period is removed, then the article
    # other languages
    ("停车", "停车"),
    ("中国 银行", "中国 银行"),
    ("Ünal", "ünal"),
    ("٣.٥", "٣.٥"),  # digits of other scripts are digits
]


@pytest.mark.parametrize(("text", "expected"), CLEANED)
def test_cleaning_by_hand(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_there_are_enough_cases() -> None:
    assert len({text for text, _ in CLEANED}) >= 40


@pytest.mark.parametrize("sign", PUNCTUATION.replace(",", "").replace("?", ""))
def test_each_sign_becomes_a_blank_or_nothing(sign: str) -> None:
    assert clean(f"x{sign}y") == "x y"
    assert clean(f"x{sign}y {sign}z") == "xy z"


def test_mmfs_bugs_are_fixed_only_by_mended() -> None:
    assert clean("route 66.") == "route 66"
    assert clean("route 66.", "mended") == "route 66."  # as `(?<!\d)` would keep it
    assert clean("dr. no", "mended") == clean("dr. no") == "dr no"
    assert clean("." * 40) == "." * 8  # re.UNICODE is 32, passed as the count
    assert clean("." * 40, "mended") == ""
    assert clean("." * 32) == ""


@given(st.text())
def test_any_text_can_be_cleaned(text: str) -> None:
    cleaned = clean(text)
    assert cleaned == cleaned.strip()
    assert not {"a", "an", "the"} & set(cleaned.split())


# -- the score -----------------------------------------------------------------------------------------------------


def humans(*counts: tuple[str, int]) -> list[str]:
    answers = [text for text, count in counts for _ in range(count)]
    return answers + [f"other {number}x" for number in range(10 - len(answers))]


SCORED = [
    # by the number of humans who gave the answer
    ("nokia", humans(("samsung", 4)), 0.0),
    ("nokia", humans(("nokia", 1)), 0.3),
    ("nokia", humans(("nokia", 2)), 0.6),
    ("nokia", humans(("nokia", 3)), 0.9),
    ("nokia", humans(("nokia", 4)), 1.0),
    ("nokia", humans(("nokia", 10)), 1.0),
    # answer and human answers are cleaned before they are counted
    ("The Nokia.", humans(("nokia", 2), ("NOKIA!", 1), ("nokia ", 1)), 1.0),
    ("2", humans(("two", 2), ("2", 1)), 0.9),
    ("two", humans(("2", 1)), 0.3),
    ("don't", humans(("dont", 2)), 0.6),
    ("1000", humans(("1,000", 3)), 0.9),
    ("none", humans(("0", 4)), 1.0),
    # a part of an answer does not count
    ("nokia phone", humans(("nokia", 10)), 0.0),
    ("nok", humans(("nokia", 10)), 0.0),
    ("", humans(("nokia", 10)), 0.0),
    # two answers, each by its own count
    ("coke", humans(("coke", 7), ("coca cola", 3)), 1.0),
    ("coca-cola", humans(("coke", 7), ("coca cola", 3)), 0.9),
    # answers that are empty after cleaning are equal
    ("the", humans(("a", 1)), 0.3),
    ("可口可乐", humans(("可口可乐", 2)), 0.6),
]


@pytest.mark.parametrize(("answer", "references", "expected"), SCORED)
def test_accuracy_by_hand(answer: str, references: list[str], expected: float) -> None:
    assert accuracy(answer, references) == expected


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["x", "y", "z", "X ", "the y"]), min_size=10, max_size=10), st.sampled_from("xyzw"))
def test_accuracy_is_the_mean_over_the_ten_ways_to_leave_one_out(references: list[str], answer: str) -> None:
    left_out = []
    for one in range(10):
        others = [clean(reference) for place, reference in enumerate(references) if place != one]
        left_out.append(min(1, others.count(answer) / 3))
    assert accuracy(answer, references) == pytest.approx(sum(left_out) / 10)


@pytest.mark.parametrize("count", [0, 1, 9, 11])
def test_ten_humans_are_needed(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} human answers"):
        accuracy("x", ["x"] * count)


# -- the files -----------------------------------------------------------------------------------------------------

ASKS = "Answer the question using a single word or phrase."

PROMPTS = [
    (f"What is the Brand?\n{ASKS}", "what is the brand?"),
    (f"What is it?\nReference OCR token: NOKIA, 3310\n{ASKS}", "what is it?"),
    (f"Reference OCR token: NOKIA\nWhat is it?\n{ASKS}", "what is it?"),
    ("OCR tokens: a, b. Question: Who\nis it? Short answer:", "who\nis it?"),
    ("OCR tokens: Question: first? Question: second? Short answer: x Short answer:", "first? question: second?"),
    ("Is Reference OCR token: here?\nyes", "is reference ocr token: here?"),  # two lines
]


@pytest.mark.parametrize(("prompt", "question"), PROMPTS)
def test_the_question_is_cut_out_of_the_prompt(prompt: str, question: str) -> None:
    assert question_in(prompt) == question


@pytest.mark.parametrize(
    "prompt", ["one line", "1\n2\n3", "Reference OCR token: a\n1\n2\n3", "OCR tokens: no question\n2"]
)
def test_a_prompt_of_another_form_is_refused(prompt: str) -> None:
    with pytest.raises(BadRecordError) as refused:
        question_in(prompt)
    assert refused.value.reason == "unknown form of prompt"


def write(folder: Path, records: list[object], annotations: object) -> tuple[Path, Path]:
    questions, answers = folder / "textvqa.jsonl", folder / "annotations.json"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    answers.write_text(json.dumps(annotations), encoding="utf-8")
    return questions, answers


def test_questions_and_answers_are_joined_by_picture_and_question(tmp_path: Path) -> None:
    ten, others = [f"a{n}" for n in range(10)], [f"b{n}" for n in range(10)]
    prompt = f"What Brand?\n{ASKS}"
    path, annotated = write(
        tmp_path,
        [
            {"question_id": "p1", "image": "p1.jpg", "text": prompt},
            {"question_id": "p1", "image": "p1.jpg", "text": f"which year?\n{ASKS}"},
            {"question_id": 7, "image": "7.jpg", "text": prompt},
        ],
        {
            "data": [
                {"image_id": "p1", "question": "Which year?", "answers": others},
                {"image_id": "p1", "question": "what brand?", "answers": ten},
                {"image_id": 7, "question": "what brand?", "answers": others},
                {"image_id": 7, "question": "what brand?", "answers": ten},  # a repetition: the last one counts
            ]
        },
    )
    skipped: list[tuple[str, ...]] = []
    found = list(read_questions(path, read_annotations(annotated), lambda *why: skipped.append(why)))
    assert skipped == []
    assert found[0] == TextVqaQuestion("p1", "p1.jpg", prompt, "what brand?", tuple(ten), "textvqa.jsonl:1")
    assert [question.answers[0] for question in found] == ["a0", "b0", "a0"]
    asked = list(read_questions(path, None, lambda *why: skipped.append(why)))
    assert [question.answers for question in asked] == [(), (), ()]


def test_unusable_lines_are_skipped_with_their_numbers(tmp_path: Path) -> None:
    prompt = f"q?\n{ASKS}"
    path, annotated = write(
        tmp_path,
        [
            "no json",
            "[1]",
            {"image": "x.jpg", "text": prompt},
            {"question_id": "x", "image": "x.jpg", "text": "one line"},
            {"question_id": "x", "image": "x.jpg", "text": prompt},
            {"question_id": "nine", "image": "x.jpg", "text": prompt},
            {"question_id": "ok", "image": "x.jpg", "text": prompt},
            {"question_id": ["ok"], "image": "x.jpg", "text": prompt},
            {"question_id": "ok", "text": prompt},
        ],
        {
            "data": [
                {"image_id": "nine", "question": "q?", "answers": ["x"] * 9},
                {"image_id": "ok", "question": "Q?", "answers": ["x"] * 10},
            ]
        },
    )
    skipped: list[tuple[str, ...]] = []
    found = list(read_questions(path, read_annotations(annotated), lambda *why: skipped.append(why)))
    assert [question.question_id for question in found] == ["ok"]
    assert [why[:2] for why in skipped] == [
        ("textvqa.jsonl:1", "not JSON"),
        ("textvqa.jsonl:2", "not a JSON object"),
        ("textvqa.jsonl:3", "no question_id"),
        ("textvqa.jsonl:4", "unknown form of prompt"),
        ("textvqa.jsonl:5", "no annotation for the question"),
        ("textvqa.jsonl:6", "not 10 human answers"),
        ("textvqa.jsonl:8", "question_id is neither a string nor an integer"),
        ("textvqa.jsonl:9", "no image"),
    ]


def test_numbers_and_missing_answers_of_annotations(tmp_path: Path) -> None:
    prompt = f"q?\n{ASKS}"
    entries = [
        {"image_id": "numbers", "question": "q?", "answers": [2, 3.50, True, None, *["x"] * 6]},
        {"image_id": "null", "question": "q?", "answers": None},
        {"image_id": "none", "question": "q?"},
        {"image_id": "empty", "question": "q?", "answers": [""] * 10},
    ]
    lines = [{"question_id": entry["image_id"], "image": "x.jpg", "text": prompt} for entry in entries]
    path, annotated = write(tmp_path, lines, {"data": entries})
    skipped: list[tuple[str, ...]] = []
    found = list(read_questions(path, read_annotations(annotated), lambda *why: skipped.append(why)))
    assert [question.answers for question in found] == [("2", "3.5", "true", "", *["x"] * 6), (), (), ()]
    assert skipped == []


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "utf-8-sig"])
def test_files_in_another_encoding_are_read(tmp_path: Path, encoding: str) -> None:
    line = {"question_id": "x", "image": "x.jpg", "text": f"牌子上写着什么？\n{ASKS}"}
    entry = {"image_id": "x", "question": "牌子上写着什么？", "answers": ["出口"] * 10}
    path, annotated = write(tmp_path, [line], {"data": [entry]})
    for file in (path, annotated):
        content = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
        file.write_bytes("\n".join(json.dumps(one, ensure_ascii=False) for one in content).encode(encoding))
    found = list(read_questions(path, read_annotations(annotated), lambda *why: pytest.fail(str(why))))
    assert [question.answers[0] for question in found] == ["出口"]


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"data": [1]}', '{"data": [{"image_id": "x"}]}', "{}", "[" * 100_000),
        '{"data": [{"image_id": "x", "question": "q", "answers": "one"}]}',
        '{"data": [{"image_id": "x", "question": "q", "answers": [["one"]]}]}',
    ],
)
def test_annotations_of_another_form_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="not TextVQA's annotations"):
        read_annotations(path)
