"""The chat template for other servers renders, by transformers alone, what Lorry's renderer does."""

import json
import shutil
from pathlib import Path
from typing import Any

import jinja2.meta
import jinja2.sandbox
import pytest

from stages.contract.errors import UsageError
from stages.models.chat_settings import NAMED, ChatSettings
from stages.models.rendering import Renderer, load_tokenizer
from stages.models.served_template import refuse_other_prompts, served_template

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

TEMPLATES = {
    "plain": (CHATML + ASKS, ChatSettings()),
    "dated": (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y\") }}\n{% endif %}"
        + CHATML
        + ASKS,
        ChatSettings(date="2024-02-29"),
    ),
    "thinks not": (
        CHATML + ASKS + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
        ChatSettings(enable_thinking=False),
    ),
    "has no system role": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML + ASKS,
        ChatSettings(),
    ),
    "begins with a line break": ("\n" + CHATML + ASKS, ChatSettings()),
    "Lorry's own": ("unused", ChatSettings(template=NAMED["plain"], named=True)),
}


def sample(*turns: str) -> dict[str, Any]:
    roles = ["system", *["user", "assistant"] * len(turns)]
    return {
        "id": "s",
        "messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)],
        "images": [],
    }


SAMPLES = [
    sample("Be brief. 请简短。", "什么是阀？\n\n  def f():\n\tpass\n"),
    sample("Be brief.", "One", "Two", "Three"),
    {**sample("x", "y"), "messages": [{"role": "user", "content": "no system message <\u2060image>"}]},
    sample("", "an empty system message"),
]


@pytest.fixture
def folder(tmp_path: Path, language_model: Path) -> Path:
    """SmolLM2's tokenizer, which here adds a first token, without a chat template."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(language_model / name, tmp_path / name)
    return tmp_path


def renderer_of(folder: Path, name: str, tokenizer: Any = None) -> tuple[Renderer, ChatSettings]:
    """A renderer with one of the templates. `tokenizer` is that of the folder, loaded once for all tests."""
    source, settings = TEMPLATES[name]
    (folder / "chat_template.jinja").write_text(source)
    renderer = Renderer(folder, settings)
    if tokenizer is not None:
        renderer.tokenizer = tokenizer
    return renderer, settings


@pytest.fixture(scope="module")
def tokenizer(language_model: Path) -> Any:
    return load_tokenizer(language_model)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_the_renderer_does(name: str, folder: Path, tokenizer: Any) -> None:
    renderer, settings = renderer_of(folder, name, tokenizer)
    assert refuse_other_prompts(renderer, served_template(renderer, folder, settings), SAMPLES) == len(SAMPLES)


def test_writes_the_first_token_where_lorry_does(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    renderer, settings = renderer_of(folder, "Lorry's own")
    template = served_template(renderer, folder, settings)
    assert renderer.render("x", SAMPLES[0]["messages"]).tokens[0] == renderer.tokenizer.bos_token_id == 1
    assert refuse_other_prompts(renderer, template, SAMPLES) == len(SAMPLES)
    with pytest.raises(UsageError, match="sample s: training renders"):
        refuse_other_prompts(renderer, template.replace("{{ bos_token }}", ""), SAMPLES)


def test_a_changed_template_is_refused(folder: Path, tokenizer: Any) -> None:
    renderer, settings = renderer_of(folder, "plain", tokenizer)
    template = served_template(renderer, folder, settings).replace("m['content']", "m['content'] | trim")
    with pytest.raises(
        UsageError, match=r"training renders .* at token \d+, vLLM would render .*--engine transformers"
    ):
        refuse_other_prompts(renderer, template, SAMPLES)


def test_samples_with_control_words_or_pictures_are_not_compared(folder: Path, tokenizer: Any) -> None:
    renderer, settings = renderer_of(folder, "plain", tokenizer)
    samples = [sample("a", "<|im_end|> is text for Lorry alone"), {**SAMPLES[0], "images": ["a.png"]}, SAMPLES[1]]
    assert refuse_other_prompts(renderer, served_template(renderer, folder, settings), samples) == 1


def test_a_request_may_still_say_whether_to_think(folder: Path, tokenizer: Any) -> None:
    """vLLM hands on only what a template looks up."""
    renderer, settings = renderer_of(folder, "thinks not", tokenizer)
    template = served_template(renderer, folder, settings)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    assert "enable_thinking" in jinja2.meta.find_undeclared_variables(environment.parse(template))
    asked = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
    texts = [renderer.tokenizer.apply_chat_template(SAMPLES[0]["messages"], **asked, **more)
             for more in ({}, {"enable_thinking": True})]  # fmt: skip
    assert ["<think>" in text for text in texts] == [True, False]
