"""MGM's input: pictures padded to a square of 768 pixels, and conversations in Gemma's turns.

transformers' LLaVA processor does both. The model gets only this large picture, and scales it down for its
low-resolution tower, as the published code does.
"""

from typing import Any

from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from stages.models.mgm.configuration import MgmConfig

IMAGE_TOKEN = "<image>"
RESERVED_TOKEN = "<unused0>"
"""An unused token of Gemma's. It becomes the image token, because an id inside the vocabulary works in every lookup."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ raise_exception('MGM has no system turn') }}{%- endif -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\\n' -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
"""The published `gemma` conversation: Gemma's turns, with <eos> after each turn of the model."""


def make_processor(config: MgmConfig, tokenizer: Any) -> LlavaProcessor:
    """Return the processor for a model with this config. It repeats each `<image>` once per visual token of its
    picture."""
    side = config.vision_config_aux.image_size
    pictures = LlavaImageProcessorPil(
        do_pad=True,  # to a square, with the mean colour: `pad` is image_aspect_ratio in the published configs
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=config.pixels_across,
        vision_feature_select_strategy="full",  # there is no class token to subtract
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
