"""preprocess: render pages, embed pages and questions, choose pages for each question, write samples."""

from collections import defaultdict
from typing import Any

import numpy as np

from stages.contract.errors import DataError
from stages.contract.files import write_jsonl, written_atomically
from stages.contract.records import Sample
from stages.contract.stage import Stage
from stages.preprocess.documents import document_ids, render_documents
from stages.preprocess.embed import Embedder, Vectors
from stages.preprocess.retrieve import choose_pages, cosine
from stages.preprocess.split import SPLITS, split_groups
from stages.tasks import load_task


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe, data = stage.run.recipe, stage.run.data
    task = load_task(recipe.task)
    documents = document_ids(task.find_documents(data), data / "documents")
    questions = task.read_questions(data, set(documents), stage.skip)
    stage.counts["questions"] = len(questions)

    asked = {question.document for question in questions}
    # before the hours of work: it may find that nothing can be held out
    splits = split_groups(asked, {q.document: q.split for q in questions}, recipe.data, recipe.seed)
    pages = render_documents(stage, documents)
    embedder = Embedder(stage)
    page_vectors = embedder.embed([page["text"] for page in pages], "pages")
    question_vectors = embedder.embed([question.text for question in questions], "questions")
    with written_atomically(stage.path("vectors.npy"), "wb") as file:
        np.save(file, page_vectors, allow_pickle=False)
    stage.outputs["vectors.npy"] = len(pages)

    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for question, shown in zip(questions, _shown(stage, questions, question_vectors, pages, page_vectors), strict=True):
        split = splits[question.document]
        sample = task.build_sample(question, shown)
        if split != "test" and not shown:
            stage.skip(question.id, "no readable page in its document", question.document)
        elif split != "test" and not sample["references"]:
            stage.skip(question.id, "no answer to train on")
        elif split != "test":
            sample["messages"].append({"role": "assistant", "content": sample["references"][0]})
            samples[split].append(sample)
        else:
            if not shown:  # it stays in the test set, to be counted as failed
                sample["meta"]["error"] = f"no readable page in {question.document}"
            samples[split].append(sample)
    if not samples["train"]:
        raise DataError(f"{data}: no question to train on is left; see the skipped ones in {stage.path('log.txt')}")
    for split, members in samples.items():
        name = f"samples/{split}.jsonl"
        stage.outputs[name] = write_jsonl(stage.path(name), members)  # type: ignore[arg-type]
        stage.counts[split] = len(members)
    _tell(stage)


def _shown(
    stage: Stage, questions: list[Any], question_vectors: Vectors, pages: list[dict[str, Any]], page_vectors: Vectors
) -> list[list[dict[str, Any]]]:
    """The pages chosen for each question."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, page in enumerate(pages):
        rows[page["document"]].append(row)
    chosen = []
    for question, vector in zip(questions, question_vectors, strict=True):
        own = rows[question.document]
        by_number = {pages[row]["page"]: pages[row] for row in own}
        if question.page is not None and question.page not in by_number:
            stage.counts["named page missing"] += 1
        scores = cosine(page_vectors[own], vector)
        numbers = choose_pages(list(by_number), scores, question.page, stage.run.recipe.preprocess.retrieval.top_k)
        chosen.append([by_number[number] for number in numbers])
    return chosen


def _tell(stage: Stage) -> None:
    reasons: dict[str, int] = defaultdict(int)
    for skipped in stage.skipped:
        reasons[skipped["reason"]] += 1
        print(f"skipped {skipped['what']}: {skipped['reason']} {skipped['detail']}")  # into the log
    for reason, count in reasons.items():
        stage.events.say(f"skipped {count}: {reason}")
    counts = ", ".join(f"{stage.counts[split]} {split}" for split in SPLITS)
    stage.events.say(f"{counts} samples from {stage.counts['pages']} pages of {stage.counts['documents']} documents")
