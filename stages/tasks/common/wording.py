"""Text from the data: its language, and how it is made safe for a prompt."""

import re


def is_chinese(text: str) -> bool:
    """Whether a text contains a Chinese character."""
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def break_placeholders(text: str) -> str:
    """The text with a space inserted into ms-swift's placeholders and special tokens, so that they are read as text."""
    return re.sub(r"<(?=(?:image|video|audio|bbox|ref-object)>|\|)", "< ", text)
