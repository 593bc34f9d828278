"""Qwen2.5-VL's own architecture, tiny, trained on pictures: the pixel budget, what is compared, what is adapted."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from stages.contract.errors import UsageError
from stages.contract.files import read_json, read_jsonl, write_jsonl
from stages.contract.recipe import Adapter, Train
from stages.hardware.memory import adapter_parameters
from stages.models.merge import merged_copy, refuse_adapted_vision
from stages.models.pictures import read_rules
from stages.models.shape import read_shape
from stages.train.lengths import lengths_of
from tests.conftest import REPOSITORY, Lorry, need_model
from tests.train.conftest import Training

BUDGET = 50176
"""64 tokens."""

LEAST = 3136
"""Four tokens, to which the family's models enlarge what is smaller."""

SHAPES = [
    *((1240, 1754), (1754, 1240), (350, 300), (224, 224), (225, 224), (20, 30), (56, 56), (2000, 60), (2400, 150)),
    (860, 744),  # ms-swift shrinks it to 240.8 x 208.3, and rounds 8.6 and 7.4 tiles to 9 x 7; here nearly so
    (952, 673),  # 9.5 x 6.7 tiles at the budget: rounded to the nearest they are 10 x 7, above it
]


@pytest.fixture(scope="module")
def model() -> Path:
    return need_model("tiny-qwen2.5-vl")


def sample(name: str, pictures: tuple[str, ...] = (), question: str = "What is shown? 图中是什么？") -> dict[str, Any]:
    content = "".join(f"Page {number}:\n<image>\n" for number, _ in enumerate(pictures, 1)) + question
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"A gear, {name}."}]
    return {"id": name, "messages": messages, "images": list(pictures)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a picture of each shape."""
    run = tmp_path_factory.mktemp("run")
    for number, shape in enumerate(SHAPES):
        Image.new("RGB", shape, "white").save(run / f"{number}.jpg")
    return run


ALONE = [sample(f"alone{number}", (f"{number}.jpg",)) for number in range(len(SHAPES))]
SAMPLES = [
    *ALONE,
    sample("text"),
    sample("both", ("0.jpg", "5.jpg"), "Which of them shows part 12 of the valve? " * 4),
    sample("long", ("0.jpg",) * 20),
]


@pytest.fixture(scope="module")
def encoded(model: Path, pages: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of the samples: at the budget, at the least budget that there is, and with a model of another template."""
    write_jsonl(pages / "samples.jsonl", SAMPLES)
    other = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(model, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|vision_start|>", "Picture: <|vision_start|>"))
    asks = [
        {"model": str(folder), "run": str(pages), "samples": str(pages / "samples.jsonl"), "overrides": overrides}
        for folder, overrides in (
            (model, [f"train.max_pixels={BUDGET}"]),
            (model, [f"train.max_pixels={LEAST}"]),
            (other, [f"train.max_pixels={BUDGET}"]),
        )
    ]
    command = [sys.executable, "-m", "tests.train.encoding", json.dumps(asks)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("ask", "budget"), [(0, BUDGET), (1, LEAST)])
def test_a_picture_becomes_as_many_tokens_as_the_budget_allows_and_keeps_its_shape(
    model: Path, encoded: list[dict[str, Any]], ask: int, budget: int
) -> None:
    rules = read_rules(model)
    for (width, height), row in zip(SHAPES, encoded[ask]["rows"][: len(ALONE)], strict=True):
        ((_, rows, columns),) = row["grids"]
        size = columns * 14, rows * 14
        assert size == rules.size(width, height, budget), "as inference reads it"
        assert size[0] % 28 == size[1] % 28 == 0
        if min(size) > 28 and width * height >= LEAST:  # a strip cannot be narrower than a token
            assert size[0] * size[1] <= budget
            # a side is off by less than a token
            grown = math.sqrt(size[0] * size[1] / width / height)
            assert abs(size[0] - width * grown) < 28 and abs(size[1] - height * grown) < 28


def test_tokens_are_counted_before_training_from_the_pictures_sizes(
    model: Path, pages: Path, encoded: list[dict[str, Any]]
) -> None:
    settings = Train(adapters=[Adapter(name="tuned")], max_length=1024, max_pixels=BUDGET)
    kept = [one for one in SAMPLES if one["id"] != "long"]
    for one, row in zip(kept, encoded[0]["rows"], strict=True):
        counted = lengths_of([one], model, settings, pages)
        assert 0 <= counted.longest - row["length"] <= 40, one["id"]
        assert counted.shortest_prompt is not None
        assert counted.shortest_prompt + counted.answer <= row["length"]
    both = lengths_of(kept, model, settings, pages)
    assert both.longest == lengths_of([kept[-1]], model, settings, pages).longest
    assert lengths_of(SAMPLES, model, settings, pages).longest == 1024
    assert encoded[0]["left_out"] == ["long"]


def test_pictures_are_read_when_their_sample_s_turn_comes(encoded: list[dict[str, Any]]) -> None:
    assert encoded[0]["read before"] == 0
    for row in encoded[0]["rows"]:
        assert row["read"] == len(row["images"])
        assert all(isinstance(image, str) for image in row["images"]), "a row holds names, not pictures"


def test_a_template_that_shows_pictures_otherwise_is_refused(encoded: list[dict[str, Any]]) -> None:
    assert "rows" in encoded[0], "the model's own is taken"
    assert "renders the prompt otherwise than the chat template" in encoded[2]["error"]
    assert "Picture: <|vision_start|>" in encoded[2]["error"]
    assert "\n" not in encoded[2]["error"].replace("\\n", "")


# -- real training -----------------------------------------------------------------------------------------------


def seeing(lorry: Lorry, samples: int, *overrides: str) -> Training:
    """A training of the tiny model whose samples share one picture of eight times the budget."""
    fixed = ("train.effective_batch=2", "train.max_pixels=12544", "train.rank=4")
    training = Training(lorry, (*fixed, *overrides), "tiny-vlm")
    training.with_samples(samples, images=("preprocess/pages/one.png",))
    page = training.run.path("preprocess", "pages", "one.png")
    page.parent.mkdir(parents=True)
    Image.effect_noise((380, 260), 80).save(page)
    return training


def weights_of(training: Training) -> dict[str, Any]:
    found: dict[str, Any] = load_file(training.run.path("train", "adapters", "tuned", "adapter_model.safetensors"))
    return found


def test_it_is_trained_with_a_frozen_tower_and_goes_on_after_a_kill(lorry: Lorry, model: Path) -> None:
    training = seeing(replace(lorry, models=model.parent), 12, "train.checkpoint_every=2")
    code, output = training(HUNGER=json.dumps({"during": "saving", "from_step": 4}))
    assert (code, "was ended by SIGKILL" in output) == (1, True), output
    code, output = training()
    assert code == 0, output + training.run.path("train", "log.txt").read_text()[-3000:]
    assert "resuming from checkpoint-2" in output
    losses = [row["loss"] for row in read_jsonl(training.run.path("train", "metrics.jsonl")) if "loss" in row]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    weights = weights_of(training)
    assert weights and all(".language_model." in name for name in weights)
    facts = read_json(training.run.path("train", "adapters", "tuned", "training.json"))
    picture = read_rules(model).tokens(*read_rules(model).size(380, 260, 12544))
    assert 12 * picture < facts["tokens"] < 12 * (picture + 60), "padding not counted, no picture above its budget"
    shape = read_shape(model)
    assert sum(tensor.size for tensor in weights.values()) == adapter_parameters(shape, training.run.recipe.train)
    refuse_adapted_vision({"tuned": training.run.path("train", "adapters", "tuned")}, "vllm", ["transformers"])


def test_an_adapted_tower_is_served_merged_only(lorry: Lorry, model: Path, tmp_path: Path) -> None:
    asked = ("train.freeze_vision=false", "train.gradient_checkpointing=true")
    training = seeing(replace(lorry, models=model.parent), 4, *asked)
    code, output = training()
    assert code == 0, output + training.run.path("train", "log.txt").read_text()[-3000:]
    weights = weights_of(training)
    tower = {name: tensor for name, tensor in weights.items() if ".visual." in name}
    assert tower and len(tower) < len(weights)
    assert all(tensor.any() for tensor in tower.values()), "each has learnt something"
    assert not any("merger" in name or "patch_embed" in name for name in tower)
    parameters = sum(tensor.size for tensor in weights.values())
    assert parameters == adapter_parameters(read_shape(model), training.run.recipe.train)

    folder = training.run.path("train", "adapters", "tuned")
    with pytest.raises(UsageError, match=r"adapter tuned adapts the vision tower .*vllm would.* infer\.merged"):
        refuse_adapted_vision({"tuned": folder}, "vllm", ["transformers"])
    merged = load_file(merged_copy(model, folder, tmp_path / "merged", "float32") / "model.safetensors")
    base = load_file(model / "model.safetensors")
    assert any((merged[name] != base[name]).any() for name in merged if "visual." in name)


def test_a_torn_picture_ends_training_in_a_line_and_no_other_sample_takes_its_place(lorry: Lorry, model: Path) -> None:
    training = seeing(replace(lorry, models=model.parent), 4)
    page = training.run.path("preprocess", "pages", "one.png")
    page.write_bytes(page.read_bytes()[: page.stat().st_size // 2])
    code, output = training()
    assert code == 3, output
    assert "one.png: no picture" in output.splitlines()[-1]
