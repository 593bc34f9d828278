"""patent_qa: questions about patent PDFs, answered from the pages that a question names or that are most similar to it.

With a question that names a page, the prompt shows that page and a few others, or that page alone if its drawing is
enough. Otherwise it shows the most similar pages. Pages are pictures, or text for a model without vision. Up to three
passes ask the model whether the drawing is enough, for the answer, and for the answer in the style of the data.

Data folder: `documents/` with PDFs, also in subfolders, and either `questions.jsonl`, split by document, or
`train.jsonl` and `test.jsonl`. One question a line:

    {"id": "q1", "question": "...", "document": "CN000000001A.pdf", "answer": "..." or [...], "pages": [3], "kind": ""}

`question` and `document` are required, and `answer` for training and scoring. Retrieval is scored by `pages`, the
1-based pages of the evidence. Scores are broken down by `kind`. A missing `id` becomes `<file>-<line>`. A field that is
null or empty counts as missing. A number as an answer is read as text.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from stages.contract.recipe import Recipe, Section
from stages.contract.records import Meta, Prediction, Sample
from stages.tasks.common import short_answers
from stages.tasks.common.default_prompts import narrowed_sample
from stages.tasks.common.default_results import measures, picture, together, uploads
from stages.tasks.common.default_settings import READS_CONVERSATIONS, READS_RECORDS, Scoring
from stages.tasks.common.mentions import asks_position
from stages.tasks.common.reasoning import without_reasoning
from stages.tasks.patent_qa import prompts
from stages.tasks.patent_qa.questions import SOURCE, PatentQuestion, asked_rows, find_documents, read_questions
from stages.tasks.task import Ask, Found, RetrievalNeeds

READS_DOCUMENTS = True

COMPONENTS = ("classifier", "retrieval", "style", "refine", "position_hint", "adapter")

SHARED = ("classify",)

ALONE = "alone"
"""Suffix, after `#`, of the id of a training sample that shows a question's page alone."""

RECALL_AT = (1, 2, 5)
"""Numbers of most similar pages for which recall is scored."""


class PatentMeta(Meta, total=False):
    """Metadata by which the passes choose the pages of a sample. Pages are 1-based."""

    page_named: int | None
    """The first page that the question names, usable or not."""
    figure_named: str | None
    """The figure that the question names, such as `2a`."""
    named: int | None
    """The first usable page that the question names."""
    also_named: list[int]
    """The other usable pages that the question names."""
    evidence: list[int]
    """Pages that hold the answer, according to the data."""
    ranked: list[int]
    """Pages, most similar to the question first."""
    first: list[int]
    """The document's first pages, shown in the ablation of retrieval."""
    top_k: int
    crop: str | None
    """Picture of the figure that the question names, relative to the run folder."""
    drawing_is_enough: bool | None
    """The classifier's verdict; None without one."""
    examples: list[str]
    """Answers of similar training questions, for the refining pass."""
    candidates: dict[str, dict[str, Any]]
    """Image, and text if shown, of all pages that a pass may show, by number."""
    max_pixels: int | None
    """Pixel budget of each page shown; None for pages as text."""


class Samples(Section):
    """Settings of `preprocess.samples`."""

    shows: Literal["pictures", "text"] = Field(
        "text", description="How pages are shown: pictures, or text for a model without vision"
    )
    others: int = Field(2, ge=0, description="Number of further pages shown with a page that the question names")
    pages_pixels: int = Field(1_568_000, ge=28 * 28, description="Pixel budget of each page if several are shown")
    page_pixels: int = Field(2_352_000, ge=28 * 28, description="Pixel budget of a page shown alone")
    position_hint: bool = Field(
        True,
        description="Add to a question about positions on a page shown alone that a part is where its leader line ends",
    )
    crop_figure: bool = Field(False, description="Of a page shown alone, show only the figure that the question names")
    examples: int = Field(
        2, ge=0, description="Number of answers of similar training questions shown in the refining pass"
    )


class Passes(Section):
    """Settings of `infer.passes`."""

    refine: bool = Field(False, description="Add a pass that shortens the answer to the style of the training answers")
    page_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum new tokens of an answer to a question that names a page; null: infer.max_new_tokens",
    )
    refine_tokens: int = Field(768, ge=1, description="Maximum new tokens of the refining pass")
    classify_tokens: int = Field(
        8, ge=1, description="Maximum new tokens of the pass that asks whether the drawing is enough"
    )


def sources(folder: Path) -> list[str]:
    """The name of the one data set, in a list. `read_questions` checks whether the folder has it."""
    return [SOURCE]


def _meta(sample: Sample) -> PatentMeta:
    """The metadata of a sample, with the keys of this task."""
    return cast(PatentMeta, sample["meta"])


def _sample_settings(recipe: Recipe) -> Samples:
    """The settings of `preprocess.samples`."""
    return Samples.model_validate(recipe.preprocess.samples)


def _pass_settings(recipe: Recipe) -> Passes:
    """The settings of `infer.passes`."""
    return Passes.model_validate(recipe.infer.passes)


def _top_k(recipe: Recipe) -> int:
    """The number of most similar pages to show."""
    assert recipe.preprocess.retrieval is not None  # required for a task that reads documents
    return recipe.preprocess.retrieval.top_k


# -- samples -----------------------------------------------------------------------------------------------------


def retrieval_needs(recipe: Recipe) -> RetrievalNeeds:
    """What retrieval must find for the questions."""
    settings = _sample_settings(recipe)
    return RetrievalNeeds(settings.examples, settings.crop_figure and settings.shows == "pictures")


def classification(recipe: Recipe, question: PatentQuestion) -> Ask | bool | None:
    """How to decide whether a page's drawing is enough for a question: a prompt for the model, or the rule's verdict.
    None if the recipe has no classifier, or the question does not name exactly one page."""
    if len(question.pages) != 1 or recipe.preprocess.classifier == "none":  # several pages are never shown alone
        return None
    if recipe.preprocess.classifier == "rule":
        return asks_position(question.text)
    return Ask(prompts.classification_prompt(question.text), max_new_tokens=_pass_settings(recipe).classify_tokens)


def read_classification(text: str) -> bool:
    """Whether the completion says that the drawing is enough."""
    return prompts.says_yes(without_reasoning(text))


def build_samples(recipe: Recipe, question: PatentQuestion, found: Found | None, split: str) -> list[Sample]:
    """The samples of one question, which show pages by the same rule in every split.

    If the question names no usable page, its sample shows the most similar pages. Otherwise it shows the named pages
    and similar ones. If the drawing of the only named page is enough, the question gets a second sample in train and
    validation, which shows that page alone. The one sample in test has all pages that a prompt may show, because the
    passes choose among them.
    """
    assert found is not None  # the task reads documents
    settings, top_k = _sample_settings(recipe), _top_k(recipe)
    usable = [number for number in question.pages if number in found.pages]
    named, also = (usable[0], usable[1:]) if usable else (None, [])
    meta: PatentMeta = {
        "group": question.document,
        "kind": question.kind,
        "question": question.text,
        "page_named": question.page,
        "figure_named": question.figure,
        "named": named,
        "also_named": also,
        "evidence": list(question.evidence),
        "ranked": found.ranked[: max(*RECALL_AT, settings.others + top_k)],
        "first": sorted(found.pages)[:top_k],
        "top_k": top_k,
        "crop": found.crop,
        "drawing_is_enough": found.drawing_is_enough if named and not also else None,
    }
    whole: Sample = {
        "id": question.id,
        "messages": [],
        "images": [],
        "references": list(question.answers),
        "meta": meta,
    }
    if split == "test":
        meta["examples"] = [short_answers.on_one_line(one) for one in found.examples]
        _set_prompt(recipe, whole, _other_pages(settings, meta, ()), found.pages)
        candidates = {*meta["ranked"], *meta["first"], *usable}
        meta["candidates"] = {str(number): _page_record(settings, found.pages[number]) for number in sorted(candidates)}
        return [whole]
    rows = [whole]
    if (target := short_answers.learnt_answer(question.answers)) is not None:
        meta["target"] = target
    _set_prompt(recipe, whole, _other_pages(settings, meta, ()), found.pages)
    if meta["drawing_is_enough"]:
        alone: Sample = {**whole, "id": f"{question.id}#{ALONE}", "meta": cast(PatentMeta, dict(meta))}
        _set_prompt(recipe, alone, [], found.pages)
        rows.append(alone)
    return rows


def _page_record(settings: Samples, page: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a page's record that its passes need: image, and text if shown."""
    return {"image": page["image"], **({"text": page["text"]} if settings.shows == "text" else {})}


def _other_pages(settings: Samples, meta: PatentMeta, without: Collection[str]) -> list[int]:
    """Numbers of the pages to show besides the first named page, if there is one: other named pages, then the most
    similar ones, or the document's first pages if `without` has `retrieval`. Sorted. At most `top_k` pages if the
    question names no usable page; else `settings.others`, or all other named pages if they are more."""
    ranked = meta["first"] if "retrieval" in without else meta["ranked"]
    count = meta["top_k"] if meta["named"] is None else max(settings.others, len(meta["also_named"]))
    others = dict.fromkeys([*meta["also_named"], *ranked])
    return sorted([number for number in others if number != meta["named"]][:count])


def _set_prompt(recipe: Recipe, sample: Sample, others: list[int], pages: Mapping[int, Mapping[str, Any]]) -> None:
    """Set a sample's messages, images and page metadata so that it shows its named page, if there is one, and
    `others`."""
    meta = _meta(sample)
    ask = _answer_prompt(recipe, meta, others, {str(number): page for number, page in pages.items()}, ())
    shown = sorted([*others, *([meta["named"]] if meta["named"] else [])])
    sample["messages"], sample["images"] = ask.messages, ask.images
    meta["max_pixels"] = ask.max_pixels
    meta["pages"] = shown
    meta["page_images"] = [pages[number]["image"] for number in shown]


def _answer_prompt(
    recipe: Recipe,
    meta: PatentMeta,
    others: list[int],
    pages: Mapping[str, Mapping[str, Any]],
    without: Collection[str],
) -> Ask:
    """The prompt for the question with its named page, if there is one, and `others`. `pages` are by number as text."""
    settings, passes = _sample_settings(recipe), _pass_settings(recipe)
    named = meta["named"]
    alone = named is not None and not others
    hint = alone and settings.position_hint and asks_position(meta["question"]) and "position_hint" not in without
    limit = passes.page_tokens if named is not None else None
    if settings.shows == "text":
        shown = sorted([*others, *([named] if named is not None else [])])
        texts = [(number, str(pages[str(number)]["text"])) for number in shown]
        return Ask(prompts.text_prompt(meta["question"], texts, hint), max_new_tokens=limit)
    about = [] if named is None else [named, *(number for number in others if number in meta["also_named"])]
    shown = [*about, *(number for number in others if number not in about)]
    images = [str(pages[str(number)]["image"]) for number in shown]
    if alone and meta["crop"] is not None:
        images = [meta["crop"]]
    messages = prompts.picture_prompt(meta["question"], len(about), len(shown) - len(about), hint)
    return Ask(messages, images, settings.page_pixels if alone else settings.pages_pixels, limit)


# -- prompts -----------------------------------------------------------------------------------------------------


def passes(recipe: Recipe) -> tuple[str, ...]:
    """Names of the passes: `classify` if the model is the classifier, `answer`, and `refine` if the recipe has it."""
    first = ("classify",) if recipe.preprocess.classifier == "model" else ()
    return (*first, "answer", *(("refine",) if _pass_settings(recipe).refine else ()))


def ask(recipe: Recipe, sample: Sample, name: str, before: Mapping[str, str], without: Collection[str]) -> Ask | None:
    """The prompt of the pass `name` for a test sample; None if the sample skips that pass."""
    meta, settings = _meta(sample), _pass_settings(recipe)
    if name == "classify":
        if meta.get("named") is None or meta["also_named"] or "classifier" in without:
            return None
        return Ask(prompts.classification_prompt(meta["question"]), max_new_tokens=settings.classify_tokens)
    if name == "refine":
        if "refine" in without:
            return None
        examples = [] if "style" in without else meta["examples"]
        messages = prompts.refinement_prompt(meta["question"], without_reasoning(before["answer"]), examples)
        return Ask(messages, max_new_tokens=settings.refine_tokens)
    alone = _shows_page_alone(meta, before, without)
    if alone or "retrieval" in without:
        others = [] if alone else _other_pages(_sample_settings(recipe), meta, without)
        return _answer_prompt(recipe, meta, others, meta["candidates"], without)
    limit = settings.page_tokens if meta.get("named") is not None else None
    return Ask(sample["messages"], sample["images"], meta.get("max_pixels"), limit)


def possible_prompts(recipe: Recipe, sample: Sample, without: Collection[str]) -> list[tuple[Ask, int]]:
    """All prompts that the passes may use for a sample, each with the largest number of tokens that earlier completions
    can add to it."""
    asks: list[tuple[Ask | None, int]] = [
        (ask(recipe, sample, "answer", {"classify": word}, without), 0) for word in "YN"
    ]
    longest = max((each.max_new_tokens or recipe.infer.max_new_tokens for each, _ in asks if each), default=0)
    for name in passes(recipe):
        if name != "answer":
            asks.append((ask(recipe, sample, name, {"answer": ""}, without), longest if name == "refine" else 0))
    return [(each, spare) for each, spare in asks if each is not None]


def _shows_page_alone(meta: PatentMeta, before: Mapping[str, str], without: Collection[str]) -> bool:
    """Whether to show a question's page alone: by the completion of the pass `classify`, else by the verdict in the
    sample. False if the question does not name exactly one usable page, or if `without` has `classifier`."""
    if meta.get("named") is None or meta["also_named"] or "classifier" in without:
        return False
    if "classify" in before:
        return read_classification(before["classify"])
    return bool(meta["drawing_is_enough"])


def read_answer(text: str, sample: Sample) -> str:
    """The answer in a completion: its first line, or as many lines as the longest reference has, without full stops at
    its end. Empty if there is none."""
    return _without_stop(short_answers.first_lines(text, sample))


def _without_stop(text: str) -> str:
    """The text without Chinese and Latin full stops, blanks and line ends at its end."""
    return text.rstrip("。. \n")


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, str]:
    """A line with the original's keys. `question_type` is the classifier's completion, `answer` the answer before the
    refining pass and `style_answer` the final answer; both are the same without that pass. Each is empty if there is
    none."""
    prediction = next((predictions[name] for name in row["ids"] if name in predictions), None)
    texts = prediction["passes"] if prediction else {}
    final = (prediction["answer"] if prediction else None) or ""
    return {
        "idx": row["idx"],
        "document": row["document"],
        "question": row["question"],
        "question_type": without_reasoning(texts.get("classify", "")),
        "answer": without_reasoning(texts.get("answer", "")) or final,
        "style_answer": final,
    }


# -- scores ------------------------------------------------------------------------------------------------------


def score(recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
    """Exact match and F1 by the rules of SQuAD, of CMRC 2018 for Chinese, and of Lorry; see `short_answers.scores`. For
    questions about positions, SQuAD's exact match is also reported as `position_exact_match`."""
    found = short_answers.scores(answer, sample, _without_stop)
    if not asks_position(sample["meta"].get("question", "")):
        return found
    exact = found["exact_match"]
    return {"exact_match": exact, "position_exact_match": exact, **found}  # the strictest first


def score_notes(recipe: Recipe, samples: Sequence[Sample]) -> list[str]:
    """Sentences on the rules by which each metric is computed; see `short_answers.score_notes`."""
    return short_answers.score_notes(samples)


def facts(sample: Sample) -> dict[str, float]:
    """Recall of retrieval by name, in 0..1: the share of the evidence pages that the sample shows, and the share that
    is among the k most similar pages, for each k of RECALL_AT. Empty if the data name no evidence."""
    meta = _meta(sample)
    evidence = set(meta["evidence"])
    if not evidence:
        return {}
    shown = len(evidence & set(meta["pages"])) / len(evidence)
    ranked = meta.get("ranked")
    at = {} if ranked is None else {f"recall@{k}": len(evidence & set(ranked[:k])) / len(evidence) for k in RECALL_AT}
    return {"retrieval_recall": shown, **at}
