"""Exact search: the most similar first, for any block size, length and order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.preprocess.search import top_k

numbers = st.integers(-3, 3).map(float)
vectors = st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=12).map(
    lambda rows: np.array(rows, np.float32)
)


def cosines(rows: np.ndarray, query: np.ndarray) -> list[float]:  # type: ignore[type-arg]
    """By the definition, one by one."""
    lengths = [float(np.linalg.norm(row) * np.linalg.norm(query)) for row in rows]
    return [float(row @ query) / length if length else 0.0 for row, length in zip(rows, lengths, strict=True)]


@given(vectors, st.integers(1, 14), st.integers(1, 5))
def test_the_first_k_are_those_of_a_full_sort(rows, k, block) -> None:  # type: ignore[no-untyped-def]
    queries = rows[:3]
    scores, found = top_k(rows, queries, k, block)
    width = min(k, len(rows))
    assert scores.shape == found.shape == (len(queries), width)
    for query, own, places in zip(queries, scores, found, strict=True):
        expected = cosines(rows, query)
        assert own == pytest.approx(sorted(expected, reverse=True)[:width], abs=1e-5)
        assert len(set(places)) == width
        assert [expected[place] for place in places] == pytest.approx(list(own), abs=1e-5)


def test_lengths_do_not_matter_and_a_zero_vector_has_cosine_0() -> None:
    pages = np.array([[3, 0], [0, 5], [1, 1], [-2, 0], [0, 0]], np.float32)
    scores, rows = top_k(pages, np.array([[10, 0], [0, 0]], np.float32), 5)
    assert scores[0] == pytest.approx([1, 2**-0.5, 0, 0, -1])
    assert rows.tolist() == [[0, 2, 1, 4, 3], [0, 1, 2, 3, 4]], "ties by row"


def test_float16_in_a_mapped_file_is_searched_too(tmp_path) -> None:  # type: ignore[no-untyped-def]
    many = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", many)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    _, rows = top_k(mapped, many[:4].astype(np.float32), 1, block=7)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]


def test_nothing_to_search_in_or_for() -> None:
    assert top_k(np.zeros((0, 3), np.float32), np.ones((2, 3), np.float32), 4)[1].shape == (2, 0)
    assert top_k(np.ones((3, 3), np.float32), np.ones((0, 3), np.float32), 2)[1].shape == (0, 2)
