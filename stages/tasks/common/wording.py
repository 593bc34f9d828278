"""The language of a text from the data."""

import re


def is_chinese(text: str) -> bool:
    """Whether a text contains a Chinese character."""
    return re.search(r"[\u4e00-\u9fff]", text) is not None
