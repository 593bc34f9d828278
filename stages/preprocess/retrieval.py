"""Find in documents what belongs to each question: render, embed and search pages, and crop figures.

Only tasks that read documents need it (`DocumentTask`).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.contract.files import link_or_copy, open_atomically, visible_files
from stages.contract.stage import Stage
from stages.preprocess.classify import classify_drawings
from stages.preprocess.documents import render_documents
from stages.preprocess.embed import Embedder, Vectors, split_into_chunks
from stages.preprocess.figures import crop_figures
from stages.preprocess.search import top_k
from stages.tasks.task import Found

Pages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Index:
    """The documents' pages, and all vectors."""

    documents: Mapping[str, Path]
    pages: Pages
    first_rows: Sequence[int]
    """The row of `page_vectors` where each page's passages begin, then the number of all rows."""
    page_vectors: Vectors
    question_vectors: Mapping[str, Vectors]
    """By the questions' ids."""


def read_documents(stage: Stage, documents: Mapping[str, Path], questions: list[Any]) -> Index | None:
    """Return the index of all pages and questions, and write pages.parquet, vectors.npy and questions.parquet. A shard
    only renders and embeds its share, and returns None: the merging stage does the rest."""
    _adopt_shards(stage)
    embedder = Embedder(stage)
    mine = {name: documents[name] for n, name in enumerate(documents) if stage.does_piece(n)}
    pages = render_documents(stage, mine, embedder.passages_of)
    embedder.embed_pages(pages)
    chunks = split_into_chunks([question.text for question in questions])  # shards share questions by chunk
    vectors = embedder.embed_questions([chunk for n, chunk in enumerate(chunks) if stage.does_piece(n)])
    embedder.close()
    if stage.shard is not None:
        _list_outputs_of_shard(stage)
        return None
    page_vectors = embedder.write_pages(pages, stage.path("vectors.npy"))
    stage.counts["passages"] = stage.outputs["vectors.npy"] = len(page_vectors)
    _write_questions(stage, questions, vectors)
    by_id = dict(zip([q.id for q in questions], vectors, strict=True))
    first_rows = [0, *accumulate(map(embedder.passages_of, pages))]
    return Index(documents, pages, first_rows, page_vectors, by_id)


def _adopt_shards(stage: Stage) -> None:
    """Put pictures, page records and vectors of finished shards where an earlier start of this stage would have put
    them."""
    for folder in stage.finished_shards:
        for path in [*visible_files(folder / "pages"), *visible_files(folder / "cache")]:
            link_or_copy(path, stage.path(str(path.relative_to(folder))))


def _list_outputs_of_shard(stage: Stage) -> None:
    """Record as outputs what the merging stage needs. Only that stage writes tables and samples."""
    for name in ("pages/", "cache/"):
        stage.path(name).mkdir(exist_ok=True)  # missing if no document is readable
        stage.outputs[name] = None


def _write_questions(stage: Stage, questions: list[Any], vectors: Vectors) -> None:
    """Write the questions' ids and vectors to questions.parquet."""
    table = pa.table({"id": [question.id for question in questions], "vector": list(vectors)})
    with open_atomically(stage.path("questions.parquet"), "wb") as file:
        pq.write_table(table, file)
    stage.outputs["questions.parquet"] = len(questions)


def find_for_questions(
    stage: Stage, task: Any, questions: list[Any], splits: Mapping[str, str | None], index: Index
) -> dict[str, Found]:
    """Return by question id what belongs to the question: its document's pages, ranked, its figure's crop, examples,
    and whether the drawing is enough. Counts questions that name a missing page. `splits` has the questions' splits by
    id."""
    wanted = task.retrieval_needs(stage.run.recipe)
    rows: dict[str, list[int]] = defaultdict(list)
    for row, page in enumerate(index.pages):
        rows[page["document"]].append(row)
    by_document = {name: {int(index.pages[row]["page"]): index.pages[row] for row in own} for name, own in rows.items()}
    training = [q for q in questions if splits[q.id] == "train" and q.answers]
    named = {q.id: (q.document, q.page, q.figure) for q in questions if q.page and q.figure and wanted.crops}
    readable = [figure for figure in named.values() if figure[1] in by_document.get(figure[0], {})]
    crops = crop_figures(stage, readable, dict(index.documents))
    used = [question for question in questions if splits[question.id] is not None]
    by_rule = stage.run.recipe.preprocess.classifier == "rule"
    # a model classifies test questions in infer, as one of its passes
    enough = classify_drawings(stage, task, [q for q in used if by_rule or splits[q.id] != "test"])
    tested = [q for q in questions if splits[q.id] == "test"]
    examples = _examples(tested, training, index.question_vectors, wanted.examples)
    found = {}
    for question in questions:
        own = rows.get(question.document, [])
        numbers = [int(index.pages[row]["page"]) for row in own]
        if question.page is not None and question.page not in numbers:
            stage.counts["named page missing"] += 1
        found[question.id] = Found(
            pages=by_document.get(question.document, {}),
            ranked=_rank_pages(index, own, index.question_vectors[question.id]),
            crop=crops[named[question.id]]["image"] if named.get(question.id) in crops else None,
            examples=examples.get(question.id, []),
            drawing_is_enough=enough.get(question.id),
        )
    return found


def _rank_pages(index: Index, own: list[int], question: Vectors) -> list[int]:
    """The numbers of a document's pages, ranked by the similarity of each page's best passage to a question, the best
    first; ties in the order of the pages. `own` has the places of the document's pages in the index, which must be
    adjacent."""
    if not own:
        return []
    start, stop = index.first_rows[own[0]], index.first_rows[own[-1] + 1]
    page_of = [int(index.pages[place]["page"]) for place in own for _ in range(*index.first_rows[place : place + 2])]
    _, order = top_k(index.page_vectors[start:stop], question[None], stop - start)
    return list(dict.fromkeys(page_of[row] for row in order[0]))


def _examples(
    tested: list[Any], training: list[Any], vectors: Mapping[str, Vectors], count: int
) -> dict[str, list[str]]:
    """Examples for each test question, by its id: the first answers of the `count` training questions most similar to
    it, the most similar first. Training questions on the test question's own document do not count. Empty without
    examples."""
    if not (tested and training and count):
        return {}
    most = max(Counter(one.document for one in training).values())  # as many may be from its own document
    _, near = top_k(
        np.stack([vectors[one.id] for one in training]), np.stack([vectors[one.id] for one in tested]), count + most
    )
    found = {}
    for question, places in zip(tested, near, strict=True):
        others = [training[place] for place in places if training[place].document != question.document]
        found[question.id] = [one.answers[0] for one in others[:count]]
    return found
