"""Scores of SmolLM2 on joint code for generated cabinets, before and after training, on held-out objects.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.articulation [--objects 2500 200] [--boxes 5] [--set K=V]

Needs SmolLM2-135M-Instruct. Takes minutes on a GPU. To test it on a CPU, use `--objects 16 4 --set train.epochs=1 --set
train.effective_batch=4`, which learns nothing. recipes/data/make_articulation.py makes the cabinets; none of the
held-out ones is trained on. The row has the scores of base and tuned, their difference with its interval, and those of
a guess that looks only at the sizes of an object's boxes: the largest one is the root, and every other one has the most
frequent joint of the training data.

The same command resumes after a stop.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.made_data import load_maker
from benchmarks.rows import write_rows
from stages.contract.files import read_json, read_jsonl, write_json
from stages.contract.recipe import load_recipe
from stages.contract.records import Sample
from stages.contract.roots import Roots
from stages.tasks import articulation

ROOTS = Roots.from_environment()
OUT = Path(os.environ.get("OUT", ROOTS.runs))
"""Folder of a second copy of the row."""

OBJECTS = (2500, 200)
"""Numbers of training and of held-out objects."""
MOST_BOXES = 5
STAGES = ("preprocess", "train", "infer", "eval")
SETTINGS = (
    *("data.validation_fraction=0.02", "preprocess.samples.copies=0", "train.rank=32", "train.alpha=64"),
    *("train.learning_rate=2e-3", "train.epochs=3", "train.effective_batch=32"),
    *("train.checkpoint_every=100000", "train.log_every=10", "infer.batch_size=200", "infer.chunk_size=200"),
)


def run_stage(name: str, stage: str, data: Path, sets: list[str]) -> float:
    """Run a stage's command. Returns its wall seconds. Raises SystemExit with the exit code if the command fails."""
    words = [word for value in sets for word in ("--set", value)]
    command = [sys.executable, "-m", f"entrypoints.{stage}", "articulation", "--profile", "tiny", "--run", name]
    began = time.monotonic()
    code = subprocess.run([*command, "--data", str(data), *words], check=False).returncode
    took = time.monotonic() - began
    cure = "; see its messages above" if code else ""
    print(f"{stage}: ended with exit code {code} after {took:.0f} s{cure}", flush=True)
    if code:
        raise SystemExit(code)
    return round(took, 1)


def guess_scores(samples: list[Sample], trained: list[Sample]) -> dict[str, float]:
    """Return the mean score of a guess in percent, by metric.

    The guess names an object's largest box as the root and gives each other box the most frequent joint of `trained`.
    A metric's mean is over the samples that have it.
    """
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "articulation.yaml", "tiny")
    lines = Counter(
        line.partition(",")[2]
        for sample in trained
        for line in sample["references"][0].split("\n")
        if line.startswith("dict(")
    )
    joint = lines.most_common(1)[0][0]
    rows = []
    for sample in samples:
        sizes = {name: box["extent"] for name, box in sample["meta"]["boxes"].items()}
        root = max(sizes, key=lambda name: sizes[name][0] * sizes[name][1] * sizes[name][2])
        others = [f"dict(box={name},{joint}" for name in sizes if name != root]
        answer = "\n".join([f"root_geom = {root}", "child_joints = [", *others, "]"])
        rows.append(articulation.score(recipe, answer, sample))
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(100 * fmean(row[name] for row in rows if name in row), 4) for name in names}


def finished_row(folder: Path, seed: int, objects: list[int], boxes: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the row of the finished run in `folder`.

    `objects` is the numbers of training and held-out objects, `boxes` the largest number of an object's; `seconds`
    has the wall seconds by stage.
    """
    scores = read_json(folder / "eval" / "scores.json")
    gains = read_json(folder / "eval" / "differences.json")["joints"]
    samples: Any = read_jsonl(folder / "preprocess" / "samples" / "test.jsonl")
    trained: Any = read_jsonl(folder / "preprocess" / "samples" / "train.jsonl")
    first = next(iter(gains))
    return {
        "seed": seed,
        "objects": dict(zip(("trained on", "held out"), objects, strict=True)),
        "boxes of an object, at most": boxes,
        "samples trained on": len(trained),
        "base": {name: figure["value"] for name, figure in scores["base"].items()},
        "guess": guess_scores(samples, trained),
        "tuned": {name: figure["value"] for name, figure in scores["joints"].items()},
        f"tuned over base, {first}, 95% interval": [gains[first][key] for key in ("value", "low", "high")],
        "failed": {name: scores[name][first]["failed"] for name in ("base", "joints")},
        "measures of tuned": read_json(folder / "eval" / "measures.json").get("joints", {}),
        "seconds": seconds,
    }


def main() -> None:
    """Make the cabinets if they are missing, run the stages, and write the row and its copy in OUT."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="Seed of cabinets and training. Default: 0.")
    parser.add_argument(
        "--objects", type=int, nargs=2, default=OBJECTS, metavar=("TRAIN", "TEST"), help="Objects. Default: 2500 200."
    )
    parser.add_argument("--boxes", type=int, default=MOST_BOXES, help="Most boxes of an object. Default: 5.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="Recipe override; may be repeated."
    )
    chosen = parser.parse_args()
    train, test = chosen.objects
    name = f"articulation-{chosen.seed}-{train}-{test}-{chosen.boxes}"
    data = ROOTS.runs / "articulation-data" / name
    began = time.monotonic()
    if not data.is_dir():
        load_maker("articulation").make(
            data.with_name(f"{name}.new"), chosen.seed, train, test, loops=1, most_boxes=chosen.boxes
        )
        data.with_name(f"{name}.new").rename(data)
    seconds = {"make": round(time.monotonic() - began, 1)}
    sets = [*SETTINGS, f"seed={chosen.seed}", *chosen.set]
    for stage in STAGES:
        seconds[stage] = run_stage(name, stage, data, sets)
    row = finished_row(ROOTS.runs / name, chosen.seed, [train, test], chosen.boxes, seconds)
    OUT.mkdir(parents=True, exist_ok=True)
    write_json(OUT / f"{name}.json", row)
    write_rows("articulation", [row], "python -m benchmarks.articulation")


if __name__ == "__main__":
    main()
