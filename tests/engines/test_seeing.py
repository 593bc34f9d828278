"""Prompts with pictures, on a random model of Qwen2.5-VL's own architecture."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from stages.contract.errors import DataError
from stages.engines.engine import EngineSettings
from stages.models.rendering import Prompt, Renderer
from tests.conftest import need_model


@pytest.fixture(scope="module")
def model() -> Path:
    return need_model("tiny-qwen2.5-vl")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures of different shapes."""
    folder = tmp_path_factory.mktemp("pages")
    for number, size in enumerate(((200, 280), (280, 200), (90, 400))):
        picture = Image.new("RGB", size, "white")
        ImageDraw.Draw(picture).ellipse((10, 10, 60 + 20 * number, 60), fill=("red", "green", "blue")[number])
        picture.save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


def engine(model: Path, batch_size: int) -> Any:
    from stages.engines.transformers_engine import TransformersEngine

    return TransformersEngine(EngineSettings(model, {}, "float32", 8, batch_size, 1024, 0))


def prompts(model: Path, pages: list[Path]) -> list[Prompt]:
    """Of none to three pictures, some of which may write less."""
    renderer = Renderer(model)
    contents = [
        "What is this?",
        "<image>What is it?",
        "One: <image> two: <image>\nCompare.",
        "<image><image><image>部件？",
    ]
    return [
        renderer.render(
            str(number),
            [{"role": "user", "content": content}],
            pages[:number],
            max_pixels=28 * 28 * 40,
            max_new_tokens=4 if number == 1 else None,
        )
        for number, content in enumerate(contents)
    ]


def test_lengths_count_the_pictures(model: Path, pages: list[Path]) -> None:
    text, one, two, three = prompts(model, pages)
    assert text.length == len(text.tokens)
    for prompt, count in ((one, 1), (two, 2), (three, 3)):
        assert len(prompt.pictures) == count
        assert prompt.length == len(prompt.tokens) - count + sum(p.width * p.height // 784 for p in prompt.pictures)
        assert all(p.width * p.height <= 28 * 28 * 40 for p in prompt.pictures)


def test_a_batch_answers_as_single_prompts_do(model: Path, pages: list[Path]) -> None:
    asked = prompts(model, pages)
    together, alone = engine(model, 4), engine(model, 1)
    reported: dict[int, Any] = {}
    batch = together.generate(asked, None, reported.__setitem__)
    assert batch == [alone.generate([prompt], None)[0] for prompt in asked]
    assert [reported[place] for place in range(4)] == batch, "each is reported"
    assert batch[1].tokens <= 4


def test_a_picture_changes_the_answer_as_the_model_itself_would(model: Path, pages: list[Path]) -> None:
    """The reference is written out step by step, with transformers' own processor of pictures."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    prompt = prompts(model, pages)[2]
    tokenizer = AutoTokenizer.from_pretrained(model)
    pictures = AutoImageProcessor.from_pretrained(model)(
        images=[Image.open(page).convert("RGB") for page in pages[:2]],
        size={"shortest_edge": 3136, "longest_edge": 28 * 28 * 40},
        return_tensors="pt",
    )
    counts = [int(grid.prod()) // 4 for grid in pictures["image_grid_thw"]]
    text = tokenizer.decode(prompt.tokens)
    for count in counts:
        text = text.replace("<|image_pad|>", "<|filled|>" * count, 1)
    tokens = tokenizer(text.replace("<|filled|>", "<|image_pad|>"), return_tensors="pt")["input_ids"]
    assert tokens.shape[1] == prompt.length
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    kinds = (tokens == network.config.image_token_id).int()
    with torch.inference_mode():
        output = network.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=kinds,
            max_new_tokens=8,
            do_sample=False,
            **pictures,
        )
    expected = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
    assert engine(model, 2).generate([prompt], None)[0].text == expected


def test_another_number_of_places_than_of_pictures_fails_the_prompt(model: Path, pages: list[Path]) -> None:
    message: Any = [{"role": "user", "content": "<image> and <image>"}]
    with pytest.raises(DataError, match=r"the prompt has 2 picture tokens for 1 picture\(s\); write one <image>"):
        Renderer(model).render("x", message, pages[:1])


def test_a_picture_token_in_the_text_is_text(model: Path, pages: list[Path]) -> None:
    message: Any = [{"role": "user", "content": "<image> and <|image_pad|>"}]
    prompt = Renderer(model).render("x", message, pages[:1])
    assert prompt.tokens.count(Renderer(model).picture_token) == 1
    assert len(engine(model, 1).generate([prompt], None)) == 1
