"""A vision-language model is trained on samples with pictures; its tower stays frozen and without an adapter."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from PIL import Image
from safetensors.numpy import load_file

from stages.contract.files import read_jsonl
from tests.small_inputs import ROOT
from tests.train.conftest import Training

IMAGE_TOKEN = 49152
"""The first number that SmolLM2's tokenizer leaves free."""


def make_llava(folder: Path) -> None:
    """A random LLaVA of two layers with SmolLM2's tokenizer."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    source = ROOT / "models" / "SmolLM2-135M-Instruct"
    text = LlamaConfig.from_pretrained(
        source,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=IMAGE_TOKEN + 8,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    LlavaForConditionalGeneration(config).save_pretrained(folder)

    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": IMAGE_TOKEN, "content": "<image>", **plain})
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"extra_special_tokens": {"image_token": "<image>"}, "tokenizer_class": "PreTrainedTokenizerFast"}
    pictures = {
        **{"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "resample": 3},
        **{"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "rescale_factor": 1 / 255},
        **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    }
    processor = {"processor_class": "LlavaProcessor", "patch_size": 14, "image_token": "<image>"}
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    for name, value in {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "preprocessor_config.json": pictures,
        "processor_config.json": processor,
    }.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    shutil.copy(source / "chat_template.jinja", folder)


def with_pictures(training: Training, folder: Path, samples: int, *overrides: str) -> tuple[Training, Path]:
    """A LLaVA's training whose samples share one picture, and the picture."""
    models = folder / "models"
    models.mkdir()
    (models / "all-MiniLM-L6-v2").symlink_to(training.lorry.models / "all-MiniLM-L6-v2")
    make_llava(models / "llava")
    kind = ("model.path=llava", "model.swift_type=llava1_5_hf", "model.swift_template=llava1_5_hf", "train.epochs=1")
    seeing = Training(replace(training.lorry, models=models), (*training.overrides, *kind, *overrides))
    seeing = seeing.with_samples(samples, images=("preprocess/pages/one.png",))
    page = seeing.run.path("preprocess", "pages", "one.png")
    page.parent.mkdir(parents=True)
    Image.new("RGB", (300, 200), "red").save(page)
    return seeing, page


def test_a_vision_language_model_is_trained_on_pictures(training: Training, tmp_path: Path) -> None:
    seeing, page = with_pictures(training, tmp_path, 8)
    code, output = seeing()
    assert code == 0, output + seeing.run.path("train", "log.txt").read_text()[-3000:]
    assert [row["step"] for row in read_jsonl(seeing.run.path("train", "metrics.jsonl")) if "loss" in row] == [1, 2]
    weights = load_file(seeing.run.path("train", "adapters", "tuned", "adapter_model.safetensors"))
    assert weights and all(".language_model." in name for name in weights)

    page.unlink()
    code, output = seeing("--force")
    assert code == 3, output
    assert "one.png: no picture, and sample train0 needs it" in output.splitlines()[-1]


def test_lora_on_the_vision_tower_is_refused(training: Training, tmp_path: Path) -> None:
    """Plain names match the tower's modules, too."""
    seeing, _ = with_pictures(training, tmp_path, 4, "train.target_modules=[q_proj]")
    code, output = seeing()
    assert code == 2, output
    assert "puts LoRA on the vision tower, too" in output.splitlines()[-1]
