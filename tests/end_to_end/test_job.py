"""The whole job through the real commands with the real small models, on four of the demo's documents."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from stages.contract.files import read_jsonl
from tests.conftest import Lorry
from tests.small_inputs import RANDOM_LLAMA

Job = tuple[Lorry, tuple[str, ...]]


def manifest(job: Job, stage: str) -> dict[str, Any]:
    return dict(json.loads((job[0].runs / "job" / stage / "manifest.json").read_text()))


def test_samples_are_split_by_document(job: Job) -> None:
    folder = job[0].runs / "job" / "preprocess" / "samples"
    groups = [{s["meta"]["group"] for s in read_jsonl(folder / f"{n}.jsonl")} for n in ("train", "validation", "test")]
    assert all(groups)
    assert not (groups[0] & groups[2] or groups[0] & groups[1] or groups[1] & groups[2])


def test_training_lowers_the_loss_and_keeps_the_adapter(job: Job) -> None:
    folder = job[0].runs / "job" / "train"
    losses = [line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 4
    assert sum(losses[-2:]) < sum(losses[:2])
    assert {path.name for path in (folder / "adapters" / "tuned").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "training.json",
        "README.md",
        "made.json",
        "timing.json",
    }
    assert not (folder / "checkpoints").exists()


def test_every_sample_is_answered_by_base_and_adapter(job: Job) -> None:
    run = job[0].runs / "job"
    samples = read_jsonl(run / "preprocess" / "samples" / "test.jsonl")
    answers = {name: read_jsonl(run / "infer" / "predictions" / f"{name}.jsonl") for name in ("base", "tuned")}
    for predictions in answers.values():
        assert [p["id"] for p in predictions] == [s["id"] for s in samples]
        assert all(p["error"] is None and p["text"] and p["completion_tokens"] > 0 for p in predictions)
    assert answers["base"] != answers["tuned"]


def test_scores_have_the_published_form(job: Job) -> None:
    scores = json.loads((job[0].runs / "job" / "eval" / "scores.json").read_text())
    assert set(scores) == {"base", "tuned"}
    for metrics in scores.values():
        for metric in ("exact_match", "f1", "character_f1", "retrieval_recall"):
            entry = metrics[metric]
            assert set(entry) == {"value", "low", "high", "groups", "n", "failed", "empty"}
            assert 0 <= entry["value"] <= 100
            assert (entry["groups"], entry["n"], entry["failed"]) == (1, 8, 0)
            assert entry["low"] is entry["high"] is None  # one document is too few
    assert (job[0].runs / "job" / "eval" / "report.html").stat().st_size > 10_000


def test_manifests_trace_every_figure_to_its_inputs(job: Job) -> None:
    manifests = {stage: manifest(job, stage) for stage in ("preprocess", "train", "infer", "eval")}
    for earlier, later in (("preprocess", "train"), ("train", "infer"), ("infer", "eval")):
        used = {n: d for n, d in manifests[later]["inputs"].items() if n.startswith(f"{earlier}/")}
        assert used
        for name, digest in used.items():
            assert manifests[earlier]["outputs"][name.removeprefix(f"{earlier}/")]["sha256"] == digest
    for value in manifests.values():
        assert value["status"] == "done" and value["peak_memory_bytes"] > 0 and value["dependencies"]
    assert "models/base" in manifests["train"]["inputs"]


def test_a_second_run_does_nothing(job: Job) -> None:
    lorry, options = job
    before = {s: manifest(job, s) for s in ("preprocess", "train", "infer", "eval")}
    again = lorry("entrypoints.lorry", "run", *options)
    assert again.code == 0
    assert [line for line in again.lines if line.endswith(": up to date")] == [
        f"{stage}: up to date" for stage in ("preprocess", "train", "infer", "eval")
    ]
    folder = lorry.runs / "job"
    assert again.lines[-4:] == [
        "all four stages are up to date",
        f"adapter tuned: {folder / 'train' / 'adapters' / 'tuned'}",
        f"predictions: {folder / 'infer' / 'predictions'}",
        f"report: {folder / 'eval' / 'report.html'}",
    ]
    assert before == {s: manifest(job, s) for s in ("preprocess", "train", "infer", "eval")}


def test_status_shows_the_stages(job: Job) -> None:
    shown = job[0]("entrypoints.lorry", "status", "job")
    assert shown.code == 0
    assert sum("done" in line for line in shown.lines) == 4


def test_a_changed_inference_setting_leaves_training_alone(job: Job, small_models: Path) -> None:
    lorry, options = job
    trained = manifest(job, "train")
    changed = lorry("entrypoints.lorry", "run", *options, "--set", "eval.worst=3")
    assert changed.code == 0, changed.output
    assert "infer: up to date" in changed.output and "eval: up to date" not in changed.output
    assert manifest(job, "train") == trained
    assert lorry("entrypoints.lorry", "run", *options).code == 0


def test_both_engines_give_the_same_greedy_answers(job: Job) -> None:
    lorry, options = job
    pytest.importorskip("vllm")
    folder = lorry.runs / "job" / "infer" / "predictions"
    by_engine = {"transformers": {n: read_jsonl(folder / f"{n}.jsonl") for n in ("base", "tuned")}}
    finished = lorry("entrypoints.infer", *options, "--set", "infer.engine=vllm")
    assert finished.code == 0, finished.output
    by_engine["vllm"] = {n: read_jsonl(folder / f"{n}.jsonl") for n in ("base", "tuned")}
    assert manifest(job, "infer")["decisions"][0]["value"] == "vllm"
    for name in ("base", "tuned"):
        pairs = list(zip(by_engine["transformers"][name], by_engine["vllm"][name], strict=True))
        differing = [(a["id"], a["text"], b["text"]) for a, b in pairs if a["text"] != b["text"]]
        # both compute in float32, in another order of sums: only a near tie may differ
        assert len(differing) <= 1, differing
        assert [a["prompt_tokens"] for a, _ in pairs] == [b["prompt_tokens"] for _, b in pairs]


def test_sigterm_in_training_saves_and_the_same_command_resumes(job: Job, small_models: Path, tmp_path: Path) -> None:
    lorry, options = job
    quick = Lorry(lorry.data, small_models, tmp_path)
    # also without validation documents: training must work without them
    overrides = ("data.validation_fraction=0", *RANDOM_LLAMA, "train.epochs=10")
    slow = (*options, *(word for override in overrides for word in ("--set", override)))
    assert quick("entrypoints.preprocess", *slow).code == 0
    process = quick.start("entrypoints.train", *slow)
    assert process.stdout is not None
    events = tmp_path / "job" / "train" / "events.jsonl"
    for _ in process.stdout:
        if events.is_file() and '"loss"' in events.read_text():
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 75, rest
    assert "run the same command again" in rest
    checkpoints = tmp_path / "job" / "train" / "checkpoints" / "tuned"
    saved = max(int(path.parent.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*/complete.json"))
    finished = quick("entrypoints.train", *slow)
    assert finished.code == 0, finished.output
    assert f"resuming from checkpoint-{saved}" in finished.output
