"""Models with chat templates of the published kinds: SmolLM2's tokenizer with other control words, and no weights.

The templates are written for these tests. Each has what makes its kind hard: see its docstring.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import need_model


@dataclass(frozen=True)
class Kind:
    """A kind of chat template, and the control words of its tokenizer."""

    template: str | None
    words: tuple[str, ...]
    """Special tokens that are added to the vocabulary."""
    end: str
    """The tokenizer's end token."""
    further_ends: tuple[str, ...] = ()
    """End tokens of the generation config only."""
    tags: tuple[str, ...] = ()
    """Added tokens that are not special, such as `<think>`."""


CHATML = Kind(
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    (),
    "<|im_end|>",
)
"""Writes a system prompt of its own if there is none."""

HYBRID = Kind(
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}"
    "{%- for m in messages -%}"
    "{%- set thought = '' -%}{%- set said = m.content -%}"
    "{%- if m.role == 'assistant' and '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}"
    "{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}"
    "{%- endif -%}"
    "{{- said + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}",
    (),
    "<|im_end|>",
    tags=("<think>", "</think>"),
)
"""As Qwen3: thinks unless `enable_thinking` is false, and leaves out the thoughts of earlier turns."""

REASONER = Kind(
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- m.content -}}"
    "{%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}"
    "{%- else -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1].lstrip('\n') + '<|end_of_text|>' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}",
    ("<|begin|>", "<|User|>", "<|Assistant|>", "<|end_of_text|>"),
    "<|end_of_text|>",
    tags=("<think>", "</think>"),
)
"""As DeepSeek-R1: the prompt begins the thoughts, and a finished turn never has them, not even the last one."""

DATED = Kind(
    "{{- bos_token -}}{%- if not date_string is defined -%}"
    "{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{{- '<|head|>system<|tail|>\n\nToday: ' + date_string + '\n\n' + system + '<|eot|>' -}}"
    "{%- for m in messages -%}"
    "{{- '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim + '<|eot|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|head|>assistant<|tail|>\n\n' -}}{%- endif -%}",
    ("<|begin|>", "<|head|>", "<|tail|>", "<|eot|>", "<|eos|>"),
    "<|eos|>",
    ("<|eot|>",),
)
"""As Llama 3: trims contents, writes today's date, and the end token stands in the generation config only."""

NO_SYSTEM = Kind(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<|begin|>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
    "<eos>",
    ("<end_of_turn>",),
)
"""As Gemma: refuses a system message, and calls the assistant `model`."""

INST = Kind(
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'] | trim + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
)
"""As Mistral's first: no system role, marks in plain words, no generation prompt, a blank before the answer. Has the
tag `generation`."""

SYSTEM_LAST = Kind(
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}"
    "{%- endif -%}{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}"
    "{{- '[INST]' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' -}}"
    "{%- else -%}{{- m.content + eos_token -}}{%- endif -%}{%- endfor -%}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    "</s>",
)
"""As a later Mistral: the system message stands in the last message, so a finished conversation has none."""

END_OF_ALL = Kind(
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|endoftext|>",
    ("<|end|>",),
)
"""As Phi: writes the tokenizer's end token after the whole conversation, and another one after each turn."""

BASE = Kind(None, ("<s>", "</s>"), "</s>")
"""A base model: no chat template."""

KINDS = {
    **{"chatml": CHATML, "hybrid": HYBRID, "reasoner": REASONER, "dated": DATED, "no_system": NO_SYSTEM},
    **{"inst": INST, "system_last": SYSTEM_LAST, "end_of_all": END_OF_ALL, "base": BASE},
}


def small_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of 400 tokens, all bytes among them, which loads at once. Returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [
        "It is what it is.\n\n\n",
        "system user assistant\n",
        '{"name": "x", "arguments": {}}\n\n',
        "  部件是什么？\r\n",
    ]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=words, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(text * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def chat_model(folder: Path, kind: Kind, source: Path | None = None) -> Path:
    """Write a model folder without weights, with the tokenizer in `source`; None: SmolLM2's. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    source = source or need_model("SmolLM2-135M-Instruct")
    values = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token["content"] for token in values["added_tokens"]}
    number = max(values["model"]["vocab"].values())
    for word in (*kind.words, *kind.tags):
        if word not in known:
            number += 1
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            values["added_tokens"].append({"id": number, "content": word, "special": word in kind.words, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"eos_token": kind.end, "bos_token": next(iter(kind.words), None), "pad_token": kind.end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    numbers = {token["content"]: token["id"] for token in values["added_tokens"]}
    ends = [numbers[word] for word in (kind.end, *kind.further_ends)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    if kind.template is not None:
        (folder / "chat_template.jinja").write_text(kind.template, encoding="utf-8")
    return folder
