"""Sizes and token counts of pictures for vision-language models.

Models of the Qwen2-VL family read a picture in patches of `patch_size`, merged `merge_size` by `merge_size` into one
token: both sides become multiples of their product (28 for Qwen2-VL and Qwen2.5-VL), and a picture of W x H costs
W x H / 28 / 28 tokens (arXiv:2409.12191, section 2.1). A pixel budget lowers that.

LLaVA's processor (arXiv:2310.03744) crops every picture to the same square, so each costs the same number of tokens,
and a budget changes nothing.
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
"""Names, or beginnings of names, of the family's picture processors in preprocessor_config.json."""


@dataclass(frozen=True)
class PictureRules:
    """How a model of the Qwen2-VL family reads pictures."""

    factor: int = 28
    """Pixels. Both sides are multiples of it; one token is factor x factor."""
    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28

    def size(self, width: int, height: int, budget: int | None = None) -> tuple[int, int]:
        """Return the pixels (width, height) at which a picture is read, by the family's own rule, `smart_resize`.

        Raises DataError for a shape that no model of the family accepts.
        """
        if max(width, height) > MAX_RATIO * min(width, height):
            raise DataError(f"a picture of {width} x {height} pixels: its sides differ more than {MAX_RATIO} to 1")
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
        return max(math.floor(side / self.factor) * self.factor, self.factor)

    def tokens(self, width: int, height: int) -> int:
        """Return the tokens of a picture that is read at this size."""
        return (width // self.factor) * (height // self.factor)


@dataclass(frozen=True)
class SquareRules:
    """How a LLaVA or MGM reads pictures: each as one square."""

    factor: int
    """Side of a patch, in pixels."""
    tokens_each: int

    def size(self, width: int, height: int, budget: int | None = None) -> tuple[int, int]:
        """Return the picture's own size: the model's processor resizes it."""
        return width, height

    def tokens(self, width: int, height: int) -> int:
        """Return the tokens of a picture, the same for any size."""
        return self.tokens_each


Rules = PictureRules | SquareRules


@dataclass(frozen=True)
class Picture:
    """A picture file and the size, in pixels, at which it is read."""

    path: Path
    width: int
    height: int
    tokens: int = 0
    """Tokens that it costs the model."""

    def load(self) -> "Image":
        """Return the picture in RGB at its size. Raises DataError for a file that is not a picture."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path) as opened:
                opened.draft("RGB", (self.width, self.height))  # decodes a JPEG of twice the size at half size
                picture = opened.convert("RGB")
        except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.path}: not a readable picture ({error}); run preprocess again") from error
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), Image.Resampling.BICUBIC)
        return picture


def family_rules(model: Path) -> Rules | None:
    """Return the rules of a Qwen2-VL, a LLaVA or an MGM; None for any other model."""
    config = _read(model / "config.json")
    processor = _read(model / "preprocessor_config.json")
    if config is not None and config.get("model_type") in ("llava", "mgm") and processor is not None:
        return _square_rules(model, config, processor)
    if processor is None or not str(processor.get("image_processor_type")).startswith(FAMILY):
        return None
    return read_rules(model)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values


def _square_rules(model: Path, config: dict[str, Any], processor: dict[str, Any]) -> SquareRules:
    """Count as LlavaProcessor does: the patches of the square, and the class token unless the strategy drops it."""
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
    """Return a model's rules. Raises UsageError for a model that reads no pictures, or of an unsupported family."""
    return family_rules(model) or read_rules(model)


def read_rules(model: Path) -> PictureRules:
    """Return the rules of a Qwen2-VL model, from its preprocessor_config.json. Raises UsageError for other models."""
    path = model / "preprocessor_config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); {model.name} must be a vision-language model") from error
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
    """Return a picture file with its size by rules and pixel budget. Reads only the header. Raises DataError for a file
    that is not a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: not a readable picture ({error}); run preprocess again") from error
    columns, rows = rules.size(width, height, budget)
    return Picture(path, columns, rows, rules.tokens(columns, rows))
