"""Typeset the invented patents of the demo and write the questions about them.

Every file ``sources/NAME.toml`` describes one document: its pages (text, parts list, line
drawing) and its eight questions. This script draws ``patent-qa/documents/NAME.pdf`` from it and gathers
the questions in ``patent-qa/questions.jsonl``. Two runs write the same bytes.

A drawing is a block of lines ``SHAPE PART ARGUMENTS...`` on a canvas of 400 x 340 units, y downwards:

    rect 10 x0,y0 x1,y1          ellipse 10 x0,y0 x1,y1       circle 10 x,y RADIUS
    bar 10 x0,y0 x1,y1 WIDTH     spring 10 x0,y0 x1,y1 WIDTH
    poly 10 x,y x,y x,y ...      line 10 x,y x,y ...          curve 10 p0 p1 p2 p3 (one Bezier arc)

``-`` as PART draws a shape without a label. Options at the end of a line: ``f.8`` fill with that grey,
``w2`` line width, ``dash`` broken line, ``@x,y`` where the leader line of the part ends (the centre of its
first shape if absent).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pymupdf

HERE = Path(__file__).resolve().parent / "patent-qa"
SEED = 7
PAGE_WIDTH, PAGE_HEIGHT, MARGIN = 595, 842, 76
CANVAS = pymupdf.Rect(0, 0, 400, 340)
KINDS = ("name", "position", "function")
CHINESE_DIGITS = "零一二三四五六七八九"

CITE_TEXT = (
    "On page {p}, {q}",
    "According to page {p}, {q}",
    "{Q} on page {p}?",
    "As stated on page {p}, {q}",
)
CITE_FIGURE = (
    "In the figure on page {p}, {q}",
    "On page {p}, {q}",
    "{Q} in the drawing on page {p}?",
    "Looking at the drawing on page {p}, {q}",
)
CITE_TEXT_ZH = ("第{p}页中，{q}", "根据第{p}页，{q}", "在文件的第{p}页，{q}")
CITE_FIGURE_ZH = ("在文件中第{p}页的图中，{q}", "在第{p}页的图中，{q}", "根据第{p}页的附图，{q}")

Question = dict[str, Any]


@dataclass
class Style:
    """The look of one document: its fonts, and how it writes headings, part lists and label numbers."""

    body: str = "tiro"
    bold: str = "tibo"
    size: float = 13
    chinese: bool = False
    labels: str = "sides"
    ring: bool = False
    frame: bool = False
    caption_above: bool = False


@dataclass
class Drawing:
    """Shapes drawn so far on one page, in canvas units, and the leader line ends of the numbered parts."""

    page: pymupdf.Page
    origin: pymupdf.Point
    anchors: dict[str, pymupdf.Point] = field(default_factory=dict)

    def place(self, point: pymupdf.Point) -> pymupdf.Point:
        """Page position of a canvas point."""
        return self.origin + point

    def add(self, line: str) -> None:
        """Draw one line of the drawing language."""
        shape_name, part, *words = line.split()
        points: list[pymupdf.Point] = []
        number, grey, width, dashes, anchor = 0.0, None, 1.1, None, None
        for word in words:
            if word.startswith("@"):
                anchor = parse_point(word[1:])
            elif word.startswith("f"):
                grey = float(word[1:])
            elif word.startswith("w"):
                width = float(word[1:])
            elif word == "dash":
                dashes = "[4 3] 0"
            elif "," in word:
                points.append(parse_point(word))
            else:
                number = float(word)
        shape = self.page.new_shape()
        centre = self.outline(shape, shape_name, points, number)
        fill = None if grey is None else (grey, grey, grey)
        shape.finish(color=(0, 0, 0), fill=fill, width=width, dashes=dashes, closePath=shape_name == "poly")
        shape.commit()
        if part != "-" and part not in self.anchors:
            self.anchors[part] = anchor or centre

    def outline(self, shape: pymupdf.Shape, name: str, points: list[pymupdf.Point], number: float) -> pymupdf.Point:
        """Add the path of a shape; return its centre on the canvas."""
        placed = [self.place(point) for point in points]
        centre = sum(points, pymupdf.Point()) / len(points)
        if name == "rect":
            shape.draw_rect(pymupdf.Rect(placed[0], placed[1]))
        elif name == "ellipse":
            shape.draw_oval(pymupdf.Rect(placed[0], placed[1]))
        elif name == "circle":
            shape.draw_circle(placed[0], number)
        elif name == "bar":
            across = sideways(placed[0], placed[1]) * (number / 2)
            shape.draw_quad(
                pymupdf.Quad(placed[0] + across, placed[1] + across, placed[0] - across, placed[1] - across)
            )
        elif name == "spring":
            shape.draw_polyline(spring_points(placed[0], placed[1], number))
        elif name in ("poly", "line"):
            shape.draw_polyline(placed)
        elif name == "curve":
            shape.draw_bezier(*placed)
        else:
            raise ValueError(f"unknown shape {name!r}")
        return centre

    def label(self, style: Style) -> None:
        """Write the part numbers around the drawing, each with a leader line to its part."""
        spots = label_spots(self.anchors, style.labels)
        for part, spot in spots.items():
            start, end = self.place(spot), self.place(self.anchors[part])
            away = (end - start).unit
            self.page.draw_line(start + away * 13, end, color=(0, 0, 0), width=0.6)
            self.page.draw_circle(end, 1.7, color=(0, 0, 0), fill=(0, 0, 0), width=0.3)
            if style.ring:
                self.page.draw_circle(start, 12, color=(0, 0, 0), width=0.6)
            wide = text_width(part, style.bold, 12)
            put(self.page, (start.x - wide / 2, start.y + 4.2), part, style.bold, 12)


def parse_point(text: str) -> pymupdf.Point:
    """Read ``x,y``."""
    x, y = text.split(",")
    return pymupdf.Point(float(x), float(y))


def sideways(start: pymupdf.Point, end: pymupdf.Point) -> pymupdf.Point:
    """Unit vector at right angles to the line between two points."""
    unit = (end - start).unit
    return pymupdf.Point(-unit.y, unit.x)


def spring_points(start: pymupdf.Point, end: pymupdf.Point, width: float) -> list[pymupdf.Point]:
    """Zigzag of a coil spring between two points."""
    turns = max(4, round(abs(end - start) / 7))
    across = sideways(start, end) * (width / 2)
    zigzag = [
        start + (end - start) * ((turn + 0.5) / turns) + across * (1 if turn % 2 else -1) for turn in range(turns)
    ]
    return [start, *zigzag, end]


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted positions as little as needed to lie `gap` apart between `low` and `high`."""
    spots: list[float] = []
    for value in wanted:
        spots.append(max(value, spots[-1] + gap if spots else low))
    limit = high
    for index in range(len(spots) - 1, -1, -1):
        spots[index] = min(spots[index], limit)
        limit = spots[index] - gap
    return spots


def label_spots(anchors: dict[str, pymupdf.Point], layout: str) -> dict[str, pymupdf.Point]:
    """Positions of the part numbers: in columns ("sides", "right", "left") or in rows ("rows")."""
    along_x = layout == "rows"
    order = sorted(anchors, key=lambda part: anchors[part].y if along_x else anchors[part].x)
    half = {"right": 0, "left": len(order)}.get(layout, len(order) // 2)
    spots: dict[str, pymupdf.Point] = {}
    for side, edge in ((order[:half], -22), (order[half:], (CANVAS.y1 if along_x else CANVAS.x1) + 22)):
        group = sorted(side, key=lambda part: anchors[part].x if along_x else anchors[part].y)
        wanted = [anchors[part].x if along_x else anchors[part].y - 8 for part in group]
        for part, spot in zip(group, spread(wanted, 34, 0, CANVAS.x1 if along_x else CANVAS.y1), strict=True):
            spots[part] = pymupdf.Point(spot, edge) if along_x else pymupdf.Point(edge, spot)
    return spots


def runs(text: str, font: str) -> list[tuple[str, str]]:
    """Split a text into (run, font): with a Chinese font, Latin letters and digits are set in Helvetica."""
    if font != "china-s":
        return [(text, font)]
    found = re.findall(r"[ -~]+|[^ -~]+", text)
    return [(run, "helv" if run.isascii() else font) for run in found]


def text_width(text: str, font: str, size: float) -> float:
    """Width of a line of text."""
    return sum(pymupdf.get_text_length(run, fontname=face, fontsize=size) for run, face in runs(text, font))


def put(page: pymupdf.Page, point: tuple[float, float], text: str, font: str, size: float) -> None:
    """Write one line of text."""
    x, y = point
    for run, face in runs(text, font):
        page.insert_text((x, y), run, fontname=face, fontsize=size)
        x += text_width(run, face, size)


def wrap(text: str, style: Style, width: float) -> list[str]:
    """Break a paragraph into lines: English between words, Chinese only after punctuation marks."""
    pieces = re.findall(r"[^，。；：、]+[，。；：、]?" if style.chinese else r"\S+", text)
    glue = "" if style.chinese else " "
    lines = [""]
    for piece in pieces:
        longer = lines[-1] + glue + piece if lines[-1] else piece
        if lines[-1] and text_width(longer, style.body, style.size) > width:
            lines.append(piece)
        else:
            lines[-1] = longer
    return lines


def write_block(page: pymupdf.Page, text: str, top: float, style: Style) -> float:
    """Write paragraphs (one a line of `text`) from height `top` on; return the height below them."""
    for paragraph in text.strip().splitlines():
        for line in wrap(paragraph, style, PAGE_WIDTH - 2 * MARGIN):
            put(page, (MARGIN, top), line, style.body, style.size)
            top += style.size * 1.6
        top += style.size * 0.5
    return top


def write_parts(page: pymupdf.Page, text: str, top: float, style: Style) -> float:
    """Write a parts list, each line one ``number name``; return the height below it."""
    for line in text.strip().splitlines():
        put(page, (MARGIN + 20, top), line, style.body, style.size)
        page.draw_line((MARGIN + 16, top + 6), (PAGE_WIDTH - MARGIN - 140, top + 6), color=(0.75,) * 3, width=0.5)
        top += style.size * 1.8
    return top + style.size * 0.5


def write_drawing(page: pymupdf.Page, lines: str, top: float, style: Style) -> float:
    """Draw a figure with its labels; return the height below it."""
    drawing = Drawing(page, pymupdf.Point((PAGE_WIDTH - CANVAS.width) / 2, top + 30))
    for line in lines.strip().splitlines():
        drawing.add(line)
    drawing.label(style)
    bottom = top + 30 + CANVAS.height + 40
    if style.frame:
        page.draw_rect(pymupdf.Rect(MARGIN - 22, top - 16, PAGE_WIDTH - MARGIN + 22, bottom), width=0.8)
    return bottom + 30


def write_page(document: pymupdf.Document, source: dict[str, str], name: str, style: Style, first: bool) -> None:
    """Add one page: a heading and, as the source has them, text, parts list, drawing and caption."""
    page = document.new_page(width=PAGE_WIDTH, height=PAGE_HEIGHT)
    put(page, (MARGIN, 56), name, "helv", 10)
    page.draw_line((MARGIN, 64), (PAGE_WIDTH - MARGIN, 64), width=1.4 if first else 0.6)
    top = 150.0 if first else 100.0
    size = 20 if first else 15
    if heading := source.get("heading"):
        put(page, (MARGIN, top), heading, style.bold, size)
        top += size * 2
    if text := source.get("text"):
        top = write_block(page, text, top, style)
    if parts := source.get("parts"):
        top = write_parts(page, parts, top, style)
    caption = source.get("caption", "")
    if caption and style.caption_above:
        top = write_block(page, caption, top, style) + 10
    if draw := source.get("draw"):
        top = write_drawing(page, draw, top, style)
    if caption and not style.caption_above:
        write_block(page, caption, top, style)


def write_document(source: dict[str, Any], name: str, path: Path) -> None:
    """Write the PDF of one source."""
    style = Style(**source.get("style", {}))
    document = pymupdf.open()
    for index, page in enumerate(source["page"]):
        write_page(document, page, name, style, first=index == 0)
    document.set_metadata({})
    document.save(path, garbage=4, deflate=True, no_new_id=True)
    document.close()


def name_page(ask: str, number: int, figure: bool, chinese: bool, rng: random.Random) -> str:
    """Make a question say which page it is about."""
    if not chinese:
        form = rng.choice(CITE_FIGURE if figure else CITE_TEXT)
        return form.format(p=number, q=ask, Q=(ask[0].upper() + ask[1:]).rstrip("?"))
    numeral = rng.choice((f"{number}", f" {number} ", CHINESE_DIGITS[number]))
    return rng.choice(CITE_FIGURE_ZH if figure else CITE_TEXT_ZH).format(p=numeral, q=ask)


def make_questions(source: dict[str, Any], name: str) -> list[Question]:
    """Number the questions of one source and name the page in those marked ``cite``."""
    rng = random.Random(f"{SEED}-{name}")
    chinese = source.get("style", {}).get("chinese", False)
    numbers = {page["key"]: index for index, page in enumerate(source["page"], start=1)}
    figures = {page["key"] for page in source["page"] if "draw" in page}
    questions = []
    for index, item in enumerate(source["questions"], start=1):
        key, ask = item["page"], item["ask"]
        if item.get("cite"):
            text = name_page(ask, numbers[key], key in figures, chinese, rng)
        else:
            text = ask[0].upper() + ask[1:]
        questions.append({
            "id": f"{name}-q{index}",
            "question": text,
            "document": f"{name}.pdf",
            "answer": item["answer"],
            "pages": [numbers[key]],
            "kind": item["kind"],
        })  # fmt: skip
    return questions


def page_texts(path: Path) -> list[str]:
    """Text layer of each page, with every run of white space made one space."""
    with pymupdf.open(path) as document:
        return [" ".join(page.get_text().split()) for page in document]


def holds(text: str, answer: str) -> bool:
    """Whether the text contains the answer, a Latin one as whole words."""
    if not answer.isascii():
        return answer in text
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(answer)}(?![A-Za-z0-9])", text) is not None


def check(folder: Path) -> None:
    """Assert what the recipe relies on, reading back the written files."""
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    texts = {path.name: page_texts(path) for path in sorted((folder / "documents").glob("*.pdf"))}
    assert len({question["id"] for question in questions}) == len(questions)
    assert {question["document"] for question in questions} == set(texts)
    for name, pages in texts.items():
        mine = [question for question in questions if question["document"] == name]
        assert len(mine) == 8 and {question["kind"] for question in mine} == set(KINDS), name
        assert 3 <= len(pages) <= 6, name
        assert len({question["question"] for question in mine}) == 8, name
        for question in mine:
            answer, where = question["answer"], question["pages"]
            assert all(holds(pages[page - 1], answer) for page in where), question
            assert 1 in where or not holds(pages[0], answer), question
            assert not holds(question["question"], answer), question
            assert len(answer.split()) <= 5 and not answer.endswith((".", "。")), question
            assert not answer.lower().startswith(("the ", "a ", "an ")), question
    named = sum(bool(re.search(r"page \d|第 ?[\d一二三四五六] ?页", q["question"])) for q in questions)
    assert named >= 0.4 * len(questions), named
    size = sum(path.stat().st_size for path in (folder / "documents").iterdir())
    assert size < 3_000_000, size
    print(f"{len(texts)} documents, {size} bytes, {len(questions)} questions, {named} name their page")


def main() -> None:
    """Write the documents and the questions, then check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", type=Path, default=HERE.parent / "sources", help="folder of the TOML sources")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for documents/ and questions.jsonl")
    arguments = parser.parse_args()
    documents = arguments.output / "documents"
    documents.mkdir(parents=True, exist_ok=True)
    questions: list[Question] = []
    for path in sorted(arguments.sources.glob("*.toml")):
        source = tomllib.loads(path.read_text(encoding="utf-8"))
        write_document(source, path.stem, documents / f"{path.stem}.pdf")
        questions += make_questions(source, path.stem)
    text = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    (arguments.output / "questions.jsonl").write_text(text, encoding="utf-8")
    check(arguments.output)


if __name__ == "__main__":
    main()
