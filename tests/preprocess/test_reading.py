"""The text of a page as a person reads it, on made pages whose words are placed in a shuffled order."""

from collections import defaultdict

import pymupdf
import pytest

from stages.preprocess.reading import join_lines, read_page
from tests.preprocess.corpus import MadePage, Placed, corpus, runs_kept, write_pdf

LEAST = 0.9
"""Of the runs of 15 words that a reader sees, what the text keeps."""


@pytest.fixture(scope="module")
def kept() -> dict[str, float]:
    """The share of runs that is kept on each kind of page."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for number, (page, writer) in enumerate(corpus()):
        document = pymupdf.open("pdf", write_pdf(page, writer, number))
        for place, count in enumerate(runs_kept(page.streams, read_page(document[0]).text)):
            counts[page.kind][place] += count
        document.close()
    return {kind: found / total for kind, (found, total) in counts.items()}


@pytest.mark.parametrize(
    "kind",
    [
        *("columns", "plain", "rotated", "vertical", "right to left", "ligatures and hyphens"),
        *("headers and footnotes", "tables", "forms", "drawings", "chinese"),
    ],
)
def test_runs_of_words_are_kept(kept: dict[str, float], kind: str) -> None:
    assert kept[kind] >= LEAST


def test_the_corpus_is_large_enough() -> None:
    assert sum(1 for _ in corpus()) >= 150


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["one", "two", "", " three"], "one two three"),
        (["第一行", "第二行"], "第一行第二行"),
        (["部件", "12 是"], "部件 12 是"),
        (["，", "图"], "，图"),
        ([], ""),
        (["the appa-", "ratus is"], "the apparatus is"),
        (["the appa\u00ad", "ratus"], "the apparatus"),
        (["the appa\u2010", "ratus"], "the apparatus"),
        (["in 1990-", "1995"], "in 1990-1995"),
        (["a well-known T-", "Junction"], "a well-known T-Junction"),
        (["a well-known thing", "is well-", "known here"], "a well-known thing is well-known here"),
        (["a dash -", "follows"], "a dash - follows"),
        (["co\u00adop", "x"], "coop x"),
    ],
)
def test_lines_are_joined_as_their_script_asks(lines: list[str], text: str) -> None:
    assert join_lines(lines) == text


def test_ligatures_are_spelt_out() -> None:
    page = MadePage("x", placed=[Placed("\ufb01le", 60, 60), Placed("o\ufb03ce", 100, 60), Placed("\ufee7", 160, 60)])
    document = pymupdf.open("pdf", write_pdf(page, "operators"))
    read = read_page(document[0])
    assert "file" in read.text and "office" in read.text and "\u0646" in read.text
    assert not {"\ufb01", "\ufb03", "\ufee7"} & set(read.text)


def test_what_looks_like_a_ligature_only_stays() -> None:
    page = MadePage("x", placed=[Placed("x\u00b2", 60, 60), Placed("\uff11\uff12", 100, 60)])
    document = pymupdf.open("pdf", write_pdf(page, "operators"))
    assert "x\u00b2" in read_page(document[0]).text and "\uff11\uff12" in read_page(document[0]).text


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize("unit", [1, 2.5])
def test_boxes_are_on_the_ink(rotate: int, unit: float) -> None:
    document = pymupdf.open()
    made = document.new_page(width=400, height=600)
    made.insert_text((50, 100), "hello", fontsize=20)
    document.xref_set_key(made.xref, "UserUnit", str(unit))
    made.set_rotation(rotate)
    page = pymupdf.open("pdf", document.tobytes())[0]
    (word,) = read_page(page).words
    picture = page.get_pixmap(matrix=pymupdf.Matrix(2 / unit, 2 / unit))
    dark = [(x, y) for y in range(picture.height) for x in range(picture.width) if picture.pixel(x, y)[0] < 128]
    left, right = min(x for x, _ in dark) / picture.width, max(x for x, _ in dark) / picture.width
    top, bottom = min(y for _, y in dark) / picture.height, max(y for _, y in dark) / picture.height
    assert word.x0 - 0.01 < left and right < word.x1 + 0.01
    assert word.y0 - 0.01 < top and bottom < word.y1 + 0.01
    assert (word.x1 - word.x0) * (word.y1 - word.y0) < 0.01
