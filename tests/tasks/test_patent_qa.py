"""patent_qa: the questions files, samples, answers and scores."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contract.errors import DataError, UsageError
from stages.contract.recipe import load_recipe
from stages.contract.records import Sample
from stages.tasks import load_task
from stages.tasks.patent_qa import (
    PatentQuestion,
    asked_rows,
    build_samples,
    facts,
    find_documents,
    read_answer,
    read_questions,
    score,
)
from stages.tasks.task import Found
from tests.conftest import REPOSITORY

Skipped = list[tuple[str, str, str]]

RECIPE = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny")
SAMPLE: Sample = {"id": "q", "messages": [], "images": [], "references": ["gear"], "meta": {}}


# -- the questions file ------------------------------------------------------------------------------------------

DOCUMENTS = {"a.pdf", "b.pdf", "sub/a.pdf", "图.pdf"}


def read(folder: Path, **files: bytes) -> tuple[list[PatentQuestion], Skipped]:
    """Write `<name>.jsonl` files and read them."""
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    skipped: Skipped = []

    def skip(what: str, reason: str, detail: str = "") -> None:
        skipped.append((what, reason, detail))

    return read_questions(RECIPE, folder, DOCUMENTS, skip), skipped


def line(**changes: Any) -> bytes:
    record = {"id": "q", "question": "Which part?", "document": "a.pdf", "answer": "gear", **changes}
    return json.dumps({key: value for key, value in record.items() if value is not ...}).encode() + b"\n"


GOOD = line(id="good")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"question": "x", "docu\n', "not JSON"),
        (b"plain words\n", "not JSON"),
        (b"\xff\xfe\x00\n", "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b'{"id": "h", "question": "\\ud83d", "document": "a.pdf"}\n', "not UTF-8"),
        (b'{"id": "h", "question": "x", "document": "a.pdf", "answer": "\\udc00"}\n', "not UTF-8"),
        (b'["a", "list"]\n', "not a JSON object"),
        (b"null\n", "not a JSON object"),
        (line(question=...), "no question"),
        (line(document=...), "no document"),
        (line(question=""), "empty question"),
        (line(question="  \u3000 "), "empty question"),
        (line(question=3), "question is not a string"),
        (line(question=None), "no question"),
        (line(question=["x"]), "question is not a string"),
        (line(document="c.pdf"), "unknown document"),
        (line(document="../x.pdf"), "unknown document"),
        (line(document="/etc/passwd"), "unknown document"),
        (line(document="A.pdf"), "unknown document"),
        (line(document=7), "document is not a string"),
        (line(id=1.5), "id is not a string"),
        (line(id=True), "id is not a string"),
        (line(answer={"a": 1}), "answer is neither a text nor a number, nor a list of them"),
        (line(answer=[["a"]]), "answer is neither a text nor a number, nor a list of them"),
        (line(pages=3), "pages is not a list of page numbers"),
        (line(pages=[0]), "pages is not a list of page numbers"),
        (line(pages=["3"]), "pages is not a list of page numbers"),
        (line(pages=[True]), "pages is not a list of page numbers"),
    ],
)
def test_a_bad_line_is_skipped_with_its_number_and_the_others_are_read(tmp_path: Path, bad: bytes, reason: str) -> None:
    questions, skipped = read(tmp_path, questions=GOOD + bad + line(id="last"))
    assert [question.id for question in questions] == ["good", "last"]
    assert [(what, why) for what, why, _ in skipped] == [("questions.jsonl:2", reason)]
    json.dumps(skipped, ensure_ascii=False).encode()  # the reason can be stored and printed


def test_the_second_of_two_equal_ids_is_skipped(tmp_path: Path) -> None:
    questions, skipped = read(tmp_path, questions=line(question="first") + line(question="second") + line(id="r"))
    assert [(q.id, q.text) for q in questions] == [("q", "first"), ("r", "Which part?")]
    assert skipped == [("questions.jsonl:2", "duplicate id", "q")]


def test_an_integer_id_equals_the_same_number_as_text(tmp_path: Path) -> None:
    questions, skipped = read(tmp_path, questions=line(id=7) + line(id="7"))
    assert [question.id for question in questions] == ["7"]
    assert [reason for _, reason, _ in skipped] == ["duplicate id"]


def test_a_question_without_an_id_gets_its_file_and_line(tmp_path: Path) -> None:
    questions, _ = read(tmp_path, questions=b"\n" + line(id=...) + line(id=...))
    assert [question.id for question in questions] == ["questions-2", "questions-3"]


def test_a_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + line(id="1") + b"\n   \n\t\r\n" + line(id="2") + line(id="3").rstrip(b"\n")
    questions, skipped = read(tmp_path, questions=content.replace(b"\n", b"\r\n"))
    assert [question.id for question in questions] == ["1", "2", "3"]
    assert all(question.answers == ("gear",) for question in questions)
    assert skipped == []


def test_a_line_separator_inside_a_question_does_not_end_the_line(tmp_path: Path) -> None:
    content = json.dumps({"question": "a\u2028b", "document": "a.pdf"}, ensure_ascii=False).encode()
    questions, skipped = read(tmp_path, questions=content)
    assert [question.text for question in questions] == ["a\u2028b"]
    assert skipped == []


def test_answers_are_a_text_a_list_or_missing(tmp_path: Path) -> None:
    content = line(id="1", answer=" gear ") + line(id="2", answer=["gear", "cog"]) + line(id="3", answer=...)
    questions, _ = read(tmp_path, questions=content + line(id="4", answer=[]))
    assert [question.answers for question in questions] == [("gear",), ("gear", "cog"), (), ()]


def test_the_document_may_be_spelled_in_either_unicode_form(tmp_path: Path) -> None:
    """macOS stores names decomposed, and questions are usually composed, or the reverse."""
    (tmp_path / "questions.jsonl").write_bytes(line(document=unicodedata.normalize("NFD", "é.pdf")))
    questions = read_questions(RECIPE, tmp_path, {unicodedata.normalize("NFC", "é.pdf")}, lambda *_: None)
    assert len(questions) == 1


def test_a_document_in_a_folder_is_named_with_it(tmp_path: Path) -> None:
    questions, _ = read(tmp_path, questions=line(document="sub/a.pdf"))
    assert questions[0].document == "sub/a.pdf"


def test_a_question_means_the_document_that_is_spelled_so_or_else_the_composed_one(tmp_path: Path) -> None:
    composed, decomposed = "\u00e9.pdf", "e\u0301.pdf"
    content = line(id="1", document=composed) + line(id="2", document=decomposed)
    (tmp_path / "questions.jsonl").write_bytes(content)

    def documents_of(*known: str) -> list[str]:
        return [one.document for one in read_questions(RECIPE, tmp_path, set(known), lambda *_: None)]

    assert documents_of(composed, decomposed) == [composed, decomposed]
    assert documents_of(composed) == [composed, composed]


def test_page_and_evidence_are_kept(tmp_path: Path) -> None:
    questions, _ = read(tmp_path, questions=line(question="On page 4, what is 3?", pages=[4, 2], kind="name"))
    assert (questions[0].page, questions[0].evidence, questions[0].kind) == (4, (4, 2), "name")


def test_train_and_test_files_give_the_splits(tmp_path: Path) -> None:
    train, test = line(id="1", document="a.pdf"), line(id="2", document="b.pdf")
    questions, skipped = read(tmp_path, train=train, test=test, questions=line(id="unused"))
    assert sorted((q.id, q.split) for q in questions) == [("1", "train"), ("2", "test")]
    assert skipped == []


def test_a_training_question_on_a_test_document_is_left_out(tmp_path: Path) -> None:
    train = line(id="1", document="a.pdf") + line(id="2", document="b.pdf")
    questions, skipped = read(tmp_path, train=train, test=line(id="3", document="b.pdf"))
    assert sorted(question.id for question in questions) == ["1", "3"]
    assert skipped == [("2", "training question on a test document", "b.pdf")]


def test_ids_of_both_files_may_start_at_1(tmp_path: Path) -> None:
    train = line(id="1", document="a.pdf") + line(id="2", document="a.pdf")
    questions, skipped = read(tmp_path, train=train, test=line(id="1", document="b.pdf"))
    assert sorted((q.id, q.split) for q in questions) == [("1", "test"), ("2", "train"), ("train-1", "train")]
    assert skipped == []


def test_one_of_train_and_test_is_refused_without_the_other(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.jsonl is missing; add it, or put all questions into questions\.jsonl"):
        read(tmp_path, train=GOOD, questions=GOOD)


@pytest.mark.parametrize("nothing", [None, "", "  ", [], float("nan"), {}, [None], ["", None]])
@pytest.mark.parametrize("field", ["answer", "pages", "kind", "id"])
def test_a_field_that_is_null_or_empty_is_not_given(tmp_path: Path, field: str, nothing: Any) -> None:
    if field in ("kind", "id") and nothing in ([None], ["", None]):
        return
    questions, skipped = read(tmp_path, questions=line(**{"pages": [4], "kind": "part", field: nothing}))
    assert skipped == []
    (question,) = questions
    found = {"answer": question.answers, "pages": question.evidence, "kind": question.kind, "id": question.id}
    whole = {"answer": ("gear",), "pages": (4,), "kind": "part", "id": "q"}
    assert found == {**whole, field: {"answer": (), "pages": (), "kind": "", "id": "questions-1"}[field]}


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        ("2", ("2",)),
        ("3.50", ("3.50",)),
        ("-0.0", ("-0.0",)),
        ("1e5", ("1e5",)),
        ("12345678901234567890", ("12345678901234567890",)),
        ("true", ("true",)),
        ('[2, 3.50, "two", null, ""]', ("2", "3.50", "two")),
    ],
)
def test_a_number_as_an_answer_is_its_text(tmp_path: Path, written: str, texts: tuple[str, ...]) -> None:
    content = f'{{"id": "q", "question": "How many?", "document": "a.pdf", "answer": {written}}}'
    questions, skipped = read(tmp_path, questions=content.encode())
    assert skipped == [] and [question.answers for question in questions] == [texts]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_a_question_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"no usable question in questions\.jsonl; there is no record; put some there"):
        read(tmp_path, questions=content)


def test_a_file_without_a_usable_question_is_refused_with_the_commonest_reason(tmp_path: Path) -> None:
    other = [json.dumps({"instruction": "Which part?", "output": "gear"}).encode() + b"\n"] * 2
    with pytest.raises(DataError) as refused:
        read(tmp_path, questions=b"no json\n" + b"".join(other) + line(document="c.pdf"))
    assert str(refused.value) == (
        f"{tmp_path}: no usable question in questions.jsonl; 2 of 4 skipped: no question, first questions.jsonl:2"
        " (found the keys instruction, output); correct them, the log has the reason of each"
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32", "gbk", "gb18030"])
def test_a_file_in_another_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    records = [{"id": name, "question": "部件3是什么？", "document": "a.pdf", "answer": "弹簧座"} for name in "ab"]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in records)
    questions, skipped = read(tmp_path, questions=text.encode(encoding))
    assert [(q.id, q.text, q.answers) for q in questions] == [(name, "部件3是什么？", ("弹簧座",)) for name in "ab"]
    assert skipped == []


@pytest.mark.parametrize("indent", [None, 1])
def test_one_array_is_read_as_lines_are(tmp_path: Path, indent: int | None) -> None:
    records: list[Any] = [json.loads(line(id=...)), "words", json.loads(line(id=..., answer="cog"))]
    questions, skipped = read(tmp_path, questions=json.dumps(records, indent=indent).encode())
    assert [question.answers for question in questions] == [("gear",), ("cog",)]
    assert [question.row for question in questions] == [0, 2]
    assert len({question.id for question in questions}) == 2
    assert [reason for _, reason, _ in skipped] == ["not a JSON object"]


def test_a_row_of_the_submission_has_no_text_for_what_is_not_given(tmp_path: Path) -> None:
    read(tmp_path, train=GOOD, test=line(document="b.pdf") + line(id="r", document=None, question=None))
    (_, lost) = asked_rows(tmp_path, [])
    assert lost == {"idx": "1", "ids": [], "document": "", "question": ""}


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_skipped(tmp_path_factory, content) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("any")
    questions, skipped = read(folder, questions=GOOD + content.replace(b"\n", b" ") + b"\n" + line(id="last"))
    assert [question.id for question in questions] == ["good", "last"]
    assert len(skipped) == bool(content.replace(b"\n", b" ").strip())


def test_documents_are_all_visible_files_below_the_folder(tmp_path: Path) -> None:
    names = ["b.pdf", "a.PDF", "sub/a.pdf", "notes.txt", ".hidden.pdf", ".git/x.pdf"]
    for name in names:
        path = tmp_path / "documents" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    found = [str(path.relative_to(tmp_path / "documents")) for path in find_documents(tmp_path)]
    assert found == ["a.PDF", "b.pdf", "notes.txt", "sub/a.pdf"]


def test_documents_in_linked_folders_are_found(tmp_path: Path) -> None:
    for name in ("elsewhere/a.pdf", "data/documents/b.pdf"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "data/documents/more").symlink_to(tmp_path / "elsewhere")
    found = [path.relative_to(tmp_path / "data/documents") for path in find_documents(tmp_path / "data")]
    assert found == [Path("b.pdf"), Path("more/a.pdf")]


def test_without_documents_that_can_be_read_the_message_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.pdf").symlink_to("/nowhere/a.pdf")
    with pytest.raises(DataError, match=r"documents: no documents: a\.pdf is a link to nothing; put the PDFs there"):
        find_documents(tmp_path)


def test_without_documents_the_message_says_where_to_put_them(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=f"{tmp_path}/documents: no documents"):
            find_documents(tmp_path)
        (tmp_path / "documents").mkdir(exist_ok=True)


# -- samples -----------------------------------------------------------------------------------------------------

PAGES = [{"page": page, "text": f"text of {page}", "image": f"preprocess/pages/a/{page}.jpg"} for page in (12, 3, 7)]
QUESTION = PatentQuestion("q", "Which part?", "a.pdf", (12,), None, ("gear", "cog"), (12, 4), "name", None, 0)
RECIPE = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", ("preprocess.samples.others=2",))


def build(question: PatentQuestion, pages: list[dict[str, Any]]) -> Sample:
    """The test sample of a question whose document has only these pages, most similar first."""
    found = Found(pages={page["page"]: page for page in pages}, ranked=[page["page"] for page in pages])
    (sample,) = build_samples(RECIPE, question, found, "test")
    return sample


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pages_are_shown_in_the_documents_order(count: int) -> None:
    chosen = PAGES[:count]
    sample = build(QUESTION, chosen)
    content = sample["messages"][-1]["content"]
    numbers = sorted(page["page"] for page in chosen)
    assert sample["meta"]["pages"] == numbers
    positions = [content.index(f"Page {number}:") for number in numbers]
    assert positions == sorted(positions)
    assert content.endswith("Question: Which part?")
    assert sample["meta"]["page_images"] == [f"preprocess/pages/a/{number}.jpg" for number in numbers]
    assert all(f"text of {page['page']}" in content for page in chosen)
    assert sample["references"] == ["gear", "cog"]
    assert (sample["id"], sample["meta"]["group"]) == ("q", "a.pdf")
    assert [message["role"] for message in sample["messages"]] == ["system", "user"]


def test_a_placeholder_in_the_data_is_not_read_as_an_image() -> None:
    """A document about HTML, or a question with <image>, must not change the count that the template checks."""
    question = PatentQuestion("q", "What is <image> here?", "a.pdf", (), None, ("x",), (), "", None, 0)
    sample = build(question, [{**PAGES[0], "text": "the tag <image> of a page"}])
    assert sample["messages"][-1]["content"].count("<image>") == len(sample["images"])
    assert [message["content"].replace("\u2060", "").count("<image>") for message in sample["messages"]] == [0, 2]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("gear", "gear"), (" gear.\nBecause", "gear"), ("踏板。", "踏板"), ("", ""), ("\n\n", ""), ("3.5 mm.", "3.5 mm")],
)
def test_the_answer_is_the_first_line(text: str, answer: str) -> None:
    assert read_answer(text, SAMPLE) == answer


def test_a_right_answer_scores_1_and_a_wrong_one_0() -> None:
    sample = build(QUESTION, PAGES)
    assert set(score(RECIPE, "gear", sample).values()) == {1.0}
    assert score(RECIPE, "xyz", sample)["exact_match"] == score(RECIPE, "xyz", sample)["f1"] == 0.0


def test_recall_is_the_share_of_evidence_shown() -> None:
    assert facts(build(QUESTION, PAGES)) == dict.fromkeys(("retrieval_recall", "recall@1", "recall@2", "recall@5"), 0.5)
    without = PatentQuestion("q", "x", "a.pdf", (), None, (), (), "", None, 0)
    assert facts(build(without, PAGES)) == {}


# -- tasks -------------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    message = r"no task .patent_q.; did you mean .patent_qa.\? known tasks: articulation, .*patent_qa"
    with pytest.raises(UsageError, match=message):
        load_task("patent_q")
    with pytest.raises(UsageError):
        load_task("../patent_qa")
