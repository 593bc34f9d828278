"""What a finished adapter says of its base."""

from pathlib import Path

import pytest

from stages.contract.files import write_json
from stages.train.model_card import adapter_card, base_name


def cached_model(folder: Path) -> Path:
    """A model in a hub's cache: its files are links to blobs. Returns its folder."""
    repository = folder / "hub" / "models--Qwen--Qwen2.5-0.5B"
    snapshot = repository / "snapshots" / "7ae557"
    snapshot.mkdir(parents=True)
    write_json(repository / "blobs" / "c0ffee", {"model_type": "qwen2"})
    (snapshot / "config.json").symlink_to(repository / "blobs" / "c0ffee")
    return snapshot


def test_a_base_below_the_mount_has_the_recipes_name(tmp_path: Path) -> None:
    write_json(tmp_path / "Qwen2.5-0.5B" / "config.json", {})
    assert base_name(tmp_path / "Qwen2.5-0.5B", "Qwen2.5-0.5B") == ("Qwen2.5-0.5B", None)


def test_a_base_in_the_hubs_cache_has_the_hubs_name(tmp_path: Path) -> None:
    snapshot = cached_model(tmp_path)
    (tmp_path / "linked").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "linked"):
        assert base_name(folder, "linked") == ("Qwen/Qwen2.5-0.5B", "7ae557")
    with_connector = tmp_path / "with-connector"  # a folder of links to the base's files
    with_connector.mkdir()
    (with_connector / "config.json").symlink_to(snapshot / "config.json")
    assert base_name(with_connector, "linked") == ("Qwen/Qwen2.5-0.5B", None)


@pytest.mark.parametrize("sees", [False, True])
def test_the_card_says_how_to_load_both(tmp_path: Path, sees: bool) -> None:
    write_json(tmp_path / "config.json", {"vision_config": {"depth": 2}} if sees else {})
    card = adapter_card("Qwen2.5-0.5B", {"r": 12, "lora_alpha": 24}, tmp_path, has_connector=sees)
    assert card.startswith("---\nbase_model: Qwen2.5-0.5B\nlibrary_name: peft\n---\n")
    assert ("AutoModelForImageTextToText" if sees else "AutoModelForCausalLM") in card
    assert "--max-lora-rank 16 " in card, "vLLM refuses 12"
    assert ("connector.safetensors" in card) is sees
    assert str(tmp_path) not in card, "the same on every machine"
