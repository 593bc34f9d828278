"""The numbered defects of the program that patent_qa replaces. Each test has a short function that does as that program
did, shows that it is wrong on a small input, and that Lorry is right on the same input.

Most tests use one job: questions in that program's files, preprocessed and answered by the real stages with two
stand-ins, an embedder that counts characters and an engine that answers with the question.
"""

import multiprocessing
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pymupdf
import pytest
import yaml

from stages.contract.errors import Exit
from stages.contract.events import Events
from stages.contract.files import read_json, read_jsonl, write_json, write_jsonl
from stages.contract.part import Shard
from stages.contract.recipe import Data, Recipe, dump_recipe, load_recipe, profile_names
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.contract.stop import StopRequest
from stages.engines.engine import Completion, Done, EngineSettings
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.rendering import Prompt, load_tokenizer
from stages.preprocess import classify as classify_module
from stages.preprocess import documents as documents_module
from stages.preprocess import stage as preprocess
from stages.preprocess.documents import document_ids, picture_folder, render_documents
from stages.preprocess.embed import Embedder
from stages.preprocess.figures import crop_figures
from stages.preprocess.search import top_k
from stages.preprocess.split import split_groups
from stages.tasks import settle_recipe
from stages.tasks.common.mentions import figure_named, page_named, pages_named
from stages.tasks.patent_qa import ask as ask_in_pass
from stages.tasks.patent_qa import build_samples, classification, read_classification
from stages.tasks.patent_qa.prompts import POSITION_HINT
from stages.tasks.patent_qa.questions import PatentQuestion
from stages.tasks.task import Ask, Found
from stages.train.packing import Steps, pack
from stages.train.planning import make_plan
from tests.conftest import MODELS, REPOSITORY, Lorry, make_pdf, need_model
from tests.hardware.recorded import Box, box
from tests.infer.conftest import ask as ask_samples
from tests.infer.conftest import describe, sample
from tests.infer.engines import use_engine
from tests.preprocess import bad_workers
from tests.train.conftest import Training

__all__ = ["box"]

PATENT_QA = REPOSITORY / "recipes" / "patent-qa.yaml"
DATA = REPOSITORY / "recipes" / "data"
STAND_INS = Path(__file__).parent / "stand_ins"
OVERRIDES = (
    *("model.path=reader", "data.path=b", "data.validation_fraction=0.25"),
    *("preprocess.pages.max_pixels=25088", "preprocess.retrieval.embedder=characters", "preprocess.classifier=model"),
    *("preprocess.retrieval.batch_size=4", "preprocess.samples={shows: text, others: 2}"),
    *("infer.chunk_size=256", "infer.passes.refine=true"),
)

# -- the questions -------------------------------------------------------------------------------------------------

PARTS = ("齿轮", "杠杆", "弹簧", "阀门", "活塞", "支架")
POSITION = "在文件中第2页的图中，部件3相对于部件5的位置关系是？"
TEST = [
    ("该装置的部件3是什么？", "A.pdf"),
    (POSITION, "A.pdf"),
    ("在文件中第六页的图中，部件3的名称是什么？", "A.pdf"),
    ("在文件中第 6 页的图中，部件3位于部件5的哪一侧？", "A.pdf"),
    ("在文件中第4页的图中，部件4的名称是什么？", "A.pdf"),  # a blank page, which has no picture
    ("在文件中第9页的图中，部件9的名称是什么？", "A.pdf"),  # the document has six pages
    ("该装置的弹簧是哪个部件？", "gone.pdf"),
    ("该装置的阀门是哪个部件？", "unreadable.pdf"),
    ("所述弹簧有什么作用？", "CN1.v2.pdf"),
    ("所述弹簧有什么作用？", "CN1.v3.pdf"),
    ("第1页的图1与第5页的图2有什么不同？", "A.pdf"),
]
"""Question and document of each line of test.jsonl, which has no ids."""
TRAIN_KINDS = {
    "该发明解决什么问题？": 1,
    "第1页的图中，部件3的名称是什么？": 1,
    POSITION: 2,
    "第三页的图中画了几个部件？": 2,  # the drawing is enough, but it does not ask for a position
}
"""Questions about each training document, with their numbers of training samples."""
TRAINED = ("T1.pdf", "T2.pdf", "T3.pdf", "T4.pdf")
GOES_THROUGH = [f"test-{line}" for line in (1, 2, 3, 4, 5, 6, 9, 10, 11)]
"""Ids of the test questions that can be answered. A missing id becomes file and line."""


def make_files(folder: Path) -> None:
    for name in TRAINED:
        make_pdf(folder / "documents" / name, [f"{name} 部件{n}是{part}" for n, part in enumerate(PARTS[:3], 1)])
    pages = [f"部件{n}是{part}" for n, part in enumerate(PARTS, 1)]
    make_pdf(folder / "documents" / "A.pdf", [*pages[:3], "", *pages[4:]])
    make_pdf(folder / "documents" / "CN1.v2.pdf", ["弹簧用于复位", "弹簧固定在壳体"])
    make_pdf(folder / "documents" / "CN1.v3.pdf", ["弹簧用于减震", "弹簧套在轴上"])
    (folder / "documents" / "unreadable.pdf").write_bytes(b"")
    train = [
        {"question": question, "document": name, "answer": f"答案{n}"}
        for name in TRAINED
        for n, question in enumerate(TRAIN_KINDS)
    ]
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", [{"question": question, "document": name} for question, name in TEST])


# -- the job -------------------------------------------------------------------------------------------------------


@cache
def tokenizer() -> Any:
    return load_tokenizer(MODELS / "SmolLM2-135M-Instruct")


class Engine:
    """Replaces an engine: records the prompts of each call and answers with the question."""

    continuous = True

    def __init__(self, stop_after: int | None = None) -> None:
        self._left = stop_after
        self.calls: list[tuple[str | None, list[str]]] = []
        self.answered: list[tuple[str | None, str, int | None]] = []

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        self.calls.append((adapter, [prompt.id for prompt in prompts]))
        found = []
        for place, prompt in enumerate(prompts):
            if self._left is not None and len(self.answered) == self._left:
                raise KeyboardInterrupt
            found.append(Completion(self._answer(prompt), 1, "stop"))
            self.answered.append((adapter, prompt.id, prompt.max_new_tokens))
            if done is not None:
                done(place, found[-1])
        return found

    def _answer(self, prompt: Prompt) -> str:
        text = tokenizer().decode(prompt.tokens)
        question = max((q for q in [*TRAIN_KINDS, *(q for q, _ in TEST)] if q in text), key=text.rindex)
        if "只输出一个字母" in text:
            return "Y" if re.search("位置|哪一侧|几个", question) else "N"
        return f"问的是：{question}"

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class Job:
    """A run in its own folder with its mounts."""

    root: Path
    recipe: Recipe

    @property
    def run(self) -> Run:
        return Run("r", self.recipe, Roots(self.root / "data", self.root / "models", self.root / "runs"))

    def stage(self) -> Stage:
        """The preprocess stage, for functions that do not need `run_stage`."""
        events = Events(self.run.path("preprocess", "events.jsonl"), "preprocess", sys.stderr)
        return Stage(self.run, "preprocess", events, StopRequest(), -1, -1)

    def preprocess(self, part: Shard | None = None) -> Exit:
        return run_stage(self.run, "preprocess", preprocess.work, part=part)

    def infer(self, engine: Any) -> Exit:
        """Infer with an adapter where training writes one."""
        folder = self.run.path("train", "adapters", "tuned")
        if not folder.exists():
            write_json(folder / "adapter_config.json", {"r": 8})
            describe(self.run, "train", "adapters/tuned/adapter_config.json")
        with pytest.MonkeyPatch.context() as patch:
            use_engine(patch, lambda _: engine)
            return run_stage(self.run, "infer", infer.work)

    def manifest(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.run.path(stage, "manifest.json"))
        return found

    def samples(self, split: str) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in read_jsonl(self.run.path("preprocess", "samples", f"{split}.jsonl"))}

    def submission(self, name: str = "tuned") -> list[dict[str, Any]]:
        return read_jsonl(self.run.path("infer", "submission", f"{name}.jsonl"))

    def copy(self, root: Path, *overrides: str) -> "Job":
        """A copy of run and mounts in another folder, with the recipe's `overrides`."""
        shutil.copytree(self.root, root, symlinks=True)
        return Job(root, recipe_with(*overrides) if overrides else self.recipe)


def recipe_with(*overrides: str) -> Recipe:
    return settle_recipe(
        load_recipe(PATENT_QA, "tiny", (*OVERRIDES, *overrides)), "patent-qa", REPOSITORY / "recipes" / "data"
    )


def mounts(root: Path, language_model: Path) -> None:
    """Empty mounts with the models that the recipe names, whose weights are not read."""
    (root / "data" / "b").mkdir(parents=True)
    (root / "models" / "characters").mkdir(parents=True)
    (root / "models" / "characters" / "config.json").write_text('{"model_type": "bert"}')
    shutil.copy(need_model("all-MiniLM-L6-v2") / "tokenizer.json", root / "models" / "characters")
    (root / "models" / "reader").mkdir()
    for path in language_model.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, root / "models" / "reader")
    for name in ("characters", "reader"):
        (root / "models" / name / "model.safetensors").write_bytes(b"none")


@pytest.fixture(scope="module", autouse=True)
def embedder_module() -> Iterator[ModuleType]:
    """The stand-in replaces sentence-transformers in this process and its child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "sentence_transformers", raising=False)
        patch.syspath_prepend(str(STAND_INS))
        import sentence_transformers

        assert Path(str(sentence_transformers.__file__)).parent == STAND_INS
        yield sentence_transformers
        del sys.modules["sentence_transformers"]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, language_model: Path) -> tuple[Job, Engine]:
    """The preprocessed and answered job with its engine. Tests that change it take a copy."""
    root = tmp_path_factory.mktemp("job")
    mounts(root, language_model)
    make_files(root / "data" / "b")
    job = Job(root, recipe_with())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify_module, "_start_engine", lambda *_: Engine())
        assert job.preprocess() == Exit.DONE
    engine = Engine()
    assert job.infer(engine) == Exit.DONE
    return job, engine


@pytest.fixture
def job(answered: tuple[Job, Engine]) -> Job:
    return answered[0]


@pytest.fixture
def empty(tmp_path: Path, language_model: Path) -> Job:
    """A job without documents and questions."""
    mounts(tmp_path / "empty", language_model)
    return Job(tmp_path / "empty", recipe_with())


# -- 1 to 12 -------------------------------------------------------------------------------------------------------


def test_defect_01_the_prompts_of_a_pass_are_submitted_together(answered: tuple[Job, Engine]) -> None:
    sizes: list[int] = []

    def original(questions: list[str], max_num_seqs: int) -> None:
        for question in questions:
            for _ in ("classify", "answer", "refine"):
                sizes.append(len([question][:max_num_seqs]))

    original([question for question, _ in TEST], max_num_seqs=4)
    assert len(sizes) == 3 * len(TEST) and max(sizes) == 1, "a larger max_num_seqs does not help a loop"

    job, engine = answered
    classified = ["test-2", "test-3", "test-4"]
    passes = [(None, classified), *[(adapter, GOES_THROUGH) for adapter in (None, None, "tuned", "tuned")]]
    assert engine.calls == passes, "one call for each pass; whether a drawing is enough is asked of base, once for both"
    assert job.manifest("infer")["counts"] == {"answered": 2 * len(GOES_THROUGH), "failed": 2}


def test_defect_02_a_rerun_answers_only_missing_prompts_and_repeats_no_row(
    answered: tuple[Job, Engine], tmp_path: Path
) -> None:
    def original(path: Path, stop_after: int) -> None:
        with path.open("a") as file:
            for row in range(stop_after):
                file.write(f"{row}\n")

    for stop_after in (4, len(TEST)):
        original(tmp_path / "original.jsonl", stop_after)
    rows = (tmp_path / "original.jsonl").read_text().split()
    assert len(rows) == len(TEST) + 4 and Counter(rows)["0"] == 2

    whole, undisturbed = answered
    job = whole.copy(tmp_path / "job")
    shutil.rmtree(job.run.stage_folder("infer"))
    done: list[Any] = []
    for stop_after in (2, 10):  # in the first pass, at the end of the second
        engine = Engine(stop_after)
        assert job.infer(engine) == Exit.INTERRUPTED
        assert len(engine.answered) == stop_after
        done += engine.answered
    engine = Engine()
    assert job.infer(engine) == Exit.DONE
    assert done + engine.answered == undisturbed.answered, "each record and pass is asked once"
    for name in ("base", "tuned"):
        again = [
            (line["id"], line["text"]) for line in read_jsonl(job.run.path("infer", "predictions", f"{name}.jsonl"))
        ]
        first = read_jsonl(whole.run.path("infer", "predictions", f"{name}.jsonl"))
        assert again == [(line["id"], line["text"]) for line in first]
        assert job.submission(name) == whole.submission(name)
    finished = Engine()
    assert job.infer(finished) == Exit.DONE
    assert finished.calls == [], "done means skip"


def test_defect_02_embedding_resumes_at_the_batch(
    empty: Job, embedder_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [{"document": f"{n // 8}.pdf", "page": n % 8 + 1, "text": f"page {n}"} for n in range(24)]
    real = embedder_module.SentenceTransformer.encode
    embedded: list[str] = []
    left = 0

    def encode(model: Any, texts: list[str], **options: Any) -> Any:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        embedded.extend(texts)
        return real(model, texts, **options)

    monkeypatch.setattr(embedder_module.SentenceTransformer, "encode", encode)

    def original() -> None:
        vectors = [encode(embedder_module.SentenceTransformer(""), [page["text"]]) for page in pages]
        np.save("never.npy", np.concatenate(vectors))

    for _ in range(2):
        left = 20
        with pytest.raises(KeyboardInterrupt):
            original()
    assert Counter(embedded)["page 0"] == 2, "written only at the end, so all are embedded again"

    embedded.clear()
    left = 4
    with pytest.raises(KeyboardInterrupt):
        Embedder(empty.stage()).embed_pages(pages)
    assert len(embedded) == 4 * 4
    left = 100
    stage = empty.stage()
    embedder = Embedder(stage)
    embedder.embed_pages(pages)
    assert sorted(embedded) == sorted(str(page["text"]) for page in pages), "none is embedded twice"
    vectors = np.array(embedder.write_pages(pages, stage.path("vectors.npy")))
    assert vectors == pytest.approx(real(None, [page["text"] for page in pages]), abs=1e-6)


def original_page(question: str) -> int:
    return int(re.findall(r"第(\d+)页", question)[0])


def test_defect_03_no_question_stops_the_run_and_each_has_its_line(job: Job, tmp_path: Path) -> None:
    def original(question: str, pictures: set[int]) -> str:
        page = original_page(question)
        if page not in pictures:
            raise FileNotFoundError(f"{page}.jpg")
        return "an answer"

    for row, error in {2: IndexError, 3: IndexError, 4: FileNotFoundError, 5: FileNotFoundError}.items():
        with pytest.raises(error):
            original(TEST[row][0], {1, 2, 3, 5, 6})

    samples = job.samples("test")
    assert [samples[f"test-{line}"]["meta"]["named"] for line in (3, 4)] == [6, 6]
    for line in (5, 6):
        meta = samples[f"test-{line}"]["meta"]
        assert meta["named"] is None and len(meta["pages"]) == 2, "the most similar pages replace it"
    counts, skipped = job.manifest("preprocess")["counts"], job.manifest("preprocess")["skipped"]
    assert counts["named page missing"] == 2
    assert {"what": "A.pdf page 4", "reason": "blank page", "detail": ""} in skipped
    for lines in (job.submission("base"), job.submission("tuned")):
        assert [line["question"] for line in lines] == [question for question, _ in TEST]
        assert [bool(line["style_answer"]) for line in lines] == [row not in (6, 7) for row in range(len(TEST))]


def test_defect_03_a_question_about_an_unknown_document_is_counted_and_not_answered(job: Job) -> None:
    def original(question: str, document: str, pages: dict[str, list[int]]) -> dict[str, Any]:
        shown = [page for name, page in pages.items() if name == document]
        return {"pages": shown, "style_answer": f"an answer to {question}"}

    made_up = original(*TEST[6], {"A.pdf": [1, 2]})
    assert made_up["pages"] == [] and made_up["style_answer"], "and no message says so"

    skipped = {entry["what"]: entry for entry in job.manifest("preprocess")["skipped"]}
    assert skipped["test.jsonl:7"] == {"what": "test.jsonl:7", "reason": "unknown document", "detail": "gone.pdf"}
    assert skipped["unreadable.pdf"]["reason"] == "unreadable document"
    predictions = {line["id"]: line for line in read_jsonl(job.run.path("infer", "predictions", "tuned.jsonl"))}
    assert predictions["test-8"]["error"] == "no readable page in unreadable.pdf"
    assert predictions["test-8"]["answer"] is None
    assert job.manifest("infer")["counts"]["failed"] == 2, "by the base and by the adapter"
    assert job.manifest("infer")["submission"]["tuned"] == {"lines": len(TEST), "without answer": 2}


def test_defect_03_a_missing_picture_is_a_failed_record_and_not_an_apology(tmp_path: Path) -> None:
    def original(picture: Path) -> str:
        return "an answer" if picture.is_file() else "Sorry, the page could not be found."

    assert original(tmp_path / "1.jpg"), "an apology counts as an answer"

    model = need_model("tiny-qwen2.5-vl")
    overrides = ("preprocess.classifier=none", "infer.passes.refine=false")
    (tmp_path / "models").symlink_to(model.parent)
    job = Job(tmp_path, settle_recipe(load_recipe(PATENT_QA, "tiny-vlm", overrides), "patent-qa", DATA))
    run = job.run
    seen, lost = ({**sample(name, "<image>?"), "images": [f"preprocess/pages/{name}.jpg"]} for name in ("seen", "lost"))
    picture = run.folder / seen["images"][0]
    picture.parent.mkdir(parents=True)
    pymupdf.Pixmap(pymupdf.csRGB, (0, 0, 56, 56), False).save(picture)
    ask_samples(run, [seen, lost])

    class Says(Engine):
        def _answer(self, prompt: Prompt) -> str:
            return "x"

    assert job.infer(Says()) == Exit.DONE
    failed, fine = job.submission()[1], job.submission()[0]
    assert (fine["style_answer"], failed["style_answer"], failed["answer"]) == ("x", "", "")
    prediction = read_jsonl(run.path("infer", "predictions", "tuned.jsonl"))[1]
    assert prediction["answer"] is None and "lost.jpg" in prediction["error"]
    assert job.manifest("infer")["counts"] == {"answered": 2, "failed": 2}


PICTURES = load_recipe(PATENT_QA, None, ("preprocess.samples.crop_figure=true",))
"""The recipe for GPUs, without the tiny profile."""


def question(text: str, **changes: Any) -> PatentQuestion:
    pages, figure = tuple(pages_named(text)), figure_named(text)
    made = PatentQuestion("q", text, "A.pdf", pages, figure, ("答案",), (), "", None, 0)
    return replace(made, **changes)


def found(**changes: Any) -> Found:
    """Six pages, of which 3 and 4 are most similar to the question."""
    pages = {n: {"image": f"{n}.jpg", "text": f"page {n}"} for n in range(1, 7)}
    return replace(Found(pages=pages, ranked=[3, 4, 1, 2, 5, 6]), **changes)


def test_defect_04_every_page_that_a_question_names_is_shown() -> None:
    text = "第1页的图1与第5页的图2有什么不同？"
    assert original_page(text) == 1, "and page 5 is shown only if retrieval finds it"

    (made,) = build_samples(PICTURES, question(text), found(), "test")
    assert made["images"] == ["1.jpg", "5.jpg", "3.jpg"]
    content = made["messages"][-1]["content"]
    assert "问题所指的各页：<image><image>" in content and "其他相关页面：<image>" in content
    assert made["meta"]["pages"] == [1, 3, 5]
    assert classification(PICTURES, question(text)) is None, "one page is not enough, whatever the model says"
    assert ask_in_pass(PICTURES, made, "classify", {}, ()) is None
    answer = ask_in_pass(PICTURES, made, "answer", {"classify": "Y"}, ())
    assert answer is not None and answer.images == made["images"]
    without = ask_in_pass(PICTURES, made, "answer", {}, ("retrieval",))
    assert without is not None and without.images == ["1.jpg", "5.jpg", "2.jpg"]
    (text_row,) = build_samples(recipe_with(), question(text), found(drawing_is_enough=True), "train")
    assert text_row["meta"]["pages"] == [1, 3, 5]


def test_defect_04_the_figure_that_a_question_names_is_cut_out(empty: Job) -> None:
    text = "在文件中第2页的图2中，部件3相对于部件5的位置关系是？"
    assert original_page(text) == 2, "and the figure is ignored"

    empty = replace(empty, recipe=recipe_with("preprocess.pages.max_pixels=501760"))
    path = empty.run.data / "documents" / "A.pdf"
    path.parent.mkdir()
    document = pymupdf.open()
    document.new_page(width=595, height=842).insert_text((60, 60), "Part 3")
    sheet = document.new_page(width=595, height=842)
    for number, top in ((1, 80), (2, 450)):
        sheet.draw_oval(pymupdf.Rect(150, top, 450, top + 260))
        sheet.draw_line((150, top + 260), (450, top))
        sheet.insert_text((285, top + 285), f"图{number}", fontname="china-s", fontsize=12)
    document.save(path)
    stage = empty.stage()
    asked = question(text)
    assert asked.page is not None and asked.figure is not None
    named = ("A.pdf", asked.page, asked.figure)
    crop = crop_figures(stage, [named], {"A.pdf": path})[named]
    assert crop["image"] == f"preprocess/pages/{picture_folder('A.pdf')}/2-figure-2.jpg"
    assert crop["width"] / crop["height"] > 0.8 > 595 / 842, "one of two figures, one above the other"

    whole, alone = build_samples(PICTURES, asked, found(crop=crop["image"], drawing_is_enough=True), "train")
    assert alone["images"] == [crop["image"]]
    assert whole["images"] == ["2.jpg", "3.jpg", "4.jpg"]


def test_defect_05_names_with_dots_stay_distinct(job: Job) -> None:
    def original(document: str) -> str:
        return document.split(".", maxsplit=1)[0]

    names = ("CN1.v2.pdf", "CN1.v3.pdf")
    assert original(names[0]) == original(names[1]) == "CN1", "each is shown pages of both documents"

    folder = job.run.data / "documents"
    assert set(names) <= set(document_ids(sorted(folder.iterdir()), folder))
    assert len({picture_folder(name) for name in names}) == 2
    samples = job.samples("test")
    for line, name, words in ((9, names[0], "复位"), (10, names[1], "减震")):
        made = samples[f"test-{line}"]
        assert made["meta"]["group"] == name and made["meta"]["pages"] == [1, 2]
        assert words in made["messages"][-1]["content"]
        assert {Path(image).parent.name for image in made["meta"]["page_images"]} == {picture_folder(name)}


def test_defect_06_reordered_and_filtered_questions_keep_their_own_vectors(
    job: Job, embedder_module: ModuleType, tmp_path: Path
) -> None:
    order = [10, 9, 5, 2, 1, 0]

    def own(vectors: Any, row: int, text: str) -> bool:
        return bool(np.allclose(vectors[row], embedder_module.SentenceTransformer("").encode([text])[0], atol=1e-6))

    kept_from_before = embedder_module.SentenceTransformer("").encode([text for text, _ in TEST])
    assert all(own(kept_from_before, row, text) for row, (text, _) in enumerate(TEST))
    assert not any(own(kept_from_before, row, TEST[old][0]) for row, old in enumerate(order)), (
        "row i is no longer row i"
    )

    changed = job.copy(tmp_path / "job")
    lines = read_jsonl(changed.run.data / "test.jsonl")
    write_jsonl(changed.run.data / "test.jsonl", [lines[old] for old in order])
    assert changed.preprocess() == Exit.DONE
    table = {
        row["id"]: row["vector"]
        for row in pq.read_table(changed.run.path("preprocess", "questions.parquet")).to_pylist()
    }
    before, after = job.samples("test"), changed.samples("test")
    for row, old in enumerate(order):
        name = f"test-{row + 1}"
        assert own([table[name]], 0, TEST[old][0])
        for key in ("question", "group", "ranked", "pages", "examples"):
            assert after[name]["meta"][key] == before[f"test-{old + 1}"]["meta"][key]
    assert changed.infer(Engine()) == Exit.DONE
    for line, old in zip(changed.submission(), order, strict=True):
        assert (line["question"], line["document"]) == TEST[old]
        assert line["style_answer"] == job.submission()[old]["style_answer"], "answers too, although ids have changed"


@pytest.mark.timeout(120)
def test_defect_07_large_vectors_from_several_processes_do_not_block(empty: Job, embedder_module: ModuleType) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=queue.put, args=(b"0" * 2**20,))
    process.start()
    while queue.empty():  # until the child writes
        process.join(timeout=0.02)
    process.join(timeout=0.5)  # the original waits without a timeout
    assert process.is_alive(), "the child waits for a reader and the parent for the child"
    assert len(queue.get()) == 2**20
    process.join()

    pages = [{"document": f"{n // 40}.pdf", "page": n % 40 + 1, "text": f"page {n}"} for n in range(120)]
    stage = empty.stage()
    embedder = Embedder(stage, devices=["cpu", "cpu"])
    embedder.embed_pages(pages)
    vectors = embedder.write_pages(pages, stage.path("vectors.npy"))
    assert vectors.nbytes > 2**20
    expected = embedder_module.SentenceTransformer("").encode([page["text"] for page in pages])
    assert np.array(vectors) == pytest.approx(expected, abs=1e-6), "each in the row of its page"


def test_defect_07_more_shards_than_documents(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def original(documents: list[str], gpus: int) -> None:
        size = -(-len(documents) // gpus)
        for gpu in range(gpus):
            np.vstack([np.ones((1, 4)) for _ in documents[gpu * size : (gpu + 1) * size]])

    with pytest.raises(ValueError, match="need at least one array"):
        original(["a.pdf", "b.pdf"], gpus=3)

    few = job.copy(tmp_path / "job", "data.path=few")
    for number in range(2):
        make_pdf(few.root / "data" / "few" / "documents" / f"{number}.pdf", [f"部件{number}是{PARTS[number]}"])
    asked = [{"question": "部件是什么？", "document": f"{number}.pdf", "answer": "x"} for number in range(2)]
    write_jsonl(few.run.data / "questions.jsonl", asked)
    shutil.rmtree(few.run.folder)
    for index in range(3):
        assert few.preprocess(Shard(index, 3)) == Exit.DONE
    assert "shard 2/3 has nothing to do, as there are only 2 documents" in capfd.readouterr().err
    assert few.preprocess() == Exit.DONE
    assert few.manifest("preprocess")["outputs"]["vectors.npy"]["records"] == 2


def test_defect_07_a_failing_page_is_counted(
    empty: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def original(pages: list[str]) -> list[str]:
        rendered = []
        for page in pages:
            try:
                rendered.append({"one": "1.jpg", "three": "3.jpg"}[page])
            except KeyError as error:
                print(error)
        return rendered

    assert original(["one", "two", "three"]) == ["1.jpg", "3.jpg"], "and no trace of the second"

    path = make_pdf(empty.run.data / "documents" / "bad.pdf", ["one", "two", "three"])
    monkeypatch.setattr(documents_module, "render_range", bad_workers.crash_on_page_2)
    stage = empty.stage()
    pages = render_documents(stage, {"bad.pdf": path})
    assert [page["page"] for page in pages] == [1, 3]
    assert (stage.counts["pages"], stage.counts["failed pages"]) == (3, 1)
    reason = {"what": "bad.pdf page 2", "reason": "unreadable page", "detail": "page crashed its worker"}
    assert stage.skipped == [reason]


def test_defect_08_training_samples_are_built_by_one_rule(job: Job) -> None:
    def original(record: dict[str, Any]) -> dict[str, Any]:
        """The program's builder is for the multiple-choice round."""
        return {"query": record["question"] + "\n".join(record["options"]), "response": record["answer"]}

    records = read_jsonl(job.run.data / "train.jsonl")
    with pytest.raises(KeyError, match="options"):
        original(records[0])

    samples = {**job.samples("train"), **job.samples("validation")}
    rows = Counter(name.partition("#")[0] for name in samples)
    assert rows == {f"train-{n}": TRAIN_KINDS[record["question"]] for n, record in enumerate(records, 1)}
    for name, made in samples.items():
        record = records[int(name.partition("#")[0].removeprefix("train-")) - 1]
        page = page_named(record["question"])
        shown = made["meta"]["pages"]
        assert shown == ([page] if name.endswith("#alone") else [1, 2, 3] if page else shown)
        assert len(shown) == (1 if name.endswith("#alone") else 3 if page else 2)
        hinted = POSITION_HINT[True] in made["messages"][-2]["content"]
        assert hinted == (name.endswith("#alone") and record["question"] == POSITION)
        assert made["messages"][-1] == {"role": "assistant", "content": record["answer"]}


def test_defect_08_the_rule_with_pictures() -> None:
    def rows(text: str, enough: bool) -> list[tuple[list[str], int, bool]]:
        made = build_samples(PICTURES, question(text), found(drawing_is_enough=enough), "train")
        hints = [POSITION_HINT[True] in row["messages"][-1]["content"] for row in made]
        assert all(row["messages"][-1]["content"].count("<image>") == len(row["images"]) for row in made)
        return [(row["images"], row["meta"]["max_pixels"], hint) for row, hint in zip(made, hints, strict=True)]

    assert rows("该发明解决什么问题？", True) == [(["3.jpg", "4.jpg"], 1_568_000, False)]
    whole = (["2.jpg", "3.jpg", "4.jpg"], 1_568_000, False)
    assert rows("第2页的图中，部件3的名称是什么？", False) == [whole]
    assert rows(POSITION, True) == [whole, (["2.jpg"], 2_352_000, True)]
    assert rows("第2页的图中画了几个部件？", True) == [whole, (["2.jpg"], 2_352_000, False)]


def test_defect_09_both_samples_of_a_question_fall_into_one_split(job: Job) -> None:
    def original(rows: list[str], seed: int) -> dict[str, set[str]]:
        shuffled = random.Random(seed).sample(rows, len(rows))
        cut = len(rows) // 10
        return {"validation": set(shuffled[:cut]), "train": set(shuffled[cut:])}

    documents = [f"{n}.pdf" for n in range(60)]
    by_row = original([row for name in documents for row in (name, f"{name}#alone")], seed=42)
    assert {row.partition("#")[0] for row in by_row["train"]} & {row.partition("#")[0] for row in by_row["validation"]}

    train, validation = job.samples("train"), job.samples("validation")
    questions = [{name.partition("#")[0] for name in split} for split in (train, validation)]
    assert all(any(name.endswith("#alone") for name in split) for split in (train, validation))
    assert not questions[0] & questions[1]
    groups = [
        {row["meta"]["group"] for row in job.samples(split).values()} for split in ("train", "validation", "test")
    ]
    assert sum(map(len, groups)) == len(set.union(*groups)), "by document"
    for seed in range(20):
        splits = split_groups(set(documents), dict.fromkeys(documents), Data(path="x", test_fraction=0.2), seed)
        assert set(splits) == set(documents) and {"train", "validation", "test"} == set(splits.values())


@pytest.mark.parametrize("gpus", [1, 3, 5, 8])
def test_defect_10_the_effective_batch_is_the_recipes_and_is_recorded(
    gpus: int, lorry: Lorry, language_model: Path, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def original(gpus: int, processes: int) -> tuple[int, int]:
        """The stated effective batch, and the real one if one process has a model spread over all GPUs."""
        return 16 * gpus, 16 * processes

    claimed, done = original(gpus, processes=1)
    assert done == 16 and (claimed == done) == (gpus == 1)
    assert [original(count, 1)[0] for count in (8, 5)] == [128, 80], "fewer GPUs silently change the batch"

    training = Training(lorry, ("train.effective_batch=16",)).with_samples()
    box.free(*[70.0] * 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    events = Events(training.run.path("train", "events.jsonl"), "train", sys.stderr)
    stage = Stage(training.run, "train", events, StopRequest(), -1, -1)
    plan = make_plan(stage, None)
    assert (plan.processes_here, plan.way.step.effective_batch) == (gpus, 16)
    recorded = {decision["what"]: decision["value"] for decision in stage.decisions}["effective batch"]
    assert recorded == str(plan.way.step) and recorded.startswith("16 samples a step"), (
        "in the manifest, on the console"
    )


def test_defect_10_five_cards_do_not_turn_128_into_80() -> None:
    steps = Steps(samples=1280, effective_batch=128, epochs=1, seed=0)
    samples = [len(steps.samples_of(step)) for step in range(steps.total)]
    assert samples == [128] * 10
    shared = [pack([7] * 128, 70, processes) for processes in (8, 5, 1)]
    assert [sum(len(one) for passes in each for one in passes) for each in shared] == [128, 128, 128]


@pytest.mark.parametrize(("kind", "width"), [("float32", 4), ("float16", 2)])
def test_defect_11_the_manifest_states_the_true_shape_of_the_vectors(
    job: Job, tmp_path: Path, kind: str, width: int
) -> None:
    claimed, pages = 270_000_000, 20_000
    assert claimed < pages * 3584 * 8 / 2, "20,000 pages in float64 are 573 MB; 270 MB are less than half"

    if kind != job.recipe.preprocess.retrieval.vectors:
        job = job.copy(tmp_path / "job", f"preprocess.retrieval.vectors={kind}")
        assert job.preprocess() == Exit.DONE
    path = job.run.path("preprocess", "vectors.npy")
    said = job.manifest("preprocess")["outputs"]["vectors.npy"]
    vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    assert isinstance(vectors, np.memmap)
    usable = 3 * len(TRAINED) + 5 + 2 + 2
    assert vectors.shape == (said["records"], 3584) == (usable, 3584)
    assert said["bytes"] == path.stat().st_size == vectors.offset + usable * 3584 * width
    assert pq.read_table(job.run.path("preprocess", "pages.parquet")).num_rows == usable, "one row for each page"


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value


def test_defect_12_no_path_of_a_machine_and_one_place_for_the_adapter(job: Job, tmp_path: Path) -> None:
    sources = {
        "train.sh": "output_dir=/data/coding/patent_b/lora_b",
        "infer.py": "model=/data/coding/patent_b/lora_for_b/checkpoint-215",
    }

    def original(sources: dict[str, str], here: str) -> dict[str, str]:
        """Replace paths as sed does."""
        return {name: text.replace("/data/coding/patent_b", here) for name, text in sources.items()}

    fixed = {name: text.split("=")[1] for name, text in original(sources, "/mnt/b").items()}
    assert not fixed["infer.py"].startswith(fixed["train.sh"]), "the trained adapter is not the one that answers"
    assert original(original(sources, "/mnt/b"), "/home/x")["train.sh"].split("=")[1].startswith("/mnt/b")

    for profile in (None, *profile_names(PATENT_QA)):
        resolved = yaml.safe_load(dump_recipe(load_recipe(PATENT_QA, profile)))
        assert not [text for text in strings(resolved) if text.startswith(("/", "~"))]
    for path in job.run.folder.rglob("*"):
        if path.name in ("recipe.yaml", "manifest.json") or path.suffix in (".jsonl", ".parquet"):
            assert str(job.root).encode() not in path.read_bytes(), path

    def nothing(stage: Stage) -> None:
        raise AssertionError("done on the other machine, so done")

    elsewhere = job.copy(tmp_path / "another machine")
    for stage in ("preprocess", "infer"):
        assert run_stage(elsewhere.run, stage, nothing) == Exit.DONE
    given: list[Any] = []

    def start(settings: EngineSettings) -> Engine:
        given.append(settings.adapters)
        return Engine()

    shutil.rmtree(elsewhere.run.stage_folder("infer"))
    with pytest.MonkeyPatch.context() as patch:
        use_engine(patch, start)
        assert run_stage(elsewhere.run, "infer", infer.work) == Exit.DONE
        adapter = elsewhere.run.path("train", "adapters", "tuned")
        assert given == [{"tuned": adapter}]
        write_json(adapter / "adapter_config.json", {"r": 9})  # not as training wrote it
        assert run_stage(elsewhere.run, "infer", infer.work) == Exit.USAGE


# -- the rest of the logic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["第一实施例中，哪一页说明了弹簧？", "第二种方案写在几页上？", "说明书第一段在哪页？"])
def test_a_question_that_names_a_page_is_about_it(text: str) -> None:
    def original(text: str) -> bool:
        return bool("第" in text and "页" in text and "图")

    assert original(text), "it looks for neither the word figure nor a number"
    with pytest.raises(IndexError):
        original_page(text)

    asked = question(text)
    assert asked.page is None
    (made,) = build_samples(PICTURES, asked, found(), "test")
    assert made["images"] == ["3.jpg", "4.jpg"], "the most similar pages"
    assert classification(PICTURES, asked) is None


def test_a_page_named_without_a_figure_is_shown_with_others() -> None:
    (made,) = build_samples(PICTURES, question("第2页写明了哪些材料？"), found(), "test")
    assert made["images"] == ["2.jpg", "3.jpg", "4.jpg"]


def test_pages_are_ranked_by_cosine_and_not_by_vector_length() -> None:
    pages, asked = np.array([[1, 0], [6, 8], [0, 1]], np.float32), np.array([1, 0], np.float32)

    def original() -> Any:
        return pages @ asked / (np.linalg.norm(pages) * np.linalg.norm(asked))

    assert original().argmax() == 1
    assert original().max() < 0.6, "its values are not cosines"

    cosines, rows = top_k(pages, asked[None], 3)
    assert rows.tolist() == [[0, 1, 2]]
    assert cosines[0] == pytest.approx([1, 0.6, 0])


@pytest.mark.parametrize(
    ("reply", "means"),
    [
        *(
            (text, False)
            for text in ("Maybe not", "N, only the text says it", "No: you need the description", "不可以 (no way)")
        ),
        *(
            (text, False)
            for text in ("N (anything else)", "Not really", "否, definitely", "不是, they say", "The answer is N")
        ),
        *((text, True) for text in ("Y", "y.", "Yes", "答：Y")),
    ],
)
def test_a_classifiers_completion_is_a_yes_if_it_says_y(reply: str, means: bool) -> None:
    def original(reply: str) -> bool:
        return "Y" in reply or "y" in reply

    if not means and reply != "The answer is N":
        assert original(reply), "any y in the text"
    assert read_classification(reply) == means


@pytest.mark.parametrize(
    ("reply", "means"), [("是", True), ("是的", True), ("Ｙ", True), ("不是", False), ("问的是名称，N", False)]
)
def test_a_classifiers_completion_may_be_chinese(reply: str, means: bool) -> None:
    assert read_classification(reply) == means


def test_a_submission_has_the_originals_keys_and_a_line_for_each_question_in_order(job: Job) -> None:
    def original(rows: list[dict[str, Any]]) -> list[str]:
        """A failed question has no line, and no check counts the lines."""
        return [str(row) for row, record in enumerate(rows) if record["document"] in ("A.pdf", "CN1.v2.pdf")]

    asked = read_jsonl(job.run.data / "test.jsonl")
    assert len(original(asked)) < len(asked)

    keys = ["idx", "document", "question", "question_type", "answer", "style_answer"]
    for name in ("base", "tuned"):
        lines = job.submission(name)
        assert [list(line) for line in lines] == [keys] * len(asked)
        assert [line["idx"] for line in lines] == [str(row) for row in range(len(asked))]
        assert [(line["question"], line["document"]) for line in lines] == TEST
        assert all(isinstance(value, str) for line in lines for value in line.values())
        types = [line["question_type"] for line in lines]
        assert types == ["", "Y", "N", "Y", *[""] * 7], "the classifier's completions for questions about a page"
        for row, line in enumerate(lines):
            assert line["answer"] == line["style_answer"] == ("" if row in (6, 7) else f"问的是：{line['question']}")


def test_a_submission_without_a_line_for_a_question_is_refused(job: Job, tmp_path: Path) -> None:
    changed = job.copy(tmp_path / "job")
    path = changed.run.path("preprocess", "asked.jsonl")
    write_jsonl(path, read_jsonl(path)[1:])
    assert changed.infer(Engine()) == Exit.USAGE, "no longer as preprocess wrote it"
    describe(changed.run, "preprocess", "samples/test.jsonl", "asked.jsonl")
    assert changed.infer(Engine()) == Exit.DATA
    assert not changed.run.path("infer", "manifest.json").exists()


def test_answers_have_the_token_limits_of_the_original() -> None:
    """The recipe's limits: 768 tokens for questions about a page and for refining, 2000 for others."""
    (whole,) = build_samples(PICTURES, question(POSITION), found(), "test")
    (free,) = build_samples(PICTURES, question("该发明解决什么问题？"), found(), "test")

    def limit(made: Any, name: str) -> int:
        asked = ask_in_pass(PICTURES, made, name, {"answer": "x"}, ())
        assert isinstance(asked, Ask)
        return asked.max_new_tokens or PICTURES.infer.max_new_tokens

    assert (limit(whole, "answer"), limit(free, "answer"), limit(free, "refine")) == (768, 2000, 768)
