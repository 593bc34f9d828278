"""GME on a random model of its architecture, against a reference that embeds one item at a time, as published."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file

from stages.contract.errors import DataError, UsageError
from stages.preprocess.gme import Gme
from tests.conftest import need_model

WEIGHTS = "model.safetensors"
MAX_PIXELS = 28 * 28 * 40


@pytest.fixture(scope="module")
def folder() -> Path:
    return need_model("tiny-gme")


@pytest.fixture(scope="module")
def gme(folder: Path) -> Gme:
    return Gme(folder, "cpu", "float32", MAX_PIXELS)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of several shapes, larger and smaller than the budget."""
    folder = tmp_path_factory.mktemp("pages")
    for number, size in enumerate(((400, 560), (560, 400), (90, 300), (120, 120))):
        picture = Image.new("RGB", size, "white")
        ImageDraw.Draw(picture).rectangle((5, 5, 40 + 10 * number, 60), fill=("red", "green", "blue", "black")[number])
        picture.save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def reference(folder: Path, content: str, picture: Path | None) -> Any:
    """One text or picture: transformers' processor of pictures, the whole sequence, its last token's state."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

    network = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = None
    if picture is not None:
        size = {"shortest_edge": min(256 * 28 * 28, MAX_PIXELS), "longest_edge": MAX_PIXELS}
        processed = AutoImageProcessor.from_pretrained(folder)(
            images=[Image.open(picture).convert("RGB")], size=size, return_tensors="pt"
        )
        count = int(processed["image_grid_thw"].prod()) // 4
        content = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        with torch.inference_mode():
            seen = network.model.visual(processed["pixel_values"], grid_thw=processed["image_grid_thw"]).pooler_output
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        embedded = network.get_input_embeddings()(tokens)
        if seen is not None:
            embedded[tokens == network.config.image_token_id] = seen
        states = network.model.language_model(inputs_embeds=embedded).last_hidden_state
    return torch.nn.functional.normalize(states[0, -1], dim=0).numpy()


def test_texts_are_embedded_as_published_in_any_batch(gme: Gme, folder: Path) -> None:
    texts = [
        "What is part 12?",
        "在第6页的图中，部件3在哪里？",
        "a",
        "A longer question about a lever and a spring. " * 3,
    ]
    found = gme.embed_texts(texts)
    assert found.shape == (4, 64) and found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    for text, vector in zip(texts, found, strict=True):
        assert vector == pytest.approx(reference(folder, text, None), abs=1e-5)


def test_pictures_are_embedded_as_published_in_any_batch(gme: Gme, folder: Path, pages: list[Path]) -> None:
    one, two = gme.embed_pictures([pages[:3], pages[3:]])
    assert (one.shape, two.shape) == ((3, 64), (1, 64))
    for page, vector in zip(pages, [*one, *two], strict=True):
        assert vector == pytest.approx(reference(folder, "", page), abs=1e-5)
    assert len({tuple(np.round(vector, 6)) for vector in [*one, *two]}) == 4


def test_patches_are_those_of_transformers_own_processor(gme: Gme, folder: Path, pages: list[Path]) -> None:
    from transformers import AutoImageProcessor

    picture, pixels = gme._read_pixels(pages[0])
    assert picture.width * picture.height <= MAX_PIXELS
    patches, grid = gme._patches.cut_picture(pixels)
    own = AutoImageProcessor.from_pretrained(folder)(images=[pixels], do_resize=False, return_tensors="pt")
    assert [grid] == own["image_grid_thw"].tolist()
    assert patches.numpy() == pytest.approx(own["pixel_values"].numpy(), abs=1e-5)


def test_a_long_text_is_cut_and_the_end_is_kept(gme: Gme) -> None:
    long = gme.embed_texts(["word " * 3000])
    assert np.allclose(long, gme.embed_texts(["word " * 4000])), "words beyond GME's length change nothing"


def test_missing_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would initialise them at random, with a warning."""
    broken = tmp_path / "half-gme"
    shutil.copytree(folder, broken)
    weights = load_file(broken / WEIGHTS)
    save_file({name: value for name, value in weights.items() if "visual.merger" not in name}, broken / WEIGHTS)
    with pytest.raises(
        UsageError, match=r"half-gme: 6 of the network\'s parameters are missing, such as .*visual\.merger"
    ):
        Gme(broken, "cpu", "float32", MAX_PIXELS)


def test_a_page_without_its_picture_is_named_in_one_line(gme: Gme, pages: list[Path]) -> None:
    with pytest.raises(DataError, match=r"gone.png: not a readable picture .*; run preprocess again"):
        list(gme.embed_pictures([[pages[0], pages[0].with_name("gone.png")]]))
