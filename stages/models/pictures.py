"""Sizes and token counts of pictures for vision-language models.

Models of the Qwen2-VL family read a picture in patches of `patch_size` pixels a side and merge `merge_size` x
`merge_size` patches into one token. Both sides of the picture are scaled to multiples of the product (28 for Qwen2-VL
and Qwen2.5-VL), so a picture of W x H pixels has W x H / 28 / 28 tokens (arXiv:2409.12191, section 2.1). A pixel budget
lowers this number.

LLaVA's processor (arXiv:2310.03744) crops every picture to the same square. Each picture then has the same number of
tokens, and a budget changes nothing.
"""

import json
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from stages.contract.errors import DataError, UsageError
from stages.contract.machine_errors import raise_machine_fault

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_RATIO = 200
"""Largest ratio of the sides that the Qwen2-VL family's processors accept."""


FAMILY = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
"""How the names of the Qwen2-VL family's picture processors in preprocessor_config.json begin."""


@dataclass(frozen=True)
class PictureRules:
    """How a model of the Qwen2-VL family reads pictures."""

    factor: int = 28
    """Side of one token, in pixels. Both sides of a picture are scaled to multiples of it."""
    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28

    def size(self, width: int, height: int, budget: int | None = None) -> tuple[int, int]:
        """Return the (width, height) in pixels at which the model reads a picture of this size.

        `budget` limits the number of pixels; None: the model's own limit. The rule is `smart_resize` of transformers'
        Qwen2-VL processor. Raises DataError if one side is more than MAX_RATIO times the other.
        """
        if max(width, height) > MAX_RATIO * min(width, height):
            raise DataError(
                f"a picture of {width} x {height} pixels: its sides differ more than {MAX_RATIO} to 1; crop it"
            )
        limit = min(budget or self.max_pixels, self.max_pixels)
        columns, rows = (max(round(side / self.factor) * self.factor, self.factor) for side in (width, height))
        if columns * rows > limit:
            shrink = math.sqrt(width * height / limit)
            columns, rows = (self._floor(side / shrink) for side in (width, height))
        elif columns * rows < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            columns, rows = (math.ceil(side * grow / self.factor) * self.factor for side in (width, height))
        return columns, rows

    def _floor(self, side: float) -> int:
        """Return a side rounded down to a multiple of the factor, and at least the factor."""
        return max(math.floor(side / self.factor) * self.factor, self.factor)

    def tokens(self, width: int, height: int) -> int:
        """Return the number of tokens of a picture. `width` and `height` are what `size` returned."""
        return (width // self.factor) * (height // self.factor)


@dataclass(frozen=True)
class SquareRules:
    """How a LLaVA or MGM reads pictures: each as one square."""

    factor: int
    """Side of a patch, in pixels."""
    tokens_each: int
    """Number of tokens of every picture."""

    def size(self, width: int, height: int, budget: int | None = None) -> tuple[int, int]:
        """Return the picture's own (width, height) in pixels: the model's processor resizes it later."""
        return width, height

    def tokens(self, width: int, height: int) -> int:
        """Return the number of tokens of a picture, the same for any size."""
        return self.tokens_each


Rules = PictureRules | SquareRules


@dataclass(frozen=True)
class Picture:
    """A picture file and the size, in pixels, at which the model reads it."""

    path: Path
    width: int
    height: int
    tokens: int = 0
    """Number of tokens that the model gets for it."""

    def load(self) -> "Image":
        """Return the picture in RGB, scaled to `width` x `height`. Raises DataError if the file cannot be read."""
        from PIL import Image

        picture = read_picture(self.path, (self.width, self.height))
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return picture


# -- files -------------------------------------------------------------------------------------------------------

ORIENTATION = 0x0112
"""EXIF's tag for how the camera was held."""
ON_ITS_SIDE = (5, 6, 7, 8)
"""Values of this tag for a picture whose width, when upright, is the height of the file's pixels."""

BAD_PICTURE: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, EOFError, struct.error, zlib.error),
)
"""What Pillow raises for a file that is not a picture, or damaged, besides DecompressionBombError."""


def read_picture(file: Path | BinaryIO, least: tuple[int, int] | None = None) -> "Image":
    """Return a picture file as a person sees it, in RGB: upright by its EXIF orientation, transparent parts over white,
    more than 8 bits a channel scaled to 8, and only the first frame of an animation. Its `format` is the file's.

    A JPEG may be decoded smaller, but no smaller than `least` (width, height), which is faster. Raises DataError for a
    file that is not a picture, or damaged. All of Lorry opens pictures here or with `picture_size`.
    """
    with _open_picture_file(file) as opened:
        orientation = _orientation(opened)
        if least is not None:
            opened.draft("RGB", least[::-1] if orientation in ON_ITS_SIDE else least)
        opened.load()
        picture = _rgb_picture(_upright_picture(opened, orientation))
        picture.format = opened.format
    return picture


def picture_size(file: Path | BinaryIO) -> tuple[int, int]:
    """Return the (width, height) of a picture in pixels, upright by its EXIF orientation. Reads only the header.

    Raises DataError for a file that is not a picture.
    """
    with _open_picture_file(file) as opened:
        width, height = opened.size
        return (height, width) if _orientation(opened) in ON_ITS_SIDE else (width, height)


@contextmanager
def _open_picture_file(file: Path | BinaryIO) -> Iterator[Any]:
    """Within this context, a picture file is open with Pillow. Raises DataError if opening or using it fails."""
    from PIL import Image

    bad: tuple[type[Exception], ...] = (*BAD_PICTURE, Image.DecompressionBombError)
    try:
        with Image.open(file) as opened:
            yield opened
    except bad as error:
        raise_machine_fault(error)
        name = file if isinstance(file, Path) else "picture"
        raise DataError(f"{name}: not a readable picture ({error}); run preprocess again") from error


def _orientation(opened: Any) -> int:
    """A picture's EXIF orientation, 1 (upright) to 8. It is 1 for TIFF, and if EXIF data are missing or damaged."""
    from PIL.Image import Image

    if opened.format == "TIFF":  # Pillow itself turns these upright
        return 1
    try:
        # not the PNG class's own method, which decodes all pixels to find EXIF data after them
        return int(Image.getexif(opened).get(ORIENTATION, 1))
    except BAD_PICTURE:
        return 1


def _upright_picture(picture: Any, orientation: int) -> Any:
    """The picture, rotated or mirrored to be upright. `orientation` is its EXIF orientation."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def _rgb_picture(picture: Any) -> "Image":
    """The picture in RGB, over white and scaled to 8 bits: `convert` alone drops transparency and clips 16 bits."""
    from PIL import Image

    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _picture_in_8_bits(picture)
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    rgb: Image.Image = picture.convert("RGB")
    return rgb


def _picture_in_8_bits(picture: Any) -> "Image":
    """A grey picture of 16 or 32 bits, integers or floats, scaled to 8 bits.

    The full range is 0 to 65,535 for integers, and 0 to 1 or 0 to 255 for floats. If some values lie outside, the range
    from the least to the greatest value is scaled. NaN and infinite values count as 0.
    """
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0.0, neginf=0.0)
    least, most = float(values.min()), float(values.max())
    ranges = [(0.0, 1.0), (0.0, 255.0)] if picture.mode == "F" else [(0.0, 65_535.0)]
    fitting = [(low, high) for low, high in ranges if low <= least and most <= high]
    low, high = fitting[0] if fitting else (least, most)
    return Image.fromarray(np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8))


# -- a model's rules ---------------------------------------------------------------------------------------------


def family_rules(model: Path) -> Rules | None:
    """Return how a Qwen2-VL, LLaVA or MGM model reads pictures; None for any other model, or one without a
    preprocessor_config.json.

    `model` is a folder in Hugging Face format. Raises UsageError if a Qwen2-VL's settings are incomplete.
    """
    config = _read(model / "config.json")
    processor = _read(model / "preprocessor_config.json")
    if config is not None and config.get("model_type") in ("llava", "mgm") and processor is not None:
        return _square_rules(model, config, processor)
    if processor is None or not str(processor.get("image_processor_type")).startswith(FAMILY):
        return None
    return read_rules(model)


def is_read_in_training(model: Path) -> bool:
    """Whether Lorry itself reads a model's pictures in training, by `family_rules`.

    Not if its decoder layers read them too, as Qwen3-VL's do (`deepstack_visual_indexes` in its config.json).
    """
    vision = (_read(model / "config.json") or {}).get("vision_config") or {}
    return family_rules(model) is not None and not vision.get("deepstack_visual_indexes")


def _read(path: Path) -> dict[str, Any] | None:
    """Return the values in a JSON file; None if it cannot be read."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values


def _square_rules(model: Path, config: dict[str, Any], processor: dict[str, Any]) -> SquareRules:
    """Return the rules of a LLaVA or MGM. Tokens are counted as in transformers' LlavaProcessor: the patches of the
    square, and the class token unless the feature strategy drops it."""
    own = {**config, **(_read(model / "processor_config.json") or {})}
    patch = int(own.get("patch_size") or config["vision_config"]["patch_size"])
    crop = processor.get("crop_size") or processor.get("size") or {}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    image = int(config["vision_config"]["image_size"])
    patches = (int(crop.get("height") or image) // patch) * (int(crop.get("width") or image) // patch)
    extra = int(own.get("num_additional_image_tokens", 1))
    dropped = own.get("vision_feature_select_strategy", "default") == "default"
    return SquareRules(patch, patches + extra - dropped)


def rules_of(model: Path) -> Rules:
    """Return how a model reads pictures. Raises UsageError if it reads none, or Lorry does not know its rules."""
    return family_rules(model) or read_rules(model)


def read_rules(model: Path) -> PictureRules:
    """Return how a Qwen2-VL model reads pictures, from its preprocessor_config.json. Raises UsageError if the file
    cannot be read, or has no patch_size or merge_size."""
    path = model / "preprocessor_config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); use a vision-language model for pictures") from error
    missing = [name for name in ("patch_size", "merge_size") if name not in values]
    if missing:
        raise UsageError(
            f"{path}: no {' and '.join(missing)}; for pictures use a model of the Qwen2-VL family, a LLaVA or an MGM"
        )
    size = values.get("size") or {}
    return PictureRules(
        factor=int(values["patch_size"]) * int(values["merge_size"]),
        min_pixels=int(values.get("min_pixels") or size.get("shortest_edge") or PictureRules.min_pixels),
        max_pixels=int(values.get("max_pixels") or size.get("longest_edge") or PictureRules.max_pixels),
    )


def open_picture(path: Path, rules: Rules, budget: int | None = None) -> Picture:
    """Return a picture file with the size at which the model reads it, and its number of tokens.

    Reads only the file's header. `budget` limits the number of pixels; None: the model's own limit. Raises DataError if
    the file cannot be read, or `rules` do not accept the ratio of its sides.
    """
    width, height = picture_size(path)
    columns, rows = rules.size(width, height, budget)
    return Picture(path, columns, rows, rules.tokens(columns, rows))
