"""Stand-ins for workers' functions that misbehave on some pages. Worker processes import them by name."""

import os
import time
from pathlib import Path
from typing import Any

from stages.preprocess.layout import crop_page_figures as real_crop_page_figures
from stages.preprocess.render import PageRange
from stages.preprocess.render import render_range as real_render_range


def crash_on_page_2(pages: PageRange, folder: Path, max_pixels: int, jpeg_quality: int) -> list[dict[str, Any]]:
    """Like a segmentation fault in a library: the process ends without an exception."""
    if pages.document == "bad.pdf" and pages.first <= 1 < pages.last:
        os._exit(139)
    return real_render_range(pages, folder, max_pixels, jpeg_quality)


def crash(pages: PageRange, folder: Path, max_pixels: int, jpeg_quality: int) -> list[dict[str, Any]]:
    os._exit(143)


def hang_on_page_2(pages: PageRange, folder: Path, max_pixels: int, jpeg_quality: int) -> list[dict[str, Any]]:
    if pages.document == "bad.pdf" and pages.first <= 1 < pages.last:
        time.sleep(600)
    return real_render_range(pages, folder, max_pixels, jpeg_quality)


def note_worker(pages: PageRange, folder: Path, max_pixels: int, jpeg_quality: int) -> list[dict[str, Any]]:
    """Write the worker's process id and peak memory in KiB beside the pictures."""
    records = real_render_range(pages, folder, max_pixels, jpeg_quality)
    # not getrusage: its maximum survives the exec of a process that was forked from a large one
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0])
    with (folder.parents[1] / "workers.txt").open("a") as file:
        file.write(f"{os.getpid()} {peak}\n")
    return records


def crash_on_bad_figures(
    page: PageRange, figures: list[str], folder: Path, max_pixels: int, jpeg_quality: int
) -> list[dict[str, Any]]:
    if page.document == "bad.pdf":
        os._exit(139)
    return real_crop_page_figures(page, figures, folder, max_pixels, jpeg_quality)
