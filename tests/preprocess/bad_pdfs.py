"""PDFs written by hand: what damage, other writers and malice do to a file."""

PAGE = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 9 0 R/Resources<</Font<</F 8 0 R>>>>>>"
WORDS = b"BT /F 20 Tf 20 100 Td (page %d) Tj ET"


def stream(content: bytes, entries: bytes = b"") -> bytes:
    return b"<</Length %d%b>>stream\n%b\nendstream" % (len(content), entries, content)


def text_page(number: int, contents: int) -> dict[int, bytes]:
    """Objects of a page that says its number: the page, and object `contents`."""
    return {number: PAGE.replace(b"9 0 R", b"%d 0 R" % contents), contents: stream(WORDS % number)}


def pdf(objects: dict[int, bytes], trailer: bytes = b"/Root 1 0 R", header: bytes = b"%PDF-1.7\n") -> bytes:
    """A PDF without a table of its objects, which every reader rebuilds."""
    body = b"".join(b"%d 0 obj%b endobj\n" % (number, content) for number, content in objects.items())
    return b"%b%btrailer<<%b>>\n" % (header, body, trailer)


def with_pages(count: bytes, kids: bytes, more: dict[int, bytes] | None = None) -> dict[int, bytes]:
    """Objects of a document with three pages, 3, 4 and 5, whose page tree says what it is given."""
    return {
        1: b"<</Type/Catalog/Pages 2 0 R>>",
        2: b"<</Type/Pages/Count %b/Kids[%b]>>" % (count, kids),
        **text_page(3, 13),
        **text_page(4, 14),
        **text_page(5, 15),
        8: b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        **(more or {}),
    }


def with_hanging_pages(pages: int, hanging: set[int]) -> bytes:
    """A document some of whose pages (1-based) take years to draw or to read: forms in forms in forms, ten of each."""
    objects = {
        1: b"<</Type/Catalog/Pages 2 0 R>>",
        2: b"<</Type/Pages/Count %d/Kids[%b]>>" % (pages, b" ".join(b"%d 0 R" % (100 + n) for n in range(pages))),
        8: b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    }
    form = b"/Type/XObject/Subtype/Form/BBox[0 0 200 200]/Resources<</XObject<</X %d 0 R>>/Font<</F 8 0 R>>>>"
    for level in range(12):
        objects[10 + level] = stream(b"/X Do " * 10, form % (11 + level))
    objects[22] = stream(b"0 0 m 200 200 l S BT /F 9 Tf (x) Tj ET", form % 22)
    for number in range(pages):
        contents = b"/X Do" if number + 1 in hanging else WORDS % (number + 1)
        objects[100 + number] = PAGE.replace(b"9 0 R", b"%d 0 R" % (1000 + number)).replace(
            b"<</Font", b"<</XObject<</X 10 0 R>>/Font"
        )
        objects[1000 + number] = stream(contents)
    return pdf(objects)


ENCRYPTION = {
    b"V 4/R 4": b"/CF<</StdCF<</CFM/AESV2/AuthEvent/EFOpen/Length 16>>>>/O<%b>/U<%b>" % (b"ab" * 32, b"cd" * 32),
    b"V 5/R 6": b"/CF<</StdCF<</CFM/AESV3/AuthEvent/EFOpen/Length 32>>>>/O<%b>/U<%b>/OE<%b>/UE<%b>/Perms<%b>"
    % (b"ab" * 48, b"cd" * 48, b"ab" * 32, b"cd" * 32, b"ef" * 16),
}
"""What an encryption dictionary needs by its version: AES with 128 and 256 bits."""


def encrypted(filters: bytes, version: bytes = b"V 4/R 4", handler: bytes = b"Standard") -> bytes:
    """A document of three plain pages that has an unknown password, for what `filters` say."""
    entry = b"<</Filter/%b/%b/Length 128/P -4%b%b>>" % (handler, version, ENCRYPTION[version], filters)
    objects = with_pages(b"3", b"3 0 R 4 0 R 5 0 R", {20: entry})
    return pdf(objects, b"/Root 1 0 R/Encrypt 20 0 R/ID[<%b><%b>]" % (b"01" * 16, b"01" * 16))


def slow_to_open(updates: int) -> bytes:
    """A document of one page with a chain of updates. The time to follow it grows with the square of their number: with
    800,000 (42 MB) it is two minutes."""
    objects = {
        1: b"<</Type/Catalog/Pages 2 0 R>>",
        2: b"<</Type/Pages/Count 1/Kids[3 0 R]>>",
        3: b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]>>",
    }
    parts, places = [b"%PDF-1.7\n"], []
    end = len(parts[0])
    for number, content in objects.items():
        places.append(end)
        parts.append(b"%d 0 obj%b endobj\n" % (number, content))
        end += len(parts[-1])
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    parts.append(b"xref\n0 4\n0000000000 65535 f \n%btrailer<</Root 1 0 R/Size 4>>\n" % table)
    before, end = end, end + len(parts[-1])
    for _ in range(updates):
        parts.append(b"xref\n0 0\ntrailer<</Root 1 0 R/Size 4/Prev %d>>\n" % before)
        before, end = end, end + len(parts[-1])
    parts.append(b"startxref\n%d\n%%%%EOF\n" % before)
    return b"".join(parts)
