"""Embed pages and questions, batch by batch. Each batch is saved at once, so that a restart does not repeat it.

There are two kinds of embedders: GME-Qwen2-VL takes a page's picture, and a sentence-transformers model takes its text,
in passages that it reads whole. Each picture or passage has a vector.
"""

import contextlib
import functools
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.contract.files import FileHashes, digest_of, open_atomically
from stages.contract.stage import Stage
from stages.contract.stop import die_with_parent
from stages.engines.cuda import refuse_dead_gpus
from stages.hardware.probe import probe
from stages.hardware.targets import load_targets, working_target
from stages.models.embedder import needs_gpu, reads_pictures
from stages.models.remote_code import refuse_embedder_code
from stages.preprocess.passages import Window, sentence_window

CHUNK = 256
"""Questions per chunk; shards get whole chunks."""

Vectors = npt.NDArray[np.float32]


def split_into_chunks(texts: list[str]) -> list[list[str]]:
    """Split texts, in order, into chunks of CHUNK. The last one may be shorter."""
    return [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]


@dataclass(frozen=True)
class Settings:
    """What a process needs to load the embedder."""

    folder: Path
    takes_pictures: bool
    """Whether it embeds a page's picture; else its text."""
    max_pixels: int
    batch_size: int
    dtype: str
    """Number format of the vectors on disk: float32 or float16."""


@dataclass(frozen=True)
class Piece:
    """A batch of texts or pictures."""

    path: Path
    """The file of its vectors."""
    items: tuple[str, ...]
    are_pictures: bool


class Embedder:
    """The recipe's embedder. Its model is loaded for the first missing piece, so a restart that finds all pieces needs
    no GPU."""

    def __init__(self, stage: Stage, devices: Sequence[str] | None = None) -> None:
        """Read the embedder's settings. `devices` are torch's names; None: all GPUs, or the CPU if there is none.
        Raises UsageError if the embedder's folder holds no Hugging Face model."""
        settings = stage.run.recipe.preprocess.retrieval
        assert settings is not None  # a recipe of a task that reads documents has it
        self._stage = stage
        folder = stage.run.model(settings.embedder, "preprocess.retrieval.embedder")
        refuse_embedder_code(folder)
        takes_pictures = reads_pictures(folder)
        self._settings = Settings(folder, takes_pictures, settings.max_pixels, settings.batch_size, settings.vectors)
        self._passages: dict[str, list[str]] = {}
        self._devices = devices
        digest, _ = FileHashes(stage.path(".hashes.json")).tree_digest(folder)
        # without the precision: it depends on the GPU, and shards may run on several kinds
        self._made_from = [digest, settings.batch_size, settings.vectors]
        if takes_pictures:
            self._made_from.append(settings.max_pixels)
        self._model: _Model | None = None
        self._pool: ProcessPoolExecutor | None = None

    def passages_of(self, page: Mapping[str, Any]) -> int:
        """Number of a page's passages, and so of its vectors; 1 if the embedder takes pictures."""
        return 1 if self._settings.takes_pictures else len(self._split(str(page["text"])))

    def embed_pages(self, pages: Sequence[Mapping[str, Any]]) -> None:
        """Embed pages, which are records of `render_documents`, and save their vectors in the cache.

        A batch has passages or pictures of one document only, so that a shard makes the same bytes as a run without
        shards. Raises InterruptedRunError if the stage is asked to stop.
        """
        what = "pages" if self._settings.takes_pictures else "passages"
        self._embed([piece for _, pieces in self._pieces_by_document(pages) for piece, _ in pieces], what)

    def write_pages(self, pages: Sequence[Mapping[str, Any]], path: Path) -> Vectors:
        """Write the vectors of embedded pages into `path`, a row for each passage in the order of the pages. The pages
        of each document must be adjacent. Returns the vectors mapped from the file: float32 or float16, shape
        (passages, dimensions), each of length one or zero."""
        rows = sum(map(self.passages_of, pages))
        self._write(path, rows, (self._vectors_of(pieces) for _, pieces in self._pieces_by_document(pages)))
        found: Vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        return found

    def embed_questions(self, chunks: list[list[str]]) -> Vectors:
        """Return unit vectors of questions: float32, shape (questions, dimensions), or (0, 0) without questions. An
        empty text gets the zero vector. Counts the questions whose end the embedder does not read. Raises
        InterruptedRunError if the stage is asked to stop."""
        longer = sum(self._window.is_longer(text) for chunk in chunks for text in chunk)
        if longer:
            self._stage.counts["questions embedded without their end"] = longer
            self._stage.events.say(
                f"questions of more than {self._window.tokens} tokens: {longer};"
                " the embedder reads only their beginning"
            )
        grouped = [self._pieces([(text, text) for text in chunk], are_pictures=False) for chunk in chunks]
        self._embed([piece for pieces in grouped for piece, _ in pieces], "questions")
        if not grouped:
            return np.zeros((0, 0), np.float32)
        return np.concatenate([self._vectors_of(pieces) for pieces in grouped]).astype(np.float32)

    def close(self) -> None:
        """Free the GPUs' memory for what runs next, and end the worker processes."""
        self._model = None
        self._close_pool()
        with contextlib.suppress(ImportError):
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # -- pieces ----------------------------------------------------------------------------------------------

    def _pieces_by_document(
        self, pages: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, list[tuple[Piece, list[int]]]]]:
        """Yield each document's id and pieces, each piece with the places of its passages or pictures in the
        document."""
        own: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for page in pages:
            own[page["document"]].append(page)
        for document, members in own.items():
            if self._settings.takes_pictures:
                pictures = [(self._picture_path(page), str(page["sha256"])) for page in members]
                sizes = [-int(page["width"]) * int(page["height"]) for page in members]
                yield document, self._pieces(pictures, are_pictures=True, sizes=sizes)
            else:
                passages = [passage for page in members for passage in self._split(str(page["text"]))]
                yield document, self._pieces([(passage, passage) for passage in passages], are_pictures=False)

    @functools.cached_property
    def _window(self) -> Window:
        """What the embedder reads of a text."""
        if self._settings.takes_pictures:
            from stages.preprocess.gme import text_window

            return text_window(self._settings.folder)
        return sentence_window(self._settings.folder)

    def _split(self, text: str) -> list[str]:
        """A page's passages. They are cached, because they are needed several times."""
        if text not in self._passages:
            self._passages[text] = self._window.passages(text)
        return self._passages[text]

    def _picture_path(self, page: Mapping[str, Any]) -> str:
        """A page's picture in the folder of this stage or shard. The record has the path that the picture has after
        merging."""
        return str(self._stage.path(str(Path(page["image"]).relative_to(self._stage.name))))

    def _pieces(
        self, items: list[tuple[str, str]], are_pictures: bool, sizes: list[int] | None = None
    ) -> list[tuple[Piece, list[int]]]:
        """Batches of items of similar size, each with the places of its items. An item is the text or path to embed,
        and the text or digest that identifies it. `sizes` has each item's size, negative so that the largest come
        first; None: the lengths of the texts."""
        sizes = sizes or [-len(item) for item, _ in items]
        order = sorted(range(len(items)), key=lambda place: (sizes[place], place))
        found = []
        for start in range(0, len(order), self._settings.batch_size):
            places = order[start : start + self._settings.batch_size]
            key = digest_of([*self._made_from, [items[place][1] for place in places]])
            path = self._stage.cache_file("vectors", f"{key}.npy")
            found.append((Piece(path, tuple(items[place][0] for place in places), are_pictures), places))
        return found

    def _vectors_of(self, pieces: list[tuple[Piece, list[int]]]) -> Vectors:
        """The vectors of a document's or chunk's items, in the items' order."""
        parts = [np.load(piece.path, allow_pickle=False) for piece, _ in pieces]
        found: Vectors = np.empty((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype)
        for part, (_, places) in zip(parts, pieces, strict=True):
            found[places] = part
        return found

    def _write(self, path: Path, rows: int, documents: Iterator[Vectors]) -> None:
        """Write a .npy file with `rows` rows, document by document, so that memory never holds all vectors of a large
        job. `documents` yields the vectors of each document."""
        with open_atomically(path, "wb") as file:
            first = next(documents, np.zeros((0, 0), self._settings.dtype))
            header = {"descr": first.dtype.str, "fortran_order": False, "shape": (rows, first.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(first.tobytes())
            for vectors in documents:
                file.write(vectors.tobytes())

    # -- embedding -------------------------------------------------------------------------------------------

    def _embed(self, pieces: list[Piece], what: str) -> None:
        """Embed the pieces whose vectors are not cached, on all devices, and report progress in `what`. Raises
        InterruptedRunError if the stage is asked to stop."""
        missing = [piece for piece in pieces if not piece.path.is_file()]
        total = sum(len(piece.items) for piece in pieces)
        done = total - sum(len(piece.items) for piece in missing)
        if not missing:
            return
        dtype, devices = self._precision_and_devices
        embedded = (
            self._embed_here(missing, dtype, devices[0])
            if min(len(devices), len(missing)) == 1
            else self._embed_in_processes(missing, dtype, devices)
        )
        for piece in embedded:
            done += len(piece.items)
            self._stage.events.report_progress(f"embed {what}", done, total, what)
            self._stage.stop.check()

    @functools.cached_property
    def _precision_and_devices(self) -> tuple[str, list[str]]:
        """The number format and the devices to embed with. Lorry probes for GPUs only if a piece is missing. Records
        the format as a decision if the embedder takes pictures.

        A small embedder of texts computes on the CPU where no GPU is visible, in an image for a card too. Raises the
        errors of `working_target` for any other.
        """
        machine, targets = probe(), load_targets()
        on_cpu = not (machine.gpus or machine.problem or needs_gpu(self._settings.folder))
        target = targets["cpu"] if on_cpu else working_target(machine, targets)
        if not self._devices:
            refuse_dead_gpus()
        if self._settings.takes_pictures:
            self._stage.decide("embedding in", target.dtype, f"target {target.name}")
        return target.dtype, list(self._devices or [f"cuda:{n}" for n in range(len(machine.gpus))] or ["cpu"])

    def _embed_here(self, pieces: list[Piece], dtype: str, device: str) -> Iterator[Piece]:
        """Embed pieces in this process, and yield each when its vectors are written. Loads the model at the first
        call."""
        if self._model is None:
            self._model = _Model(self._settings, dtype, device)
        yield from self._model.embed(pieces)

    def _embed_in_processes(self, pieces: list[Piece], dtype: str, devices: list[str]) -> Iterator[Piece]:
        """Embed in one process per device, and yield each piece when its vectors are written. The processes write
        files, so that nothing large goes through a queue.

        The processes stay until `close`, so that questions do not load the model again after pages. An error, or a
        caller that stops early, ends them.
        """
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            free = context.SimpleQueue()
            for device in devices:
                free.put(device)
            arguments = (self._settings, dtype, free, os.getpid())
            self._pool = ProcessPoolExecutor(len(devices), context, initializer=_start_worker, initargs=arguments)
        futures = [self._pool.submit(_embed_piece, piece) for piece in pieces]
        finished = 0
        try:
            for future in as_completed(futures):
                yield future.result()
                finished += 1
        except BrokenProcessPool:
            self._stage.stop.check()  # a stop of the whole process group ends the workers, too
            raise
        finally:
            if finished < len(futures):  # an error, or the caller has stopped
                self._close_pool()

    def _close_pool(self) -> None:
        """End the worker processes, after the pieces that they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class _Model:
    """The embedder's network on one device."""

    def __init__(self, settings: Settings, dtype: str, device: str) -> None:
        """Load the embedder without network. `dtype` and `device` are torch's names."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        self._settings = settings
        self._network: Any
        if settings.takes_pictures:
            from stages.preprocess.gme import Gme

            self._network = Gme(settings.folder, device, dtype, settings.max_pixels)
        else:
            from sentence_transformers import SentenceTransformer

            self._network = SentenceTransformer(str(settings.folder), local_files_only=True, device=device)
            self._network.tokenizer.split_special_tokens = True  # a page that says [SEP] is one text

    def embed(self, pieces: list[Piece]) -> Iterator[Piece]:
        """Embed pieces in turn. Writes the vectors of each before yielding it."""
        of_pictures = (
            self._network.embed_pictures([[Path(item) for item in p.items] for p in pieces if p.are_pictures])
            if self._settings.takes_pictures
            else iter(())
        )
        for piece in pieces:
            vectors = next(of_pictures) if piece.are_pictures else self._embed_texts(piece.items)
            with open_atomically(piece.path, "wb") as file:
                np.save(file, vectors.astype(self._settings.dtype), allow_pickle=False)
            yield piece

    def _embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Return the unit vectors of texts: float32, shape (texts, dimensions). An empty or blank text gets the zero
        vector."""
        if self._settings.takes_pictures:
            vectors = self._network.embed_texts(texts)
        else:
            vectors = self._network.encode(
                list(texts), batch_size=self._settings.batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        vectors = np.asarray(vectors, dtype=np.float32)
        vectors[[not text.strip() for text in texts]] = 0
        return vectors


_load_model: Callable[[], _Model]
"""Returns the worker process's model, which it loads at the first call."""


def _start_worker(settings: Settings, dtype: str, free: Any, parent: int) -> None:
    """Prepare a worker process, which takes one of the devices in the queue `free` and dies with its parent."""
    global _load_model  # noqa: PLW0603 - a worker process has one model
    die_with_parent(parent)
    device = free.get()
    _load_model = functools.cache(lambda: _Model(settings, dtype, device))  # not here: an initializer's error is lost


def _embed_piece(piece: Piece) -> Piece:
    """Embed a piece in a worker process. Returns it when its vectors are written."""
    return next(_load_model().embed([piece]))
