"""preprocess: read the questions, split them by group, find in their documents what belongs to them, write samples.

Of a task that reads records, Data-Juicer may filter and rewrite these first.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, cast

from stages.contract.files import FileHashes
from stages.contract.stage import Stage
from stages.preprocess.rows import write_samples
from stages.preprocess.split import SPLITS, split_questions
from stages.tasks import load_task
from stages.tasks.task import QuestionTask, RecordTask, Task, reads_documents, reads_records


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe, data = stage.run.recipe, stage.run.data
    task = load_task(recipe.task)
    documents = _documents(task, data)
    if reads_records(task):
        if stage.nothing_to_do(0, "documents"):  # records are not shared out: Data-Juicer has its own ways to
            return
        questions = _questions_of_records(stage, task)
    else:
        questions = cast(QuestionTask, task).read_questions(recipe, data, set(documents), stage.skip)
    stage.counts["questions"] = len(questions)

    # before the hours of work: it may find that nothing can be held out
    groups = _groups(stage, questions, documents)
    splits = split_questions(questions, groups, recipe.data, recipe.seed, stage.skip)
    questions = [question for question in questions if question.id in splits]
    if stage.nothing_to_do(len(documents), "documents"):
        return
    founds = None
    if reads_documents(task):
        from stages.preprocess.retrieval import find, read_documents

        known = read_documents(stage, documents, questions)
        if known is None:
            return
        founds = find(stage, task, questions, splits, known)
    write_samples(stage, task, questions, splits, groups, founds)
    _tell(stage)


def _questions_of_records(stage: Stage, task: RecordTask) -> list[Any]:
    """The questions of a task that reads records, once Data-Juicer has been over these, and the pictures they show."""
    recipe, data = stage.run.recipe, stage.run.data
    records = task.records(data)
    pictures = stage.path("pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    others: list[Any] = task.read_others(recipe, data, pictures, stage.skip)
    if recipe.preprocess.data_juicer is not None:
        from stages.preprocess.data_juicer import process

        records = process(stage, records)
    made: list[Any] = task.read_records(recipe, data, records, pictures, others, stage.skip)
    stage.outputs["pictures/"] = None
    return others + made


def _documents(task: Task, data: Path) -> dict[str, Path]:
    """The documents by id; none where the task reads none."""
    if not reads_documents(task):
        return {}
    from stages.preprocess.documents import document_ids

    return document_ids(task.find_documents(data), data / "documents")


def _groups(stage: Stage, questions: list[Any], documents: dict[str, Path]) -> dict[str, str]:
    """What a question must be split together with, by its id. Documents of the same content, under whatever names, are
    one group."""
    if not documents:
        return {question.id: question.group for question in questions}
    hashes = FileHashes(stage.path(".hashes.json"))  # knows the documents from when the stage's inputs were hashed
    asked = sorted({question.document for question in questions})
    content = {name: hashes.file(documents[name]) for name in asked}
    first = {digest: name for name, digest in reversed(content.items())}  # by name, whose order is the listing's
    return {question.id: first[content[question.document]] for question in questions}


def _tell(stage: Stage) -> None:
    reasons: dict[str, int] = defaultdict(int)
    for skipped in stage.skipped:
        reasons[skipped["reason"]] += 1
        print(f"skipped {skipped['what']}: {skipped['reason']} {skipped['detail']}")  # into the log
    for reason, count in reasons.items():
        stage.events.say(f"skipped {count}: {reason}")
    counts = ", ".join(f"{stage.counts[split]} {split}" for split in SPLITS)
    read = f"{stage.counts['questions']} questions"
    if "pages" in stage.counts:
        read = f"{stage.counts['pages']} pages of {stage.counts['documents']} documents"
    stage.events.say(f"{counts} samples from {read}")
