"""Render many documents in parallel, page range by page range. A restart keeps finished ranges."""

import hashlib
import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, count
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
from stages.preprocess.render import PageRange, count_pages, render_range
from stages.preprocess.workers import TOOK_TOO_LONG, run_in_workers

RANGE = 16
"""Number of pages that a worker renders at once. A kill loses at most these for each worker, and several workers can
share one long document."""

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
    """Documents by id: the path below the folder, with its suffix, in Unicode's composed form (NFC).

    If several paths have the same composed form, the path that is itself composed gets this id; if there is none, the
    first path does. The id of each other path is the path as spelled, with a number such as ` (2)` if that id is taken.
    """
    alike: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in documents:
        name = stored_name(path.relative_to(folder))
        alike[unicodedata.normalize("NFC", name)].append((name, path))
    ids: dict[str, Path] = {}
    for composed, members in alike.items():
        members.sort(key=lambda member: member[0] != composed)
        ids[composed] = members[0][1]
        for name, path in members[1:]:
            numbered = (f"{name} ({number})" for number in count(2))
            ids[next(one for one in chain([name], numbered) if one not in ids and one not in alike)] = path
    return ids


def picture_folder(document: str) -> str:
    """A folder name for a document's pictures: unique, safe on any file system, and readable where possible."""
    readable = re.sub(r"[^\w-]+", "_", Path(document).stem)[:40].strip("_")
    return f"{readable or 'document'}-{hashlib.sha256(document.encode()).hexdigest()[:8]}"


def render_documents(
    stage: Stage, documents: dict[str, Path], passages_of: Callable[[dict[str, Any]], int] = lambda page: 1
) -> list[dict[str, Any]]:
    """Return the records of the usable pages of all documents, in order. Renders the pages that no earlier start has
    rendered. Writes pages.parquet, unless in a shard. `passages_of` returns the number of a page's passages.

    A record has the table's columns except `passages` and `words`; the words of many pages would not fit in memory.
    Unreadable documents, blank pages and failing pages go to `stage.skip`. Deletes the pictures of other pages. Raises
    DataError if no page is usable, unless in a shard, and InterruptedRunError if the stage is asked to stop.
    """
    settings = stage.run.recipe.preprocess
    hashes = FileHashes(stage.path(".pages.json"))
    done: dict[PageRange, list[dict[str, Any]]] = {}
    missing: list[PageRange] = []
    try:
        ranges = list(_ranges(stage, documents, hashes))
        stage.counts["documents"] = len({pages.document for pages in ranges})
        for pages in ranges:
            records = _finished_records(stage, pages, hashes)
            if records is None:
                missing.append(pages)
            else:
                done[pages] = records
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
    """Whether a page is usable. Counts the page, skips it if it is not usable, and logs it if it has text but nothing
    is drawn."""
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


def _ranges(stage: Stage, documents: dict[str, Path], hashes: FileHashes) -> Iterator[PageRange]:
    """The page ranges of all readable documents, in order. Unreadable documents go to `stage.skip`, and so does a note
    on each readable document that has fewer pages than it states."""
    counted = _count_pages(stage, documents, hashes)
    for name, path in documents.items():
        found = counted[name]
        if "status" in found:
            stage.skip(name, "unreadable document", found["status"])
            stage.events.say(f"skipped {name}: {found['status']}")
            continue
        pages = int(found["pages"])
        if found["stated"] > pages:
            stage.skip(name, "fewer pages than stated", f"{found['stated']} stated, {pages} found")
        for first in range(0, pages, RANGE):
            yield PageRange(name, path, first, min(first + RANGE, pages))


def _count_pages(stage: Stage, documents: dict[str, Path], hashes: FileHashes) -> dict[str, dict[str, Any]]:
    """Each document's record of `render.count_pages`, by id. An earlier start's record is used if it is still valid.
    The other documents are counted in worker processes, because opening a damaged document may never end. Raises
    InterruptedRunError if the stage is asked to stop."""
    settings = stage.run.recipe.preprocess
    counted: dict[str, dict[str, Any]] = {}
    missing: list[PageRange] = []
    for name, path in documents.items():
        saved = read_json(_count_file(stage, name))
        if saved is not None and saved["key"] == _count_key(path, hashes):
            counted[name] = saved["record"]
        else:
            missing.append(PageRange(name, path, 0, 1))
        stage.stop.check()
    # starting a worker takes as long as counting many documents
    workers = min(_worker_count(settings), math.ceil(len(missing) / RANGE))
    for document, (record,) in run_in_workers(
        lambda document: (count_pages, (document.source,)),
        missing,
        workers,
        settings.page_timeout,
        stage.stop,
        "opening",
    ):
        counted[document.document] = record
        if "pages" in record:  # what failed is tried again at the next start
            key = _count_key(document.source, hashes)
            write_json(_count_file(stage, document.document), {"key": key, "record": record})
        stage.events.report_progress("count pages", len(counted), len(documents), "documents")
        stage.stop.check()
    return counted


def _count_file(stage: Stage, document: str) -> Path:
    """The file of a document's record of `render.count_pages`, with the record's key."""
    return stage.cache_file("counts", f"{picture_folder(document)}.json")


def _count_key(document: Path, hashes: FileHashes) -> str:
    """The key of a document's page count: it changes with the document's content and with MuPDF's version."""
    return digest_of([hashes.file_digest(document), pymupdf.VersionBind])


def _worker_count(settings: Preprocess) -> int:
    """The number of worker processes: that of the recipe, else one for each CPU."""
    return settings.workers or len(os.sched_getaffinity(0))


def _range_file(stage: Stage, pages: PageRange) -> Path:
    """The file of a range's records, with their key and time limit."""
    return stage.cache_file("pages", picture_folder(pages.document), f"{pages.first}-{pages.last}.json")


def _drop_words(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records without their words."""
    return [{key: value for key, value in record.items() if key != "words"} for record in records]


def _range_key(settings: Preprocess, pages: PageRange, hashes: FileHashes) -> str:
    """The key of a range's records: it changes with the document's content, the settings for pictures, the rules for
    reading, and MuPDF's version."""
    look = settings.pages
    assert look is not None  # a recipe of a task that reads documents has it
    made_from = [hashes.file_digest(pages.source), pages.first, pages.last, look.max_pixels, look.jpeg_quality]
    return digest_of([*made_from, RULES_VERSION, pymupdf.VersionBind])


def _finished_records(stage: Stage, pages: PageRange, hashes: FileHashes) -> list[dict[str, Any]] | None:
    """The records of a range that an earlier start finished, without words. None if there are none for this document
    and these settings, if a picture is missing or changed, or if a page took too long and the time limit has changed
    since."""
    settings = stage.run.recipe.preprocess
    saved = read_json(_range_file(stage, pages))
    if saved is None or saved["key"] != _range_key(settings, pages, hashes):
        return None
    late = any(record["status"].endswith(TOOK_TOO_LONG) for record in saved["records"])
    if late and saved.get("page_timeout") != settings.page_timeout:
        return None
    folder = stage.path("pages", picture_folder(pages.document))
    for record in saved["records"]:
        picture = folder / f"{record['page']}.jpg"
        if record["status"] == "ok" and not (picture.is_file() and hashes.file_digest(picture) == record["sha256"]):
            return None
    return _drop_words(saved["records"])


def _render_missing(
    stage: Stage, missing: list[PageRange], done: dict[PageRange, list[dict[str, Any]]], settings: Preprocess
) -> None:
    """Render ranges in worker processes. Saves each range, and adds its records to `done`, as soon as all its pages are
    rendered. Raises InterruptedRunError if the stage is asked to stop."""
    hashes = FileHashes(stage.path(".pages.json"))
    look, rendered, total = settings.pages, 0, sum(len(pages) for pages in missing)
    assert look is not None
    collected: dict[PageRange, list[dict[str, Any]]] = defaultdict(list)
    whole = {(pages.document, index): pages for pages in missing for index in range(pages.first, pages.last)}

    def make_folder(pages: PageRange) -> Path:
        """Return the folder of a document's pictures. Creates it if it is missing."""
        path = stage.path("pages", picture_folder(pages.document))
        path.mkdir(parents=True, exist_ok=True)
        return path

    workers = min(_worker_count(settings), len(missing))
    for part, records in run_in_workers(
        lambda pages: (render_range, (pages, make_folder(pages), look.max_pixels, look.jpeg_quality)),
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
    """Return a finished range's records, sorted by page and without words. Saves them, with words, for the next start.
    Adds document and picture to each of `records`."""
    folder = f"preprocess/pages/{picture_folder(pages.document)}"
    finished = sorted(records, key=lambda record: int(record["page"]))
    for record in finished:
        record |= {"document": pages.document, "image": f"{folder}/{record['page']}.jpg"}
    settings = stage.run.recipe.preprocess
    saved = {"key": _range_key(settings, pages, hashes), "page_timeout": settings.page_timeout, "records": finished}
    write_json(_range_file(stage, pages), saved)
    return _drop_words(finished)


def _picture_path(stage: Stage, record: dict[str, Any]) -> Path:
    """A page's picture in the folder of this stage or shard. The record has the path that the picture has after
    merging."""
    return stage.path(str(Path(record["image"]).relative_to(stage.name)))


def _remove_stale_pictures(stage: Stage, usable: list[dict[str, Any]]) -> None:
    """Delete the pictures of documents that are gone and of pages that are now skipped, but no crops of figures."""
    wanted = {_picture_path(stage, record) for record in usable}
    for path in visible_files(stage.path("pages")):
        if path not in wanted and not FIGURE.fullmatch(path.name):
            path.unlink()
