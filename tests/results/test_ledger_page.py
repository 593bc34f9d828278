"""The ledger's HTML page."""

import base64
import hashlib
import re
from pathlib import Path

from stages.results.ledger import Row
from stages.results.ledger_page import render_html
from tests.results.made_runs import (
    Page,
    make_run,
    rows_of,
)


def test_html_escapes_everything() -> None:
    nasty = "</td><script>alert('1')</script>\" onclick=\"x & $lead"
    plain, marked = Row("run", adapter="tuned"), Row(nasty, nasty, nasty, nasty, nasty, state=nasty, base_model=nasty)
    harmless = Page(render_html([plain], None, False)).tags
    page = Page(render_html([marked], None, False))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless]
    assert page.cells.count(nasty) == 7
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_html_needs_nothing_from_elsewhere_and_allows_its_own_script_only(tmp_path: Path) -> None:
    make_run(tmp_path)
    text = render_html(rows_of(tmp_path), "score", True)
    assert not re.search(r"https?:|url\(|src=|@import|<link", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    page = Page(text)
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert [tag for tag, _ in page.tags].count("button") == len(heads)
    assert [head["aria-sort"] for head in heads if "aria-sort" in head] == ["descending"]
    keys = [attributes.get("data-key") for tag, attributes in page.tags if tag == "td"]
    assert keys[9 :: len(heads)] == ["20.0", "42.5", "61.25"]
