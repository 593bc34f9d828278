"""Many documents in worker processes: odd names, bad files, crashes, hangs, restarts."""

import json
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pymupdf
import pytest

from stages.contract.errors import DataError, InterruptedRunError
from stages.contract.stage import Stage
from stages.preprocess import documents as documents_module
from stages.preprocess.documents import RANGE, document_ids, picture_folder, render_documents
from tests.conftest import make_pdf
from tests.preprocess import bad_pdfs, bad_workers

NewStage = Callable[..., Stage]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "few" / "documents"
    path.mkdir(parents=True)
    return path


def found(folder: Path) -> dict[str, Path]:
    return document_ids(sorted(path for path in folder.rglob("*") if path.is_file()), folder)


def render(stage: Stage, folder: Path) -> list[dict[str, Any]]:
    return render_documents(stage, found(folder))


def reasons(stage: Stage) -> dict[str, str]:
    return {skipped["what"]: f"{skipped['reason']}: {skipped['detail']}" for skipped in stage.skipped}


def pictures(stage: Stage) -> dict[str, int]:
    """When each picture was written, by its path below pages/."""
    root = stage.path("pages")
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*.jpg"))}


# -- names ---------------------------------------------------------------------------------------------------------

NAMES = [
    "a.pdf", "a.PDF", "sub/a.pdf", "sub/sub/a.pdf", "a b.pdf", " a.pdf", "a.b.c.pdf", "..x..pdf.pdf", "..hidden..x.pdf",
    "专利 说明书.pdf", "专利_说明书.pdf", "é.pdf", "a", "a.pdf.pdf", "x" * 200 + ".pdf", "图" * 80 + ".pdf", "-rf.pdf",
    "%41.pdf", "new\nline.pdf", "'quoted\".pdf",
]  # fmt: skip


def test_every_name_gets_pictures_of_its_own(new_stage: NewStage, folder: Path) -> None:
    for number, name in enumerate(NAMES):
        make_pdf(folder / name, [f"document {number}"])
    stage = new_stage()
    pages = render(stage, folder)
    assert {page["document"]: page["text"] for page in pages} == {n: f"document {i}" for i, n in enumerate(NAMES)}
    assert len({page["image"] for page in pages}) == len(NAMES)
    for page in pages:
        image = stage.run.folder / page["image"]
        assert image.is_file()
        assert image.resolve().is_relative_to(stage.path("pages").resolve())
    assert stage.counts["documents"] == stage.counts["pages"] == len(NAMES)


def test_a_picture_folder_is_a_single_folder_for_any_document_name() -> None:
    names = ["../x.pdf", "/etc/passwd", "a/b.pdf", "..", "\n", "CON", "", "…"]
    folders = {picture_folder(name) for name in names}
    assert len(folders) == len(names)
    for name in folders:
        assert Path(name).name == name
        assert name not in (".", "..")


def test_a_name_that_is_not_utf8_is_skipped_with_advice_and_the_others_are_not(
    new_stage: NewStage, folder: Path
) -> None:
    """Chinese names out of old zip archives are GBK."""
    make_pdf(folder / "a.pdf", ["x"])
    (folder / os.fsdecode("专利.pdf".encode("gbk"))).write_bytes((folder / "a.pdf").read_bytes())
    stage = new_stage()
    assert [page["document"] for page in render(stage, folder)] == ["a.pdf"]
    assert [s["detail"] for s in stage.skipped] == ["its name is not UTF-8, so MuPDF cannot open it; rename it"]
    json.dumps(stage.skipped, ensure_ascii=False).encode()


def test_a_name_stored_decomposed_is_found_composed(folder: Path) -> None:
    (folder / "e\u0301.pdf").write_bytes(b"x")
    assert list(found(folder)) == ["\u00e9.pdf"]


TWINS = {"\u00e9.pdf": "composed", "e\u0301.pdf": "decomposed"}


def test_names_that_differ_only_by_composition_are_all_kept(new_stage: NewStage, folder: Path) -> None:
    for name, text in TWINS.items():
        make_pdf(folder / name, [text])
    make_pdf(folder / "a.pdf", ["other"])
    stage = new_stage()
    pages = render(stage, folder)
    assert {page["document"]: page["text"] for page in pages} == {**TWINS, "a.pdf": "other"}
    assert len({page["image"] for page in pages}) == 3
    assert stage.counts["documents"] == 3


def test_of_several_decomposed_names_the_first_is_the_composed_one(folder: Path) -> None:
    names = ["e\u0323\u0302.pdf", "\u1eb9\u0302.pdf", "\u00ea\u0323.pdf"]  # three spellings of one letter
    for name in names:
        (folder / name).write_bytes(b"x")
    ids = document_ids(sorted(folder.iterdir()), folder)
    assert sorted(path.name for path in ids.values()) == sorted(names)
    assert ids["\u1ec7.pdf"].name == min(names)


def test_a_name_with_other_bytes_and_its_escape_are_two_documents(new_stage: NewStage, folder: Path) -> None:
    make_pdf(folder / "a\\xb5.pdf", ["escaped"])
    (folder / os.fsdecode(b"a\xb5.pdf")).write_bytes((folder / "a\\xb5.pdf").read_bytes())
    stage = new_stage()
    assert [page["text"] for page in render(stage, folder)] == ["escaped"]
    assert len(stage.skipped) == 1, "not UTF-8"


# -- bad files -----------------------------------------------------------------------------------------------------


def test_bad_files_are_skipped_by_name_and_the_others_are_rendered(new_stage: NewStage, folder: Path) -> None:
    good = make_pdf(folder / "good.pdf", ["one", "", "three"])
    make_pdf(folder / "locked.pdf", ["x"], encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="u", owner_pw="o")
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "cut.pdf").write_bytes(good.read_bytes()[:70])
    (folder / "notes.txt").write_text("hello")
    (folder / "garbage.pdf").write_bytes(b"%PDF-1.7\n" + random.Random(1).randbytes(3000))
    stage = new_stage()
    assert [(page["document"], page["page"]) for page in render(stage, folder)] == [("good.pdf", 1), ("good.pdf", 3)]
    why = reasons(stage)
    assert set(why) == {"locked.pdf", "empty.pdf", "cut.pdf", "notes.txt", "garbage.pdf", "good.pdf page 2"}
    assert why["locked.pdf"] == "unreadable document: encrypted: needs a password"
    assert why["empty.pdf"] == "unreadable document: empty file"
    assert why["notes.txt"] == "unreadable document: not a PDF"
    assert why["cut.pdf"].startswith("unreadable document: damaged PDF")
    assert why["good.pdf page 2"] == "blank page: "
    assert (stage.counts["documents"], stage.counts["pages"]) == (1, 3)


def test_no_readable_document_is_an_error(new_stage: NewStage, folder: Path) -> None:
    (folder / "empty.pdf").write_bytes(b"")
    make_pdf(folder / "blank.pdf", ["", ""])
    with pytest.raises(DataError, match="no document has a readable page"):
        render(new_stage(), folder)


def test_the_table_has_the_rows_of_the_records(new_stage: NewStage, folder: Path) -> None:
    make_pdf(folder / "a.pdf", ["Part 12", "", "部件"])
    stage = new_stage()
    pages = render(stage, folder)
    rows = pq.read_table(stage.path("pages.parquet")).to_pylist()
    assert [(row["document"], row["page"], row["text"]) for row in rows] == [
        ("a.pdf", 1, "Part 12"),
        ("a.pdf", 3, "部件"),
    ]
    assert [row["image"] for row in rows] == [page["image"] for page in pages]
    assert [word["word"] for word in rows[0]["words"]] == ["Part", "12"]
    assert stage.outputs == {"pages/": None, "pages.parquet": 2}


@pytest.mark.parametrize(
    ("tree", "found", "skipped"),
    [
        (bad_pdfs.with_pages(b"100000", b"3 0 R", {100_001: b"<<>>"}), 1, ["100000 stated, 1 found"]),
        (bad_pdfs.with_pages(b"3", b"3 0 R 5 0 R"), 2, ["3 stated, 2 found"]),
        (bad_pdfs.with_pages(b"1", b"3 0 R 4 0 R 5 0 R"), 3, []),
    ],
)
def test_pages_that_are_not_there_are_one_line(
    new_stage: NewStage, folder: Path, tree: dict[int, bytes], found: int, skipped: list[str]
) -> None:
    (folder / "a.pdf").write_bytes(bad_pdfs.pdf(tree))
    stage = new_stage()
    assert len(render(stage, folder)) == stage.counts["pages"] == found
    assert [entry["detail"] for entry in stage.skipped] == skipped
    assert stage.counts["failed pages"] == 0


# -- a long document -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_pdf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    document = pymupdf.open()
    for number in range(2000):
        document.new_page(width=60, height=60).insert_text((5, 30), f"p{number + 1}", fontsize=8)
    path = tmp_path_factory.mktemp("long") / "long.pdf"
    document.save(path)
    return path


def test_2000_pages_are_shared_among_the_workers_in_little_memory(
    new_stage: NewStage, folder: Path, long_pdf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "long.pdf").symlink_to(long_pdf)
    monkeypatch.setattr(documents_module, "render_range", bad_workers.note_worker)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stage = new_stage("preprocess.pages.max_pixels=784", "preprocess.workers=2")
    pages = render(stage, folder)
    assert [page["page"] for page in pages] == list(range(1, 2001))
    assert [pages[i]["text"] for i in (0, 16, 1999)] == ["p1", "p17", "p2000"]
    noted = [line.split() for line in stage.path("workers.txt").read_text().splitlines()]
    by_worker = {worker: sum(w == worker for w, *_ in noted) for worker, *_ in noted}
    assert len(noted) == 2000 / RANGE
    assert len(by_worker) == 2
    assert min(by_worker.values()) > len(noted) / 5, "both workers share one long document"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert max(int(peak) for *_, peak in noted) < 400 * 1024


# -- workers that die ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "reason"),
    [(bad_workers.crash_on_page_2, "crashed its worker"), (bad_workers.hang_on_page_2, "took too long")],
)
def test_a_page_that_kills_its_worker_costs_that_page(
    new_stage: NewStage, folder: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], reason: str
) -> None:
    make_pdf(folder / "bad.pdf", ["one", "two", "three"])
    make_pdf(folder / "good.pdf", ["one", "two"])
    monkeypatch.setattr(documents_module, "render_range", work)
    stage = new_stage("preprocess.page_timeout=1.0", "preprocess.workers=2")
    pages = render(stage, folder)
    expected = [("bad.pdf", 1), ("bad.pdf", 3), ("good.pdf", 1), ("good.pdf", 2)]
    assert [(page["document"], page["page"]) for page in pages] == expected
    assert reasons(stage) == {"bad.pdf page 2": f"unreadable page: page {reason}"}
    assert stage.counts["failed pages"] == 1


def test_hanging_pages_cost_their_own_limits_and_no_other_page(new_stage: NewStage, folder: Path) -> None:
    """Each costs its limit once, not once for every page of its range."""
    hanging, pages, limit = {1, 7, 8, 16}, RANGE + 4, 4.0
    (folder / "bad.pdf").write_bytes(bad_pdfs.with_hanging_pages(pages, hanging))
    stage = new_stage(f"preprocess.page_timeout={limit}", "preprocess.workers=1")
    began = time.monotonic()
    found = render(stage, folder)
    took = time.monotonic() - began
    assert [page["page"] for page in found] == [page for page in range(1, pages + 1) if page not in hanging]
    assert reasons(stage) == {f"bad.pdf page {page}": "unreadable page: page took too long" for page in hanging}
    assert took >= len(hanging) * limit
    assert took < RANGE * limit, "the range's whole time was not waited for even once"


def test_a_page_that_took_too_long_gets_another_limit(
    new_stage: NewStage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pdf(folder / "bad.pdf", ["one", "two"])
    monkeypatch.setattr(documents_module, "render_range", bad_workers.hang_on_page_2)
    first = new_stage("preprocess.page_timeout=3")
    assert [page["page"] for page in render(first, folder)] == [1]
    monkeypatch.undo()
    assert [page["page"] for page in render(new_stage("preprocess.page_timeout=3"), folder)] == [1], "as before"
    assert [page["page"] for page in render(new_stage("preprocess.page_timeout=60"), folder)] == [1, 2]


@pytest.fixture(scope="module")
def slow_pdf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slow") / "slow.pdf"
    path.write_bytes(bad_pdfs.slow_to_open(800_000))
    return path


def test_a_document_that_takes_too_long_to_open_costs_that_document(
    new_stage: NewStage, folder: Path, slow_pdf: Path
) -> None:
    (folder / "a.pdf").symlink_to(slow_pdf)
    make_pdf(folder / "b.pdf", ["one"])
    stage = new_stage("preprocess.page_timeout=3")
    assert [page["document"] for page in render(stage, folder)] == ["b.pdf"]
    assert reasons(stage) == {"a.pdf": "unreadable document: opening took too long"}


def test_a_stop_is_heard_while_a_document_is_opened(new_stage: NewStage, folder: Path, slow_pdf: Path) -> None:
    (folder / "a.pdf").symlink_to(slow_pdf)
    stage = new_stage("preprocess.page_timeout=3600")
    timer = threading.Timer(3, lambda: setattr(stage.stop, "signal", signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    with pytest.raises(InterruptedRunError):
        render(stage, folder)
    timer.cancel()
    assert time.monotonic() - began < 30, "opening takes two minutes"


def test_a_worker_ended_by_a_stop_of_the_whole_group_does_not_make_its_page_bad(
    new_stage: NewStage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal's or a batch system's stop reaches the workers as well as the stage."""
    make_pdf(folder / "a.pdf", ["one"])
    stage = new_stage()
    stage.stop.signal = signal.SIGTERM
    monkeypatch.setattr(documents_module, "render_range", bad_workers.crash)
    with pytest.raises(InterruptedRunError):
        render(stage, folder)
    monkeypatch.undo()
    assert [page["text"] for page in render(new_stage(), folder)] == ["one"]


# -- restarts ------------------------------------------------------------------------------------------------------


def test_a_stop_keeps_what_is_finished(new_stage: NewStage, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pdf(folder / "a.pdf", [f"page {n}" for n in range(3 * RANGE)])
    stopped = new_stage("preprocess.workers=1")
    save = documents_module._save_range

    def save_and_stop(*arguments: Any) -> list[dict[str, Any]]:
        stopped.stop.signal = signal.SIGTERM
        return save(*arguments)

    monkeypatch.setattr(documents_module, "_save_range", save_and_stop)
    with pytest.raises(InterruptedRunError):
        render(stopped, folder)
    monkeypatch.undo()
    finished = json.loads(next(stopped.path("cache", "pages").rglob("*.json")).read_text())["records"]
    before = pictures(stopped)
    stage = new_stage()
    assert len(render(stage, folder)) == 3 * RANGE
    kept = [f"{picture_folder('a.pdf')}/{record['page']}.jpg" for record in finished]
    assert len(kept) == RANGE
    assert {name: pictures(stage)[name] for name in kept} == {name: before[name] for name in kept}


def test_one_more_document_is_the_only_one_rendered(new_stage: NewStage, folder: Path) -> None:
    for name in ("a.pdf", "b.pdf"):
        make_pdf(folder / name, [name])
    first = new_stage()
    render(first, folder)
    before = pictures(first)
    make_pdf(folder / "c.pdf", ["c.pdf"])
    second = new_stage()
    assert [page["text"] for page in render(second, folder)] == ["a.pdf", "b.pdf", "c.pdf"]
    after = pictures(second)
    assert set(after) - set(before) == {f"{picture_folder('c.pdf')}/1.jpg"}
    assert {name: after[name] for name in before} == before


def test_an_unchanged_start_renders_nothing_and_writes_the_same_table(new_stage: NewStage, folder: Path) -> None:
    make_pdf(folder / "a.pdf", ["one", "", "three"])
    first = new_stage()
    records = render(first, folder)
    before, table = pictures(first), first.path("pages.parquet").read_bytes()
    second = new_stage()
    assert render(second, folder) == records
    assert pictures(second) == before
    assert second.path("pages.parquet").read_bytes() == table
    assert second.skipped == first.skipped, "skipped pages are listed again"
    assert second.counts == first.counts


def test_an_unchanged_start_opens_no_document(
    new_stage: NewStage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pdf(folder / "a.pdf", ["one"])
    render(new_stage(), folder)
    opened: list[object] = []
    real_open = pymupdf.open
    monkeypatch.setattr(pymupdf, "open", lambda path, **options: opened.append(path) or real_open(path, **options))
    monkeypatch.setattr(documents_module, "run_in_workers", lambda _, ranges, *others: opened.extend(ranges) or [])
    assert [page["text"] for page in render(new_stage(), folder)] == ["one"]
    assert opened == []


def test_a_removed_document_leaves_no_picture(new_stage: NewStage, folder: Path) -> None:
    for name in ("a.pdf", "b.pdf"):
        make_pdf(folder / name, [name])
    render(new_stage(), folder)
    (folder / "b.pdf").unlink()
    stage = new_stage()
    render(stage, folder)
    assert list(pictures(stage)) == [f"{picture_folder('a.pdf')}/1.jpg"]


def test_a_shorter_document_leaves_no_picture_of_its_old_pages(new_stage: NewStage, folder: Path) -> None:
    make_pdf(folder / "a.pdf", ["one", "two"])
    render(new_stage(), folder)
    make_pdf(folder / "a.pdf", ["", "new two"])
    stage = new_stage()
    assert [page["text"] for page in render(stage, folder)] == ["new two"]
    assert list(pictures(stage)) == [f"{picture_folder('a.pdf')}/2.jpg"]


@pytest.mark.parametrize("override", ["preprocess.pages.max_pixels=25088", "preprocess.pages.jpeg_quality=50"])
def test_other_page_settings_render_again(new_stage: NewStage, folder: Path, override: str) -> None:
    make_pdf(folder / "a.pdf", ["one"])
    before = render(new_stage(), folder)
    after = render(new_stage(override), folder)
    assert before[0]["sha256"] != after[0]["sha256"]


def test_pages_read_by_earlier_rules_are_read_again(
    new_stage: NewStage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pdf(folder / "a.pdf", ["x"])
    first = new_stage()
    render(first, folder)
    before = pictures(first)
    monkeypatch.setattr(documents_module, "RULES_VERSION", -1)
    again = new_stage()
    render(again, folder)
    assert pictures(again).keys() == before.keys() and pictures(again) != before


def test_a_page_whose_text_is_all_that_is_there_is_counted(new_stage: NewStage, folder: Path) -> None:
    document = pymupdf.open()
    document.new_page().insert_text((50, 100), "a text layer", render_mode=3)
    document.save(folder / "a.pdf")
    stage = new_stage()
    assert [page["text"] for page in render(stage, folder)] == ["a text layer"]
    assert stage.counts["pages with text but nothing drawn"] == 1


@pytest.mark.parametrize("damage", ["changed", "deleted"])
def test_a_changed_or_deleted_picture_is_rendered_again(new_stage: NewStage, folder: Path, damage: str) -> None:
    make_pdf(folder / "a.pdf", ["one"])
    stage = new_stage()
    picture = stage.run.folder / render(stage, folder)[0]["image"]
    whole = picture.read_bytes()
    if damage == "changed":
        picture.write_bytes(whole[:-1] + b"x")
    else:
        picture.unlink()
    render(new_stage(), folder)
    assert picture.read_bytes() == whole
