"""The whole job of better-synth on a CPU: Data-Juicer, the connector, an adapter on it, and both benchmarks."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from safetensors.numpy import load_file

from stages.contract.files import read_json, read_jsonl, sha256_file
from tests.conftest import MODELS, REPOSITORY, Lorry, need_model, snapshot

pytestmark = pytest.mark.long

Job = tuple[Lorry, tuple[str, ...]]
RECORDS, TALKS, TEXTVQA, MMBENCH = 80, 48, 8, 4
LOST = 4
"""Records whose original is missing: one in twenty."""


@pytest.fixture(scope="module")
def synth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """`lorry run better-synth --profile tiny` on fewer of the demo's pictures."""
    need_model("tiny-llava")
    if importlib.util.find_spec("data_juicer") is None:
        pytest.skip("Data-Juicer is not installed: `make setup` does it")
    data = tmp_path_factory.mktemp("data")
    sizes = {"records": RECORDS, "finetune": TALKS, "textvqa": TEXTVQA, "mmbench": MMBENCH}
    words = [word for name, count in sizes.items() for word in (f"--{name}", str(count))]
    maker = REPOSITORY / "recipes" / "data" / "make_better_synth.py"
    subprocess.run([sys.executable, str(maker), "--output", str(data / "better-synth"), *words], check=True)
    lorry = Lorry(data, MODELS, tmp_path_factory.mktemp("runs"))
    options = ("better-synth", "--profile", "tiny", "--run", "job")
    finished = lorry("entrypoints.lorry", "run", *options)
    assert finished.code == 0, finished.output
    yield lorry, options


def path(job: Job, *parts: str) -> Path:
    return job[0].runs.joinpath("job", *parts)


def samples(job: Job, split: str, source: str) -> dict[str, dict[str, Any]]:
    rows = read_jsonl(path(job, "preprocess", "samples", f"{split}.jsonl"))
    return {row["id"]: row for row in rows if row["meta"]["source"] == source}


def test_the_connector_learns_the_records_that_data_juicer_keeps(synth: Job) -> None:
    operators = read_json(path(synth, "preprocess", "records", "operators.json"))
    assert operators[0]["read"] == RECORDS
    for one, following in pairwise(operators):
        assert one["read"] - one["dropped"] == one["kept"] == following["read"]
    dropped = {one["operator"]: one["dropped"] for one in operators}
    assert dropped["text_length_filter"] == dropped["special_characters_filter"] == dropped["flagged_words_filter"] == 4
    assert dropped["document_minhash_deduplicator"] > 0
    kept = read_jsonl(path(synth, "preprocess", "records", "kept.jsonl"))
    captions = samples(synth, "train", "pretrain")
    manifest = read_json(path(synth, "preprocess", "manifest.json"))
    lost = [one for one in manifest["skipped"] if one["reason"] == "no question with its id in the LLaVA file"]
    assert len(captions) == len(kept) - len(lost) and 0 < len(lost) <= LOST
    for sample in captions.values():
        asked, answered = sample["messages"]
        assert asked["content"].count("<image>") == 1 == len(sample["images"])
        assert not any(noise in answered["content"] for noise in ("click", "img", "#", "<", "|"))
    learnt = read_json(path(synth, "train", "manifest.json"))["counts"]
    assert learnt["connector samples"] == len(captions)
    assert learnt["tuned samples"] == TALKS == len(samples(synth, "train", "finetune"))


def test_the_adapter_is_trained_on_the_trained_connector(synth: Job) -> None:
    file = path(synth, "train", "connector", "connector.safetensors")
    manifest = read_json(path(synth, "train", "manifest.json"))
    assert manifest["connector"]["sha256"] == sha256_file(file)
    trained, base = load_file(file), load_file(MODELS / "tiny-llava" / "model.safetensors")
    assert trained and all("multi_modal_projector" in name for name in trained)
    ends = {name: next(value for other, value in base.items() if name.endswith(other)) for name in trained}
    assert all(np.abs(trained[name] - ends[name]).max() > 0 for name in trained), "every part of it has changed"
    adapter = load_file(path(synth, "train", "adapters", "tuned", "adapter_model.safetensors"))
    assert adapter and not any("projector" in name or "vision_tower" in name for name in adapter)
    rows = [row for row in read_jsonl(path(synth, "train", "metrics.jsonl")) if "loss" in row]
    assert {row["adapter"] for row in rows} == {"connector", "tuned"}
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_every_question_is_asked_with_its_picture_and_counted_once(synth: Job) -> None:
    asked = samples(synth, "test", "textvqa") | samples(synth, "test", "mmbench")
    assert len(samples(synth, "test", "textvqa")) == TEXTVQA
    options = [
        len(each["meta"]["options"]) for name, each in asked.items() if name.startswith("mmbench/") and "#" not in name
    ]
    assert len(options) == MMBENCH and sum(options) == len(samples(synth, "test", "mmbench"))
    for name in ("base", "tuned"):
        predictions = read_jsonl(path(synth, "infer", "predictions", f"{name}.jsonl"))
        assert {prediction["id"] for prediction in predictions} == set(asked)
        assert all(prediction["completion_tokens"] > 0 for prediction in predictions)
        assert all(prediction["prompt_tokens"] > 16 for prediction in predictions), "a picture is 16 tokens"
    scores = read_json(path(synth, "eval", "scores.json"))
    for figures in scores.values():
        assert {metric: figure["n"] for metric, figure in figures.items()} == {
            **{"textvqa_accuracy": TEXTVQA, "mmbench_accuracy": MMBENCH}
        }


def test_no_picture_of_a_test_set_was_trained_on(synth: Job) -> None:
    shown = {
        split: {
            image
            for row in read_jsonl(path(synth, "preprocess", "samples", f"{split}.jsonl"))
            for image in row["images"]
        }
        for split in ("train", "test")
    }
    assert shown["train"] and shown["test"] and not shown["train"] & shown["test"]
    assert all(path(synth, image).is_file() for images in shown.values() for image in images)


def test_submission_and_uploads_are_complete(synth: Job) -> None:
    lines = read_jsonl(path(synth, "infer", "submission", "tuned.jsonl"))
    assert len(lines) == TEXTVQA + MMBENCH
    wanted = [json.loads(line) for line in (synth[0].data / "better-synth" / "textvqa.jsonl").read_text().splitlines()]
    assert [(line["question_id"], line["prompt"]) for line in lines[:TEXTVQA]] == [
        (row["question_id"], row["text"]) for row in wanted
    ]
    sheet = openpyxl.load_workbook(path(synth, "eval", "uploads", "tuned", "mmbench.xlsx")).active
    assert sheet.max_row == MMBENCH + 1


def test_a_second_run_does_nothing(synth: Job) -> None:
    lorry, options = synth
    before = snapshot(path(synth))
    finished = lorry("entrypoints.lorry", "run", *options)
    assert finished.code == 0 and "all four stages are up to date" in finished.output, finished.output
    assert snapshot(path(synth)) == before
