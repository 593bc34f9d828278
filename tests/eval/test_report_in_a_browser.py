"""How the report looks in a browser: no page wider than its window, no word of a column's head broken."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.records import Prediction, Sample
from stages.contract.run import Run
from stages.eval.stage import work
from stages.host.runner import run_stage
from tests.eval.conftest import answer

Build = Callable[..., Run]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MEASURE = """\
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, range = page.createRange(), broken = [];
    for (const head of page.querySelectorAll("thead th")) {
      const texts = page.createTreeWalker(head, NodeFilter.SHOW_TEXT);
      for (let text = texts.nextNode(); text; text = texts.nextNode()) {
        for (const word of text.textContent.matchAll(/\\w+/g)) {
          range.setStart(text, word.index);
          range.setEnd(text, word.index + word[0].length);
          const tops = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
          if (tops.size > 1 && word[0].length <= 12) broken.push(word[0]);
        }
      }
    }
    const outside = [...page.querySelectorAll("table")].filter((table) => !table.closest(".scroll")).length;
    return {width: frame.clientWidth, page: page.documentElement.scrollWidth, broken, outside};
  });
  document.body.textContent = JSON.stringify(found);
};
"""


def measure(report: str, folder: Path, *widths: int) -> list[dict[str, Any]]:
    """The page's width in windows of these widths (pixels), and the words of heads that are broken."""
    frames = "".join(
        f'<iframe style="border: 0; width: {n}px" srcdoc="{html.escape(report)}"></iframe>' for n in widths
    )
    page = folder / "frames.html"
    page.write_text(f"<!doctype html><body>{frames}<script>{MEASURE}</script>", encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(html.unescape(re.findall(r"<body>(.*)</body>", done.stdout, re.DOTALL)[0]))
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_report_fits_a_desk_and_a_phone(build: Build, samples: list[Sample], tmp_path: Path) -> None:
    for number, sample in enumerate(samples):
        if number % 4 == 3:
            sample["meta"] |= {"group": f"CN{'1' * 80}_一种踏板支架.pdf", "kind": f"kind_{'k' * 60}"}
    base = [answer(sample, "") for sample in samples]
    tuned = [answer(sample, "a lever" if number % 3 else "z" * 200) for number, sample in enumerate(samples)]
    given: dict[str, list[Prediction]] = {"base": base, "tuned": tuned, f"adapter_{'n' * 40}": base}
    run = build(samples, given, losses=[], pictures=False)
    assert run_stage(run, "eval", work) == Exit.DONE
    report = run.path("eval", "report.html").read_text(encoding="utf-8")
    for found in measure(report, tmp_path, 1280, 768, 390):
        assert found["page"] <= found["width"], "the page scrolls sideways"
        assert found["broken"] == [] and found["outside"] == 0
