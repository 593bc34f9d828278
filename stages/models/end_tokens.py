"""Which tokens end a completion: those that the tokenizer and the model's generation_config.json name."""

from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import read_json


def end_tokens(model: Path, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end a completion of the model in a folder: the tokenizer's, then those of
    generation_config.json; without that file, those of config.json, as transformers and vLLM read them.

    Phi-3 and Gemma end a turn with a token that only generation_config.json names. Raises UsageError if there is none.
    """
    config = read_json(model / "config.json") or {}
    configured = read_json(model / "generation_config.json")
    if configured is None:
        configured = {**(config.get("text_config") or {}), **config}
    found = configured.get("eos_token_id")
    named = [tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])]
    ends = [token for token in dict.fromkeys(named) if token is not None]
    if not ends:
        raise UsageError(
            f"{model}: neither tokenizer nor generation_config.json names an end token, so no answer would end; set"
            " eos_token_id in generation_config.json"
        )
    return ends
