"""Pixel budgets: sizes follow the Qwen2-VL family's own rule."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages.contract.errors import DataError, UsageError
from stages.models.pictures import Picture, PictureRules, open_picture, read_rules

sides = st.integers(1, 5000)


@cache
def own_rule() -> Callable[..., tuple[int, int]]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    return smart_resize


@given(sides, sides, st.none() | st.integers(28 * 28, 3_000_000))
def test_sizes_are_those_of_the_familys_processor(width: int, height: int, budget: int | None) -> None:
    rules = PictureRules()
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(DataError, match="sides differ more than 200 to 1"):
            rules.size(width, height, budget)
        return
    limit = min(budget or rules.max_pixels, rules.max_pixels)
    found = rules.size(width, height, budget)
    assert found[0] % 28 == found[1] % 28 == 0 and min(found) >= 28
    if min(width, height) >= 28:  # for sides below a patch the family's own rule returns 0
        rows, columns = own_rule()(height, width, 28, rules.min_pixels, limit)
        assert found == (columns, rows)
        assert found[0] * found[1] <= limit or found[0] == 28 or found[1] == 28 or limit < rules.min_pixels


def test_a_size_by_the_rule_stays_the_same_when_the_rule_is_applied_again() -> None:
    rules = PictureRules()
    once = rules.size(4960, 7016, 1_568_000)
    assert rules.size(*once, 1_568_000) == once
    assert rules.tokens(*once) == once[0] // 28 * (once[1] // 28) <= 2000


def test_a_picture_is_read_at_its_size(tmp_path: Path) -> None:
    Image.new("L", (600, 300)).save(tmp_path / "page.jpg")
    picture = open_picture(tmp_path / "page.jpg", PictureRules(), 28 * 28 * 50)
    assert picture.width * picture.height <= 28 * 28 * 50
    assert picture.tokens == picture.width * picture.height // 784
    loaded = picture.load()
    assert (loaded.mode, loaded.size) == ("RGB", (picture.width, picture.height))


def test_a_file_that_is_not_a_picture_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    for name in ("torn.jpg", "gone.jpg"):
        with pytest.raises(DataError, match=f"{name}: not a readable picture .*run preprocess again"):
            open_picture(tmp_path / name, PictureRules())
        with pytest.raises(DataError, match=f"{name}: not a readable picture"):
            Picture(tmp_path / name, 28, 28).load()


def test_rules_come_from_the_models_folder(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    with pytest.raises(UsageError, match=r"preprocessor_config.json: cannot be read"):
        read_rules(tmp_path)
    path.write_text(json.dumps({"size": {"shortest_edge": 224}}))
    with pytest.raises(
        UsageError, match="no patch_size and merge_size; for pictures use a model of the Qwen2-VL family"
    ):
        read_rules(tmp_path)
    patches = {"patch_size": 16, "merge_size": 2}  # Qwen3-VL's
    path.write_text(json.dumps({**patches, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}))
    assert read_rules(tmp_path) == PictureRules(32, 65536, 16777216)
    path.write_text(json.dumps({**patches, "min_pixels": 3136, "max_pixels": 12845056}))
    assert read_rules(tmp_path) == PictureRules(32, 3136, 12845056)
