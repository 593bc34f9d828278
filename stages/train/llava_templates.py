"""ms-swift's templates for LLaVAs that follow the chat template in the model's folder, pictures where the message has
them. Importing this registers them: `model.swift_template` may then name

* llava_chatml: `<|im_start|>user\\n...<|im_end|>\\n`, as tiny-llava's,
* llava_vicuna: `USER: ... ASSISTANT:`, as in published LLaVA-1.5s; ms-swift's own llava1_5_hf breaks the line before
  ASSISTANT, which those chat templates do not.
"""

from typing import Any

from swift.template.register import TemplateMeta, register_template
from swift.template.templates.llava import LlavaHfTemplate
from swift.template.templates.utils import ChatmlTemplateMeta


class _InPlace(LlavaHfTemplate):  # type: ignore[misc]
    """A picture's token stands where `<image>` does, with no line broken after it."""

    def replace_tag(self, media_type: str, index: int, inputs: Any) -> list[Any]:
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
