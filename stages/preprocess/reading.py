"""The text of a page in the order in which a person reads it. Runs in worker processes: keep imports light.

A content stream may place its words in any order, so only their boxes count. Words are joined into segments, which are
pieces of a line without a wide gap. A page is then cut along its white corridors (Breuel 2002, 'Two geometric
algorithms for layout analysis'): what is above a corridor comes first, then its left column, its right column, and what
is below. A table has corridors, too, but its rows are read across. Vertical, rotated and skewed text is turned upright
first; right-to-left text is mirrored.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pymupdf

RULES_VERSION = 2
"""Increase it when the rules change: pages read by earlier rules are then read again."""

Boxes = npt.NDArray[np.float64]
"""Shape (n, 4): x0, y0, x1, y1."""

Places = npt.NDArray[np.int64]

FLAGS = pymupdf.TEXT_PRESERVE_WHITESPACE | pymupdf.TEXT_MEDIABOX_CLIP | pymupdf.TEXT_CID_FOR_UNKNOWN_UNICODE
"""TEXT_PRESERVE_LIGATURES is left out, so that MuPDF spells ligatures out."""

GAP = 0.5
"""Gap between two words that ends a segment, and smallest width of a corridor, in heights of a line. Justified text has
wider gaps, but not one below the other."""

MARK_GAP = 2.5
"""Gap that separates a list's mark from its item, in heights of a line: larger than GAP, so that the two stay one
segment."""

NEAR = 0.1
"""How far beyond a corridor's edge, in heights of a line, a segment may reach."""

MOST_EDGES = 200
"""Largest number of places that are tried for a corridor: a drawing may have thousands of labels."""

LEAST_ROWS = 2
"""Smallest number of segments on either side of a corridor; with fewer, a region is read row by row."""

MANY_ROWS = 8
"""Number of rows from which white space between words counts as a corridor, however narrow: it is no accident."""

WIDE = 0.7
"""Smallest width of a corridor beside fewer than MANY_ROWS rows, in heights of a line."""

PROSE = 2.5
"""Number of words per row from which a column is prose. Cells of a table have fewer."""

FULL = 0.65
"""Share of a column's width that a full row of prose covers at least."""

LONG = 10
"""Smallest length of a line of prose, in heights of a line, for the numbers beside it to count as line numbers."""

ASKEW = math.sin(math.radians(8))
"""Sine of the largest angle between a line of text and the page's edges. Text at a larger angle, such as a watermark,
is not part of the page's lines."""

_RTL = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefe]")
_CJK = re.compile(r"[\u3000-\u9fff\uf900-\ufaff\uff00-\uffef]")
_KANA = re.compile(r"[\u3040-\u30ff]+")
_FORMS = re.compile(r"[\ufb00-\ufb4f\ufb50-\ufdff\ufe70-\ufefe]")
_NUMBER = re.compile(r"[1-9][0-9]{0,3}")
_NUMERIC = re.compile(r"[^\w]*[0-9][0-9.,:/%\u2212-]*[^\w]*")
_MARK = re.compile(r"[\u2022\u2023\u25aa\u25cf\u25e6\u00b7*\u2013\u2014-]|\(?[0-9a-zA-Z]{1,3}[.)]|[0-9]+(\.[0-9]+)+")
"""The mark at the beginning of a list's item or a heading."""
_HYPHENS = "-\u2010\u00ad"


class Word(NamedTuple):
    """A word and its box in 0..1 of the page as it is shown, rotation applied."""

    x0: float
    y0: float
    x1: float
    y1: float
    text: str


@dataclass(frozen=True)
class PageText:
    """What is written on a page."""

    text: str
    """In reading order, on one line."""
    words: list[Word]
    """In reading order."""


class Direction(NamedTuple):
    """In which direction a line runs."""

    turn: int
    """Quarter turns, clockwise; -1: askew."""
    slope: float
    """How far the line then falls, as a share of its length."""


def read_page(page: pymupdf.Page, content: pymupdf.DisplayList | None = None) -> PageText:
    """Return the text of a page and its words, in reading order; text that is askew comes last. A caller that also
    draws the page passes the page's display list as `content`, so that the page is parsed once."""
    # a display list has the page as it is shown: rotated, and in points
    textpage = pymupdf.TextPage((content or page.get_displaylist()).get_textpage(FLAGS))
    found = textpage.extractWORDS()
    if not found:
        return PageText("", [])
    directions = _directions(textpage)
    left, top = textpage.rect.tl
    shown = textpage.rect.width, textpage.rect.height
    reversed_rtl = any(_RTL.search(entry[4]) for entry in found) and _is_visual_order(textpage)
    groups: dict[int, list[Word]] = defaultdict(list)
    slopes: dict[int, list[float]] = defaultdict(list)
    for x0, y0, x1, y1, text, block, line, _ in found:
        plain = _plain_text(text, reversed_rtl)
        if plain:
            turn, slope = directions.get((block, line), UPRIGHT)
            box = (x0 - left) / shown[0], (y0 - top) / shown[1], (x1 - left) / shown[0], (y1 - top) / shown[1]
            groups[turn].append(Word(*box, plain))
            slopes[turn].append(slope)
    texts, words = [], []
    for turn in sorted(groups, key=lambda turn: (turn < 0, -sum(len(word.text) for word in groups[turn]))):
        members = _drop_doubles(groups[turn])
        if turn < 0:
            lines = [" ".join(word.text for word in members)]
        else:
            members, lines = _read_group(members, turn, float(np.median(slopes[turn])), shown)
        texts.append(join_lines(lines))
        words += members
    return PageText(" ".join(filter(None, texts)), words)


# -- what MuPDF finds ----------------------------------------------------------------------------------------------

UPRIGHT = Direction(0, 0.0)


def _directions(textpage: pymupdf.TextPage) -> dict[tuple[int, int], Direction]:
    """The directions of all lines that are not upright, by block and line. A line of vertical writing is a line that
    runs downward: one turn."""
    found = {}
    for block_number, block in enumerate(textpage.extractDICT()["blocks"]):
        for line_number, line in enumerate(block.get("lines", ())):
            across, down = line["dir"]
            if across == 1:
                continue
            if min(abs(across), abs(down)) > ASKEW:
                found[block_number, line_number] = Direction(-1, 0.0)
            elif abs(across) < abs(down):
                found[block_number, line_number] = Direction(1 if down > 0 else 3, -across / down)
            else:
                found[block_number, line_number] = Direction(0 if across > 0 else 2, down / across)
    return found


def _is_visual_order(textpage: pymupdf.TextPage) -> bool:
    """Whether the characters of right-to-left words are stored from left to right, as they are seen."""
    rising = falling = 0
    for block in textpage.extractRAWDICT()["blocks"]:
        for line in block.get("lines", ()):
            across, down = line["dir"]
            characters = [one for span in line["spans"] for one in span["chars"]]
            for left, right in pairwise(characters):
                if _RTL.match(left["c"]) and _RTL.match(right["c"]):
                    (x0, y0), (x1, y1) = left["origin"], right["origin"]
                    step = (x1 - x0) * across + (y1 - y0) * down
                    rising += step > 0
                    falling += step < 0
    return rising > falling


def _plain_text(text: str, reverse: bool) -> str:
    """A word without presentation forms and soft hyphens. A soft hyphen at its end stays, because the word goes on in
    the next line.

    `reverse`: whether right-to-left words are stored from left to right, so that they have to be turned.
    """
    if text.isascii():
        return text
    if _FORMS.search(text):
        text = _FORMS.sub(lambda form: unicodedata.normalize("NFKC", form[0]), text)
    if reverse and _RTL.search(text):
        text = text[::-1]
        text = re.sub(r"[0-9A-Za-z][0-9A-Za-z.,:/%-]*[0-9A-Za-z]", lambda run: run[0][::-1], text)
    return text[:-1].replace("\u00ad", "") + text[-1:]


def _drop_doubles(words: list[Word]) -> list[Word]:
    """Return the words without those that lie on their own copy: some writers print a word twice to make it bold."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, word in enumerate(words):
        places[word.text].append(place)
    doubles = set()
    for same in places.values():
        same.sort(key=lambda place: (words[place].x0, words[place].y0))
        for first, second in pairwise(same):
            one, other = words[first], words[second]
            near = other.x0 - one.x0 < 0.2 * (one.x1 - one.x0)
            if near and abs(other.y0 - one.y0) < 0.2 * (one.y1 - one.y0):
                doubles.add(second)
    return [word for place, word in enumerate(words) if place not in doubles]


# -- lines of words that run in one direction ----------------------------------------------------------------------


def _read_group(words: list[Word], turn: int, slope: float, shown: tuple[float, float]) -> tuple[list[Word], list[str]]:
    """Return words that run in one direction, in reading order, and the texts of their lines.

    `turn` is in quarter turns clockwise, `slope` as in `Direction`, `shown` the page's size in points.
    """
    boxes = _upright_boxes(np.array([word[:4] for word in words]) * [*shown, *shown], turn, shown)
    texts = [word.text for word in words]
    wide = shown[1] if turn % 2 else shown[0]
    if abs(slope) > 0.002:
        across, down = boxes[:, 0::2].mean(axis=1, keepdims=True), boxes[:, 1::2].mean(axis=1, keepdims=True)
        boxes[:, 0::2] += slope * down
        boxes[:, 1::2] -= slope * across
    if turn == 0 and _is_stacked(boxes, texts):
        boxes, wide = _upright_boxes(boxes, 1, shown), shown[1]
    letters = [text for text in texts if any(map(str.isalpha, text))]
    right_to_left = sum(len(text) for text in letters if _RTL.search(text)) * 2 > sum(map(len, letters))
    if right_to_left:
        boxes = np.stack([wide - boxes[:, 2], boxes[:, 1], wide - boxes[:, 0], boxes[:, 3]], axis=1)
    lines = _lines_in_order(boxes, texts)
    if any(map(_RTL.search, letters)):
        lines = [_turn_runs(line, texts, right_to_left) for line in lines]
    places = boxes.tolist()
    return [words[place] for line in lines for place in line], [_line_text(line, places, texts) for line in lines]


def _upright_boxes(boxes: Boxes, turn: int, shown: tuple[float, float]) -> Boxes:
    """Boxes in a frame in which their text runs from left to right and its lines from top to bottom. `turn` is in
    quarter turns clockwise, `shown` the page's size in points."""
    (width, height), (x0, y0, x1, y1) = shown, boxes.T
    if turn == 1:  # runs downward: lines follow each other from right to left
        return np.stack([y0, width - x1, y1, width - x0], axis=1)
    if turn == 2:
        return np.stack([width - x1, height - y1, width - x0, height - y0], axis=1)
    if turn == 3:  # runs upward
        return np.stack([height - y1, x0, height - y0, x1], axis=1)
    return boxes


def _is_stacked(boxes: Boxes, texts: Sequence[str]) -> bool:
    """Whether Chinese or Japanese characters stand one below the other: vertical writing whose characters were placed
    one by one."""
    single = np.array([len(text) == 1 and bool(_CJK.match(text)) for text in texts])
    if single.sum() < 8 or single.sum() < 0.6 * sum(bool(_CJK.search(text)) for text in texts):
        return False
    x0, y0, x1, y1 = boxes[single].T
    size = np.median(np.maximum(x1 - x0, 1e-6))
    across, down = (x0 + x1) / 2, (y0 + y1) / 2
    some = np.linspace(0, len(across) - 1, min(len(across), 200)).astype(int)  # enough, and memory stays small
    below, right = down[None] - down[some, None], across[None] - across[some, None]
    step_down = np.where((np.abs(right) < 0.4 * size) & (below > 0.5 * size), below, np.inf).min(axis=1)
    step_right = np.where((np.abs(below) < 0.4 * size) & (right > 0.5 * size), right, np.inf).min(axis=1)
    return bool((step_down < step_right).mean() > 0.6)


def _lines_in_order(boxes: Boxes, texts: Sequence[str]) -> list[list[int]]:
    """Lines of words, by their places, in reading order. Line numbers, and kana that show how Chinese characters are
    read, come last: they would break the text."""
    height = float(np.median(boxes[:, 3] - boxes[:, 1])) or 1.0
    aside = [*_readings(boxes, texts), *_line_numbers(boxes, texts, height)]
    body = np.setdiff1d(np.arange(len(texts)), aside)
    if not len(body):
        return [[place] for place in aside]
    segments = _segments(boxes, texts, body, height)
    order = _Layout(segments, boxes, texts, height).rows(np.arange(len(segments)))
    lines = [[place for segment in row for place in segments[segment]] for row in order]
    return [*lines, aside] if aside else lines


def _readings(boxes: Boxes, texts: Sequence[str]) -> list[int]:
    """The places of small kana right above larger characters: they show how these are read."""
    kana = [place for place, text in enumerate(texts) if _KANA.fullmatch(text)]
    if not kana:
        return []
    sizes = boxes[:, 3] - boxes[:, 1]
    main = float(np.median([sizes[place] for place, text in enumerate(texts) if _CJK.search(text)]))
    large = boxes[sizes > 0.8 * main]
    found = []
    for place in kana:
        x0, _, x1, y1 = boxes[place]
        over = (large[:, 0] < x1) & (large[:, 2] > x0) & (np.abs(large[:, 1] - y1) < 0.5 * main)
        if sizes[place] < 0.65 * main and over.any():
            found.append(place)
    return found


def _line_numbers(boxes: Boxes, texts: Sequence[str], height: float) -> list[int]:
    """The places of line numbers (5, 10, 15, ... or 1, 2, 3, ...) in a column of their own: between a patent's columns,
    or in a margin."""
    numbers = [place for place, text in enumerate(texts) if _NUMBER.fullmatch(text)]
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    numbers.sort(key=lambda place: middle[place])
    columns: list[list[int]] = []
    for place in numbers:
        if columns and middle[place] - middle[columns[-1][-1]] < 0.6 * height:
            columns[-1].append(place)
        else:
            columns.append([place])
    found = []
    for column in columns:
        run = _counted_run(sorted(column, key=lambda place: boxes[place, 1]), boxes, texts, height)
        if run and _has_own_column(run, boxes, height):
            found += run
    return found


def _counted_run(column: list[int], boxes: Boxes, texts: Sequence[str], height: float) -> list[int]:
    """The places of the longest run of a column's numbers that grow with the lines, at the same distance for each line.
    `column` has the numbers' places from the top down.

    Empty if the run has fewer than 3 numbers (5 if they grow by one), if they are not multiples of their step, or if
    the step is above 10.
    """
    if len(column) < 3:
        return []
    values, tops = np.array([int(texts[place]) for place in column]), boxes[column, 3]
    counted = np.diff(values)
    lines = np.diff(tops) / np.where(counted > 0, counted, np.nan)
    if np.isnan(lines).all():
        return []
    line = float(np.nanmedian(lines))
    if not 0.7 * height < line < 4 * height:
        return []
    alike = np.abs(lines - line) < 0.15 * line
    runs = np.flatnonzero(np.diff(np.r_[False, alike, False].astype(np.int8))).reshape(-1, 2).tolist()
    begun, ended = max(runs, key=lambda run: run[1] - run[0], default=(0, 0))
    if begun == ended:
        return []
    run, values = column[begun : ended + 1], values[begun : ended + 1]
    step = int(np.gcd.reduce(np.diff(values)))
    return run if len(run) >= (5 if step == 1 else 3) and not (values % step).any() and step <= 10 else []


def _has_own_column(run: list[int], boxes: Boxes, height: float) -> bool:
    """Whether numbers have a column of their own beside full lines of text, unlike those of a table or list. `run` has
    their places."""
    (left, top), (right, bottom) = boxes[run, :2].min(axis=0), boxes[run, 2:].max(axis=0)
    others = np.delete(boxes, run, axis=0)
    beside = others[(others[:, 3] > top) & (others[:, 1] < bottom)]
    if not len(beside) or ((beside[:, 0] < right) & (beside[:, 2] > left)).any():
        return False
    for one in beside[beside[:, 0] >= right], beside[beside[:, 2] <= left]:
        if len(one):
            lines = np.round((one[:, 1] + one[:, 3]) / 2 / (0.6 * height)).astype(int)
            inked = np.bincount(lines - lines.min(), weights=one[:, 2] - one[:, 0])
            inked = inked[inked > 0]
            is_full = inked > FULL * (one[:, 2].max() - one[:, 0].min())
            if is_full.mean() > 0.5 and np.median(inked) > LONG * height:
                return True
    return False


def _segments(boxes: Boxes, texts: Sequence[str], places: Places, height: float) -> list[list[int]]:
    """The segments: the places of words, joined from left to right into pieces of a line."""
    is_mark = [bool(_MARK.fullmatch(text)) for text in texts]
    # plain lists: single numbers of an array cost ten times as much
    lefts, tops, rights, bottoms = boxes.T.tolist()
    open_by_band: dict[int, list[list[int]]] = defaultdict(list)
    found: list[list[int]] = []
    for place in places[np.argsort(boxes[places, 0], kind="stable")].tolist():
        left, middle, size = lefts[place], (tops[place] + bottoms[place]) / 2, bottoms[place] - tops[place]
        band = int(middle // height)
        best: list[int] | None = None
        best_apart, best_band = math.inf, band
        for near in (band - 1, band, band + 1):
            segments = open_by_band.get(near)
            if not segments:
                continue
            for segment in segments:
                last = segment[-1]
                gap = left - rights[last]
                own = min(bottoms[last] - tops[last], size)
                most = MARK_GAP if len(segment) == 1 and is_mark[last] else GAP
                apart = abs((tops[last] + bottoms[last]) / 2 - middle)
                if -own < gap < most * max(own, 0.5 * height) and apart < min(0.5 * own, best_apart):
                    best, best_apart, best_band = segment, apart, near
            if rights[segments[0][-1]] < left - 20 * height:  # too far to the left for all that follow
                del segments[0]
        if best is None:
            best = [place]
            found.append(best)
        else:
            open_by_band[best_band].remove(best)
            best.append(place)
        open_by_band[band].append(best)
    return found


# -- order ---------------------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """The rows of one side of a corridor, from the top down. Every field has one number for each row."""

    middle: npt.NDArray[np.float64]
    start: npt.NDArray[np.float64]
    end: npt.NDArray[np.float64]
    covered: npt.NDArray[np.float64]
    """Width of its segments."""
    words: npt.NDArray[np.float64]
    numeric: npt.NDArray[np.float64]
    """How many of the words are numbers."""
    gap: npt.NDArray[np.float64]
    """Mean gap between its words."""


class _Layout:
    """Segments of a page, and their order. A region is an array of the places of segments."""

    def __init__(self, segments: list[list[int]], boxes: Boxes, texts: Sequence[str], height: float) -> None:
        """Measure the segments. `boxes` and `texts` are those of all words, `height` that of a line."""
        first, last = np.array([one[0] for one in segments]), np.array([one[-1] for one in segments])
        starts = np.cumsum([0, *map(len, segments[:-1])])
        flat = boxes[[place for one in segments for place in one]]
        self.x0, self.x1 = boxes[first, 0], np.maximum.reduceat(flat[:, 2], starts)
        self.y0, self.y1 = np.minimum.reduceat(flat[:, 1], starts), np.maximum.reduceat(flat[:, 3], starts)
        self.x1 = np.maximum(self.x1, boxes[last, 2])
        self.middle = (self.y0 + self.y1) / 2
        self.inked = np.add.reduceat(flat[:, 2] - flat[:, 0], starts)
        self.words = np.array([_words_in(one, boxes, texts, height) for one in segments])
        self.numeric = np.array([sum(bool(_NUMERIC.fullmatch(texts[place])) for place in one) for one in segments])
        self.height = height

    def rows(self, members: Places) -> Iterator[list[int]]:
        """The rows of a region in reading order, each as the places of its segments."""
        if len(members) > 2 * LEAST_ROWS - 1:
            parts = self._columns(members[np.argsort(self.middle[members], kind="stable")])
            if parts is not None:
                for part in parts:
                    if len(part):
                        yield from self.rows(part)
                return
        yield from self._cells(list(self._lines(members)))

    def _columns(self, order: Places) -> list[Places] | None:
        """The parts of a region around its tallest corridor between columns: above, left, right and below. None if it
        has no columns. `order` has the region's segments from the top down."""
        starts = _row_starts(self.middle[order], 0.3 * self.height)
        row_of = np.repeat(np.arange(len(starts)), np.diff([*starts, len(order)]))
        order = order[np.lexsort((self.x0[order], row_of))]  # of a skewed scan, a row's middles differ
        x0, x1 = self.x0[order], self.x1[order]
        # the left ends of a column's lines are below each other; right ends, too, beside labels that are scattered
        edges = np.concatenate(
            [_common_ends(x0, 0.3 * self.height, 2), _common_ends(x1, 0.1 * self.height, 5) + GAP * self.height]
        )
        left_of = x1[None] <= edges[:, None] - (GAP - NEAR / 2) * self.height
        right_of = x0[None] >= edges[:, None] - NEAR * self.height
        free = np.logical_and.reduceat(left_of | right_of, starts, axis=1)  # a segment across bars its whole row
        free = (free & ~self._are_tabular(np.split(order, starts[1:]))[None])[:, row_of]
        for start, stop, row in _stretches(free, left_of, right_of):
            inside, left = order[start:stop], left_of[row, start:stop]
            if self._are_columns(inside[left], inside[~left], float(x1.max())):
                first, last = self._trim_running_heads(order, start, stop)
                inside, left = order[first:last], left_of[row, first:last]
                return [order[:first], inside[left], inside[~left], order[last:]]
        return None

    def _are_tabular(self, rows: list[Places]) -> npt.NDArray[np.bool_]:
        """For each row, whether it is like a table's: three or more short pieces far apart, in a run of at least three
        such rows."""
        found = np.zeros(len(rows), bool)
        members = np.concatenate(rows)
        width = self.x1[members].max() - self.x0[members].min()
        tabular = [self._is_tabular(row, width) for row in rows]
        changes = np.flatnonzero(np.diff(np.r_[False, tabular, False].astype(np.int8)))
        for begun, ended in changes.reshape(-1, 2):
            if ended - begun >= 3:
                found[begun:ended] = True
        return found

    def _is_tabular(self, row: Places, width: float) -> bool:
        """Whether a row has three or more short pieces far apart. `width` is that of the region."""
        if len(row) < 3:
            return False
        row = row[np.argsort(self.x0[row])]
        sizes, gaps = self.x1[row] - self.x0[row], self.x0[row[1:]] - self.x1[row[:-1]]
        extent = self.x1[row[-1]] - self.x0[row[0]]
        return bool(sizes.max() < 0.35 * width and sizes.sum() < 0.7 * extent and gaps.min() > 0.9 * self.height)

    def _are_columns(self, left: Places, right: Places, edge: float) -> bool:
        """Whether the sides of a corridor are read one after the other, and not as rows of a table. `edge` is where the
        right side's text may end."""
        top = max(self.middle[left[0]], self.middle[right[0]])
        bottom = min(self.middle[left[-1]], self.middle[right[-1]])
        corridor = self.x0[right].min() - self.x1[left].max()
        few = min(len(left), len(right)) < MANY_ROWS
        if bottom - top < 0.5 * self.height or (few and corridor < WIDE * self.height):
            return False
        sides = self._side(left), self._side(right)
        width = sides[1].start.min() - sides[0].start.min(), edge - sides[1].start.min()
        words = [float(side.words.mean()) for side in sides]
        full = [float((side.covered > FULL * w).mean()) > 0.4 for side, w in zip(sides, width, strict=True)]
        numeric = any(side.numeric.sum() > 0.5 * side.words.sum() for side in sides)
        beside = [
            side.middle[(side.middle > top - 0.5 * self.height) & (side.middle < bottom + 0.5 * self.height)]
            for side in sides
        ]
        fewer, more = sorted(beside, key=len)
        if not len(fewer):
            return False
        aligned = (np.abs(fewer[:, None] - more[None]).min(axis=1) < 0.2 * self.height).mean()
        if aligned < 0.75 or any(map(self._is_scattered, sides)):  # no rows of one table
            typical_words = [float(np.median(side.words)) for side in sides]
            prose = [many >= (PROSE if is_full else 4) for many, is_full in zip(typical_words, full, strict=True)]
            return len(fewer) > 2 and any(prose)
        if min(words) < PROSE or numeric:
            return False
        typical = float(np.median(np.concatenate([side.gap for side in sides])))
        if len(fewer) < MANY_ROWS and corridor < 1.5 * typical:
            return False
        tight = len(fewer) > 1 and np.median(np.diff(fewer)) < 1.4 * self.height
        return all(full) or bool(min(words) >= 4 and tight)

    def _is_scattered(self, side: _Side) -> bool:
        """Whether the rows begin and end anywhere, as a drawing's labels do. Those of a table or column do not."""
        near = 0.3 * self.height
        shares = [(np.abs(ends[:, None] - ends[None]) < near).mean(axis=1).max() for ends in (side.start, side.end)]
        return len(side.start) > 3 and max(shares) < 0.5

    def _side(self, members: Places) -> _Side:
        """The rows of one side of a corridor. `members` has its segments from the top down."""
        rows = _row_starts(self.middle[members], 0.5 * self.height)
        start, end = np.minimum.reduceat(self.x0[members], rows), np.maximum.reduceat(self.x1[members], rows)
        words = np.add.reduceat(self.words[members], rows)
        inked = np.add.reduceat(self.inked[members], rows)
        return _Side(
            self.middle[members][rows],
            start,
            end,
            np.add.reduceat(self.x1[members] - self.x0[members], rows),
            words,
            np.add.reduceat(self.numeric[members], rows),
            np.maximum(end - start - inked, 0) / np.maximum(words - 1, 1),
        )

    def _trim_running_heads(self, order: Places, start: int, stop: int) -> tuple[int, int]:
        """Return the first and last place (the latter exclusive) of a corridor's segments, without a running head or
        foot that stands well apart from the columns."""
        rows = np.arange(start, stop)
        tops, bottoms = self.y0[order[rows]], self.y1[order[rows]]
        first = tops < tops.min() + 0.7 * self.height
        last = bottoms > bottoms.max() - 0.7 * self.height
        apart = 1.2 * self.height
        begun, ended = start, stop
        if first.sum() <= 3 and (~first).sum() > 4 and tops[~first].min() - bottoms[first].max() > apart:
            begun = int(rows[first].max()) + 1
        if last.sum() <= 3 and (~last).sum() > 4 and tops[last].min() - bottoms[~last].max() > apart:
            ended = int(rows[last].min())
        return (begun, ended) if begun < ended else (start, stop)

    def _lines(self, members: Places) -> Iterator[list[int]]:
        """The rows of a region without columns, from the top down."""
        row: list[int] = []
        top = bottom = 0.0
        for place in members[np.argsort(self.middle[members], kind="stable")].tolist():
            overlap = min(bottom, self.y1[place]) - max(top, self.y0[place])
            if row and overlap > 0.5 * min(bottom - top, self.y1[place] - self.y0[place]):
                row.append(place)
                continue
            if row:
                yield sorted(row, key=lambda one: self.x0[one])
            row, top, bottom = [place], self.y0[place], self.y1[place]
        if row:
            yield sorted(row, key=lambda one: self.x0[one])

    def _cells(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """The rows of a region in reading order. A table's cells of several lines are read cell by cell: the rows of
        such a table are farther apart than the lines in a cell."""
        middles = np.array([self.middle[row].mean() for row in rows])
        steps = np.diff(middles)
        if len(steps) < 3:
            yield from rows
            return
        wide = 1.25 * np.percentile(steps, 20)
        bands = np.split(np.arange(len(rows)), np.flatnonzero(steps > wide) + 1)
        for band in bands:
            lines = [rows[place] for place in band]
            yield from self._cells_of(lines) if len(bands) > 2 and 1 < len(lines) <= 8 else lines

    def _are_labels(self, lines: list[list[int]]) -> bool:
        """Whether these are two lines in different sizes, as in a form with labels above what is filled in."""
        sizes = [float(np.median(self.y1[line] - self.y0[line])) for line in lines]
        return len(lines) == 2 and max(sizes) > 1.15 * min(sizes)

    def _cells_of(self, lines: list[list[int]]) -> list[list[int]]:
        """Return the lines of one row of a table, cell by cell; the lines unchanged if they are not such a row."""
        members = np.array([place for line in lines for place in line])
        members = members[np.argsort(self.x0[members])]
        ends = np.maximum.accumulate(self.x1[members])
        begins = np.flatnonzero(np.r_[True, self.x0[members][1:] > ends[:-1] + self.height])
        column_of = dict(zip(members.tolist(), np.searchsorted(begins, np.arange(len(members)), "right"), strict=True))
        columns = range(1, len(begins) + 1)
        # the number of lines of each cell; a whole cell fills the row's first lines without a gap
        filled = [[any(column_of[place] == column for place in line) for line in lines] for column in columns]
        counts = [sum(one) for one in filled]
        is_whole = all(all(one[:count]) for one, count in zip(filled, counts, strict=True))
        if len(begins) < 2 or not is_whole or (min(counts) == len(lines) and not self._are_labels(lines)):
            return lines
        cells = [[[place for place in line if column_of[place] == column] for line in lines] for column in columns]
        return [line for cell in cells for line in cell if line]


def _words_in(segment: list[int], boxes: Boxes, texts: Sequence[str], height: float) -> float:
    """The number of words in a segment. Pieces that touch are one word, and each Chinese or Japanese character is half
    a word."""
    count = characters = 0
    right = -math.inf
    for place in segment:
        text = texts[place]
        found = 0 if text.isascii() else len(_CJK.findall(text))
        characters += found
        count += not found and boxes[place, 0] - right > NEAR * height
        right = boxes[place, 2]
    return count + characters / 2


def _row_starts(middles: npt.NDArray[np.float64], most: float) -> Places:
    """The places at which rows begin among segments sorted from the top down. A row's segments are within `most` of its
    first. `middles` has the segments' middles."""
    found, first = [], -math.inf
    for place, middle in enumerate(middles.tolist()):
        if middle - first > most:
            found.append(place)
            first = middle
    return np.array(found)


def _common_ends(values: npt.NDArray[np.float64], near: float, least: int) -> npt.NDArray[np.float64]:
    """The coordinates that have at least `least` of the values within `near`, those with the most values first; at most
    MOST_EDGES. `values` has the left or right ends of segments."""
    values = np.sort(values)
    places = np.unique(np.round(values, 1))
    counts = np.searchsorted(values, places + near) - np.searchsorted(values, places - near)
    order = np.argsort(-counts, kind="stable")[:MOST_EDGES]
    return places[order[counts[order] >= least]]


def _stretches(free: Any, left_of: Any, right_of: Any) -> list[list[int]]:
    """Stretches of segments that do not cross an edge, as start, stop and the edge's row, those with the most segments
    on both sides first; at most MOST_EDGES. All three arrays have the shape (edges, segments)."""
    changes = np.diff(np.pad(free.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (rows, starts), stops = np.nonzero(changes == 1), np.nonzero(changes == -1)[1]
    sums = [np.pad(side.cumsum(axis=1, dtype=np.int32), ((0, 0), (1, 0))) for side in (left_of, right_of)]
    lefts, rights = (one[rows, stops] - one[rows, starts] for one in sums)
    fewer = np.minimum(lefts, rights)
    # edges beside each other often part the segments in the same way
    size = free.shape[1] + 1
    _, first = np.unique((starts * size + stops) * size + lefts, return_index=True)
    first = first[fewer[first] >= LEAST_ROWS]
    best = first[np.lexsort((stops[first], starts[first], fewer[first]))[::-1]][:MOST_EDGES]
    found: list[list[int]] = np.stack([starts, stops, rows], axis=1)[best].tolist()
    return found


# -- lines ---------------------------------------------------------------------------------------------------------


def _turn_runs(line: list[int], texts: Sequence[str], right_to_left: bool) -> list[int]:
    """Return a line in which each run of words of the other direction, such as English words in Hebrew text, is in its
    own order.

    A number belongs to a run if it is between words of the run, else to the line.
    """
    own = [_direction(texts[place]) for place in line]
    found: list[int] = []
    at = 0
    while at < len(line):
        end = at + 1
        if own[at] == -_sign(right_to_left):
            while end < len(line) and own[end] != _sign(right_to_left):
                end += 1
            while own[end - 1] == 0:
                end -= 1
        found += reversed(line[at:end])
        at = end
    return found


def _sign(right_to_left: bool) -> int:
    """The direction of a line as in `_direction`: -1 if it runs to the left, else 1."""
    return -1 if right_to_left else 1


def _direction(text: str) -> int:
    """The direction of a word: 1 if it runs to the right, -1 if it runs to the left, and 0 if it has no letters, such
    as a number."""
    return -1 if _RTL.search(text) else int(any(map(str.isalpha, text)))


def _line_text(line: list[int], boxes: list[list[float]], texts: Sequence[str]) -> str:
    """A line's text. Pieces that touch are one word, and between two Chinese or Japanese characters there is a space
    only if there is a wide gap."""
    parts: list[str] = []
    for number, place in enumerate(line):
        if number:
            last = line[number - 1]
            (_, top, right, bottom), (left, own_top, _, own_bottom) = boxes[last], boxes[place]
            size, gap = min(bottom - top, own_bottom - own_top), left - right
            chinese = _CJK.match(texts[place][0]) and _CJK.match(texts[last][-1])
            near = -0.5 * size < gap < (0.4 if chinese else 0.08) * size
            parts.append("" if near else " ")
        parts.append(texts[place])
    return "".join(parts)


def join_lines(lines: Sequence[str]) -> str:
    """Return lines as flowing text: a word that a hyphen breaks at a line's end is made whole, and Chinese or Japanese
    lines are joined without a space.

    A hyphen stays between digits, before a capital letter, and if the word occurs elsewhere in the lines with the
    hyphen but not without it.
    """
    lines = [line.strip() for line in lines if line.strip()]
    inside = Counter(word.strip(".,;:()\"'") for line in lines for word in line.split()[:-1])
    parts: list[str] = []
    for line in lines:
        last = parts[-1] if parts else ""
        if not last:
            parts.append(line)
        elif last[-1] in _HYPHENS and _is_continued(last, line, inside):
            parts[-1] = last[:-1]
            parts.append(line)
        elif last[-1] == "-" and re.search(r"\w-$", last) and line[0].isalnum():
            parts.append(line)
        else:
            parts[-1] = last.rstrip("\u00ad")
            chinese = last and _CJK.match(last[-1]) and _CJK.match(line[0])
            parts += ["" if chinese else " ", line]
    return " ".join("".join(parts).replace("\u00ad", "").split())


def _is_continued(text: str, line: str, inside: Counter[str]) -> bool:
    """Whether the word at the end of a text goes on in the next line without its hyphen."""
    if text[-1] == "\u00ad":
        return True
    begun, rest = re.search(r"(\w*)[-\u2010]$", text), re.match(r"\w+", line)
    if begun is None or rest is None or not begun[1] or not begun[1][-1].isalpha() or not rest[0][0].islower():
        return False
    return not inside[f"{begun[1]}-{rest[0]}"] or bool(inside[begun[1] + rest[0]])
