"""How reasoning gets into a completion's text: special tokens, and the mark that a prompt writes."""

from typing import Any

import pytest

from stages.models.reasoning import marked_text, opened_reasoning
from stages.tasks.common.reasoning import without_reasoning
from tests.conftest import need_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """SmolLM2's, with Magistral's and Qwen3's marks."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(need_model("SmolLM2-135M-Instruct"))
    found.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    found.add_tokens(["<think>", "</think>"])
    return found


def test_special_tokens_that_mark_reasoning_stay_in_the_text(tokenizer: Any) -> None:
    tokens = tokenizer.encode("[THINK]France[/THINK]Paris<|im_end|>")
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "FranceParis"
    text = marked_text(tokenizer, tokens)
    assert text == "[THINK]France[/THINK]Paris"
    assert without_reasoning(text) == "Paris"
    assert marked_text(tokenizer, tokenizer.encode("<think>France</think>Paris<|im_end|>")) is None


def test_a_prompt_that_opens_reasoning_says_so(tokenizer: Any) -> None:
    for end, opened in (
        ("<think>\n", "<think>\n"),
        ("[THINK]", "[THINK]\n"),
        ("<think>\n\n</think>\n\n", ""),
        ("", ""),
    ):
        assert opened_reasoning(tokenizer, tokenizer.encode(f"<|im_start|>assistant\n{end}")) == opened
