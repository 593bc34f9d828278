"""A LLaVA's prompts: as its own processor makes them, with the chat template of its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.engines.engine import EngineSettings
from stages.models.connector import INDEX, link_connector
from stages.models.pictures import SquareRules, family_rules
from stages.models.rendering import Prompt, Renderer
from tests.conftest import need_model

PUBLISHED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Renders what the templates of published LLaVA-1.5s do: pictures first, each on a line, no token before the text, and
nothing of a content that is no list."""


@pytest.fixture(scope="module")
def model() -> Path:
    return need_model("tiny-llava")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(((200, 80), (60, 300), (20, 20))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def with_published_template(model: Path, folder: Path) -> Path:
    """The model with that template, and a tokenizer that puts a first token before every text, as Llama's does."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(PUBLISHED)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    tokenizer["post_processor"] = {
        **{"type": "TemplateProcessing", "single": [first, text], "pair": [first, text]},
        "special_tokens": {"<|im_start|>": special},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def user(content: str) -> Any:
    return [{"role": "user", "content": content}]


def test_all_pictures_have_the_same_number_of_tokens(model: Path, pictures: list[Path]) -> None:
    assert family_rules(model) == SquareRules(14, 16)
    renderer = Renderer(model)
    for number in (0, 1, 2):
        prompt = renderer.render("x", user("<image>\n" * number + "What?"), pictures[:number], max_pixels=5000)
        assert prompt.length == len(prompt.tokens) + 15 * number


def test_tokens_and_pixels_are_those_of_the_model_s_own_processor(model: Path, pictures: list[Path]) -> None:
    import torch
    from transformers import AutoProcessor

    from stages.engines.transformers_engine import TransformersEngine

    prompts = [
        Renderer(model).render(str(number), user("<image>\nWhat is it? 部件？"), [picture])
        for number, picture in enumerate(pictures)
    ]
    engine = TransformersEngine(EngineSettings(model, {}, "float32", 4, 3, 256, 0))
    processor = AutoProcessor.from_pretrained(model)
    text = "<|im_start|>user\n<image>\nWhat is it? 部件？<|im_end|>\n<|im_start|>assistant\n"
    own = processor(
        text=[text] * 3, images=[Image.open(picture).convert("RGB") for picture in pictures], return_tensors="pt"
    )
    assert [engine._input_tokens(prompt) for prompt in prompts] == own["input_ids"].tolist()
    assert torch.equal(engine._picture_inputs(prompts)["pixel_values"], own["pixel_values"])
    text_only = Prompt("text", prompts[0].tokens[:3])
    together = engine.generate([*prompts, text_only], None)
    assert together == [engine.generate([prompt], None)[0] for prompt in (*prompts, text_only)]


def test_published_templates_are_rendered_as_their_processor_does(
    model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    renderer = Renderer(with_published_template(model, tmp_path / "published"))

    def said(content: str, number: int) -> str:
        return str(renderer.tokenizer.decode(renderer.render("x", user(content), pictures[:number]).tokens))

    begins = "<|im_start|>USER: "  # the first token, which that template leaves to the processor
    assert said("<image>\nWhat?", 1) == f"{begins}<image>\nWhat? ASSISTANT:", "one line's end, not two"
    assert said("What?", 0) == f"{begins}What? ASSISTANT:", "a text alone is not lost"
    assert said("<image>\n<image>\nWhich?", 2) == f"{begins}<image>\n<image>\nWhich? ASSISTANT:"


def test_vllm_s_loader_ends_with_the_connector_s_weights(model: Path, tmp_path: Path) -> None:
    """Of two tensors of one name its models take the later. (The model itself needs torchvision in vLLM.)"""
    pytest.importorskip("vllm")
    import numpy as np
    from safetensors.numpy import load_file, save_file
    from vllm.model_executor.model_loader import weight_utils

    from stages.contract.files import sha256_file

    base = load_file(model / "model.safetensors")
    own = {name: np.ones_like(weight) for name, weight in base.items() if name.startswith("multi_modal_projector")}
    save_file(own, tmp_path / "connector.safetensors")
    digest = sha256_file(tmp_path / "connector.safetensors")
    folder = link_connector(model, tmp_path / "connector.safetensors", digest, tmp_path / "both")
    files = sorted(map(str, folder.glob("*.safetensors")), reverse=True)  # a folder has no order
    used = weight_utils.filter_duplicate_safetensors_files(files, str(folder), INDEX)
    assert set(used) == set(files)
    found = dict(weight_utils.safetensors_weights_iterator(used, use_tqdm_on_load=False))
    assert set(found) == set(base)
    for name, weight in found.items():
        assert np.array_equal(weight.numpy(), own.get(name, base[name])), name
