"""What the tests share: PDFs that they make, the real models, and the real commands as processes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pymupdf
import pytest

from tests.heavy import imports_heavy_module, is_heavy

# the time that an example takes on a busy machine says nothing about the code
hypothesis.settings.register_profile("lorry", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("lorry")

REPOSITORY = Path(__file__).parents[1]
MODELS = Path(os.environ.get("LORRY_MODELS", REPOSITORY / "models")).absolute()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore files that take seconds to import, if the run leaves out heavy tests. None: pytest decides."""
    fast = "not heavy" in config.getoption("markexpr")
    return (fast and collection_path.suffix == ".py" and imports_heavy_module(collection_path)) or None


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark the heavy tests (tests/heavy.py)."""
    for item in items:
        if is_heavy(item):
            item.add_marker("heavy")


MINIMAL_RECIPE = """\
task: patent_qa
model: {path: SmolLM2-135M-Instruct, swift_type: llama, swift_template: chatml}
data: {path: few}
preprocess:
  pages: {max_pixels: 50176}
  retrieval: {embedder: all-MiniLM-L6-v2}
train:
  adapters:
    - name: tuned
"""
"""A recipe with required keys only, and pages so small that they render in milliseconds."""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    output: str
    """Standard output and standard error together, in order."""
    seconds: float
    """Seconds that the command took."""

    @property
    def lines(self) -> list[str]:
        """The lines of the output."""
        return self.output.strip().splitlines()


@dataclass(frozen=True)
class Lorry:
    """Runs Lorry's commands with the mounts of one test."""

    data: Path
    models: Path
    runs: Path
    extra: dict[str, str] = field(default_factory=dict)
    """Further environment variables."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the commands."""
        mounts = {"LORRY_DATA": self.data, "LORRY_MODELS": self.models, "LORRY_RUNS": self.runs}
        return {**os.environ, **{name: str(path) for name, path in mounts.items()}, **self.extra}

    def start(self, module: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start `python -m module arguments` in a session of its own, so that a test can signal the whole group."""
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )

    def __call__(self, module: str, *arguments: str) -> Finished:
        """Run `python -m module arguments` to its end, for 1500 seconds at most."""
        began = time.monotonic()
        process = self.start(module, *arguments)
        try:
            output, _ = process.communicate(timeout=1500)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Finished(process.returncode, output, time.monotonic() - began)

    def preprocess(self, *arguments: str) -> Finished:
        """Run `lorry-preprocess` to its end."""
        return self("entrypoints.preprocess", *arguments)


def need_model(name: str) -> Path:
    """The folder of a real model. Skips the test if `make setup` has not made the model."""
    folder = MODELS / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder}: no such model; run `make setup`, or set LORRY_MODELS")
    return folder


@pytest.fixture(scope="session")
def embedder() -> Path:
    """The folder of a real sentence-transformers model."""
    return need_model("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def language_model() -> Path:
    """The folder of a real language model."""
    return need_model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def gptq_base(language_model: Path) -> Path:
    """The folder of that language model in GPTQ's 4 bits. The first test that needs it makes it, in 1.5 minutes."""
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed: `make setup` installs it where there is a C compiler")
    folder = MODELS / "SmolLM2-135M-Instruct-GPTQ-Int4"
    if not folder.exists():
        subprocess.run([sys.executable, REPOSITORY / "recipes" / "demo_models.py", MODELS, folder.name], check=True)
    return need_model(folder.name)


def make_pdf(path: Path, texts: list[str], size: tuple[float, float] = (200, 280), **save: Any) -> Path:
    """Write a PDF with one page for each text, blank for an empty one. `size` is in points. Returns the path."""
    document = pymupdf.open()
    for text in texts:
        page = document.new_page(width=size[0], height=size[1])
        if text:
            page.insert_text((10, 30), text, fontname="china-s", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    document.save(path, **save)
    document.close()
    return path


@pytest.fixture(scope="session")
def pdf() -> Callable[..., Path]:
    """`make_pdf`, as a fixture: `pdf(path, ["text of page 1", ...])`."""
    return make_pdf


def write_questions(path: Path, questions: list[dict[str, Any]]) -> Path:
    """Write questions as JSON Lines. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(q, ensure_ascii=False) + "\n" for q in questions), encoding="utf-8")
    return path


PARTS = ("gear", "lever", "spring", "valve", "piston", "bracket")


def make_data(folder: Path, documents: int = 4, pages: int = 3) -> Path:
    """Write a data folder of small PDFs. Each page names one part and has a question. Returns the folder."""
    questions = []
    for number in range(1, documents + 1):
        name = f"D{number}.pdf"
        parts = [PARTS[(number + page) % len(PARTS)] for page in range(pages)]
        make_pdf(folder / "documents" / name, [f"Part {10 * i + number} is a {p}." for i, p in enumerate(parts)])
        questions += [
            {
                "id": f"d{number}-{page}",
                "question": f"What is part {10 * page + number}?",
                "document": name,
                "answer": part,
                "pages": [page + 1],
            }
            for page, part in enumerate(parts)
        ]
    write_questions(folder / "questions.jsonl", questions)
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A file with the minimal recipe."""
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL_RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def lorry(tmp_path: Path) -> Iterator[Lorry]:
    """Lorry's commands with empty mounts for data and runs, and with the real models."""
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
    yield Lorry(tmp_path / "data", MODELS, tmp_path / "runs")


@pytest.fixture
def few(lorry: Lorry) -> Path:
    """The data folder of the minimal recipe, with four documents of three pages and twelve questions."""
    return make_data(lorry.data / "few")


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP as a terminal's processes have it, also if nohup started the tests: processes inherit what is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def snapshot(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a tmpfs of 8 MiB. Skips the test without the right to mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "lorry-test", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def remount(path: Path, options: str) -> None:
    """Mount a tmpfs again with other options."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)
