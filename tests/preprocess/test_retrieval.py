"""Search in a document's pages: a page is found by any of its sentences, also far down."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pymupdf
import pytest

from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.host.runner import run_stage
from stages.preprocess.documents import document_ids
from stages.preprocess.embed import Embedder
from stages.preprocess.retrieval import find_for_questions, read_documents
from stages.tasks import load_task
from tests.conftest import MODELS, Lorry, need_model

FILLER = (
    "The apparatus of the embodiment has a housing with a cover that is fixed by screws. In operation the shaft turns"
    " and the cam lifts the follower against the force of the return spring. A seal between both halves keeps dust"
    " away from the bearing, which is lubricated for life."
)
TOPICS = [
    "The aquarium pump circulates salt water for the coral fish.",
    "The violin bow is rosined before each concert.",
    "The telescope mirror is coated with aluminium.",
    "The bread dough rises overnight in the refrigerator.",
    "The ski binding releases when the skier falls.",
    "The bee hive holds ten wooden honey frames.",
    "The dental drill is cooled by a water spray.",
    "The parachute opens at an altitude of 800 metres.",
    "The chess clock stops when the flag falls.",
    "The greenhouse window opens at thirty degrees.",
    "The locomotive horn sounds at each level crossing.",
    "The coffee grinder has burrs made of ceramic.",
]
"""The last sentence of each page."""
QUESTIONS = [
    "What circulates salt water for fish?",
    "When is the violin bow rosined?",
    "What is the mirror of the telescope coated with?",
    "Where does the bread dough rise?",
    "When does the ski binding release?",
    "How many honey frames does the bee hive hold?",
    "How is the dental drill cooled?",
    "At which altitude does the parachute open?",
    "When does the chess clock stop?",
    "At how many degrees does the greenhouse window open?",
    "Where does the locomotive sound its horn?",
    "What are the burrs of the coffee grinder made of?",
]
PER_DOCUMENT = 6


@pytest.fixture
def documents(lorry: Lorry) -> dict[str, Path]:
    """Two documents of six pages. Each page has about 600 words, and its own sentence at its end."""
    folder = lorry.data / "few" / "documents"
    folder.mkdir(parents=True)
    chance = random.Random(0)
    for first in range(0, len(TOPICS), PER_DOCUMENT):
        document = pymupdf.open()
        for topic in TOPICS[first : first + PER_DOCUMENT]:
            words = [*(chance.choice(FILLER.split()) for _ in range(600)), *topic.split()]
            text = "\n".join(" ".join(words[start : start + 14]) for start in range(0, len(words), 14))
            document.new_page(width=595, height=842).insert_text((50, 60), text, fontsize=9)
        document.save(folder / f"{first}.pdf")
    return document_ids(sorted(folder.iterdir()), folder)


@pytest.fixture
def search(lorry: Lorry, recipe_file: Path, embedder: Path) -> Callable[..., tuple[Any, dict[str, list[int]]]]:
    """Return a function that reads the documents and gives the stage and the pages found for each question."""

    def start(documents: dict[str, Path], texts: list[str], *overrides: str) -> tuple[Any, dict[str, list[int]]]:
        run = Run("r", load_recipe(recipe_file, None, overrides), Roots(lorry.data, MODELS, lorry.runs))
        found: dict[str, Any] = {}

        def work(stage: Stage) -> None:
            questions = [question(number, text) for number, text in enumerate(texts)]
            index = read_documents(stage, documents, questions)
            splits = dict.fromkeys([one.id for one in questions], "test")
            assert index is not None
            founds = find_for_questions(stage, load_task("patent_qa"), questions, splits, index)
            found.update({name: one.ranked for name, one in founds.items()}, stage=stage)

        assert run_stage(run, "preprocess", work) == 0
        return found.pop("stage"), found

    return start


def question(number: int, text: str) -> Any:
    return SimpleNamespace(
        **{"id": str(number), "text": text, "document": f"{number // PER_DOCUMENT * PER_DOCUMENT}.pdf"},
        **{"page": None, "pages": (), "figure": None, "answers": ()},
    )


def test_a_sentence_at_the_end_of_a_long_page_is_found(documents: dict[str, Path], search: Callable[..., Any]) -> None:
    stage, ranked = search(documents, QUESTIONS)
    hits = [number % PER_DOCUMENT + 1 in ranked[str(number)][:2] for number in range(len(QUESTIONS))]
    assert np.mean(hits) >= 0.9
    assert all(sorted(pages) == list(range(1, PER_DOCUMENT + 1)) for pages in ranked.values()), "each page once"
    table = pq.read_table(stage.path("pages.parquet"), columns=["passages", "text"]).to_pydict()
    vectors = np.load(stage.path("vectors.npy"))
    assert sum(table["passages"]) == len(vectors) == stage.counts["passages"] == stage.outputs["vectors.npy"]
    assert min(table["passages"]) > 2


def test_a_question_longer_than_the_window_is_counted(
    documents: dict[str, Path], search: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    stage, _ = search({"0.pdf": documents["0.pdf"]}, [QUESTIONS[0], FILLER * 10])
    assert stage.counts["questions embedded without their end"] == 1
    assert "questions of more than 254 tokens: 1; the embedder reads only their beginning" in capfd.readouterr().err


def test_a_restart_that_finds_all_passages_makes_the_same_vectors(
    documents: dict[str, Path], search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"0.pdf": documents["0.pdf"]}
    stage, ranked = search(only, QUESTIONS[:2])
    before = stage.path("vectors.npy").read_bytes()
    stage.path("manifest.json").unlink()
    monkeypatch.setattr(Embedder, "_embed_here", None)  # nothing is embedded
    again, ranked_again = search(only, QUESTIONS[:2])
    assert again.path("vectors.npy").read_bytes() == before and ranked_again == ranked


def test_pictures_are_one_passage_each_and_long_questions_are_counted(
    documents: dict[str, Path], search: Callable[..., Any]
) -> None:
    need_model("tiny-gme")
    overrides = ("preprocess.retrieval.embedder=tiny-gme", "preprocess.retrieval.max_pixels=31360")
    texts = [QUESTIONS[0], FILLER * 60]
    stage, ranked = search({"0.pdf": documents["0.pdf"]}, texts, *overrides)
    assert stage.outputs["vectors.npy"] == PER_DOCUMENT
    assert stage.counts["questions embedded without their end"] == 1
    assert sorted(ranked["0"]) == list(range(1, PER_DOCUMENT + 1))
