"""Vectors of pages and questions: kept batch by batch, the same in shards and over several processes."""

import functools
import multiprocessing
import os
import re
import signal
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
from stages.contract.stage import Stage
from stages.host.runner import run_stage
from stages.preprocess import embed
from stages.preprocess.documents import document_ids, render_documents
from stages.preprocess.embed import Embedder, Piece
from tests.conftest import Lorry, need_model

SEEING = (
    *("preprocess.retrieval.embedder=tiny-gme", "preprocess.retrieval.batch_size=2"),
    "preprocess.retrieval.max_pixels=31360",
)
READING = ("preprocess.retrieval.batch_size=2",)

REAL = embed._Model.__init__


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


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every start of these tests finds its embedder loaded; processes of their own still load theirs."""
    monkeypatch.setattr(embed._Model, "__init__", lambda model, *what: vars(model).update(vars(loaded(*what))))


@functools.cache
def loaded(*what: Any) -> Any:
    model = object.__new__(embed._Model)
    REAL(model, *what)
    return model


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


def test_two_processes_make_the_very_bytes_of_one(run: Callable[..., Run], few: Path) -> None:
    need_model("tiny-gme")
    seeing = run(*SEEING)
    together = embedded(seeing, devices=["cpu", "cpu"])
    seeing.path("preprocess", "manifest.json").unlink()
    for path in seeing.path("preprocess", "cache", "vectors").iterdir():
        path.unlink()
    assert embedded(seeing, devices=["cpu"])["pieces"] == together["pieces"]


def test_what_is_wrong_in_a_process_is_told_in_a_line(
    run: Callable[..., Run], few: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need_model("tiny-gme")
    seeing = run(*SEEING)

    def work(stage: Stage) -> None:
        records = [
            {"document": "d", "image": f"preprocess/pages/gone/{n}.jpg", "sha256": str(n), "width": 30, "height": 30}
            for n in range(6)
        ]
        Embedder(stage, devices=["cpu", "cpu"]).pages(records)

    assert run_stage(seeing, "preprocess", work) == Exit.DATA
    assert re.search(r"gone/\d.jpg: no picture .*; run preprocess again", capfd.readouterr().err)


def test_all_that_was_embedded_elsewhere_is_taken_over_without_a_card(
    few_pages: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedded(few_pages)
    few_pages.path("preprocess", "manifest.json").unlink()
    monkeypatch.setenv("LORRY_TARGET", "a800")  # an image for cards, and there is none here
    assert embedded(few_pages)["pieces"] == whole["pieces"]


def test_a_stop_of_the_whole_group_while_embedding_is_a_stop(
    run: Callable[..., Run], few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes end by themselves; that is no fault of theirs."""
    need_model("tiny-gme")

    def work(stage: Stage) -> None:
        documents = document_ids(sorted((stage.run.data / "documents").iterdir()), stage.run.data / "documents")
        pages = render_documents(stage, documents)
        signal.signal(signal.SIGALRM, lambda *_: end_group(stage))
        signal.setitimer(signal.ITIMER_REAL, 1)
        Embedder(stage, devices=["cpu", "cpu"]).pages(pages)

    def end_group(stage: Stage) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    try:
        assert run_stage(run(*SEEING), "preprocess", work) == Exit.INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_halves_are_kept_where_they_are_asked_for(run: Callable[..., Run], few: Path) -> None:
    need_model("tiny-gme")
    whole = embedded(run(*SEEING))["pages"]
    half = embedded(run(*SEEING, "preprocess.retrieval.vectors=float16"))["pages"]
    assert half.dtype == np.float16
    assert half.astype(np.float32) == pytest.approx(whole, abs=1e-3)
