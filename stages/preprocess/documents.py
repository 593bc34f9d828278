"""Render many documents in parallel, page range by page range. A restart keeps finished ranges."""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pymupdf

from stages.contract.errors import DataError
from stages.contract.files import (
    FileHashes,
    digest_of,
    open_atomically,
    read_json,
    stored_name,
    visible_files,
    write_json,
)
from stages.contract.recipe import Preprocess
from stages.contract.stage import Stage
from stages.preprocess.reading import RULES_VERSION
from stages.preprocess.render import PageRange, open_document, render_range
from stages.preprocess.workers import run_in_workers

RANGE = 16
"""Pages that a worker renders at once. A kill costs at most these, and workers share one long document."""

PAGE_TABLE = pa.schema(
    [
        ("document", pa.string()),
        ("page", pa.int32()),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("text", pa.string()),
        ("passages", pa.int32()),
        ("words", pa.list_(pa.struct([("box", pa.list_(pa.float32(), 4)), ("word", pa.string())]))),
    ]
)
"""Columns of pages.parquet. vectors.npy has `passages` rows for each page, in the same order; `box` is x0, y0, x1, y1
in 0..1 of the page."""


FIGURE = re.compile(r"[0-9]+-figure-[0-9a-z]+\.jpg")
"""Names of the pictures below pages/ that are crops of figures, which `figures` writes and deletes."""


def document_ids(documents: list[Path], folder: Path) -> dict[str, Path]:
    """Documents by id: the path below the folder, with its suffix, so that no two files share one."""
    return {unicodedata.normalize("NFC", stored_name(path.relative_to(folder))): path for path in documents}


def picture_folder(document: str) -> str:
    """A folder name for a document's pictures: unique, safe on any file system, and readable where possible."""
    readable = re.sub(r"[^\w-]+", "_", Path(document).stem)[:40].strip("_")
    return f"{readable or 'document'}-{hashlib.sha256(document.encode()).hexdigest()[:8]}"


def render_documents(
    stage: Stage, documents: dict[str, Path], passages_of: Callable[[dict[str, Any]], int] = lambda page: 1
) -> list[dict[str, Any]]:
    """Render every page of every document and write pages.parquet. Returns the usable pages' records, in its order.
    `passages_of` returns the number of a page's passages.

    Each record has the table's columns except the words, which for many pages would not fit in memory. Unreadable
    documents, blank pages and failing pages go to `stage.skip`. Raises DataError when no page is left.
    """
    settings = stage.run.recipe.preprocess
    hashes = FileHashes(stage.path(".pages.json"))
    ranges = list(_ranges(stage, documents))
    stage.counts["documents"] = len({pages.document for pages in ranges})
    done: dict[PageRange, list[dict[str, Any]]] = {}
    missing: list[PageRange] = []
    for pages in ranges:
        records = _finished_records(stage, pages, hashes)
        if records is None:
            missing.append(pages)
        else:
            done[pages] = records
    try:
        _render_missing(stage, missing, done, settings)
    except RuntimeError:
        stage.stop.check()  # a stop of the whole process group breaks the workers' pool while they start
        raise
    usable = [record for pages in ranges for record in done[pages] if _is_usable(stage, pages.document, record)]
    if not usable and stage.shard is None:
        raise DataError(
            f"{stage.run.data}: no document has a readable page; see {stage.path('log.txt')} for the reasons"
        )
    _remove_stale_pictures(stage, usable)
    for record in usable:  # save the digests, so that a restart does not read every picture
        hashes.file_digest(_picture_path(stage, record))
    hashes.save()
    if stage.shard is not None:  # the merging stage writes the table
        return usable
    _write_table(stage, ranges, passages_of)
    stage.outputs["pages/"] = None
    stage.outputs["pages.parquet"] = len(usable)
    return usable


def _is_usable(stage: Stage, document: str, record: dict[str, Any]) -> bool:
    """Count a page. Record it as skipped if it cannot be used."""
    stage.counts["pages"] += 1
    where = f"{document} page {record['page']}"
    if record["status"] == "blank":
        stage.skip(where, "blank page")
    elif record["status"] != "ok":
        stage.counts["failed pages"] += 1
        stage.skip(where, "unreadable page", record["status"])
    elif "nothing_drawn" in record:
        stage.counts["pages with text but nothing drawn"] += 1
        print(f"{where}: text, but nothing drawn: {record['nothing_drawn']}")  # into the log
    return bool(record["status"] == "ok")


def _write_table(stage: Stage, ranges: list[PageRange], passages_of: Callable[[dict[str, Any]], int]) -> None:
    """Write pages.parquet range by range, so that the words of all pages are never in memory at once."""
    with (
        open_atomically(stage.path("pages.parquet"), "wb") as file,
        pq.ParquetWriter(file, PAGE_TABLE) as writer,
    ):
        rows: list[dict[str, Any]] = []
        for pages in ranges:
            for record in read_json(_range_file(stage, pages))["records"]:
                if record["status"] == "ok":
                    words = [{"box": word[:4], "word": word[4]} for word in record["words"]]
                    rows.append({**record, "words": words, "passages": passages_of(record)})
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


def _without_words(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "words"} for record in records]


def _range_key(settings: Preprocess, pages: PageRange, hashes: FileHashes) -> str:
    look = settings.pages
    assert look is not None  # a recipe of a task that reads documents has it
    made_from = [hashes.file_digest(pages.source), pages.first, pages.last, look.max_pixels, look.jpeg_quality]
    return digest_of([*made_from, RULES_VERSION, pymupdf.VersionBind])


def _finished_records(stage: Stage, pages: PageRange, hashes: FileHashes) -> list[dict[str, Any]] | None:
    """Records of a range that an earlier start finished; None if it did not, or if a picture is missing or changed."""
    saved = read_json(_range_file(stage, pages))
    if saved is None or saved["key"] != _range_key(stage.run.recipe.preprocess, pages, hashes):
        return None
    folder = stage.path("pages", picture_folder(pages.document))
    for record in saved["records"]:
        picture = folder / f"{record['page']}.jpg"
        if record["status"] == "ok" and not (picture.is_file() and hashes.file_digest(picture) == record["sha256"]):
            return None
    return _without_words(saved["records"])


def _render_missing(
    stage: Stage, missing: list[PageRange], done: dict[PageRange, list[dict[str, Any]]], settings: Preprocess
) -> None:
    """Render ranges in worker processes. Save each as soon as all its pages are rendered."""
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
    for part, records in run_in_workers(
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
            done[target] = _save_range(stage, target, collected.pop(target), hashes)
        stage.events.report_progress("render pages", rendered, total, "pages")
        stage.stop.check()
    hashes.save()


def _save_range(
    stage: Stage, pages: PageRange, records: list[dict[str, Any]], hashes: FileHashes
) -> list[dict[str, Any]]:
    """Write a finished range's records, for this start and the next. Returns them without the words."""
    folder = f"preprocess/pages/{picture_folder(pages.document)}"
    finished = sorted(records, key=lambda record: int(record["page"]))
    for record in finished:
        record |= {"document": pages.document, "image": f"{folder}/{record['page']}.jpg"}
    key = _range_key(stage.run.recipe.preprocess, pages, hashes)
    write_json(_range_file(stage, pages), {"key": key, "records": finished})
    return _without_words(finished)


def _picture_path(stage: Stage, record: dict[str, Any]) -> Path:
    """A page's picture in this stage's or shard's folder. The record always has its path after merging."""
    return stage.path(str(Path(record["image"]).relative_to(stage.name)))


def _remove_stale_pictures(stage: Stage, usable: list[dict[str, Any]]) -> None:
    """Delete pictures of documents that are gone, and of pages that are now skipped."""
    wanted = {_picture_path(stage, record) for record in usable}
    for path in visible_files(stage.path("pages")):
        if path not in wanted and not FIGURE.fullmatch(path.name):
            path.unlink()
