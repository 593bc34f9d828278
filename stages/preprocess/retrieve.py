"""Choose the pages that are shown with a question."""

import numpy as np

from stages.preprocess.embed import Vectors


def cosine(pages: Vectors | None, question: Vectors) -> Vectors:
    """Cosine of each page, shape (pages, dimensions), with one question, shape (dimensions,); 0 for a zero vector."""
    if pages is None:
        return np.zeros(0, np.float32)
    pages, question = np.asarray(pages, np.float32), np.asarray(question, np.float32)
    lengths = np.linalg.norm(pages, axis=1) * np.linalg.norm(question)
    cosines: Vectors = np.divide(pages @ question, lengths, out=np.zeros(len(pages), np.float32), where=lengths > 0)
    return cosines


def ranking(numbers: list[int], scores: Vectors) -> list[int]:
    """Page numbers by score, best first; equal scores by page number."""
    ranked = sorted(zip(numbers, scores, strict=True), key=lambda pair: (-float(pair[1]), pair[0]))
    return [number for number, _ in ranked]
