"""LoRA settings from a file in PEFT's form: what is read, and what is refused because it would be ignored."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import UsageError
from stages.contract.lora_config import apply_lora_config
from stages.contract.recipe import Adapter, Train

RECIPES = Train(adapters=[Adapter(name="a")], rank=3, alpha=5, dropout=0.25, target_modules=["up_proj"], epochs=7.0)


def written(folder: Path, content: Any) -> Path:
    path = folder / "lora.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        apply_lora_config(RECIPES, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def lora(settings: Train) -> tuple[Any, ...]:
    return settings.rank, settings.alpha, settings.dropout, settings.target_modules


def test_pefts_names_take_the_place_of_the_recipes_and_nothing_else_changes(tmp_path: Path) -> None:
    values = {"r": 64, "lora_alpha": 128, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"]}
    found = apply_lora_config(RECIPES, written(tmp_path, values))
    assert lora(found) == (64, 128, 0.1, ["q_proj", "v_proj"]), "sorted: PEFT keeps a set"
    untouched = set(Train.model_fields) - {"rank", "alpha", "dropout", "target_modules"}
    assert all(getattr(found, name) == getattr(RECIPES, name) for name in untouched)


def test_what_the_file_leaves_out_stays_as_the_recipe_has_it(tmp_path: Path) -> None:
    assert lora(apply_lora_config(RECIPES, written(tmp_path, {"r": 64}))) == (64, 5, 0.25, ["up_proj"])
    assert apply_lora_config(RECIPES, written(tmp_path, {})) == RECIPES


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("all-linear", ["all-linear"]),
        (["all-linear"], ["all-linear"]),
        (r".*\.layers\.[12][0-9]\..*_proj", r".*\.layers\.[12][0-9]\..*_proj"),
        (["v_proj", "k_proj", "q_proj"], ["k_proj", "q_proj", "v_proj"]),
    ],
)
def test_modules_are_names_or_one_expression(tmp_path: Path, given: Any, found: Any) -> None:
    settings = apply_lora_config(RECIPES, written(tmp_path, {"target_modules": given}))
    assert settings.target_modules == found


def test_a_whole_number_is_a_dropout(tmp_path: Path) -> None:
    assert apply_lora_config(RECIPES, written(tmp_path, {"lora_dropout": 0})).dropout == 0.0


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    assert apply_lora_config(RECIPES, written(tmp_path, '\ufeff{"r": 64}')).rank == 64


@pytest.mark.parametrize("given", [{"task_type": "CAUSAL_LM"}, {}])
def test_what_peft_writes_is_accepted(tmp_path: Path, given: dict[str, Any]) -> None:
    from peft import LoraConfig

    wanted = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"]}
    LoraConfig(**wanted, **given).save_pretrained(tmp_path)
    assert lora(apply_lora_config(RECIPES, tmp_path / "adapter_config.json")) == (4, 8, 0.1, ["q_proj", "v_proj"])


def test_the_file_beside_an_adapter_of_pefts_is_accepted(tmp_path: Path) -> None:
    """It says what the weights are for and where their base was: an adapter that is trained as another was."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config.inference_mode, config.base_model_name_or_path = True, "somebody/model"
    config.save_pretrained(tmp_path)
    found = apply_lora_config(RECIPES, tmp_path / "adapter_config.json")
    assert lora(found) == (4, 8, 0.0, ["all-linear"])


@pytest.mark.parametrize(
    "asked",
    [
        *({"use_rslora": True}, {"use_dora": True}, {"fan_in_fan_out": True}, {"init_lora_weights": "pissa"}),
        *({"rank_pattern": {"q_proj": 4}}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [0, 1]}),
        *({"exclude_modules": ["v_proj"]}, {"trainable_token_indices": [0]}, {"layer_replication": [[0, 2]]}),
    ],
)
def test_what_peft_writes_of_what_we_would_not_do_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    from peft import LoraConfig

    LoraConfig(r=4, target_modules=["q_proj"], **asked).save_pretrained(tmp_path)
    (key,) = asked
    assert key in refused(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bias": "all"}, "'bias' is 'all', but Lorry trains adapters with 'none' only; write that"),
        ({"use_rslora": True}, "'use_rslora' is True, but Lorry trains adapters with False only; write that"),
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3', but Lorry trains adapters with 'LORA' only; write that"),
        (
            {"task_type": "SEQ_CLS"},
            "'task_type' is 'SEQ_CLS', but Lorry trains adapters with 'CAUSAL_LM' only; write that",
        ),
        ({"lora_alhpa": 16}, "'lora_alhpa' is not supported and would be ignored; did you mean 'lora_alpha'?"),
        ({"lora_droupout": 0}, "'lora_droupout' is not supported and would be ignored; did you mean 'lora_dropout'?"),
        (
            {"rank": 16},
            "'rank' is not supported and would be ignored; supported keys: r, lora_alpha, lora_dropout, target_modules",
        ),
        ({"epochs": 3}, "'epochs' is not supported and would be ignored"),
        ({"r": 0}, "r: found 0; it must be greater than or equal to 1"),
        ({"r": "8"}, "r: found '8'; it must be a valid integer"),
        ({"r": True}, "r: found True; it must be a valid integer"),
        ({"lora_alpha": 16.5}, "lora_alpha: found 16.5; it must be a valid integer"),
        ({"lora_dropout": 1}, "lora_dropout: found 1.0; it must be less than 1"),
        ({"lora_dropout": -0.1}, "lora_dropout: found -0.1; it must be greater than or equal to 0"),
        ({"target_modules": []}, "target_modules: "),
        ({"target_modules": ["q_proj", 3]}, "target_modules: "),
        ({"target_modules": None}, "target_modules: "),
        ([{"r": 8}], 'found a list; write a mapping such as {"r": 8}'),
        ('{"r": 8', "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
    ],
)
def test_a_setting_that_is_not_supported_is_reported_in_one_line(tmp_path: Path, values: Any, message: str) -> None:
    assert refused(written(tmp_path, values)).startswith(message)


def test_a_missing_file_or_one_that_is_no_text_is_reported(tmp_path: Path) -> None:
    message = refused(tmp_path / "nowhere.json")
    assert message == "no such file; set train.lora_config to a file below the data mount"
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x80")
    assert "cannot be read as JSON" in refused(tmp_path / "binary.json")
    assert "cannot be read as JSON" in refused(tmp_path)
