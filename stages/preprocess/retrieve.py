"""Choose the pages that are shown with a question."""

import numpy as np

from stages.preprocess.embed import Vectors


def cosine(pages: Vectors, question: Vectors) -> Vectors:
    """Cosine of each page, shape (pages, dimensions), with one question, shape (dimensions,); 0 for a zero vector."""
    lengths = np.linalg.norm(pages, axis=1) * np.linalg.norm(question)
    cosines: Vectors = np.divide(pages @ question, lengths, out=np.zeros(len(pages), np.float32), where=lengths > 0)
    return cosines


def choose_pages(numbers: list[int], scores: Vectors, named: int | None, top_k: int) -> list[int]:
    """Page numbers for a question, best first: the page it names, then by score; equal scores by page number.

    `numbers` are the document's usable pages and `scores` their cosines, in the same order. A named page that is not
    among them is left to retrieval.
    """
    ranked = sorted(zip(numbers, scores, strict=True), key=lambda pair: (-float(pair[1]), pair[0]))
    ordered = [number for number, _ in ranked]
    if named in ordered:
        ordered.remove(named)
        ordered.insert(0, named)
    return ordered[:top_k]
