"""What is read of a reasoning model's completion: the answer, never the reasoning."""

import json
from typing import Any

import pytest

from stages.models.reasoning import MARKS
from stages.tasks import articulation, better_synth, extractive_qa, logic_choice, patent_qa
from stages.tasks.common.reasoning import without_reasoning

SAMPLE: dict[str, Any] = {"id": "a", "messages": [], "images": [], "references": ["Paris"], "meta": {}}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris", "Paris"),
        (" Paris \n", " Paris \n"),
        ("a < b and <think of it", "a < b and <think of it"),
        ("analysis of variance", "analysis of variance"),
        ("<answer>Paris</answer>", "<answer>Paris</answer>"),
        ("<think>\n\n</think>\n\nParis", "Paris"),
        ("<THINK>hm</Think>Paris", "Paris"),
        ("It is in France.</think>\n\nParis", "Paris"),
        ("<think>one</think><think>two</think>Paris", "Paris"),
        ("<think>one <think>two</think> three</think>Paris", "Paris"),
        ("Paris <think>or not?</think>", "Paris"),
        ("<think>It is in France", ""),
        ("<think>one</think>Paris<think>or", ""),
        ("It is Paris.</think>", ""),
        ("<think>x</think>\n<answer>\nParis\n</answer>", "Paris"),
        ("<think>x</think><answer>Paris", "Paris"),
        ("<think>x</think><answer><|begin_of_box|>Paris<|end_of_box|></answer>", "Paris"),
        ("<|begin_of_thought|>x<|end_of_thought|>\n<|begin_of_solution|>Paris<|end_of_solution|>", "Paris"),
        ("<SUMMARY>s</SUMMARY><REASONING>r</REASONING><CONCLUSION>Paris</CONCLUSION>", "Paris"),
        ("<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>Paris<|END_RESPONSE|>", "Paris"),
        (
            "<|channel|>analysis<|message|>France<|end|><|start|>assistant<|channel|>final<|message|>Paris",
            "Paris",
        ),
        ("<|channel|>analysis<|message|>France", ""),
        ("analysisIn France.assistantfinalParis", "Paris"),
        *[(f"{begin}France{end}\n\nParis", "Paris") for begin, end in MARKS],
        *[(f"France{end}Paris", "Paris") for _, end in MARKS],
        *[(f"{begin}Paris", "") for begin, _ in MARKS],
    ],
)
def test_reasoning_is_left_out(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer


THOUGHT = "<think>\nB? No.\nPerhaps B.\n</think>\n\n"
CODE = articulation.grammar.joints_code(1, [])


def _sample(**meta: Any) -> Any:
    return {**SAMPLE, "meta": meta}


OPTIONS = {"A": "a lever", "B": "a spring"}
READERS: dict[str, tuple[Any, Any, str, str]] = {
    "patent_qa": (patent_qa, _sample(), "Paris", "Paris"),
    "extractive_qa": (extractive_qa, _sample(), "Paris", "Paris"),
    "logic_choice": (logic_choice, _sample(options=OPTIONS), "A", "A"),
    "mmbench": (better_synth, _sample(source=better_synth.MMBENCH, options=OPTIONS), "A", "A"),
    "textvqa": (better_synth, _sample(source=better_synth.TEXTVQA), "Paris", "Paris"),
    "articulation": (articulation, _sample(mode="obb_rotation"), CODE, CODE),
}
"""Task, sample, what the model writes, and the answer in it."""


@pytest.mark.parametrize("name", READERS)
def test_every_task_reads_the_answer_after_the_reasoning(name: str) -> None:
    task, sample, written, answer = READERS[name]
    assert task.read_answer(written, sample) == answer
    for thought in (THOUGHT, THOUGHT.removeprefix("<think>"), "<think>\n\n</think>\n\n"):
        assert task.read_answer(thought + written, sample) == answer
    assert not task.read_answer(f"<think>\n{written}\n", sample), "reasoning that never ends has no answer"


def test_a_draft_and_a_classification_are_read_without_reasoning() -> None:
    assert not patent_qa.read_classification("<think>Yes or no?</think>\n\nNo")
    assert patent_qa.read_classification("no, wait</think>\n\nYes")


def test_an_upload_has_no_reasoning() -> None:
    prediction: Any = {"text": THOUGHT + "A", "answer": "A"}
    line = better_synth.submission({"ids": ["a"], "asked": {"question_id": 1}}, {"a": prediction})
    assert json.loads(json.dumps(line))["text"] == "A"
