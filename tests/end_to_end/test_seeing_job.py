"""The whole job of profile tiny-vlm: pages as pictures, the architectures of GME and Qwen2.5-VL, all three passes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.contract.files import read_json, read_jsonl
from tests.conftest import MODELS, Lorry, need_model

pytestmark = pytest.mark.long

Job = tuple[Lorry, tuple[str, ...]]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, demo_subset: Path) -> Iterator[Job]:
    """`lorry run` of four of the demo's documents, with the style examples ablated and figures cropped."""
    for name in ("tiny-gme", "tiny-qwen2.5-vl"):
        need_model(name)
    lorry = Lorry(demo_subset.parent, MODELS, tmp_path_factory.mktemp("runs"))
    settings = ("preprocess.samples.crop_figure=true", "infer.ablate=[style]", "preprocess.classifier=rule")
    options = ("patent-qa", "--profile", "tiny-vlm", "--run", "job", "--set", f"data.path={demo_subset.name}")
    options = (*options, *(word for setting in settings for word in ("--set", setting)))
    finished = lorry("entrypoints.lorry", "run", *options)
    assert finished.code == 0, finished.output
    yield lorry, options


def path(job: Job, *parts: str) -> Path:
    return job[0].runs.joinpath("job", *parts)


def test_pages_are_embedded_as_pictures(seeing: Job) -> None:
    vectors = np.load(path(seeing, "preprocess", "vectors.npy"))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(vectors)), abs=1e-3)
    manifest = read_json(path(seeing, "preprocess", "manifest.json"))
    assert (
        manifest["outputs"]["vectors.npy"]["records"] == len(vectors) == manifest["outputs"]["pages.parquet"]["records"]
    )


def test_training_samples_have_their_pictures_and_drawings_that_suffice_are_learnt_alone_too(seeing: Job) -> None:
    train = read_jsonl(path(seeing, "preprocess", "samples", "train.jsonl"))
    alone = [sample for sample in train if sample["id"].endswith("#alone")]
    assert alone, "the rule finds the drawing enough for some question"
    for sample in train:
        content = "".join(message["content"] for message in sample["messages"])
        assert content.count("<image>") == len(sample["images"])
        assert all(path(seeing, image).is_file() for image in sample["images"])
        assert sample["messages"][-1]["role"] == "assistant"
    assert all(len(sample["images"]) == 1 for sample in alone)
    twins = {sample["id"].removesuffix("#alone") for sample in alone}
    assert twins < {sample["id"] for sample in train}, "both rows of such a question are learnt"


def test_the_adapter_adapts_only_the_language_model(seeing: Job) -> None:
    from safetensors.numpy import load_file

    weights = load_file(path(seeing, "train", "adapters", "tuned", "adapter_model.safetensors"))
    assert weights and all(".language_model." in name for name in weights)
    losses = [row["loss"] for row in read_jsonl(path(seeing, "train", "metrics.jsonl")) if "loss" in row]
    assert losses and np.isfinite(losses).all()


def test_every_question_is_answered_in_passes(seeing: Job) -> None:
    samples = {sample["id"]: sample for sample in read_jsonl(path(seeing, "preprocess", "samples", "test.jsonl"))}
    for name in ("base", "tuned"):
        predictions = read_jsonl(path(seeing, "infer", "predictions", f"{name}.jsonl"))
        assert [prediction["id"] for prediction in predictions] == list(samples)
        assert all(p["error"] is None and list(p["passes"]) == ["answer"] for p in predictions)
        assert all(p["prompt_tokens"] > 20 for p in predictions)
    answering = read_json(path(seeing, "infer", "manifest.json"))["answering"]
    assert set(answering) == {"base", "tuned", "without style"}
    assert all(took["samples"] == len(samples) and took["seconds"] > 0 for took in answering.values())


def test_the_submission_has_the_originals_keys_and_a_line_for_each_question(seeing: Job) -> None:
    asked = read_jsonl(path(seeing, "preprocess", "asked.jsonl"))
    lines = read_jsonl(path(seeing, "infer", "submission", "tuned.jsonl"))
    keys = ["idx", "document", "question", "question_type", "answer", "style_answer"]
    assert [list(line) for line in lines] == [keys] * len(asked)
    assert [line["idx"] for line in lines] == [row["idx"] for row in asked]
    assert all(isinstance(line["idx"], str) for line in lines)


def test_retrieval_and_positions_have_scores_of_their_own(seeing: Job) -> None:
    scores = json.loads(path(seeing, "eval", "scores.json").read_text())
    wanted = {"exact_match", "character_f1", "position_exact_match", "retrieval_recall", "recall@1", "recall@2"}
    assert wanted <= set(scores["tuned"])


def test_merged_weights_answer_as_base_and_adapter_do(seeing: Job) -> None:
    """In float32 only the last digits differ, so only a near tie may give another answer."""
    lorry, options = seeing
    before = {name: read_jsonl(path(seeing, "infer", "predictions", f"{name}.jsonl")) for name in ("base", "tuned")}
    finished = lorry("entrypoints.infer", *options, "--set", "infer.merged=true")
    assert finished.code == 0, finished.output
    assert not path(seeing, "infer", "merged").exists()
    for name, old in before.items():
        new: list[dict[str, Any]] = read_jsonl(path(seeing, "infer", "predictions", f"{name}.jsonl"))
        differing = [a["id"] for a, b in zip(old, new, strict=True) if a["text"] != b["text"]]
        assert len(differing) <= 1, differing
