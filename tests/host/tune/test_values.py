"""The values that `lorry tune` chooses: by the number and length of the conversations, the model and the GPUs."""

import json
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.contract.errors import DoesNotFitError
from stages.contract.recipe import Data, load_recipe
from stages.host.planning import planned_gpus
from stages.host.tune.base import Base
from stages.host.tune.data import Seen
from stages.host.tune.job import fit_values
from stages.host.tune.recipe_text import recipe_text
from stages.host.tune.values import Machine, Value, Values, choose_values, learnt
from stages.models.shape import planned_shape
from stages.preprocess.split import split_groups

CPU = Machine(0, "transformers", "a CPU")
GPU = Machine(1, "vllm", "a GPU")

QWEN_7B = {
    **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 32768},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A model of 7.6 billion parameters, of which only the config is here."""
    folder = tmp_path_factory.mktemp("Qwen2.5-7B-Instruct")
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return Base("Qwen2.5-7B-Instruct", folder, None, False, 32768, False, planned_shape(folder)[0])


def seen(conversations: int, lengths: tuple[int, ...] = (100, 200, 300), **others: Any) -> Seen:
    """Data with these lengths, all equally often, and answers of 40 tokens."""
    facts = {"held_out": 0, "longest": max(lengths), "answers": (40,), "thinks": False, "pictures": False, **others}
    return Seen(conversations=conversations, lengths=lengths, **facts)


def test_the_number_of_conversations_decides_split_epochs_and_batch(base: Base) -> None:
    """10 conversations are learnt often in small steps, 100,000 once in large ones; at most 300 are asked."""
    found = {}
    for number in (10, 1_000, 100_000):
        values = choose_values(seen(number), base, GPU, {})
        groups = {str(place) for place in range(number)}
        data = Data(
            path="x",
            test_fraction=values.value("data.test_fraction"),
            validation_fraction=values.value("data.validation_fraction"),
        )
        splits = list(split_groups(groups, {}, data, 42).values())
        keys = ("epochs", "effective_batch", "rank", "alpha", "learning_rate", "checkpoint_every")
        counts = tuple(splits.count(name) for name in ("train", "validation", "test"))
        found[number] = (counts, *(values.value(f"train.{key}") for key in keys))
    assert found == {
        10: ((8, 0, 2), 5, 4, 16, 32, 2e-4, 10),
        1_000: ((855, 45, 100), 3, 8, 16, 32, 2e-4, 32),
        100_000: ((99_600, 100, 300), 1, 32, 32, 64, 2e-4, 200),
    }


def test_on_a_cpu_few_conversations_are_asked(base: Base) -> None:
    values = choose_values(seen(1_000), base, CPU, {})
    assert ceil(1_000 * values.value("data.test_fraction")) == 50
    assert values.value("infer.engine") == "transformers"


def test_data_with_a_test_split_keep_it(base: Base) -> None:
    values = choose_values(seen(1_000, held_out=200), base, GPU, {})
    assert values.value("data.test_fraction") == 0


@pytest.mark.parametrize(
    ("lengths", "length", "why"),
    [
        ((100, 200, 300), 320, "all conversations are shorter, the longest has about 300"),
        ((10, 20), 256, "all conversations"),
        ((500,) * 999 + (9_000,), 512, "99.9 % of the conversations are shorter; train.too_long is for the others"),
        ((1_000,) * 90 + (2_000,) * 10, 2_048, "all conversations"),
        (
            (40_000,) * 10,
            32_768,
            "0.0 % of the conversations are shorter; train.too_long is for the others, the model's context",
        ),
    ],
)
def test_max_length_holds_nearly_all(base: Base, lengths: tuple[int, ...], length: int, why: str) -> None:
    values = choose_values(seen(1_000, lengths), base, GPU, {})
    assert values.value("train.max_length") == length
    assert why in next(value.why for value in values.all() if value.key == "train.max_length")
    assert length <= values.value("infer.max_length") <= 32_768


def test_a_base_model_and_a_hybrid_are_prompted_as_the_data_want(base: Base) -> None:
    plain = choose_values(seen(100), replace(base, chat_template="plain"), GPU, {})
    assert plain.value("model.chat_template") == "plain"
    hybrid = replace(base, may_think=True)
    for thinks in (True, False):
        values = choose_values(seen(100, thinks=thinks), hybrid, GPU, {})
        assert values.value("model.enable_thinking") is thinks
    own = {value.key for value in choose_values(seen(100), base, GPU, {}).all()}
    assert not own & {"model.chat_template", "model.enable_thinking"}


def test_pictures_have_room_and_a_limit(base: Base) -> None:
    values = choose_values(seen(100, pictures=True), base, GPU, {})
    assert values.value("train.max_pixels") == 1_003_520


def test_a_step_has_a_sample_for_each_gpu(base: Base) -> None:
    assert choose_values(seen(10), base, replace(GPU, gpus=8), {}).value("train.effective_batch") == 8


def test_small_models_learn_faster(base: Base) -> None:
    class Small:
        """As much of a shape as the learning rate depends on."""

        parameters = 135_000_000

    values = choose_values(seen(100), replace(base, shape=Small()), CPU, {})  # type: ignore[arg-type]
    assert values.value("train.learning_rate") == 1e-3


def test_what_the_user_asks_for_counts_and_the_rest_follows(base: Base) -> None:
    asked = {"train.max_length": 1_000, "train.rank": 8, "eval.worst": 3}
    values = choose_values(seen(100), base, GPU, asked)
    found = {value.key: value.value for value in values.all()}
    assert (found["train.max_length"], found["train.rank"], found["train.alpha"]) == (1_000, 8, 16)
    assert found["eval.worst"] == 3
    assert found["infer.max_length"] >= 1_000


# -- what fits the GPUs --------------------------------------------------------------------------------------------


def fitted(base: Base, target: str, count: int, memory: float | None, **asked: Any) -> Values:
    """The values for conversations of at most 8,000 tokens on GPUs of a target, or with so many GiB."""
    given = {f"train.{key}": value for key, value in asked.items()}
    data = seen(1_000, (1_000,) * 9 + (8_000,))
    values = choose_values(data, base, GPU, given)
    fit_values(values, data, base, planned_gpus(target, count, memory, "auto"))
    return values


def keys_of(values: Values) -> set[str]:
    return {value.key for value in values.all()}


def test_what_fits_stays_as_it_is(base: Base) -> None:
    values = fitted(base, "h100", 1, None)
    assert values.value("train.max_length") == 8_192
    assert "train.load_in_4bit" not in keys_of(values)


def test_a_base_that_does_not_fit_is_kept_in_4_bits(base: Base) -> None:
    base = replace(base, shape=replace_layers(base, 56))  # 14 billion parameters
    data = seen(1_000, (1_000,))
    values = choose_values(data, base, replace(GPU, engine="transformers"), {})
    fit_values(values, data, base, planned_gpus("rtx4090", 1, None, "auto"))
    assert values.value("train.load_in_4bit") is True
    assert "in bfloat16 it takes" in next(value.why for value in values.all() if value.key == "train.load_in_4bit")


def replace_layers(base: Base, layers: int) -> Any:
    """The shape of the model with another number of layers."""
    folder = base.folder / f"layers-{layers}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**QWEN_7B, "num_hidden_layers": layers}))
    return planned_shape(folder)[0]


def test_longer_conversations_than_fit_are_left_out(base: Base) -> None:
    data = seen(1_000, (1_000,) * 9 + (30_000,))
    values = choose_values(data, base, replace(GPU, engine="transformers"), {})
    fit_values(values, data, base, planned_gpus("h100", 1, 9.0, "auto"))
    assert values.value("train.load_in_4bit") is True
    assert 1_000 < values.value("train.max_length") < 30_000
    why = next(value.why for value in values.all() if value.key == "train.max_length")
    assert "90.0 % of the conversations are shorter; train.too_long is for the others; longer ones do not fit" in why


def test_a_model_that_is_too_large_is_refused_in_one_line(base: Base) -> None:
    with pytest.raises(
        DoesNotFitError, match=r"^--model Qwen2.5-7B-Instruct: training takes at least .* even in 4 bits"
    ):
        fitted(base, "rtx4090", 1, 4.0)
    with pytest.raises(DoesNotFitError, match="training takes at least") as found:
        fitted(base, "rtx4090", 1, 4.0, load_in_4bit=False)
    assert "4 bits" not in str(found.value)


def test_answers_that_would_not_fit_are_found_before_training(base: Base) -> None:
    with pytest.raises(DoesNotFitError, match=r"^infer.max_length \d+: inference takes"):
        fitted(base, "rtx4090", 1, 12.0)


def test_the_answers_length_is_lowered_where_more_does_not_fit(base: Base) -> None:
    data = seen(1_000, (1_000,))
    found = {}
    for memory in (24.0, 19.55):
        values = choose_values(data, base, GPU, {})
        fit_values(values, data, base, planned_gpus("rtx4090", 1, memory, "auto"))
        found[memory] = values.value("infer.max_length")
    assert found == {24.0: 4_096, 19.55: 1_280}


# -- the recipe ----------------------------------------------------------------------------------------------------


def test_the_recipe_is_valid_and_says_why(base: Base, tmp_path: Path) -> None:
    data = seen(1_000, thinks=True)
    values = choose_values(data, replace(base, may_think=True), CPU, {"preprocess.samples.form": "alpaca"})
    heads = [
        Value("description", "名字: tuned", ""),
        Value("task", "chat", ""),
        Value("data.path", "/a/聊天.jsonl", "x"),
    ]
    text = recipe_text("one.yaml", "Tunes it.", [*heads, *values.all()])
    file = tmp_path / "one.yaml"
    file.write_text(text, encoding="utf-8")
    recipe = load_recipe(file)
    for value in [*heads, *values.all()]:
        found: Any = recipe.model_dump(mode="json")
        for part in value.key.split("."):
            found = found[part]
        expected = [{"name": "tuned", "data": []}] if value.key == "train.adapters" else value.value
        assert found == expected, value.key
    for value in values.all():
        assert f"# {value.why}" in text
    keys = list(yaml.safe_load(text))
    assert keys == ["description", "task", "model", "data", "train", "infer", "preprocess"]
    assert list(yaml.safe_load(text)["train"])[:4] == ["epochs", "effective_batch", "learning_rate", "max_length"]


def test_what_is_learnt_leaves_out_what_is_held_out_or_too_long(base: Base) -> None:
    lengths = (100, 300, 10_000, 10_000)
    for cut, expected in ((False, (450, 200.0)), (True, (900, 625.0))):
        asked = {"data.test_fraction": 0.1, "data.validation_fraction": 0.0, "train.max_length": 1050}
        values = choose_values(
            seen(1_000, lengths), base, GPU, {**asked, "train.too_long": "cut" if cut else "leave out"}
        )
        found = learnt(values, seen(1_000, lengths))
        assert (found.samples, found.tokens) == expected
