"""logic_choice: the problem files, the prompts, the letter that a completion means, and the submission."""

import importlib.util
import json
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contract.errors import DataError
from stages.contract.recipe import Recipe, load_recipe
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.tasks import load_task, settle_recipe
from stages.tasks.logic_choice import (
    ask,
    asked_rows,
    build_samples,
    narrowed_sample,
    passes,
    possible_prompts,
    read_answer,
    read_questions,
    score,
    sources,
    submission,
)
from stages.tasks.logic_choice.problems import LogicQuestion
from stages.tasks.logic_choice.prompts import letter_in
from stages.tasks.task import Task
from tests.conftest import REPOSITORY

Skipped = list[tuple[str, str, str]]
RECIPE = REPOSITORY / "recipes" / "logic-choice.yaml"


def recipe(*overrides: str) -> Recipe:
    return settle_recipe(load_recipe(RECIPE, "tiny", overrides), "logic-choice", REPOSITORY / "recipes" / "data")


def part(answer: Any = "A", options: Any = ("red", "blue", "green"), **more: Any) -> dict[str, Any]:
    options = list(options) if isinstance(options, tuple) else options
    return {"question": "Which?", "options": options, **({} if answer is ... else {"answer": answer}), **more}


def problem(name: str, *parts: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    return {"id": name, "problem": text or f"Facts of {name}.", "questions": list(parts or [part()])}


def read(folder: Path, **files: list[Any]) -> tuple[list[LogicQuestion], Skipped]:
    """Write files, `sources__more` as sources/more.jsonl, and read them. A line may be given as bytes."""
    for name, rows in files.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    skipped: Skipped = []

    def skip(what: str, reason: str, detail: str = "") -> None:
        skipped.append((what, reason, detail))

    return read_questions(recipe(), folder, set(), skip), skipped


def one_sample(split: str = "test", **changes: Any) -> Sample:
    values: dict[str, Any] = {
        **{"id": "p/0", "problem_id": "p", "index": 0, "problem": "Tom has the hat.", "text": "Which?"},
        **{"options": ("red", "blue", "green"), "answers": ("B",), "source": "train", "group": "g"},
        **{"split": None, "label_source": None, **changes},
    }
    return build_samples(recipe(), LogicQuestion(**values), None, split)[0]


def test_it_is_a_task() -> None:
    task = load_task("logic_choice")
    members = [name for name in [*vars(Task), *Task.__annotations__] if not name.startswith("_")]
    assert [name for name in members if not hasattr(task, name)] == []
    assert not task.READS_DOCUMENTS


# -- the problem files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"id": "x", "prob', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"id": "h", "problem": "\\ud83d", "questions": []}', "not UTF-8"),
        (b'["a"]', "not a JSON object"),
        ({"problem": "x", "questions": [part()]}, "no id"),
        ({"id": None, "problem": "x", "questions": [part()]}, "no id"),
        ({"id": " ", "problem": "x", "questions": [part()]}, "empty id"),
        ({"id": 1.5, "problem": "x", "questions": [part()]}, "id is not a string"),
        ({"id": "x", "questions": [part()]}, "no problem"),
        ({"id": "x", "problem": "\u3000", "questions": [part()]}, "empty problem"),
        ({"id": "x", "problem": "y"}, "no questions"),
        ({"id": "x", "problem": "y", "questions": {}}, "no questions"),
        (problem("good"), "duplicate id"),
    ],
)
def test_a_bad_line_is_skipped_with_its_number(tmp_path: Path, bad: Any, reason: str) -> None:
    questions, skipped = read(tmp_path, train=[problem("good"), bad, problem("after")])
    assert [(what, why) for what, why, _ in skipped] == [("train.jsonl:2", reason)]
    assert [question.id for question in questions] == ["good/0", "after/0"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("words", "question is not a JSON object"),
        (part(options=("only",)), "not 2 to 7 options"),
        (part(options=tuple("abcdefgh")), "not 2 to 7 options"),
        (part(options="red, blue"), "options are not a list of non-empty strings"),
        (part(options=("red", "")), "options are not a list of non-empty strings"),
        (part(options=("red", "", "blue")), "options are not a list of non-empty strings"),
        (part(options=("red", ["blue"])), "options are not a list of non-empty strings"),
        (part(options={"A": "red", "C": "blue"}), "options are not a list of non-empty strings"),
        (part(options={"A": "red", "B": None, "C": "blue"}), "options are not a list of non-empty strings"),
        ({"options": ["a", "b"], "answer": "A"}, "no question"),
        (part(question=" "), "empty question"),
        (part("D"), "answer is not an option"),
        (part(4), "answer is not an option"),
        (part(-1), "answer is not an option"),
        (part(True), "answer is not an option"),
        (part({"letter": "A"}), "answer is not a string"),
        (part(["A", "B"]), "answer is not a string"),
        (part("AB"), "answer is not an option"),
        (part("(D)"), "answer is not an option"),
        (part("A. blue"), "answer is not an option"),
        (part("a", options=("x", "a")), "ambiguous answer"),
        (part("same", options=("same", "Same")), "ambiguous answer"),
        (part(...), "no answer to train on"),
    ],
)
def test_a_bad_sub_question_is_skipped_and_the_others_keep_their_places(tmp_path: Path, bad: Any, reason: str) -> None:
    questions, skipped = read(tmp_path, train=[problem("p", part(), bad, part("C"))])
    assert [(what, why) for what, why, _ in skipped] == [("train.jsonl:1, question 2", reason)]
    assert [(question.id, question.answers) for question in questions] == [("p/0", ("A",)), ("p/2", ("C",))]


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("B", ("red", "blue"), "B"),
        (" b ", ("red", "blue"), "B"),
        ("Ｂ", ("red", "blue"), "B"),
        ("Blue", ("red", "blue"), "B"),
        ("是", ("否", "是"), "B"),
        ("A", ("B", "A"), "A"),  # a capital letter is a letter, which is the documented form
        ("C", ("C", "D"), "A"),  # not a letter of two options, but the text of one
        ("a", ("a", "x"), "A"),
        *[
            (written, ("red", "blue", "green"), "B")
            for written in (
                "B.",
                "(B)",
                "B)",
                "B、",
                "b.",
                "（Ｂ）",
                "Ｂ．",
                "B。",
                "[B]",
                "【B】",
                "B:",
                "B：",
                " (b) ",
                '"B"',
            )
        ],
        *[(written, ("red", "blue"), "B") for written in ("B. blue", "(B) Blue", "B、blue", "b: blue")],
        *[
            (written, ("red", "blue"), "B")
            for written in ("Option B", "option_b", "选项B", "答案：B", "B项", "Answer: (b)")
        ],
        ("2", ("1", "2", "3"), "B"),
        ("B", ("A. red", "B. blue"), "B"),
    ],
)
def test_an_answer_may_be_a_letter_or_an_options_text(
    tmp_path: Path, answer: str, options: tuple[str, ...], letter: str
) -> None:
    questions, _ = read(tmp_path, train=[problem("p", part(answer, options=options))])
    assert questions[0].answers == (letter,)


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, float("nan")])
def test_an_answer_that_is_null_or_empty_is_not_given(tmp_path: Path, nothing: Any) -> None:
    questions, skipped = read(tmp_path, train=[problem("p")], test=[problem("t", part(nothing), part("C"))])
    assert [(question.id, question.answers, question.split) for question in questions] == [
        *(("t/0", (), "asked"), ("t/1", ("C",), "test"), ("p/0", ("A",), "train")),
    ]
    assert skipped == []


@pytest.mark.parametrize(
    ("answers", "letters"),
    [
        ((0, 1, 2), "ABC"),
        ((1, 2, 3), "ABC"),
        ((1, 2), "BC"),  # from 0, unless the number of the last option says otherwise
        (("0", "2"), "AC"),
        (("3", "1"), "CA"),
        ((0.0, 1.0), "AB"),
        ((0, "B", "green"), "ABC"),
        (([2], ["A"]), "CA"),
    ],
)
def test_an_answer_may_be_the_options_number(tmp_path: Path, answers: tuple[Any, ...], letters: str) -> None:
    rows = [problem(f"p{number}", part(answer)) for number, answer in enumerate(answers)]
    for name in ("train", "sources__more"):
        folder = tmp_path / name
        folder.mkdir()
        questions, skipped = read(folder, **{name: rows})
        assert ["".join(question.answers) for question in questions] == list(letters)
        assert skipped == []
    labels = [{"id": row["id"], "questions": [{"answer": answer}]} for row, answer in zip(rows, answers, strict=True)]
    unlabelled = [problem(row["id"], part(...)) for row in rows]
    (tmp_path / "labelled").mkdir()
    questions, _ = read(tmp_path / "labelled", train=[problem("x")], test=unlabelled, labels__guessed=labels)
    assert ["".join(question.answers) for question in questions if question.label_source] == list(letters)


def test_an_options_text_comes_before_its_number(tmp_path: Path) -> None:
    questions, _ = read(tmp_path, train=[problem("p", part(2, options=[1, 2, 3]), part(1.5, options=[0.5, 1.5]))])
    assert [(question.options, question.answers) for question in questions] == [
        (("1", "2", "3"), ("B",)),
        (("0.5", "1.5"), ("B",)),
    ]


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        ({"A": "red", "B": "blue", "C": "green"}, "B", "B"),
        ({"C": "green", "A": "red", "B": "blue"}, "green", "C"),
        ({"a": "red", "b": "blue", "c": "green"}, "(b)", "B"),
        ({"A.": "red", "B.": "blue", "C.": "green", "D.": None}, "A", "A"),
        ({"option_a": "red", "option_b": "blue", "option_c": "green"}, "option_b", "B"),
        ({"0": "red", "1": "blue", "2": "green"}, 1, "B"),
        ({"1": "red", "2": "blue", "3": "green"}, 1, "A"),
        ({"1": "red", "2": "blue", "3": "green"}, "2", "B"),
        ({"label": ["A", "B", "C"], "text": ["red", "blue", "green"]}, "C", "C"),
        (["red", "blue", "green", None, ""], "C", "C"),
        (["A. red", "B. blue", "C. green"], "B. blue", "B"),
        (["(A) red", "(B) blue", "(C) green"], "B", "B"),
        (["A、red", "B、blue", "Ｃ．green"], "green", "C"),
    ],
)
def test_options_may_be_a_mapping_or_have_their_letters(tmp_path: Path, options: Any, answer: Any, letter: str) -> None:
    questions, skipped = read(tmp_path, train=[problem("p", part(answer, options=options))])
    assert skipped == []
    assert [(question.options, question.answers) for question in questions] == [(("red", "blue", "green"), (letter,))]


def test_options_that_only_look_as_if_they_had_letters_stay(tmp_path: Path) -> None:
    options = ("B. Brown", "A. Adams")
    questions, _ = read(tmp_path, train=[problem("p", part("A. Adams", options=options))])
    assert (questions[0].options, questions[0].answers) == (options, ("B",))


@pytest.mark.parametrize("encoding", ["utf-16", "gbk", "utf-8-sig"])
def test_files_in_another_encoding_are_read(tmp_path: Path, encoding: str) -> None:
    rows = [problem("p", part("红", options=("蓝", "红")), text="小明有一顶帽子。")]
    for name in ("train", "sources/more"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_bytes(text.encode(encoding))
    questions, skipped = read(tmp_path)
    assert [(q.problem, q.options, q.answers) for q in questions] == [("小明有一顶帽子。", ("蓝", "红"), ("B",))] * 2
    assert skipped == []


def test_splits_follow_from_the_files(tmp_path: Path) -> None:
    unlabelled = problem("t", part(...), part(...))
    questions, skipped = read(tmp_path, train=[problem("p")], test=[unlabelled], sources__more=[problem("m")])
    assert [(q.id, q.source, q.split) for q in questions] == [
        ("t/0", "train", "asked"),
        ("t/1", "train", "asked"),
        ("p/0", "train", None),
        ("m/0@more", "more", "train only"),
    ]
    assert not skipped
    questions, _ = read(tmp_path, test=[problem("t", part("B"), part(...))])
    assert [(q.id, q.split) for q in questions][:3] == [("t/0", "test"), ("t/1", "asked"), ("p/0", "train")]


def test_the_same_problem_is_one_group_under_any_id_and_in_any_file(tmp_path: Path) -> None:
    text = "小明  有帽子ＡＢ，\n小红没有。"
    questions, _ = read(
        tmp_path,
        train=[problem("p", text=text), problem("other")],
        sources__more=[problem("m", text=" ".join(unicodedata.normalize("NFKC", text).split()))],
        test=[problem("t", text=f" {text}\n")],
    )
    groups = {question.problem_id: question.group for question in questions}
    assert groups["p"] == groups["m"] == groups["t"] != groups["other"]


def test_ids_differ_where_files_share_them(tmp_path: Path) -> None:
    questions, skipped = read(
        tmp_path,
        train=[problem("1"), problem("2")],
        test=[problem("1", text="Another.")],
        sources__more=[problem("1", text="A third.")],
    )
    assert [question.id for question in questions] == ["1/0", "1/0@train", "2/0", "1/0@more"]
    assert not skipped


def test_guessed_answers_are_matched_by_problem_and_position(tmp_path: Path) -> None:
    questions, skipped = read(
        tmp_path,
        train=[problem("p", part("A"), part("B"))],
        test=[problem("t", part(...), part(..., options=("no",)), part(...))],
        labels__guessed=[
            {"id": "t", "questions": [{"answer": "c"}, {"answer": "A"}, {"answer": "blue"}]},
            {"id": "p", "questions": [{"answer": "C"}, {"answer": "G"}]},
            {"id": "nobody", "questions": [{"answer": "A"}]},
            {"id": "t", "questions": [{"answer": "A"}] * 3},
            b"{",
        ],
        labels__short=[{"id": "p", "questions": [{"answer": "A"}]}, {"id": "t", "questions": [{}, {}, {"answer": ""}]}],
    )
    guessed = [question for question in questions if question.label_source]
    assert [(q.id, q.answers, q.source, q.split, q.label_source) for q in guessed] == [
        ("t/0@guessed", ("C",), "guessed", "train only", "guessed"),
        ("t/2@guessed", ("B",), "guessed", "train only", "guessed"),
        ("p/0@guessed", ("C",), "guessed", "train only", "guessed"),
    ]
    assert [(what, why) for what, why, _ in skipped] == [
        ("test.jsonl:1, question 2", "not 2 to 7 options"),
        ("labels/guessed.jsonl:1, question 2", "label of an unusable question"),
        ("labels/guessed.jsonl:2, question 2", "label: answer is not an option"),
        ("labels/guessed.jsonl:3", "label of an unknown problem"),
        ("labels/guessed.jsonl:4", "duplicate id"),
        ("labels/guessed.jsonl:5", "not JSON"),
        ("labels/short.jsonl:1", "label with a different number of sub-questions"),
        ("labels/short.jsonl:2, question 1", "label: no answer"),
        ("labels/short.jsonl:2, question 2", "label of an unusable question"),
        ("labels/short.jsonl:2, question 3", "label: no answer"),
    ]
    assert one_sample(label_source="guessed")["meta"]["label_source"] == "guessed"


def test_a_label_of_an_ambiguous_id_is_skipped(tmp_path: Path) -> None:
    label = {"id": "1", "questions": [{"answer": "A"}]}
    two = {"train": [problem("1")], "test": [problem("1", text="Another.")]}
    _, skipped = read(tmp_path, **two, labels__g=[label])
    assert skipped[-1][:2] == ("labels/g.jsonl:1", "label of an id with several problems")
    _, skipped = read(tmp_path, test=[problem("1")])
    assert not skipped, "the same problem twice is not ambiguous"
    twice = {"train": [problem("1")], "test": [problem("1", part(...))]}
    questions, skipped = read(tmp_path, **twice, labels__g=[label])
    assert not skipped, "with its answer and without"
    assert [question.id for question in questions if question.label_source] == ["1/0@g"]


def test_sources_are_the_files(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"nothing to train on, found nothing; put train\.jsonl there, or files into sources/ or labels/",
    ):
        sources(tmp_path)
    read(tmp_path, train=[problem("p")], sources__more=[problem("m")], labels__g=[])
    (tmp_path / "labels" / "notes.txt").write_text("")
    assert sources(tmp_path) == ["g", "more", "train"]
    (tmp_path / "labels" / "more.jsonl").write_text("")
    with pytest.raises(DataError, match="ambiguous names more; rename the files of sources/ and labels/"):
        sources(tmp_path)


def test_a_folder_without_a_usable_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable question in .*; 1 of 1 skipped: not JSON, first train\.jsonl:1 \("):
        read(tmp_path, train=[b"no"])
    with pytest.raises(DataError, match=r"skipped: no id, first train\.jsonl:1 \(found the keys question, choices\)"):
        read(tmp_path, train=[{"question": "Which?", "choices": ["red"]}])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4))
def test_no_value_in_a_line_stops_reading(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [problem("p", part(value), part(options=value), {"question": value, "options": value})]
    more = [{"id": value, "problem": value, "questions": value}, value]
    questions, _ = read(folder, train=[problem("good"), *rows, *more], test=more, labels__l=[*rows, *more])
    assert questions
    asked_rows(folder, questions)


# -- samples -----------------------------------------------------------------------------------------------------


def test_an_english_and_a_chinese_prompt() -> None:
    english = one_sample()["messages"]
    assert [message["role"] for message in english] == ["system", "user"]
    assert "what the facts do not say or imply is false" in english[0]["content"]
    assert english[1]["content"].startswith("Tom has the hat.\nQuestion: Which?\nA. red\nB. blue\nC. green\n")
    assert "`Answer: `" in english[1]["content"]
    chinese = one_sample(problem="小明有帽子。", text="哪个？", options=("红", "蓝"))["messages"]
    assert "封闭世界" in chinese[0]["content"]
    for words in ("题目：小明有帽子。\n问题：哪个？\nA. 红\nB. 蓝\n", "单选题", "答案是："):
        assert words in chinese[1]["content"]


def test_training_learns_only_the_answer_line_and_the_letter_is_scored() -> None:
    assert one_sample("train")["meta"]["target"] == "Answer: B"
    assert one_sample("validation", problem="小明有帽子。")["meta"]["target"] == "答案是：B"
    tested = one_sample("test")
    assert tested["references"] == ["B"] and "target" not in tested["meta"]
    assert [score(recipe(), answer, tested) for answer in "BA"] == [{"accuracy": 1.0}, {"accuracy": 0.0}]
    assert read_answer(one_sample("train")["meta"]["target"], tested) == "B"


def test_meta_names_the_origin_of_a_sample() -> None:
    meta = one_sample(options=("x", "y"), id="p/3@g", index=3, source="g", label_source="g")["meta"]
    assert meta["kind"] == "2 options" and meta["options"] == {"A": "x", "B": "y"}
    assert (meta["problem_id"], meta["index"], meta["source"], meta["label_source"]) == ("p", 3, "g", "g")


def test_a_prompt_says_what_the_data_say() -> None:
    text = one_sample(problem="<|im_end|> <image>", text="<|x|>?", options=("<image>", "b"))["messages"][1]["content"]
    assert "<image>" not in text, "without a picture in its place"
    said = text.replace("\u2060", "")
    assert said.startswith("<|im_end|> <image>\nQuestion: <|x|>?\nA. <image>\nB. b\n")


# -- completions -------------------------------------------------------------------------------------------------

HATS = {"A": "red hat", "B": "blue hat", "C": "green hat"}
PEOPLE = {"A": "Ann", "B": "Tom", "C": "Ben", "D": "Eve"}
CHINESE = {"A": "小明", "B": "小红", "C": "小刚"}
YES = {"A": "Yes", "B": "No"}
SHI = {"A": "是", "B": "否"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[(text, "B") for text in ("Answer: B", "Answer: b", "answer is **B**.", "The answer is (B)", "Answer: `B`")],
        *[
            (text, "B")
            for text in (
                "答案是：B",
                "答案是Ｂ。",
                "答案：（B）",
                "答案 B",
                "【答案】B",
                "答案是选项B",
                "答案应为 B 项",
            )
        ],
        *[
            (text, "B")
            for text in ("Answer:\n\nB", "The correct option is B", "Answer to question 2: B", r"Answer: \boxed{B}")
        ],
        *[(text, "B") for text in ("B", "b", "B.", "(B)", " B\n", "Ⓑ", r"$\boxed{B}$", "B. blue hat", "B) Blue hat.")],
        *[(text, "B") for text in ("so it is this one\nB", "It is the blue hat, not the red hat.", "BLUE  HAT")],
        ("Answer: A. No, wait. Answer: C", "C"),
        ("Answer: B. Wait. Answer: G", "B"),  # G is not an option
        ("选项A是错的，答案是B", "B"),
        ("答案是B，选项A错误", "B"),
        ("故选C", "C"),
        ("I choose (C)", "C"),
        ("Answer: A", "A"),
        ("Answer: A because Tom has it", "A"),
        ("Answer: A\nTom has it", "A"),
        ("A: red hat", "A"),
        *[
            (text, "B")
            for text in (
                *("I think (B) is correct.", "B is the right one, I think", "B is the correct answer.", "B is right"),
                *("选项B正确", "选项B是正确的。", "B是正确答案", "B是对的", "B项符合题意"),
                *("答案可能是B", "The answer is most likely B", "答案只能是B", "答案最终应选B"),
                *("I would not choose A. I choose B.", "不选A，选B", "排除A，不能选C，应该选B", "不得不选B"),
                *("If the answer is A, Tom lies. So the answer is B", "如果答案是C，则矛盾；答案是B"),
                *("If Ann is here then the answer is B", "若有帽子，则选B", "答案是A吗？不，答案是B", "答案是B不是A"),
                "选项A错误；选项B正确；选项C错误",
            )
        ],
    ],
)
def test_the_letter_is_found(text: str, letter: str) -> None:
    assert letter_in(text, HATS) == letter


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "  \n",
            "Answer:",
            "答案是：",
            "Answer: D",
            "答案是：H",
            "D",
            "Answer: 2",
            "Answer: Apple",
            "Answer: A-frame",
        ),
        *("A man has it.", "Let A be a hat. Then B.", "The answer is a hat", "Answer: A hat", "It is a hat."),
        *("Answer: A or B", "答案是A和B", "答案是AB", "Answer: A/B/C", "答案是A、B、C中的一个", "Answer: A, C."),
        *("The answer is not B", "答案不是B", "not the blue hat", "red hat or blue hat", "blue hatter"),
        *("A. red hat\nB. blue hat\nC. green hat", "A. blue", "选项B", "BLUE", "abc"),
        *(
            "不选B",
            "我不选B",
            "排除A，不能选B",
            "没有选B的理由",
            "不应该选B",
            "别选B",
            "无法选B",
            "选B不对",
            "选B是错的",
        ),
        *("I would not choose B.", "I don't pick B", "Never choose C.", "no reason to choose B", "I cannot select B"),
        *(
            "为什么选B？",
            "Why choose B?",
            "选A还是选B？",
            "选A还是B",
            "Is the answer B?",
            "答案是B吗？",
            "Answer: B? No. C",
        ),
        *("答案是：C不对", "答案是：C不对，B", "The answer B is not possible", "如果选B", "If I choose B it fails"),
        *(
            "B is not correct",
            "B不正确",
            "如果B正确",
            "B正确吗",
            "A is correct and B is correct",
            "whether B is correct",
        ),
    ],
)
def test_a_completion_without_an_answer_has_no_letter(text: str) -> None:
    assert letter_in(text, HATS) is None


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("The answer is a blue hat.", HATS, "B"),  # an article, then an option
        ("Answer: A blue hat", HATS, "B"),
        ("Answer: A red hat", HATS, "A"),
        ("It is Tom.", PEOPLE, "B"),
        ("Tomorrow", PEOPLE, None),
        ("Ben's", PEOPLE, "C"),
        ("Neither Tom nor Eve", PEOPLE, None),
        ("Yes", YES, "A"),
        ("No, he is not.", YES, "B"),
        ("There is no way to tell.", YES, None),
        ("是", SHI, "A"),
        ("否。", SHI, "B"),
        ("不是", SHI, None),
        ("这是他的帽子", SHI, None),
        ("答案是小红", CHINESE, "B"),
        ("不是小红", CHINESE, None),
        ("小红和小刚", CHINESE, None),
        ("the dark red one", {"A": "red", "B": "dark red"}, "B"),
        ("B", {"A": "B", "B": "A"}, "B"),
        ("Answer: D", {"B": "x", "D": "y"}, "D"),
        ("Answer: A", {"B": "x", "D": "y"}, None),
        ("答案是：A同学", {"A": "B同学", "B": "A同学"}, "B"),
        ("The answer is B is taller.", {"A": "B is taller", "B": "A is taller"}, "A"),
        ("答案是：B", {"A": "B同学", "B": "A同学"}, "B"),
        ("1", {"A": "3", "B": "1"}, "B"),
        ("in 1 hour", {"A": "3", "B": "1"}, None),
        ("B是对的", {"A": "A说谎", "B": "B说谎"}, None),  # a person in the problem
    ],
)
def test_options_by_their_text(text: str, options: Mapping[str, str], letter: str | None) -> None:
    assert letter_in(text, options) == letter


@given(st.text(alphabet="ABCDEFGHabcdefgh answeris:.,()答案是选项不和or\n*", max_size=60), st.integers(2, 7))
def test_a_letter_outside_the_options_is_never_read(text: str, count: int) -> None:
    options = dict(zip("ABCDEFG", ["one", "two", "three", "four", "five", "six", "seven"][:count], strict=False))
    assert letter_in(text, options) in (None, *options)


@pytest.mark.parametrize(
    "text", ["is ", "答案", "答案应该是", "选择", "不是", "( ", "Answer: A ", "to x ", "a, ", "not blue hat ", "选B吗 "]
)
def test_long_completions_are_read_in_linear_time(text: str) -> None:
    began = time.process_time()
    letter_in("answer " + text * 4000, HATS)
    assert time.process_time() - began < 2


# -- passes ------------------------------------------------------------------------------------------------------


def test_retries_stop_at_the_first_valid_letter() -> None:
    one, three = one_sample(), recipe("infer.passes={retries: 3, retry_temperature: 0.5}")
    assert passes(three) == ("answer", "retry_1", "retry_2", "retry_3")
    assert passes(recipe("infer.passes.retries=0")) == ("answer",)
    first = ask(three, one, "answer", {}, ())
    assert first is not None and first.temperature == 0 and first.messages == one["messages"]
    before = {"answer": "Answer: G"}
    again = [ask(three, one, name, before, ()) for name in passes(three)[1:]]
    assert all(each is not None and each.temperature == 0.5 and each.messages == one["messages"] for each in again)
    assert len({each.seed for each in again if each}) == 3
    assert ask(three, one, "retry_2", {**before, "retry_1": "Answer: C"}, ()) is None
    assert ask(three, one, "retry_1", before, ("retry",)) is None
    assert ask(three, one, "retry_1", {"answer": "Answer: A"}, ()) is None


def test_a_retrys_seed_depends_on_the_sample() -> None:
    def seed(name: str) -> int:
        asked = ask(recipe(), one_sample(id=name), "retry_1", {"answer": ""}, ())
        assert asked is not None
        return asked.seed

    assert seed("p/0") == seed("p/0") != seed("p/1")


def test_rehearsal_returns_the_prompt() -> None:
    ((rehearsed, spare),) = possible_prompts(recipe(), one_sample(), ())
    assert rehearsed.messages == one_sample()["messages"] and spare == 0


def test_a_narrowed_question_keeps_its_letters() -> None:
    whole = one_sample()
    fewer = narrowed_sample(whole, ["A", "C"])
    assert fewer is not None
    assert "A. red\nC. green\n" in fewer["messages"][1]["content"] and "blue" not in fewer["messages"][1]["content"]
    assert [read_answer(f"Answer: {letter}", fewer) for letter in "ABC"] == ["A", None, "C"]
    assert whole == one_sample() and fewer["references"] == ["B"]
    assert narrowed_sample(whole, ["A"]) is None
    assert narrowed_sample(whole, ["A", "B", "C"]) is None, "the question would be the same"


# -- submission --------------------------------------------------------------------------------------------------


def answered(name: str, letter: str | None) -> Prediction:
    return {**failed_prediction(name, "no answer"), "answer": letter, "error": None if letter else "no answer"}


def test_a_submission_has_every_problem_in_the_files_order(tmp_path: Path) -> None:
    questions, _ = read(
        tmp_path,
        train=[problem("p")],
        test=[
            problem("z", part(...), part(..., options=("one",)), part(...)),
            b"{",
            problem("a", part(...)),
            problem("a"),
        ],
    )
    rows = asked_rows(tmp_path, questions)
    assert [row["places"] for row in rows if row.get("line", True)] == [["z/0", None, "z/2"], [], ["a/0"], [None]]
    found = {"z/2": answered("z/2", "C"), "a/0": answered("a/0", None)}
    assert [submission(row, found) for row in rows if row.get("line", True)] == [
        {"id": "z", "questions": [{"answer": ""}, {"answer": ""}, {"answer": "C"}]},
        {"id": "", "questions": []},
        {"id": "a", "questions": [{"answer": ""}]},
        {"id": "a", "questions": [{"answer": ""}]},
    ]


def test_a_submission_has_ids_as_written_in_the_file(tmp_path: Path) -> None:
    numbered = {**problem("7", part(...)), "id": 7}
    broken = b'{"id": "\\ud83d", "problem": "x", "questions": [{}]}'
    questions, _ = read(tmp_path, train=[problem("p")], test=[numbered, problem(" b ", part(...)), broken])
    assert [question.id for question in questions][:2] == ["7/0", "b/0"]
    asked = [row for row in asked_rows(tmp_path, questions) if row.get("line", True)]
    found = {"7/0": answered("7/0", "A"), "b/0": answered("b/0", "B")}
    lines = [submission(row, found) for row in asked]
    assert lines == [
        {"id": 7, "questions": [{"answer": "A"}]},
        {"id": " b ", "questions": [{"answer": "B"}]},
        {"id": "?", "questions": [{"answer": ""}]},
    ]


def test_problems_held_out_beside_test_data_are_not_submitted(tmp_path: Path) -> None:
    questions, _ = read(tmp_path, train=[problem("p")], test=[problem("b", part(...)), problem("a", part(...))])
    rows = asked_rows(tmp_path, questions)
    assert sorted(name for row in rows for name in row["ids"]) == ["a/0", "b/0", "p/0"]
    asked = [row for row in rows if row.get("line", True)]
    lines = [submission(row, {"p/0": answered("p/0", "A"), "a/0": answered("a/0", "B")}) for row in asked]
    assert lines == [{"id": "b", "questions": [{"answer": ""}]}, {"id": "a", "questions": [{"answer": "B"}]}]


def test_without_test_data_the_held_out_problems_are_submitted(tmp_path: Path) -> None:
    questions, _ = read(tmp_path, train=[problem("c"), problem("a"), problem("b", part(), part())])
    held_out = [question for question in questions if question.problem_id != "a"]
    assert [(row["id"], row["ids"]) for row in asked_rows(tmp_path, held_out)] == [
        ("c", ["c/0"]),
        ("b", ["b/0", "b/1"]),
    ]


# -- the recipe's data -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    path = REPOSITORY / "recipes" / "data" / "make_logic_choice.py"
    spec = importlib.util.spec_from_file_location("make_logic_choice", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_data_are_what_the_script_writes(maker: ModuleType, tmp_path: Path) -> None:
    maker.make(tmp_path, 3, 320, 80, 80, answers=False)
    ours = REPOSITORY / "recipes" / "data" / "logic-choice"
    names = sorted(str(path.relative_to(ours)) for path in ours.rglob("*.jsonl"))
    assert names == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl"))
    for name in names:
        assert (ours / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_all_of_the_data_are_usable() -> None:
    skipped: Skipped = []
    folder = REPOSITORY / "recipes" / "data" / "logic-choice"
    questions = read_questions(recipe(), folder, set(), lambda *what: skipped.append(what))  # type: ignore[arg-type]
    assert not skipped
    problems = {
        (question.source, question.problem_id) for question in questions if question.source in ("train", "test")
    }
    assert len(problems) >= 300
    assert {len(question.options) for question in questions} == {2, 3, 4, 5, 6, 7}
    assert any("\u4e00" <= question.problem[0] <= "\u9fff" for question in questions)
    for question in questions:
        own = "asked" if question.problem_id.startswith("test") else None
        assert question.split == (own if question.source == "train" else "train only")


def test_some_guessed_answers_are_wrong(maker: ModuleType) -> None:
    known = maker.make_file(3, "test", 80)
    right = {(one["id"], n): q["answer"] for one in known for n, q in enumerate(one["questions"])}
    folder = REPOSITORY / "recipes" / "data" / "logic-choice" / "labels"
    for name, share in maker.LABELS.items():
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        hits = Counter(q["answer"] == right[row["id"], n] for row in rows for n, q in enumerate(row["questions"]))
        assert abs(hits[True] / hits.total() - share) < 0.1 and hits[False]


def test_hats_by_hand(maker: ModuleType) -> None:
    """All hats follow: the stated one, the one that does not have the third colour, and the third."""
    for number in range(200):
        one = maker.make_problem(1, "hats", number * 6 + 5)
        if not one["problem"].isascii():
            continue
        intro, *said = one["problem"].removesuffix(".").split(". ")
        people = intro.split(" wear")[0].replace(" and ", ", ").split(", ")
        colours = {word for word in intro.replace(",", "").split() if word in maker.COLOURS[0]}
        shown, colour = next(clue.split()[3::2] for clue in said if " not " not in clue)
        hidden, third = next((clue.split()[3], clue.split()[-1]) for clue in said if " not " in clue)
        wears = {shown: colour, hidden: (colours - {colour, third}).pop()}
        wears[next(name for name in people if name not in wears)] = third
        for question in one["questions"]:
            right = question["options"]["ABCDEFG".index(question["answer"])]
            words = question["question"].removesuffix("?").split()
            if words[0] == "Which":
                assert right == wears[words[-1]]
            elif words[0] == "Who":
                assert wears[right] == words[3]
            else:
                assert right == ("Yes" if wears[words[-2]] == words[-1] else "No")


def test_families_by_hand(maker: ModuleType) -> None:
    for number in range(200):
        one = maker.make_problem(1, "family", number * 6 + 3)
        if not one["problem"].isascii():
            continue
        clues = [clue.split() for clue in one["problem"].removesuffix(".").split(". ")]
        children = {(words[0], words[-1]) for words in clues}
        for question in one["questions"]:
            right = question["options"]["ABCDEFG".index(question["answer"])]
            words = question["question"].removesuffix("?").split()
            first, second = (words[2], words[4]) if words[0] == "What" else (words[1], words[-1])
            grandchild = any((first, each) in children and (each, second) in children for each, _ in children)
            grandparent = any((second, each) in children and (each, first) in children for each, _ in children)
            parents = [{above for below, above in children if below == name} for name in (first, second)]
            found = {
                "parent": (second, first) in children,
                "grandparent": grandparent,
                "child": (first, second) in children,
                "grandchild": grandchild,
                "brother or sister": bool(parents[0] & parents[1]),
            }
            if words[0] == "What":
                assert [name for name, is_it in found.items() if is_it] == ([right] if right != "none of these" else [])
            else:
                assert right == ("Yes" if found["child"] else "No")
