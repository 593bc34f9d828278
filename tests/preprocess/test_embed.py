"""Vectors of pages and questions: kept batch by batch, the same in shards and over several processes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.contract.errors import Exit
from stages.contract.part import Shard
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stage import Stage, run_stage
from stages.preprocess import embed
from stages.preprocess.documents import document_ids, render_documents
from stages.preprocess.embed import Embedder, Piece
from tests.conftest import Lorry, need_model

SEEING = (
    *("preprocess.retrieval.embedder=tiny-gme", "preprocess.retrieval.batch_size=2"),
    "preprocess.retrieval.max_pixels=31360",
)
READING = ("preprocess.retrieval.batch_size=2",)


@pytest.fixture
def run(lorry: Lorry, recipe_file: Path) -> Callable[..., Run]:
    """A run of the minimal recipe with overrides, which leave its name alone."""

    def make(*overrides: str) -> Run:
        roots = Roots(lorry.data, lorry.models, lorry.runs)
        return Run("r", load_recipe(recipe_file, None, overrides), roots)

    return make


@pytest.fixture(params=[SEEING, READING], ids=["sees", "reads"])
def few_pages(request: Any, run: Callable[..., Run], few: Path) -> Run:
    """Four documents of three pages, for either kind of embedder."""
    need_model("tiny-gme")
    need_model("all-MiniLM-L6-v2")
    return run(*request.param)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many items each piece had that was really embedded."""
    counted: list[int] = []
    real = embed._Model.keep

    def counting(model: Any, pieces: list[Piece]) -> Iterator[Piece]:
        for piece in real(model, pieces):
            counted.append(len(piece.items))
            yield piece

    monkeypatch.setattr(embed._Model, "keep", counting)
    yield counted


def embedded(run: Run, part: Shard | None = None, **options: Any) -> Any:
    """Render and embed; the pages' vectors, or those kept in the cache by a shard."""
    found: dict[str, Any] = {}

    def work(stage: Stage) -> None:
        documents = document_ids(sorted((run.data / "documents").iterdir()), run.data / "documents")
        mine = {name: path for n, (name, path) in enumerate(documents.items()) if stage.has(n)}
        pages = render_documents(stage, mine)
        embedder = Embedder(stage, **options)
        embedder.pages(pages)
        found["questions"] = embedder.questions([["a question", "", "another"], ["a third"]])
        if stage.shard is None:
            found["pages"] = np.array(embedder.write_pages(pages, stage.path("vectors.npy")))
        embedder.close()
        found["pieces"] = {path.name: path.read_bytes() for path in sorted(stage.path("cache/vectors").iterdir())}

    assert run_stage(run, "preprocess", work, part=part) == Exit.DONE
    return found


def test_vectors_have_length_one_and_an_empty_text_none(few_pages: Run) -> None:
    found = embedded(few_pages)
    assert found["pages"].shape[0] == 12 and found["pages"].dtype == np.float32
    assert np.linalg.norm(found["pages"], axis=1) == pytest.approx(np.ones(12), abs=1e-3)
    assert np.linalg.norm(found["questions"], axis=1) == pytest.approx([1, 0, 1, 1], abs=1e-3)


def test_a_restart_embeds_only_what_is_missing(few_pages: Run, calls: list[int]) -> None:
    whole = embedded(few_pages)
    assert sum(calls) == 12 + 4 and max(calls) == 2, "pieces are batches, formed inside a document"
    calls.clear()
    kept = sorted(few_pages.path("preprocess", "cache", "vectors").iterdir())
    kept[0].unlink()
    few_pages.path("preprocess", "manifest.json").unlink()
    again = embedded(few_pages)
    assert len(calls) == 1, "a kill loses one batch at most"
    assert np.array_equal(again["pages"], whole["pages"])
    assert again["pieces"] == whole["pieces"]


def test_shards_make_the_very_bytes_of_the_whole(few_pages: Run) -> None:
    parts = [embedded(few_pages, Shard(n, 3))["pieces"] for n in range(3)]
    whole = embedded(few_pages)["pieces"]
    assert whole == {**parts[0], **parts[1], **parts[2]}


def test_two_processes_make_the_very_bytes_of_one(few_pages: Run) -> None:
    together = embedded(few_pages, devices=["cpu", "cpu"])
    few_pages.path("preprocess", "manifest.json").unlink()
    for path in few_pages.path("preprocess", "cache", "vectors").iterdir():
        path.unlink()
    assert embedded(few_pages, devices=["cpu"])["pieces"] == together["pieces"]


def test_halves_are_kept_where_they_are_asked_for(run: Callable[..., Run], few: Path) -> None:
    need_model("tiny-gme")
    whole = embedded(run(*SEEING))["pages"]
    half = embedded(run(*SEEING, "preprocess.retrieval.vectors=float16"))["pages"]
    assert half.dtype == np.float16
    assert half.astype(np.float32) == pytest.approx(whole, abs=1e-3)
