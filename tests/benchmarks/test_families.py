"""The table of model families: three families go through all steps, and the page shows the committed rows."""

from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.rows import RESULTS
from stages.contract.files import read_json


@pytest.mark.long
@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "OLMo"])
def test_a_family_renders_trains_answers_and_exports(name: str, tmp_path: Path) -> None:
    (family,) = (family for family in families.FAMILIES if family.name == name)
    row = families.try_family(family, tmp_path)
    assert "fails" not in row, row
    assert row["exports"] and row["losses"][1] < row["losses"][0]


@pytest.mark.heavy  # the function that it tests imports transformers
def test_what_fails_is_named_with_its_step(tmp_path: Path) -> None:
    (family,) = (family for family in families.FAMILIES if family.name == "InternLM")
    row = families.try_family(family, tmp_path)
    assert row["builds"] is False and row["fails"].startswith("builds: UsageError: ")
    assert "| refused | `builds: UsageError: " in families.table([row])


def test_the_page_shows_the_rows_of_all_families() -> None:
    rows = read_json(RESULTS / "families.json")["rows"]
    order = [family.name for family in families.FAMILIES]
    assert sorted(row["family"] for row in rows) == sorted(order)
    rows.sort(key=lambda row: order.index(row["family"]))
    text = families.PAGE.read_text(encoding="utf-8")
    assert families.page(text, rows) == text, "python -m benchmarks.families table"
