"""Render many documents in parallel, page range by page range; finished ranges are kept across restarts."""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pymupdf

from stages.contract.errors import DataError
from stages.contract.files import (
    FileHashes,
    digest_of,
    read_json,
    stored_name,
    visible_files,
    write_json,
    written_atomically,
)
from stages.contract.recipe import Preprocess
from stages.contract.stage import Stage
from stages.preprocess.render import PageRange, open_document, render_range
from stages.preprocess.workers import in_workers

RANGE = 16
"""Pages that a worker renders at once: what a kill can cost, and small enough to share one long document out."""

PAGE_TABLE = pa.schema(
    [
        ("document", pa.string()),
        ("page", pa.int32()),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("text", pa.string()),
        ("words", pa.list_(pa.struct([("box", pa.list_(pa.float32(), 4)), ("word", pa.string())]))),
    ]
)
"""Columns of pages.parquet. Row i is row i of vectors.npy; `box` is x0, y0, x1, y1 in 0..1 of the page."""


FIGURE = re.compile(r"[0-9]+-figure-[0-9a-z]+\.jpg")
"""Names of the pictures below pages/ that are crops of figures, which `figures` looks after."""


def document_ids(documents: list[Path], folder: Path) -> dict[str, Path]:
    """Documents by id: their path below the folder, ending included, so that no two files share one."""
    return {unicodedata.normalize("NFC", stored_name(path.relative_to(folder))): path for path in documents}


def picture_folder(document: str) -> str:
    """A folder name for a document's pictures: readable where it can be, unique always, safe on any file system."""
    readable = re.sub(r"[^\w-]+", "_", Path(document).stem)[:40].strip("_")
    return f"{readable or 'document'}-{hashlib.sha256(document.encode()).hexdigest()[:8]}"


def render_documents(stage: Stage, documents: dict[str, Path]) -> list[dict[str, Any]]:
    """Render every page of every document and write pages.parquet. Returns the usable pages' records, in its order.

    Each record has the table's columns but for the words, which for many pages would not fit in memory. Unreadable
    documents, blank pages and failing pages go to `stage.skip`. Raises DataError when no page is left.
    """
    settings = stage.run.recipe.preprocess
    hashes = FileHashes(stage.path(".pages.json"))
    ranges = list(_ranges(stage, documents))
    stage.counts["documents"] = len({pages.document for pages in ranges})
    done: dict[PageRange, list[dict[str, Any]]] = {}
    missing: list[PageRange] = []
    for pages in ranges:
        records = _kept(stage, pages, hashes)
        if records is None:
            missing.append(pages)
        else:
            done[pages] = records
    try:
        _render_missing(stage, missing, done, settings)
    except RuntimeError:
        stage.stop.check()  # a stop sent to the whole process group, while workers start, breaks their pool
        raise
    usable = [record for pages in ranges for record in done[pages] if _is_usable(stage, pages.document, record)]
    if not usable and stage.shard is None:
        raise DataError(
            f"{stage.run.data}: no document has a readable page; see {stage.path('log.txt')} for the reasons"
        )
    _remove_strangers(stage, usable)
    for record in usable:  # remember the digests, so that a restart does not read every picture
        hashes.file(_picture(stage, record))
    hashes.save()
    if stage.shard is not None:  # the plain stage writes the table
        return usable
    _write_table(stage, ranges)
    stage.outputs["pages/"] = None
    stage.outputs["pages.parquet"] = len(usable)
    return usable


def _is_usable(stage: Stage, document: str, record: dict[str, Any]) -> bool:
    """Count a page, and name it in the manifest if it cannot be used."""
    stage.counts["pages"] += 1
    where = f"{document} page {record['page']}"
    if record["status"] == "blank":
        stage.skip(where, "blank page")
    elif record["status"] != "ok":
        stage.counts["failed pages"] += 1
        stage.skip(where, "unreadable page", record["status"])
    return bool(record["status"] == "ok")


def _write_table(stage: Stage, ranges: list[PageRange]) -> None:
    """Write pages.parquet range by range, so that the words of all pages are never in memory at once."""
    with (
        written_atomically(stage.path("pages.parquet"), "wb") as file,
        pq.ParquetWriter(file, PAGE_TABLE) as writer,
    ):
        rows: list[dict[str, Any]] = []
        for pages in ranges:
            for record in read_json(_range_file(stage, pages))["records"]:
                if record["status"] == "ok":
                    words = [{"box": word[:4], "word": word[4]} for word in record["words"]]
                    rows.append({**record, "words": words})
            if len(rows) >= 1024:
                writer.write_table(pa.Table.from_pylist(rows, schema=PAGE_TABLE))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=PAGE_TABLE))


def _ranges(stage: Stage, documents: dict[str, Path]) -> Iterator[PageRange]:
    for name, path in documents.items():
        try:
            with open_document(path) as document:
                count = document.page_count
        except (ValueError, RuntimeError) as error:
            stage.skip(name, "unreadable document", str(error))
            stage.events.say(f"skipped {name}: {error}")
            continue
        for first in range(0, count, RANGE):
            yield PageRange(name, path, first, min(first + RANGE, count))


def _range_file(stage: Stage, pages: PageRange) -> Path:
    return stage.cache_file("pages", picture_folder(pages.document), f"{pages.first}-{pages.last}.json")


def _light(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "words"} for record in records]


def _range_key(stage: Stage, pages: PageRange, hashes: FileHashes) -> str:
    look = stage.run.recipe.preprocess.pages
    assert look is not None  # a recipe of a task that reads documents has it
    made_from = [hashes.file(pages.source), pages.first, pages.last, look.max_pixels, look.jpeg_quality]
    return digest_of([*made_from, pymupdf.VersionBind])


def _kept(stage: Stage, pages: PageRange, hashes: FileHashes) -> list[dict[str, Any]] | None:
    """Records of a range that an earlier start finished, if its pictures are all still there."""
    kept = read_json(_range_file(stage, pages))
    if kept is None or kept["key"] != _range_key(stage, pages, hashes):
        return None
    folder = stage.path("pages", picture_folder(pages.document))
    for record in kept["records"]:
        picture = folder / f"{record['page']}.jpg"
        if record["status"] == "ok" and not (picture.is_file() and hashes.file(picture) == record["sha256"]):
            return None
    return _light(kept["records"])


def _render_missing(
    stage: Stage, missing: list[PageRange], done: dict[PageRange, list[dict[str, Any]]], settings: Preprocess
) -> None:
    """Render ranges in worker processes, and keep each as soon as it is whole."""
    hashes = FileHashes(stage.path(".pages.json"))
    look, rendered, total = settings.pages, 0, sum(len(pages) for pages in missing)
    assert look is not None
    collected: dict[PageRange, list[dict[str, Any]]] = defaultdict(list)
    whole = {(pages.document, index): pages for pages in missing for index in range(pages.first, pages.last)}

    def folder(pages: PageRange) -> Path:
        path = stage.path("pages", picture_folder(pages.document))
        path.mkdir(parents=True, exist_ok=True)
        return path

    workers = min(settings.workers or len(os.sched_getaffinity(0)), len(missing))
    for part, records in in_workers(
        lambda pages: (render_range, (pages, folder(pages), look.max_pixels, look.jpeg_quality)),
        missing,
        workers,
        settings.page_timeout,
        stage.stop,
    ):
        target = whole[part.document, part.first]
        collected[target] += records
        rendered += len(records)
        if len(collected[target]) == len(target):
            done[target] = _keep(stage, target, collected.pop(target), hashes)
        stage.events.progress("render pages", rendered, total, "pages")
        stage.stop.check()
    hashes.save()


def _keep(stage: Stage, pages: PageRange, records: list[dict[str, Any]], hashes: FileHashes) -> list[dict[str, Any]]:
    """Write a finished range's records, for this start and the next. Returns them without the words."""
    folder = f"preprocess/pages/{picture_folder(pages.document)}"
    finished = sorted(records, key=lambda record: int(record["page"]))
    for record in finished:
        record |= {"document": pages.document, "image": f"{folder}/{record['page']}.jpg"}
    write_json(_range_file(stage, pages), {"key": _range_key(stage, pages, hashes), "records": finished})
    return _light(finished)


def _picture(stage: Stage, record: dict[str, Any]) -> Path:
    """A page's picture. Its record names the place that it has in the end, also while a shard holds it."""
    return stage.path(str(Path(record["image"]).relative_to(stage.name)))


def _remove_strangers(stage: Stage, usable: list[dict[str, Any]]) -> None:
    """Pictures of documents that are gone, or of pages that are now skipped."""
    wanted = {_picture(stage, record) for record in usable}
    for path in visible_files(stage.path("pages")):
        if path not in wanted and not FIGURE.fullmatch(path.name):
            path.unlink()
