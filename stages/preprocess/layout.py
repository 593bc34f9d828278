"""Find a figure on its page by its label and by the drawing. Runs in worker processes: keep imports light.

A page is an array of ink: booleans, rows x columns, true where something is printed. Boxes are in pixels of that array.
The page is cut between its labels where a cut crosses the least ink, until each part has one label. The figure is the
drawing in that part, above the label or below it. Ruled tables do not count as drawings, nor lines of a list of figures
as labels.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pymupdf

from stages.preprocess.render import PageRange, open_document, page_words, render_page, write_picture
from stages.tasks.common.mentions import figure_labelled

Ink = npt.NDArray[np.bool_]

INK_PIXELS = 500_000
"""Pixels of the ink array: 72 DPI for A4, where a hairline is still visible."""

FILLS = 0.75
"""Share of the page above which a figure gets no crop: the crop would be less than 1.16 times finer than the page."""

WIDE = 0.3
"""Share of the page's width above which a line of text is prose, unless something is drawn beside it."""

LEAST = 0.02
"""Smallest share of the page's height and width for a drawing; less is a ruled line or a speck of a scan."""

SPECKS = 0.3
"""Share of the rows between two lines of a list that may have ink: an underline, or specks of a scan."""

RULE = 0.08
"""Smallest share of the page's width for a rule of a table."""

THICK = 0.01
"""Largest share of the page's height for a rule; more is a filled area, whose edges are rules."""

_LIST = re.compile(
    r"(?:list|table|index) of (?:figures|illustrations|drawings)|figures|illustrations"
    r"|(?:brief )?description of (?:the )?(?:several views of the )?drawings?"
    r"|(?:插|附)?图\s*(?:目录|清单|索引|说明|列表)|(?:插|附)圖\s*(?:目錄|清單|索引|說明)",
    re.IGNORECASE,
)
"""Headings of a list of figures."""

_LEADER = re.compile(r"(?:[.\u2026\u00b7\u2025]\s?){3,}\s*\d*$")
"""Dots that lead to a page number."""

_TABLE = re.compile(r"(?:table|tab\.|附?表)\s*[\divxlc]+", re.IGNORECASE)
"""Begins the caption of a table."""

_PART = re.compile(r"\(?[a-z]\)(?:\s|$)")
"""Begins the label of a part of a figure, such as `(a) Front view`."""

NOT_FOUND = {"status": "not found"}


class Box(NamedTuple):
    """Columns x0 to x1 and rows y0 to y1, the latter of each exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    def crop(self, ink: Ink) -> Ink:
        """Return the part of an array inside the box, as a view."""
        return ink[self.y0 : self.y1, self.x0 : self.x1]

    def expand(self, margin: int, within: "Box") -> "Box":
        """Return the box with a margin of this many pixels on all sides, cut to the box `within`."""
        x0, y0, x1, y1 = self.x0 - margin, self.y0 - margin, self.x1 + margin, self.y1 + margin
        return Box(max(x0, within.x0), max(y0, within.y0), min(x1, within.x1), min(y1, within.y1))

    def touches(self, other: "Box") -> bool:
        """Whether the boxes have a pixel in common."""
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1


class Line(NamedTuple):
    """Words side by side, with at most a wide space between them."""

    box: Box
    text: str


class Label(NamedTuple):
    """A label's box, and the figure that it names: `2` or `2a`."""

    box: Box
    figure: str


def crop_page_figures(
    page: PageRange, figures: list[str], folder: Path, max_pixels: int, jpeg_quality: int
) -> list[dict[str, Any]]:
    """Draw figures of one page into `folder/<page>-figure-<figure>.jpg`. Returns a record for each.

    A record has `figure`, `status` (`ok`, `not found`, `fills its page` or a reason), and for `ok`: `width`, `height`
    (pixels) and the picture's `sha256`.
    """
    records = []
    for figure in figures:
        path = folder / f"{page.first + 1}-figure-{figure}.jpg"
        try:
            with open_document(page.source) as document:
                exists = page.first < document.page_count
                record = _crop(document[page.first], figure, path, max_pixels, jpeg_quality) if exists else NOT_FOUND
        except (OSError, MemoryError):  # not the page's fault
            raise
        except Exception as error:  # noqa: BLE001 - for bad content PyMuPDF raises many kinds, IndexError among them
            record = {"status": f"figure cannot be rendered: {error}"}
        records.append({"figure": figure, **record})
    return records


def _crop(page: pymupdf.Page, figure: str, path: Path, max_pixels: int, jpeg_quality: int) -> dict[str, Any]:
    """Draw one figure of a page into `path`. Returns its record as in `crop_page_figures`, but without `figure`."""
    box = figure_box(page_words(page), figure, page_ink(page))
    if box is None:
        return NOT_FOUND
    x0, y0, x1, y1 = box
    if (x1 - x0) * (y1 - y0) > FILLS:
        return {"status": "fills its page"}
    width, height = page.rect.width, page.rect.height
    region = pymupdf.Rect(x0 * width, y0 * height, x1 * width, y1 * height)
    return {"status": "ok", **write_picture(render_page(page, max_pixels, region), path, jpeg_quality)}


def page_ink(page: pymupdf.Page) -> Ink:
    """Return a page's ink, which is true where the page is darker than its paper in any colour channel: rows x columns,
    at most `INK_PIXELS` in all."""
    picture = render_page(page, INK_PIXELS)
    colours = np.frombuffer(picture.samples, np.uint8).reshape(picture.height, picture.width, 3)
    darkest = colours.min(axis=2).astype(np.int16)
    ink: Ink = darkest < np.median(darkest) - 32
    return ink


def figure_box(words: Iterable[Sequence[Any]], figure: str, ink: Ink) -> tuple[float, float, float, float] | None:
    """Return the box (x0, y0, x1, y1) of a figure with its label, in 0..1 of the page; None if there is no such label
    or drawing.

    `words` are `[x0, y0, x1, y1, word]` in 0..1 of the page; `figure` is as `mentions.figure_named` returns it. A
    figure `2` with labels `2a` and `2b` covers both; a figure `2b` without a label of its own is figure `2`.
    """
    rows, columns = ink.shape
    page = Box(0, 0, columns, rows)
    words = list(words)
    lines = _lines(words, page)
    labels = _labels(lines, page, ink)
    wanted, labels = _boxes_of(labels, figure)
    if not wanted:
        return None
    drawn, tables = ink.copy(), _tables(words, ink)
    for table in tables:
        table.crop(drawn)[:] = False
    for line in lines:
        line.box.expand(1, page).crop(drawn)[:] = False
    marks = [label.box for label in labels]
    lines = [line for line in lines if line.box in marks or not any(line.box.touches(table) for table in tables)]
    prose = [
        line.box
        for line in lines
        if line.box not in marks
        and not _PART.match(line.text)
        and (_TABLE.match(line.text) or _is_prose(line.box, drawn))
    ] + [table for table in tables if _is_prose(table, drawn)]
    others = [line.box for line in lines if line.box not in prose]
    solid = _add_part_numbers(drawn, [box for box in others if box not in marks])
    below = _labels_are_below(marks, drawn)
    found = []
    for mark in wanted:
        part = _part_of(mark, marks, solid, below)
        side = _side_of(mark, part, drawn, below)
        drawing = _drawing(side, prose, drawn)
        if drawing is not None:
            around = drawing.expand(page.y1 // 50, side)
            near = [box.expand(0, part) for box in others if box.touches(around)]
            found.append(_union([drawing, mark, *near]).expand(page.y1 // 150, part))
    if not found:
        return None
    x0, y0, x1, y1 = _union(found)
    return x0 / columns, y0 / rows, x1 / columns, y1 / rows


# -- text ----------------------------------------------------------------------------------------------------------


def _lines(words: Iterable[Sequence[Any]], page: Box) -> list[Line]:
    """Join words into lines, from left to right. Words outside the page are left out."""
    lines: list[Line] = []
    for x0, y0, x1, y1, word in sorted(words, key=lambda word: word[0]):
        exact = Box(round(x0 * page.x1), round(y0 * page.y1), round(x1 * page.x1), round(y1 * page.y1))
        box = exact.expand(0, page)
        if box.x0 >= box.x1 or box.y0 >= box.y1:  # outside the page
            continue
        for number, line in enumerate(lines):
            if _is_continuation(line.box, box):
                lines[number] = Line(_union([line.box, box]), f"{line.text} {word}")
                break
        else:
            lines.append(Line(box, str(word)))
    return lines


def _is_continuation(line: Box, word: Box) -> bool:
    """Whether a word continues a line: on the same row, with at most a wide space between them."""
    height = min(line.y1 - line.y0, word.y1 - word.y0)
    on_one_row = abs((line.y0 + line.y1) - (word.y0 + word.y1)) < height
    return on_one_row and -height < word.x0 - line.x1 < 1.5 * height


def _labels(lines: list[Line], page: Box, ink: Ink) -> list[Label]:
    """Find the labels of the page's figures: a line with the name only, such as `图2`, or else a caption that begins
    with the name. A line in a list of figures, right below prose, or taller than wide is no label."""
    listed = _list_lines(lines, page, ink)
    bare: list[Label] = []
    captions: list[Label] = []
    for line in lines:
        found = figure_labelled(line.text)
        upright = line.box.x1 - line.box.x0 > line.box.y1 - line.box.y0
        if found is None or not upright or line in listed or _is_amid_text(line, lines, page):
            continue
        figure, rest = found
        if not rest.strip(" .:。"):
            bare.append(Label(line.box, figure))
        elif _is_caption(rest):
            captions.append(Label(line.box, figure))
    return bare + [label for label in captions if label.figure not in {known.figure for known in bare}]


def _list_lines(lines: list[Line], page: Box, ink: Ink) -> list[Line]:
    """The lines of a list of figures, some of them twice. A line with a figure's name belongs to a list if dots or a
    page number follow it, if the list's heading or another line of the list is next to it, or if the line of another
    figure is next to it."""
    drawn = ink.copy()
    for line in lines:
        line.box.expand(1, page).crop(drawn)[:] = False
    named = [(line, found[0]) for line in lines if (found := figure_labelled(line.text))]
    named.sort(key=lambda pair: pair[0].box.y0)
    headings = [line for line in lines if _LIST.fullmatch(line.text.strip(" .:：·"))]
    listed = [line for line, _ in named if _LEADER.search(line.text) or _has_page_number(line, lines, drawn)]
    for line, figure in named:
        above = [one for one, other in named if _number(other) != _number(figure) and _is_next(one, line, drawn)]
        if above or any(_is_next(one, line, drawn) for one in [*headings, *listed]):
            listed += [line, *above]
    for line, _ in reversed(named):
        if any(_is_next(line, one, drawn) for one in listed):
            listed.append(line)
    return listed


def _is_next(upper: Line, lower: Line, drawn: Ink) -> bool:
    """Whether `lower` may be the entry of a list after `upper`: less than four heights of a line below it, aligned with
    it unless `upper` is a heading, and with at most specks drawn between them."""
    height = max(upper.box.y1 - upper.box.y0, lower.box.y1 - lower.box.y0)
    apart = lower.box.y0 - upper.box.y1
    between = Box(min(upper.box.x0, lower.box.x0), upper.box.y1, max(upper.box.x1, lower.box.x1), lower.box.y0)
    aligned = abs(upper.box.x0 - lower.box.x0) < 3 * height or bool(_LIST.match(upper.text))
    if not (-height < apart < 4 * height and lower.box.y0 > upper.box.y0 and aligned):
        return False
    inked = np.any(between.crop(drawn), axis=1).tolist()
    return bool(sum(inked) <= SPECKS * len(inked))


def _has_page_number(line: Line, lines: list[Line], drawn: Ink) -> bool:
    """Whether a caption has a number on its row, in the right part of the page, and nothing is drawn between them."""
    found = figure_labelled(line.text)
    if found is None or not found[1].strip(" .:。"):
        return False
    height = line.box.y1 - line.box.y0
    for other in lines:
        on_one_row = abs((line.box.y0 + line.box.y1) - (other.box.y0 + other.box.y1)) < height
        if on_one_row and other.box.x0 > line.box.x1 and re.fullmatch(r"[\s.\u2026\u00b7]*\d{1,4}", other.text):
            between = Box(line.box.x1, line.box.y0, other.box.x0, line.box.y1)
            return other.box.x1 > 0.7 * drawn.shape[1] and not between.crop(drawn).any()
    return False


def _is_caption(rest: str) -> bool:
    """Whether the text after `Fig. 2` is a caption, as ` Sectional view` or `: 剖视图`, not a sentence, as ` shows` or
    `所示`."""
    if rest[0] in ".:(—" or rest[:2] == " (":
        return True
    text = rest.lstrip()
    chinese = "\u4e00" <= text[0] <= "\u9fff"
    return (chinese and text[0] not in "是为中示所的和与及至到或" and "。" not in text) or (
        rest[0] == " " and text[0].isupper()
    )


def _is_amid_text(line: Line, lines: list[Line], page: Box) -> bool:
    """Whether a line of prose is right above: `see\\nFIG. 2`, broken over two lines, is no label."""
    x0, y0, x1, y1 = line.box
    above = Box(x0, y0 - (y1 - y0) // 2, x1, y0)
    return any(_is_wide(other.box, page.x1) and other.box.touches(above) and other.box.y1 < y1 for other in lines)


def _is_wide(box: Box, columns: int) -> bool:
    """Whether a box covers more than the share WIDE of the page's columns."""
    return box.x1 - box.x0 > WIDE * columns


def _is_prose(box: Box, drawn: Ink) -> bool:
    """Whether a line of text is not part of a drawing. A line in a flow chart has the frame of its box beside it."""
    beside = np.any(drawn[box.y0 : box.y1], axis=0)
    return _is_wide(box, drawn.shape[1]) and int(beside.sum()) < 4


def _boxes_of(labels: list[Label], figure: str) -> tuple[list[Box], list[Label]]:
    """The boxes of a figure's labels, and all labels between which the page is cut.

    If a figure and its parts both have labels, only one kind cuts: those of the parts if one of these parts is wanted,
    else the figure's own.
    """
    whole, named = _number(figure), {label.figure for label in labels}
    exact = [label for label in labels if label.figure == figure]
    wants_part = figure != whole and bool(exact)
    marks = []
    for label in labels:
        number = _number(label.figure)
        is_part = label.figure != number
        if is_part if wants_part and number == whole else not (is_part and number in named):
            marks.append(label)
    others = [label for label in marks if label.figure == whole or _number(label.figure) == figure]
    return [label.box for label in exact or others], marks


def _number(figure: str) -> str:
    """The number of a figure, without the letter of a part: `2` for `2` and for `2a`."""
    return figure.rstrip("abcdefghijklmnopqrstuvwxyz")


# -- ink -----------------------------------------------------------------------------------------------------------


def _tables(words: Iterable[Sequence[Any]], ink: Ink) -> list[Box]:
    """The ruled tables of a page: rules with the same ends, one below the other, with text in several cells and nothing
    else between them."""
    height, width = ink.shape
    by_ends: list[list[Box]] = []
    for rule in _rules(ink):
        for group in by_ends:
            if abs(group[0].x0 - rule.x0) < 0.015 * width and abs(group[0].x1 - rule.x1) < 0.015 * width:
                group.append(rule)
                break
        else:
            by_ends.append([rule])
    places = [
        Box(round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)) for x0, y0, x1, y1, _ in words
    ]
    found = []
    for group in by_ends:
        rows = [_cell_rows(upper, lower, places, ink) for upper, lower in pairwise(group)]
        first = 0
        for last in range(len(rows) + 1):
            if last == len(rows) or rows[last] is None:
                if sum(row or 0 for row in rows[first:last]) >= 2:
                    found.append(_union(group[first : last + 1]))
                first = last + 1
    return found


def _rules(ink: Ink) -> list[Box]:
    """The horizontal rules, and the upper and lower edges of filled areas, in the order in which rules and areas begin
    from the top down."""
    height, width = ink.shape
    edges = np.diff(np.pad(ink.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (rows, starts), stops = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]
    long = stops - starts >= RULE * width
    found: list[Box] = []
    for row, start, stop in zip(rows[long].tolist(), starts[long].tolist(), stops[long].tolist(), strict=True):
        above = next((n for n in range(len(found) - 1, -1, -1) if _is_below(found[n], row, start, stop)), None)
        if above is None:
            found.append(Box(start, row, stop, row + 1))
        else:
            found[above] = found[above]._replace(y1=row + 1)
    thick = max(THICK * height, 3)
    return [
        edge
        for rule in found
        for edge in (
            [rule] if rule.y1 - rule.y0 <= thick else [rule._replace(y1=rule.y0 + 1), rule._replace(y0=rule.y1 - 1)]
        )
    ]


def _is_below(rule: Box, row: int, start: int, stop: int) -> bool:
    """Whether a run of ink is the next row of a rule."""
    return rule.y1 == row and abs(rule.x0 - start) < 4 and abs(rule.x1 - stop) < 4


def _cell_rows(upper: Box, lower: Box, words: list[Box], ink: Ink) -> int | None:
    """The number of rows of text with several cells between two rules; None if the rules are not of one table."""
    x0, x1, y0, y1 = upper.x0, upper.x1, upper.y1, lower.y0
    if y1 - y0 < 3:
        return 0
    rest = Box(x0, y0, x1, y1).crop(ink).copy()
    rest[rest.mean(axis=1) > 0.9] = False  # rows with a filled background
    upright = np.flatnonzero(rest.mean(axis=0) > 0.9)
    for column in upright.tolist():
        rest[:, max(column - 1, 0) : column + 2] = False
    inside = [box for box in words if x0 <= (box.x0 + box.x1) / 2 <= x1 and y0 <= (box.y0 + box.y1) / 2 <= y1]
    for box in inside:
        rest[max(box.y0 - y0 - 1, 0) : box.y1 - y0 + 1, max(box.x0 - x0 - 1, 0) : box.x1 - x0 + 1] = False
    if rest.mean() > 0.005:
        return None
    if not inside:  # an empty row has the table's frame at both sides
        framed = len(upright) and upright[0] < 4 and upright[-1] > x1 - x0 - 5
        return 0 if framed else None
    rows: dict[int, list[Box]] = {}
    for box in sorted(inside):
        size = box.y1 - box.y0
        rows.setdefault((box.y0 + box.y1) // 2 // max(size, 1), []).append(box)
    count = 0
    for row in rows.values():
        for left, right in pairwise(row):
            ruled = ((upright + x0 >= left.x1 - 1) & (upright + x0 <= right.x0 + 1)).any()
            if ruled or right.x0 - left.x1 > left.y1 - left.y0:
                count += 1
                break
    return count


def _labels_are_below(marks: list[Box], drawn: Ink) -> bool:
    """Whether labels are below their figures: at least as many rows have ink above the first label as below the
    last."""
    inked = np.flatnonzero(drawn.any(axis=1))
    first, last = min(mark.y0 for mark in marks), max(mark.y1 for mark in marks)
    return bool((inked < first).sum() >= (inked >= last).sum())


def _add_part_numbers(drawn: Ink, texts: list[Box]) -> Ink:
    """Return the drawing with its part numbers: each text near ink becomes a cross that reaches its leader line.

    Other texts have no ink, so a cut through the page's header, far from all drawings, costs nothing.
    """
    height, width = drawn.shape
    solid = drawn.copy()
    for text in texts:
        x0, y0, x1, y1 = reach = text.expand(height // 100, Box(0, 0, width, height))
        if reach.crop(drawn).any():
            solid[(y0 + y1) // 2, x0:x1] = True
            solid[y0:y1, (x0 + x1) // 2] = True
    return solid


def _part_of(mark: Box, marks: list[Box], ink: Ink, below: bool) -> Box:
    """The part of the page that belongs to one label after cutting it from the others. If labels overlap, the part
    still contains them."""
    part = Box(0, 0, ink.shape[1], ink.shape[0])
    while len(marks) > 1:
        cuts = [*_cuts_across(marks, ink, part, below), *_cuts_down(marks, ink, part)]
        if not cuts:  # labels that overlap
            return part
        _, axis, at = min(cuts)
        if axis == 0:
            part = part._replace(y1=at) if mark.y1 <= at else part._replace(y0=at)
            marks = [other for other in marks if (other.y1 <= at) == (mark.y1 <= at)]
        else:
            part = part._replace(x1=at) if mark.x1 <= at else part._replace(x0=at)
            marks = [other for other in marks if (other.x1 <= at) == (mark.x1 <= at)]
    return part


def _side_of(mark: Box, part: Box, drawn: Ink, below: bool) -> Box:
    """The part of the page on the side of a label on which its figure is. It extends past the label for as many rows as
    the drawing continues beside the label."""
    inked = np.any(part.crop(drawn), axis=1).tolist()
    row = mark.y1 if below else mark.y0 - 1
    step = 1 if below else -1
    while part.y0 <= row < part.y1 and inked[row - part.y0]:
        row += step
    return part._replace(y1=row) if below else part._replace(y0=row + 1)


def _cuts_across(marks: list[Box], ink: Ink, part: Box, below: bool) -> Iterator[tuple[int, int, int]]:
    """Cuts between labels one above the other: (ink crossed, 0, row).

    Of the rows that cross the least ink, a cut takes the one closest to the label whose figure lies away from the cut.
    It leaves at least some of the other figure between itself and the other label.
    """
    for upper, lower in pairwise(sorted(marks, key=lambda mark: mark.y1)):
        end = min(mark.y0 for mark in marks if mark.y1 >= lower.y1)
        if upper.y1 > end:
            continue
        crossed = ink[upper.y1 : end + 1, part.x0 : part.x1].sum(axis=1)
        if not below:
            crossed = crossed[::-1]
        left_over = np.cumsum(crossed[::-1] > 0)[::-1]
        crossed = crossed[left_over >= len(ink) * LEAST]
        if len(crossed):
            step = int(crossed.argmin())
            yield int(crossed[step]), 0, upper.y1 + step if below else end - step


def _cuts_down(marks: list[Box], ink: Ink, part: Box) -> Iterator[tuple[int, int, int]]:
    """Cuts between labels side by side: (ink crossed, 1, column). Each is in the widest gap, because figures are
    farther apart than the parts of one figure; if several gaps are about as wide, in the one nearest to the middle."""
    for left, right in pairwise(sorted(marks, key=lambda mark: mark.x1)):
        end = min(mark.x0 for mark in marks if mark.x1 >= right.x1)
        if left.x1 > end:
            continue
        crossed = ink[part.y0 : part.y1, left.x1 : end + 1].sum(axis=0)
        free = np.flatnonzero(crossed == crossed.min()) + left.x1
        gaps = np.split(free, np.flatnonzero(np.diff(free) > 1) + 1)
        middle = (left.x0 + left.x1 + right.x0 + right.x1) / 4
        widest = max(map(len, gaps))
        nearest = min((gap for gap in gaps if len(gap) > 0.8 * widest), key=lambda gap: np.abs(gap - middle).min())
        yield int(crossed.min()), 1, int(nearest[len(nearest) // 2])


def _drawing(side: Box, prose: list[Box], drawn: Ink) -> Box | None:
    """The drawing in a part of the page: of the stretches between lines of prose, the one with ink in the most rows.
    None if it is too small for a drawing."""
    edges = sorted({side.y0, side.y1, *((box.y0 + box.y1) // 2 for box in prose if box.touches(side))})
    stretches = [side._replace(y0=top, y1=bottom) for top, bottom in pairwise(edges)]
    best = max(stretches, key=lambda box: box.crop(drawn).any(axis=1).sum(), default=side)
    rows, columns = (np.flatnonzero(best.crop(drawn).any(axis=axis)) for axis in (1, 0))
    if len(rows) < drawn.shape[0] * LEAST or len(columns) < drawn.shape[1] * LEAST:
        return None
    return Box(
        best.x0 + int(columns[0]), best.y0 + int(rows[0]), best.x0 + int(columns[-1]) + 1, best.y0 + int(rows[-1]) + 1
    )


def _union(boxes: Sequence[Box]) -> Box:
    """The smallest box that contains all boxes, of which there must be at least one."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return Box(min(x0), min(y0), max(x1), max(y1))
