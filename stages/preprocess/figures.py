"""Crop the figures that questions name, in parallel. A restart keeps finished crops, as it keeps pages."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pymupdf

from stages.contract.files import FileHashes, digest_of, read_json, visible_files, write_json
from stages.contract.recipe import Preprocess
from stages.contract.stage import Stage
from stages.preprocess.documents import FIGURE, picture_folder
from stages.preprocess.layout import crop_page_figures
from stages.preprocess.render import PageRange
from stages.preprocess.workers import run_in_workers

RULES_VERSION = 2
"""Increase it when the rules in `layout` change: crops by earlier rules are then made again."""

Figure = tuple[str, int, str]
"""Id of the document, 1-based page, and the figure's name as `mentions.figure_named` gives it."""


def crop_figures(stage: Stage, wanted: list[Figure], documents: dict[str, Path]) -> dict[Figure, dict[str, Any]]:
    """Draw each figure at the pixel budget of a page, into `pages/<document>/<page>-figure-<figure>.jpg`.

    Returns `image` (path relative to the run), `width`, `height` (pixels) and `sha256` of each figure that was found.
    The others are counted (`figure not found` on its page, `figure fills its page`, or `figure failed`, with the reason
    in the log), and have no crop. Crops that are not wanted are deleted, so call it even if nothing is wanted. Raises
    InterruptedRunError if the stage is asked to stop.
    """
    hashes = FileHashes(stage.path(".pages.json"))
    done: dict[Figure, dict[str, Any]] = {}
    missing: list[Figure] = []
    for figure in sorted(set(wanted)):
        record = _finished_record(stage, figure, documents, hashes)
        if record is None:
            missing.append(figure)
        else:
            done[figure] = record
    try:
        _crop_missing(stage, missing, done, documents, hashes)
    except RuntimeError:
        stage.stop.check()  # a stop of the whole process group breaks the workers' pool while they start
        raise
    found = {figure: done[figure] for figure in sorted(done) if _is_found(stage, figure, done[figure])}
    crops = {_crop_path(stage, figure) for figure in found}
    for path in visible_files(stage.path("pages")):
        if FIGURE.fullmatch(path.name) and path not in crops:
            path.unlink()
    for path in crops:  # save the digests, so that a restart does not read every picture
        hashes.file_digest(path)
    hashes.save()
    return {
        figure: {
            "image": f"preprocess/pages/{_crop_file(figure)}",
            **{k: record[k] for k in ("width", "height", "sha256")},
        }
        for figure, record in found.items()
    }


def _is_found(stage: Stage, figure: Figure, record: dict[str, Any]) -> bool:
    """Whether a figure was found. Counts it if not, and logs why it failed if it did."""
    if record["status"] in ("not found", "fills its page"):
        stage.counts[f"figure {record['status']}"] += 1
    elif record["status"] != "ok":
        stage.counts["figure failed"] += 1
        print(f"{figure[0]} page {figure[1]}, figure {figure[2]}: {record['status']}")  # into the log
    return bool(record["status"] == "ok")


def _crop_file(figure: Figure) -> str:
    """The path of a figure's crop below pages/."""
    document, page, name = figure
    return f"{picture_folder(document)}/{page}-figure-{name}.jpg"


def _crop_path(stage: Stage, figure: Figure) -> Path:
    """The path of a figure's crop in the folder of this stage."""
    return stage.path("pages", _crop_file(figure))


def _record_path(stage: Stage, figure: Figure) -> Path:
    """The file of a figure's record: its key and what was found."""
    return stage.cache_file("figures", f"{_crop_file(figure).removesuffix('.jpg')}.json")


def _key(settings: Preprocess, figure: Figure, documents: dict[str, Path], hashes: FileHashes) -> str:
    """The key of a figure's record: it changes with the document's content, the page, the figure, the settings for
    pictures, the rules, and MuPDF's version."""
    look = settings.pages
    assert look is not None  # a recipe of a task that reads documents has it
    made_from = [hashes.file_digest(documents[figure[0]]), *figure[1:], look.max_pixels, look.jpeg_quality]
    return digest_of([*made_from, RULES_VERSION, pymupdf.VersionBind])


def _finished_record(
    stage: Stage, figure: Figure, documents: dict[str, Path], hashes: FileHashes
) -> dict[str, Any] | None:
    """An earlier start's record of a figure; None if there is none for this document and these settings, or if the crop
    is missing or changed."""
    saved = read_json(_record_path(stage, figure))
    if saved is None or saved["key"] != _key(stage.run.recipe.preprocess, figure, documents, hashes):
        return None
    record: dict[str, Any] = saved["record"]
    crop = _crop_path(stage, figure)
    if record["status"] == "ok" and not (crop.is_file() and hashes.file_digest(crop) == record["sha256"]):
        return None
    return record


def _crop_missing(
    stage: Stage,
    missing: list[Figure],
    done: dict[Figure, dict[str, Any]],
    documents: dict[str, Path],
    hashes: FileHashes,
) -> None:
    """Crop in worker processes, page by page. Saves each page's records, and adds them to `done`, as soon as the page
    is done. Raises InterruptedRunError if the stage is asked to stop."""
    settings, cropped = stage.run.recipe.preprocess, 0
    names: dict[PageRange, list[str]] = defaultdict(list)
    for document, number, name in missing:
        names[PageRange(document, documents[document], number - 1, number)].append(name)

    def call(page: PageRange) -> tuple[Any, tuple[Any, ...]]:
        """Return the function and arguments that crop a page's figures. Creates the crops' folder."""
        folder = stage.path("pages", picture_folder(page.document))
        folder.mkdir(parents=True, exist_ok=True)
        look = settings.pages
        assert look is not None
        return crop_page_figures, (page, names[page], folder, look.max_pixels, look.jpeg_quality)

    workers = min(settings.workers or len(os.sched_getaffinity(0)), len(names))
    for page, records in run_in_workers(call, list(names), workers, settings.page_timeout, stage.stop):
        by_name = {record["figure"]: record for record in records if "figure" in record}
        for name in names[page]:
            figure = (page.document, page.first + 1, name)
            record = by_name.get(name) or records[0]  # after a crash or a timeout there is one record for the page
            done[figure] = record
            key = _key(settings, figure, documents, hashes)
            write_json(_record_path(stage, figure), {"key": key, "record": record})
        cropped += len(names[page])
        stage.events.report_progress("crop figures", cropped, len(missing), "figures")
        stage.stop.check()
