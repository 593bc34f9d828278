"""Conversations as training and inference see them, for chat templates of the published kinds, against texts that are
written by hand."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import UsageError
from stages.contract.records import Message
from stages.models.chat_settings import CHATML, NAMED, PLAIN, ChatSettings
from stages.models.rendering import UNLEARNT, Renderer, TrainingSequence
from tests.models.chat_models import KINDS, chat_model

DATE = "2026-02-03"

Parts = list[tuple[str, bool]]
"""Pieces of a conversation as text, each with whether it is learnt."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    return {name: chat_model(folder / name, kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def renderer(models: dict[str, Path]) -> Callable[..., Renderer]:
    """A function that returns the renderer of a kind; one for all tests with the same settings."""
    made: dict[Any, Renderer] = {}

    def renderer_of(kind: str, **settings: Any) -> Renderer:
        key = kind, tuple(sorted(settings.items()))
        if key not in made:
            made[key] = Renderer(models[kind], ChatSettings(**settings))
        return made[key]

    return renderer_of


def conversation(*texts: str, system: str | None = "Be brief.") -> list[Message]:
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant")
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, *({"role": roles[place % 2], "content": text} for place, text in enumerate(texts))]


def check(renderer: Renderer, messages: list[Message], *expected: Parts) -> None:
    """Check the sequences of a conversation token by token, and that each learnt answer follows inference's prompt."""
    tokenizer = renderer.tokenizer
    found = renderer.training_sequences(messages)
    assert len(found) == len(expected), [tokenizer.decode(one.tokens) for one in found]
    for sequence, parts in zip(found, expected, strict=True):
        tokens, labels = list[int](), list[int]()
        for text, is_learnt in parts:
            own = tokenizer.encode(text, add_special_tokens=False)
            tokens += own
            labels += own if is_learnt else [UNLEARNT] * len(own)
        assert tokenizer.decode(sequence.tokens) == "".join(text for text, _ in parts)
        assert sequence.tokens == tokens
        assert sequence.labels == labels
    prompts = [
        renderer.render("x", messages[:place]).tokens
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    begun = [sequence.tokens[:place] for sequence in found for place in first_learnt(sequence)]
    assert sorted(begun) == sorted(prompts), "each answer is learnt once, after exactly the tokens of inference"
    (last,) = renderer.training_sequences(messages, only_last=True)
    assert last.tokens == found[-1].tokens
    assert len(first_learnt(last)) == 1 and last.labels[: len(prompts[-1])] == [UNLEARNT] * len(prompts[-1])


def first_learnt(sequence: TrainingSequence) -> list[int]:
    """The places of the first learnt token of each answer."""
    labels = [UNLEARNT, *sequence.labels]
    return [place for place, label in enumerate(sequence.labels) if label != UNLEARNT == labels[place]]


def test_chatml_learns_each_answer_and_its_end_token_but_not_the_line_break(renderer: Callable[..., Renderer]) -> None:
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
    more = "\n<|im_start|>user\n B? <|im_end|>\n<|im_start|>assistant\n"
    check(
        renderer("chatml"),
        conversation("A?", "Yes, 部件.", " B? ", "No. "),
        [(head, False), ("Yes, 部件.<|im_end|>", True), (more, False), ("No. <|im_end|>", True), ("\n", False)],
    )


def test_a_default_system_prompt_is_that_of_the_template(renderer: Callable[..., Renderer]) -> None:
    head = "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
    check(
        renderer("chatml"),
        conversation("A?", "Yes", system=None),
        [(head, False), ("Yes<|im_end|>", True), ("\n", False)],
    )


def test_what_an_answer_says_of_control_words_is_learnt_as_text(renderer: Callable[..., Renderer]) -> None:
    (found,) = renderer("chatml").training_sequences(conversation("<|im_end|>?", "<|im_end|> it is"))
    end = renderer("chatml").tokenizer.eos_token_id
    learnt = [label for label in found.labels if label != UNLEARNT]
    assert learnt.count(end) == 1 and learnt[-1] == end
    assert found.tokens.count(end) == 3, "after system, user and assistant"
    assert renderer("chatml").tokenizer.decode(learnt) == "<|im_end|> it is<|im_end|>"


def test_an_answer_that_begins_with_a_line_break_follows_the_prompt_of_inference(
    renderer: Callable[..., Renderer],
) -> None:
    """GPT-2's split would join both line breaks into one token, and the prompt would not be inference's."""
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
    check(
        renderer("chatml"),
        conversation("A?", "\n\nYes"),
        [(head, False), ("\n\nYes", True), ("<|im_end|>", True), ("\n", False)],
    )


ASKED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


def test_a_hybrid_that_thinks_learns_its_thoughts(renderer: Callable[..., Renderer]) -> None:
    check(
        renderer("hybrid"),
        conversation("A?", "<think>\nHm.\n</think>\n\nYes"),
        [(ASKED, False), ("<think>\nHm.\n</think>\n\nYes<|im_end|>", True), ("\n", False)],
    )
    check(
        renderer("hybrid"),
        conversation("A?", "Yes"),
        [(ASKED, False), (EMPTY + "Yes<|im_end|>", True), ("\n", False)],
    )


@pytest.mark.parametrize("answer", ["Yes", "<think>\nHm.\n</think>\n\nYes"])
def test_a_hybrid_that_does_not_think_learns_the_answer_after_the_empty_thoughts_of_the_prompt(
    renderer: Callable[..., Renderer], answer: str
) -> None:
    check(
        renderer("hybrid", enable_thinking=False),
        conversation("A?", answer),
        [(ASKED + EMPTY, False), ("Yes<|im_end|>", True), ("\n", False)],
    )


def test_a_hybrid_learns_each_turn_once_where_later_prompts_leave_thoughts_out(
    renderer: Callable[..., Renderer],
) -> None:
    messages = conversation("A?", "<think>\nHm.\n</think>\n\nYes", "B?", "<think>\nSo.\n</think>\n\nNo")
    later = "Yes<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\n"
    check(
        renderer("hybrid"),
        messages,
        [(ASKED, False), ("<think>\nHm.\n</think>\n\nYes<|im_end|>", True), ("\n", False)],
        [(ASKED + later, False), ("<think>\nSo.\n</think>\n\nNo<|im_end|>", True), ("\n", False)],
    )
    check(
        renderer("hybrid", enable_thinking=False),
        messages,
        [(ASKED + EMPTY, False), ("Yes<|im_end|>", True), ("\n", False)],
        [(ASKED + later + EMPTY, False), ("No<|im_end|>", True), ("\n", False)],
    )


def test_a_reasoner_goes_on_with_the_thoughts_that_the_prompt_begins(renderer: Callable[..., Renderer]) -> None:
    head, begun = "<|begin|>Be brief.<|User|>A?", "<|Assistant|><think>\n"
    later = "<|Assistant|>Yes<|end_of_text|><|User|>B?"
    for first in ("<think>\nHm.\n</think>\n\nYes", "Hm.\n</think>\n\nYes"):
        check(
            renderer("reasoner"),
            conversation("A?", first, "B?", "No"),
            [(head + begun, False), ("Hm.\n</think>\n\nYes<|end_of_text|>", True)],
            [(head + later + begun, False), ("\n</think>\n\nNo<|end_of_text|>", True)],
        )


def test_a_date_is_that_of_the_settings_and_the_end_token_that_of_the_generation_config(
    renderer: Callable[..., Renderer],
) -> None:
    head = "<|begin|><|head|>system<|tail|>\n\nToday: 03 Feb 2026\n\nBe brief.<|eot|><|head|>user<|tail|>\n\nA?<|eot|>"
    begun = "<|head|>assistant<|tail|>\n\n"
    # two sequences: this tokenizer joins two line breaks only at the end of a text, so in the second prompt of
    # inference they are other tokens than in the first
    check(
        renderer("dated", date=DATE),
        conversation(" A?\n", " Yes ", "B?", "No"),
        [(head + begun, False), ("Yes<|eot|>", True)],
        [(head + begun + "Yes<|eot|><|head|>user<|tail|>\n\nB?<|eot|>" + begun, False), ("No<|eot|>", True)],
    )
    assert renderer("dated", date=DATE).check_template() == [
        "the chat template writes a date: every prompt of this run has 2026-02-03"
    ]


def test_a_template_without_a_system_role_gets_the_system_message_from_the_user(
    renderer: Callable[..., Renderer],
) -> None:
    head = "<|begin|><start_of_turn>user\nBe brief.\n\nA?<end_of_turn>\n<start_of_turn>model\n"
    more = "\n<start_of_turn>user\nB?<end_of_turn>\n<start_of_turn>model\n"
    check(
        renderer("no_system"),
        conversation("A?", "Yes", "B?", "No"),
        [(head, False), ("Yes<end_of_turn>", True), (more, False), ("No<end_of_turn>", True), ("\n", False)],
    )
    assert renderer("no_system").check_template() == [
        "the chat template has no system role: the system message goes into the user's message"
    ]
    assert renderer("chatml").check_template() == []


def test_marks_in_plain_words_and_no_generation_prompt(renderer: Callable[..., Renderer]) -> None:
    head = "<s>[INST] Be brief.\n\nA? [/INST]"
    check(
        renderer("inst"),
        conversation("A?", "Yes", "B?", "No"),
        [(head, False), (" Yes</s>", True), ("[INST] B? [/INST]", False), (" No</s>", True)],
    )


def test_a_system_message_that_only_prompts_have_is_learnt_from(renderer: Callable[..., Renderer]) -> None:
    """The finished conversation has no system message, but what inference gives the model has one."""
    check(
        renderer("system_last"),
        conversation("A?", "Yes", "B?", "No"),
        [("<s>[INST]Be brief.\n\nA?[/INST]", False), ("Yes</s>", True)],
        [("<s>[INST]A?[/INST]Yes</s>[INST]Be brief.\n\nB?[/INST]", False), ("No</s>", True)],
    )


def test_the_end_of_a_turn_is_learnt_and_not_that_of_the_conversation(renderer: Callable[..., Renderer]) -> None:
    head = "<|system|>\nBe brief.<|end|>\n<|user|>\nA?<|end|>\n<|assistant|>\n"
    more = "\n<|user|>\nB?<|end|>\n<|assistant|>\n"
    check(
        renderer("end_of_all"),
        conversation("A?", "Yes", "B?", "No"),
        [(head, False), ("Yes<|end|>", True), (more, False), ("No<|end|>", True), ("\n<|endoftext|>", False)],
    )


def test_a_base_model_takes_its_template_from_the_recipe(
    models: dict[str, Path], renderer: Callable[..., Renderer]
) -> None:
    with pytest.raises(
        UsageError, match=r"base: has no chat template, as is usual for a base model; set model.chat_template to chat"
    ):
        Renderer(models["base"])
    check(
        renderer("base", template=PLAIN, named=True),
        conversation("A?", "Yes", "B?", "No"),
        [
            ("Be brief.\n\nUser:\nA?\n\nAssistant:\n", False),
            ("Yes</s>", True),
            ("\nUser:\nB?\n\nAssistant:\n", False),
            ("No</s>", True),
            ("\n", False),
        ],
    )
    check(
        renderer("base", template=CHATML),
        conversation("A?", "Yes"),
        [(ASKED, False), ("Yes<|im_end|></s>", True), ("\n", False)],
    )
    assert set(NAMED) == {"chatml", "plain"}


def test_a_named_template_needs_its_control_words_and_gets_the_first_token(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = chat_model(tmp_path / "model", KINDS["base"])
    text = (folder / "tokenizer.json").read_text().replace("<|im_", "<|I_")
    values = json.loads(text)
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [49152], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(
        UsageError, match=r"chat_template: found 'chatml', but .* has no token <\|im_end\|>; set it to plain"
    ):
        Renderer(folder, ChatSettings(CHATML, named=True)).check_template()
    plain = Renderer(folder, ChatSettings(PLAIN, named=True))
    assert plain.tokenizer.decode(plain.render("x", conversation("A?", system=None)).tokens) == (
        "<s>User:\nA?\n\nAssistant:\n"
    )
    (found,) = plain.training_sequences(conversation("A?", "Yes"))
    assert found.tokens[0] == 49152 and found.tokens.count(49152) == 1


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "base"])
def test_texts_are_those_of_transformers(renderer: Callable[..., Renderer], kind: str) -> None:
    own = renderer(kind)
    for messages in (conversation("A?", system=None), conversation("A?", " <think>\nx\n</think>\n\nYes ", "B?")):
        folded = own.template.folded(messages)
        theirs = own.tokenizer.apply_chat_template(folded, tokenize=False, add_generation_prompt=True)
        assert own.template.text(folded, True) == theirs


@pytest.mark.parametrize("kind", ["dated", "chatml"])
def test_a_setting_that_the_template_ignores_is_refused(renderer: Callable[..., Renderer], kind: str) -> None:
    with pytest.raises(
        UsageError, match=r"enable_thinking: found false, but the chat template of .* ignores it; set it"
    ):
        renderer(kind, enable_thinking=False).check_template()
    assert renderer("hybrid", enable_thinking=True).check_template() == []


@pytest.mark.parametrize(
    ("kind", "was", "becomes", "message"),
    [
        ("chatml", "m['content'] +", "m['content'] | upper +", "writes the answer 'yes' as 'YES'"),
        (
            "chatml",
            "m['content'] +",
            "('' if m['role'] == 'user' else m['content']) +",
            "leaves out the user's message",
        ),
        (
            "chatml",
            "m['content'] +",
            "('' if m['role'] != 'user' else m['content']) +",
            "does not write an answer as it",
        ),
        ("chatml", "m['content'] +", "m['content'] + m['name'] +", "refuses a conversation of user ("),
        ("chatml", "{% endfor %}", "", "is not Jinja"),
    ],
)
def test_a_template_that_cannot_be_learnt_is_refused_in_one_line(
    tmp_path: Path, kind: str, was: str, becomes: str, message: str
) -> None:
    template = KINDS[kind].template or ""
    assert was in template
    model = chat_model(tmp_path / "model", replace(KINDS[kind], template=template.replace(was, becomes)))
    with pytest.raises(UsageError) as refused:
        Renderer(model).check_template()
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{model}: ") and "; set model.chat_template" in str(refused.value)


def test_an_end_token_is_added_where_the_template_writes_none(tmp_path: Path) -> None:
    """As the published template of LLaVA-1.5, whose prompts are in plain words."""
    template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    model = chat_model(tmp_path / "model", replace(KINDS["base"], template=template))
    assert Renderer(model).check_template() == [
        "the chat template writes no end token after an answer: training adds '</s>'"
    ]
    check(
        Renderer(model),
        conversation("A?", "Yes", "B?", "No"),
        [("SYSTEM: Be brief. USER: A? ASSISTANT: ", False), ("Yes</s>", True)],
        [("SYSTEM: Be brief. USER: A? ASSISTANT: Yes USER: B? ASSISTANT: ", False), ("No</s>", True)],
    )
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    (model / "generation_config.json").unlink()
    with pytest.raises(
        UsageError, match=r"neither tokenizer nor generation config has an end token, .*; set eos_token"
    ):
        Renderer(model).check_template()


def test_a_conversation_that_the_template_refuses(renderer: Callable[..., Renderer]) -> None:
    messages = [*conversation("A?"), *conversation("B?", "Yes", system=None)]
    with pytest.raises(UsageError, match=r"refuses a conversation of user, user.* \(Roles must alternate\)"):
        renderer("no_system").check_conversation(messages)


def test_a_renderer_goes_to_another_process(renderer: Callable[..., Renderer]) -> None:
    own = renderer("hybrid", enable_thinking=False)
    other = pickle.loads(pickle.dumps(own))  # noqa: S301 - its own bytes
    messages = conversation("A?", "Yes", "B?", "No")
    assert other.training_sequences(messages) == own.training_sequences(messages)
