"""Pages rendered per second: straight at the pixel budget, against 600 DPI, saved, reloaded and shrunk to the budget.

    python -m benchmarks.render

Both ways run in one process and in turn, page by page, so that other load slows both. Then the preprocess stage's
renderer runs in one and in two processes, twice each.
600 DPI is the original's way to prepare pages for a vision model.
"""

import io
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pymupdf
from PIL import Image

from benchmarks.rows import write_rows
from stages.preprocess.render import PageRange, picture_size, render_page, render_range

DOCUMENTS = Path(__file__).parents[1] / "recipes" / "data" / "patent-qa" / "documents"
MAX_PIXELS = 1_229_312


def draw_at_600_dpi(page: pymupdf.Page) -> bytes:
    """Return a page as JPEG bytes at the budget, drawn at 600 DPI first.

    The page at 600 DPI is saved as JPEG, reloaded and shrunk, all in memory.
    """
    large = page.get_pixmap(dpi=600).tobytes("jpeg", jpg_quality=90)
    with Image.open(io.BytesIO(large)) as picture:
        small = picture.resize(picture_size(page.rect.width, page.rect.height, MAX_PIXELS), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    small.save(out, "jpeg", quality=90)
    return out.getvalue()


def draw_at_budget(page: pymupdf.Page) -> bytes:
    """Return a page as JPEG bytes, drawn at the budget."""
    return bytes(render_page(page, MAX_PIXELS).tobytes("jpeg", jpg_quality=90))


def measure_both() -> dict[str, object]:
    """Draw each page of every fourth document at the budget, then at 600 DPI. Returns the row with both speeds."""
    seconds = {"straight": 0.0, "at 600 DPI": 0.0}
    pages = 0
    for path in sorted(DOCUMENTS.glob("*.pdf"))[::4]:
        with pymupdf.open(path) as document:
            for page in document:
                page.get_pixmap(dpi=20)  # parse the page before the clock starts
                for name, way in (("straight", draw_at_budget), ("at 600 DPI", draw_at_600_dpi)):
                    before = time.perf_counter()
                    way(page)
                    seconds[name] += time.perf_counter() - before
                pages += 1
    return {
        "what": "one process",
        "pages": pages,
        "straight pages/s": round(pages / seconds["straight"], 2),
        "600 DPI pages/s": round(pages / seconds["at 600 DPI"], 2),
        "ratio": round(seconds["at 600 DPI"] / seconds["straight"], 2),
    }


def measure_processes(processes: int, repeats: int) -> dict[str, object]:
    """Render the demo's pages `repeats` times with the preprocess stage's renderer, in `processes` processes.

    The renderer also reads each page's text and words. Returns the row with pages per second of all processes together.
    """
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = []
        for path in sorted(DOCUMENTS.glob("*.pdf")) * repeats:
            with pymupdf.open(path) as document:
                jobs.append((PageRange(path.name, path, 0, len(document)), Path(folder)))
        list(pool.map(_render, jobs[: processes * 2]))  # start the workers before the clock
        before = time.perf_counter()
        pages = sum(pool.map(_render, jobs))
        seconds = time.perf_counter() - before
    return {
        "what": f"{processes} process(es), with text",
        "pages": pages,
        "straight pages/s": round(pages / seconds, 2),
    }


def _render(job: tuple[PageRange, Path]) -> int:
    """Render a range of pages into a folder that is deleted afterwards. Returns the number of pages.

    `job` is the range and the parent of that folder, one argument because a pool's `map` passes one.
    """
    with tempfile.TemporaryDirectory(dir=job[1]) as folder:
        return len(render_range(job[0], Path(folder), MAX_PIXELS, 90))


if __name__ == "__main__":
    rows = [measure_both(), *(measure_processes(count, 2) for count in (1, 2, 1, 2))]
    write_rows("render", rows, "python -m benchmarks.render")
