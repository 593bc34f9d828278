"""Text from the data: its language, and how it is made safe for a prompt."""

import re


def is_chinese(text: str) -> bool:
    """Whether a text contains a Chinese character."""
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def break_placeholders(text: str) -> str:
    """The text with a space inside all that ms-swift would read as a placeholder, or a tokenizer as a special token."""
    return re.sub(r"<(?=(?:image|video|audio|bbox|ref-object)>|\|)", "< ", text)
