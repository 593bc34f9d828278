"""One page as a picture: its size and its words; files that are not PDFs."""

import io
import math
import random
from collections.abc import Callable
from pathlib import Path

import pymupdf
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from stages.preprocess.render import MAX_RATIO, PATCH, PageRange, is_unicolor, open_document, picture_size, render_range
from tests.conftest import REPOSITORY, make_pdf
from tests.preprocess import bad_pdfs
from tests.preprocess.corpus import MadePage, corpus, runs_kept, write_pdf

sides = st.floats(0.5, 60_000, allow_nan=False)
budgets = st.integers(PATCH * PATCH, 4_000_000)
DEMO = sorted((REPOSITORY / "recipes" / "data" / "patent-qa" / "documents").glob("*.pdf"))


# -- the size of a picture -----------------------------------------------------------------------------------------


@given(st.floats(0.01, 60_000), st.floats(1, MAX_RATIO * 0.999), st.booleans(), budgets)
@example(10, 199, False, 784)
@example(10, 150, True, 100_352)
@example(10, 199, False, 1_229_312)
@example(0.01, 1, False, 784)
def test_a_picture_is_within_its_budget_and_accepted_by_the_model(
    short: float, ratio: float, wide: bool, budget: int
) -> None:
    width, height = (short * ratio, short) if wide else (short, short * ratio)
    columns, rows = picture_size(width, height, budget)
    assert columns > 0
    assert rows > 0
    assert columns % PATCH == 0
    assert rows % PATCH == 0
    assert columns * rows <= budget
    assert max(columns, rows) <= MAX_RATIO * min(columns, rows), "the model's processor refuses a larger ratio"


@given(st.floats(50, 5_000), st.floats(1, 8), st.integers(200_000, 4_000_000))
def test_a_picture_has_nearly_the_pages_shape(height: float, ratio: float, budget: int) -> None:
    width = height * ratio
    columns, rows = picture_size(width, height, budget)
    assert columns / rows == pytest.approx(ratio, rel=PATCH / min(columns, rows) * 1.01)


@given(st.floats(400, 5_000), st.floats(1, 4), st.integers(200_000, 1_300_000))
def test_the_budget_is_used(height: float, ratio: float, budget: int) -> None:
    columns, rows = picture_size(height * ratio, height, budget)
    assert (columns + PATCH) * (rows + PATCH) > min(budget, height * ratio * height * (200 / 72) ** 2) * 0.999


def test_known_sizes() -> None:
    assert picture_size(595, 842, 1_229_312) == (924, 1316)  # A4 at the default budget
    assert picture_size(72, 72, 1_229_312) == (196, 196), "a small page is not enlarged beyond 200 DPI"
    assert picture_size(1, 1, 784) == (28, 28)


@pytest.mark.parametrize(
    ("width", "height"), [(0, 10), (-5, 10), (math.nan, 10), (math.inf, 10), (10, 2010), (20_001, 100)]
)
def test_shapes_that_no_model_accepts(width: float, height: float) -> None:
    with pytest.raises(ValueError, match=r"size|sides differ"):
        picture_size(width, height, 1_229_312)


# -- pages ---------------------------------------------------------------------------------------------------------


def rendered(path: Path, folder: Path, max_pixels: int = 100_352) -> list[dict[str, object]]:
    folder.mkdir(exist_ok=True)
    with open_document(path) as document:
        pages = PageRange(path.name, path, 0, document.page_count)
    return render_range(pages, folder, max_pixels, 80)


def test_a_page_becomes_a_picture_of_exactly_the_given_size(tmp_path: Path) -> None:
    path = make_pdf(tmp_path / "a.pdf", ["Part 12 is a gear.", "部件14是踏板"], size=(333.3, 478.9))
    records = rendered(path, tmp_path / "out")
    assert [record["status"] for record in records] == ["ok", "ok"]
    for record in records:
        with Image.open(tmp_path / "out" / f"{record['page']}.jpg") as picture:
            assert picture.size == (record["width"], record["height"]) == picture_size(333.3, 478.9, 100_352)
            assert picture.convert("L").getextrema()[0] < 100, "the words must be drawn"
    assert records[0]["text"] == "Part 12 is a gear."
    assert records[1]["text"] == "部件14是踏板"


def test_words_come_with_boxes_in_fractions_of_the_page(tmp_path: Path) -> None:
    words = rendered(make_pdf(tmp_path / "a.pdf", ["Part 12"], size=(200, 400)), tmp_path / "out")[0]["words"]
    assert [word[4] for word in words] == ["Part", "12"]  # type: ignore[attr-defined]
    for x0, y0, x1, y1, _ in words:  # type: ignore[attr-defined]
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
    assert words[0][0] == pytest.approx(10 / 200, abs=0.01)  # type: ignore[index]


def test_blank_pages_are_found_and_make_no_picture(tmp_path: Path) -> None:
    records = rendered(make_pdf(tmp_path / "a.pdf", ["", "x", ""]), tmp_path / "out")
    assert [record["status"] for record in records] == ["blank", "ok", "blank"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["2.jpg"]


def test_a_page_with_only_a_drawing_is_not_blank(tmp_path: Path) -> None:
    document = pymupdf.open()
    document.new_page().draw_line((100, 100), (200, 300))
    document.save(tmp_path / "a.pdf")
    assert rendered(tmp_path / "a.pdf", tmp_path / "out")[0]["status"] == "ok"


def test_a_page_20_metres_wide(tmp_path: Path) -> None:
    metre = 72 / 0.0254
    content = b"BT /F1 900 Tf 500 700 Td (a very wide page) Tj ET"
    user_unit = 20 * metre / 14_400  # a page's box ends at 14,400 units (ISO 32000-1, annex C.2): the unit grows
    (tmp_path / "a.pdf").write_bytes(
        b"%%PDF-1.6\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 14400 2000]/UserUnit %.4f/Contents 4 0 R"
        b"/Resources<</Font<</F1 5 0 R>>>>>>endobj\n"
        b"4 0 obj<</Length %d>>stream\n%b\nendstream endobj\n"
        b"5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj\ntrailer<</Root 1 0 R>>\n"
        % (user_unit, len(content), content)
    )
    with open_document(tmp_path / "a.pdf") as document:
        assert document[0].rect.width == pytest.approx(20 * metre, rel=0.001)
    record = rendered(tmp_path / "a.pdf", tmp_path / "out", 1_229_312)[0]
    assert record["status"] == "ok"
    assert record["text"] == "a very wide page"
    with Image.open(tmp_path / "out" / "1.jpg") as picture:
        assert picture.size == picture_size(14_400, 2_000, 1_229_312)


def test_a_strip_is_skipped_with_the_reason_and_its_neighbours_are_not(tmp_path: Path) -> None:
    document = pymupdf.open()
    for width, height in ((200, 300), (14_000, 60), (14_000, 100)):
        document.new_page(width=width, height=height).insert_text((10, 30), "words")
    document.save(tmp_path / "a.pdf")
    statuses = [record["status"] for record in rendered(tmp_path / "a.pdf", tmp_path / "out", 50_176)]
    assert statuses == ["ok", "page cannot be rendered: sides differ more than 200 to 1", "ok"]


def test_a_rotated_page_is_rendered_upright(tmp_path: Path) -> None:
    document = pymupdf.open()
    page = document.new_page(width=200, height=400)
    page.insert_text((10, 30), "turned")
    page.set_rotation(90)
    document.save(tmp_path / "a.pdf")
    record = rendered(tmp_path / "a.pdf", tmp_path / "out")[0]
    assert record["width"] > record["height"]  # type: ignore[operator]
    x0, y0, x1, y1, word = record["words"][0]  # type: ignore[index]
    assert word == "turned"
    assert 0.9 < x0 < x1 < 1, "the top of the page is now on the right"
    assert 0 < y0 < 0.1
    assert y1 - y0 > x1 - x0, "and the word runs downwards"


def test_the_same_page_gives_the_same_bytes(tmp_path: Path) -> None:
    records = [rendered(DEMO[0], tmp_path / name) for name in ("a", "b")]
    assert records[0] == records[1]
    assert (tmp_path / "a" / "1.jpg").read_bytes() == (tmp_path / "b" / "1.jpg").read_bytes()


KINDS = [page for page, writer in corpus(2) if writer == "operators"]
"""A made page of each kind that the other writer cannot write alone."""


@pytest.mark.parametrize("page", KINDS, ids=lambda page: page.kind)
def test_the_text_of_a_page_is_in_reading_order(tmp_path: Path, page: MadePage) -> None:
    (tmp_path / "a.pdf").write_bytes(write_pdf(page, "operators", 1))
    (record,) = rendered(tmp_path / "a.pdf", tmp_path / "out")
    kept, total = runs_kept(page.streams, str(record["text"]))
    assert kept / total >= 0.9


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize("unit", [1, 2.5])
def test_the_boxes_of_words_are_on_the_ink(tmp_path: Path, rotate: int, unit: float) -> None:
    document = pymupdf.open()
    page = document.new_page(width=400, height=600)
    page.insert_text((50, 100), "hello", fontsize=20)
    document.xref_set_key(page.xref, "UserUnit", str(unit))
    page.set_rotation(rotate)
    document.save(tmp_path / "a.pdf")
    (record,) = rendered(tmp_path / "a.pdf", tmp_path / "out")
    ((x0, y0, x1, y1, word),) = record["words"]  # type: ignore[misc]
    with Image.open(tmp_path / "out" / "1.jpg") as picture:
        left, top, right, bottom = picture.convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    width, height = record["width"], record["height"]
    assert word == "hello"
    assert x0 * width < left + 2 and right - 2 < x1 * width  # type: ignore[operator]
    assert y0 * height < top + 2 and bottom - 2 < y1 * height  # type: ignore[operator]
    assert (x1 - x0) * (y1 - y0) < 0.01


# -- blank pages and hairlines -------------------------------------------------------------------------------------


def with_content(path: Path, content: bytes, text: str = "") -> Path:
    """A page with these operators, and with a text in front of them."""
    document = pymupdf.open()
    page = document.new_page(width=400, height=600)
    if text:
        page.insert_text((50, 100), text, render_mode=3)  # invisible, as a scan's text layer
    xref = document.get_new_xref()
    document.update_object(xref, "<<>>")
    document.update_stream(xref, content)
    contents = " ".join(f"{one} 0 R" for one in [*page.get_contents(), xref])
    document.xref_set_key(page.xref, "Contents", f"[{contents}]")
    document.save(path)
    return path


@pytest.mark.parametrize(
    "line",
    [
        b"0 w 50 300 m 350 300 l S",
        b"0 w 50 100 m 350 500 l S",
        b"0.05 w 50 100 m 50 500 l S",
        b"0 w 50 50 200 300 re S",
        b"0.1 w 200 300 m 300 400 350 300 350 200 c S",
        b"0 0 1 RG 0 w 50 300 m 350 300 l S",
    ],
)
def test_a_hairline_is_dark(tmp_path: Path, line: bytes) -> None:
    path = with_content(tmp_path / "a.pdf", line)
    assert rendered(path, tmp_path / "out")[0]["status"] == "ok"
    picture = Image.open(tmp_path / "out" / "1.jpg").convert("L")
    assert picture.getextrema()[0] < 100


def test_a_page_that_cannot_be_drawn_is_no_blank_page(tmp_path: Path) -> None:
    (record,) = rendered(with_content(tmp_path / "a.pdf", b"/Missing Do"), tmp_path / "out")
    assert str(record["status"]).startswith("page cannot be rendered: syntax error: cannot find XObject")


def test_a_page_with_text_of_which_nothing_is_drawn_keeps_its_text_and_says_so(tmp_path: Path) -> None:
    (record,) = rendered(with_content(tmp_path / "a.pdf", b"/Missing Do", "a text layer"), tmp_path / "out")
    assert (record["status"], record["text"]) == ("ok", "a text layer")
    assert str(record["nothing_drawn"]).startswith("syntax error: cannot find XObject")
    (seen,) = rendered(make_pdf(tmp_path / "b.pdf", ["seen"]), tmp_path / "out")
    assert "nothing_drawn" not in seen


def test_a_warning_is_of_its_own_page(tmp_path: Path) -> None:
    with_content(tmp_path / "a.pdf", b"/Missing Do")
    with pymupdf.open(tmp_path / "a.pdf") as document:
        document.new_page()
        document.save(tmp_path / "b.pdf")
    failed, blank = rendered(tmp_path / "b.pdf", tmp_path / "out")
    assert failed["status"] != "blank" and blank["status"] == "blank"


def test_a_page_of_one_colour_is_blank_but_with_a_text_layer(tmp_path: Path) -> None:
    for colour in (b"", b"0.5 g 0 0 400 600 re f"):
        assert rendered(with_content(tmp_path / "a.pdf", colour), tmp_path / "out")[0]["status"] == "blank"
        assert rendered(with_content(tmp_path / "b.pdf", colour, "words"), tmp_path / "out")[0]["status"] == "ok"


@pytest.mark.parametrize("colour", [b"", b"0.5 g 0 0 400 600 re f", b"1 0 0 rg 0 0 400 600 re f"])
def test_one_pixel_of_another_colour_is_seen(tmp_path: Path, colour: bytes) -> None:
    with pymupdf.open(with_content(tmp_path / "a.pdf", colour)) as document:
        picture = document[0].get_pixmap(matrix=pymupdf.Matrix(2, 2))
        assert is_unicolor(picture)
        picture.set_pixel(799, 1199, (1, 2, 3))
        assert not is_unicolor(picture)


def test_no_pixel_of_a_blank_page_is_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [0], pymupdf.mupdf.fz_samples_get

    def counting(*place: object) -> int:
        calls[0] += 1
        return int(real(*place))

    monkeypatch.setattr(pymupdf.mupdf, "fz_samples_get", counting)
    rendered(with_content(tmp_path / "a.pdf", b""), tmp_path / "out")
    assert calls[0] < 100


# -- files that are not PDFs, or damaged -----------------------------------------------------------------------------


def encrypted(path: Path) -> None:
    make_pdf(path, ["secret"], encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="u", owner_pw="o")


def cut(path: Path) -> None:
    path.write_bytes(make_pdf(path, ["x"]).read_bytes()[:60])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda path: path.write_bytes(b""), "empty file"),
    "no PDF": (lambda path: path.write_text("notes"), "not a PDF"),
    "a zip": (lambda path: path.write_bytes(b"PK\3\4" + bytes(500)), "not a PDF"),
    "a picture": (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), "not a PDF"),
    "only a header": (lambda path: path.write_bytes(b"%PDF-1.7\n"), "damaged PDF"),
    "garbage behind a header": (
        lambda path: path.write_bytes(b"%PDF-1.7\n" + random.Random(0).randbytes(5000)),
        "damaged PDF",
    ),
    "cut short": (cut, "damaged PDF"),
    "pages that loop": (
        lambda path: path.write_bytes(
            b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
            b"2 0 obj<</Type/Pages/Kids[2 0 R]/Count 3>>endobj\ntrailer<</Root 1 0 R>>\n"
        ),
        "damaged PDF",
    ),
    "encrypted": (encrypted, "encrypted: needs a password"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_opened_says_why_without_this_machines_paths(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.pdf"
    make, reason = BAD[kind]
    make(path)
    with pytest.raises(ValueError, match=reason) as caught:
        open_document(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_pdf_that_may_be_read_but_not_changed_is_read(tmp_path: Path) -> None:
    path = make_pdf(tmp_path / "a.pdf", ["x"], encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="", owner_pw="o")
    assert rendered(path, tmp_path / "out")[0]["status"] == "ok"


def test_a_header_after_other_bytes_is_a_pdf(tmp_path: Path) -> None:
    path = make_pdf(tmp_path / "a.pdf", ["x"])
    path.write_bytes(b"\n" * 100 + path.read_bytes())
    assert rendered(path, tmp_path / "out")[0]["status"] == "ok"


def texts(path: Path) -> list[str]:
    with open_document(path) as document:
        return [page.get_text().strip() for page in document]


THREE = bad_pdfs.pdf(bad_pdfs.with_pages(b"3", b"3 0 R 4 0 R 5 0 R"))


@pytest.mark.parametrize(
    "content",
    [
        random.Random(0).randbytes(100_000) + THREE,
        b"From: a@example.org\n\n" * 500 + THREE,
        THREE.removeprefix(b"%PDF-1.7\n"),
        THREE.replace(b"%PDF", b"%FDP"),
    ],
    ids=["after 100 kB", "after a letter", "no header", "a damaged header"],
)
def test_a_pdf_without_a_header_at_its_beginning_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pdf").write_bytes(content)
    assert texts(tmp_path / "a.pdf") == ["page 3", "page 4", "page 5"]


@pytest.mark.parametrize("version", bad_pdfs.ENCRYPTION)
@pytest.mark.parametrize(
    "filters", [b"/StmF/Identity/StrF/Identity/EFF/StdCF", b"/StmF/Identity/EFF/StdCF", b"/EFF/StdCF"]
)
def test_a_document_whose_attachments_alone_are_encrypted_is_read(
    tmp_path: Path, version: bytes, filters: bytes
) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(bad_pdfs.encrypted(filters + b"/EFF/StdCF", version))
    assert texts(path) == ["page 3", "page 4", "page 5"]
    assert [record["status"] for record in rendered(path, tmp_path / "out")] == ["ok"] * 3


@pytest.mark.parametrize("version", bad_pdfs.ENCRYPTION)
@pytest.mark.parametrize("filters", [b"/StmF/StdCF/StrF/StdCF", b"/StmF/StdCF", b"/StrF/StdCF"])
def test_a_document_with_encrypted_pages_is_not(tmp_path: Path, version: bytes, filters: bytes) -> None:
    (tmp_path / "a.pdf").write_bytes(bad_pdfs.encrypted(filters, version))
    with pytest.raises(ValueError, match="encrypted: needs a password"):
        open_document(tmp_path / "a.pdf")


def test_an_unknown_encryption_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(bad_pdfs.encrypted(b"/StmF/StdCF/StrF/StdCF", handler=b"Adobe.PubSec"))
    with pytest.raises(ValueError, match=r"^encrypted: unknown encryption handler: 'Adobe\.PubSec'$"):
        open_document(tmp_path / "a.pdf")


# -- page trees that lie ---------------------------------------------------------------------------------------------

NODE = b"<</Type/Pages/Parent 2 0 R/Count %b/Kids[%b]>>"
EVERY = b"3 0 R 4 0 R 5 0 R"
BOMB = {30: NODE % (b"100", b"31 0 R " * 10), 31: NODE % (b"10", b"32 0 R " * 10), 32: NODE % (b"1", b"4 0 R")}
"""A node of ten times the same node, and that again: a hundred pages out of one."""

TREES: dict[str, tuple[dict[int, bytes], list[int]]] = {
    "more than there are": (bad_pdfs.with_pages(b"100000", EVERY), [3, 4, 5]),
    "more, and objects' numbers to match": (bad_pdfs.with_pages(b"100000", b"3 0 R", {100_001: b"<<>>"}), [3]),
    "more than an integer holds": (bad_pdfs.with_pages(b"99999999999", EVERY), [3, 4, 5]),
    "fewer": (bad_pdfs.with_pages(b"1", EVERY), [3, 4, 5]),
    "none": (bad_pdfs.with_pages(b"0", EVERY), [3, 4, 5]),
    "less than none": (bad_pdfs.with_pages(b"-3", EVERY), [3, 4, 5]),
    "no number": (bad_pdfs.with_pages(b"null", EVERY), [3, 4, 5]),
    "more in a node": (bad_pdfs.with_pages(b"100000", b"20 0 R 5 0 R", {20: NODE % (b"99999", b"3 0 R")}), [3, 5]),
    "fewer in a node": (bad_pdfs.with_pages(b"2", b"20 0 R 5 0 R", {20: NODE % (b"1", b"3 0 R 4 0 R")}), [3, 4, 5]),
    "a node in itself": (bad_pdfs.with_pages(b"3", b"2 0 R " + EVERY), [3, 4, 5]),
    "a node in its child": (bad_pdfs.with_pages(b"2", b"3 0 R 20 0 R", {20: NODE % (b"1", b"2 0 R 4 0 R")}), [3, 4]),
    "the same node again": (bad_pdfs.with_pages(b"102", b"3 0 R 30 0 R 5 0 R", BOMB), [3, 4, 5]),
    "null among the pages": (bad_pdfs.with_pages(b"3", b"3 0 R null 4 0 R 5 0 R"), [3, 4, 5]),
    "right": (bad_pdfs.with_pages(b"3", b"20 0 R 5 0 R", {20: NODE % (b"2", b"3 0 R 4 0 R")}), [3, 4, 5]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TREES)
def test_a_document_has_the_pages_that_are_there_whatever_number_it_states(tmp_path: Path, kind: str) -> None:
    objects, pages = TREES[kind]
    (tmp_path / "a.pdf").write_bytes(bad_pdfs.pdf(objects))
    assert texts(tmp_path / "a.pdf") == [f"page {page}" for page in pages]
    with open_document(tmp_path / "a.pdf") as document:
        assert document.page_count == len(pages), "opened again"


def test_a_page_20000_nodes_deep_is_found(tmp_path: Path) -> None:
    depth = 20_000
    nodes = {100 + n: NODE % (b"1", b"%d 0 R" % (101 + n)) for n in range(depth)}
    objects = {**bad_pdfs.with_pages(b"1", b"100 0 R"), **nodes, **bad_pdfs.text_page(100 + depth, 99)}
    (tmp_path / "a.pdf").write_bytes(bad_pdfs.pdf(objects))
    assert texts(tmp_path / "a.pdf") == [f"page {100 + depth}"]


@pytest.mark.parametrize("seed", range(40))
def test_damage_anywhere_is_an_unreadable_document_or_page_never_a_crash(tmp_path: Path, seed: int) -> None:
    """A real document, cut or with bytes changed at random places."""
    chance = random.Random(seed)
    content = bytearray(DEMO[seed % len(DEMO)].read_bytes())
    if chance.random() < 0.3:
        del content[chance.randrange(20, len(content)) :]
    else:
        for _ in range(chance.choice([1, 10, 200])):
            content[chance.randrange(9, len(content))] = chance.choice(b"0123456789-<>[]/ \xff\0")
    path = tmp_path / "a.pdf"
    path.write_bytes(content)
    try:
        records = rendered(path, tmp_path / "out", 25_088)
    except ValueError as error:
        assert "PDF" in str(error) or "password" in str(error)
        return
    for record in records:
        assert record["status"] in ("ok", "blank") or str(record["status"]).startswith("page cannot be rendered")
        str(record).encode()
        if record["status"] == "ok":
            Image.open(io.BytesIO((tmp_path / "out" / f"{record['page']}.jpg").read_bytes())).verify()
