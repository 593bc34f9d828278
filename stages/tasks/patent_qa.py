"""patent_qa: questions about patent PDFs, answered from the pages that a question names or that are most like it.

Data folder: `documents/` with PDFs (folders below it are read too) and either `questions.jsonl`, split by document,
or `train.jsonl` and `test.jsonl`. One question a line:

    {"id": "q1", "question": "...", "document": "CN000000001A.pdf", "answer": "..." or [...], "pages": [3], "kind": ""}

`question` and `document` are needed, `answer` too where it is trained on or scored. `pages` (1-based, the evidence)
lets retrieval be scored; `kind` breaks the scores down; a missing `id` becomes `<file>-<line>`.
"""

import json
import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages import metrics
from stages.contract.errors import DataError
from stages.contract.files import visible_files
from stages.contract.records import Message, Sample
from stages.mentions import page_named
from stages.tasks import Skip

SYSTEM = "Answer with the shortest exact words from the pages."


@dataclass(frozen=True)
class PatentQuestion:
    id: str
    text: str
    document: str
    """Path of the PDF below `documents/`, with its ending."""
    page: int | None
    """1-based page that the text names."""
    answers: tuple[str, ...]
    evidence: tuple[int, ...]
    kind: str
    split: str | None
    """`train` or `test` where the data say so, else None."""


def find_documents(folder: Path) -> list[Path]:
    """All files below `documents/`; what is no PDF is found out when it is opened, and counted."""
    documents = folder / "documents"
    found = visible_files(documents) if documents.is_dir() else []
    if not found:
        raise DataError(f"{documents}: no documents; put the PDFs there")
    return found


def read_questions(folder: Path, documents: set[str], skip: Skip) -> list[PatentQuestion]:
    """Read the questions files. A bad line is skipped and counted with its line number."""
    sources: list[tuple[Path, str | None]] = [(folder / f"{split}.jsonl", split) for split in ("test", "train")]
    pair = [path.is_file() for path, _ in sources]
    if any(pair) and not all(pair):
        raise DataError(
            f"{folder}: {sources[pair.index(False)][0].name} is missing; train.jsonl and test.jsonl go together"
        )
    if not any(pair):
        sources = [(folder / "questions.jsonl", None)]
    questions: dict[str, PatentQuestion] = {}
    for path, split in sources:
        if not path.is_file():
            raise DataError(f"{folder}: no questions.jsonl, and no pair of train.jsonl and test.jsonl")
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            where = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                question = _parse(line, f"{path.stem}-{number}", split, documents)
            except _BadLineError as error:
                skip(where, error.reason, str(error))
                continue
            if question.id in questions and questions[question.id].split != split:  # both files count from 1
                question = replace(question, id=f"{split}-{question.id}")
            if question.id in questions:
                skip(where, "duplicate id", question.id)
                continue
            questions[question.id] = question
    if not questions:
        raise DataError(f"{folder}: no usable question in {' or '.join(path.name for path, _ in sources)}")
    return _without_leaks(list(questions.values()), skip)


class _BadLineError(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def _parse(line: bytes, default_id: str, split: str | None, documents: set[str]) -> PatentQuestion:
    try:
        record = json.loads(line.decode("utf-8-sig"))
        json.dumps(record, ensure_ascii=False).encode()  # half a character, "\\ud83d", is valid JSON but no text
    except (ValueError, RecursionError) as error:
        raise _BadLineError("not JSON", str(error)) from error
    if not isinstance(record, dict):
        raise _BadLineError("not a JSON object", f"found {type(record).__name__}")
    text = _text(record, "question")
    document = unicodedata.normalize("NFC", _text(record, "document"))
    if document not in documents:
        raise _BadLineError("unknown document", document)
    return PatentQuestion(
        id=_text(record, "id") if "id" in record else default_id,
        text=text,
        document=document,
        page=page_named(text),
        answers=_answers(record),
        evidence=_evidence(record),
        kind=str(record.get("kind", "")),
        split=split,
    )


def _text(record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise _BadLineError(f"no {field}")
    value = record[field]
    if type(value) is int and field == "id":
        value = str(value)
    if not isinstance(value, str):
        raise _BadLineError(f"{field} is no text", repr(value)[:100])
    if not value.strip():
        raise _BadLineError(f"empty {field}")
    return value.strip()


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    value = record.get("answer", [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise _BadLineError("answer is neither text nor a list of texts", repr(value)[:100])
    return tuple(v.strip() for v in values)


def _evidence(record: dict[str, Any]) -> tuple[int, ...]:
    value = record.get("pages", [])
    if not isinstance(value, list) or not all(type(v) is int and v >= 1 for v in value):
        raise _BadLineError("pages is no list of page numbers", repr(value)[:100])
    return tuple(value)


def _without_leaks(questions: list[PatentQuestion], skip: Skip) -> list[PatentQuestion]:
    """Given splits: a document with test questions gives no training question."""
    tested = {question.document for question in questions if question.split == "test"}
    kept = []
    for question in questions:
        if question.split == "train" and question.document in tested:
            skip(question.id, "training question on a test document", question.document)
        else:
            kept.append(question)
    return kept


# -- samples -----------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Break up what ms-swift would take for a placeholder: each of those must have its file, and data have none."""
    return re.sub(r"<(?=(?:image|video|audio|bbox|ref-object)>)", "< ", text)


def build_sample(question: PatentQuestion, pages: list[dict[str, Any]]) -> Sample:
    """One sample with the text of the pages chosen for the question, in the order of the document.

    `pages` have `page` (1-based), `text` and `image` (path relative to the run).
    """
    shown = sorted(pages, key=lambda page: int(page["page"]))
    parts = [f"Page {page['page']}: {_plain(page['text'])}" for page in shown]
    content = "\n".join([*parts, f"Question: {_plain(question.text)}"])
    messages: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    return {
        "id": question.id,
        "messages": messages,
        "images": [],
        "references": list(question.answers),
        "meta": {
            "group": question.document,
            "kind": question.kind,
            "question": question.text,
            "page_named": question.page,
            "evidence": list(question.evidence),
            "pages": [page["page"] for page in shown],
            "page_images": [page["image"] for page in shown],
        },
    }


def read_answer(text: str) -> str:
    """The answer in a completion: its first line, without a full stop at the end."""
    lines = text.strip().split("\n")
    return lines[0].strip().rstrip("。.").strip()


def score(answer: str, sample: Sample) -> dict[str, float]:
    """Exact match and F1 by SQuAD's rules, and F1 over characters, which Chinese needs."""
    references = sample["references"]
    return {
        "exact_match": metrics.best(metrics.exact_match, answer, references),
        "f1": metrics.best(metrics.token_f1, answer, references),
        "character_f1": metrics.best(metrics.character_f1, answer, references),
    }


def facts(sample: Sample) -> dict[str, float]:
    """Retrieval recall: the share of the evidence pages that are shown, where the data name them."""
    evidence = set(sample["meta"]["evidence"])
    if not evidence:
        return {}
    return {"retrieval_recall": len(evidence & set(sample["meta"]["pages"])) / len(evidence)}
