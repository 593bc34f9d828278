"""Pages made for tests of reading order: what is written on each, in a person's order, is kept apart from where it is.

Two writers: PyMuPDF's own, and PDF's operators by hand with a font that has nothing but a map to Unicode. Both place
words in a shuffled order. `layouts` has pages of more kinds.
"""

import math
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import pymupdf

Writer = Literal["pymupdf", "operators"]

WIDTH, HEIGHT = 595.0, 842.0

_SYLLABLES = [
    *("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve", "wo", "xi", "za"),
    *("cre", "dro", "fla", "gri", "plu", "ster", "thon", "vil"),
]
_HANZI = (
    "发明涉及一种用于机械装置的阀门结构包括壳体弹簧活塞和密封环其中所述部件设置在内腔左侧并与连接杆固定可以沿轴线移动"
)
HEBREW = "אבגדהוזחטיכלמנסעפצקרשת"
ARABIC = "ابتثجحخدذرزسشصضطظعغفقكلمنهوي"


@dataclass(frozen=True)
class Placed:
    """A piece of text at its baseline's left end, in points from the top left of the page as it is shown."""

    text: str
    x: float
    y: float
    size: float = 9.0
    turn: int = 0
    """Quarter turns, clockwise."""
    font: str = ""
    """One of PyMuPDF's fonts, with its own widths; empty: the writer's."""


@dataclass
class MadePage:
    """A page of the corpus."""

    kind: str
    streams: list[str] = field(default_factory=list)
    """What is written, as separate texts: runs of words are compared within each."""
    placed: list[Placed] = field(default_factory=list)
    rotate: int = 0
    drawing: str = ""
    """Further operators, such as lines."""
    vertical: bool = False
    """Whether the font writes from top to bottom."""
    skew: float = 0.0
    """By how many degrees the page was laid on the scanner askew."""
    scanned: bool = False
    """Whether the page is a picture with an invisible text layer."""
    fields: list[Placed] = field(default_factory=list)
    """What is filled into a form's fields."""


def width_of(text: str, size: float) -> float:
    """The width that both writers give a text, in points."""
    return sum(1.0 if ord(c) > 0x2E80 else 0.5 for c in text) * size


# -- words ---------------------------------------------------------------------------------------------------------


class Words:
    """Words that never come twice, so that every run of them is found in one place only."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._seen: set[str] = set()

    def word(self) -> str:
        while True:
            text = "".join(self.random.choice(_SYLLABLES) for _ in range(self.random.choice((1, 2, 2, 3, 3))))
            if text not in self._seen:
                self._seen.add(text)
                return text

    def words(self, count: int) -> list[str]:
        return [self.word() for _ in range(count)]

    def of(self, alphabet: str, count: int, length: tuple[int, int] = (3, 7)) -> list[str]:
        found = []
        while len(found) < count:
            text = "".join(self.random.choice(alphabet) for _ in range(self.random.randint(*length)))
            if text not in self._seen:
                self._seen.add(text)
                found.append(text)
        return found

    def hanzi(self, count: int) -> str:
        return "".join(self.random.choice(_HANZI) for _ in range(count))


def set_lines(
    words: list[str], x: float, y: float, width: float, size: float = 9.0, leading: float = 1.25, justify: bool = True
) -> tuple[list[Placed], float]:
    """Words set in lines of a width. Returns them with the y of the line after them."""
    placed: list[Placed] = []
    line: list[str] = []

    def flush(last: bool) -> None:
        nonlocal y
        natural = sum(width_of(word, size) for word in line)
        space = 0.28 * size if last or not justify or len(line) < 2 else (width - natural) / (len(line) - 1)
        at = x
        for word in line:
            placed.append(Placed(word, at, y, size))
            at += width_of(word, size) + space
        y += leading * size

    for word in words:
        if line and sum(width_of(one, size) + 0.28 * size for one in [*line, word]) > width:
            flush(False)
            line = []
        line.append(word)
    flush(True)
    return placed, y


# -- kinds ---------------------------------------------------------------------------------------------------------


def columns(seed: int, count: int = 2, numbers: bool = False) -> MadePage:
    words, page = Words(seed), MadePage("columns")
    page.placed.append(Placed(" ".join(words.words(2)), 60, 40, 8))
    page.placed.append(Placed("3", 530, 40, 8))
    title = words.words(9)
    found, y = set_lines(title, 110, 80, 380, 14, justify=False)
    page.placed += found
    gutter = 24.0 if numbers else 14.0
    width = (WIDTH - 100 - gutter * (count - 1)) / count
    body: list[str] = []
    for column in range(count):
        x, top = 50 + column * (width + gutter), y + 10
        for _ in range(3):
            paragraph = words.words(70 if count == 2 else 40)
            found, top = set_lines(paragraph, x, top, width)
            page.placed += found
            body += paragraph
            top += words.random.choice((0, 4, 9))
    if numbers:
        page.placed += [Placed(str(n), 50 + width + 8, y + 10 + n * 11.25 - 11.25, 7) for n in range(5, 45, 5)]
    page.placed.append(Placed("17", 295, 815, 8))
    page.streams = [" ".join(title), " ".join(body)]
    return page


def plain(seed: int, rotate: int = 0, kind: str = "plain") -> MadePage:
    words, page = Words(seed), MadePage(kind, rotate=rotate)
    wide = (HEIGHT if rotate % 180 else WIDTH) - 120
    y, body = 80.0, []
    for _ in range(4):
        paragraph = words.words(60)
        found, y = set_lines(paragraph, 60, y, wide, 10)
        page.placed += found
        body += paragraph
        y += 6
    page.streams = [" ".join(body)]
    return page


def rotated_columns(seed: int, rotate: int) -> MadePage:
    words, page = Words(seed), MadePage("rotated", rotate=rotate)
    across = HEIGHT if rotate % 180 else WIDTH
    width, body = (across - 120) / 2, []
    for column in range(2):
        paragraph = words.words(110)
        found, _ = set_lines(paragraph, 50 + column * (width + 20), 80, width)
        page.placed += found
        body += paragraph
    page.streams = [" ".join(body)]
    return page


def sideways(seed: int, turn: int) -> MadePage:
    """Text that is turned on a page that is not, as a wide table's is."""
    upright = plain(seed)
    page = MadePage("rotated", streams=upright.streams)
    for one in upright.placed:
        x, y = {1: (WIDTH - one.y, one.x), 2: (WIDTH - one.x, HEIGHT - one.y), 3: (one.y, HEIGHT - one.x)}[turn]
        page.placed.append(Placed(one.text, x, y, one.size, turn))
    return page


def vertical(seed: int, one_by_one: bool) -> MadePage:
    words, page = Words(seed), MadePage("vertical", vertical=not one_by_one)
    text, size, rows = words.hanzi(320), 12.0, 40
    for column in range(0, len(text), rows):
        x = WIDTH - 80 - column / rows * size * 1.8
        if one_by_one:
            for row, character in enumerate(text[column : column + rows]):
                page.placed.append(Placed(character, x, 80 + row * size * 1.1, size))
        else:
            page.placed.append(Placed(text[column : column + rows], x, 80, size))
    page.streams = [text]
    return page


def right_to_left(seed: int, alphabet: str, visual: bool) -> MadePage:
    words, page = Words(seed), MadePage("right to left")
    body = words.of(alphabet, 130)
    body[20] = "3.5"
    y, x, size = 90.0, WIDTH - 60, 11.0
    for word in body:
        if x - width_of(word, size) < 60:
            x, y = WIDTH - 60, y + 1.4 * size
        x -= width_of(word, size)
        shown = word[::-1] if visual and not word[0].isdigit() else word
        if visual or word[0].isdigit():
            page.placed.append(Placed(shown, x, y, size))
        else:  # in logical order: each character left of the one before it
            at = x + width_of(word, size)
            for character in word:
                at -= width_of(character, size)
                page.placed.append(Placed(character, at, y, size))
        x -= 0.3 * size
    page.streams = [" ".join(body)]
    return page


def ligatures(seed: int) -> MadePage:
    words, page = Words(seed), MadePage("ligatures and hyphens")
    body, y = [], 90.0
    for _ in range(28):
        line = words.words(7)
        first, second = words.word() + "fi", "fl" + words.word()
        if words.random.random() < 0.5:
            hyphen = words.random.choice(("-", "\u00ad"))
            placed, y = set_lines([*line, first.replace("fi", "\ufb01") + hyphen], 60, y, 470, 10, justify=False)
            page.placed += placed
            body += [*line, first + second]
            placed, y = set_lines(
                [second.replace("fl", "\ufb02"), *(more := words.words(6))], 60, y, 470, 10, justify=False
            )
            body += more
        else:
            placed, y = set_lines([*line, first.replace("fi", "\ufb01")], 60, y, 470, 10, justify=False)
            body += [*line, first]
        page.placed += placed
    page.streams = [" ".join(body)]
    return page


def footnotes(seed: int) -> MadePage:
    page = plain(seed, kind="headers and footnotes")
    words = Words(seed + 500)
    page.placed += [Placed(" ".join(words.words(3)), 60, 40, 8), Placed("page 12", 500, 40, 8)]
    note = words.words(40)
    found, _ = set_lines(note, 60, 740, 470, 7)
    page.placed += found
    page.drawing = "0.5 w 60 120 m 200 120 l S"
    page.streams.append(" ".join(note))
    return page


def table(seed: int) -> MadePage:
    words, page = Words(seed), MadePage("tables")
    above = words.words(60)
    found, y = set_lines(above, 60, 80, 470, 10)
    page.placed += found
    y += 14
    rows = []
    for _ in range(14):
        cells = [[words.word()], words.words(2), [str(words.random.randint(10, 9999))], words.words(1)]
        for cell, x in zip(cells, (60, 180, 330, 430), strict=True):
            at = float(x)
            for word in cell:
                page.placed.append(Placed(word, at, y, 10))
                at += width_of(word, 10) + 2.8
        rows += [word for cell in cells for word in cell]
        y += 19
    below = words.words(60)
    found, _ = set_lines(below, 60, y + 14, 470, 10)
    page.placed += found
    page.streams = [" ".join(above), " ".join(rows), " ".join(below)]
    return page


def form(seed: int) -> MadePage:
    words, page = Words(seed), MadePage("forms")
    y, said = 90.0, []
    for _ in range(18):
        label, value = words.word(), words.words(2)
        at = 220.0
        page.placed.append(Placed(label + ":", 60, y, 10))
        for word in value:
            page.placed.append(Placed(word, at, y, 10))
            at += width_of(word, 10) + 2.8
        said += [label + ":", *value]
        y += 22
    page.streams = [" ".join(said)]
    return page


def drawing(seed: int) -> MadePage:
    """A drawing with numbers at its parts, and its description below."""
    words, page = Words(seed), MadePage("drawings")
    lines = []
    for number in range(1, 13):
        x, y = words.random.uniform(100, 480), words.random.uniform(100, 420)
        page.placed.append(Placed(str(number * 10), x, y, 9))
        lines.append(f"{x - 5:.1f} {HEIGHT - y:.1f} m {x - 40:.1f} {HEIGHT - y - 30:.1f} l S")
    page.drawing = "0 w 90 400 420 350 re S " + " ".join(lines)
    page.placed.append(Placed("FIG. 1", 270, 480, 11))
    text = words.words(120)
    found, _ = set_lines(text, 60, 520, 470, 10)
    page.placed += found
    page.streams = [" ".join(text)]
    return page


def hairlines(seed: int) -> MadePage:
    """A drawing of hairlines only, with a caption and text around it."""
    words, page = Words(seed), MadePage("hairlines")
    texts, y = [], 80.0
    for height in (0.0, 260.0):
        y += height
        text = words.words(90)
        found, y = set_lines(text, 60, y, 470, 10)
        page.placed += found
        texts.append(" ".join(text))
    across = words.random.uniform(100, 500)
    page.drawing = (
        f"0 w 60 400 470 180 re S {across:.1f} 400 m {across - 30:.1f} 580 l S"
        " 0.1 w 100 450 m 200 550 300 350 500 500 c S"
    )
    page.streams = texts
    return page


def nearly_blank(seed: int) -> MadePage:
    words, page = Words(seed), MadePage("nearly blank")
    text = words.words(words.random.randint(2, 8))
    page.placed, _ = set_lines(text, words.random.uniform(60, 200), words.random.uniform(60, 800), 380, 10)
    page.streams = [" ".join(text)]
    return page


def scan(seed: int, skew: float) -> MadePage:
    page = plain(seed, kind="scans") if seed % 2 else replace(columns(seed), kind="scans")
    return replace(page, scanned=True, skew=skew)


def filled_form(seed: int) -> MadePage:
    """A form whose values are in its fields."""
    words, page = Words(seed), MadePage("forms")
    y, said = 90.0, []
    for _ in range(18):
        label, value = words.word(), " ".join(words.words(2))
        page.placed.append(Placed(label + ":", 60, y, 10))
        page.fields.append(Placed(value, 220, y, 10))
        said += [label + ":", value]
        y += 24
    page.streams = [" ".join(said)]
    return page


def chinese(seed: int) -> MadePage:
    words, page = Words(seed), MadePage("chinese")
    text, y = words.hanzi(700), 80.0
    for column in range(2):
        y = 80.0
        for row in range(25):
            start = column * 350 + row * 14
            line = text[start : start + 14]
            cut = words.random.randint(3, 11)
            x = 60 + column * 250
            page.placed += [Placed(line[:cut], x, y, 14), Placed(line[cut:], x + cut * 14.0, y, 14)]
            y += 21
    page.streams = [text]
    return page


def corpus(pages_a_kind: int = 14) -> Iterator[tuple[MadePage, Writer]]:
    """The pages, by both writers in turn."""
    writers: tuple[Writer, Writer] = ("operators", "pymupdf")
    for number in range(pages_a_kind):
        seed, writer = 1000 + number, writers[number % 2]
        yield columns(seed, 2 if number % 3 else 3, numbers=number % 4 == 1), writer
        yield plain(seed + 100), writer
        yield rotated_columns(seed + 200, (90, 180, 270)[number % 3]), writer
        yield sideways(seed + 300, number % 3 + 1), "operators"
        yield vertical(seed + 400, one_by_one=bool(number % 2)), "operators"
        yield right_to_left(seed + 600, (HEBREW, ARABIC)[number // 2 % 2], visual=bool(number % 2)), "operators"
        yield ligatures(seed + 700), "operators"
        yield footnotes(seed + 800), writer
        yield table(seed + 900), writer
        yield form(seed + 1000), writer
        yield drawing(seed + 1100), writer
        yield chinese(seed + 1200), "operators"
        yield hairlines(seed + 1300), writer
        yield nearly_blank(seed + 1400), writer
        yield scan(seed + 1500, 0.0 if writer == "pymupdf" else (number % 5 - 2) * 0.8), writer
        yield filled_form(seed + 1600), "pymupdf"


# -- writers -------------------------------------------------------------------------------------------------------


def write_pdf(page: MadePage, writer: Writer, seed: int = 0) -> bytes:
    """A PDF of one page, its words in a shuffled order."""
    placed = list(page.placed)
    random.Random(seed).shuffle(placed)
    return _by_pymupdf(page, placed) if writer == "pymupdf" else _by_operators(page, placed)


def _as_stored(page: MadePage, x: float, y: float) -> tuple[float, float]:
    """Where a place of the page as it is shown is on the page as it is stored, from its bottom left."""
    if page.rotate == 90:
        return y, x
    if page.rotate == 180:
        return WIDTH - x, y
    if page.rotate == 270:
        return WIDTH - y, HEIGHT - x
    return x, HEIGHT - y


def _by_pymupdf(page: MadePage, placed: list[Placed]) -> bytes:
    document = pymupdf.open()
    made = document.new_page(width=WIDTH, height=HEIGHT)
    mode = 0
    if page.scanned:
        seen = pymupdf.open("pdf", _by_pymupdf(replace(page, scanned=False), placed))
        picture = seen[0].get_pixmap(dpi=72, colorspace=pymupdf.csGRAY)
        made.insert_image(made.rect, stream=picture.tobytes("jpeg"))
        mode = 3
    shape = made.new_shape()
    for one in placed:
        x, y = _as_stored(page, one.x, one.y)
        font, size = (one.font, one.size) if one.font else ("cour", one.size * 0.8)
        where = (x, HEIGHT - y)
        shape.insert_text(where, one.text, fontname=font, fontsize=size, rotate=page.rotate, render_mode=mode)
    shape.commit()
    for number, one in enumerate(page.fields):
        widget = pymupdf.Widget()
        widget.field_type, widget.field_name = pymupdf.PDF_WIDGET_TYPE_TEXT, f"field {number}"
        widget.field_value, widget.text_fontsize = one.text, one.size
        widget.rect = pymupdf.Rect(one.x, one.y - one.size * 1.2, 540, one.y + one.size * 0.5)
        made.add_widget(widget)
    if page.drawing:
        xref = document.get_new_xref()
        document.update_object(xref, "<<>>")
        document.update_stream(xref, page.drawing.encode())
        contents = " ".join(f"{one} 0 R" for one in [*made.get_contents(), xref])
        document.xref_set_key(made.xref, "Contents", f"[{contents}]")
    made.set_rotation(page.rotate)
    content: bytes = document.tobytes()
    document.close()
    return content


def _by_operators(page: MadePage, placed: list[Placed]) -> bytes:
    parts = [page.drawing]
    if page.scanned:
        parts.append(f"0.95 g 0 0 {WIDTH:g} {HEIGHT:g} re f 0 g 3 Tr")
    parts.append("BT")
    for one in placed:
        x, y = _as_stored(page, one.x, one.y)
        turns = (-page.rotate // 90 + one.turn) % 4
        angle = math.radians(-90 * turns + page.skew)
        a, b = math.cos(angle), math.sin(angle)
        if page.skew:
            x, y = x * a - y * b, x * b + y * a
        codes = one.text.encode("utf-16-be").hex() if not one.font else one.text.encode("cp1252").hex()
        font = {"": "F", "tiro": "T", "helv": "H"}[one.font]
        parts.append(f"/{font} {one.size:.2f} Tf {a:.6f} {b:.6f} {-b:.6f} {a:.6f} {x:.2f} {y:.2f} Tm <{codes}> Tj")
    parts.append("ET")
    stream = zlib.compress("\n".join(parts).encode("latin-1"))
    to_unicode = (
        b"/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /U def /CMapType 2 def\n"
        b"1 begincodespacerange <0000> <FFFF> endcodespacerange\n"
        + b"".join(
            b"%d beginbfrange\n%bendbfrange\n"
            % (len(part), b"".join(b"<%02X00> <%02XFF> <%02X00>\n" % (high, high, high) for high in part))
            for part in (range(100), range(100, 200), range(200, 256))
        )
        + b"endcmap CMapName currentdict /CMap defineresource pop end end"
    )
    encoding = "Identity-V" if page.vertical else "Identity-H"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {WIDTH:g} {HEIGHT:g}] /Rotate {page.rotate}"
            " /Contents 4 0 R /Resources << /Font << /F 5 0 R"
            " /T << /Type /Font /Subtype /Type1 /BaseFont /Times-Roman /Encoding /WinAnsiEncoding >>"
            " /H << /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >> >> >> >>"
        ).encode(),
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%b\nendstream" % (len(stream), stream),
        (
            f"<< /Type /Font /Subtype /Type0 /BaseFont /Made /Encoding /{encoding} /DescendantFonts [6 0 R]"
            " /ToUnicode 8 0 R >>"
        ).encode(),
        b"<< /Type /Font /Subtype /CIDFontType2 /BaseFont /Made"
        b" /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity)"
        b" /Supplement 0 >> /FontDescriptor 7 0 R /DW 1000 /W [0 11904 500] >>",
        b"<< /Type /FontDescriptor /FontName /Made /Flags 4 /FontBBox [0 -200 1000 800] /ItalicAngle 0 /Ascent 800"
        b" /Descent -200 /CapHeight 700 /StemV 80 >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(to_unicode), to_unicode),
    ]
    content, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    start = len(content)
    content += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    content += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return content + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start)


# -- how much of the order is kept ---------------------------------------------------------------------------------

RUN = 15


def runs_kept(truth: list[str], text: str) -> tuple[int, int]:
    """Runs of 15 words (or Chinese characters) of the true texts: how many the text has, and how many there are."""
    kept = total = 0
    said = " ".join(text.split())
    for stream in truth:
        spaced = " " in stream
        units = stream.split() if spaced else list(stream)
        # where Chinese touches Latin script, it depends on the font whether there is a space
        own = said if spaced or not re.search("[0-9A-Za-z]", stream) else said.replace(" ", "")
        size = min(RUN, len(units))
        for start in range(len(units) - size + 1):
            total += 1
            kept += (" " if spaced else "").join(units[start : start + size]) in own
    return kept, total
