"""The transformers engine on a random Llama: padding, order, adapters and ends."""

from pathlib import Path
from typing import Any

import pytest

from stages.engines.engine import EngineSettings
from stages.models.rendering import Prompt, Renderer

TEXTS = [
    "What is part 12?",
    "部件3在哪里？",
    "A much longer question about a lever, a spring and a valve: which of them is blue?",
    "?",
]


@pytest.fixture(scope="module")
def adapters(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with random weights, large enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = {}
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(small_models / "random-llama")
        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return folders


def engine(model: Path, adapters: dict[str, Path], batch_size: int) -> Any:
    from stages.engines.transformers_engine import TransformersEngine

    return TransformersEngine(EngineSettings(model, adapters, "float32", 12, batch_size, 256, 0))


def prompts(model: Path) -> list[Prompt]:
    renderer = Renderer(model)
    return [renderer.render(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(TEXTS)]


def test_a_padded_batch_answers_as_single_prompts_do(small_models: Path, adapters: dict[str, Path]) -> None:
    model = small_models / "random-llama"
    together, alone = engine(model, adapters, 4), engine(model, adapters, 1)
    for adapter in (None, "one", "two"):
        batch = together.generate(prompts(model), adapter)
        assert batch == [alone.generate([prompt], adapter)[0] for prompt in prompts(model)]


def test_adapters_answer_each_in_its_own_way_and_leave_the_base_alone(
    small_models: Path, adapters: dict[str, Path]
) -> None:
    model = small_models / "random-llama"
    both, bare = engine(model, adapters, 4), engine(model, {}, 4)
    base = bare.generate(prompts(model), None)
    answers = [both.generate(prompts(model), adapter) for adapter in ("one", "two", None, "one")]
    assert answers[0] == answers[3] != answers[1]
    assert answers[2] == base
    only_two = engine(model, {"two": adapters["two"]}, 4)
    assert only_two.generate(prompts(model), "two") == answers[1]


def test_an_answer_ends_at_the_end_token_or_at_the_limit(small_models: Path) -> None:
    made = engine(small_models / "random-llama", {}, 4)
    end = made._end_tokens[0]
    word = made._tokenizer.encode("word")[0]
    stopped = made._completion([word, end, word])
    assert (stopped.text, stopped.tokens, stopped.finish_reason) == ("word", 1, "stop")
    cut = made._completion([word, word])
    assert (cut.tokens, cut.finish_reason) == (2, "length")
    half = made._tokenizer.encode("页")[:-1]
    assert made._completion([word, *half]).text == "word", "half a character is left out"
