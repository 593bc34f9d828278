"""Twenty thousand small pages through preprocess: speed of its parts, memory over time, and the cost of a kill.

    python -m benchmarks.many_pages [DOCUMENTS | search]

Makes DOCUMENTS (by default 1,000) PDFs of 20 pages in a temporary folder. `lorry-preprocess` renders and embeds them
with tiny-gme at a small pixel budget. Memory is the resident set of the stage's main process after each quarter of the
pages. When half of the pages are embedded, the stage is killed with SIGKILL and started again. Last, exact search over
random vectors is timed, also with faiss's exact index if it can be imported (`pip install --target FOLDER faiss-cpu`,
and FOLDER in PYTHONPATH). `search` measures only that.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pymupdf

from benchmarks.rows import write_rows
from stages.contract.files import read_json
from stages.preprocess.search import BLOCK, top_k

PAGES = 20
SETS = (
    *(
        "preprocess.pages.max_pixels=12544",
        "preprocess.retrieval.max_pixels=12544",
        "preprocess.retrieval.batch_size=20",
    ),
    *("preprocess.classifier=none", "preprocess.retrieval.vectors=float16"),
)
"""16 tokens per page, so that the pipeline and not the model takes the time."""


def make_data(folder: Path, documents: int) -> None:
    """Write a data folder: `documents` PDFs of PAGES pages each, and questions.jsonl with one question per PDF."""
    (folder / "documents").mkdir(parents=True)
    generator = random.Random(0)
    lines = []
    for number in range(documents):
        document = pymupdf.open()
        for page in range(PAGES):
            sheet = document.new_page(width=120, height=160)
            sheet.insert_text((8, 20), f"Part {number} of page {page + 1}", fontsize=9)
            sheet.draw_line((10, generator.randint(30, 150)), (110, generator.randint(30, 150)))
        document.save(folder / "documents" / f"D{number:05}.pdf")
        line = {"question": f"What is part {number}?", "document": f"D{number:05}.pdf", "answer": str(number)}
        lines.append(json.dumps(line))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class WatchedStage:
    """One start of the preprocess stage, with its memory and progress over time."""

    def __init__(self, environment: dict[str, str], events: Path) -> None:
        sets = [word for value in SETS for word in ("--set", value)]
        command = [
            sys.executable,
            "-m",
            "entrypoints.preprocess",
            "patent-qa",
            "--profile",
            "tiny-vlm",
            "--run",
            "many",
        ]
        self._events, self._skip = events, events.stat().st_size if events.is_file() else 0
        self._process = subprocess.Popen(
            [*command, "--run", "many", "--set", "data.path=many", *sets], env=environment, stdout=subprocess.DEVNULL
        )
        self.seen: list[tuple[float, str, int, int, float]] = []
        """In order of time: seconds, activity, pages done, pages in total, and MiB of the main process."""

    def watch(self, until: tuple[str, int] | None = None) -> int | None:
        """Add memory and progress to `seen` twice a second until the stage ends. Returns its exit code.

        `until` is an activity and a number of pages: once that activity has done so many, kills the stage with SIGKILL.
        """
        began = time.monotonic()
        while self._process.poll() is None:
            time.sleep(0.5)
            last = self._last_progress()
            if last is None:
                continue
            self.seen.append((time.monotonic() - began, last["activity"], last["step"], last["total"], self._memory()))
            if until and last["activity"] == until[0] and last["step"] >= until[1]:
                self._process.send_signal(signal.SIGKILL)
        return self._process.wait()

    def _last_progress(self) -> dict[str, Any] | None:
        """Return this start's last progress event; None if the last 4 KiB of its events contain no progress event."""
        try:
            with self._events.open("rb") as file:
                file.seek(max(self._skip, self._events.stat().st_size - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return None
        whole = [line for line in lines if line.startswith('{"time"') and '"progress"' in line and line.endswith("}")]
        return dict(json.loads(whole[-1])) if whole else None

    def _memory(self) -> float:
        """Return the resident memory of the stage's main process in MiB; 0 if the process has ended."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return 0.0
        return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def quarter_rows(seen: list[tuple[float, str, int, int, float]], activity: str, known: int = 0) -> list[dict[str, Any]]:
    """Return a row for each quarter of an activity's pages: the quarter's seconds, and the memory in MiB at its end.

    `seen` is as in `WatchedStage`. The `known` pages, which were done before this start, do not count. If `seen` has no
    entry of `activity`, there are no rows.
    """
    own = [entry for entry in seen if entry[1] == activity]
    if not own:
        return []
    total, rows, before = own[0][3], [], own[0][0]
    for quarter in range(1, 5):
        wanted = known + (total - known) * quarter / 4
        at = next((entry for entry in own if entry[2] >= wanted), own[-1])
        rows.append({"pages": at[2], "seconds": round(at[0] - before, 1), "memory MB": round(at[4])})
        before = at[0]
    return rows


def measure_search() -> list[dict[str, Any]]:
    """Time exact search for 100 queries in random vectors, also with faiss if it is installed.

    Returns two rows: for 20,000 vectors of GME-7B's dimensions, and for a million of MiniLM's. Seconds are medians of
    three turns.
    """
    rows = []
    generator = np.random.default_rng(0)
    for what, pages, dimensions in (("20,000 of GME-7B", 20_000, 3584), ("1,000,000 of MiniLM", 1_000_000, 384)):
        many = generator.standard_normal((pages, dimensions), np.float32).astype(np.float16)
        queries = generator.standard_normal((100, dimensions), np.float32)
        seconds: dict[str, list[float]] = defaultdict(list)
        same = []
        for _ in range(3):
            began = time.monotonic()
            _, found = top_k(many, queries, 5)
            seconds["seconds"].append(time.monotonic() - began)
            if importlib.util.find_spec("faiss"):
                built, asked, other = search_with_faiss(many, queries)
                seconds["faiss builds"].append(built)
                seconds["faiss searches"].append(asked)
                same.append(bool((other == found).all()))
        row = {"part": "search", "vectors": what, "queries": 100}
        row |= {name: round(statistics.median(turns), 2) for name, turns in seconds.items()}
        rows.append({**row, **({"faiss finds the same": all(same)} if same else {})})
        del many
    return rows


def search_with_faiss(
    many: np.ndarray[Any, Any], queries: np.ndarray[Any, Any]
) -> tuple[float, float, np.ndarray[Any, Any]]:
    """Build faiss's exact index of the vectors `many`, which are in float16, and search it.

    Returns the seconds to normalise the vectors and build the index, the seconds to search, and the indices of the five
    best vectors for each query. Shapes: `many` (pages, dimensions), `queries` (queries, dimensions), indices
    (queries, 5).
    """
    import faiss

    began = time.monotonic()
    index = faiss.IndexFlatIP(many.shape[1])
    for start in range(0, len(many), BLOCK):
        whole = many[start : start + BLOCK].astype(np.float32)
        faiss.normalize_L2(whole)
        index.add(whole)
    built = time.monotonic()
    _, found = index.search(queries, 5)
    return built - began, time.monotonic() - built, found


def main() -> None:
    """Measure the preprocess stage, which is killed and resumed half-way, then the search, and write the rows.

    The argument is the number of documents (default: 1,000), or `search` to measure only the search.
    """
    if sys.argv[1:] == ["search"]:
        write_rows("many_pages", measure_search(), "python -m benchmarks.many_pages", by="part")
        return
    documents = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    folder = Path(tempfile.mkdtemp(prefix="many-pages-"))
    try:
        began = time.monotonic()
        make_data(folder / "data" / "many", documents)
        print(f"many_pages: made {documents} documents in {time.monotonic() - began:.0f} s", flush=True)
        environment = {**os.environ, "LORRY_DATA": str(folder / "data"), "LORRY_RUNS": str(folder / "runs")}
        environment |= {"LORRY_TARGET": "cpu"}
        run = folder / "runs" / "many" / "preprocess"
        total = documents * PAGES
        first = WatchedStage(environment, run / "events.jsonl")
        first.watch(until=("embed pages", total // 2))
        kept = sum(len(np.load(path)) for path in (run / "cache" / "vectors").glob("*.npy"))
        shown = max(entry[2] for entry in first.seen if entry[1] == "embed pages")
        second = WatchedStage(environment, run / "events.jsonl")
        code = second.watch()
        manifest = read_json(run / "manifest.json")
        drawn = quarter_rows(first.seen, "render pages")
        embedded = quarter_rows(second.seen, "embed pages", kept)
        rendering = sum(row["seconds"] for row in drawn)
        resumed = [entry for entry in second.seen if entry[1] == "embed pages"]
        rows: list[dict[str, Any]] = [
            {"part": "render", "pages": total, "pages a second": round(total / rendering, 1), "quarters": drawn},
            {
                **{"part": "kill", "signal": "SIGKILL", "pages reported": shown, "pages kept": kept},
                **{"pages rendered again": sum(entry[1] == "render pages" for entry in second.seen)},
                "first pages reported after the restart": resumed[0][2],
            },
            {
                **{"part": "embed", "model": "tiny-gme, 16 tokens a page", "pages": total - kept},
                "pages a second": round((total - kept) / sum(row["seconds"] for row in embedded), 1),
                "quarters": embedded,
            },
            {"part": "stage", "exit code": code, "peak memory MB": round(manifest["peak_memory_bytes"] / 2**20)},
        ]
        rows += measure_search()
        write_rows("many_pages", rows, "python -m benchmarks.many_pages")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
