"""The text of a page in the order in which a person reads it. Runs in worker processes: keep imports light.

A content stream may place its words in any order, so that only their boxes count. Words are joined to segments, pieces
of a line without a wide gap. A page is then cut along its white corridors (Breuel 2002, 'Two geometric algorithms for
layout analysis'): what lies above a corridor comes first, then its left column, its right column, and what lies below.
Vertical and rotated text is turned upright first; right-to-left text is mirrored.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pymupdf

Boxes = npt.NDArray[np.float64]
"""Shape (n, 4): x0, y0, x1, y1."""

FLAGS = pymupdf.TEXT_PRESERVE_WHITESPACE | pymupdf.TEXT_MEDIABOX_CLIP | pymupdf.TEXT_CID_FOR_UNKNOWN_UNICODE
"""Without TEXT_PRESERVE_LIGATURES: MuPDF spells them out."""

WIDE_GAP = 0.75
"""Gap between two words, in heights of a line, that ends a segment: justified text has gaps of up to about half."""

CORRIDOR = 0.5
"""Least width of a corridor between columns, in heights of a line."""

LEAST_LINES = 3
"""On both sides of a corridor: fewer are read row by row."""

NEAR = 0.1
"""How far beyond a corridor's edge, in heights of a line, a segment may reach."""

PROSE = 2.5
"""Words a line from which on a column is prose, read before the column beside it. Cells of a table have fewer."""

LOOSE = 1.7
"""Distance between lines, in heights of a line, from which on aligned lines on both sides are rows of a table."""

_RTL = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefe]")
_CJK = re.compile(r"[\u3000-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")
_FORMS = re.compile(r"[\ufb00-\ufb4f\ufb50-\ufdff\ufe70-\ufefe]")
_NUMBER = re.compile(r"[1-9][0-9]{0,3}")
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
    """In no particular order."""


def read_page(page: pymupdf.Page) -> PageText:
    """The text of a page and its words."""
    textpage = page.get_textpage(flags=FLAGS)
    found = page.get_text("words", textpage=textpage)
    if not found:
        return PageText("", [])
    directions = _directions(page, textpage)
    turns = (page.rotation // 90) % 4
    width, height = textpage.rect.width, textpage.rect.height
    shown = (height, width) if turns % 2 else (width, height)
    groups: dict[int, list[Word]] = defaultdict(list)
    words = []
    reversed_rtl = any(map(_RTL.search, (entry[4] for entry in found))) and _is_visual_order(page, textpage)
    for x0, y0, x1, y1, text, block, line, _ in found:
        box = _turned((x0 / width, y0 / height, x1 / width, y1 / height), turns)
        word = Word(*box, _plain(text, reversed_rtl))
        if not word.text:
            continue
        words.append(word)
        groups[(directions.get((block, line), 0) + turns) % 4].append(word)
    parts = []
    for turn, members in sorted(groups.items(), key=lambda pair: -sum(len(word.text) for word in pair[1])):
        parts.append(_text_of_group(members, turn, shown))
    return PageText(" ".join(filter(None, parts)), words)


# -- what MuPDF finds ----------------------------------------------------------------------------------------------


def _directions(page: pymupdf.Page, textpage: Any) -> dict[tuple[int, int], int]:
    """The quarter turns, clockwise, of every line that is not upright, by block and line. A line of vertical writing
    is a line that runs downward: one turn."""
    found = {}
    for block_number, block in enumerate(page.get_text("dict", textpage=textpage, sort=False)["blocks"]):
        for line_number, line in enumerate(block.get("lines", ())):
            across, down = line["dir"]
            if abs(across) < abs(down):
                found[block_number, line_number] = 1 if down > 0 else 3
            elif across < 0:
                found[block_number, line_number] = 2
    return found


def _turned(box: tuple[float, float, float, float], turns: int) -> tuple[float, float, float, float]:
    """A box in 0..1 of a page, on the page after quarter turns clockwise."""
    for _ in range(turns):
        x0, y0, x1, y1 = box
        box = (1 - y1, x0, 1 - y0, x1)
    return box


def _is_visual_order(page: pymupdf.Page, textpage: Any) -> bool:
    """Whether the characters of right-to-left words come from left to right."""
    rising = falling = 0
    for block in page.get_text("rawdict", textpage=textpage)["blocks"]:
        for line in block.get("lines", ()):
            characters = [one for span in line["spans"] for one in span["chars"]]
            for left, right in pairwise(characters):
                if _RTL.match(left["c"]) and _RTL.match(right["c"]):
                    rising += right["origin"][0] > left["origin"][0]
                    falling += right["origin"][0] < left["origin"][0]
    return rising > falling


def _plain(text: str, reverse: bool) -> str:
    """A word without presentation forms and soft hyphens, but for one at its end, where the word goes on."""
    if _FORMS.search(text):
        text = _FORMS.sub(lambda form: unicodedata.normalize("NFKC", form[0]), text)
    if reverse and _RTL.search(text):
        text = text[::-1]
        text = re.sub(r"[0-9A-Za-z][0-9A-Za-z.,:/%-]*[0-9A-Za-z]", lambda run: run[0][::-1], text)
    return text[:-1].replace("\u00ad", "") + text[-1:] if text else text


# -- order ---------------------------------------------------------------------------------------------------------


def _text_of_group(words: list[Word], turn: int, shown: tuple[float, float]) -> str:
    """The text of words that run in one direction. `turn` is in quarter turns clockwise, `shown` the page's size."""
    boxes = _upright(np.array([word[:4] for word in words]) * [*shown, *shown], turn, shown)
    texts = [word.text for word in words]
    sideways = (shown[1], shown[0]) if turn % 2 else shown
    if turn == 0 and _is_stacked(boxes, texts):
        boxes, sideways = _upright(boxes, 1, shown), (shown[1], shown[0])
    right_to_left = sum(len(t) for t in texts if _RTL.search(t)) * 2 > sum(map(len, texts))
    if right_to_left:
        boxes = np.stack([sideways[0] - boxes[:, 2], boxes[:, 1], sideways[0] - boxes[:, 0], boxes[:, 3]], axis=1)
    lines = _lines_in_order(boxes, texts)
    if right_to_left:
        lines = [_with_left_to_right_runs(line, texts) for line in lines]
    places = boxes.tolist()
    return join_lines([_joined(line, places, texts) for line in lines])


def _upright(boxes: Boxes, turn: int, shown: tuple[float, float]) -> Boxes:
    """Boxes in a frame in which their text runs from left to right and its lines from top to bottom."""
    (width, height), (x0, y0, x1, y1) = shown, boxes.T
    if turn == 1:  # runs downward: lines follow each other from right to left
        return np.stack([y0, width - x1, y1, width - x0], axis=1)
    if turn == 2:
        return np.stack([width - x1, height - y1, width - x0, height - y0], axis=1)
    if turn == 3:  # runs upward
        return np.stack([height - y1, x0, height - y0, x1], axis=1)
    return boxes


def _is_stacked(boxes: Boxes, texts: Sequence[str]) -> bool:
    """Whether Chinese or Japanese characters stand one below the other: vertical writing that was placed one by one."""
    single = np.array([len(text) == 1 and bool(_CJK.match(text)) for text in texts])
    if single.sum() < 8 or single.sum() < 0.6 * sum(bool(_CJK.search(text)) for text in texts):
        return False
    x0, y0, x1, y1 = boxes[single].T
    size = np.median(np.maximum(x1 - x0, 1e-6))
    across, down = (x0 + x1) / 2, (y0 + y1) / 2
    near_x = np.abs(across[:, None] - across[None]) < 0.4 * size
    near_y = np.abs(down[:, None] - down[None]) < 0.4 * size
    below, right = down[None] - down[:, None], across[None] - across[:, None]
    step_down = np.where(near_x & (below > 0.5 * size), below, np.inf).min(axis=1)
    step_right = np.where(near_y & (right > 0.5 * size), right, np.inf).min(axis=1)
    return bool((step_down < step_right).mean() > 0.6)


def _lines_in_order(boxes: Boxes, texts: Sequence[str]) -> list[list[int]]:
    """Lines of words, by their places, in reading order."""
    height = float(np.median(boxes[:, 3] - boxes[:, 1])) or 1.0
    segments = _segments(boxes, height)
    frame = np.array(
        [
            [boxes[one, 0].min(), boxes[one, 1].min(), boxes[one, 2].max(), boxes[one, 3].max()]
            for one in map(list, segments)
        ]
    )
    weights = np.array([sum(map(_weight, (texts[place] for place in one))) for one in segments])
    single = [texts[one[0]] if len(one) == 1 else "" for one in segments]
    numbers = np.array([int(text) if _NUMBER.fullmatch(text) else 0 for text in single])
    lines = []
    for row in _rows_in_order(np.arange(len(segments)), frame, weights, numbers, height):
        lines.append([place for segment in row for place in segments[segment]])
    return lines


def _weight(text: str) -> float:
    """A text in words: of Chinese and Japanese, two characters are about one."""
    characters = len(_CJK.findall(text))
    return characters / 2 if characters else 1.0


def _segments(boxes: Boxes, height: float) -> list[list[int]]:
    """Words joined from left to right to pieces of a line."""
    # plain lists: single numbers of an array cost ten times as much
    lefts, tops, rights, bottoms = boxes.T.tolist()
    open_by_band: dict[int, list[list[int]]] = defaultdict(list)
    found: list[list[int]] = []
    for place in np.argsort(boxes[:, 0], kind="stable").tolist():
        middle, size = (tops[place] + bottoms[place]) / 2, bottoms[place] - tops[place]
        band = int(middle // height)
        best: tuple[float, list[int], int] | None = None
        for near in (band - 1, band, band + 1):
            for segment in open_by_band[near]:
                last = segment[-1]
                apart = abs((tops[last] + bottoms[last]) / 2 - middle)
                own = min(bottoms[last] - tops[last], size)
                gap = lefts[place] - rights[last]
                fits = apart < 0.5 * own and -own < gap < WIDE_GAP * max(own, 0.5 * height)
                if fits and (best is None or apart < best[0]):
                    best = (apart, segment, near)
        if best is None:
            segment = [place]
            found.append(segment)
        else:
            segment = best[1]
            open_by_band[best[2]].remove(segment)
            segment.append(place)
        open_by_band[band].append(segment)
    return found


def _rows_in_order(
    members: npt.NDArray[np.int64], frame: Boxes, weights: Any, numbers: Any, height: float
) -> Iterable[list[int]]:
    """Rows of segments in reading order."""
    if len(members) > 1:
        margin = _line_numbers(members, frame, numbers)
        if margin is not None:
            rest = np.setdiff1d(members, margin)
            yield from _rows_in_order(rest, frame, weights, numbers, height)
            yield from ([int(one)] for one in margin)
            return
        cut = _best_corridor(members, frame, weights, height)
        if cut is not None:
            for part in cut:
                if len(part):
                    yield from _rows_in_order(part, frame, weights, numbers, height)
            return
    yield from _rows(members, frame)


def _line_numbers(members: Any, frame: Boxes, numbers: Any) -> Any:
    """Line numbers (5, 10, 15, ...) in a column of their own, as between the columns of a patent; None without any."""
    column = members[numbers[members] > 0]
    if not 3 <= len(column) < len(members) / 2:
        return None
    centre = (frame[column, 0] + frame[column, 2]) / 2
    size = np.median(frame[column, 3] - frame[column, 1])
    column = column[np.abs(centre - np.median(centre)) < size]
    column = column[np.argsort(frame[column, 1])]
    if len(column) < 3 or len(np.unique(np.diff(numbers[column]))) > 1 or numbers[column][1] <= numbers[column][0]:
        return None
    left, right = frame[column, 0].min(), frame[column, 2].max()
    others = np.setdiff1d(members, column)
    top, bottom = frame[column, 1].min(), frame[column, 3].max()
    within = others[(frame[others, 3] > top) & (frame[others, 1] < bottom)]
    crossed = (frame[within, 0] < right) & (frame[within, 2] > left)
    return column if not crossed.any() and len(within) >= len(column) else None


def _best_corridor(members: Any, frame: Boxes, weights: Any, height: float) -> list[Any] | None:
    """The parts of a region that its tallest corridor leaves, in reading order; None where it has no columns."""
    order = members[np.lexsort((frame[members, 0], (frame[members, 1] + frame[members, 3]) / 2))]
    x0, y0, x1, y1 = frame[order].T
    edges = np.unique(np.round(x1))
    left_of = x1[None] <= edges[:, None] + NEAR * height
    right_of = x0[None] >= edges[:, None] + CORRIDOR * height
    best: tuple[int, int, int, float] | None = None
    for score, start, stop, row in sorted(_stretches(left_of, right_of), reverse=True):
        inside = slice(start, stop)
        sides = left_of[row, inside], right_of[row, inside]
        if _are_columns(x0[inside], y0[inside], y1[inside], *sides, weights[order[inside]], height):
            best = (score, start, stop, float(edges[row]))
            break
    if best is None:
        return None
    _, start, stop, edge = best
    start, stop = _without_running_heads(start, stop, y0, y1, x1 <= edge + NEAR * height, height)
    inside = order[start:stop]
    left = frame[inside, 2] <= edge + NEAR * height
    return [order[:start], inside[left], inside[~left], order[stop:]]


def _stretches(left_of: Any, right_of: Any) -> list[tuple[int, int, int, int]]:
    """Stretches of segments that no candidate edge crosses: how many are on the side with fewer, start, stop, and the
    edge's place."""
    found = []
    free = left_of | right_of
    changes = np.diff(np.pad(free.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    begun, ended = np.nonzero(changes == 1), np.nonzero(changes == -1)
    lefts, rights = (np.pad(side.cumsum(axis=1), ((0, 0), (1, 0))) for side in (left_of, right_of))
    rows, starts, stops = begun[0], begun[1], ended[1]
    fewer = np.minimum(lefts[rows, stops] - lefts[rows, starts], rights[rows, stops] - rights[rows, starts])
    for place in np.flatnonzero(fewer >= LEAST_LINES):
        found.append((int(fewer[place]), int(starts[place]), int(stops[place]), int(rows[place])))
    return found


def _are_columns(x0: Any, y0: Any, y1: Any, left: Any, right: Any, weights: Any, height: float) -> bool:
    """Whether both sides of a corridor are prose that is read one after the other, not rows of a table."""
    overlap = min(y1[left].max(), y1[right].max()) - max(y0[left].min(), y0[right].min())
    if overlap < 1.5 * height:
        return False
    for side in (left, right):
        rows = len(np.unique(np.round((y0[side] + y1[side]) / 2 / (0.6 * height))))
        if weights[side].sum() / rows < PROSE:
            return False
    # lines of a column begin below each other; what follows a wide gap in justified lines does not
    x, top, bottom = x0[right], y0[right], y1[right]
    beside = np.minimum(bottom[:, None], bottom[None]) - np.maximum(top[:, None], top[None]) > 0.3 * height
    first = ~(beside & (x[None] < x[:, None])).any(axis=1)
    begin = np.abs(x[first] - np.median(x[first])) < 0.5 * height
    if begin.sum() < 3 or begin.mean() < 0.6:
        return False
    middle_left, middle_right = ((y0[side] + y1[side]) / 2 for side in (left, right))
    aligned = (np.abs(middle_left[:, None] - middle_right[None]).min(axis=1) < 0.25 * height).mean() > 0.8
    steps = np.diff(np.unique(np.round(np.concatenate([middle_left, middle_right]) / (0.3 * height)))) * 0.3
    return not (aligned and len(steps) and np.median(steps) > LOOSE)


def _without_running_heads(start: int, stop: int, y0: Any, y1: Any, left: Any, height: float) -> tuple[int, int]:
    """The corridor's rows without a head or foot of one row that stands well apart from the columns."""
    rows = list(range(start, stop))
    tops, bottoms = y0[rows], y1[rows]
    first = [row for row in rows if y0[row] < tops.min() + 0.7 * height]
    rest = [row for row in rows if row not in first]
    if rest and len(first) <= 3 and y0[rest].min() - y1[first].max() > 1.2 * height and len(rest) > 4:
        start = max(first) + 1
    last = [row for row in rows if y1[row] > bottoms.max() - 0.7 * height]
    rest = [row for row in rows if row not in last]
    if rest and len(last) <= 3 and y0[last].min() - y1[rest].max() > 1.2 * height and len(rest) > 4:
        stop = min(last)
    return (start, stop) if start < stop else (rows[0], rows[-1] + 1)


def _rows(members: Any, frame: Boxes) -> Iterable[list[int]]:
    """Segments of a region without columns, row by row."""
    middle = (frame[:, 1] + frame[:, 3]) / 2
    row: list[int] = []
    top = bottom = 0.0
    for place in map(int, members[np.argsort(middle[members], kind="stable")]):
        overlap = min(bottom, frame[place, 3]) - max(top, frame[place, 1])
        if row and overlap > 0.5 * min(bottom - top, frame[place, 3] - frame[place, 1]):
            row.append(place)
            continue
        if row:
            yield sorted(row, key=lambda one: frame[one, 0])
        row, top, bottom = [place], frame[place, 1], frame[place, 3]
    if row:
        yield sorted(row, key=lambda one: frame[one, 0])


# -- lines ---------------------------------------------------------------------------------------------------------


def _with_left_to_right_runs(line: list[int], texts: Sequence[str]) -> list[int]:
    """A right-to-left line whose runs of other words, such as English ones, are in their own order."""
    found: list[int] = []
    run: list[int] = []
    for place in line:
        if _RTL.search(texts[place]):
            found += [*reversed(run), place]
            run = []
        else:
            run.append(place)
    return [*found, *reversed(run)]


def _joined(line: list[int], boxes: list[list[float]], texts: Sequence[str]) -> str:
    """A line's text. Pieces that touch are one word, and Chinese has no spaces but where there is a gap."""
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
    """Lines as flowing text: a word that a hyphen breaks at a line's end is made whole, and Chinese or Japanese lines
    are joined without a space.

    A hyphen stays between digits, before a capital letter, and where the page has the word with it elsewhere.
    """
    lines = [line.strip() for line in lines if line.strip()]
    inside = Counter(word.strip(".,;:()\"'") for line in lines for word in line.split()[:-1])
    text = ""
    for line in lines:
        if not text:
            text = line
        elif text[-1] in _HYPHENS and _goes_on(text, line, inside):
            text = text[:-1] + line
        elif text[-1] == "-" and re.search(r"\w-$", text) and line[0].isalnum():
            text += line
        else:
            text = text.rstrip("\u00ad")
            chinese = _CJK.match(text[-1]) and _CJK.match(line[0])
            text += line if chinese else f" {line}"
    return " ".join(text.replace("\u00ad", "").split())


def _goes_on(text: str, line: str, inside: Counter[str]) -> bool:
    """Whether the word at the end of a text goes on in the next line without its hyphen."""
    if text[-1] == "\u00ad":
        return True
    begun, rest = re.search(r"(\w*)[-\u2010]$", text), re.match(r"\w+", line)
    if begun is None or rest is None or not begun[1] or not begun[1][-1].isalpha() or not rest[0][0].islower():
        return False
    return not inside[f"{begun[1]}-{rest[0]}"] or bool(inside[begun[1] + rest[0]])
