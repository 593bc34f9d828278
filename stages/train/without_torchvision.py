"""The Qwen2-VL family in ms-swift without torchvision, which is not installed with torch's CPU build.

Pictures do not need torchvision: qwen_vl_utils imports it for videos, and transformers' processors of this family
require a video processor. This module makes the import succeed, and builds a processor for pictures and text only.
"""

import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any


def patch_missing_torchvision() -> None:
    """Patch qwen_vl_utils, transformers and ms-swift so that the family's models load without torchvision.

    Does nothing if torchvision is installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    if importlib.util.find_spec("qwen_vl_utils") is not None:
        _import_picture_utils()
    _load_processors_without_videos()
    import swift.template.base

    swift.template.base.rescale_image = rescaled_picture


def _import_picture_utils() -> None:
    """Import qwen_vl_utils with empty modules in place of torchvision's, which only its video functions use.

    Removes these modules afterwards: other libraries must not take torchvision for installed.
    """
    names = {"torchvision": ("io", "transforms"), "torchvision.transforms": ("InterpolationMode",)}
    for name, members in names.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, None)
        sys.modules[name] = module
    try:
        importlib.import_module("qwen_vl_utils")
    finally:
        for name in names:
            del sys.modules[name]


def _load_processors_without_videos() -> None:
    """Patch transformers' AutoProcessor to load the Qwen2-VL family's processors without their part for videos."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin

    class PictureProcessor(ProcessorMixin):  # type: ignore[misc]
        """The tokenizer and the picture processor of one model."""

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, **others: Any) -> None:
            super().__init__(image_processor, tokenizer, **others)

    load = AutoProcessor.from_pretrained

    def from_pretrained(folder: Any, **options: Any) -> Any:
        """Load the processor of the model in a folder; for the Qwen2-VL family, without its part for videos."""
        preprocessor = Path(folder) / "preprocessor_config.json"
        if not preprocessor.is_file() or "Qwen2VLImageProcessor" not in preprocessor.read_text(encoding="utf-8"):
            return load(folder, **options)
        pictures = AutoImageProcessor.from_pretrained(folder, **options)
        return PictureProcessor(pictures, AutoTokenizer.from_pretrained(folder, **options))

    AutoProcessor.from_pretrained = from_pretrained  # type: ignore[assignment, method-assign]


def rescaled_picture(picture: Any, max_pixels: int) -> Any:
    """Return a PIL picture scaled down to at most `max_pixels` pixels, in the same aspect ratio.

    Returns a picture that is small enough unchanged, and every picture if `max_pixels` is None, 0 or less.

    Replaces torchvision's Resize in ms-swift.
    """
    from PIL import Image

    width, height = picture.size
    if max_pixels is None or max_pixels <= 0 or width * height <= max_pixels:
        return picture
    shrink = math.sqrt(max_pixels / (width * height))
    size = max(int(width * shrink), 1), max(int(height * shrink), 1)  # rounded down, as in Resize: within the budget
    return picture.resize(size, Image.Resampling.BILINEAR)
