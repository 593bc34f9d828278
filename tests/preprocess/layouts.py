"""Made pages of more layouts than `corpus` has, most of them set in a proportional font with its own widths."""

import functools
from collections.abc import Callable, Iterator, Sequence

import pymupdf

from tests.preprocess.corpus import ARABIC, HEBREW, HEIGHT, WIDTH, MadePage, Placed, Words, width_of

KANA = "あいうえおかきくけこさしすせそたちつてと"


@functools.cache
def _font(name: str) -> pymupdf.Font:
    return pymupdf.Font(name)


class Sheet:
    """A page that is being set."""

    def __init__(self, kind: str, seed: int, font: str | None = None) -> None:
        self.words = Words(seed)
        self.random = self.words.random
        self.font = font if font is not None else self.random.choice(("tiro", "helv"))
        self.page = MadePage(kind)

    def width_of(self, text: str, size: float) -> float:
        return float(_font(self.font).text_length(text, size)) if self.font else width_of(text, size)

    def put(self, text: str, x: float, y: float, size: float = 9.0) -> float:
        """Place a piece. Returns where it ends."""
        self.page.placed.append(Placed(text, x, y, size, font=self.font))
        return x + self.width_of(text, size)

    def row(self, words: list[str], x: float, y: float, size: float = 9.0) -> float:
        for word in words:
            x = self.put(word, x, y, size) + 0.28 * size
        return x

    def lines(
        self,
        words: list[str],
        x: float,
        y: float,
        width: float,
        size: float = 9.0,
        leading: float = 1.2,
        justify: bool = True,
        indent: float = 0.0,
        centre: bool = False,
        bottom: float = HEIGHT,
    ) -> tuple[float, list[str]]:
        """Set words in lines. Returns the next line's y, and the words that are left at the bottom."""
        place, begin = 0, indent
        while place < len(words) and y <= bottom:
            room = width - begin
            line, used = [words[place]], self.width_of(words[place], size)
            place += 1
            while place < len(words) and used + 0.25 * size + self.width_of(words[place], size) <= room:
                used += 0.25 * size + self.width_of(words[place], size)
                line.append(words[place])
                place += 1
            full = justify and place < len(words) and len(line) > 1
            gap = 0.25 * size + ((room - used) / (len(line) - 1) if full else 0.0)
            at = x + begin + ((room - used) / 2 if centre else 0.0)
            for word in line:
                at = self.put(word, at, y, size) + gap
            y, begin = y + leading * size, 0.0
        return y, words[place:]

    def fill(self, x: float, y: float, width: float, bottom: float, size: float = 9.0, **style: float) -> list[str]:
        """Fill a column with paragraphs. Returns their words."""
        said: list[str] = []
        while y <= bottom:
            words = self.words.words(self.random.randint(30, 90))
            y, left = self.lines(words, x, y, width, size, bottom=bottom, **style)  # type: ignore[arg-type]
            said += words[: len(words) - len(left)]
            y += self.random.choice((0, 0, 4))
        return said

    def columns(
        self,
        count: int,
        top: float,
        bottom: float,
        gutter: float,
        left: float = 50.0,
        right: float = WIDTH - 50,
        **style: float,
    ) -> list[str]:
        """Fill columns of equal width."""
        width = (right - left - gutter * (count - 1)) / count
        places = [left + number * (width + gutter) for number in range(count)]
        return [word for x in places for word in self.fill(x, top, width, bottom, **style)]

    def done(self, *streams: list[str] | str) -> MadePage:
        self.page.streams = [one if isinstance(one, str) else " ".join(one) for one in streams if one]
        return self.page


# -- columns -------------------------------------------------------------------------------------------------------


def three_columns(seed: int) -> MadePage:
    sheet = Sheet("three columns", seed)
    sheet.lines(sheet.words.words(6), 45, 40, 500, 8, justify=False)
    title = sheet.words.words(10)
    y, _ = sheet.lines(title, 45, 70, 500, 18, justify=False, centre=True)
    body = sheet.columns(3, y + 12, 780, sheet.random.choice((12, 14, 18)), size=(8.5, 9, 10)[seed % 3])
    sheet.put("17", 295, 815, 8)
    return sheet.done(title, body)


def narrow_gutter(seed: int) -> MadePage:
    sheet = Sheet("narrow gutter", seed)
    return sheet.done(
        sheet.columns(2, 70, 780, (12, 10, 8)[seed % 3], size=(9, 10)[seed % 2], indent=(0, 12)[seed % 2])
    )


def ragged_columns(seed: int) -> MadePage:
    sheet = Sheet("ragged columns", seed)
    return sheet.done(sheet.columns(2, 70, 780, (12, 18)[seed % 2], justify=False, leading=(1.2, 1.4)[seed % 2]))


def double_spaced(seed: int) -> MadePage:
    sheet = Sheet("double spaced columns", seed)
    return sheet.done(sheet.columns(2, 70, 780, 20, size=10, leading=(1.6, 1.8, 2.0)[seed % 3], justify=bool(seed % 2)))


def narrow_justified(seed: int) -> MadePage:
    sheet = Sheet("narrow justified columns", seed)
    count = 1 + seed % 3
    return sheet.done(sheet.columns(count, 70, 780, 16, 50, 50 + count * 126, size=10))


def newspaper(seed: int) -> MadePage:
    sheet, streams = Sheet("newspaper", seed, "tiro"), []
    width = (WIDTH - 80 - 3 * 11) / 4
    for column, words in ((0, 6), (2, 3)):
        head, x = sheet.words.words(words), 40 + column * (width + 11)
        y, _ = sheet.lines(head, x, 68, 2 * width + 11, 20 - 3 * column, justify=False)
        streams += [head, sheet.columns(2, y + 4, 420, 11, x, x + 2 * width + 11, size=8)]
    head = sheet.words.words(7)
    y, _ = sheet.lines(head, 40, 455, WIDTH - 80, 22, justify=False)
    return sheet.done(*streams, head, sheet.columns(4, y + 6, 790, 11, 40, WIDTH - 40, size=8))


def figure_between(seed: int) -> MadePage:
    """A title over both columns, and a figure with its caption between them."""
    sheet = Sheet("figure between columns", seed)
    title, gutter = sheet.words.words(9), sheet.random.choice((12, 18, 24))
    y, _ = sheet.lines(title, 50, 60, 495, 16, justify=False, centre=True)
    top = sheet.random.uniform(250, 380)
    bottom = top + sheet.random.uniform(120, 220)
    above = sheet.columns(2, y + 12, top - 12, gutter)
    for number in range(8):
        sheet.put(str(10 * number + 12), sheet.random.uniform(70, 500), sheet.random.uniform(top + 10, bottom - 30), 8)
    sheet.page.drawing = f"1 w 60 {HEIGHT - bottom + 20:.0f} 470 {bottom - top - 40:.0f} re S"
    caption = ["Fig.", "3:", *sheet.words.words(sheet.random.choice((6, 18)))]
    y, _ = sheet.lines(caption, 50, bottom, 495, 8, justify=False, centre=True)
    return sheet.done(title, above, caption, sheet.columns(2, y + 14, 780, gutter))


def figure_in_a_column(seed: int) -> MadePage:
    sheet, width = Sheet("figure in a column", seed), 238.5
    for number in range(9):
        sheet.put(str(2 * number + 10), sheet.random.uniform(60, 270), sheet.random.uniform(80, 280), 8)
    caption = ["FIG.", "2", *sheet.words.words(8)]
    y, _ = sheet.lines(caption, 50, 300, width, 8, justify=False)
    body = [*sheet.fill(50, y + 12, width, 780), *sheet.fill(50 + width + 18, 70, width, 780)]
    return sheet.done(caption, body)


def unequal_columns(seed: int) -> MadePage:
    sheet, width = Sheet("unequal columns", seed), 240.0
    left = sheet.fill(50, 70, width, 780)
    return sheet.done([*left, *sheet.fill(50 + width + 15, 70, width, 70 + (36, 60, 300)[seed % 3])])


def short_columns(seed: int) -> MadePage:
    """One column, and below it a few lines in two."""
    sheet = Sheet("short columns", seed)
    return sheet.done(sheet.fill(50, 70, 495, 600), sheet.columns(2, 640, 640 + (50, 70)[seed % 2], 18))


def footnotes_in_columns(seed: int) -> MadePage:
    sheet, width = Sheet("footnotes in columns", seed), 238.5
    bodies, notes = [], []
    for column in range(2):
        x, y = 50 + column * (width + 18), sheet.random.uniform(680, 730)
        bodies.append(sheet.fill(x, 70, width, y - 10))
        notes.append(["1", *sheet.words.words(24)])
        sheet.lines(notes[-1], x, y + 6, width, 7)
        sheet.page.drawing += f" 0.5 w {x:.0f} {HEIGHT - y + 4:.0f} m {x + 60:.0f} {HEIGHT - y + 4:.0f} l S"
    return sheet.done(*bodies, *notes)


def footnote_below_columns(seed: int) -> MadePage:
    sheet = Sheet("footnote below columns", seed)
    body, note = sheet.columns(2, 70, 700, 18), sheet.words.words(60)
    sheet.lines(note, 50, 720, 495, 7, justify=bool(seed % 2))
    sheet.put("12", 295, 800)
    return sheet.done(body, note)


def patent(seed: int) -> MadePage:
    """Numbers of lines between the columns, numbers of columns above them."""
    sheet, gutter, size = Sheet("patent", seed, "tiro"), (20, 24, 28)[seed % 3], (9, 9.5, 10)[seed % 3]
    width, leading = (WIDTH - 110 - gutter) / 2, 1.15 * size
    sheet.row(["US", "11,234,567", "B2"], 250, 40, 10)
    sheet.put("1", 55 + width / 2, 58, size)
    sheet.put("2", 55 + width * 1.5 + gutter, 58, size)
    body = sheet.columns(2, 72, 780, gutter, 55, WIDTH - 55, size=size, leading=1.15, indent=(0, 12)[seed % 2])
    for number in range(5, int(708 / leading), 5):
        x = 55 + width + gutter / 2 - (5 if number > 9 else 2.5)
        sheet.put(str(number), x, 72 + (number - 1) * leading + sheet.random.uniform(-1.5, 1.5), size - seed % 2)
    return sheet.done(body)


def numbered_lines(seed: int) -> MadePage:
    """Numbers of lines in the margin, at each or each fifth."""
    sheet = Sheet("numbered lines", seed, "tiro")
    body = sheet.fill(90, 80, 430, 760, size=11, leading=1.5)
    every = (1, 5)[seed % 2]
    for number in range(every, int(680 / 16.5) + 1, every):
        sheet.put(str(number), 60, 80 + (number - 1) * 16.5)
    sheet.put("12", 295, 800)
    return sheet.done(body)


def marginal_notes(seed: int) -> MadePage:
    sheet, left, notes, y = Sheet("marginal notes", seed), seed % 2, list[list[str]](), 90.0
    body = sheet.fill(180 if left else 50, 70, 370, 780, size=10)
    while y < 700:
        notes.append(sheet.words.words(sheet.random.randint(5, 14)))
        y, _ = sheet.lines(notes[-1], 50 if left else 440, y, 110, 7.5, justify=False)
        y += sheet.random.uniform(60, 150)
    return sheet.done(body, *notes)


def paper(seed: int) -> MadePage:
    """A title, authors beside each other, an abstract, and two columns."""
    sheet = Sheet("paper", seed)
    title = sheet.words.words(8)
    top, _ = sheet.lines(title, 50, 60, 495, 17, justify=False, centre=True)
    for column in range(3):
        y = top + 8
        for count in (2, 3, 1):
            y, _ = sheet.lines(sheet.words.words(count), 50 + column * 165, y, 165, 9, justify=False, centre=True)
    abstract = sheet.words.words(70)
    y, _ = sheet.lines(abstract, 90, y + 14, 415, 8.5)
    return sheet.done(title, abstract, sheet.columns(2, y + 16, 780, 18))


def indents_and_lists(seed: int) -> MadePage:
    sheet, body, width = Sheet("indents and lists", seed), [], 240.0
    for column in range(2):
        x, y = 50 + column * (width + 15), 70.0
        while y < 740:
            kind = sheet.random.choice(("paragraph", "list", "quotation", "heading"))
            if kind == "list":
                for number in range(3):
                    mark = sheet.random.choice(("\u2022", "-", f"({number + 1})", f"{number + 1}."))
                    item = sheet.words.words(sheet.random.randint(4, 18))
                    sheet.put(mark, x + 8, y)
                    y, _ = sheet.lines(item, x + 24, y, width - 24)
                    body += [mark, *item]
                continue
            words = sheet.words.words({"paragraph": 50, "quotation": 25, "heading": 3}[kind])
            inset, size = (20 if kind == "quotation" else 0), (10 if kind == "heading" else 9)
            y, _ = sheet.lines(
                words, x + inset, y + 3, width - 2 * inset, size, indent=14 if kind == "paragraph" else 0
            )
            body += words
    return sheet.done(body)


def slide(seed: int) -> MadePage:
    sheet = Sheet("slide", seed, "helv")
    title = sheet.words.words(5)
    top, _ = sheet.lines(title, 50, 80, 495, 24, justify=False)
    streams = [title]
    for column in range(2):
        x, head = 50 + column * 260, sheet.words.words(2)
        y, _ = sheet.lines(head, x, top + 20, 240, 14, justify=False)
        said = head
        for _ in range(5):
            item = sheet.words.words(sheet.random.randint(4, 12))
            sheet.put("\u2022", x, y, 12)
            y, _ = sheet.lines(item, x + 16, y, 215, 12, justify=False)
            y, said = y + 6, [*said, "\u2022", *item]
        streams.append(said)
    return sheet.done(*streams)


def spread(seed: int) -> MadePage:
    """Two pages beside each other."""
    sheet, bodies = Sheet("spread", seed, "tiro"), []
    sheet.page.rotate = 90
    for column in range(2):
        x = 50 + column * HEIGHT / 2
        sheet.lines(sheet.words.words(4), x, 35, 300, 7, justify=False)
        bodies.append(sheet.fill(x, 60, HEIGHT / 2 - 90, 540))
        sheet.put(str(12 + column), x + 150, 570, 8)
    return sheet.done(*bodies)


def letter(seed: int) -> MadePage:
    sheet, streams, body = Sheet("letter", seed), [], []
    for x, top in ((380.0, 60.0), (60.0, 140.0)):
        y, address = top, list[str]()
        for _ in range(4):
            line = sheet.words.words(3)
            y, _ = sheet.lines(line, x, y, 160, 10, justify=False)
            address += line
        streams.append(address)
    y = 220.0
    for _ in range(4):
        words = sheet.words.words(60)
        y, _ = sheet.lines(words, 60, y, 475, 10, leading=1.3)
        y, body = y + 8, [*body, *words]
    return sheet.done(*streams, body)


def numbered_equations(seed: int) -> MadePage:
    sheet, body, y = Sheet("numbered equations", seed), [], 80.0
    for number in range(8):
        words, equation = sheet.words.words(40), sheet.words.words(2)
        y, _ = sheet.lines(words, 60, y, 475, 10)
        sheet.row(equation, 240, y + 6, 10)
        sheet.put(f"({number + 1})", 515, y + 6, 10)
        y, body = y + 28, [*body, *words, *equation, f"({number + 1})"]
    return sheet.done(body)


def wrapped_text(seed: int) -> MadePage:
    """Text beside a drawing with numbers, in one column."""
    sheet = Sheet("wrapped text", seed)
    above, words = sheet.words.words(60), sheet.words.words(150)
    top, _ = sheet.lines(above, 60, 80, 475, 10)
    y, left = sheet.lines(words, 60, top, 260, 10, bottom=top + 180)
    for number in range(9):
        sheet.put(str(10 * number + 12), sheet.random.uniform(345, 520), sheet.random.uniform(top + 5, y - 15), 8)
    sheet.put("FIG. 1", 420, y - 12)
    sheet.lines(left, 60, y, 475, 10)
    return sheet.done([*above, *words])


def terms(seed: int) -> MadePage:
    """Terms and their definitions beside them."""
    sheet, entries, y = Sheet("terms", seed), list[list[str]](), 80.0
    while y < 740:
        term, words = sheet.words.words(sheet.random.randint(1, 3)), sheet.words.words(sheet.random.randint(8, 40))
        sheet.row(term, 50, y)
        y, _ = sheet.lines(words, 190, y, 355)
        y += 5
        entries.append([*term, *words])
    return sheet.done(*entries)


# -- tables, forms -------------------------------------------------------------------------------------------------


def table_of_numbers(seed: int) -> MadePage:
    sheet, count = Sheet("table of numbers", seed), (4, 6, 8)[seed % 3]
    above, below, rows = sheet.words.words(50), sheet.words.words(60), []
    y, _ = sheet.lines(above, 50, 70, 495)
    for _ in range((10, 20)[seed % 2]):
        y += (12, 15)[seed % 2]
        label = sheet.words.words(sheet.random.choice((1, 2, 3)))
        sheet.row(label, 50, y)
        numbers = [f"{sheet.random.uniform(0, 999):.2f}" for _ in range(count)]
        for column, number in enumerate(numbers):
            sheet.put(number, 190 + column * 380 / count - sheet.width_of(number, 9), y)
        rows += [*label, *numbers]
    sheet.lines(below, 50, y + 24, 495)
    return sheet.done(above, rows, below)


def table_of_words(seed: int) -> MadePage:
    sheet, count = Sheet("table of words", seed), (2, 3, 4)[seed % 3]
    above, below, rows = sheet.words.words(50), sheet.words.words(60), []
    y, _ = sheet.lines(above, 50, 70, 495)
    for _ in range((8, 16)[seed % 2]):
        y += (12, 15, 18)[seed % 3]
        for column in range(count):
            cell = sheet.words.words(sheet.random.randint(1, max(2, 8 // count)))
            sheet.row(cell, 50 + column * 500 / count, y)
            rows += cell
    sheet.lines(below, 50, y + 24, 495)
    return sheet.done(above, rows, below)


def table_with_long_cells(seed: int) -> MadePage:
    """Cells of several lines; the rows are set apart."""
    sheet, rows, y = Sheet("table with long cells", seed), [], 90.0
    for _ in range(9):
        ends = []
        for x, width, count in ((50, 80, 1), (140, 180, sheet.random.randint(6, 18)), (340, 200, 14)):
            cell = sheet.words.words(count)
            end, _ = sheet.lines(cell, x, y, width, justify=False)
            ends.append(end)
            rows.append(cell)
        y = max(ends) + 8
    return sheet.done(*rows)


def table_in_a_column(seed: int) -> MadePage:
    sheet, width, rows = Sheet("table in a column", seed), 237.5, []
    above, y = sheet.fill(50, 70, width, 300), 322.0
    for _ in range(10):
        cells = [sheet.words.word(), *(str(sheet.random.randint(10, 999)) for _ in range(2)), sheet.words.word()]
        for column, cell in enumerate(cells):
            sheet.put(cell, 50 + column * width / 4, y)
        rows, y = [*rows, *cells], y + 13
    return sheet.done(above, rows, sheet.fill(50, y + 10, width, 780), sheet.fill(50 + width + 20, 70, width, 780))


def table_across_columns(seed: int) -> MadePage:
    sheet, rows, y = Sheet("table across columns", seed), [], 322.0
    above = sheet.columns(2, 70, 300, 20)
    for _ in range(10):
        cells = [sheet.words.word(), *(str(sheet.random.randint(10, 9999)) for _ in range(5))]
        for column, cell in enumerate(cells):
            sheet.put(cell, 50 + column * 82, y)
        rows, y = [*rows, *cells], y + 13
    return sheet.done(above, rows, sheet.columns(2, y + 12, 780, 20))


def contents(seed: int) -> MadePage:
    sheet, said, y = Sheet("contents", seed), [], 80.0
    for number in range(30):
        entry = [f"{number // 5 + 1}.{number % 5 + 1}", *sheet.words.words(sheet.random.randint(2, 6))]
        at = sheet.row(entry, 60 + (0, 14)[number % 2], y)
        page = str(number * 3 + 1)
        if seed % 2:
            dots = "." * int((520 - at) / sheet.width_of(".", 9))
            sheet.put(page, sheet.put(dots, at, y), y)
            said += [*entry, dots + page]
        else:
            sheet.put(page, 530, y)
            said += [*entry, page]
        y += 15
    return sheet.done(said)


def form_in_halves(seed: int) -> MadePage:
    sheet, fields, y = Sheet("form in halves", seed), [], 80.0
    for _ in range(20):
        for x in (50, 320):
            label, value = sheet.words.word() + ":", sheet.words.words(sheet.random.randint(1, 3))
            sheet.row(value, max(sheet.put(label, x, y) + 6, x + 70), y)
            fields.append([label, *value])
        y += 24
    return sheet.done(*fields)


def labels_above_values(seed: int) -> MadePage:
    sheet, fields = Sheet("labels above values", seed), []
    for number in range(36):
        x, y, label, value = 50 + number % 3 * 170, 80 + number // 3 * 36, sheet.words.words(2), sheet.words.words(2)
        sheet.row(label, x, y, 6.5)
        sheet.row(value, x, y + 12, 10)
        fields.append([*label, *value])
    return sheet.done(*fields)


def front_page(seed: int) -> MadePage:
    """A patent's front page: codes before each entry, in two columns."""
    sheet, entries = Sheet("front page", seed), []
    for column in range(2):
        x, y = 50 + column * 260, 80.0
        for _ in range(12):
            code, words = f"({sheet.random.randint(10, 99)})", sheet.words.words(sheet.random.randint(2, 20))
            sheet.put(code, x, y)
            y, _ = sheet.lines(words, x + 26, y, 205, justify=False)
            entries.append([code, *words])
            y += 6
    return sheet.done(*entries)


# -- characters ----------------------------------------------------------------------------------------------------


def letters_one_by_one(seed: int) -> MadePage:
    sheet = Sheet("letters one by one", seed)
    body = sheet.columns(2, 70, 400, 20, size=10)
    words, sheet.page.placed = sheet.page.placed, []
    for word in words:
        at = word.x
        for letter in word.text:
            at = sheet.put(letter, at, word.y, word.size)
    return sheet.done(body)


def printed_twice(seed: int) -> MadePage:
    """Bold by printing each word twice."""
    sheet = Sheet("printed twice", seed)
    body = sheet.fill(60, 80, 470, 500, size=10)
    sheet.page.placed += [Placed(one.text, one.x + 0.3, one.y, one.size, font=one.font) for one in sheet.page.placed]
    return sheet.done(body)


def mixed_chinese(seed: int) -> MadePage:
    """Chinese with words and numbers in Latin script; without spaces, since it depends on the font where they are."""
    sheet, said = Sheet("mixed Chinese", seed, ""), ""
    count = seed % 2 + 1
    width = (WIDTH - 100 - 24 * (count - 1)) / count
    for column in range(count):
        y = 80.0
        while y < 760:
            x = 50 + column * (width + 24)
            end = x + width
            while True:
                script = sheet.random.random()
                piece = sheet.words.hanzi(sheet.random.randint(2, 8))
                if script > 0.75:
                    piece = sheet.words.word() if script < 0.88 else str(sheet.random.randint(1, 999))
                if x + width_of(piece, 10.5) > end:
                    break
                x = sheet.put(piece, x, y, 10.5) + (2 if script > 0.75 else 0)
                said += piece
            y += 16
    return sheet.done(said)


def characters_one_by_one(seed: int) -> MadePage:
    sheet, said, count = Sheet("characters one by one", seed, ""), "", seed % 2 + 1
    width = (495 - 20 * (count - 1)) / count
    for line in range(40 * count):
        part = sheet.words.hanzi(int(width // 10.5))
        for place, character in enumerate(part):
            sheet.put(character, 50 + line // 40 * (width + 20) + place * 10.5, 80 + line % 40 * 16, 10.5)
        said += part
    return sheet.done(said)


def numbers_in_vertical(seed: int) -> MadePage:
    """Vertical writing with numbers of two digits, each upright in the place of one character."""
    sheet, said, size = Sheet("numbers in vertical writing", seed, ""), "", 12.0
    for place in range(14 * 30):
        text = str(sheet.random.randint(10, 99)) if place % 11 == 5 else sheet.words.hanzi(1)
        sheet.put(text, WIDTH - 90 - place // 30 * size * 1.8, 80 + place % 30 * size * 1.05, size)
        said += text
    return sheet.done(said)


def right_to_left_columns(seed: int) -> MadePage:
    """The right column first; numbers and words in Latin script between."""
    sheet, said, size, width = Sheet("right-to-left columns", seed, ""), [], 11.0, 237.5
    for column in range(2):
        right, y = WIDTH - 50 - column * (width + 20), 80.0
        body = sheet.words.of((HEBREW, ARABIC)[seed % 2], 90)
        for place in range(7, 90, 13):
            body[place] = sheet.random.choice(("12", "3.5", "2024", "1,500"))
        for place in range(4, 90, 13):
            body[place] = sheet.words.word()
        x = right
        for word in body:
            if x - width_of(word, size) < right - width:
                x, y = right, y + 15
            x -= width_of(word, size)
            if word.isascii() or seed // 2 % 2:  # as it is seen, else in logical order
                sheet.put(word if word.isascii() else word[::-1], x, y, size)
            else:
                for place, character in enumerate(reversed(word)):
                    sheet.put(character, x + place * size / 2, y, size)
            x -= 0.3 * size
        said += body
    return sheet.done(said)


def vertical_tiers(seed: int) -> MadePage:
    """Vertical writing in two tiers, as in a newspaper: character by character, or as strings."""
    sheet, size, rows = Sheet("vertical in tiers", seed, ""), 12.0, 24
    sheet.page.vertical = bool(seed % 2)
    text = sheet.words.hanzi(480)
    for line in range(20):
        x, y = WIDTH - 90 - line % 10 * size * 1.9, 80 + line // 10 * 350
        part = text[line * rows : (line + 1) * rows]
        if seed % 2:
            sheet.put(part, x, y, size)
        else:
            for row, character in enumerate(part):
                sheet.put(character, x, y + row * size * 1.1, size)
    return sheet.done(text)


def furigana(seed: int) -> MadePage:
    """Vertical writing with small kana to the right of some characters."""
    sheet, size, rows = Sheet("furigana", seed, ""), 12.0, 45
    text = sheet.words.hanzi(360)
    for start in range(0, len(text), rows):
        x = WIDTH - 90 - start / rows * size * 2
        for row, character in enumerate(text[start : start + rows]):
            sheet.put(character, x, 80 + row * size * 1.05, size)
        row = 2
        while row < rows - 3:
            for place in range(4):
                sheet.put(sheet.random.choice(KANA), x + size + 0.5, 74 + row * size * 1.05 + place * 6, 5.5)
            row += sheet.random.randint(4, 12)
    return sheet.done(text)


LAYOUTS: list[Callable[[int], MadePage]] = [
    *(three_columns, narrow_gutter, ragged_columns, double_spaced, narrow_justified, newspaper, figure_between),
    *(figure_in_a_column, unequal_columns, short_columns, footnotes_in_columns, footnote_below_columns, patent),
    *(numbered_lines, marginal_notes, paper, indents_and_lists, slide, spread, letter, numbered_equations),
    *(table_of_numbers, table_of_words, table_with_long_cells, table_in_a_column, table_across_columns, contents),
    *(wrapped_text, terms, labels_above_values, characters_one_by_one, numbers_in_vertical),
    *(form_in_halves, front_page, letters_one_by_one, printed_twice, mixed_chinese, right_to_left_columns),
    *(vertical_tiers, furigana),
]


def layouts(
    pages_a_kind: int = 3, seed: int = 5000, makers: Sequence[Callable[[int], MadePage]] = LAYOUTS
) -> Iterator[MadePage]:
    """Pages of these layouts, for the writer by operators."""
    for make in makers:
        for number in range(pages_a_kind):
            yield make(seed + number)
