"""Render PDF pages at a pixel budget, with their text layer. Runs in worker processes: keep imports light.

Rendering at the budget costs a tenth of rendering at 600 DPI and shrinking (`benchmarks/render.py`).
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pymupdf
from pymupdf import mupdf

from stages.contract.files import stored_name
from stages.preprocess.reading import Word, read_page
from stages.preprocess.watch import watch

PATCH = 28
"""Pixels. Models of the Qwen2-VL family take sides that are multiples of this (14-pixel patches merged 2 x 2)."""

MAX_RATIO = 200
"""Largest ratio of the sides that this family's processors accept."""

LEAST_LINE = 1.5
"""Smallest width of a drawn line, in pixels: a line between two rows of pixels still gives each three quarters of its
colour. Drawings of patents are made of hairlines (`0 w`), which MuPDF would draw nearly white."""


@dataclass(frozen=True)
class PageRange:
    """Pages of one document that a worker renders at once. A kill loses at most these."""

    document: str
    """The document's id: its path below the documents folder."""
    source: Path
    first: int
    """0-based, inclusive."""
    last: int
    """0-based, exclusive."""

    def __len__(self) -> int:
        """The number of pages."""
        return self.last - self.first

    def pages(self) -> list["PageRange"]:
        """The same pages, as one range for each page."""
        return [PageRange(self.document, self.source, i, i + 1) for i in range(self.first, self.last)]

    def split_at(self, index: int) -> tuple["PageRange", "PageRange", "PageRange"]:
        """The pages before page `index`, that page, and the pages after it."""
        ends = (self.first, index, index + 1, self.last)
        before, page, after = (PageRange(self.document, self.source, *pair) for pair in pairwise(ends))
        return before, page, after


def open_document(source: Path) -> pymupdf.Document:
    """Open a PDF. In a worker, also restarts the time limit. Raises ValueError with a short reason for a file that
    cannot be read as a PDF."""
    document, _ = _open(source)
    watch.restart()
    return document


def count_pages(source: Path) -> list[dict[str, Any]]:
    """Return a list of one record: with a document's number of pages, `pages`, and the number `stated` in it, or with
    the `status` of a file that cannot be read. In a worker, also restarts the time limit."""
    watch.restart()
    try:
        document, stated = _open(source)
    except ValueError as error:
        return [{"status": str(error)}]
    with document:
        return [{"pages": document.page_count, "stated": stated}]


def _open(source: Path) -> tuple[pymupdf.Document, int]:
    """Open a PDF. Returns the document, and the number of pages that it states, which may be wrong. Raises ValueError
    with a short reason for a file that cannot be read as a PDF."""
    if source.stat().st_size == 0:
        raise ValueError("empty file")
    if stored_name(source) != str(source):
        raise ValueError("its name is not UTF-8, so MuPDF cannot open it; rename it")
    try:
        document = pymupdf.open(source, filetype="pdf")  # finds the objects even without the header or their table
        if not document.is_pdf:  # MuPDF opens pictures and more, whatever type it is given
            raise ValueError("not a PDF")
        if document.needs_pass:
            if not _encrypts_only_attachments(document):
                raise ValueError("encrypted: needs a password")
            document.is_encrypted = False
        stated = _mend_page_tree(document, source)
        count = document.page_count
    except (RuntimeError, mupdf.FzErrorBase) as error:  # pymupdf.FileDataError is a RuntimeError
        raise ValueError(_reason(source, str(error.__cause__ or error))) from error
    if count == 0:
        raise ValueError(_reason(source, "no pages"))
    return document, stated


def _reason(source: Path, error: str) -> str:
    """The reason why a file has no pages to read. `error` is MuPDF's message."""
    what = re.sub(r"^code=\d+: ", "", error).replace(str(source), source.name)
    if "encryption" in what:
        return f"encrypted: {what}"
    with source.open("rb") as file:  # other bytes may precede the header (ISO 32000-1, annex H.3.4.1)
        return f"damaged PDF: {what}" if b"%PDF-" in file.read(1024) else "not a PDF"


def _encrypts_only_attachments(document: pymupdf.Document) -> bool:
    """Whether an encrypted document's pages are not encrypted (ISO 32000-1, 7.6.5: the crypt filter Identity)."""
    version, *filters = [document.xref_get_key(-1, f"Encrypt/{name}") for name in ("V", "StmF", "StrF")]
    return version in (("int", "4"), ("int", "5")) and set(filters) <= {("null", "null"), ("name", "/Identity")}


_sound: set[tuple[Path, int, int]] = set()
"""Documents, by path, time stamp and size, whose page trees this process has found sound."""


def _mend_page_tree(document: pymupdf.Document, source: Path) -> int:
    """Correct, in memory, a page tree that states another number of pages than it has. Returns the number stated.

    MuPDF trusts the stated number: otherwise, a document would lose pages, or have 100,000 that fail.
    """
    pdf = pymupdf._as_pdf_document(document)
    root = mupdf.pdf_dict_get(
        mupdf.pdf_dict_get(mupdf.pdf_trailer(pdf), mupdf.PDF_ENUM_NAME_Root), mupdf.PDF_ENUM_NAME_Pages
    )
    stated: int = mupdf.pdf_to_int(mupdf.pdf_dict_get(root, mupdf.PDF_ENUM_NAME_Count))
    stat = source.stat()
    key = (source, stat.st_mtime_ns, stat.st_size)
    if key in _sound or not mupdf.pdf_is_dict(root):
        return stated
    found = Counter(leaf is not None for leaf in _leaves(root))  # counted first: a million pages would take much memory
    if not found[False] and found[True] == stated:
        _sound.add(key)
        return stated
    kids = mupdf.pdf_new_array(pdf, found[True])
    for leaf in _leaves(root):
        if leaf is not None:
            mupdf.pdf_array_push(kids, leaf)
    mupdf.pdf_dict_put(root, mupdf.PDF_ENUM_NAME_Kids, kids)
    mupdf.pdf_dict_put_int(root, mupdf.PDF_ENUM_NAME_Count, found[True])
    return stated


def _leaves(root: mupdf.PdfObj) -> Iterator[mupdf.PdfObj | None]:
    """The pages of a page tree in order, readable or not. Yields None for anything else: a node that came before, or an
    object such as null."""
    seen: set[int] = set()
    stack = [iter([root])]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
            continue
        number = mupdf.pdf_to_num(node)  # 0: written inside another object
        kids = mupdf.pdf_dict_get(node, mupdf.PDF_ENUM_NAME_Kids)
        kind = mupdf.pdf_to_name(mupdf.pdf_dict_get(node, mupdf.PDF_ENUM_NAME_Type))
        if kind == "Page" or not (kind == "Pages" or mupdf.pdf_is_array(kids)):
            yield node if number or mupdf.pdf_is_dict(node) else None
        elif number in seen:
            yield None
        else:
            seen |= {number} - {0}
            stack.append(_elements(kids))


def _elements(array: mupdf.PdfObj) -> Iterator[mupdf.PdfObj]:
    """The elements of a PDF array, in order."""
    return (mupdf.pdf_array_get(array, place) for place in range(mupdf.pdf_array_len(array)))


def picture_size(width: float, height: float, max_pixels: int) -> tuple[int, int]:
    """Return the size of a page's picture, (width, height) in pixels: within the budget, close to the page's shape, and
    both multiples of PATCH.

    `width` and `height` are the page's, in points of 1/72 inch. A page is drawn at 200 DPI at most, because a small
    page shows no more detail above that; only a side shorter than PATCH is lengthened to PATCH. Raises ValueError for a
    shape that no vision model accepts.
    """
    if not (width > 0 and height > 0 and math.isfinite(width * height)):
        raise ValueError("page without a size")
    if max(width, height) / min(width, height) > MAX_RATIO:
        raise ValueError(f"sides differ more than {MAX_RATIO} to 1")
    budget = min(max_pixels, width * height * (200 / 72) ** 2)
    scale = math.sqrt(budget / (width * height))
    columns = max(PATCH, math.floor(width * scale / PATCH) * PATCH)
    rows = max(PATCH, math.floor(height * scale / PATCH) * PATCH)
    # thin pages: a side raised to one patch leaves fewer pixels for the other, and rounding down increases the ratio
    longest = max_pixels // PATCH // PATCH * PATCH
    columns, rows = min(columns, longest, rows * MAX_RATIO), min(rows, longest, columns * MAX_RATIO)
    columns = min(columns, max_pixels // rows // PATCH * PATCH)
    rows = min(rows, max_pixels // columns // PATCH * PATCH)
    return columns, rows


def render_page(
    page: pymupdf.Page,
    max_pixels: int,
    region: pymupdf.Rect | None = None,
    content: pymupdf.DisplayList | None = None,
) -> pymupdf.Pixmap:
    """Return the picture of a page, or of a region of the page in points, at exactly `picture_size`. A caller that also
    reads the page's text passes the page's display list as `content`, so that the page is parsed once. Raises
    ValueError as `picture_size` does."""
    drawn = page.rect if region is None else region
    width, height = picture_size(drawn.width, drawn.height, max_pixels)
    scale = pymupdf.Matrix(width / drawn.width, height / drawn.height)
    pymupdf.TOOLS.set_graphics_min_line_width(LEAST_LINE)
    content = content or page.get_displaylist()
    picture: pymupdf.Pixmap = content.get_pixmap(matrix=scale, colorspace=pymupdf.csRGB, alpha=False, clip=region)
    if (picture.width, picture.height) != (width, height):  # rounding at the edges may add a row or column
        picture = pymupdf.Pixmap(picture, width, height, None)
    return picture


def render_range(pages: PageRange, folder: Path, max_pixels: int, jpeg_quality: int) -> list[dict[str, Any]]:
    """Render pages into `folder/<number>.jpg` (1-based). Returns a record for each page.

    A record has `page`, `status` (`ok`, `blank` or a reason), and for `ok`: `width`, `height` (pixels), `text`, `words`
    (`[x0, y0, x1, y1, word]`, in 0..1 of the page's width and height) and the picture's `sha256`; also `nothing_drawn`,
    with MuPDF's warning or `no warning`, if the picture has one colour although the page has text.
    """
    records = []
    with open_document(pages.source) as document:
        for index in range(pages.first, pages.last):
            watch.at_page(index)
            try:
                record = _render_one(document[index], folder / f"{index + 1}.jpg", max_pixels, jpeg_quality)
            except (OSError, MemoryError):  # not the page's fault
                raise
            except Exception as error:  # noqa: BLE001 - for bad content PyMuPDF raises many kinds, IndexError among them
                record = {"status": f"page cannot be rendered: {error}"}
            records.append({"page": index + 1, **record})
    return records


def _render_one(page: pymupdf.Page, path: Path, max_pixels: int, jpeg_quality: int) -> dict[str, Any]:
    """Render one page into `path`. Returns its record as in `render_range`, but without `page`. Raises any exception
    for bad content."""
    pymupdf.TOOLS.reset_mupdf_warnings()
    content = page.get_displaylist()  # reads the content stream, for text and picture
    written = read_page(page, content)
    picture = render_page(page, max_pixels, content=content)
    warning = next(iter(pymupdf.TOOLS.mupdf_warnings().splitlines()), "")
    record: dict[str, Any] = {"status": "ok"}
    if is_unicolor(picture):
        if not written.words:  # MuPDF leaves out what it cannot draw, and only warns
            return {"status": f"page cannot be rendered: {warning}" if warning else "blank"}
        record["nothing_drawn"] = warning or "no warning"
    record |= write_picture(picture, path, jpeg_quality)
    return {**record, "text": written.text, "words": _rounded_words(written.words)}


def is_unicolor(picture: pymupdf.Pixmap) -> bool:
    """Whether all pixels have one colour. PyMuPDF's own property walks over the pixels in Python: 200 times slower."""
    some = picture.samples_mv[:: 101 * picture.n].tobytes()  # decides for most pages, without a copy of all pixels
    if some.count(some[:1]) < len(some):
        return False
    samples = picture.samples
    return bool(samples == samples[: picture.n] * (len(samples) // picture.n))


def page_words(page: pymupdf.Page) -> list[list[Any]]:
    """Return a page's words with their boxes: `[x0, y0, x1, y1, word]`, in 0..1 of the page's width and height."""
    return _rounded_words(read_page(page).words)


def _rounded_words(words: Iterable[Word]) -> list[list[Any]]:
    """The words as lists `[x0, y0, x1, y1, word]`, with coordinates rounded to four decimals."""
    return [[*(round(value, 4) for value in word[:4]), word.text] for word in words]


def write_picture(picture: pymupdf.Pixmap, path: Path, jpeg_quality: int) -> dict[str, Any]:
    """Write a picture as JPEG, atomically. Returns its `width` and `height` (pixels) and its `sha256`."""
    content = picture.tobytes("jpeg", jpg_quality=jpeg_quality)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return {"width": picture.width, "height": picture.height, "sha256": hashlib.sha256(content).hexdigest()}
