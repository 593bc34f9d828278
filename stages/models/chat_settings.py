"""Which chat template a run uses, and what it sets for it: the recipe's keys, and one date for the whole run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import digest_of, read_json
from stages.contract.run import Run

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML. An answer ends with the tokenizer's end token too: a base model does not stop at `<|im_end|>`."""

PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ 'User:\\n' + message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""Roles in plain words. It needs no control word but the tokenizer's end token."""

NAMED = {"chatml": CHATML, "plain": PLAIN}
"""The templates that `model.chat_template` can name (`stages.contract.recipe.CHAT_TEMPLATES`)."""


@dataclass(frozen=True)
class ChatSettings:
    """What a run sets for the chat template of its model."""

    template: str | None = None
    """Jinja text that replaces the model's own; None: the model's own."""
    named: bool = False
    """Whether `template` is one of NAMED. These leave the tokenizer's first token to Lorry."""
    enable_thinking: bool | None = None
    """Value of the template's variable of this name; None: not set."""
    date: str | None = None
    """The date (ISO 8601) that the template writes as today's; None: today's."""

    @property
    def facts(self) -> dict[str, Any]:
        """What changes prompts, for the manifest and for keys; empty for a model's own template as it is."""
        found = {
            "template": self.template and digest_of(self.template),
            "enable_thinking": self.enable_thinking,
            "date": self.date,
        }
        return {name: value for name, value in found.items() if value is not None}


def chat_settings(run: Run) -> ChatSettings:
    """What a run's recipe sets for the chat template, with the run's date if the template writes one.

    Raises UsageError if the recipe's template file cannot be read, and the errors of `Run.prompt_date`.
    """
    wanted = run.recipe.model
    template, file = NAMED.get(wanted.chat_template or ""), run.chat_template_file
    if file is not None:
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{file}: cannot be read ({error}); set model.chat_template to a text file below LORRY_MODELS"
                f" ({run.roots.models})"
            ) from error
    named = wanted.chat_template in NAMED
    text = template or read_template(run.roots.models / wanted.path) or ""
    date = run.prompt_date() if "strftime_now" in text else None
    return ChatSettings(template, named, wanted.enable_thinking, date)


def read_template(model: Path) -> str | None:
    """The chat template in a model folder; None if it has none. Of several, the one named `default`."""
    file = model / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found: Any = (read_json(model / "tokenizer_config.json") or {}).get("chat_template")
    found = found or (read_json(model / "chat_template.json") or {}).get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found or None
