"""The chat template that a tuned model's folder gets, so that other programs render what training rendered.

The folder's own template does, unless the recipe sets another one, or a value for a variable of the template.
"""

from pathlib import Path

from stages.contract.files import read_json, write_json
from stages.models.chat_settings import ChatSettings, read_template

FILE = "chat_template.jinja"
"""The file that transformers and vLLM read."""

OLDER_FILE = "chat_template.json"
"""The file in which older processors have their template."""


def saved_template(model: Path, settings: ChatSettings) -> str | None:
    """The chat template of a model tuned with these settings; None if the base's own renders the same.

    Lorry's own templates leave the tokenizer's first token to Lorry, which other programs do not add to a rendered
    template. The recipe's enable_thinking becomes the default, which a request can still change.
    """
    if settings.template is None and settings.enable_thinking is None:
        return None
    text = settings.template or read_template(model) or ""
    if settings.named and _adds_first_token(model):
        text = "{{ bos_token }}" + text
    if settings.enable_thinking is not None:
        value = str(settings.enable_thinking).lower()
        text = f"{{%- if enable_thinking is not defined %}}{{% set enable_thinking = {value} %}}{{% endif -%}}\n{text}"
    return text


def put_template(folder: Path, text: str) -> None:
    """Make this the chat template of a folder, in place of one in any of the files that libraries read."""
    (folder / FILE).write_text(text, encoding="utf-8")
    (folder / OLDER_FILE).unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if config is not None and config.pop("chat_template", None) is not None:
        write_json(path, config)


def _adds_first_token(model: Path) -> bool:
    """Whether the tokenizer begins every text with its first token."""
    from stages.models.rendering import load_tokenizer

    tokenizer = load_tokenizer(model)
    return tokenizer.bos_token is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
