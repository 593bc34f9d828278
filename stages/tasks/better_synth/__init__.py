"""better_synth: synthesised image-text data for a small vision-language model, scored by TextVQA and MMBench.

The connector between a vision tower and a language model is trained on captions, which Data-Juicer may filter and
rewrite; an adapter is then trained on conversations. Data folder, with picture names relative to it:

    records.jsonl             captions in Data-Juicer's form: {"id", "text", "images"}
    records_llava.json        the same records in LLaVA's form, which holds their questions by id
    finetune.json             conversations in LLaVA's form: {"id", "image", "conversations"}
    textvqa.jsonl             TextVQA's questions: {"question_id", "image", "text"}
    textvqa_annotations.json  their human answers; without them, predictions are not scored
    mmbench.tsv               MMBench's table; predictions for rows without an answer are not scored

Data mixes name the two training sets `pretrain` and `finetune`. Samples that show a picture of a test set are left out
of both. There is no validation split: only the published test sets are held out.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from stages.contract.recipe import Recipe, Section
from stages.contract.records import PLACE, Message, Meta, Prediction, Sample
from stages.tasks.better_synth import letters, mmbench, textvqa
from stages.tasks.better_synth.records import (
    MMBENCH,
    TEXTVQA,
    PictureQuestion,
    Samples,
    asked_rows,
    caption_questions,
    other_questions,
    records_file,
    sources,
    without_ocr_words,
)
from stages.tasks.common.default_prompts import SHARED, narrowed_sample, passes
from stages.tasks.common.default_results import facts, measures, picture
from stages.tasks.common.default_settings import READS_CONVERSATIONS, READS_DOCUMENTS, Passes
from stages.tasks.common.reasoning import without_reasoning
from stages.tasks.task import Ask, Found, Skip

READS_RECORDS = True

COMPONENTS = ("picture", "ocr", "adapter")

PICTURES = "preprocess/pictures"
"""Folder in which `read_others` and `read_records` store pictures, relative to the run."""


class PictureMeta(Meta, total=False):
    """Metadata of a sample. Only MMBench's samples have the keys below."""

    options: dict[str, str]
    """Option texts by letter."""
    round: int
    """Number of places by which the options are rotated; 0: as in the table."""
    together: str
    """Key that all rotations of a question share."""
    uploaded: dict[str, Any]
    """The table's row, for the upload."""


class Scoring(Section):
    """Settings of `eval.scoring`."""

    textvqa_cleaning: textvqa.Cleaning = Field(
        "mmf",
        description="How TextVQA's answers are normalised before they are compared. mmf: exactly as the published"
        " evaluator does, including its bugs; mended: with the bugs fixed",
    )


def records(folder: Path) -> Path:
    """Path of the file of Data-Juicer records. Raises DataError if it is missing, or if it has captions and the file
    with their questions is missing."""
    return records_file(folder)


def read_others(recipe: Recipe, folder: Path, pictures: Path, skip: Skip) -> list[PictureQuestion]:
    """The questions of the test sets and the conversations to train on. Unusable ones go to `skip`. Raises DataError if
    there is no data set to train on, or no usable question to test on."""
    return other_questions(folder, pictures, Samples.model_validate(recipe.preprocess.samples), skip)


def read_records(
    recipe: Recipe, folder: Path, records: Path, pictures: Path, others: list[PictureQuestion], skip: Skip
) -> list[PictureQuestion]:
    """The questions to train on in the file `records`, which has captions or whole conversations. Unusable and
    duplicate records, and records with a picture of a test set, go to `skip`."""
    settings = Samples.model_validate(recipe.preprocess.samples)
    return caption_questions(folder, records, pictures, settings, others, skip)


def build_samples(recipe: Recipe, question: PictureQuestion, found: Found | None, split: str) -> list[Sample]:
    """The one sample of a conversation or a question. Training learns all answers of a conversation."""
    meta = cast(PictureMeta, {"group": question.group, "source": question.source, **question.meta})
    if question.error is not None:
        meta["error"] = question.error
    return [
        {
            "id": question.id,
            "messages": list(question.messages),
            "images": [f"{PICTURES}/{name}" for name in question.images],
            "references": list(question.answers),
            "meta": meta,
        }
    ]


# -- prompts ------------------------------------------------------------------------------------------


def ask(recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]) -> Ask:
    """The prompt with the sample's messages and pictures. `without` may remove pictures (`picture`) or OCR words
    (`ocr`)."""
    messages, images = sample["messages"], sample["images"]
    if "ocr" in without and sample["meta"]["source"] == TEXTVQA:
        messages = [_with_content(message, without_ocr_words(message["content"])) for message in messages]
    if "picture" in without:
        messages = [_with_content(m, m["content"].replace(f"{PLACE}\n", "").replace(PLACE, "")) for m in messages]
        images = []
    return Ask(messages, images)


def _with_content(message: Message, content: str) -> Message:
    """The message with another content."""
    return {"role": message["role"], "content": content}


def possible_prompts(recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
    """The one prompt of a sample, to which no earlier completion adds tokens."""
    return [(ask(recipe, sample, "answer", {}, without), 0)]


def read_answer(text: str, sample: Sample) -> str | None:
    """For MMBench, the letter that a completion means; None if it means none or several. For TextVQA, the whole
    completion, stripped; None if nothing is left."""
    text = without_reasoning(text)
    if sample["meta"]["source"] == MMBENCH:
        return letters.letter_in(text, _meta(sample)["options"])
    return text.strip() or None


# -- submission and scores ----------------------------------------------------------------------------


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """A line in LLaVA's form, for either benchmark. The text is the completion for the first of the row's
    samples; empty if there is none."""
    name = row["ids"][0]
    prediction = predictions.get(name)
    text = without_reasoning((prediction["text"] if prediction else None) or "")
    marks = {"answer_id": name, "model_id": "lorry", "metadata": {}}  # the file's name says which model it is
    return {**row["asked"], "text": text.strip(), **marks}


def uploads(folder: Path, samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[str]:
    """Write MMBench's workbook: each row of its table with the completion for the unrotated question. Returns its name
    in a list, which is empty if MMBench is not among the samples."""
    asked = [sample for sample in samples if _meta(sample)["source"] == MMBENCH and _meta(sample)["round"] == 0]
    if not asked:
        return []
    rows = []
    for sample in asked:
        prediction = predictions.get(sample["id"])
        text = without_reasoning((prediction["text"] if prediction else None) or "")
        rows.append(mmbench.upload_row(_meta(sample)["uploaded"], text))
    mmbench.write_xlsx(folder / "mmbench.xlsx", rows)
    return ["mmbench.xlsx"]


def score(recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
    """For TextVQA its accuracy in 0..1; for MMBench 1 if the letter is right, else 0. Eval counts the rotations of an
    MMBench question once, with the lowest of their scores (`together`)."""
    references = sample["references"]
    if sample["meta"]["source"] == MMBENCH:
        return {"mmbench_accuracy": float(answer in references)}
    cleaning = Scoring.model_validate(recipe.eval.scoring).textvqa_cleaning
    return {"textvqa_accuracy": textvqa.accuracy(answer, references, cleaning)}


def score_notes(recipe: Recipe, samples: Sequence[Sample]) -> list[str]:
    """Sentences on the rules by which each metric is computed, and on how it differs from published figures."""
    asked = {sample["meta"]["source"] for sample in samples}
    notes = []
    if TEXTVQA in asked:
        cleaning = Scoring.model_validate(recipe.eval.scoring).textvqa_cleaning
        bugs = "exactly" if cleaning == "mmf" else "with its bugs fixed"
        notes.append(f"MMF's, {bugs}: textvqa_accuracy")
    if MMBENCH in asked:
        notes.append(
            "MMBench's, but with letters read by rule: mmbench_accuracy; the official figure also asks a language model"
            " and may be higher"
        )
    return notes


def together(sample: Sample) -> str:
    """The key that the rotations of an MMBench question share, else the sample's id."""
    return _meta(sample).get("together", sample["id"])


def _meta(sample: Sample) -> PictureMeta:
    """The metadata of a sample, with the keys of this task."""
    return cast(PictureMeta, sample["meta"])
