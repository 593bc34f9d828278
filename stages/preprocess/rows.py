"""From questions, pages and vectors to samples: what is shown with each question, and what a submission asks for."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.contract.errors import DataError
from stages.contract.files import write_jsonl
from stages.contract.records import Sample
from stages.contract.stage import Stage
from stages.preprocess.classify import drawings_enough
from stages.preprocess.embed import Vectors
from stages.preprocess.figures import crop_figures
from stages.preprocess.search import top_k
from stages.preprocess.split import SPLITS
from stages.tasks import Found

Pages = Sequence[Mapping[str, Any]]


def write_samples(
    stage: Stage,
    task: Any,
    questions: list[Any],
    splits: Mapping[str, str],
    documents: Mapping[str, Path],
    pages: Pages,
    page_vectors: Vectors,
    question_vectors: Vectors,
) -> None:
    """Write the samples of each split, and the rows of a submission. Raises DataError when none is left to train on.

    Row i of `page_vectors` belongs to page i, row i of `question_vectors` to question i.
    """
    founds = _found(stage, task, questions, splits, documents, pages, page_vectors, question_vectors)
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for question in questions:
        split, found = splits[question.document], founds[question.id]
        reason = _reason_to_skip(question, split, found)
        if reason is not None:
            stage.skip(question.id, *reason)
            continue
        for sample in task.build_samples(stage.run.recipe, question, found, split):
            if split != "test":
                sample["messages"] = [*sample["messages"], {"role": "assistant", "content": sample["references"][0]}]
            elif not found.pages:  # it stays in the test set, to be counted as failed
                sample["meta"]["error"] = f"no readable page in {question.document}"
            samples[split].append(sample)
    if not samples["train"]:
        raise DataError(
            f"{stage.run.data}: no question to train on is left; see the skipped ones in {stage.path('log.txt')}"
        )
    for split, members in samples.items():
        name = f"samples/{split}.jsonl"
        stage.outputs[name] = write_jsonl(stage.path(name), members)  # type: ignore[arg-type]
        stage.counts[split] = len(members)
    tested = {sample["id"] for sample in samples["test"]}
    rows = task.asked_rows(stage.run.data, [question for question in questions if question.id in tested])
    stage.outputs["asked.jsonl"] = write_jsonl(stage.path("asked.jsonl"), rows)


def _reason_to_skip(question: Any, split: str, found: Found) -> tuple[str, str] | None:
    """Why a question becomes no sample, with the detail. Of test questions only what was meant for training is left
    out: all others are scored, or counted as failed."""
    if split == "test":
        if question.split == "train":
            return "training question on a test document", f"{question.document}, by its content"
    elif not found.pages:
        return "no readable page in its document", question.document
    elif not question.answers:
        return "no answer to train on", ""
    return None


def _found(
    stage: Stage,
    task: Any,
    questions: list[Any],
    splits: Mapping[str, str],
    documents: Mapping[str, Path],
    pages: Pages,
    page_vectors: Vectors,
    question_vectors: Vectors,
) -> dict[str, Found]:
    """By question id, what was found for it."""
    wanted = task.wanted(stage.run.recipe)
    rows: dict[str, list[int]] = defaultdict(list)
    for row, page in enumerate(pages):
        rows[page["document"]].append(row)
    by_document = {name: {int(pages[row]["page"]): pages[row] for row in own} for name, own in rows.items()}
    vectors = dict(zip([question.id for question in questions], question_vectors, strict=True))
    taught = [q for q in questions if splits[q.document] == "train" and q.answers]
    named = {q.id: (q.document, q.page, q.figure) for q in questions if q.page and q.figure and wanted.crops}
    readable = [figure for figure in named.values() if figure[1] in by_document.get(figure[0], {})]
    crops = crop_figures(stage, readable, dict(documents))
    asks_rule = stage.run.recipe.preprocess.classifier == "rule"
    # what the model says of test questions is a pass of inference
    enough = drawings_enough(stage, task, [q for q in questions if asks_rule or splits[q.document] != "test"])
    tested = [q for q in questions if splits[q.document] == "test"]
    examples = _examples(tested, taught, vectors, wanted.examples)
    found = {}
    for question in questions:
        own = rows.get(question.document, [])
        numbers = [int(pages[row]["page"]) for row in own]
        of_pages = page_vectors[own[0] : own[-1] + 1] if own else page_vectors[:0]
        if question.page is not None and question.page not in numbers:
            stage.counts["named page missing"] += 1
        found[question.id] = Found(
            pages=by_document.get(question.document, {}),
            ranked=_ranked(numbers, of_pages, vectors[question.id]),
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
