"""Text of pages in reading order: how much of it stays together, and what it costs.

    python -m benchmarks.reading [kept | speed]

`kept` is the share of all runs of 15 words that a text has whole, on made pages whose words are placed in a shuffled
order (tests/preprocess/corpus.py and layouts.py): MuPDF's text as stored; sorted by MuPDF, which was Lorry's text
before; and in Lorry's reading order. `speed` is pages per CPU second for three kinds of pages, with text and JPEG:
Lorry's `render_range` against PyMuPDF called directly for the same pictures, in turn.
"""

import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pymupdf

from benchmarks.rows import write_rows
from stages.preprocess.reading import join_lines, read_page
from stages.preprocess.render import PageRange, picture_size, render_range
from tests.preprocess.corpus import HEIGHT, WIDTH, columns, corpus, drawing, hairlines, plain, runs_kept, write_pdf
from tests.preprocess.layouts import layouts

MAX_PIXELS = 1_229_312
PAGES = 12
"""Number of pages of each kind in `speed`."""


def kept_rows() -> list[dict[str, object]]:
    """Return a row for each kind of page, with the share of runs of 15 words that a text of the page has whole.

    The shares, in 0..1, are those of three texts: as stored, sorted by MuPDF, and in Lorry's reading order. In Chinese
    text, a run is 15 characters.
    """
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for number, (page, writer) in enumerate([*corpus(), *((page, "operators") for page in layouts(6))]):
        document = pymupdf.open("pdf", write_pdf(page, writer, number))
        texts = [
            join_lines(document[0].get_text("text").splitlines()),
            join_lines(document[0].get_text("text", sort=True).splitlines()),
            read_page(document[0]).text,
        ]
        row = counts[page.kind]
        row[0] += 1
        for place, text in enumerate(texts, start=1):
            kept, total = runs_kept(page.streams, text)
            row[place] += kept
        row[4] += total
    return [
        {
            "part": "kept",
            "kind": kind,
            "pages": pages,
            "as stored": round(stored / total, 3),
            "sorted by MuPDF": round(by_mupdf / total, 3),
            "reading order": round(ours / total, 3),
        }
        for kind, (pages, stored, by_mupdf, ours, total) in counts.items()
    ]


def documents(folder: Path) -> dict[str, Path]:
    """Write three PDFs of PAGES pages each: text, drawings, and blank pages alternating with scans.

    Returns their paths by kind of page.
    """
    chance = random.Random(0)
    noise = pymupdf.Pixmap(pymupdf.csGRAY, 1240, 1754, bytearray(chance.randbytes(1240 * 1754)), False)
    scan = noise.tobytes("jpeg", jpg_quality=60)
    made = {name: pymupdf.open() for name in ("text", "drawings", "blank and scans")}
    for number in range(PAGES):
        text = plain(number) if number % 2 else columns(number)
        lines = drawing(number) if number % 2 else hairlines(number)
        made["text"].insert_pdf(pymupdf.open("pdf", write_pdf(text, "pymupdf", number)))
        made["drawings"].insert_pdf(pymupdf.open("pdf", write_pdf(lines, "pymupdf", number)))
        page = made["blank and scans"].new_page(width=WIDTH, height=HEIGHT)
        if number % 2:
            page.insert_image(page.rect, stream=scan)
    paths = {}
    for name, document in made.items():
        paths[name] = folder / f"{name}.pdf"
        document.save(paths[name])
    return paths


def draw_directly(path: Path, folder: Path) -> None:
    """Read each page's text and write the page as JPEG into `folder`, with PyMuPDF and without Lorry's renderer.

    The picture has the size that `render_range` would give it.
    """
    with pymupdf.open(path) as document:
        for page in document:
            page.get_text("text", sort=True)
            width, height = picture_size(page.rect.width, page.rect.height, MAX_PIXELS)
            scale = pymupdf.Matrix(width / page.rect.width, height / page.rect.height)
            picture = page.get_pixmap(matrix=scale, colorspace=pymupdf.csRGB, alpha=False)
            (folder / f"{page.number}.jpg").write_bytes(picture.tobytes("jpeg", jpg_quality=90))


def speed_rows() -> list[dict[str, object]]:
    """Return a row for each kind of page, with the pages per CPU second of Lorry and of PyMuPDF, and their ratio.

    Each speed is the best of seven turns.
    """
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind, path in documents(folder).items():
            best = {"Lorry": 0.0, "PyMuPDF": 0.0}
            for name in ("Lorry", "PyMuPDF") * 7:
                before = time.process_time()
                if name == "Lorry":
                    render_range(PageRange("a", path, 0, PAGES), folder, MAX_PIXELS, 90)
                else:
                    draw_directly(path, folder)
                best[name] = max(best[name], PAGES / (time.process_time() - before))
            rows.append(
                {
                    "part": "speed",
                    "kind": kind,
                    "Lorry pages/CPU s": round(best["Lorry"], 2),
                    "PyMuPDF pages/CPU s": round(best["PyMuPDF"], 2),
                    "ratio": round(best["Lorry"] / best["PyMuPDF"], 2),
                }
            )
    return rows


if __name__ == "__main__":
    parts = {"kept": kept_rows, "speed": speed_rows}
    rows = [row for name in sys.argv[1:] or parts for row in parts[name]()]
    write_rows("reading", rows, "python -m benchmarks.reading", by="part")
