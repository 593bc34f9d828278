"""Run folders as the stages leave them, rows of any content, and a page as a browser sees it: for tests."""

import importlib.metadata
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from stages.contract.files import FileHashes, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.mixes import training_samples
from stages.contract.recipe import Recipe, dump_recipe, load_recipe
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, Run, describe_output
from stages.results.ledger import Row, read_ledger
from stages.results.run_reader import run_names
from tests.conftest import MINIMAL_RECIPE

VERSION = importlib.metadata.version("lorry")

SCORES = {"base": 20.0, "plain": 42.5, "mixed": 61.25}

MIXES: dict[str, Any] = {"plain": ["main"], "mixed": ["main#4", {"source": "extra", "fraction": 1.5}]}
"""Of six samples of `main` and four of `extra`."""


def roots_of(folder: Path) -> Roots:
    return Roots(folder / "data", folder / "models", folder / "runs")


def make_recipe(folder: Path, mixes: Mapping[str, Any] = MIXES, **changes: Any) -> Recipe:
    """The least recipe there is, with these adapters; `changes` are top-level sections."""
    values = yaml.safe_load(MINIMAL_RECIPE)
    values["model"]["path"] = "small"
    values["train"]["adapters"] = [{"name": name, "data": data} for name, data in mixes.items()]
    values["train"]["keep_going"] = True
    path = folder / "made.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return load_recipe(path)


def figures_of(value: float, n: int = 40) -> dict[str, Any]:
    def figure(middle: float) -> dict[str, Any]:
        ends = {"low": middle - 10, "high": middle + 10}
        return {"value": middle, **ends, "groups": 12, "n": n, "failed": 3, "empty": 2, "p": 0.01}

    return {"exact_match": figure(value), "f1": figure(value / 2)}


def finish(run: Run, stage: str, outputs: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Write a stage's files, and the manifest that it ends with."""
    folder = run.stage_folder(stage)
    for name, content in outputs.items():
        path = folder / name
        if path.suffix == ".jsonl":
            write_jsonl(path, content)
        else:
            write_json(path, content)
    hashes = FileHashes(folder / ".hashes.json")
    inputs = run.inputs(stage, hashes) if stage != "preprocess" else {"data/questions.jsonl": "0" * 64}
    manifest = {
        "contract": CONTRACT_VERSION,
        "stage": stage,
        "status": "done",
        "key": run.key(stage, inputs),
        "recipe": run.recipe.digest(),
        "inputs": inputs,
        "outputs": {name: describe_output(folder, name, None, hashes) for name in outputs},
        "counts": {},
        "seed": run.recipe.seed,
        "version": VERSION,
        "end": "2026-01-02T03:06:05+00:00",
        "seconds": 120.0,
        **facts,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def make_run(
    folder: Path,
    name: str = "job",
    mixes: Mapping[str, Any] = MIXES,
    scores: Mapping[str, float] = SCORES,
    untrained: Mapping[str, str] | None = None,
    vote: Mapping[str, Any] | None = None,
    seen: int = 0,
    recipe: Recipe | None = None,
) -> Run:
    """A run with all four stages done, as these write it. `vote` is infer's fact; `seen` of 40 samples were trained
    on."""
    untrained = untrained or {}
    (folder / "models" / "small").mkdir(parents=True, exist_ok=True)
    if not (folder / "models" / "small" / "config.json").exists():
        write_json(folder / "models" / "small" / "config.json", {})
        (folder / "models" / "small" / "model.safetensors").write_bytes(b"")
    recipe = recipe or make_recipe(folder, mixes, infer={"vote": {"adapters": "all"}} if vote else {})
    run = Run(name, recipe, roots_of(folder))
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    samples = [
        {"id": f"{source}{number}", "meta": {"source": source}}
        for source, count in (("main", 6), ("extra", 4))
        for number in range(count)
    ]
    split = {f"samples/{part}.jsonl": [] for part in ("validation", "test", "validation_asked")}
    finish(run, "preprocess", {"samples/train.jsonl": samples, **split, "asked.jsonl": []})
    trained: dict[str, Any] = {}
    for adapter in recipe.train.adapters:
        if adapter.name not in untrained:
            folder_of = f"adapters/{adapter.name}"
            used = [sample for sample in training_samples(samples, adapter, recipe.seed) if sample["id"] != "extra0"]
            trained[f"{folder_of}/adapter_config.json"] = {"base_model_name_or_path": "small"}
            trained[f"{folder_of}/training.json"] = {
                "steps": 12,
                "mix": adapter.mix,
                "samples": {"train": len(used), "validation": 2},
                "left_out": {"train": ["extra0"], "validation": []},
                "log": [{"step": 1, "loss": 3.5}, {"step": 12, "loss": 0.25}, {"step": 12, "eval_loss": 0.5}],
            }
    finish(run, "train", {**trained, "metrics.jsonl": []}, **({"untrained": dict(untrained)} if untrained else {}))
    predictions: dict[str, Any] = {f"predictions/{model}.jsonl": [{"id": model}] for model in scores}
    finish(run, "infer", predictions, **({"vote": vote} if vote else {}))
    finish_eval(run, scores, seen)
    return run


def finish_eval(run: Run, scores: Mapping[str, float] = SCORES, seen: int = 0, **facts: Any) -> None:
    written = {
        "scores.json": {model: figures_of(value) for model, value in scores.items()},
        "differences.json": {
            model: figures_of(value - scores["base"]) for model, value in scores.items() if model != "base"
        },
    }
    counts = {"scored": 40, **({"scored on training data": seen} if seen else {})}
    finish(run, "eval", written, **{"counts": counts, **facts})


def rows_of(folder: Path, *names: str, metric: str | None = None) -> list[Row]:
    roots = roots_of(folder)
    return read_ledger(roots, names or run_names(roots.runs), metric).rows


def row_of(folder: Path, adapter: str, **options: Any) -> Row:
    (row,) = [row for row in rows_of(folder, **options) if row.adapter == adapter]
    return row


PROCESS = [{"text_length_filter": {"min_len": 15}}, {"image_captioning_mapper": None}, {"document_deduplicator": {}}]


def make_experiment(folder: Path, process: Any = PROCESS, kept: int = 81) -> Run:
    """A run whose records Data-Juicer processed, and whose connector was trained before its adapters."""
    recipe = make_recipe(
        folder,
        preprocess={
            "pages": {"max_pixels": 50176},
            "retrieval": {"embedder": "x"},
            "data_juicer": {"process": process},
        },
    )
    run = make_run(folder, "custom", recipe=recipe)
    outputs = {name: content_of(path) for name, path in outputs_of(run, "preprocess").items()}
    steps = [(100, 90), (90, 90), (90, kept)]
    operators = [
        {"operator": name, "read": read, "kept": left, "dropped": read - left, "changed": 0, "seconds": 1.0}
        for (read, left), entry in zip(steps, process, strict=True)
        for name in entry
    ]
    finish(run, "preprocess", {**outputs, "records/operators.json": operators})
    outputs = {name: content_of(path) for name, path in outputs_of(run, "train").items()}
    trained = {"samples": {"train": 80, "validation": 0}}
    finish(run, "train", {**outputs, "connector/training.json": trained})
    for stage in ("infer", "eval"):
        finish(
            run, stage, {name: content_of(path) for name, path in outputs_of(run, stage).items()}, counts={"scored": 40}
        )
    return run


def content_of(path: Path) -> Any:
    return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)


def outputs_of(run: Run, stage: str) -> dict[str, Path]:
    manifest = read_json(run.path(stage, "manifest.json"))
    return {name: run.path(stage, name) for name in manifest["outputs"]}


TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=8)  # a row's texts are one line
NUMBERS = st.none() | st.floats(-100, 100, allow_nan=False)
ROWS = st.lists(
    st.builds(
        Row, run=TEXTS, adapter=TEXTS, state=TEXTS, data_mix=TEXTS, score=NUMBERS, n=st.none() | st.integers(0, 99)
    ),
    max_size=12,
)


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text of each cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.in_cell = tag == "td"
        if self.in_cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.cells[-1] += data
