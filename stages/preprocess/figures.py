"""Crops of the figures that questions name: found and drawn in parallel, and kept across restarts as pages are."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pymupdf

from stages.contract.files import FileHashes, digest_of, read_json, visible_files, write_json
from stages.contract.stage import Stage
from stages.preprocess.documents import FIGURE, picture_folder
from stages.preprocess.layout import crop_page_figures
from stages.preprocess.render import PageRange
from stages.preprocess.workers import in_workers

RULES = 1
"""Raised when figures are found in another way: what an earlier version found is then looked for again."""

Figure = tuple[str, int, str]
"""Id of the document, 1-based page, and the figure's name as `mentions.figure_named` gives it."""


def crop_figures(stage: Stage, wanted: list[Figure], documents: dict[str, Path]) -> dict[Figure, dict[str, Any]]:
    """Draw each figure at the pixel budget of a page, into `pages/<document>/<page>-figure-<figure>.jpg`.

    Returns for each that was found `image` (path relative to the run), `width`, `height` (pixels) and `sha256`. Others
    are counted, and their pages stand in for them: `figure not found` on its page, `figure fills its page`, or `figure
    failed`, which the log tells more of. Crops that are not wanted are deleted: to be called also with nothing wanted,
    and after `render_documents`.
    """
    hashes = FileHashes(stage.path(".pages.json"))
    done: dict[Figure, dict[str, Any]] = {}
    missing: list[Figure] = []
    for figure in sorted(set(wanted)):
        kept = _kept(stage, figure, documents, hashes)
        if kept is None:
            missing.append(figure)
        else:
            done[figure] = kept
    try:
        _crop_missing(stage, missing, done, documents, hashes)
    except RuntimeError:
        stage.stop.check()  # a stop sent to the whole process group, while workers start, breaks their pool
        raise
    found = {figure: done[figure] for figure in sorted(done) if _is_found(stage, figure, done[figure])}
    crops = {_crop(stage, figure) for figure in found}
    for path in visible_files(stage.path("pages")):
        if FIGURE.fullmatch(path.name) and path not in crops:
            path.unlink()
    for path in crops:  # remember the digests, so that a restart does not read every picture
        hashes.file(path)
    hashes.save()
    return {
        figure: {"image": f"preprocess/pages/{_name(figure)}", **{k: record[k] for k in ("width", "height", "sha256")}}
        for figure, record in found.items()
    }


def _is_found(stage: Stage, figure: Figure, record: dict[str, Any]) -> bool:
    """Count a figure."""
    if record["status"] in ("not found", "fills its page"):
        stage.counts[f"figure {record['status']}"] += 1
    elif record["status"] != "ok":
        stage.counts["figure failed"] += 1
        print(f"{figure[0]} page {figure[1]}, figure {figure[2]}: {record['status']}")  # into the log
    return bool(record["status"] == "ok")


def _name(figure: Figure) -> str:
    document, page, name = figure
    return f"{picture_folder(document)}/{page}-figure-{name}.jpg"


def _crop(stage: Stage, figure: Figure) -> Path:
    return stage.path("pages", _name(figure))


def _note(stage: Stage, figure: Figure) -> Path:
    """Where it is kept what became of a figure."""
    return stage.cache_file("figures", f"{_name(figure).removesuffix('.jpg')}.json")


def _key(stage: Stage, figure: Figure, documents: dict[str, Path], hashes: FileHashes) -> str:
    look = stage.run.recipe.preprocess.pages
    assert look is not None  # a recipe of a task that reads documents has it
    made_from = [hashes.file(documents[figure[0]]), *figure[1:], look.max_pixels, look.jpeg_quality]
    return digest_of([*made_from, RULES, pymupdf.VersionBind])


def _kept(stage: Stage, figure: Figure, documents: dict[str, Path], hashes: FileHashes) -> dict[str, Any] | None:
    """What an earlier start found, if its picture is still there."""
    kept = read_json(_note(stage, figure))
    if kept is None or kept["key"] != _key(stage, figure, documents, hashes):
        return None
    record: dict[str, Any] = kept["record"]
    crop = _crop(stage, figure)
    if record["status"] == "ok" and not (crop.is_file() and hashes.file(crop) == record["sha256"]):
        return None
    return record


def _crop_missing(
    stage: Stage,
    missing: list[Figure],
    done: dict[Figure, dict[str, Any]],
    documents: dict[str, Path],
    hashes: FileHashes,
) -> None:
    """Crop in worker processes, page by page, and keep each as soon as it is there."""
    settings, cropped = stage.run.recipe.preprocess, 0
    names: dict[PageRange, list[str]] = defaultdict(list)
    for document, number, name in missing:
        names[PageRange(document, documents[document], number - 1, number)].append(name)

    def call(page: PageRange) -> tuple[Any, tuple[Any, ...]]:
        folder = stage.path("pages", picture_folder(page.document))
        folder.mkdir(parents=True, exist_ok=True)
        look = settings.pages
        assert look is not None
        return crop_page_figures, (page, names[page], folder, look.max_pixels, look.jpeg_quality)

    workers = min(settings.workers or len(os.sched_getaffinity(0)), len(names))
    for page, records in in_workers(call, list(names), workers, settings.page_timeout, stage.stop):
        by_name = {record["figure"]: record for record in records if "figure" in record}
        for name in names[page]:
            figure = (page.document, page.first + 1, name)
            record = by_name.get(name) or records[0]  # a worker that crashed or took too long leaves one for the page
            done[figure] = record
            write_json(_note(stage, figure), {"key": _key(stage, figure, documents, hashes), "record": record})
        cropped += len(names[page])
        stage.events.progress("crop figures", cropped, len(missing), "figures")
        stage.stop.check()
