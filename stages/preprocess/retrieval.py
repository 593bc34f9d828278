"""What documents give to questions about them: pages are rendered, embedded and searched, figures cut out.

Only tasks that read documents come here (`DocumentTask`).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.contract.files import place_same, visible_files, written_atomically
from stages.contract.stage import Stage
from stages.preprocess.classify import drawings_enough
from stages.preprocess.documents import render_documents
from stages.preprocess.embed import Embedder, Vectors, chunked
from stages.preprocess.figures import crop_figures
from stages.preprocess.search import top_k
from stages.tasks.task import Found

Pages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Known:
    """All that is known of the documents. Row i of `page_vectors` is page i's; vectors of questions go by their id."""

    documents: Mapping[str, Path]
    pages: Pages
    page_vectors: Vectors
    question_vectors: Mapping[str, Vectors]


def read_documents(stage: Stage, documents: Mapping[str, Path], questions: list[Any]) -> Known | None:
    """Render and embed what is this process's to do. None for a shard, which leaves the rest to the plain stage."""
    _take_over(stage)
    pages = render_documents(stage, {name: documents[name] for n, name in enumerate(documents) if stage.has(n)})
    embedder = Embedder(stage)
    embedder.pages(pages)
    chunks = chunked([question.text for question in questions])  # questions are shared out by chunk
    vectors = embedder.questions([chunk for n, chunk in enumerate(chunks) if stage.has(n)])
    embedder.close()
    if stage.shard is not None:
        _leave_for_merging(stage)
        return None
    page_vectors = embedder.write_pages(pages, stage.path("vectors.npy"))
    stage.outputs["vectors.npy"] = len(pages)
    _write_questions(stage, questions, vectors)
    return Known(documents, pages, page_vectors, dict(zip([q.id for q in questions], vectors, strict=True)))


def _take_over(stage: Stage) -> None:
    """Put pictures, page records and vectors of finished shards where an earlier start of this stage would have."""
    for folder in stage.finished_shards:
        for path in [*visible_files(folder / "pages"), *visible_files(folder / "cache")]:
            place_same(path, stage.path(str(path.relative_to(folder))))


def _leave_for_merging(stage: Stage) -> None:
    """What a shard hands to the plain stage, which writes tables and samples."""
    for name in ("pages/", "cache/"):
        stage.path(name).mkdir(exist_ok=True)  # with no readable document there are none
        stage.outputs[name] = None


def _write_questions(stage: Stage, questions: list[Any], vectors: Vectors) -> None:
    """The questions' vectors stand beside their ids; those of pages go with pages.parquet row by row."""
    table = pa.table({"id": [question.id for question in questions], "vector": list(vectors)})
    with written_atomically(stage.path("questions.parquet"), "wb") as file:
        pq.write_table(table, file)
    stage.outputs["questions.parquet"] = len(questions)


def find(
    stage: Stage, task: Any, questions: list[Any], splits: Mapping[str, str | None], known: Known
) -> dict[str, Found]:
    """By question id, what was found for it. `splits` are those of the questions, by id."""
    wanted = task.wanted(stage.run.recipe)
    rows: dict[str, list[int]] = defaultdict(list)
    for row, page in enumerate(known.pages):
        rows[page["document"]].append(row)
    by_document = {name: {int(known.pages[row]["page"]): known.pages[row] for row in own} for name, own in rows.items()}
    taught = [q for q in questions if splits[q.id] == "train" and q.answers]
    named = {q.id: (q.document, q.page, q.figure) for q in questions if q.page and q.figure and wanted.crops}
    readable = [figure for figure in named.values() if figure[1] in by_document.get(figure[0], {})]
    crops = crop_figures(stage, readable, dict(known.documents))
    asked_of = [question for question in questions if splits[question.id] is not None]
    asks_rule = stage.run.recipe.preprocess.classifier == "rule"
    # what the model says of test questions is a pass of inference
    enough = drawings_enough(stage, task, [q for q in asked_of if asks_rule or splits[q.id] != "test"])
    tested = [q for q in questions if splits[q.id] == "test"]
    examples = _examples(tested, taught, known.question_vectors, wanted.examples)
    found = {}
    for question in questions:
        own = rows.get(question.document, [])
        numbers = [int(known.pages[row]["page"]) for row in own]
        of_pages = known.page_vectors[own[0] : own[-1] + 1] if own else known.page_vectors[:0]
        if question.page is not None and question.page not in numbers:
            stage.counts["named page missing"] += 1
        found[question.id] = Found(
            pages=by_document.get(question.document, {}),
            ranked=_ranked(numbers, of_pages, known.question_vectors[question.id]),
            crop=crops[named[question.id]]["image"] if named.get(question.id) in crops else None,
            examples=examples.get(question.id, []),
            drawing_is_enough=enough.get(question.id),
        )
    return found


def _ranked(numbers: list[int], pages: Vectors, question: Vectors) -> list[int]:
    """A document's pages by their likeness to a question, best first; those equally like it by number."""
    if not numbers:
        return []
    _, order = top_k(pages, question[None], len(numbers))
    return [numbers[place] for place in order[0]]


def _examples(tested: list[Any], taught: list[Any], vectors: Mapping[str, Vectors], count: int) -> dict[str, list[str]]:
    """For each test question the answers of the training questions most like it, best first; none is of its own
    document."""
    if not (tested and taught and count):
        return {}
    most = max(Counter(one.document for one in taught).values())  # so many may be of its own
    _, near = top_k(
        np.stack([vectors[one.id] for one in taught]), np.stack([vectors[one.id] for one in tested]), count + most
    )
    found = {}
    for question, places in zip(tested, near, strict=True):
        others = [taught[place] for place in places if taught[place].document != question.document]
        found[question.id] = [one.answers[0] for one in others[:count]]
    return found
