"""Patent questions answered in batched passes, against one request at a time with three calls per question.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.passes [stage]

Needs a GPU of 80 GB, vLLM, and SmolLM2's tokenizer. The model has Qwen2.5-VL-7B's shape and random weights, so every
completion has the maximal length: `long` uses the original's limits (768 and 2,000 tokens, 768 for the short form),
`short` the lengths of a tuned model (96 and 24). Both ways ask the same engine the same questions about the same pages,
not counting the engine's start. For the original's way, pages are drawn at 600 DPI and shrunk at each call. `stage`
measures the infer stage instead, with base and adapter and including the engine's start, and only prints its rows.
"""

import importlib.metadata
import json
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.drawn_pages import draw_page
from benchmarks.random_adapters import make_adapter
from benchmarks.random_models import CONFIGS, make_model, silence_unused_tokens
from benchmarks.rows import write_rows
from stages.contract.files import FileHashes, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, Run, describe_output
from stages.engines.engine import Engine, EngineSettings
from stages.models.pictures import Picture
from stages.models.rendering import Prompt, Renderer
from stages.tasks import settle_recipe
from stages.tasks.patent_qa import ask, build_samples
from stages.tasks.patent_qa.questions import PatentQuestion
from stages.tasks.task import Found

MODEL = "Qwen2.5-VL-7B"
DOCUMENTS, PAGES, QUESTIONS = 32, 6, 96
ONE_BY_ONE = 8
"""Number of questions that have pages at 600 DPI, the last of all questions. The rest would take too long."""
LIMITS = {
    "long": ("infer.max_new_tokens=2000", "infer.passes.page_tokens=768", "infer.passes.refine_tokens=768"),
    "short": ("infer.max_new_tokens=96", "infer.passes.page_tokens=96", "infer.passes.refine_tokens=24"),
}
ROOTS = Roots.from_environment()


def run_for_length(length: str) -> Run:
    """Return the run with the token limits of `length`, which is `long` or `short`."""
    sets = (f"model.path={MODEL}", *LIMITS[length])
    recipe = settle_recipe(
        load_recipe(Path("recipes/patent-qa.yaml"), None, sets), "recipes/patent-qa.yaml", Path("recipes/data")
    )
    return Run(f"passes-{length}", recipe, ROOTS)


# -- input of both ways ------------------------------------------------------------------------------------------


def prepare() -> None:
    """Write the model, and a run for each length with adapter, pages and questions, as if preprocess and train had run.

    Also draws, at 600 DPI, the pages of the last ONE_BY_ONE questions.
    """
    model = ROOTS.models / MODEL
    make_model(model, CONFIGS[MODEL])
    silence_unused_tokens(model)
    for length in LIMITS:
        random.seed(0)
        run = run_for_length(length)
        questions = [_question(number) for number in range(QUESTIONS)]
        samples = [_sample(run, question) for question in questions]
        rows = [{"idx": str(q.row), "ids": [q.id], "document": q.document, "question": q.text} for q in questions]
        write_jsonl(run.path("preprocess", "samples", "test.jsonl"), samples)  # type: ignore[arg-type]
        write_jsonl(run.path("preprocess", "asked.jsonl"), rows)
        drawn = [
            (run.path("preprocess", "pages"), d, p, 2_352_000) for d in range(DOCUMENTS) for p in range(1, PAGES + 1)
        ]
        if length == next(iter(LIMITS)):
            with ProcessPoolExecutor() as pool:
                list(pool.map(draw_page, drawn))
            first = run.path("preprocess", "pages")
        else:
            shutil.copytree(first, run.path("preprocess", "pages"), dirs_exist_ok=True)
        make_adapter(run.path("train", "adapters", "tuned"), ROOTS.models / MODEL, run.recipe.train.rank, 0)
        _write_manifest(run, "preprocess", "samples/test.jsonl", "asked.jsonl", "pages/")
        _write_manifest(run, "train", "adapters/tuned/adapter_config.json", "adapters/tuned/adapter_model.safetensors")
    shown = {(int(Path(i).parent.name[1:]), int(Path(i).stem)) for s in samples[-ONE_BY_ONE:] for i in s["images"]}
    with ProcessPoolExecutor() as pool:  # 4960 x 7016 pixels: A4 at 600 DPI
        list(pool.map(draw_page, [(ROOTS.runs / "passes-600dpi", d, p, 4960 * 7016) for d, p in sorted(shown)]))


def _question(number: int) -> PatentQuestion:
    """Return question number `number`. Two of three questions name a page of their document."""
    page = number % PAGES + 1 if number % 3 else None
    text = f"该装置的部件{number}起什么作用？"
    if page:
        text = f"在文件中第{page}页的图中，部件{number}相对于部件{number + 1}的位置关系是？"
    document = f"D{number % DOCUMENTS}.pdf"
    pages = (page,) if page else ()
    return PatentQuestion(f"q{number}", text, document, pages, None, ("x",), (), "", "test", number)


def _sample(run: Run, question: PatentQuestion) -> Any:
    """Return the test sample of a question, as if retrieval had ranked the pages of its document at random."""
    name = question.document.removesuffix(".pdf")
    pages = {p: {"page": p, "text": "", "image": f"preprocess/pages/{name}/{p}.jpg"} for p in range(1, PAGES + 1)}
    ranked = random.sample(range(1, PAGES + 1), PAGES)
    found = Found(pages=pages, ranked=ranked, examples=["在部件5的上方", "弹簧座"])
    return build_samples(run.recipe, question, found, "test")[0]


def _write_manifest(run: Run, stage: str, *names: str) -> None:
    """Write the manifest of a stage as if the stage had run. `names` are its outputs, which exist already."""
    hashes = FileHashes(run.folder / "none")
    manifest = {
        "contract": CONTRACT_VERSION,
        "version": importlib.metadata.version("lorry"),
        "key": run.key(stage, {}),
        "inputs": {},
        "outputs": {name: describe_output(run.stage_folder(stage), name, None, hashes) for name in names},
    }
    write_json(run.path(stage, "manifest.json"), manifest)


# -- the two ways ------------------------------------------------------------------------------------------------


class FineDrawing(Picture):
    """A page drawn at 600 DPI, which each `load` decodes at full size and then shrinks."""

    def load(self) -> Any:
        """Return the page as an RGB picture, shrunk to `width` and `height`."""
        from PIL import Image

        return Image.open(self.path).convert("RGB").resize((self.width, self.height))


class Job:
    """The questions with the token limits of `length`, and the engine that answers them."""

    def __init__(self, engine: Engine, length: str) -> None:
        self._engine, self._length, self._run = engine, length, run_for_length(length)
        self._samples: list[Any] = read_jsonl(self._run.path("preprocess", "samples", "test.jsonl"))
        self._renderer = Renderer(ROOTS.models / MODEL)
        self._texts: dict[str, dict[str, str]] = {}
        self._tokens = 0

    def _prompt(self, sample: Any, name: str, fine: bool) -> Prompt | None:
        """Return the prompt of a sample in the pass `name`, or None if the sample skips that pass.

        `fine` takes the pages drawn at 600 DPI. Later passes use the completions of earlier ones.
        """
        wanted = ask(self._run.recipe, sample, name, self._texts[sample["id"]], ())
        if wanted is None:
            return None
        pictures = [self._run.folder / image for image in wanted.images]
        limit = wanted.max_new_tokens or self._run.recipe.infer.max_new_tokens
        prompt = self._renderer.render(sample["id"], wanted.messages, pictures, wanted.max_pixels, limit)
        if not fine:
            return prompt
        drawn = [ROOTS.runs / "passes-600dpi" / one.path.parent.name / one.path.name for one in prompt.pictures]
        sizes = [(one.width, one.height, one.tokens) for one in prompt.pictures]
        pages = tuple(FineDrawing(path, *size) for path, size in zip(drawn, sizes, strict=True))
        return replace(prompt, pictures=pages)

    def _answer_samples(self, name: str, samples: list[Any], adapter: str | None, fine: bool) -> None:
        """Answer the samples that do not skip the pass `name`. Keep the completions and add up their tokens.

        `adapter` None is the base.
        """
        prompts = [prompt for sample in samples if (prompt := self._prompt(sample, name, fine)) is not None]
        for prompt, completion in zip(prompts, self._engine.generate(prompts, adapter), strict=True):
            self._texts[prompt.id][name] = completion.text
            self._tokens += completion.tokens

    def _row(self, way: str, questions: int, seconds: float, **more: Any) -> dict[str, Any]:
        """Return the row of a way to answer, and print it. `seconds` is the time of all `questions` together."""
        row = {"way": way, "answers": self._length, "questions": questions, **more}
        row |= {"seconds a question": round(seconds / questions, 3), "tokens written": self._tokens}
        print(f"passes: {json.dumps(row)}", flush=True)
        return row

    def answer_one_by_one(self, count: int) -> dict[str, Any]:
        """Answer the last `count` questions one after the other, each in three passes. Returns the row.

        Uses the base and pages at 600 DPI, as the original does. `count` is at most ONE_BY_ONE.
        """
        self._texts, self._tokens = {sample["id"]: {} for sample in self._samples}, 0
        began = time.monotonic()
        for sample in self._samples[-count:]:
            for name in PASSES:
                self._answer_samples(name, [sample], None, fine=True)
        return self._row("one request at a time", count, time.monotonic() - began)

    def answer_batched(self, adapter: str | None, count: int = QUESTIONS) -> dict[str, Any]:
        """Answer the first `count` questions pass by pass: classify all, answer all, refine all. Returns the row.

        `adapter` None is the base.
        """
        samples = self._samples[:count]
        self._texts, self._tokens = {sample["id"]: {} for sample in self._samples}, 0
        began, times = time.monotonic(), {}
        for name in PASSES:
            before = time.monotonic()
            self._answer_samples(name, samples, adapter, fine=False)
            times[name] = round(time.monotonic() - before, 1)
        who = "adapter" if adapter else "base"
        seconds = time.monotonic() - began
        return self._row("batched passes", len(samples), seconds, model=who, seconds_of_passes=times)


PASSES = ("classify", "answer", "refine")


def measure_both() -> None:
    """Measure both ways for both lengths with one engine, using the base, and write their rows."""
    from stages.engines.vllm_engine import VllmEngine

    recipe = run_for_length("long").recipe
    began = time.monotonic()
    adapter = run_for_length("long").path("train", "adapters", "tuned")
    engine = VllmEngine(
        EngineSettings(
            model=ROOTS.models / MODEL,
            adapters={"tuned": adapter},
            dtype="bfloat16",
            max_new_tokens=recipe.infer.max_new_tokens,
            batch_size=recipe.infer.batch_size,
            max_length=10_000,
            seed=recipe.seed,
            max_pictures=3,
            max_pixels=2_352_000,
        )
    )
    rows: list[dict[str, Any]] = [{"what": "engine start", "seconds": round(time.monotonic() - began, 1)}]
    Job(engine, "short").answer_batched(None, 8)  # warm-up: the first calls compile
    for length, count in (("short", 8), ("long", 4)):
        job = Job(engine, length)
        _empty_caches(engine)
        one = job.answer_one_by_one(count)
        _empty_caches(engine)
        ours = job.answer_batched(None)
        rows += [one, {**ours, "times": round(one["seconds a question"] / ours["seconds a question"], 1)}]
        write_rows("passes", rows, "python -m benchmarks.passes")
    engine.close()


def _empty_caches(engine: Any) -> None:
    """Empty the engine's caches of prompts and pictures, so that neither way profits from the other."""
    engine._llm.reset_prefix_cache()
    engine._llm.reset_mm_cache()


def measure_stage() -> None:
    """Run the infer stage for each length, and print a row for each.

    The stage answers all questions in three passes, with the base and then with the adapter.
    """
    for length, values in LIMITS.items():
        run = run_for_length(length)
        began = time.monotonic()
        sets = [word for value in (f"model.path={MODEL}", *values) for word in ("--set", value)]
        command = [sys.executable, "-m", "entrypoints.infer", "patent-qa", "--run", run.name, *sets]
        code = subprocess.run(command, check=False).returncode
        manifest = read_json(run.path("infer", "manifest.json")) or {"answering": {}}
        row = {
            "what": "infer stage",
            "answers": length,
            "exit code": code,
            "wall s": round(time.monotonic() - began, 1),
        }
        for name, took in manifest["answering"].items():
            row[f"{name}: seconds a question"] = round(took["seconds"] / took["samples"], 3)
        print(f"passes: {json.dumps(row)}", flush=True)


def main() -> None:
    """Measure both ways, or the infer stage if the argument is `stage`. Writes the input first if there is no model."""
    if not (ROOTS.models / MODEL / "config.json").is_file():
        prepare()
    measure_stage() if sys.argv[1:] == ["stage"] else measure_both()


if __name__ == "__main__":
    main()
