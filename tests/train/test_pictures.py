"""A vision-language model is trained on samples with pictures; its tower stays frozen and without an adapter."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file

from stages.contract.files import read_jsonl
from tests.conftest import need_model
from tests.train.conftest import Training


def with_pictures(training: Training, folder: Path, samples: int, *overrides: str) -> tuple[Training, Path]:
    """A LLaVA's training whose samples share one picture, and the picture."""
    models = folder / "models"
    models.mkdir()
    (models / "all-MiniLM-L6-v2").symlink_to(training.lorry.models / "all-MiniLM-L6-v2")
    (models / "tiny-llava").symlink_to(need_model("tiny-llava"))
    kind = ("model.path=tiny-llava", "train.epochs=1")
    seeing = Training(replace(training.lorry, models=models), (*training.overrides, *kind, *overrides))
    seeing = seeing.with_samples(samples, images=("preprocess/pages/one.png",))
    page = seeing.run.path("preprocess", "pages", "one.png")
    page.parent.mkdir(parents=True)
    Image.new("RGB", (300, 200), "red").save(page)
    return seeing, page


@pytest.mark.kill
def test_a_vision_language_model_is_trained_on_pictures(training: Training, tmp_path: Path) -> None:
    """test_connector.py does so with a connector, test_qwen_vl.py with another family."""
    seeing, _ = with_pictures(training, tmp_path, 8)
    code, output = seeing()
    assert code == 0, output + seeing.run.path("train", "log.txt").read_text()[-3000:]
    assert [row["step"] for row in read_jsonl(seeing.run.path("train", "metrics.jsonl")) if "loss" in row] == [1, 2]
    weights = load_file(seeing.run.path("train", "adapters", "tuned", "adapter_model.safetensors"))
    assert weights and all(".language_model." in name for name in weights)


def test_a_missing_picture_is_reported_before_any_training(training: Training, tmp_path: Path) -> None:
    seeing, page = with_pictures(training, tmp_path, 8)
    page.unlink()
    code, output = seeing()
    assert code == 3, output
    assert "one.png: not a readable picture" in output.splitlines()[-1]
    assert not seeing.run.path("train", "checkpoints", "tuned", "job.json").exists(), "no process was started"


def test_lora_on_the_vision_tower_is_refused(training: Training, tmp_path: Path) -> None:
    """Plain names match the tower's modules, too."""
    seeing, _ = with_pictures(training, tmp_path, 4, "train.target_modules=[q_proj]")
    code, output = seeing()
    assert code == 2, output
    assert "train.target_modules: also matches base_model.model." in output.splitlines()[-1]
