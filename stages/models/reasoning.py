"""How models mark their reasoning before an answer, and how those marks get into a completion's text."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

MARKS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, GLM-4.5, Phi-4-reasoning, MiniMax-M1, SmolLM3
    ("<thinking>", "</thinking>"),  # Reflection
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),  # LLaVA-CoT, many trained by GRPO
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
)
"""Pairs of marks around reasoning, with models that write them."""

ANSWER_MARKS = (
    ("<answer>", "</answer>"),  # Hunyuan, many trained by GRPO
    ("<response>", "</response>"),  # ERNIE, Granite
    ("<output>", "</output>"),  # Reflection
    ("<conclusion>", "</conclusion>"),  # LLaVA-CoT
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|begin_of_box|>", "<|end_of_box|>"),  # GLM-4.1V
)
"""Pairs of marks around the answer after reasoning."""

CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
"""gpt-oss' marks: `<|channel|>analysis<|message|>` begins reasoning, `<|channel|>final<|message|>` the answer
(https://github.com/openai/harmony)."""

_SHOWN = {mark for pair in (*MARKS, *ANSWER_MARKS) for mark in pair} | {CHANNEL, MESSAGE, "<|start|>", "<|end|>"}

_TAIL = 16
"""Tokens at the end of a prompt in which a generation prompt may open the reasoning."""


def marked_text(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """The text of a completion with the special tokens that mark reasoning, and without all others; None if it has
    none of them. Without the marks, reasoning would be part of the answer."""
    special, marks = _special_tokens(tokenizer)
    if marks.isdisjoint(tokens):
        return None
    return str(tokenizer.decode([token for token in tokens if token in marks or token not in special]))


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> tuple[frozenset[int], frozenset[int]]:
    """The ids of a tokenizer's special tokens, and of those that mark reasoning."""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special), frozenset(number for number, content in special.items() if content in _SHOWN)


def opened_reasoning(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The mark with which a prompt's last tokens open the reasoning, so that the completion lacks it; else empty."""
    tail = str(tokenizer.decode(list(prompt[-_TAIL:]))).rstrip()
    return next((f"{begin}\n" for begin, _ in MARKS if tail.endswith(begin)), "")
