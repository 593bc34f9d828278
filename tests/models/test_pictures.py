"""Pixel budgets: sizes follow the Qwen2-VL family's own rule."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages.contract.errors import DataError, UsageError
from stages.models.pictures import Picture, PictureRules, family_rules, is_read_in_training, open_picture, read_rules

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


# -- pictures as people have them --------------------------------------------------------------------------------

UPRIGHT = Image.new("RGB", (84, 56), "white")
UPRIGHT.paste("red", (0, 0, 42, 28))  # the upper left quarter
STORED = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""By orientation, Pillow's transposition of the upright picture into the file's pixels."""


def loaded(path: Path) -> Image.Image:
    """The picture as a model gets it, at its own size."""
    picture = open_picture(path, PictureRules(min_pixels=28 * 28))
    return picture.load()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_read_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    turn = STORED[orientation]
    stored = UPRIGHT if turn is None else UPRIGHT.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{kind.lower()}"
    stored.save(path, kind, exif=exif.tobytes())
    found = loaded(path)
    assert found.size == UPRIGHT.size
    corners = [found.getpixel(place) for place in ((5, 5), (80, 5), (5, 50), (80, 50))]
    assert [corner[1] < 128 for corner in corners] == [True, False, False, False]  # type: ignore[index]


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0garbage, no TIFF", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"])
def test_damaged_exif_data_leave_the_picture_as_it_is(tmp_path: Path, exif: bytes) -> None:
    UPRIGHT.save(tmp_path / "photo.jpg", exif=exif)
    assert loaded(tmp_path / "photo.jpg").size == UPRIGHT.size


def ramp(kind: Any, low: float, high: float) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 56 * 56).reshape(56, 56).astype(kind))


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("16.png", ramp(np.uint16, 0, 65_535)),
        ("16.tif", ramp(np.uint16, 0, 65_535)),
        ("16-big-endian.tif", ramp(">u2", 0, 65_535)),
        ("32.tif", ramp(np.int32, -(2**20), 2**20)),
        ("unit.tif", ramp(np.float32, 0, 1)),
        ("bytes.tif", ramp(np.float32, 0, 255)),
        ("far.tif", ramp(np.float32, -3000, 3000)),
    ],
)
def test_more_than_8_bits_are_scaled_and_not_clipped(tmp_path: Path, name: str, picture: Image.Image) -> None:
    picture.save(tmp_path / name)
    values = np.asarray(loaded(tmp_path / name))[..., 0].ravel()
    assert np.abs(values - np.linspace(0, 255, values.size)).max() <= 1


def transparent(mode: str) -> Image.Image:
    """Black, and transparent in its left half."""
    picture = Image.new("RGBA", (56, 56), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 28, 56))
    return picture.convert(mode)


def keyed(mode: str, colours: tuple[Any, Any]) -> Image.Image:
    """A picture of two colours, side by side."""
    picture = Image.new(mode, (56, 56), colours[1])
    picture.paste(colours[0], (0, 0, 28, 56))
    return picture


PALETTE = keyed("P", (0, 1))
PALETTE.putpalette([0, 0, 0, 0, 0, 0])
TRANSPARENT: list[tuple[str, Image.Image, dict[str, Any]]] = [
    ("rgba.png", transparent("RGBA"), {}),
    ("la.png", transparent("LA"), {}),
    ("rgba.webp", transparent("RGBA"), {"lossless": True}),
    ("rgba.tif", transparent("RGBA"), {}),
    ("palette.png", PALETTE, {"transparency": 0}),
    ("palette.gif", PALETTE, {"transparency": 0}),
    ("palette-alpha.png", PALETTE, {"transparency": b"\0\xff"}),
    ("grey-key.png", keyed("L", (1, 0)), {"transparency": 1}),
    ("colour-key.png", keyed("RGB", ((1, 2, 3), (0, 0, 0))), {"transparency": (1, 2, 3)}),
]


@pytest.mark.parametrize(("name", "picture", "options"), TRANSPARENT, ids=[name for name, *_ in TRANSPARENT])
def test_what_is_transparent_is_white(tmp_path: Path, name: str, picture: Image.Image, options: dict[str, Any]) -> None:
    picture.save(tmp_path / name, **options)
    found = loaded(tmp_path / name)
    assert (found.mode, found.getpixel((5, 30)), found.getpixel((50, 30))) == ("RGB", (255,) * 3, (0,) * 3)


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (56, 56), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert loaded(tmp_path / "half.png").getpixel((9, 9)) == pytest.approx((255, 127, 127), abs=1)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert loaded(tmp_path / name).getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=2)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_printers_colours_become_rgb(tmp_path: Path, name: str) -> None:
    Image.new("CMYK", (56, 56), (0, 255, 255, 0)).save(tmp_path / name)
    assert loaded(tmp_path / name).getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=2)


def test_a_large_photo_that_lies_on_its_side_is_decoded_small_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    large = UPRIGHT.resize((2100, 1400)).transpose(Image.Transpose.ROTATE_90)
    large.save(tmp_path / "photo.jpg", exif=exif.tobytes())
    picture = open_picture(tmp_path / "photo.jpg", PictureRules(), 28 * 28 * 100)
    assert picture.width > picture.height
    found = picture.load()
    assert found.size == (picture.width, picture.height)
    assert [found.getpixel((9, 9))[1] < 128, found.getpixel((9, found.height - 9))[1] < 128] == [True, False]  # type: ignore[index]


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


@pytest.mark.parametrize(("vision", "is_read"), [({"depth": 32}, True), ({"deepstack_visual_indexes": [8, 16]}, False)])
def test_pictures_that_decoder_layers_read_too_are_not_read_here_in_training(
    vision: dict[str, Any], is_read: bool, tmp_path: Path
) -> None:
    """As Qwen3-VL's, whose preprocessor_config.json names the processor of Qwen2-VL."""
    processor = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "merge_size": 2}
    processor |= {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen_vl", "vision_config": vision}))
    assert family_rules(tmp_path) is not None and is_read_in_training(tmp_path) == is_read
