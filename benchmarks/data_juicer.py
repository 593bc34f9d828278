"""Process ten thousand synthetic records with Data-Juicer: in processes, killed half-way and resumed, and on Ray.

    python -m benchmarks.data_juicer

Writes results/data_juicer.json: each operator's counts of records and seconds, the records per second of the whole, the
cost of a SIGKILL half-way, and a digest of the kept records, which should be the same in all three runs. The operators
are filters of captions and pictures that need no weights, and a deduplicator. The records are made here (seed 42):
texts of real words, some with one fault each, some near-duplicates; 300 pictures of noise, some too narrow, some too
tall, some too small a file.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.rows import write_rows
from stages.contract.files import read_json
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.host.runner import run_stage
from stages.preprocess.data_juicer import run_operators

RECORDS, PICTURES, CHUNK = 10_000, 300, 2_500
WORDS = (  # noqa: SIM905 - reads better
    "red blue green large small wooden bright bus street dog bicycle window table morning people walking near old"
    " station harbour market bridge garden child kitchen mountain river clock tower umbrella bench horse field snow"
    " traffic light corner shop fruit basket train platform boat water sand evening lamp chair book shelf"
).split()
OPERATORS: list[dict[str, Any]] = [
    {"text_length_filter": {"min_len": 15, "max_len": 200}},
    {"alphanumeric_filter": {"min_ratio": 0.7}},
    {"character_repetition_filter": {"rep_len": 3, "max_ratio": 0.2}},
    {"special_characters_filter": {"max_ratio": 0.35}},
    {"flagged_words_filter": {"lang": "en", "max_ratio": 0.0, "flagged_words_dir": "words"}},
    {"image_size_filter": {"min_size": "50kb", "max_size": "5mb"}},
    {"image_shape_filter": {"min_width": 336, "max_width": 1024, "min_height": 336, "max_height": 1024}},
    {"image_aspect_ratio_filter": {"min_ratio": 0.5, "max_ratio": 2.0}},
    {
        "document_minhash_deduplicator": {
            **{"tokenization": "space", "window_size": 5},
            **{"num_permutations": 128, "jaccard_threshold": 0.85},
        }
    },
]
"""Data-Juicer counts spaces as special characters and common endings as repetition, so texts of real words need 0.35
and 0.2 here."""


def make_data(folder: Path) -> None:
    """Write into `folder`: records.jsonl, pictures in images/, and the list of flagged words in words/."""
    from PIL import Image

    draw = random.Random(42)
    (folder / "images").mkdir(parents=True)
    (folder / "words").mkdir()
    (folder / "words" / "flagged_words.json").write_text(json.dumps({"en": ["darn"]}))
    for number in range(PICTURES):
        width, height = draw.randint(400, 640), draw.randint(400, 640)
        if number % 20 == 0:
            width = 200
        if number % 20 == 1:
            width, height = 340, 900
        spread = 2 if number % 20 == 2 else 90  # pictures with less contrast make smaller files
        Image.effect_noise((width, height), spread).convert("RGB").save(folder / "images" / f"{number}.jpg", quality=85)
    texts: list[str] = []
    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for number in range(RECORDS):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(12, 26)))
            if number % 8 == 7:  # a near-duplicate: with one more word at the end
                text = f"{texts[draw.randrange(len(texts))]} again"
            texts.append(text)
            text = {3: "short", 5: f"darn {text}", 9: "na" * 60, 11: f"{text} {'#$%' * 25}"}.get(number % 50, text)
            record = {
                "id": f"made-{number:05}",
                "text": f"<__dj__image>\n{text} <|__dj__eoc|>",
                "images": [f"images/{draw.randrange(PICTURES)}.jpg"],
            }
            file.write(json.dumps(record) + "\n")


def make_run(root: Path, name: str, executor: str) -> Run:
    """Write the recipe <root>/<name>.yaml. Returns a run of that recipe, named `name`, in <root>/runs.

    `executor` is Data-Juicer's: `default` (processes) or `ray`.
    """
    juicer = {"process": OPERATORS, "executor": executor, "chunk_size": CHUNK}
    recipe = root / f"{name}.yaml"
    values: dict[str, Any] = {
        "task": "better_synth",
        "model": {"path": "none", "swift_type": "none", "swift_template": "none"},
        "data": {"path": "made"},
        "preprocess": {"data_juicer": juicer},
        "train": {"adapters": [{"name": "none"}]},
    }
    recipe.write_text(json.dumps(values))
    return Run(name, load_recipe(recipe), Roots(root, root, root / "runs"))


def process_records(root: Path, name: str, executor: str) -> int:
    """Run a preprocess stage that only applies Data-Juicer's operators to the records. Returns its exit code."""
    run = make_run(root, name, executor)
    return run_stage(run, "preprocess", lambda stage: run_operators(stage, run.data / "records.jsonl") and None)


def start_process(root: Path, name: str, executor: str) -> "subprocess.Popen[bytes]":
    """Start `process_records` in a new process. Returns the process."""
    return subprocess.Popen([sys.executable, "-m", "benchmarks.data_juicer", "stage", str(root), name, executor])


def time_records(root: Path, name: str, executor: str) -> dict[str, Any]:
    """Process the records in a new process. Returns the row with its speed and a digest of the kept records.

    Raises SystemExit if the process fails.
    """
    began = time.monotonic()
    code = start_process(root, name, executor).wait()
    if code:
        sys.exit(f"{name}: preprocess ended with exit code {code}; see its messages above")
    seconds = time.monotonic() - began
    kept = (root / "runs" / name / "preprocess" / "records" / "kept.jsonl").read_bytes()
    return {
        "run": name,
        "executor": executor,
        "seconds": round(seconds, 1),
        "records/s": round(RECORDS / seconds, 1),
        "kept": kept.count(b"\n"),
        "kept sha256": hashlib.sha256(kept).hexdigest()[:16],
    }


def kill_and_resume(root: Path, name: str) -> dict[str, Any]:
    """Kill the stage with SIGKILL three seconds after five of its nine operators are done, and start it again.

    Returns the row of the second start, with the seconds before the kill as another column. Raises SystemExit if the
    second start fails.
    """
    began = time.monotonic()
    child = start_process(root, name, "default")
    half = root / "runs" / name / "preprocess" / "records" / "work" / f"{len(OPERATORS) // 2 + 1:02}.json"
    while not half.exists() and child.poll() is None:
        time.sleep(0.05)
    time.sleep(3.0)  # until the next operator is at work
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = time.monotonic() - began
    again = time_records(root, name, "default")
    return {**again, "run": "killed half-way", "seconds before the kill": round(before, 1)}


def main() -> None:
    """Process the records in processes, with a kill, and on Ray. Write a row for each.

    Also writes a row for each operator of the first and the last run.
    """
    root = Path(tempfile.mkdtemp(prefix="data-juicer-"))
    try:
        make_data(root / "made")
        rows = [
            time_records(root, "processes", "default"),
            kill_and_resume(root, "killed"),
            time_records(root, "ray", "ray"),
        ]
        for row in rows:
            row["same output"] = row["kept sha256"] == rows[0]["kept sha256"]
        for name in ("processes", "ray"):
            entries = read_json(root / "runs" / name / "preprocess" / "records" / "operators.json")
            rows += [{"run": name, **{key: one[key] for key in one if key != "failed" or one[key]}} for one in entries]
        write_rows("data_juicer", rows, "python -m benchmarks.data_juicer")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["stage"]:
        sys.exit(process_records(Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
    main()
