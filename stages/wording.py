"""What becomes of the data's own words before a model reads them."""

import re


def plain(text: str) -> str:
    """Break up what ms-swift would take for a placeholder, and a tokenizer for a token of its own: data have none."""
    return re.sub(r"<(?=(?:image|video|audio|bbox|ref-object)>|\|)", "< ", text)
