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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract.errors import DataError, UsageError

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
    """Number of tokens that the model sees of it."""

    def load(self) -> "Image":
        """Return the picture in RGB, scaled to `width` x `height`. Raises DataError if the file cannot be read."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path) as opened:
                opened.draft("RGB", (self.width, self.height))  # decode a JPEG of twice this size at half its size
                picture = opened.convert("RGB")
        except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.path}: not a readable picture ({error}); run preprocess again") from error
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return picture


def family_rules(model: Path) -> Rules | None:
    """Return how a Qwen2-VL, LLaVA or MGM model reads pictures; None for any other model.

    `model` is a folder in Hugging Face format. Raises UsageError if a Qwen2-VL's settings are incomplete.
    """
    config = _read(model / "config.json")
    processor = _read(model / "preprocessor_config.json")
    if config is not None and config.get("model_type") in ("llava", "mgm") and processor is not None:
        return _square_rules(model, config, processor)
    if processor is None or not str(processor.get("image_processor_type")).startswith(FAMILY):
        return None
    return read_rules(model)


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
    """Return how a model reads pictures. Raises UsageError if it reads none, or Lorry does not support its family."""
    return family_rules(model) or read_rules(model)


def read_rules(model: Path) -> PictureRules:
    """Return how a Qwen2-VL model reads pictures, from its preprocessor_config.json. Raises UsageError for any other
    model."""
    path = model / "preprocessor_config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); use a vision-language model for pictures") from error
    if "patch_size" not in values or "merge_size" not in values:
        raise UsageError(
            f"{path}: no patch_size and merge_size; for pictures use a model of the Qwen2-VL family, a LLaVA or an MGM"
        )
    size = values.get("size") or {}
    return PictureRules(
        factor=int(values["patch_size"]) * int(values["merge_size"]),
        min_pixels=int(values.get("min_pixels") or size.get("shortest_edge") or PictureRules.min_pixels),
        max_pixels=int(values.get("max_pixels") or size.get("longest_edge") or PictureRules.max_pixels),
    )


def open_picture(path: Path, rules: Rules, budget: int | None = None) -> Picture:
    """Return a picture file with the size and the number of tokens at which the model reads it.

    Reads only the file's header. `budget` limits the number of pixels; None: the model's own limit. Raises DataError if
    the file cannot be read, or no model accepts its shape.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: not a readable picture ({error}); run preprocess again") from error
    columns, rows = rules.size(width, height, budget)
    return Picture(path, columns, rows, rules.tokens(columns, rows))
