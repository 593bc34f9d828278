"""What becomes of the data's own words before a model reads them, and the language that they are in."""

import re


def is_chinese(text: str) -> bool:
    """Whether a text holds a Chinese character."""
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def plain(text: str) -> str:
    """Break up what ms-swift would take for a placeholder, and a tokenizer for a token of its own: data have none."""
    return re.sub(r"<(?=(?:image|video|audio|bbox|ref-object)>|\|)", "< ", text)
