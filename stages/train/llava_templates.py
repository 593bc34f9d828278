"""ms-swift templates for LLaVAs. They match the chat template in the model's folder and keep each picture's place in
the message. Importing this module registers two values of `model.swift_template`:

* llava_chatml: `<|im_start|>user\\n...<|im_end|>\\n`, for tiny-llava
* llava_vicuna: `USER: ... ASSISTANT:`, for the published LLaVA-1.5 models. ms-swift's own llava1_5_hf adds a line break
  before ASSISTANT, which their chat template does not have.
"""

from typing import Any

from swift.template.register import TemplateMeta, register_template
from swift.template.templates.llava import LlavaHfTemplate
from swift.template.templates.utils import ChatmlTemplateMeta


class _InPlace(LlavaHfTemplate):  # type: ignore[misc]
    """Replaces `<image>` in a message by a picture's token alone. ms-swift's class adds a line break."""

    def replace_tag(self, media_type: str, index: int, inputs: Any) -> list[Any]:
        """The pieces of a prompt that replace a picture's tag."""
        return ["<image>"]


register_template(ChatmlTemplateMeta("llava_chatml", template_cls=_InPlace), exist_ok=True)
register_template(
    TemplateMeta(
        "llava_vicuna",
        prefix=[["bos_token_id"]],
        prompt=["USER: {{QUERY}} ASSISTANT:"],
        chat_sep=[["eos_token_id"]],
        suffix=[["eos_token_id"]],
        system_prefix=[["bos_token_id"], "{{SYSTEM}} "],
        template_cls=_InPlace,
    ),
    exist_ok=True,
)
