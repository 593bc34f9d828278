"""The vectors most like others, found exactly: a matrix product, block by block.

An exact index of faiss takes about as long on the same machine (benchmarks/many_pages.py), so it is not asked in.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 16_384
"""Rows multiplied at once: 235 MB of 3,584 dimensions in float32."""

Found = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def top_k(vectors: npt.NDArray[Any], queries: npt.NDArray[Any], k: int, block: int = BLOCK) -> Found:
    """The `k` rows (all, where there are fewer) with the largest cosine to each query: cosines and rows, both of shape
    (queries, k), best first, equal ones by row. A zero vector is like nothing: 0.

    `vectors` is (rows, dimensions), in memory or mapped from a file, float16 or float32; `queries` is (queries,
    dimensions).
    """
    asked = _unit(queries)
    best: list[Found] = [(np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in asked]
    for start in range(0, len(vectors), block):
        cosines = asked @ _unit(vectors[start : start + block]).T
        count = cosines.shape[1]
        # the k-th best of the block: what is below it is not among the k, and what equals it goes by row
        floor = np.partition(cosines, count - k, axis=1)[:, count - k] if count > k else np.full(len(asked), -np.inf)
        for query, row in enumerate(cosines):
            near = np.flatnonzero(row >= floor[query])
            best[query] = _first(np.append(best[query][0], row[near]), np.append(best[query][1], near + start), k)
    width = min(k, len(vectors))
    shape = (len(asked), width)
    return (
        np.array([scores for scores, _ in best], np.float32).reshape(shape),
        np.array([rows for _, rows in best], np.int64).reshape(shape),
    )


def _first(scores: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], k: int) -> Found:
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


def _unit(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    whole = np.asarray(vectors, np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", whole, whole))[:, None]
    found: npt.NDArray[np.float32] = np.divide(whole, lengths, out=np.zeros_like(whole), where=lengths > 0)
    return found
