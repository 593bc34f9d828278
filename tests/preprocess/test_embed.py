"""Vectors of pages and questions: saved batch by batch, the same in shards and over several processes."""

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
import torch

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
from tests.hardware.recorded import Box, box

__all__ = ["box"]

PICTURES = (
    *("preprocess.retrieval.embedder=tiny-gme", "preprocess.retrieval.batch_size=2"),
    "preprocess.retrieval.max_pixels=31360",
)
TEXTS = ("preprocess.retrieval.batch_size=2",)

REAL = embed._Model.__init__


@pytest.fixture
def run(lorry: Lorry, recipe_file: Path) -> Callable[..., Run]:
    """Return a function that makes a run of the minimal recipe with overrides, always with the same name."""

    def make(*overrides: str) -> Run:
        roots = Roots(lorry.data, lorry.models, lorry.runs)
        return Run("r", load_recipe(recipe_file, None, overrides), roots)

    return make


@pytest.fixture(params=[PICTURES, TEXTS], ids=["pictures", "texts"])
def few_pages(request: Any, run: Callable[..., Run], few: Path) -> Run:
    """A run on four documents of three pages, for both kinds of embedder."""
    need_model("tiny-gme")
    need_model("all-MiniLM-L6-v2")
    return run(*request.param)


def test_a_small_embedder_of_texts_computes_on_the_cpu_of_a_cards_image(
    few_pages: Run, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.keep(0)
    monkeypatch.setenv("LORRY_TARGET", "a800")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert few_pages.recipe.preprocess.retrieval is not None
    takes_pictures = few_pages.recipe.preprocess.retrieval.embedder == "tiny-gme"
    found: list[tuple[str, list[str]]] = []

    def work(stage: Stage) -> None:
        found.append(Embedder(stage)._precision_and_devices)

    code = run_stage(few_pages, "preprocess", work)
    assert (code, found) == ((Exit.DOES_NOT_FIT, []) if takes_pictures else (Exit.DONE, [("float32", ["cpu"])]))


@pytest.fixture(autouse=True)
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load each embedder once in this process; child processes still load their own."""
    monkeypatch.setattr(embed._Model, "__init__", lambda model, *what: vars(model).update(vars(load(*what))))


@functools.cache
def load(*what: Any) -> Any:
    model = object.__new__(embed._Model)
    REAL(model, *what)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of items of each piece that was embedded."""
    counted: list[int] = []
    real = embed._Model.embed

    def counting(model: Any, pieces: list[Piece]) -> Iterator[Piece]:
        for piece in real(model, pieces):
            counted.append(len(piece.items))
            yield piece

    monkeypatch.setattr(embed._Model, "embed", counting)
    yield counted


def embed_all(run: Run, part: Shard | None = None, **options: Any) -> Any:
    """Render and embed. Returns the vectors of questions and pages, and the content of every piece's file."""
    found: dict[str, Any] = {}

    def work(stage: Stage) -> None:
        documents = document_ids(sorted((run.data / "documents").iterdir()), run.data / "documents")
        mine = {name: path for n, (name, path) in enumerate(documents.items()) if stage.does_piece(n)}
        pages = render_documents(stage, mine)
        embedder = Embedder(stage, **options)
        embedder.embed_pages(pages)
        found["questions"] = embedder.embed_questions([["a question", "", "another"], ["a third"]])
        if stage.shard is None:
            found["pages"] = np.array(embedder.write_pages(pages, stage.path("vectors.npy")))
        embedder.close()
        found["pieces"] = {path.name: path.read_bytes() for path in sorted(stage.path("cache/vectors").iterdir())}

    assert run_stage(run, "preprocess", work, part=part) == Exit.DONE
    return found


def test_vectors_have_length_one_and_that_of_an_empty_text_is_zero(few_pages: Run) -> None:
    found = embed_all(few_pages)
    assert found["pages"].shape[0] == 12 and found["pages"].dtype == np.float32
    assert np.linalg.norm(found["pages"], axis=1) == pytest.approx(np.ones(12), abs=1e-3)
    assert np.linalg.norm(found["questions"], axis=1) == pytest.approx([1, 0, 1, 1], abs=1e-3)


def test_gpus_that_torch_cannot_use_are_one_line(
    run: Callable[..., Run], few: Path, embedder: Path, box: Box, capfd: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU of this machine")

    def ask(stage: Stage) -> None:
        Embedder(stage).embed_questions([["a question"]])

    code = run_stage(run(), "preprocess", ask)
    assert code == Exit.DOES_NOT_FIT
    assert "GPU 7 (NVIDIA A800-SXM4-80GB), " in "".join(capfd.readouterr())


def test_a_restart_embeds_only_what_is_missing(few_pages: Run, calls: list[int]) -> None:
    whole = embed_all(few_pages)
    assert sum(calls) == 12 + 4 and max(calls) == 2, "pieces are batches, formed inside a document"
    calls.clear()
    kept = sorted(few_pages.path("preprocess", "cache", "vectors").iterdir())
    kept[0].unlink()
    few_pages.path("preprocess", "manifest.json").unlink()
    again = embed_all(few_pages)
    assert len(calls) == 1, "a kill loses one batch at most"
    assert np.array_equal(again["pages"], whole["pages"])
    assert again["pieces"] == whole["pieces"]


def test_shards_make_the_same_bytes_as_one_run(few_pages: Run) -> None:
    parts = [embed_all(few_pages, Shard(n, 3))["pieces"] for n in range(3)]
    whole = embed_all(few_pages)["pieces"]
    assert whole == {**parts[0], **parts[1], **parts[2]}


def test_two_processes_make_the_same_bytes_as_one(
    run: Callable[..., Run], few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_model("tiny-gme")
    pictures = run(*PICTURES)
    pools: list[int] = []

    class Counted(embed.ProcessPoolExecutor):
        def __init__(self, workers: int, *arguments: Any, **options: Any) -> None:
            pools.append(workers)
            super().__init__(workers, *arguments, **options)

    monkeypatch.setattr(embed, "ProcessPoolExecutor", Counted)
    together = embed_all(pictures, devices=["cpu", "cpu"])
    assert pools == [2], "questions use the processes that have loaded the model for pages"
    pictures.path("preprocess", "manifest.json").unlink()
    for path in pictures.path("preprocess", "cache", "vectors").iterdir():
        path.unlink()
    assert embed_all(pictures, devices=["cpu"])["pieces"] == together["pieces"]


def test_an_error_in_a_process_is_shown_in_one_line(
    run: Callable[..., Run], few: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    need_model("tiny-gme")
    pictures = run(*PICTURES)

    def work(stage: Stage) -> None:
        records = [
            {"document": "d", "image": f"preprocess/pages/gone/{n}.jpg", "sha256": str(n), "width": 30, "height": 30}
            for n in range(6)
        ]
        Embedder(stage, devices=["cpu", "cpu"]).embed_pages(records)

    assert run_stage(pictures, "preprocess", work) == Exit.DATA
    assert re.search(r"gone/\d.jpg: not a readable picture .*; run preprocess again", capfd.readouterr().err)


def test_pieces_embedded_elsewhere_are_used_without_a_gpu(few_pages: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embed_all(few_pages)
    few_pages.path("preprocess", "manifest.json").unlink()
    monkeypatch.setenv("LORRY_TARGET", "a800")  # an image for GPUs, and this machine has none
    assert embed_all(few_pages)["pieces"] == whole["pieces"]


def test_a_stop_of_the_whole_group_while_embedding_is_a_stop(
    run: Callable[..., Run], few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes end, too: that is not an error."""
    need_model("tiny-gme")

    def work(stage: Stage) -> None:
        documents = document_ids(sorted((stage.run.data / "documents").iterdir()), stage.run.data / "documents")
        pages = render_documents(stage, documents)
        signal.signal(signal.SIGALRM, lambda *_: end_group(stage))
        signal.setitimer(signal.ITIMER_REAL, 1)
        Embedder(stage, devices=["cpu", "cpu"]).embed_pages(pages)

    def end_group(stage: Stage) -> None:
        for child in multiprocessing.active_children():
            child.terminate()
        os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    try:
        assert run_stage(run(*PICTURES), "preprocess", work) == Exit.INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_vectors_are_float16_on_request(run: Callable[..., Run], few: Path) -> None:
    need_model("tiny-gme")
    whole = embed_all(run(*PICTURES))["pages"]
    half = embed_all(run(*PICTURES, "preprocess.retrieval.vectors=float16"))["pages"]
    assert half.dtype == np.float16
    assert half.astype(np.float32) == pytest.approx(whole, abs=1e-3)
