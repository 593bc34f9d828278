"""extractive_qa: forms of records, skipped records, groups and splits, prompts and scores."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.contract.errors import DataError
from stages.contract.recipe import Recipe
from stages.contract.records import failed_prediction
from stages.tasks import load_task, settle_recipe
from stages.tasks.extractive_qa import (
    ask,
    asked_rows,
    build_samples,
    passes,
    possible_prompts,
    read_answer,
    read_questions,
    score,
    sources,
    submission,
)
from stages.tasks.extractive_qa.questions import ContextQuestion
from stages.tasks.task import Task

RECIPE = Recipe.model_validate({
    "task": "extractive_qa",
    "model": {"path": "m", "swift_type": "llama", "swift_template": "chatml"},
    "data": {"path": "d"},
    "preprocess": {},
    "train": {"adapter_for_each_source": True},
})  # fmt: skip

Skipped = list[tuple[str, str]]


def read(folder: Path) -> tuple[list[ContextQuestion], Skipped]:
    skipped: Skipped = []

    def skip(what: str, reason: str, detail: str = "") -> None:
        detail.encode()  # it can be stored and printed
        skipped.append((what, reason))

    return read_questions(RECIPE, folder, set(), skip), skipped


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def messages(content: Any, answer: Any = "gear", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def squad(context: Any = "Part 3 is a gear.", question: Any = "What is part 3?", **more: Any) -> dict[str, Any]:
    return {"context": context, "question": question, "answers": {"text": ["gear"], "answer_start": [12]}, **more}


def one(folder: Path, record: Any) -> ContextQuestion:
    write(folder / "a.jsonl", record)
    (question,), skipped = read(folder)
    assert not skipped
    return question


# -- records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "context", "question"),
    [
        ("Context: Part 3 is a gear.\nQuestion: What is it?", "Part 3 is a gear.", "What is it?"),
        ("Context: c\n\nQuestion:\nWhat\nis it?\n", "c", "What\nis it?"),
        ("  context : c\n  QUESTION : q", "c", "q"),
        ("Context: a Context: b Question: c\nQuestion: q", "a Context: b Question: c", "q"),
        ("Context: c\nQuestion: old?\nQuestion: new Question: ?", "c\nQuestion: old?", "new Question: ?"),
        ("Context:\nQuestion: q", "", "q"),
        ("上下文：部件3是齿轮。\n问题：部件3是什么？", "部件3是齿轮。", "部件3是什么？"),
        ("Context: Part 3 is a gear. Question: What is it?", "Part 3 is a gear.", "What is it?"),
        ("Context: an Unquestion: stays. Question: q", "an Unquestion: stays.", "q"),
        ("上下文：部件3是齿轮。问题：部件3是什么？", "部件3是齿轮。", "部件3是什么？"),
        ("What is a Question: of Context: ?", "", "What is a Question: of Context: ?"),
        ("Question: q", "", "Question: q"),
        ("Context: c, but nothing is asked", "", "Context: c, but nothing is asked"),
        ("First\nContext: c\nQuestion: q", "", "First\nContext: c\nQuestion: q"),
    ],
)  # fmt: skip
def test_context_and_question_of_a_message(tmp_path: Path, content: str, context: str, question: str) -> None:
    found = one(tmp_path, messages(content))
    assert (found.context, found.text, found.answers) == (context, question, ("gear",))


def test_a_system_message_is_allowed(tmp_path: Path) -> None:
    record = messages("Context: c\nQuestion: q")
    record["messages"].insert(0, {"role": "system", "content": "You are a pirate."})
    found = one(tmp_path, record)
    assert (found.context, found.text) == ("c", "q")
    assert "pirate" not in json.dumps(build_samples(RECIPE, found, None, "train"))


@pytest.mark.parametrize(
    ("answers", "read_as"),
    [
        ({"answers": {"text": ["a", "b"]}}, ("a", "b")),
        ({"answers": {"text": "a"}}, ("a",)),
        ({"answers": [{"text": "a", "answer_start": 3}, {"text": "b"}]}, ("a", "b")),
        ({"answers": ["a", "", " a ", "b"]}, ("a", "b")),
        ({"answers": "a"}, ("a",)),
        ({"answer": "a"}, ("a",)),
        ({"answer": ["a", "b"], "answers": None}, ("a", "b")),
        ({"answers": ["12  High\n\n  Street "]}, ("12 High\nStreet",)),
        ({"answers": 7}, ("7",)),
        ({"answers": [3, 3.5, True]}, ("3", "3.5", "true")),
        ({"answers": {"text": [1999], "answer_start": [2]}}, ("1999",)),
        ({"answers": [{"text": 4}]}, ("4",)),
        ({"answers": [None, "a", ""]}, ("a",)),
        ({"answers": "", "answer": "a"}, ("a",)),
        ({"answers": {"text": [], "answer_start": []}, "answer": 5}, ("5",)),
        ({"answers": ["x<|im_end|>", "<image>"]}, ("x<|im_end|>", "<image>")),
        ({"answers": "a", "messages": None}, ("a",)),
        ({"answers": "a", "messages": [], "context": None, "group": None, "title": "", "id": None}, ("a",)),
    ],
)
def test_answers_of_a_record(tmp_path: Path, answers: dict[str, Any], read_as: tuple[str, ...]) -> None:
    assert one(tmp_path, {"context": "c", "question": "q", **answers}).answers == read_as


def test_squads_own_file(tmp_path: Path) -> None:
    def paragraph(context: str, *ids: str) -> dict[str, Any]:
        answers = [{"text": "gear", "answer_start": 0}, {"text": "a gear", "answer_start": 0}]
        return {"context": context, "qas": [{"id": id, "question": f"q {id}?", "answers": answers} for id in ids]}

    impossible = {"context": "c4", "qas": [{"id": "5", "question": "q?", "answers": [], "is_impossible": True}]}
    articles = [
        {"title": "Gears", "paragraphs": [paragraph("c1", "1", "2"), paragraph("c2", "3")]},
        {"title": "Levers", "paragraphs": [paragraph("c3", "4"), impossible]},
    ]
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}, indent=1))
    questions, skipped = read(tmp_path)
    assert [(q.id, q.context) for q in questions] == [
        (f"dev-v2.0/{n}", context) for n, context in enumerate(("c1", "c1", "c2", "c3"), 1)
    ]
    assert questions[0].answers == ("gear", "a gear")
    assert [q.group == questions[0].group for q in questions] == [True, True, True, False], "by article"
    assert [reason for _, reason in skipped] == ["no answer"]
    assert skipped[0][0].startswith("dev-v2.0.json:")


ROLES, LIST = "not one user and one assistant message", "messages is not a list of objects"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"context": "c", "quest', "not JSON"),
        ("\\xff", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ("null", "not a JSON object"),
        (squad(question=""), "empty question"),
        (squad(question="  \u3000"), "empty question"),
        (squad(question=None), "no question"),
        (squad(question=3), "question is not a string"),
        (squad(context=["c"]), "context is not a string"),
        (squad(answers={"text": []}), "no answer"),
        (squad(answers=[""]), "no answer"),
        (squad(answers=None), "no answer"),
        (squad(answers=[["3"]]), "answer is neither a text nor a number, nor a list of them"),
        (squad(answers={"text": {}}, answer=[{}]), "no answer"),
        ({"text": "just text"}, "no question"),
        ({"messages": []}, ROLES),
        ({"messages": messages("q")["messages"] * 2}, ROLES),
        ({"messages": messages("q")["messages"][::-1]}, ROLES),
        ({"messages": messages("q")["messages"][:1]}, ROLES),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ROLES),
        ({"messages": "Context: c"}, LIST),
        ({"messages": [1, 2]}, LIST),
        (messages("Context: c\nQuestion:"), "empty question"),
        (messages(" "), "empty question"),
        (messages("q", " \n"), "no answer"),
        (messages("q", None), "no content"),
        (messages([{"type": "text", "text": "q"}]), "content is not a string"),
        ({"paragraphs": [3]}, "not a JSON object"),
        ({"context": "c", "qas": ["q"]}, "not a JSON object"),
    ],
)  # fmt: skip
def test_a_bad_record_is_skipped_with_its_line_and_the_others_are_read(tmp_path: Path, bad: Any, reason: str) -> None:
    parts = [
        json.dumps(squad(id="first")),
        bad if isinstance(bad, str) else json.dumps(bad),
        json.dumps(squad(id="last")),
    ]
    for name, text in {"a.jsonl": "\n".join(parts), "a.json": "[\n" + ",\n".join(parts) + "]"}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text, encoding="utf-8")
        questions, skipped = read(folder)
        assert [q.id for q in questions] == ["a/first", "a/last"]
        line = 2 if name == "a.jsonl" else 3
        assert skipped == [(f"{name}:{line}", reason)]


def test_a_data_set_without_a_usable_record_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(
        DataError, match=r"usable question in a; 1 of 1 skipped: no question, first a\.jsonl:1 \(found the"
    ):
        read(tmp_path)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"no data set, found a\.txt; put files with an ending of \.json, "):
        read(tmp_path)


def test_an_assistants_number_is_its_text(tmp_path: Path) -> None:
    assert one(tmp_path, messages("How many?", 3)).answers == ("3",)


def test_a_nested_question_has_what_is_null_from_above(tmp_path: Path) -> None:
    question = {"question": "q?", "answers": ["a"], "context": None, "title": ""}
    found = one(tmp_path, {"title": "t", "context": "c", "qas": [question]})
    assert (found.context, found.text) == ("c", "q?")


def test_numbers_in_a_table_with_missing_values(tmp_path: Path) -> None:
    """The missing value makes the whole column floats."""
    rows = {"context": ["c"] * 3, "question": ["q1", "q2", "q3"], "answer": pa.array([2, None, 3.5], pa.float64())}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    questions, skipped = read(tmp_path)
    assert [question.answers for question in questions] == [("2",), ("3.5",)]
    assert [reason for _, reason in skipped] == ["no answer"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "gbk", "utf-8-sig"])
@pytest.mark.parametrize("form", ["lines", "array", "indented", "SQuAD's"])
def test_a_data_set_in_another_encoding_is_read(tmp_path: Path, encoding: str, form: str) -> None:
    record = squad("部件3是齿轮，在上方。", "部件3是什么？", answers={"text": ["齿轮"], "answer_start": [4]})
    paragraph = {"context": record["context"], "qas": [{"question": record["question"], "answers": ["齿轮"]}]}
    text = {
        "lines": json.dumps(record, ensure_ascii=False) + "\r\n",
        "array": json.dumps([record], ensure_ascii=False),
        "indented": json.dumps([record], ensure_ascii=False, indent=4),
        "SQuAD's": json.dumps({"version": "1", "data": [{"paragraphs": [paragraph]}]}, ensure_ascii=False, indent=1),
    }[form]
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    questions, skipped = read(tmp_path)
    assert [(q.context, q.text, q.answers) for q in questions] == [
        ("部件3是齿轮，在上方。", "部件3是什么？", ("齿轮",))
    ]
    assert skipped == []


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=4) | st.floats(allow_nan=False),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "context", "question", "answers", "text", "data", "paragraphs", "qas", "id"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
@example({"data": [{"messages": None}]})
def test_no_record_stops_reading(tmp_path_factory: pytest.TempPathFactory, record: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    write(folder / "a.jsonl", record, squad(id="last"))
    questions, _ = read(folder)
    assert "a/last" in {question.id for question in questions}


# -- data sets ---------------------------------------------------------------------------------------------------


def test_each_entry_is_a_data_set(tmp_path: Path) -> None:
    write(tmp_path / "lines.jsonl", squad())
    (tmp_path / "array.json").write_text(json.dumps([squad(), squad()]))
    write(tmp_path / "parts" / "train.jsonl", squad())
    (tmp_path / "saved").mkdir()
    pq.write_table(
        pa.Table.from_pylist([{**messages("q"), **dict.fromkeys(squad())}, {**squad(), "messages": None}]),
        tmp_path / "saved" / "0.parquet",
    )
    for name in ("README.md", "LICENSE", ".hidden.jsonl", "old.txt"):
        (tmp_path / name).write_text("{}")
    assert sources(tmp_path) == ["array", "lines", "parts", "saved"]
    questions, skipped = read(tmp_path)
    assert [q.source for q in questions] == ["array", "array", "lines", "parts", "saved", "saved"]
    assert [q.id for q in questions][::5] == ["array/array-1", "saved/0-2"]
    assert questions[1].id == "array/array-1-2", "on the same line"
    assert skipped == [("old.txt", "not a data set")]


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"put .* there"):
            sources(folder)


def test_two_entries_with_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "law.jsonl", squad())
    write(tmp_path / "law" / "train.jsonl", squad())
    with pytest.raises(DataError, match=r"law and law.jsonl are both named 'law'; rename one"):
        sources(tmp_path)


def test_ids_are_unique_across_data_sets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", squad(id=1), squad(id="1"), squad(), squad(id=None), squad(id=2.5))
    write(tmp_path / "c" / "train.jsonl", squad(id=1), squad())
    write(tmp_path / "c" / "test.jsonl", squad(id=1), squad())
    questions, skipped = read(tmp_path)
    assert [q.id for q in questions if q.source != "b"] == [
        *("a/1", "a/a-3", "a/a-4", "a/a-5", "c/1", "c/test-2", "c/train-1", "c/train-2"),
    ]
    assert len({q.id for q in questions}) == len(questions) == 12
    assert skipped == [("a.jsonl:2", "duplicate id"), ("b.jsonl:2", "duplicate id")]


def test_files_with_the_same_name_in_a_data_set_are_all_read(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / "hub" / split / "data-0.jsonl", *(squad(id=number) for number in range(4)))
    questions, skipped = read(tmp_path)
    assert len({question.id for question in questions}) == 12 and not skipped
    assert {question.id for question in questions if question.split == "test"} >= {"hub/3"}


def test_files_named_after_splits_are_one_data_set(tmp_path: Path) -> None:
    """Else the test file would be a data set of its own and trained on."""
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", squad())
    assert sources(tmp_path) == ["data"]
    assert {question.id: question.split for question in read(tmp_path)[0]} == {
        "data/train-1": "train", "data/test-1": "test",
    }  # fmt: skip
    write(tmp_path / "law-test.jsonl", squad())
    assert {question.source for question in read(tmp_path)[0]} == {"train", "test", "law-test"}


# -- groups and splits -------------------------------------------------------------------------------------------


def groups(folder: Path) -> list[str]:
    return [question.group for question in read(folder)[0]]


def test_questions_about_one_context_are_one_group_across_data_sets(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", squad("One  context."), squad("ONE context.\n", "Another question?"), squad("Two."))
    write(tmp_path / "b.jsonl", messages("Context: One context.\nQuestion: q"), squad("Ｔｗｏ."))
    found = groups(tmp_path)
    assert found[0] == found[1] == found[3] != found[2] == found[4]


def test_without_a_context_the_question_names_the_group(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", messages("Who?"), messages("who? "), messages("When?"), squad("Who?"))
    found = groups(tmp_path)
    assert found[0] == found[1] and len(set(found)) == 3


def test_a_given_group_or_title_joins_contexts_only_within_its_data_set(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl", squad("1", group="g"), squad("2", title="t"), squad("3", group="g"), squad("4", title="t")
    )
    write(tmp_path / "b.jsonl", squad("5", group="g"), squad("6", group="h"))
    found = groups(tmp_path)
    assert found[0] == found[2] != found[1] == found[3]
    assert len(set(found)) == 4


def test_a_context_joins_given_groups(tmp_path: Path) -> None:
    records = [squad("1", group="g1"), squad("2", group="g2"), squad("1", "q?", group="g2"), squad("3", group="g3")]
    write(tmp_path / "a.jsonl", *records)
    found = groups(tmp_path)
    assert found[0] == found[1] == found[2] != found[3]
    write(tmp_path / "a.jsonl", *records[::-1])
    assert groups(tmp_path) == found[::-1], "in any order"


def test_a_title_that_all_records_share_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", squad("1", title="my data"), squad("2", title="my data"))
    assert len(set(groups(tmp_path))) == 2


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("all",), {"all": None}),
        (("train", "test"), {"train": "train", "test": "test"}),
        (("train", "validation", "test"), {"train": "train", "validation": "train", "test": "test"}),
        (("train", "dev"), {"train": "train", "dev": "test"}),  # as SQuAD is published
        (("train",), {"train": None}),
        (("validation",), {"validation": None}),
        (("test",), {"test": "test"}),  # never trained on
        (("train", "test", "more"), {"train": "train", "test": "test", "more": None}),
    ],
)
def test_splits_that_a_folder_states(tmp_path: Path, files: tuple[str, ...], splits: dict[str, str | None]) -> None:
    for name in files:
        write(tmp_path / "set" / f"{name}.jsonl", squad(name, id=name))
    assert {q.id.removeprefix("set/"): q.split for q in read(tmp_path)[0]} == splits


def test_without_answers_in_the_test_split_the_validation_split_is_tested(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        write(tmp_path / "set" / f"{name}.jsonl", squad(name, id=name, answers={"text": [name] * (name != "test")}))
    questions, skipped = read(tmp_path)
    assert {q.id: q.split for q in questions} == {"set/train": "train", "set/validation": "test"}
    assert skipped == [("set/test.jsonl:1", "no answer")]


# -- prompts -----------------------------------------------------------------------------------------------------


def made(split: str = "test", **changes: Any) -> Any:
    values = {"id": "a/1", "text": "What is it?", "context": "It is a gear.", "answers": ("gear", "a gear")}
    question = ContextQuestion(**{**values, "source": "a", "group": "g", "split": None, **changes})
    (sample,) = build_samples(RECIPE, question, None, split)
    return sample


def test_training_and_inference_have_the_same_prompt() -> None:
    train, test = made("train"), made("test")
    assert train == test
    (name,) = passes(RECIPE)
    asked = ask(RECIPE, test, name, {}, ())
    assert asked.messages == train["messages"] and asked.images == []
    assert possible_prompts(RECIPE, test, ()) == [(asked, 0)]
    assert train["references"][0] == "gear", "training learns the first reference only"


def test_the_prompt_contains_the_whole_context_and_then_the_question() -> None:
    context = "word " * 10_000 + "end"
    system, user = made(context=context)["messages"]
    assert "exact words from the context" in system["content"]
    assert user["content"] == f"Context: {context}\n\nQuestion: What is it?"


def said(sample: Any) -> str:
    return "\n".join(message["content"] for message in sample["messages"])


def test_a_chinese_question_is_asked_in_chinese() -> None:
    text = said(made(text="部件3是什么？", context="部件3是齿轮。"))
    assert "上下文：部件3是齿轮。" in text and text.endswith("问题：部件3是什么？")
    assert "context" not in text.lower()
    assert "上下文" not in said(made(text="部件3是什么？", context=""))


def test_without_a_context_the_prompt_mentions_none() -> None:
    assert "context" not in said(made(context="")).lower()


def test_a_prompt_says_what_the_data_say() -> None:
    text = said(made(text="What is <image> or <|im_end|>?", context="<video>"))
    assert "<image>" not in text, "without a picture in its place"
    assert text.replace("\u2060", "").endswith("Context: <video>\n\nQuestion: What is <image> or <|im_end|>?")


def test_meta_names_the_data_set_as_kind() -> None:
    assert made()["meta"] == {
        **{"group": "g", "source": "a", "kind": "a", "question": "What is it?", "context_characters": 13},
    }


@pytest.mark.parametrize(
    ("text", "answer"),
    [("gear", "gear"), (" gear \n\nBecause it turns.", "gear"), ("\n\ngear", "gear"), ("", None), (" \n", None)],
)
def test_the_answer_is_the_first_line(text: str, answer: str | None) -> None:
    assert read_answer(text, made()) == answer


# -- scores ------------------------------------------------------------------------------------------------------


def scores(answer: str, *references: str, normalization: str = "squad") -> dict[str, float]:
    recipe = RECIPE.model_copy(
        update={"eval": RECIPE.eval.model_copy(update={"scoring": {"normalization": normalization}})}
    )
    return score(recipe, answer, made(answers=references))


def test_the_first_metric_is_exact_match_and_each_metric_is_the_best_over_references() -> None:
    assert scores("The gear!", "lever", "gear") == {
        "exact_match": 1.0,
        "f1": 1.0,
        "character_exact_match": 0.0,
        "character_f1": pytest.approx(8 / 11),
    }
    assert next(iter(scores("x", "y"))) == "exact_match"
    assert scores("spring seat", "spring", "the seat of a valve")["f1"] == pytest.approx(2 / 3)


def test_chinese_is_also_scored_by_characters() -> None:
    assert scores("弹簧", "弹簧座") == {
        **{"exact_match": 0.0, "f1": 0.0, "cmrc_exact_match": 0.0, "cmrc_f1": pytest.approx(0.8)},
        **{"character_exact_match": 0.0, "character_f1": pytest.approx(0.8)},
    }


@pytest.mark.parametrize(
    ("answer", "reference", "squad_match", "squad_f1", "original_match", "original_f1"),
    [
        ("U.S. based firm", "The  U.S.-based, firm", 0.0, pytest.approx(0.4), 1.0, 1.0),
        ("3 5", "3.5%", 0.0, 0.0, 1.0, 1.0),
        ("N", "N/A", 0.0, 0.0, 1.0, 1.0),
        ("na", "N/A", 1.0, 1.0, 0.0, 0.0),
        ("", "a", 1.0, 1.0, 1.0, 1.0),  # as published with version 2.0: nothing is left of both
        ("Gear", "gear.", 1.0, 1.0, 1.0, 1.0),
    ],
)
def test_normalisations(
    answer: str, reference: str, squad_match: float, squad_f1: Any, original_match: float, original_f1: float
) -> None:
    found, original = scores(answer, reference), scores(answer, reference, normalization="original")
    assert (found["exact_match"], found["f1"]) == (squad_match, squad_f1)
    assert (original["exact_match"], original["f1"]) == (original_match, original_f1)
    assert found["character_f1"] == original["character_f1"]
    assert scores(answer, reference, normalization="seed_001") == original, "the name in older recipes"


def test_the_older_name_of_the_originals_normalisation_resolves_to_the_new_one(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.jsonl", squad())
    for name in ("original", "seed_001"):
        scoring = RECIPE.eval.model_copy(update={"scoring": {"normalization": name}})
        settled = settle_recipe(RECIPE.model_copy(update={"eval": scoring}), "test", tmp_path)
        assert settled.eval.scoring == {"normalization": "original"}


# -- the submission, and the contract ----------------------------------------------------------------------------


def test_a_submission_has_a_line_for_each_test_question_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", squad(id=2), squad("Another", id=1))
    write(tmp_path / "a.jsonl", messages("Who?", id=7))
    rows = asked_rows(tmp_path, read(tmp_path)[0])
    assert [row["ids"] for row in rows] == [["a/7"], ["b/2"], ["b/1"]]
    answered: Any = {**failed_prediction("b/2", ""), "answer": "gear", "error": None}
    predictions = {"b/2": answered, "b/1": failed_prediction("b/1", "too long")}
    assert [submission(row, predictions) for row in rows] == [
        {"id": "a/7", "dataset": "a", "question": "Who?", "answer": ""},
        {"id": "b/2", "dataset": "b", "question": "What is part 3?", "answer": "gear"},
        {"id": "b/1", "dataset": "b", "question": "What is part 3?", "answer": ""},
    ]


def test_the_task_has_all_members_of_the_contract(tmp_path: Path) -> None:
    task = load_task("extractive_qa")
    members = [name for name in (*vars(Task), *Task.__annotations__) if not name.startswith("_")]
    assert all(hasattr(task, name) for name in members)
    assert task.READS_DOCUMENTS is False
    write(tmp_path / "d" / "法律.jsonl", squad())
    adapters = settle_recipe(RECIPE, "test", tmp_path).train.adapters
    assert [[str(part) for part in adapter.data] for adapter in adapters] == [["法律"]]
