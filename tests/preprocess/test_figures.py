"""Crops of figures: found by labels on pages of many layouts, drawn finer than the page, kept across restarts."""

import dataclasses
import hashlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pymupdf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages.contract.errors import InterruptedRunError
from stages.contract.files import FileHashes
from stages.contract.part import Shard
from stages.contract.stage import Stage
from stages.preprocess import figures as figures_module
from stages.preprocess import retrieval
from stages.preprocess.documents import document_ids, picture_folder, render_documents
from stages.preprocess.figures import crop_figures
from stages.preprocess.layout import crop_page_figures, figure_box, page_ink
from stages.preprocess.render import PATCH, PageRange, page_words
from tests.conftest import REPOSITORY, make_pdf
from tests.preprocess import bad_workers

NewStage = Callable[..., Stage]
BUDGET = 501_760
Rectangle = tuple[float, float, float, float]
"""x0, y0, x1, y1 in points of an A4 page, 595 x 842."""

PROSE = (
    "The lever 12 as shown in FIG. 2 turns on the pin 14 when the pedal 16 is pressed",
    "down, and the spring 18 of FIG. 1 pulls it back as soon as the pedal is let go of.",
)
CHINESE_PROSE = (
    "如图2所示，杠杆12在踏板16被踩下时绕销轴14转动，踏板松开后，",
    "弹簧18将其拉回到图1所示的位置，锁扣20随之松开。",
)


class Page:
    """An A4 page that a test draws."""

    def __init__(self) -> None:
        self.document = pymupdf.open()
        self.page = self.document.new_page(width=595, height=842)

    def draw(self, box: Rectangle) -> "Page":
        """A drawing that reaches to all sides of a box, with a numbered part."""
        x0, y0, x1, y1 = box
        self.page.draw_oval(pymupdf.Rect(box))
        self.page.draw_line((x0, y1), (x1, y0), width=0.6)
        self.page.draw_rect(pymupdf.Rect(x0 + 20, y0 + 20, x1 - 20, y1 - 20), width=0.5)
        return self.write((x0 + x1) / 2, (y0 + y1) / 2, "12")

    def write(self, centre: float, base: float, text: str, size: float = 12) -> "Page":
        font = "helv" if text.isascii() else "china-s"
        width = pymupdf.get_text_length(text, font, size)
        self.page.insert_text((centre - width / 2, base), text, fontname=font, fontsize=size)
        return self

    def write_left(self, left: float, base: float, text: str, size: float = 12) -> "Page":
        font = "helv" if text.isascii() else "china-s"
        self.page.insert_text((left, base), text, fontname=font, fontsize=size)
        return self

    def prose(self, base: float, lines: tuple[str, ...] = PROSE) -> "Page":
        for number, line in enumerate(lines):
            self.write(297, base + 18 * number, line)
        return self

    def box(self, figure: str) -> Rectangle | None:
        """Where a figure is found, in points."""
        page = self.document.reload_page(self.page)
        found = figure_box(page_words(page), figure, page_ink(page))
        self.page = page
        return None if found is None else tuple(np.multiply(found, (595, 842, 595, 842)))  # type: ignore[return-value]

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.document.save(path)
        return path


def holds(box: Rectangle | None, inner: Rectangle) -> bool:
    assert box is not None
    return box[0] <= inner[0] + 1 and box[1] <= inner[1] + 1 and box[2] >= inner[2] - 1 and box[3] >= inner[3] - 1


def apart(box: Rectangle | None, other: Rectangle) -> bool:
    """Whether nothing of `other` is in the box."""
    assert box is not None
    return box[0] >= other[2] or box[2] <= other[0] or box[1] >= other[3] or box[3] <= other[1]


# -- layouts -------------------------------------------------------------------------------------------------------

TOP, BOTTOM = (120, 80, 480, 360), (150, 430, 450, 720)
LEFT, RIGHT = (60, 200, 350, 600), (390, 250, 540, 600)
LABELS = [
    "图{}",
    "图 {}",
    "FIG. {}",
    "Figure {}",
    "FIG.{}",
    "附图{}",
    "图{}  剖视图",
    "Fig. {}: Sectional view",
    "图{}A",
]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("above", [False, True], ids=["label below", "label above"])
def test_figures_one_above_the_other(label: str, above: bool) -> None:
    page = Page().write(297, 40, "CN 100000001 A", 9).write(297, 820, "5", 9)
    letter = "a" if label.endswith("A") else ""
    for number, box in ((1, TOP), (2, BOTTOM)):
        page.draw(box).write(300, box[1] - 12 if above else box[3] + 22, label.format(number))
    marks = [
        (250, box[1] - 18, 350, box[1] - 12) if above else (250, box[3] + 14, 350, box[3] + 22) for box in (TOP, BOTTOM)
    ]
    for number, own, other in ((1, 0, 1), (2, 1, 0)):
        found = page.box(f"{number}{letter}")
        assert holds(found, (TOP, BOTTOM)[own])
        assert holds(found, (297, marks[own][1], 300, marks[own][3])), "the label belongs to the crop"
        assert apart(found, (TOP, BOTTOM)[other])
        assert apart(found, marks[other])
        assert found is not None
        assert found[1] > 45, "the page's head does not"
        assert found[3] < 800


@pytest.mark.parametrize("above", [False, True], ids=["label below", "label above"])
@pytest.mark.parametrize("frame", [False, True], ids=["no frame", "frame"])
def test_figures_of_unequal_width_side_by_side(above: bool, frame: bool) -> None:
    page = Page()
    if frame:
        page.page.draw_rect((30, 30, 565, 812))
    for number, box in ((3, LEFT), (4, RIGHT)):
        page.draw(box).write((box[0] + box[2]) / 2, box[1] - 12 if above else box[3] + 22, f"图{number}")
    assert holds(page.box("3"), LEFT)
    assert apart(page.box("3"), RIGHT)
    assert holds(page.box("4"), RIGHT)
    assert apart(page.box("4"), LEFT)


def test_a_number_beside_its_figure_stays_with_it_and_a_head_in_the_middle_changes_nothing() -> None:
    left, right, number = (60, 150, 330, 400), (370, 200, 540, 380), (342, 294, 352, 304)
    page = Page().write(350, 40, "CN 100000001 A", 14).draw((60, 150, 160, 400)).draw((200, 150, 330, 400)).draw(right)
    page.page.draw_line((340, 300), (320, 290))
    page.write(347, 303, "14", 9).write(195, 430, "图3").write(455, 430, "图4")
    assert holds(page.box("3"), left)
    assert holds(page.box("3"), number)
    assert apart(page.box("3"), right)
    assert holds(page.box("4"), right)
    assert apart(page.box("4"), left)
    assert apart(page.box("4"), number)


@pytest.mark.parametrize("above", [False, True], ids=["label low", "label high"])
def test_a_label_beside_the_end_of_its_drawing_does_not_cut_it(above: bool) -> None:
    page = Page()
    for number, box in ((1, TOP), (2, BOTTOM)):
        page.draw(box).write(525, box[1] + 40 if above else box[3] - 30, f"FIG. {number}")
    for number, own, other in (("1", TOP, BOTTOM), ("2", BOTTOM, TOP)):
        assert holds(page.box(number), own)
        assert apart(page.box(number), other)


def test_a_figure_on_its_side_gets_no_crop() -> None:
    page = Page().draw((100, 100, 450, 740))
    page.page.insert_text((500, 400), "图2", fontname="china-s", fontsize=12, rotate=90)
    assert page.box("2") is None


def test_one_figure_over_two_and_two_beside_one() -> None:
    wide, left, right = (80, 60, 500, 350), (60, 430, 280, 700), (330, 470, 540, 700)
    three = Page().draw(wide).draw(left).draw(right)
    three.write(297, 375, "FIG. 1").write(170, 725, "FIG. 2").write(435, 725, "FIG. 3")
    tall, upper, lower = (60, 80, 290, 700), (330, 80, 540, 330), (330, 420, 540, 640)
    beside = Page().draw(tall).draw(upper).draw(lower)
    beside.write(175, 725, "FIG. 1").write(435, 355, "FIG. 2").write(435, 665, "FIG. 3")
    for page, boxes in ((three, (wide, left, right)), (beside, (tall, upper, lower))):
        for number, own in enumerate(boxes, start=1):
            found = page.box(str(number))
            assert holds(found, own)
            assert all(apart(found, other) for other in boxes if other is not own)


def test_four_figures_in_a_square() -> None:
    boxes = [(x, y, x + 200, y + 280) for y in (60, 420) for x in (60, 330)]
    page = Page()
    for number, box in enumerate(boxes, start=1):
        page.draw(box).write(box[0] + 100, box[3] + 25, f"图{number}")
    for number, own in enumerate(boxes, start=1):
        found = page.box(str(number))
        assert holds(found, own)
        assert all(apart(found, other) for other in boxes if other is not own)


@pytest.mark.parametrize("prose", [PROSE, CHINESE_PROSE], ids=["English", "Chinese"])
def test_a_figure_between_text(prose: tuple[str, ...]) -> None:
    own = (150, 250, 450, 500)
    page = (
        Page().prose(100, prose).prose(160, prose).draw(own).write(297, 530, "图2").prose(600, prose).prose(650, prose)
    )
    found = page.box("2")
    assert holds(found, own)
    assert found is not None
    assert found[1] > 185, "the text above is not part of the figure"
    assert found[3] < 580
    assert page.box("1") is None, "a mention is no label"


def test_a_flow_chart_is_not_cut_at_its_words() -> None:
    page = Page()
    text = "DETERMINE WHETHER THE TEMPERATURE EXCEEDS ITS LIMIT"
    for top in (100, 250, 400):
        page.page.draw_rect((100, top, 500, top + 60))
        page.page.draw_line((300, top + 60), (300, top + 150))
        page.write(300, top + 34, text)
    page.write(297, 600, "FIG. 5")
    assert holds(page.box("5"), (100, 100, 500, 550))


def turned(page: Page) -> pymupdf.Document:
    """The same page, on its side in the file and rotated upright for the reader."""
    document = pymupdf.open()
    sheet = document.new_page(width=842, height=595)
    sheet.show_pdf_page(sheet.rect, page.document, 0, rotate=90)
    sheet.set_rotation(90)
    return document


def test_a_rotated_page_is_cropped_upright(tmp_path: Path) -> None:
    page = Page().draw(TOP).write(300, 382, "图1").draw(BOTTOM).write(300, 742, "图2")
    page.save(tmp_path / "upright.pdf")
    turned(page).save(tmp_path / "turned.pdf")
    crops = []
    for name in ("upright", "turned"):
        (tmp_path / name).mkdir()
        only = PageRange(name, tmp_path / f"{name}.pdf", 0, 1)
        crop_page_figures(only, ["2"], tmp_path / name, BUDGET, 90)
        with Image.open(tmp_path / name / "1-figure-2.jpg") as picture:
            crops.append(picture.convert("L").resize((60, 60)))
    alike = np.corrcoef(*(np.asarray(crop, np.float64).ravel() for crop in crops))[0, 1]
    assert alike > 0.8


def test_a_figure_in_parts_and_a_part_without_its_own_label() -> None:
    page = Page()
    for name, box in (("2(a)", TOP), ("2(b)", BOTTOM)):
        page.draw(box).write(300, box[3] + 22, f"图{name}")
    assert holds(page.box("2a"), TOP)
    assert apart(page.box("2a"), BOTTOM)
    assert holds(page.box("2"), TOP)
    assert holds(page.box("2"), BOTTOM)
    assert page.box("2c") is None
    whole = Page().draw(TOP).write(300, 382, "图2").draw(BOTTOM).write(300, 742, "图3")
    assert holds(whole.box("2b"), TOP)
    assert whole.box("12") is None


@pytest.mark.parametrize(
    "text",
    ["如图2所示", "图2是折叠梯的侧视图", "see FIG. 2", "FIG. 2 shows the stool", "图12", "图20", "FIG. 2-1", "12", ""],
)
def test_a_text_that_is_not_a_label_finds_nothing(text: str) -> None:
    assert Page().draw(TOP).write(300, 382, text or " ").box("2") is None


def test_a_mention_broken_over_two_lines_is_no_label() -> None:
    page = Page().draw(TOP).prose(600, (PROSE[0], PROSE[1][:60] + " as shown in"))
    page.write(110, 636, "FIG. 2")
    assert page.box("2") is None


def test_a_list_of_figures_without_drawings_has_none() -> None:
    page = Page().write(200, 100, "FIG. 1").write(200, 300, "FIG. 2").prose(500)
    page.page.draw_line((60, 60), (540, 60))
    assert page.box("1") is None
    assert page.box("2") is None


# -- tables and lists of figures -----------------------------------------------------------------------------------

Style = Literal["grid", "three rules", "rows ruled", "filled rows"]


def draw_table(page: Page, box: Rectangle, style: Style, rows: int = 8, columns: int = 4) -> Page:
    """A ruled table with a short text in each cell."""
    x0, y0, x1, y1 = box
    high, wide = (y1 - y0) / rows, (x1 - x0) / columns
    for row in range(0, rows if style == "filled rows" else 0, 2):
        page.page.draw_rect((x0, y0 + row * high, x1, y0 + (row + 1) * high), color=None, fill=(0.8, 0.8, 0.8))
    for row in range(rows + 1) if style in ("grid", "rows ruled") else (0, 1, rows):
        page.page.draw_line((x0, y0 + row * high), (x1, y0 + row * high), width=0.7)
    for column in range(columns + 1 if style == "grid" else 0):
        page.page.draw_line((x0 + column * wide, y0), (x0 + column * wide, y1), width=0.7)
    for row in range(rows):
        for column in range(columns):
            page.write(x0 + (column + 0.5) * wide, y0 + (row + 0.6) * high, f"part {row * columns + column}", 9)
    return page


SMALL, TABLE = (200, 90, 400, 220), (80, 330, 515, 620)


@pytest.mark.parametrize("style", get_args(Style))
@pytest.mark.parametrize("title", ["", "Table 3: Parts of the stool", "表3 部件"])
def test_a_table_below_a_caption_is_not_its_figure(style: Style, title: str) -> None:
    page = draw_table(Page().draw(SMALL).write(300, 245, "Figure 1. Sectional view"), TABLE, style)
    found = page.write(297, 320, title or " ").box("1")
    assert holds(found, SMALL)
    assert apart(found, TABLE)


@pytest.mark.parametrize("style", get_args(Style))
def test_a_table_above_a_figure_is_not_part_of_it(style: Style) -> None:
    own = (180, 480, 420, 640)
    page = draw_table(Page().write(297, 80, "Table 1. Parts"), (80, 95, 515, 400), style)
    found = page.draw(own).write(300, 670, "Figure 2. Sectional view").box("2")
    assert holds(found, own)
    assert apart(found, (80, 95, 515, 400))


@pytest.mark.parametrize("style", get_args(Style))
def test_a_caption_with_only_a_table_near_it_has_no_figure(style: Style) -> None:
    page = draw_table(Page().write(297, 80, "Figure 4. Sectional view, continued"), (80, 120, 515, 400), style)
    assert page.box("4") is None


def test_a_table_beside_a_figure_is_not_part_of_it() -> None:
    own = (60, 90, 300, 320)
    page = draw_table(Page().draw(own).write(180, 345, "Figure 1. View"), (340, 90, 540, 320), "grid", columns=2)
    assert holds(page.box("1"), own)
    assert apart(page.box("1"), (341, 90, 540, 320))


def test_grid_lines_of_a_chart_are_no_table() -> None:
    page = Page()
    for y in range(100, 301, 40):
        page.page.draw_line((120, y), (480, y), width=0.3)
        page.write(105, y + 4, str(y), 8)
    page.page.draw_bezier((120, 290), (200, 100), (300, 300), (480, 120))
    page.write(300, 320, "Time (s)", 9).write(300, 345, "Figure 1. Speed over time")
    assert holds(page.box("1"), (120, 100, 480, 300))


def test_two_figures_and_a_table_between_them() -> None:
    lower = (180, 560, 420, 720)
    page = draw_table(Page().draw(SMALL).write(300, 245, "FIG. 1"), (80, 300, 515, 500), "grid")
    page.draw(lower).write(300, 745, "FIG. 2")
    assert holds(page.box("1"), SMALL) and apart(page.box("1"), (80, 300, 515, 500))
    assert holds(page.box("2"), lower) and apart(page.box("2"), (80, 300, 515, 500))


def test_equal_boxes_of_a_flow_chart_are_no_table() -> None:
    page = Page()
    for top in (100, 200, 300, 400):
        page.page.draw_rect((180, top, 420, top + 50))
        page.page.draw_line((300, top + 50), (300, top + 100))
        page.write(300, top + 30, "TURN THE LEVER")
    page.write(297, 540, "FIG. 5")
    assert holds(page.box("5"), (180, 100, 420, 500))


ENTRIES = {
    "dots": "Figure {}  Sectional view of the stool ........................ {}",
    "plain": "Figure {}: Sectional view of the stool",
    "Chinese": "图{} 折叠梯的剖视图",
    "wide": "Fig. {} View",
}


# nothing tells a single line without a heading and a page number from a caption
LISTS = [
    (kind, heading, count)
    for kind in ENTRIES
    for heading in ("List of Figures", "图目录", "")
    for count in (1, 4)
    if count > 1 or heading or kind in ("dots", "wide")
]


@pytest.mark.parametrize(("kind", "heading", "count"), LISTS)
def test_a_line_of_a_list_of_figures_is_no_caption(kind: str, heading: str, count: int) -> None:
    page = Page().write(160, 80, heading or " ", 14)
    for number in range(1, count + 1):
        page.write_left(80, 90 + 22 * number, ENTRIES[kind].format(number, number + 3))
        if kind == "wide":
            page.write_left(500, 90 + 22 * number, str(number + 3))
    page.draw((150, 300, 450, 600))
    assert page.box("1") is None
    page.write(300, 630, "Figure 1: Sectional view of the stool")
    assert holds(page.box("1"), (150, 300, 450, 600))
    assert apart(page.box("1"), (80, 90, 540, 200)), "the list is not part of the crop"


# -- parts ---------------------------------------------------------------------------------------------------------

GRID = [(x, y, x + 180, y + 150) for y in (80, 300) for x in (80, 330)]


@pytest.mark.parametrize("label", ["({})", "({}) front view of the folding stool", "Figure 2({})", "Fig. 2{}"])
@pytest.mark.parametrize("count", [2, 4])
def test_parts_beside_each_other_are_one_figure(label: str, count: int) -> None:
    page = Page()
    for letter, box in zip("abcd", GRID[:count], strict=False):
        page.draw(box).write((box[0] + box[2]) / 2, box[3] + 20, label.format(letter), 9)
    bottom = GRID[count - 1][3]
    page.write(297, bottom + 50, "Figure 2. Views of the stool").prose(bottom + 100)
    other = (200, bottom + 180, 400, bottom + 260)
    page.draw(other).write(300, bottom + 285, "Figure 3. Lever")
    found = page.box("2")
    assert all(holds(found, box) for box in GRID[:count])
    assert holds(found, (297, bottom + 44, 299, bottom + 50)), "the caption is part of the crop"
    assert apart(found, other)
    assert holds(page.box("3"), other)
    assert apart(page.box("3"), GRID[0])


@pytest.mark.parametrize("place", ["below in the middle", "below at the left", "above at the left"])
def test_parts_stay_together_beside_another_figure(place: str) -> None:
    parts, other = [(40, 100, 160, 250), (190, 100, 310, 250)], (360, 100, 560, 250)
    page = Page().draw(other)
    for letter, box in zip("ab", parts, strict=True):
        page.draw(box).write((box[0] + box[2]) / 2, box[3] + 16, f"({letter})", 9)
    base = 85 if place.startswith("above") else 295
    for number, left, middle in ((1, 40, 175), (2, 360, 460)):
        if place.endswith("middle"):
            page.write(middle, base, f"Fig. {number}")
        else:
            page.write_left(left, base, f"Fig. {number}")
    assert all(holds(page.box("1"), box) for box in parts)
    assert apart(page.box("1"), other)
    assert holds(page.box("2"), other)
    assert apart(page.box("2"), parts[1])


def test_parts_in_a_column_beside_text_are_one_figure() -> None:
    page, parts = Page(), [(x, y, x + 100, y + 90) for y in (80, 210) for x in (55, 175)]
    for base in range(60, 780, 12):
        page.write_left(310, base, "the lever turns on its pin when the pedal is pressed"[:46], 9.5)
    for letter, box in zip("abcd", parts, strict=True):
        page.draw(box).write((box[0] + box[2]) / 2, box[3] + 14, f"({letter})", 9)
    found = page.write(165, 340, "Fig. 3. Views of it", 9).box("3")
    assert all(holds(found, box) for box in parts)
    assert apart(found, (310, 50, 560, 780))


def test_a_part_with_its_own_label_is_cropped_alone_also_below_a_common_caption() -> None:
    page = Page()
    for letter, box in zip("ab", GRID, strict=False):
        page.draw(box).write((box[0] + box[2]) / 2, box[3] + 20, f"Fig. 2({letter})", 9)
    page.write(297, 300, "Fig. 2. Views of the stool")
    assert holds(page.box("2b"), GRID[1])
    assert apart(page.box("2b"), GRID[0])


def scanned(page: Page) -> pymupdf.Page:
    """The same page as a picture only."""
    picture = page.page.get_pixmap(dpi=100)
    document = pymupdf.open()
    sheet = document.new_page(width=595, height=842)
    sheet.insert_image(sheet.rect, pixmap=picture)
    return sheet


def test_a_scan_without_text_has_no_figure_and_one_with_text_has() -> None:
    page = Page().draw(TOP).write(300, 382, "图1").draw(BOTTOM).write(300, 742, "图2")
    expected, words = page.box("2"), page_words(page.page)
    sheet = scanned(page)
    assert page_words(sheet) == []
    assert figure_box(page_words(sheet), "2", page_ink(sheet)) is None
    found = figure_box(words, "2", page_ink(sheet))  # as text recognition would read them
    assert found is not None
    assert np.multiply(found, (595, 842, 595, 842)) == pytest.approx(expected, abs=4)


labels = st.sampled_from(["图1", "图2", "FIG. 2", "图2 剖视图", "x" * 60, "12"])
sides = st.floats(-0.2, 1.2)


@given(st.lists(st.tuples(sides, sides, sides, sides, labels), max_size=8), st.randoms())
def test_any_words_on_any_ink_give_a_box_on_the_page_or_none(words, random) -> None:  # type: ignore[no-untyped-def]
    ink = np.random.default_rng(random.randrange(1000)).random((60, 40)) < random.choice([0, 0.02, 0.5])
    found = figure_box(words, "2", ink)
    if found is not None:
        assert 0 <= found[0] < found[2] <= 1
        assert 0 <= found[1] < found[3] <= 1


# -- crops ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "few" / "documents"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def documents(folder: Path) -> dict[str, Path]:
    """专利.pdf with figures 1 and 2 on its page, and plain.pdf with text only."""
    page = Page().draw(TOP).write(300, 382, "图1").draw(BOTTOM).write(300, 742, "图2")
    page.save(folder / "专利.pdf")
    make_pdf(folder / "plain.pdf", ["Part 12"])
    return document_ids(sorted(folder.iterdir()), folder)


ASKED = [("专利.pdf", 1, "2"), ("专利.pdf", 1, "1"), ("专利.pdf", 1, "2")]


def start(
    stage: Stage, documents: dict[str, Path], asked: list[tuple[str, int, str]]
) -> tuple[list[Any], dict[Any, Any]]:
    return render_documents(stage, documents), crop_figures(stage, asked, documents)


def pictures(stage: Stage) -> dict[str, int]:
    root = stage.path("pages")
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_crop_is_within_the_budget_and_finer_than_its_page(new_stage: NewStage, documents: dict[str, Path]) -> None:
    stage = new_stage(f"preprocess.pages.max_pixels={BUDGET}")
    pages, found = start(stage, documents, ASKED)
    assert set(found) == set(ASKED)
    box = Page().draw(TOP).write(300, 382, "图1").draw(BOTTOM).write(300, 742, "图2").box("2")
    assert box is not None
    page = next(page for page in pages if page["document"] == "专利.pdf")
    crop = found["专利.pdf", 1, "2"]
    assert crop["image"] == f"preprocess/pages/{picture_folder('专利.pdf')}/1-figure-2.jpg"
    path = stage.run.folder / crop["image"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == crop["sha256"]
    with Image.open(path) as picture:
        assert picture.size == (crop["width"], crop["height"])
        grey = np.asarray(picture.convert("L"))
    assert crop["width"] % PATCH == crop["height"] % PATCH == 0
    assert crop["width"] * crop["height"] <= BUDGET
    assert crop["width"] / (box[2] - box[0]) > 1.4 * page["width"] / 595
    assert crop["height"] / (box[3] - box[1]) > 1.4 * page["height"] / 842
    assert grey.min() < 100
    for edge in (grey[0], grey[-1], grey[:, 0], grey[:, -1]):
        assert edge.min() > 150, "nothing is cut through"


def test_a_restart_crops_nothing_and_counts_the_same(new_stage: NewStage, documents: dict[str, Path]) -> None:
    asked = [*ASKED, ("plain.pdf", 1, "3")]
    first = new_stage()
    found = start(first, documents, asked)[1]
    before = pictures(first)
    assert len(before) == 4
    second = new_stage()
    assert start(second, documents, asked)[1] == found
    assert pictures(second) == before
    assert second.counts == first.counts


def test_a_stop_keeps_finished_crops(new_stage: NewStage, documents: dict[str, Path]) -> None:
    other = Page().draw(TOP).write(300, 382, "图1").save(documents["plain.pdf"].with_name("other.pdf"))
    documents["other.pdf"] = other
    asked = [*ASKED, ("other.pdf", 1, "1")]
    stopped = new_stage("preprocess.workers=1")
    render_documents(stopped, documents)
    stopped.stop.signal = signal.SIGTERM
    with pytest.raises(InterruptedRunError):
        crop_figures(stopped, asked, documents)
    notes = list(stopped.path("cache", "figures").rglob("*.json"))
    kept = {f"{note.parent.name}/{note.stem}.jpg" for note in notes}
    assert kept
    before = pictures(stopped)
    second = new_stage()
    assert set(start(second, documents, asked)[1]) == set(asked)
    assert {name: pictures(second)[name] for name in kept} == {name: before[name] for name in kept}


def test_the_merging_stage_adopts_the_crops_of_a_shard(new_stage: NewStage, documents: dict[str, Path]) -> None:
    shard = dataclasses.replace(new_stage(), part=Shard(0, 1))
    _, found = start(shard, documents, ASKED)
    stage = new_stage()
    stage.finished_shards = [shard.folder]
    retrieval._adopt_shards(stage)
    before = pictures(stage)
    assert start(stage, documents, ASKED)[1] == found
    assert pictures(stage) == before
    assert all((stage.run.folder / crop["image"]).is_file() for crop in found.values())


def test_crops_that_are_no_longer_wanted_are_deleted(new_stage: NewStage, documents: dict[str, Path]) -> None:
    start(new_stage(), documents, ASKED)
    fewer = new_stage()
    start(fewer, documents, ASKED[:1])
    assert len(pictures(fewer)) == 3
    fewer.remove_unused_cache()
    assert [path.name for path in fewer.path("cache", "figures").rglob("*.json")] == ["1-figure-2.json"]
    none = new_stage()
    assert start(none, documents, [])[1] == {}
    assert len(pictures(none)) == 2


def test_a_changed_crop_and_a_changed_document_are_cropped_again(
    new_stage: NewStage, documents: dict[str, Path]
) -> None:
    stage = new_stage()
    crop = stage.run.folder / start(stage, documents, ASKED[:1])[1][ASKED[0]]["image"]
    whole = crop.read_bytes()
    crop.write_bytes(whole[:-1] + b"x")
    start(new_stage(), documents, ASKED[:1])
    assert crop.read_bytes() == whole
    documents["专利.pdf"].unlink()
    Page().draw((200, 300, 400, 400)).write(300, 430, "图2").save(documents["专利.pdf"])
    start(new_stage(), documents, ASKED[:1])
    assert crop.read_bytes() != whole


def test_a_figure_that_is_not_found_is_counted_and_has_no_picture(
    new_stage: NewStage, documents: dict[str, Path]
) -> None:
    page = Page().draw((20, 20, 575, 800)).write(297, 825, "FIG. 1")
    documents["full.pdf"] = page.save(documents["plain.pdf"].with_name("full.pdf"))
    asked = [("专利.pdf", 1, "7"), ("plain.pdf", 1, "1"), ("plain.pdf", 99, "1"), ("full.pdf", 1, "1"), ASKED[0]]
    for _ in range(2):
        stage = new_stage()
        assert set(start(stage, documents, asked)[1]) == {ASKED[0]}
        assert stage.counts["figure not found"] == 3
        assert stage.counts["figure fills its page"] == 1
        assert len(pictures(stage)) == 4


def test_a_figure_that_kills_its_worker_costs_the_figures_of_its_page(
    new_stage: NewStage, documents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Page().draw(TOP).write(300, 382, "图1")
    documents["bad.pdf"] = second.save(documents["plain.pdf"].with_name("bad.pdf"))
    stage = new_stage()
    render_documents(stage, documents)
    monkeypatch.setattr(figures_module, "crop_page_figures", bad_workers.crash_on_bad_figures)
    found = crop_figures(stage, [*ASKED, ("bad.pdf", 1, "1"), ("bad.pdf", 1, "2")], documents)
    assert set(found) == set(ASKED)
    assert stage.counts["figure failed"] == 2


def test_the_digest_of_the_pages_covers_the_crops(new_stage: NewStage, documents: dict[str, Path]) -> None:
    stage = new_stage()
    _, found = start(stage, documents, ASKED)
    digest, count = FileHashes(stage.path(".none.json")).tree_digest(stage.path("pages"))
    assert count == 4
    (stage.run.folder / found[ASKED[0]]["image"]).write_bytes(b"other")
    assert FileHashes(stage.path(".none.json")).tree_digest(stage.path("pages"))[0] != digest


def test_the_figures_of_the_demo(new_stage: NewStage) -> None:
    folder = REPOSITORY / "recipes" / "data" / "patent-qa" / "documents"
    documents = {name: folder / name for name in ("CN1000004A.pdf", "US1000005A.pdf", "US1000004A.pdf")}
    stage = new_stage()
    asked = [("CN1000004A.pdf", 2, "1"), ("US1000005A.pdf", 4, "1"), ("US1000005A.pdf", 5, "2")]
    found = crop_figures(stage, [*asked, ("US1000005A.pdf", 5, "1"), ("US1000004A.pdf", 3, "1")], documents)
    assert set(found) == set(asked)
    assert stage.counts["figure not found"] == 2, "one figure of another page, and a heading that goes on as a sentence"
