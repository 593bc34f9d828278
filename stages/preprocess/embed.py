"""Embed texts with a sentence-transformers model, chunk by chunk; finished chunks are kept across restarts."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.contract.files import FileHashes, digest_of, written_atomically
from stages.contract.stage import Stage

CHUNK = 256
"""Texts between two saves: what a kill can cost."""

Vectors = npt.NDArray[np.float32]


def chunked(texts: list[str]) -> list[list[str]]:
    """Texts in order, as many at once as are computed and kept together."""
    return [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]


class Embedder:
    """The recipe's embedder. It is loaded when the first chunk needs it: a restart with all chunks kept does not."""

    def __init__(self, stage: Stage) -> None:
        settings = stage.run.recipe.preprocess.retrieval
        self._stage = stage
        self._folder = stage.run.model(settings.embedder, "preprocess.retrieval.embedder")
        self._batch_size = settings.batch_size
        digest, _ = FileHashes(stage.path(".hashes.json")).tree(self._folder)
        self._made_from = [digest, settings.batch_size]
        self._model: Any = None

    def embed(self, groups: list[list[str]], what: str) -> Vectors:
        """Unit vectors of texts: float32, shape (texts, dimensions). An empty text gets the zero vector.

        Texts of one group (a document's pages) are computed together, and never with another group's: a shard of the
        documents then gets the very bytes of the whole.
        """
        chunks = [chunk for texts in groups for chunk in chunked(texts)]
        parts: list[Vectors] = [np.zeros((0, 0), np.float32)] if not chunks else []
        done, total = 0, sum(map(len, chunks))
        for chunk in chunks:
            path = self._stage.cache_file("vectors", f"{digest_of([*self._made_from, chunk])}.npy")
            if not path.is_file():
                with written_atomically(path, "wb") as file:
                    np.save(file, self._encode(chunk), allow_pickle=False)
            parts.append(np.load(path, allow_pickle=False))
            done += len(chunk)
            self._stage.events.progress(f"embed {what}", done, total, what)
            self._stage.stop.check()
        return np.concatenate(parts)

    def _encode(self, texts: list[str]) -> Vectors:
        if self._model is None:
            os.environ["HF_HUB_OFFLINE"] = "1"
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(str(self._folder), local_files_only=True)
        vectors = self._model.encode(
            texts, batch_size=self._batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        vectors = np.asarray(vectors, dtype=np.float32)
        vectors[[not text.strip() for text in texts]] = 0
        return vectors
