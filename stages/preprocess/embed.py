"""Embed pages and questions, batch by batch; each batch is kept at once, and found again after a restart.

Two kinds of models do it: GME-Qwen2-VL sees a page's picture, a sentence-transformers model reads its text.
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

from stages.contract.files import FileHashes, digest_of, read_json, written_atomically
from stages.contract.stage import Stage
from stages.contract.stop import die_with_parent
from stages.hardware.probe import probe
from stages.hardware.targets import load_targets, working_target

CHUNK = 256
"""Questions that are shared out between shards together."""

Vectors = npt.NDArray[np.float32]


def chunked(texts: list[str]) -> list[list[str]]:
    """Texts in order, as many at once as a shard gets together."""
    return [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]


@dataclass(frozen=True)
class Kind:
    """What a process needs to load the embedder."""

    folder: Path
    sees: bool
    """Whether it is asked pictures; else texts."""
    max_pixels: int
    batch_size: int
    kept: str
    """How vectors are kept: float32 or float16."""


@dataclass(frozen=True)
class Piece:
    """Texts or pictures that are embedded and kept together."""

    path: Path
    """Where their vectors are kept."""
    items: tuple[str, ...]
    pictures: bool


class Embedder:
    """The recipe's embedder. It is loaded when the first piece needs it: a restart with all pieces kept does not, nor
    does it need a card."""

    def __init__(self, stage: Stage, devices: Sequence[str] | None = None) -> None:
        settings = stage.run.recipe.preprocess.retrieval
        assert settings is not None  # a recipe of a task that reads documents has it
        self._stage = stage
        folder = stage.run.model(settings.embedder, "preprocess.retrieval.embedder")
        sees = (read_json(folder / "config.json") or {}).get("model_type") == "qwen2_vl"
        self._kind = Kind(folder, sees, settings.max_pixels, settings.batch_size, settings.vectors)
        self._asked = devices
        digest, _ = FileHashes(stage.path(".hashes.json")).tree(folder)
        # not the precision, which is the card's: shards of several kinds of cards are merged without any
        self._made_from = [digest, settings.batch_size, settings.vectors]
        if sees:
            self._made_from.append(settings.max_pixels)
        self._model: _Model | None = None

    def pages(self, pages: Sequence[Mapping[str, Any]]) -> None:
        """Embed pages, records of `render_documents`, those of a document one after the other.

        Batches are formed inside a document, of pages of like size: a shard of the documents gets the very bytes of
        the whole.
        """
        self._embed([piece for _, pieces in self._of_documents(pages) for piece, _ in pieces], "pages")

    def write_pages(self, pages: Sequence[Mapping[str, Any]], path: Path) -> Vectors:
        """Write the vectors of pages that are embedded, row i for page i. Returns the file's rows, which are not read
        into memory: float32 or float16, shape (pages, dimensions), of length one or zero."""
        self._write(path, len(pages), (self._document_vectors(pieces) for _, pieces in self._of_documents(pages)))
        found: Vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        return found

    def questions(self, chunks: list[list[str]]) -> Vectors:
        """Unit vectors of questions: float32, shape (questions, dimensions). An empty text gets the zero vector."""
        grouped = [self._pieces([(text, text) for text in chunk], pictures=False) for chunk in chunks]
        self._embed([piece for pieces in grouped for piece, _ in pieces], "questions")
        if not grouped:
            return np.zeros((0, 0), np.float32)
        return np.concatenate([self._document_vectors(pieces) for pieces in grouped]).astype(np.float32)

    def close(self) -> None:
        """Give the memory back: what comes next may need the card."""
        self._model = None
        with contextlib.suppress(ImportError):
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # -- pieces ----------------------------------------------------------------------------------------------

    def _of_documents(self, pages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[Piece, list[int]]]]]:
        """Each document's pieces, with the places of their pages in the document."""
        own: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for page in pages:
            own[page["document"]].append(page)
        for document, members in own.items():
            if self._kind.sees:
                pictures = [(self._picture(page), str(page["sha256"])) for page in members]
                sizes = [-int(page["width"]) * int(page["height"]) for page in members]
                yield document, self._pieces(pictures, pictures=True, sizes=sizes)
            else:
                yield document, self._pieces([(str(page["text"]),) * 2 for page in members], pictures=False)

    def _picture(self, page: Mapping[str, Any]) -> str:
        """Its record names the place that it has in the end, also while a shard holds it."""
        return str(self._stage.path(str(Path(page["image"]).relative_to(self._stage.name))))

    def _pieces(
        self, items: list[tuple[str, str]], pictures: bool, sizes: list[int] | None = None
    ) -> list[tuple[Piece, list[int]]]:
        """Batches of like size, with the places of their items, each of which is what is embedded and its name."""
        sizes = sizes or [-len(item) for item, _ in items]
        order = sorted(range(len(items)), key=lambda place: (sizes[place], place))
        found = []
        for start in range(0, len(order), self._kind.batch_size):
            places = order[start : start + self._kind.batch_size]
            key = digest_of([*self._made_from, [items[place][1] for place in places]])
            path = self._stage.cache_file("vectors", f"{key}.npy")
            found.append((Piece(path, tuple(items[place][0] for place in places), pictures), places))
        return found

    def _document_vectors(self, pieces: list[tuple[Piece, list[int]]]) -> Vectors:
        """The vectors of a document's items, or a chunk's, in their order."""
        parts = [np.load(piece.path, allow_pickle=False) for piece, _ in pieces]
        found: Vectors = np.empty((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype)
        for part, (_, places) in zip(parts, pieces, strict=True):
            found[places] = part
        return found

    def _write(self, path: Path, rows: int, documents: Iterator[Vectors]) -> None:
        """Write a .npy file document by document: all vectors of a large job are never in memory at once."""
        with written_atomically(path, "wb") as file:
            first = next(documents, np.zeros((0, 0), self._kind.kept))
            header = {"descr": first.dtype.str, "fortran_order": False, "shape": (rows, first.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(first.tobytes())
            for vectors in documents:
                file.write(vectors.tobytes())

    # -- embedding -------------------------------------------------------------------------------------------

    def _embed(self, pieces: list[Piece], what: str) -> None:
        missing = [piece for piece in pieces if not piece.path.is_file()]
        total = sum(len(piece.items) for piece in pieces)
        done = total - sum(len(piece.items) for piece in missing)
        if not missing:
            return
        dtype, devices = self._place
        embedded = (
            self._here(missing, dtype, devices[0])
            if min(len(devices), len(missing)) == 1
            else self._in_processes(missing, dtype, devices[: len(missing)])
        )
        for piece in embedded:
            done += len(piece.items)
            self._stage.events.progress(f"embed {what}", done, total, what)
            self._stage.stop.check()

    @functools.cached_property
    def _place(self) -> tuple[str, list[str]]:
        """Precision and devices: the card is looked for once something is to be embedded."""
        machine = probe()
        target = working_target(machine, load_targets())
        if self._kind.sees:
            self._stage.decide("embedding in", target.dtype, f"target {target.name}")
        return target.dtype, list(self._asked or [f"cuda:{n}" for n in range(len(machine.gpus))] or ["cpu"])

    def _here(self, pieces: list[Piece], dtype: str, device: str) -> Iterator[Piece]:
        if self._model is None:
            self._model = _Model(self._kind, dtype, device)
        yield from self._model.keep(pieces)

    def _in_processes(self, pieces: list[Piece], dtype: str, devices: list[str]) -> Iterator[Piece]:
        """A process for each card; what they make are files, so that nothing large goes through a queue."""
        context = multiprocessing.get_context("spawn")
        free = context.SimpleQueue()
        for device in devices:
            free.put(device)
        arguments = (self._kind, dtype, free, os.getpid())
        with ProcessPoolExecutor(len(devices), context, initializer=_begin, initargs=arguments) as pool:
            futures = [pool.submit(_keep, piece) for piece in pieces]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool:
                self._stage.stop.check()  # a stop sent to the whole process group ends the processes too
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


class _Model:
    """The embedder's network on one device."""

    def __init__(self, kind: Kind, dtype: str, device: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        self._kind = kind
        self._network: Any
        if kind.sees:
            from stages.preprocess.gme import Gme

            self._network = Gme(kind.folder, device, dtype, kind.max_pixels)
        else:
            from sentence_transformers import SentenceTransformer

            self._network = SentenceTransformer(str(kind.folder), local_files_only=True, device=device)

    def keep(self, pieces: list[Piece]) -> Iterator[Piece]:
        """Embed pieces in turn, and keep the vectors of each before it is yielded."""
        seen = (
            self._network.pictures([[Path(item) for item in p.items] for p in pieces if p.pictures])
            if (self._kind.sees)
            else iter(())
        )
        for piece in pieces:
            vectors = next(seen) if piece.pictures else self._read(piece.items)
            with written_atomically(piece.path, "wb") as file:
                np.save(file, vectors.astype(self._kind.kept), allow_pickle=False)
            yield piece

    def _read(self, texts: Sequence[str]) -> Vectors:
        if self._kind.sees:
            vectors = self._network.texts(texts)
        else:
            vectors = self._network.encode(
                list(texts), batch_size=self._kind.batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        vectors = np.asarray(vectors, dtype=np.float32)
        vectors[[not text.strip() for text in texts]] = 0
        return vectors


_own: Callable[[], _Model]
"""Of a worker process."""


def _begin(kind: Kind, dtype: str, free: Any, parent: int) -> None:
    global _own  # noqa: PLW0603 - a worker process has one model
    die_with_parent(parent)
    device = free.get()
    _own = functools.cache(lambda: _Model(kind, dtype, device))  # loaded by the first piece, which tells what is wrong


def _keep(piece: Piece) -> Piece:
    return next(_own().keep([piece]))
