"""What a training process makes of samples before it trains: pixel budget, tokens, prompts. Qwen2.5-VL and LLaVA, tiny.

One process encodes everything: ms-swift takes ten seconds to import.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from stages.contract.files import read_json, write_json, write_jsonl
from stages.contract.recipe import Adapter, Train
from stages.models.chat_settings import ChatSettings
from stages.models.pictures import read_rules
from stages.models.rendering import UNLEARNT, Renderer
from stages.train.lengths import measure_lengths
from tests.conftest import REPOSITORY, need_model
from tests.engines.test_llava import with_published_template
from tests.models.chat_models import HYBRID, chat_model

BUDGET = 50176
"""64 tokens."""

LEAST = 3136
"""Four tokens, to which the family's models enlarge what is smaller."""

SHAPES = [
    *((1240, 1754), (1754, 1240), (350, 300), (224, 224), (225, 224), (20, 30), (56, 56), (2000, 60), (2400, 150)),
    (860, 744),  # ms-swift shrinks it to 240.8 x 208.3, and rounds 8.6 and 7.4 tiles to 9 x 7; here nearly so
    (952, 673),  # 9.5 x 6.7 tiles at the budget: rounded to the nearest they are 10 x 7, above it
]


@pytest.fixture(scope="module")
def model() -> Path:
    return need_model("tiny-qwen2.5-vl")


def sample(name: str, pictures: tuple[str, ...] = (), question: str = "What is shown? 图中是什么？") -> dict[str, Any]:
    content = "".join(f"Page {number}:\n<image>\n" for number, _ in enumerate(pictures, 1)) + question
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"A gear, {name}."}]
    return {"id": name, "messages": messages, "images": list(pictures)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a picture of each shape."""
    run = tmp_path_factory.mktemp("run")
    for number, shape in enumerate(SHAPES):
        Image.new("RGB", shape, "white").save(run / f"{number}.jpg")
    return run


ALONE = [sample(f"alone{number}", (f"{number}.jpg",)) for number in range(len(SHAPES))]
SAMPLES = [
    *ALONE,
    sample("text"),
    sample("both", ("0.jpg", "5.jpg"), "Which of them shows part 12 of the valve? " * 4),
    sample("long", ("0.jpg",) * 20),
]


TURNS = [
    {"role": role, "content": text}
    for role, text in (
        ("user", "<image>\nWhat is it?"),
        ("assistant", "A square."),
        ("user", "Which colour? 颜色？"),
        ("assistant", "Red."),
    )
]
TALKS = [
    {"id": "seen", "messages": TURNS, "images": ["0.jpg"]},
    {"id": "read", "messages": sample("read", question="What is a gear?")["messages"], "images": []},
]


SAYS = "Is <image>, </s> or <|im_end|> a tag? <img>0.jpg</img> <|image_pad|><repo_name>"
ESCAPED = "<\u2060image>"
ANSWER = "No: <|im_end|> and <file_sep>, <|im_end|>"
SAID = [
    {
        "id": "said",
        "images": [],
        "messages": [{"role": "user", "content": SAYS}, {"role": "assistant", "content": ANSWER}],
    },
    {
        "id": "seen",
        "images": ["0.jpg"],
        "messages": [
            {"role": "user", "content": "<image>\n" + SAYS.replace("<image>", ESCAPED)},
            {"role": "assistant", "content": f"the word {ESCAPED}, <|im_end|>"},
        ],
    },
]
"""Samples whose texts say control words of the models, and what ms-swift takes for pictures."""


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with the chat template of the published ones."""
    return with_published_template(need_model("tiny-llava"), tmp_path_factory.mktemp("models") / "published")


THOUGHTS = [
    {
        "id": "thought",
        "images": [],
        "messages": [
            {"role": role, "content": text}
            for role, text in (
                ("user", "A?"),
                ("assistant", "<think>\nHm.\n</think>\n\nYes"),
                ("user", "B?"),
                ("assistant", "<think>\nSo.\n</think>\n\nNo"),
            )
        ],
    }
]
"""A sample whose answers need a sequence each with a model that leaves out earlier thoughts."""


@pytest.fixture(scope="module")
def hybrid(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the tokenizer and chat template of a hybrid."""
    folder = tmp_path_factory.mktemp("models") / "hybrid"
    shutil.copytree(small_models / "random-llama", folder)
    weights = (folder / "config.json").read_text()
    chat_model(folder, HYBRID)
    (folder / "config.json").write_text(weights)
    return folder


@pytest.fixture(scope="module")
def encoded(
    model: Path, llava: Path, hybrid: Path, pages: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """SAMPLES at the budget, at the least budget that there is, and with a model of another template; TALKS with the
    template that a LLaVA needs, and with ms-swift's own; THOUGHTS with a model that ms-swift's templates do not fit."""
    write_jsonl(pages / "samples.jsonl", SAMPLES)
    write_jsonl(pages / "talks.jsonl", TALKS)
    write_jsonl(pages / "said.jsonl", SAID)
    write_jsonl(pages / "thoughts.jsonl", THOUGHTS)
    other = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(model, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|vision_start|>", "Picture: <|vision_start|>"))
    elsewhere = tmp_path_factory.mktemp("models") / "elsewhere"
    shutil.copytree(model, elsewhere)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = [tokenizer.convert_tokens_to_ids(word) for word in ("<|endoftext|>", tokenizer.eos_token)]
    settings = {**read_json(elsewhere / "tokenizer_config.json"), "eos_token": "<|endoftext|>"}
    write_json(elsewhere / "tokenizer_config.json", settings)
    write_json(elsewhere / "generation_config.json", {"eos_token_id": ends})
    seeing = ["model.swift_type=llava1_5_hf", "train.max_pixels=null"]
    asks = {
        "budget": (model, "samples", [f"train.max_pixels={BUDGET}"]),
        "least": (model, "samples", [f"train.max_pixels={LEAST}"]),
        "other template": (other, "samples", [f"train.max_pixels={BUDGET}"]),
        "end elsewhere": (elsewhere, "said", [f"train.max_pixels={BUDGET}"]),
        "llava_vicuna": (llava, "talks", [*seeing, "model.swift_template=llava_vicuna"]),
        "llava1_5_hf": (llava, "talks", [*seeing, "model.swift_template=llava1_5_hf"]),
        "said": (model, "said", [f"train.max_pixels={BUDGET}"]),
        "thoughts": (
            hybrid,
            "thoughts",
            ["model.swift_type=llama", "model.swift_template=null", "model.enable_thinking=false"],
        ),
        "said to llava": (llava, "said", [*seeing, "model.swift_template=llava_vicuna"]),
    }
    fields = [
        {"model": str(folder), "run": str(pages), "samples": str(pages / f"{name}.jsonl"), "overrides": overrides}
        for folder, name, overrides in asks.values()
    ]
    command = [sys.executable, "-m", "tests.train.encoding", json.dumps(fields)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(asks, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("ask", "budget"), [("budget", BUDGET), ("least", LEAST)])
def test_a_picture_becomes_as_many_tokens_as_the_budget_allows_and_keeps_its_shape(
    model: Path, encoded: dict[str, dict[str, Any]], ask: str, budget: int
) -> None:
    rules = read_rules(model)
    for (width, height), row in zip(SHAPES, encoded[ask]["rows"][: len(ALONE)], strict=True):
        ((_, rows, columns),) = row["grids"]
        size = columns * 14, rows * 14
        assert size == rules.size(width, height, budget), "as inference reads it"
        assert size[0] % 28 == size[1] % 28 == 0
        if min(size) > 28 and width * height >= LEAST:  # a strip cannot be narrower than a token
            assert size[0] * size[1] <= budget
            # a side is off by less than a token
            grown = math.sqrt(size[0] * size[1] / width / height)
            assert abs(size[0] - width * grown) < 28 and abs(size[1] - height * grown) < 28


def test_tokens_are_counted_before_training_from_the_pictures_sizes(
    model: Path, pages: Path, encoded: dict[str, dict[str, Any]]
) -> None:
    settings = Train(adapters=[Adapter(name="tuned")], max_length=1024, max_pixels=BUDGET)
    kept = [one for one in SAMPLES if one["id"] != "long"]
    for one, row in zip(kept, encoded["budget"]["rows"], strict=True):
        counted = measure_lengths([one], model, settings, pages)
        assert 0 <= counted.longest - row["length"] <= 40, one["id"]
        assert counted.shortest_prompt is not None
        assert counted.shortest_prompt + counted.answer <= row["length"]
    both = measure_lengths(kept, model, settings, pages)
    assert both.longest == measure_lengths([kept[-1]], model, settings, pages).longest
    assert measure_lengths(SAMPLES, model, settings, pages).longest == 1024
    assert encoded["budget"]["left_out"] == ["long"]


def test_pictures_are_read_when_their_sample_s_turn_comes(encoded: dict[str, dict[str, Any]]) -> None:
    assert encoded["budget"]["read before"] == 0
    for row in encoded["budget"]["rows"]:
        assert row["read"] == len(row["images"])
        assert all(isinstance(image, str) for image in row["images"]), "a row holds names, not pictures"


def test_a_template_that_shows_pictures_otherwise_is_refused(encoded: dict[str, dict[str, Any]]) -> None:
    assert "rows" in encoded["budget"], "the model's own is taken"
    assert "renders a different prompt from the chat template" in encoded["other template"]["error"]
    assert "Picture: <|vision_start|>" in encoded["other template"]["error"]
    assert "\n" not in encoded["other template"]["error"].replace("\\n", "")


def test_an_end_token_that_only_generation_config_names_ends_an_answer(encoded: dict[str, dict[str, Any]]) -> None:
    """As in Phi-3 and Gemma, whose tokenizers name another one."""
    assert "rows" in encoded["end elsewhere"], encoded["end elsewhere"]
    assert encoded["end elsewhere"]["rows"] == encoded["said"]["rows"]


def test_ms_swift_s_prompts_are_those_of_published_chat_templates(
    llava: Path, pages: Path, encoded: dict[str, dict[str, Any]]
) -> None:
    """Of conversations all answers are learnt; the prompt is what stands before the first."""
    ours, theirs = encoded["llava_vicuna"], encoded["llava1_5_hf"]
    assert "rows" in ours, ours
    tokenizer = AutoTokenizer.from_pretrained(llava)
    end = tokenizer.eos_token
    written = f"USER: <image>\nWhat is it? ASSISTANT:A square.{end}USER: Which colour? 颜色？ ASSISTANT:Red.{end}"
    assert ours["rows"][0]["length"] == len(tokenizer.encode(written)) + 15, "a picture has 16 tokens"
    settings = Train(adapters=[Adapter(name="tuned")], max_length=1024)
    counted = measure_lengths(TALKS, llava, settings, pages)
    assert 0 <= counted.longest - ours["rows"][0]["length"] <= 60
    assert counted.answer >= len(tokenizer.encode("A square.USER: Which colour? 颜色？ ASSISTANT:Red."))
    assert "renders a different prompt from the chat template" in theirs["error"]


def test_samples_without_pictures_need_no_template_of_ms_swift(
    hybrid: Path, encoded: dict[str, dict[str, Any]]
) -> None:
    """ms-swift has no template that fits this model; each answer is learnt after the prompt that inference gives."""
    assert "error" not in encoded["thoughts"], encoded["thoughts"]
    renderer = Renderer(hybrid, ChatSettings(enable_thinking=False))
    own = renderer.training_sequences(THOUGHTS[0]["messages"])
    found = [(row["tokens"], row["labels"]) for row in encoded["thoughts"]["rows"]]
    assert found == [(sequence.tokens, sequence.labels) for sequence in own] and len(own) == 2
    for number, (tokens, labels) in zip((1, 3), found, strict=True):
        prompt = renderer.render("x", THOUGHTS[0]["messages"][:number]).tokens
        assert tokens[: len(prompt)] == prompt and labels[: len(prompt)] == [UNLEARNT] * len(prompt)
        learnt = [label for label in labels if label != UNLEARNT]
        assert renderer.tokenizer.decode(learnt) == ("Yes<|im_end|>" if number == 1 else "No<|im_end|>")


@pytest.mark.parametrize("ask", ["said", "said to llava"])
def test_what_samples_say_is_learnt_as_text(
    model: Path, llava: Path, pages: Path, encoded: dict[str, dict[str, Any]], ask: str
) -> None:
    folder = model if ask == "said" else llava
    tokenizer, renderer = AutoTokenizer.from_pretrained(folder), Renderer(folder)
    picture, end = renderer.picture_token, tokenizer.eos_token_id
    assert "error" not in encoded[ask], encoded[ask]
    for one, row in zip(SAID, encoded[ask]["rows"], strict=True):
        tokens, labels = row["tokens"], row["labels"]
        learnt = [label for label in labels if label != -100]
        answer = one["messages"][1]["content"].replace("\u2060", "")
        if ask == "said to llava" and not one["images"]:
            answer = f" {answer}"  # as the template writes it after ASSISTANT:
        assert learnt.count(end) == 1 and tokenizer.decode(learnt).startswith(answer + tokenizer.eos_token)
        assert learnt[: learnt.index(end)] == plain(tokenizer, answer)
        assert SAYS in tokenizer.decode(tokens)
        shown = [pages / name for name in one["images"]]
        prompt = renderer.render("x", one["messages"][:1], shown, BUDGET if ask == "said" else None)
        expanded = prompt.repeat_placeholders([tokens.count(picture)] if shown else [], picture)
        assert tokens[: len(expanded)] == expanded, "the prompt is that of inference"
        assert bool(tokens.count(picture)) == bool(shown)
    counts = [(one["<|im_end|>"], one["<repo_name>"]) for one in encoded[ask]["said"]]
    assert counts == [(3, 1), (2, 1)]


def plain(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return tokens
