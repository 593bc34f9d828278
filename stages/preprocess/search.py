"""Exact search for the most similar vectors, by matrix products, block by block.

faiss's exact index is about as fast on the same machine (benchmarks/many_pages.py), so Lorry does not depend on it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 16_384
"""Number of rows multiplied at once: 235 MB with 3,584 dimensions in float32."""

Matches = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Cosines, and the numbers of the rows that have them."""


def top_k(vectors: npt.NDArray[Any], queries: npt.NDArray[Any], k: int, block: int = BLOCK) -> Matches:
    """Return the cosines and the numbers of the `k` rows most similar to each query.

    Both have shape (queries, k), or (queries, rows) if there are fewer than `k` rows, with the largest cosine first;
    equal cosines are ordered by row. The cosine with a zero vector is 0. `vectors`: (rows, dimensions), float16 or
    float32, in memory or mapped from a file. `queries`: (queries, dimensions).
    """
    units = _unit_vectors(queries)
    best: list[Matches] = [(np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in units]
    for start in range(0, len(vectors), block):
        cosines = units @ _unit_vectors(vectors[start : start + block]).T
        count = cosines.shape[1]
        # the k-th largest cosine of the block: no row below it can be among the best k
        floor = np.partition(cosines, count - k, axis=1)[:, count - k] if count > k else np.full(len(units), -np.inf)
        for query, row in enumerate(cosines):
            near = np.flatnonzero(row >= floor[query])
            best[query] = _best_k(np.append(best[query][0], row[near]), np.append(best[query][1], near + start), k)
    width = min(k, len(vectors))
    shape = (len(units), width)
    return (
        np.array([scores for scores, _ in best], np.float32).reshape(shape),
        np.array([rows for _, rows in best], np.int64).reshape(shape),
    )


def _best_k(scores: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], k: int) -> Matches:
    """Return the k largest cosines and their rows. Both inputs have shape (rows,)."""
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


def _unit_vectors(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the vectors (rows, dimensions) scaled to length one, in float32. Zero vectors stay zero."""
    whole = np.asarray(vectors, np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", whole, whole))[:, None]
    found: npt.NDArray[np.float32] = np.divide(whole, lengths, out=np.zeros_like(whole), where=lengths > 0)
    return found
