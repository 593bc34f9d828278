"""A whole run folder up to eval, made by hand: every stage's files and manifests by the contract."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.contract.errors import Exit
from stages.contract.files import FileHashes, write_json, write_jsonl
from stages.contract.recipe import Recipe, load_recipe
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, Run, describe_output
from stages.eval.stage import work
from stages.host.runner import run_stage

RECIPE = Path(__file__).parents[2] / "recipes" / "patent-qa.yaml"

LOSSES = [
    *({"adapter": "tuned", "step": step, "epoch": step / 10, "loss": round(3 / step, 4)} for step in range(1, 21)),
    {"adapter": "tuned", "step": 10, "epoch": 1.0, "eval_loss": 0.9},
    {"adapter": "tuned", "step": 20, "epoch": 2.0, "eval_loss": 0.7},
]


def make_sample(number: int, **changes: Any) -> Sample:
    """Question `number`; every third document is Chinese. `changes` go into `meta`, except `references`."""
    document = number // 4 + 1
    chinese = document % 3 == 0
    group = f"CN{document:07}A.pdf" if chinese else f"US{document:07}A.pdf"
    question = f"在第2页的图中，部件{number}是什么？" if chinese else f"On page 2, what is part {number}?"
    references = changes.pop("references", ["踏板支架" if chinese else "the locking lever"])
    return {
        "id": f"{group[:-4]}-q{number}",
        "messages": [{"role": "user", "content": f"Page 2: ...\nQuestion: {question}"}],
        "images": [],
        "references": references,
        "meta": {
            "group": group,
            "kind": ("name", "number", "position", "function")[number % 4],
            "question": question,
            "page_named": 2,
            "evidence": [2],
            "pages": [2, 3] if number % 5 else [3, 4],
            "page_images": [f"preprocess/pages/d{document}/{page}.jpg" for page in (2, 3)],
            **changes,
        },
    }


def make_samples() -> list[Sample]:
    return [make_sample(number) for number in range(24)]


def answer(sample: Sample, text: str) -> Prediction:
    """A prediction without an error."""
    return {**failed_prediction(sample["id"], ""), "answer": text, "text": text, "finish_reason": "stop", "error": None}


def make_run(
    folder: Path,
    samples: list[Sample],
    predictions: dict[str, list[Prediction]],
    losses: list[dict[str, Any]] | None = None,
    pictures: bool = True,
    recipe: Recipe | None = None,
) -> Run:
    """Write preprocess, train and infer as if they had run."""
    run = Run(
        "patent-qa",
        recipe or load_recipe(RECIPE, "tiny"),
        Roots(data=folder / "data", models=folder / "models", runs=folder / "runs"),
    )
    write_jsonl(run.path("preprocess", "samples", "test.jsonl"), samples)  # type: ignore[arg-type]
    for image in {path for sample in samples for path in sample["meta"]["page_images"] if pictures}:
        path = run.folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (504, 672), "white").save(path)  # little more than the report's width, so quick to shrink
    write_jsonl(run.path("train", "metrics.jsonl"), LOSSES if losses is None else losses)
    for name, records in predictions.items():
        write_jsonl(run.path("infer", "predictions", f"{name}.jsonl"), records)  # type: ignore[arg-type]
    pages = {"pages/": None} if pictures else {}
    _manifest(run, "preprocess", {"samples/test.jsonl": len(samples), **pages})
    _manifest(run, "train", {"metrics.jsonl": None})
    _manifest(run, "infer", {f"predictions/{name}.jsonl": len(records) for name, records in predictions.items()})
    return run


def _manifest(run: Run, stage: str, outputs: dict[str, int | None]) -> None:
    folder = run.stage_folder(stage)
    hashes = FileHashes(folder / ".hashes.json")
    manifest = {
        "contract": CONTRACT_VERSION,
        "stage": stage,
        "status": "done",
        "key": run.key(stage, {}),
        "inputs": {},
        "recipe": run.recipe.digest(),
        "outputs": {name: describe_output(folder, name, count, hashes) for name, count in outputs.items()},
        "counts": {"documents": 20, "pages": 86} if stage == "preprocess" else {},
        "skipped": [{"what": "US9.pdf page 4", "reason": "blank page", "detail": ""}] if stage == "preprocess" else [],
        "decisions": [{"what": "precision", "value": "float32", "why": "target cpu"}] if stage == "train" else [],
        "version": importlib.metadata.version("lorry"),
        "revision": "0123abc",
        "image": None,
        "gpus": [],
        "dependencies": {"torch": "2.13.0"},
        "starts": ["2026-01-02T03:04:05.000+00:00"],
        "end": "2026-01-02T03:06:05+00:00",
        "seconds": 120.0,
        "peak_memory_bytes": 3 * 1024**3,
    }
    write_json(run.path(stage, "manifest.json"), manifest)


@pytest.fixture
def samples() -> list[Sample]:
    """24 questions on 6 documents."""
    return make_samples()


def make_predictions(samples: list[Sample]) -> dict[str, list[Prediction]]:
    """Base is right once in six; tuned is wrong once in four and fails once."""
    base = [answer(s, s["references"][0] if i % 6 == 0 else "a lever") for i, s in enumerate(samples)]
    tuned = [answer(s, "踏板" if i % 4 == 1 else s["references"][0]) for i, s in enumerate(samples)]
    tuned[7] = failed_prediction(samples[7]["id"], "prompt of 1203 tokens does not fit in 1024")
    return {"base": base, "tuned": tuned}


@pytest.fixture
def predictions(samples: list[Sample]) -> dict[str, list[Prediction]]:
    return make_predictions(samples)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of `samples` and `predictions` after eval, for tests that change nothing in it."""
    samples = make_samples()
    run = make_run(tmp_path_factory.mktemp("evaluated"), samples, make_predictions(samples))
    assert run_stage(run, "eval", work) == Exit.DONE
    return run


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Run]:
    """`make_run` in this test's own folder."""

    def build_run(*args: Any, **kwargs: Any) -> Run:
        return make_run(tmp_path, *args, **kwargs)

    return build_run
