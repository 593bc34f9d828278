"""The text of a page as a person reads it, on made pages whose words are placed in a shuffled order."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import pymupdf
import pytest

from stages.preprocess.reading import PageText, join_lines, read_page
from tests.preprocess.corpus import (
    MadePage,
    Placed,
    Writer,
    columns,
    corpus,
    plain,
    runs_kept,
    write_pdf,
)
from tests.preprocess.layouts import LAYOUTS, layouts

LEAST = 0.9
"""Of the runs of 15 words that a reader sees, what the text keeps."""

KINDS = [
    *("columns", "plain", "rotated", "vertical", "right to left", "ligatures and hyphens", "headers and footnotes"),
    *("tables", "forms", "drawings", "chinese", "hairlines", "nearly blank", "scans"),
]


def shares(pages: Iterable[tuple[MadePage, Writer]]) -> dict[str, float]:
    """The share of runs that is kept, by kind of page."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for number, (page, writer) in enumerate(pages):
        document = pymupdf.open("pdf", write_pdf(page, writer, number))
        for place, count in enumerate(runs_kept(page.streams, read_page(document[0]).text)):
            counts[page.kind][place] += count
        document.close()
    return {kind: found / total for kind, (found, total) in counts.items()}


@pytest.fixture(scope="module")
def kept() -> dict[str, float]:
    return shares(corpus())


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_words_are_kept(kept: dict[str, float], kind: str) -> None:
    assert kept[kind] >= LEAST


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make(0).kind)
def test_runs_of_words_are_kept_in_every_layout(make: Callable[[int], MadePage]) -> None:
    (share,) = shares((page, "operators") for page in layouts(makers=[make])).values()
    assert share >= LEAST


def test_the_corpus_is_large_enough(kept: dict[str, float]) -> None:
    assert sum(1 for _ in corpus()) >= 150
    assert set(kept) == set(KINDS)


def read(page: MadePage, content: bytes = b"") -> PageText:
    """A made page's text, with further operators on the page."""
    document = pymupdf.open("pdf", write_pdf(page, "operators"))
    if content:
        xref = document.get_new_xref()
        document.update_object(xref, "<<>>")
        document.update_stream(xref, content)
        stored = " ".join(f"{one} 0 R" for one in [xref, *document[0].get_contents()])
        document.xref_set_key(document[0].xref, "Contents", f"[{stored}]")
        document = pymupdf.open("pdf", document.tobytes())
    return read_page(document[0])


def test_words_come_in_reading_order() -> None:
    page = columns(1)
    found = read(page)
    text = " ".join(word.text for word in found.words)
    assert runs_kept(page.streams, text)[0] / runs_kept(page.streams, text)[1] > LEAST


def test_a_mark_across_the_page_breaks_no_column() -> None:
    page, angle = columns(2), math.radians(40)
    a, b = math.cos(angle), math.sin(angle)
    mark = f"BT /H 90 Tf {a:.4f} {b:.4f} {-b:.4f} {a:.4f} 120 200 Tm (CONFIDENTIAL) Tj ET"
    found = read(page, mark.encode())
    assert "CONFIDENTIAL" in found.text
    assert runs_kept(page.streams, found.text) == runs_kept(page.streams, read(page).text)


@pytest.mark.parametrize("turn", [1, 3])
def test_text_at_the_side_breaks_no_column(turn: int) -> None:
    page = columns(3)
    page.placed.append(Placed("arXiv:2403.01234v1", 30 if turn == 3 else 20, 500 if turn == 3 else 300, 14, turn))
    found = read(page)
    assert "arXiv:2403.01234v1" in found.text
    kept, total = runs_kept(page.streams, found.text)
    assert kept / total > LEAST


def test_korean_keeps_its_spaces() -> None:
    words = ["한국어", "문장에는", "띄어쓰기가", "있습니다"]
    page = MadePage("x", placed=[Placed(word, 60 + 70 * n, 60) for n, word in enumerate(words[:3])])
    page.placed.append(Placed(words[3], 60, 75))
    assert read(page).text == " ".join(words)


def test_numbers_in_hebrew_are_read_from_right_to_left_and_other_words_are_not() -> None:
    document = pymupdf.open()
    sentence = "שלום עולם 12 34 עולם like this word שוב ושוב, 3.5 פעמים"
    document.new_page(width=500, height=200).insert_htmlbox((20, 20, 480, 180), f'<div dir="rtl">{sentence}</div>')
    assert read_page(pymupdf.open("pdf", document.tobytes())[0]).text == sentence


def test_a_hebrew_sentence_in_an_english_page_is_in_its_own_order() -> None:
    document = pymupdf.open()
    text = "The English part of this page is the longer one. שלום עולם 12 34 עולם and more English words 56 at its end."
    document.new_page(width=300, height=200).insert_htmlbox((20, 20, 280, 180), f"<p>{text}</p>")
    assert read_page(pymupdf.open("pdf", document.tobytes())[0]).text == text


def test_numbers_of_lines_come_last_and_numbers_of_a_table_stay() -> None:
    rows = [Placed(f"{word} text", 90, 60 + 12 * n) for n, word in enumerate(("one", "two", "three", "four", "five"))]
    page = MadePage("x", placed=[*rows, *(Placed(str(n + 1), 60, 60 + 12 * n) for n in range(5))])
    assert read(page).text == "1 one text 2 two text 3 three text 4 four text 5 five text"
    text = plain(4)
    ends = sorted({one.y for one in text.placed})
    numbers = [Placed(str(n + 1), 30, y, 8) for n, y in enumerate(ends) if (n + 1) % 5 == 0]
    found = read(MadePage("x", placed=[*text.placed, *numbers])).text
    assert found.endswith(" ".join(one.text for one in numbers))


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
    text = read(page).text
    assert "file" in text and "office" in text and "\u0646" in text
    assert not {"\ufb01", "\ufb03", "\ufee7"} & set(text)


def test_what_looks_like_a_ligature_only_stays() -> None:
    page = MadePage("x", placed=[Placed("x\u00b2", 60, 60), Placed("\uff11\uff12", 100, 60)])
    assert "x\u00b2" in read(page).text and "\uff11\uff12" in read(page).text


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
    picture = page.get_pixmap(matrix=pymupdf.Matrix(2 / unit, 2 / unit), colorspace=pymupdf.csGRAY)
    grey = np.frombuffer(picture.samples, np.uint8).reshape(picture.height, picture.stride)[:, : picture.width]
    rows, columns = np.nonzero(grey < 128)
    left, right = columns.min() / picture.width, columns.max() / picture.width
    top, bottom = rows.min() / picture.height, rows.max() / picture.height
    assert word.x0 - 0.01 < left and right < word.x1 + 0.01
    assert word.y0 - 0.01 < top and bottom < word.y1 + 0.01
    assert (word.x1 - word.x0) * (word.y1 - word.y0) < 0.01
