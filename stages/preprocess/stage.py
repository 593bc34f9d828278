"""preprocess: read the questions, split them by group, find the pages that belong to them, and write samples.

If the task reads records, Data-Juicer may filter and rewrite them first.
"""

import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, cast

from stages.contract.files import FileHashes, stored_name, unread_data
from stages.contract.stage import Stage
from stages.models.rendering import Renderer, check_samples, checked_renderer
from stages.preprocess.rows import write_samples
from stages.preprocess.split import SPLITS, split_questions
from stages.tasks import load_task, refuse_file
from stages.tasks.common.encodings import other_encodings
from stages.tasks.task import (
    ConversationTask,
    QuestionTask,
    RecordTask,
    Task,
    reads_conversations,
    reads_documents,
    reads_records,
)


def work(stage: Stage) -> None:
    """Turn the input into samples: read and split the questions, and search the documents. `run_stage` calls this.

    A shard only renders and embeds its share of the documents and questions. Raises DataError if the data cannot be
    used.
    """
    recipe, data = stage.run.recipe, stage.run.data
    task = load_task(recipe.task)
    refuse_file(task, recipe, data)
    renderer = _renderer(stage)
    for path, (reason, detail) in unread_data(data).items():
        stage.skip(stored_name(path.relative_to(data)), reason, detail)
    documents = _find_documents(stage, task, data)
    # shards share neither records, as Data-Juicer has its own processes, nor conversations
    if (task.READS_RECORDS or task.READS_CONVERSATIONS) and stage.has_nothing_to_do(0, "documents"):
        return
    if reads_records(task):
        questions = _questions_of_records(stage, task)
    elif reads_conversations(task):
        questions = _conversations(stage, task)
    else:
        questions = cast(QuestionTask, task).read_questions(recipe, data, set(documents), stage.skip)
    stage.counts["questions"] = len(questions)
    _show_encodings(stage)

    # before hours of work: this fails if no test set can be held out
    groups = _group_questions(questions, documents, stage.path(".hashes.json"))
    splits = split_questions(questions, groups, recipe.data, recipe.seed, stage.skip)
    questions = [question for question in questions if question.id in splits]
    if stage.has_nothing_to_do(len(documents), "documents"):
        return
    founds = None
    if reads_documents(task):
        from stages.preprocess.retrieval import find_for_questions, read_documents

        index = read_documents(stage, documents, questions)
        if index is None:
            return
        founds = find_for_questions(stage, task, questions, splits, index)
    learnt = write_samples(stage, task, questions, splits, groups, founds)
    if renderer is not None:
        for change, number in check_samples(stage.run, renderer, learnt).items():
            stage.counts[change] = number
            stage.events.say(f"{number} {change}")
    _show_counts(stage)


def _renderer(stage: Stage) -> Renderer | None:
    """The renderer of the model that will be trained, after a check of its chat template; None if the model is not
    here.

    Training and inference would refuse the same template after hours of work. Raises UsageError for a template that
    cannot be used.
    """
    folder = stage.run.roots.models / stage.run.recipe.model.path
    if not (folder / "config.json").is_file():
        stage.events.say(f"{folder}: no model here, so its chat template is not checked")
        return None
    return checked_renderer(stage)


def _questions_of_records(stage: Stage, task: RecordTask) -> list[Any]:
    """Return a task's questions, and write their pictures. If the recipe sets Data-Juicer, it processes records
    first."""
    recipe, data = stage.run.recipe, stage.run.data
    records = task.records(data)
    pictures = stage.path("pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    others: list[Any] = task.read_others(recipe, data, pictures, stage.skip)
    if recipe.preprocess.data_juicer is not None:
        from stages.preprocess.data_juicer import run_operators

        records = run_operators(stage, records)
    made: list[Any] = task.read_records(recipe, data, records, pictures, others, stage.skip)
    stage.outputs["pictures/"] = None
    return others + made


def _conversations(stage: Stage, task: ConversationTask) -> list[Any]:
    """Return a task's conversations, and write their pictures. What was found out about the data is printed, and added
    to the manifest."""
    notes: list[str] = []

    def say(sentence: str) -> None:
        stage.events.say(sentence)
        notes.append(sentence)

    pictures = stage.path("pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    found = task.read_conversations(stage.run.recipe, stage.run.data, pictures, stage.skip, say)
    stage.facts["data"] = notes
    if any(pictures.iterdir()):
        stage.outputs["pictures/"] = None
    return found


def _find_documents(stage: Stage, task: Task, data: Path) -> dict[str, Path]:
    """The file of each document by its id; empty if the task reads no documents. Prints a notice if names differ only
    by Unicode composition."""
    if not reads_documents(task):
        return {}
    from stages.preprocess.documents import document_ids

    documents = document_ids(task.find_documents(data), data / "documents")
    decomposed = [name for name in documents if unicodedata.normalize("NFC", name) != name]
    if decomposed:  # their composed names are others' ids
        stage.events.say(
            f"{len(decomposed)} documents have names that differ from others' only by Unicode composition, such as"
            f" {decomposed[0]!a}; a question refers to the document whose name has the same code points"
        )
    return documents


def _group_questions(questions: list[Any], documents: dict[str, Path], known_hashes: Path) -> dict[str, str]:
    """The group of each question by id: the question's document, or what the task names. Documents with the same
    content are one group, with the name of the first of them.

    `known_hashes` is the file in which the stage keeps the digests of documents.
    """
    if not documents:
        return {question.id: question.group for question in questions}
    hashes = FileHashes(known_hashes)
    names = sorted({question.document for question in questions})
    content = {name: hashes.file_digest(documents[name]) for name in names}
    first = {digest: name for name, digest in reversed(content.items())}  # the first name of each content
    return {question.id: first[content[question.document]] for question in questions}


def _show_encodings(stage: Stage) -> None:
    """Show which data files are read in an encoding other than UTF-8, and add them to the manifest."""
    found = other_encodings(stage.run.data)
    for name, encoding in found.items():
        stage.events.say(f"{name}: read as {encoding}; save it as UTF-8 if its text looks wrong")
    if found:
        stage.facts["encodings"] = found


def _show_counts(stage: Stage) -> None:
    """Print the number of skipped records by reason, then the number of samples by split."""
    first: dict[str, str] = {}
    for skipped in stage.skipped:
        first.setdefault(skipped["reason"], skipped["what"])
    for reason, count in Counter(skipped["reason"] for skipped in stage.skipped).items():
        stage.events.say(f"skipped {count}: {reason}, first {first[reason]}")
    counts = ", ".join(f"{stage.counts[split]} {split}" for split in SPLITS)
    read = f"{stage.counts['questions']} questions"
    if "pages" in stage.counts:
        read = f"{stage.counts['pages']} pages of {stage.counts['documents']} documents"
    stage.events.say(f"{counts} samples from {read}")
