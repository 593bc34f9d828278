"""preprocess: render pages, embed pages and questions, choose pages for each question, write samples."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.contract.files import FileHashes, place_same, visible_files, written_atomically
from stages.contract.stage import Stage
from stages.preprocess.documents import document_ids, render_documents
from stages.preprocess.embed import Embedder, Vectors, chunked
from stages.preprocess.rows import write_samples
from stages.preprocess.split import SPLITS, split_groups
from stages.tasks import load_task


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe, data = stage.run.recipe, stage.run.data
    task = load_task(recipe.task)
    documents = document_ids(task.find_documents(data), data / "documents")
    questions = task.read_questions(data, set(documents), stage.skip)
    stage.counts["questions"] = len(questions)

    # before the hours of work: it may find that nothing can be held out
    splits = _splits(stage, questions, documents)
    if stage.nothing_to_do(len(documents), "documents"):
        return
    _take_over(stage)
    pages = render_documents(stage, {name: documents[name] for n, name in enumerate(documents) if stage.has(n)})
    embedder = Embedder(stage)
    embedder.pages(pages)
    chunks = chunked([question.text for question in questions])  # questions are shared out by chunk
    question_vectors = embedder.questions([chunk for n, chunk in enumerate(chunks) if stage.has(n)])
    embedder.close()
    if stage.shard is not None:
        _leave_for_merging(stage)
        return
    page_vectors = embedder.write_pages(pages, stage.path("vectors.npy"))
    stage.outputs["vectors.npy"] = len(pages)
    _write_questions(stage, questions, question_vectors)
    write_samples(stage, task, questions, splits, documents, pages, page_vectors, question_vectors)
    _tell(stage)


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


def _splits(stage: Stage, questions: list[Any], documents: dict[str, Path]) -> dict[str, str]:
    """The split of each document. Documents of the same content, under whatever names, fall into the same one."""
    hashes = FileHashes(stage.path(".hashes.json"))  # knows the documents from when the stage's inputs were hashed
    asked = sorted({question.document for question in questions})
    content = {name: hashes.file(documents[name]) for name in asked}
    first = {digest: name for name, digest in reversed(content.items())}  # by name, whose order is the listing's
    twin = {name: first[digest] for name, digest in content.items()}
    given: dict[str, str | None] = {}
    for question in questions:
        if given.get(twin[question.document]) != "test":
            given[twin[question.document]] = question.split
    recipe = stage.run.recipe
    splits = split_groups(set(twin.values()), given, recipe.data, recipe.seed)
    return {name: splits[twin[name]] for name in asked}


def _write_questions(stage: Stage, questions: list[Any], vectors: Vectors) -> None:
    """The questions' vectors stand beside their ids; those of pages go with pages.parquet row by row."""
    table = pa.table({"id": [question.id for question in questions], "vector": list(vectors)})
    with written_atomically(stage.path("questions.parquet"), "wb") as file:
        pq.write_table(table, file)
    stage.outputs["questions.parquet"] = len(questions)


def _tell(stage: Stage) -> None:
    reasons: dict[str, int] = defaultdict(int)
    for skipped in stage.skipped:
        reasons[skipped["reason"]] += 1
        print(f"skipped {skipped['what']}: {skipped['reason']} {skipped['detail']}")  # into the log
    for reason, count in reasons.items():
        stage.events.say(f"skipped {count}: {reason}")
    counts = ", ".join(f"{stage.counts[split]} {split}" for split in SPLITS)
    stage.events.say(f"{counts} samples from {stage.counts['pages']} pages of {stage.counts['documents']} documents")
