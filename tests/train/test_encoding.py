"""What a training process makes of samples before it trains: pixel budget, tokens, prompts."""

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from stages.contract.errors import DataError
from stages.contract.files import read_json, write_json, write_jsonl
from stages.contract.recipe import Adapter, Model, Train
from stages.models.chat_settings import ChatSettings
from stages.models.pictures import read_rules
from stages.models.rendering import Renderer, picture_token
from stages.train.encoding import BATCH, Encoded, SampleEncoder, encode_samples, read_encoded
from stages.train.job import Job
from stages.train.lengths import measure_lengths
from stages.train.samples import TokenSequence
from stages.train.vision import PictureReader
from tests.conftest import need_model
from tests.engines.test_llava import with_published_template
from tests.models.chat_models import HYBRID, chat_model, small_tokenizer
from tests.models.published_forms import FORMS

BUDGET = 50176
"""64 tokens."""

LEAST = 3136
"""Four tokens, to which the family's models enlarge what is smaller."""

SHAPES = [
    *((1240, 1754), (1754, 1240), (350, 300), (224, 224), (225, 224), (20, 30), (56, 56), (2000, 60), (2400, 150)),
    (860, 744),  # 8.6 x 7.4 tiles at the budget
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
"""Samples whose texts say control words of the models, and what looks like pictures."""


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


def encoded(
    model: Path, run: Path, samples: list[dict[str, Any]], max_pixels: int | None = None, **settings: Any
) -> list[Encoded]:
    encode = SampleEncoder(Renderer(model, ChatSettings(**settings)), run, 2048, max_pixels)
    return [encode(one) for one in samples]


def grid(model: Path, run: Path, sequence: TokenSequence) -> list[list[int]]:
    """The rows and columns of patches of a sequence's pictures, as the model gets them."""
    rules = read_rules(model)
    read = PictureReader(model, rules, run, torch.float32).read([sequence])
    assert len(read["pixel_values"]) == int(read["image_grid_thw"].prod(1).sum())
    found: list[list[int]] = read["image_grid_thw"][:, 1:].tolist()
    return found


@pytest.mark.parametrize("budget", [BUDGET, LEAST])
def test_a_picture_becomes_as_many_tokens_as_the_budget_allows_and_keeps_its_shape(
    model: Path, pages: Path, budget: int
) -> None:
    rules = read_rules(model)
    for (width, height), one in zip(SHAPES, encoded(model, pages, ALONE, budget), strict=True):
        (sequence,) = one.sequences
        ((rows, columns),) = grid(model, pages, sequence)
        assert Counter(sequence.tokens.tolist())[picture_token(model)] == rows * columns / 4
        size = columns * 14, rows * 14
        assert size == rules.size(width, height, budget), "as inference reads it"
        assert size[0] % 28 == size[1] % 28 == 0
        if min(size) > 28 and width * height >= LEAST:  # a strip cannot be narrower than a token
            assert size[0] * size[1] <= budget
            # a side is off by less than a token
            grown = math.sqrt(size[0] * size[1] / width / height)
            assert abs(size[0] - width * grown) < 28 and abs(size[1] - height * grown) < 28


def test_tokens_are_counted_before_training_from_the_pictures_sizes(model: Path, pages: Path) -> None:
    settings = Train(adapters=[Adapter(name="tuned")], max_length=2048, max_pixels=BUDGET)
    for one, found in zip(SAMPLES, encoded(model, pages, SAMPLES, BUDGET), strict=True):
        counted = measure_lengths([one], model, settings, pages)
        assert 0 <= counted.longest - found.sequences[0].length <= 40 * max(len(one["images"]), 1), one["id"]
        assert (counted.mean, counted.deviation) == (counted.longest, 0), "of one sample"
    both = measure_lengths(SAMPLES, model, settings, pages)
    assert both.longest == measure_lengths([SAMPLES[-1]], model, settings, pages).longest
    short = SampleEncoder(Renderer(model), pages, 1024, BUDGET)
    assert [bool(short(one).sequences) for one in SAMPLES[-2:]] == [True, False]
    assert measure_lengths(SAMPLES, model, settings.model_copy(update={"max_length": 1024}), pages).longest == 1024


def test_pictures_are_read_when_their_sample_s_turn_comes(model: Path, tmp_path: Path) -> None:
    """Encoding reads the header alone: the rest of the file may be missing."""
    page = tmp_path / "0.jpg"
    Image.effect_noise((300, 200), 80).convert("RGB").save(page)
    page.write_bytes(page.read_bytes()[: page.stat().st_size // 2])
    (one,) = encoded(model, tmp_path, [sample("torn", ("0.jpg",))])
    with pytest.raises(DataError, match=r"0\.jpg: not a readable picture"):
        grid(model, tmp_path, one.sequences[0])


@pytest.mark.parametrize("pictures", [("none.jpg",), ("0.jpg", "0.jpg")], ids=["missing", "without a place"])
def test_a_picture_that_is_missing_or_has_no_place_is_named(
    model: Path, pages: Path, pictures: tuple[str, ...]
) -> None:
    one = {**sample("odd", pictures[:1]), "images": list(pictures)}
    with pytest.raises(
        DataError, match=r"none\.jpg: missing or not a picture, but sample odd|sample odd: has 2 pictures"
    ):
        encoded(model, pages, [one])


def test_an_end_token_that_only_generation_config_names_ends_an_answer(
    model: Path, pages: Path, tmp_path: Path
) -> None:
    """As in Phi-3 and Gemma, whose tokenizers name another one."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = [tokenizer.convert_tokens_to_ids(word) for word in ("<|endoftext|>", tokenizer.eos_token)]
    settings = {**read_json(elsewhere / "tokenizer_config.json"), "eos_token": "<|endoftext|>"}
    write_json(elsewhere / "tokenizer_config.json", settings)
    write_json(elsewhere / "generation_config.json", {"eos_token_id": ends})
    for one, other in zip(*(encoded(folder, pages, SAID, BUDGET) for folder in (model, elsewhere)), strict=True):
        assert one.sequences[0].tokens.tolist() == other.sequences[0].tokens.tolist()
        assert one.sequences[0].learnt.tolist() == other.sequences[0].learnt.tolist()


def test_prompts_are_those_of_published_chat_templates(llava: Path, pages: Path) -> None:
    """They end no earlier answer, so each answer has a sequence of its own, with its picture."""
    tokenizer = AutoTokenizer.from_pretrained(llava)
    first, second = encoded(llava, pages, TALKS)[0].sequences
    asked = "USER: <image>\nWhat is it? ASSISTANT: A square."
    whole = f"{asked} USER: Which colour? 颜色？ ASSISTANT: Red.{tokenizer.eos_token}"
    assert second.length == len(tokenizer.encode(whole)) + 15, "a picture has 16 tokens"
    assert first.length == len(tokenizer.encode(asked + tokenizer.eos_token)) + 15
    assert tokenizer.decode(second.tokens[second.learnt]) == f" Red.{tokenizer.eos_token}"
    assert [len(one.pictures) for one in (first, second)] == [1, 1]
    counted = measure_lengths(TALKS, llava, Train(adapters=[Adapter(name="tuned")], max_length=1024), pages)
    assert 0 <= counted.longest - second.length <= 60
    assert counted.answer >= len(tokenizer.encode("A square.USER: Which colour? 颜色？ ASSISTANT: Red."))


def test_each_answer_of_a_model_that_leaves_out_thoughts_is_learnt_after_its_own_prompt(
    hybrid: Path, pages: Path
) -> None:
    renderer = Renderer(hybrid, ChatSettings(enable_thinking=False))
    (one,) = encoded(hybrid, pages, THOUGHTS, enable_thinking=False)
    assert len(one.sequences) == 2
    for number, sequence in zip((1, 3), one.sequences, strict=True):
        prompt = renderer.render("x", THOUGHTS[0]["messages"][:number]).tokens
        assert sequence.tokens.tolist()[: len(prompt)] == prompt and not sequence.learnt[: len(prompt)].any()
        learnt = sequence.tokens[sequence.learnt]
        assert renderer.tokenizer.decode(learnt) == ("Yes<|im_end|>" if number == 1 else "No<|im_end|>")


def test_processes_that_share_the_work_write_what_one_encodes(
    hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as the training process does before it forks
    samples = [sample(f"gear {number}", question="Which one? " * (number % 7)) for number in range(2 * BATCH + 3)]
    for split in ("train", "validation"):
        rows = samples if split == "train" else samples[:1]
        write_jsonl(tmp_path / f"{split}.jsonl", [{**row, "meta": {"source": "all"}} for row in rows])
    job = Job(
        **{name: tmp_path / name for name in ("work", "scratch", "adapter", "run")},
        **{"model": hybrid, "key": "", "mix": Adapter(name="tuned"), "seed": 0, "dtype": "float32", "progress": 0},
        **{split: [tmp_path / f"{split}.jsonl"] for split in ("train", "validation")},
        **{"sharding": "none", "pass_tokens": 1024, "evaluation_tokens": 1024, "processes": 1, "cards": []},
        **{"evaluate": False, "use_cpu": True, "model_settings": Model(path="hybrid")},
        settings=Train(adapters=[Adapter(name="tuned")], max_length=40),
    )
    encode_samples(job, Renderer(hybrid))
    train, validation, _ = read_encoded(job)
    alone = SampleEncoder(Renderer(hybrid), tmp_path, 40, None)
    wanted = [alone(one).sequences for one in samples]
    assert 0 < len(train) == sum(map(bool, wanted)) < len(samples) and len(validation) == 1
    assert [one.tokens.tolist() for kept in train for one in kept] == [
        one.tokens.tolist() for kept in wanted for one in kept
    ]
    assert train.facts.left_out == [one["id"] for one, kept in zip(samples, wanted, strict=True) if not kept]


@pytest.mark.parametrize("ask", ["said", "said to llava"])
def test_what_samples_say_is_learnt_as_text(model: Path, llava: Path, pages: Path, ask: str) -> None:
    folder = model if ask == "said" else llava
    tokenizer, renderer = AutoTokenizer.from_pretrained(folder), Renderer(folder)
    picture, end = renderer.picture_token, tokenizer.eos_token_id
    budget = BUDGET if ask == "said" else None
    found = encoded(folder, pages, SAID, budget)
    for one, row in zip(SAID, found, strict=True):
        (sequence,) = row.sequences
        tokens, learnt = sequence.tokens.tolist(), sequence.tokens[sequence.learnt].tolist()
        answer = one["messages"][1]["content"].replace("\u2060", "")
        if ask == "said to llava":
            answer = f" {answer}"  # as the template writes it after ASSISTANT:
        assert learnt.count(end) == 1 and tokenizer.decode(learnt).startswith(answer + tokenizer.eos_token)
        assert learnt[: learnt.index(end)] == plain(tokenizer, answer)
        assert SAYS in tokenizer.decode(tokens)
        shown = [pages / name for name in one["images"]]
        prompt = renderer.render("x", one["messages"][:1], shown, budget)
        expanded = prompt.repeat_placeholders([tokens.count(picture)] if shown else [], picture)
        assert tokens[: len(expanded)] == expanded, "the prompt is that of inference"
        assert bool(tokens.count(picture)) == bool(shown)
    counts = [(one["<|im_end|>"], one["<repo_name>"]) for one in (row.control_words for row in found)]
    assert counts == [(3, 1), (2, 1)]


def plain(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return tokens


# -- several turns, tools and texts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """A model with tools and a small tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return Renderer(chat_model(folder / "small", FORMS["qwen2.5"].kind, small_tokenizer(folder / "source")))


def turns(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(texts)
    system = [{"role": "system", "content": "Be brief."}]
    return [*system, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))]


CALLED: list[dict[str, Any]] = [
    *turns("word " * 40, "No.", "Weather?"),
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]},
    {"role": "tool", "content": "wet"},
    {"role": "assistant", "content": "It rains."},
]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "See </s>.", "parameters": {}}}]


def learnt(renderer: Renderer, one: Encoded) -> list[str]:
    decode = renderer.tokenizer.decode
    return [decode(sequence.tokens[sequence.learnt]) for sequence in one.sequences]


def test_only_the_last_answer_is_learnt_if_the_recipe_says_so(small: Renderer, tmp_path: Path) -> None:
    talk = {"id": "x", "messages": turns("A?", "Yes.", "B?", "No."), "images": []}
    every, last = (SampleEncoder(small, tmp_path, 200, None, only_last=only)(talk) for only in (False, True))
    assert learnt(small, every) == ["Yes.<|im_end|>No.<|im_end|>"]
    assert learnt(small, last) == ["No.<|im_end|>"]
    assert [one.tokens.tolist() for one in every.sequences] == [one.tokens.tolist() for one in last.sequences]


def test_a_conversation_that_is_too_long_is_cut_between_turns(small: Renderer, tmp_path: Path) -> None:
    talk = {"id": "x", "messages": CALLED, "tools": TOOLS, "images": []}
    (whole,) = SampleEncoder(small, tmp_path, 10_000, None)(talk).sequences
    assert not SampleEncoder(small, tmp_path, whole.length - 1, None)(talk).sequences
    cut = SampleEncoder(small, tmp_path, whole.length - 1, None, cuts=True)(talk)
    assert cut.is_cut and not SampleEncoder(small, tmp_path, whole.length, None, cuts=True)(talk).is_cut
    text = small.tokenizer.decode(cut.sequences[0].tokens)
    assert text.startswith("<|im_start|>system\nBe brief.") and "See </s>." in text and "word" not in text
    assert "<|im_start|>user\nWeather?" in text
    assert learnt(small, cut)[0].endswith("It rains.<|im_end|>") and "look" in learnt(small, cut)[0]
    shortest = cut.sequences[0].length
    assert not SampleEncoder(small, tmp_path, shortest - 1, None, cuts=True)(talk).sequences, "the last exchange"
    assert cut.control_words == {}, "SmolLM2 has the word, this model has not"


def test_as_many_turns_stay_as_fit(small: Renderer, tmp_path: Path) -> None:
    texts = [f"{number} word" for number in range(40)]
    talk = {"id": "x", "messages": turns(*texts), "images": []}
    sizes = {}
    for limit in range(60, 500, 20):
        (sequence,) = SampleEncoder(small, tmp_path, limit, None, cuts=True)(talk).sequences
        first = small.tokenizer.decode(sequence.tokens).partition("user\n")[2].partition(" ")[0]
        sizes[limit] = int(first)
        assert sequence.length <= limit and int(first) % 2 == 0
        if int(first):  # one more exchange does not fit
            longer = {**talk, "messages": [talk["messages"][0], *talk["messages"][int(first) - 1 :]]}
            assert not SampleEncoder(small, tmp_path, limit, None)(longer).sequences
    assert sorted(sizes.values(), reverse=True) == list(sizes.values()) and len(set(sizes.values())) > 5


def test_pictures_of_the_turns_that_are_cut_off_go_with_them(model: Path, pages: Path) -> None:
    first, second = (message["content"] for message in TURNS[::2])
    messages = turns(first + " word" * 200, "A square.", f"<image>{second}", "Red.")
    talk = {"id": "x", "messages": messages, "images": ["0.jpg", "5.jpg"]}
    cut = SampleEncoder(Renderer(model), pages, 200, BUDGET, cuts=True)(talk)
    assert cut.is_cut and [[one.path for one in sequence.pictures] for sequence in cut.sequences] == [["5.jpg"]]


def test_a_text_that_is_too_long_becomes_several_sequences(small: Renderer, tmp_path: Path) -> None:
    text = {"id": "x", "messages": [], "text": "word <|im_end|> " * 30, "images": []}
    one = SampleEncoder(small, tmp_path, 100, None)(text)
    assert len(one.sequences) > 1 and one.is_text and one.control_words == {"<|im_end|>": 30}
    assert "".join(learnt(small, one)) == f"{text['text']}<|im_end|>"
    settings = Train(adapters=[Adapter(name="tuned")], max_length=1000)
    (folder,) = {Path(small.tokenizer.name_or_path)}
    counted = measure_lengths([text], folder, settings, tmp_path)
    assert 0 <= counted.longest - sum(sequence.length for sequence in one.sequences) <= 40


def test_tools_and_calls_count_in_lengths(small: Renderer, tmp_path: Path) -> None:
    talk = {"id": "x", "messages": CALLED, "tools": TOOLS, "images": []}
    (whole,) = SampleEncoder(small, tmp_path, 10_000, None)(talk).sequences
    settings = Train(adapters=[Adapter(name="tuned")], max_length=10_000)
    counted = measure_lengths([talk], Path(small.tokenizer.name_or_path), settings, tmp_path)
    assert 0 <= counted.longest - whole.length <= 150
