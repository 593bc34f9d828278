"""Families of models: whether each renders, trains, answers and exports, by tiny random models of the published shapes.

    python -m benchmarks.families [FAMILY...]

For each family: a model with the published architecture and its settings (rope, windows, soft caps, experts), scaled
down, and a byte tokenizer with the published control words. Chat templates are written here, in the published form.
A row says whether training and inference render the same tokens, whether two steps of training run and what of the
packing is left out, whether the transformers engine answers with base, adapter and merged model alike, and by how much
the merged model's logits differ from base and adapter, as a share of what the adapter changes. `fails` has the first
line that went wrong. docs/models.md is made from the rows: `python -m benchmarks.families table`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, write_rows
from stages.contract.files import read_json, write_json, write_jsonl

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.1, "rope_theta": 1e4},
    "tie_word_embeddings": False,
}
HEAD = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
WINDOW = 32
"""Tokens of a sliding window: shorter than the samples, as published ones are shorter than long samples."""
LONG = {"long_factor": [1.5] * 8, "short_factor": [1.0] * 8}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 512,
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Form:
    """A chat template and the tokenizer that it is for."""

    template: str
    end: str
    """The tokenizer's end token."""
    begin: str | None = None
    """The tokenizer's first token."""
    adds_begin: bool = False
    """Whether the tokenizer adds its first token to every text."""
    words: tuple[str, ...] = ()
    """Further control words."""
    ends: tuple[str, ...] = ()
    """End tokens that only the generation config names."""


def turns(body: str, start: str, before: str = "", after: str = "") -> str:
    """A template that writes `body` for each message m, and `start` where an answer begins."""
    begin = "{% if add_generation_prompt %}{{ '" + start + "' }}{% endif %}"
    return before + "{% for m in messages %}" + body + "{% endfor %}" + after + begin


def roles(before: str, between: str, after: str) -> str:
    """The body of `turns` that writes a role, and a content."""
    return "{{ '" + before + "' + m['role'] + '" + between + "' + m['content'] + '" + after + "' }}"


IM = "<|im_start|>assistant\\n"
CHATML = Form(
    turns(
        roles("<|im_start|>", "\\n", "<|im_end|>\\n"),
        IM,
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}",
    ),
    "<|im_end|>",
    words=("<|im_start|>", "<|endoftext|>"),
)
HYBRID = Form(
    turns(
        "{% set said = m['content'].split('</think>')[-1].lstrip('\\n') %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ (said if m['role'] == 'assistant' else m['content']) + '<|im_end|>\\n' }}",
        IM,
        after="",
    ).replace(
        "{{ '" + IM + "' }}",
        "{{ '" + IM + "' }}{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    ),
    "<|im_end|>",
    words=("<|im_start|>", "<|endoftext|>", "<think>", "</think>"),
)
LLAMA_2 = Form(
    "{% if messages[0]['role'] == 'system' %}"
    "{% set rules = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set rules = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (rules if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    *("</s>", "<s>", True),
)
HEADS = "<|start_header_id|>assistant<|end_header_id|>\\n\\n"
LLAMA_3 = Form(
    turns(
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}",
        HEADS,
        "{{ bos_token }}",
    ),
    *("<|eot_id|>", "<|begin_of_text|>", True),
    words=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
)
MISTRAL = Form(
    "{{ bos_token }}{% set rules = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (rules if loop.index0 < 2 else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    *("</s>", "<s>", True),
    words=("[INST]", "[/INST]"),
)
GEMMA_BODY = (
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
)
GEMMA = Form(
    turns(
        GEMMA_BODY,
        "<start_of_turn>model\\n",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}",
    ),
    *("<eos>", "<bos>", True),
    words=("<start_of_turn>", "<end_of_turn>"),
    ends=("<end_of_turn>",),
)
GEMMA_3 = Form(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rules = messages[0]['content'] + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set rules = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (rules if loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    *("<eos>", "<bos>", True),
    words=("<start_of_turn>", "<end_of_turn>"),
    ends=("<end_of_turn>",),
)
PHI_3 = Form(
    "{% for m in messages %}" + roles("<|", "|>\\n", "<|end|>\\n") + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    "<|endoftext|>",
    words=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ends=("<|end|>",),
)
PHI_4 = Form(
    turns(roles("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_start|>assistant<|im_sep|>"),
    "<|im_end|>",
    words=("<|im_start|>", "<|im_sep|>", "<|endoftext|>"),
)
GLM_4 = Form(
    turns(roles("<|", "|>\\n", ""), "<|assistant|>\\n", "[gMASK]<sop>"),
    "<|endoftext|>",
    words=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ends=("<|user|>", "<|observation|>"),
)
HARMONY = Form(
    "{{ '<|start|>system<|message|>You answer.\\nReasoning: medium<|end|>' }}"
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<|start|>developer<|message|># Instructions\\n\\n' + m['content'] + '<|end|>' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    "<|return|>",
    words=("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>", "<|endoftext|>"),
    ends=("<|endoftext|>", "<|call|>"),
)
DEEPSEEK = Form(
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}",
    *("<|end_of_sentence|>", "<|begin_of_sentence|>", True),
    words=("<|User|>", "<|Assistant|>", "<think>", "</think>"),
)
OLMO = Form(
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'assistant' %}"
    + roles("<|", "|>\\n", "\\n")
    + "{% else %}{{ '<|assistant|>\\n' + m['content'] + eos_token + ('' if loop.last else '\\n') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    *("<|endoftext|>", "<|endoftext|>"),
)
GRANITE = Form(
    turns(
        roles("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\\n"),
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "<|end_of_text|>",
    words=("<|start_of_role|>", "<|end_of_role|>"),
)
COHERE = Form(
    turns(
        "{% set role = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m['role']] %}"
        "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + m['content'] | trim + '<|END_OF_TURN_TOKEN|>' }}",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "{{ bos_token }}",
    ),
    *("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", True),
    words=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
)
FALCON = Form(
    turns(
        "{% if m['role'] == 'assistant' %}{{ '<|assistant|>\\n' + m['content'] + eos_token + '\\n' }}"
        "{% else %}" + roles("<|", "|>\\n", "\\n") + "{% endif %}",
        "<|assistant|>\\n",
    ),
    "<|endoftext|>",
    words=("<|system|>", "<|user|>", "<|assistant|>"),
)


@dataclass(frozen=True)
class Family:
    """A family of published models."""

    name: str
    like: str
    """Models whose shape it has."""
    kind: str
    """`model_type` in config.json."""
    form: Form
    config: dict[str, Any]
    """What of config.json differs from SIZES."""


FAMILIES = (
    Family("Qwen2.5", "Qwen2.5-0.5B to 72B, Qwen2", "qwen2", CHATML, {"rope_theta": 1e6, "tie_word_embeddings": True}),
    Family(
        "Qwen2-MoE",
        "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
        "qwen2_moe",
        CHATML,
        {**EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False, "rope_theta": 1e6},
    ),
    Family("Qwen3", "Qwen3-0.6B to 32B", "qwen3", HYBRID, {**HEAD, "rope_theta": 1e6, "tie_word_embeddings": True}),
    Family("Qwen3-MoE", "Qwen3-30B-A3B", "qwen3_moe", HYBRID, {**HEAD, **EXPERTS, "rope_theta": 1e6}),
    Family("Llama 2", "Llama-2-7b-chat", "llama", LLAMA_2, {"num_key_value_heads": 4}),
    Family("Llama 3", "Llama-3.1-8B, Llama-3.2-1B", "llama", LLAMA_3, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    Family("Mistral 0.1", "Mistral-7B-v0.1", "mistral", MISTRAL, {"sliding_window": WINDOW}),
    Family("Mistral", "Mistral-7B-v0.3, Nemo", "mistral", MISTRAL, {**HEAD, "rope_theta": 1e6, "sliding_window": None}),
    Family(
        "Gemma",
        "gemma-2b-it, gemma-7b-it",
        "gemma",
        GEMMA,
        {**HEAD, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    Family(
        "Gemma 2",
        "gemma-2-2b-it to 27b",
        "gemma2",
        GEMMA,
        {
            **{**HEAD, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16},
            **{"sliding_window": WINDOW, "tie_word_embeddings": True},
        },
    ),
    Family(
        "Gemma 3",
        "gemma-3-1b-it",
        "gemma3_text",
        GEMMA_3,
        {
            **{**HEAD, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "sliding_window_pattern": 2},
            **{"rope_local_base_freq": 1e4, "rope_theta": 1e6, "tie_word_embeddings": True},
        },
    ),
    Family("Phi-3", "Phi-3-mini-4k", "phi3", PHI_3, {"num_key_value_heads": 4, "sliding_window": WINDOW}),
    Family(
        "Phi-3 128k",
        "Phi-3-mini-128k, Phi-3.5-mini",
        "phi3",
        PHI_3,
        {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 64},
    ),
    Family("Phi-4", "phi-4", "phi3", PHI_4, {"rope_theta": 2.5e5, "sliding_window": None}),
    Family(
        "Phi-4-mini",
        "Phi-4-mini-instruct",
        "phi3",
        PHI_3,
        {
            "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 6, "short_factor": [1.0] * 6},
            **{"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        },
    ),
    Family("GLM-4", "glm-4-9b-chat-hf", "glm", GLM_4, {**HEAD, "partial_rotary_factor": 0.5, "attention_bias": True}),
    Family("GLM-4-0414", "GLM-4-9B-0414, GLM-Z1", "glm4", GLM_4, {**HEAD, "partial_rotary_factor": 0.5}),
    Family("SmolLM2", "SmolLM2-135M to 1.7B", "llama", CHATML, {"rope_theta": 1e5, "tie_word_embeddings": True}),
    Family(
        "SmolLM3",
        "SmolLM3-3B",
        "smollm3",
        HYBRID,
        {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "rope_theta": 5e6, "tie_word_embeddings": True},
    ),
    Family(
        "gpt-oss",
        "gpt-oss-20b in bfloat16",
        "gpt_oss",
        HARMONY,
        {
            **{**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
            **{"layer_types": [SLIDING, FULL], "rope_theta": 1.5e5},
            "rope_scaling": {
                **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
                "original_max_position_embeddings": 128,
            },
        },
    ),
    Family("DeepSeek-R1-Distill-Qwen", "DeepSeek-R1-Distill-Qwen-1.5B to 32B", "qwen2", DEEPSEEK, {}),
    Family(
        "DeepSeek-R1-Distill-Llama",
        "DeepSeek-R1-Distill-Llama-8B",
        "llama",
        DEEPSEEK,
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    Family("InternLM", "internlm2_5-7b-chat, internlm3-8b-instruct", "internlm2", CHATML, {"rope_theta": 1e6}),
    Family("Yi", "Yi-1.5-6B-Chat", "llama", CHATML, {"rope_theta": 5e6}),
    Family("OLMo", "OLMo-7B-Instruct-hf", "olmo", OLMO, {"clip_qkv": 8.0, "num_key_value_heads": 4}),
    Family("OLMo 2", "OLMo-2-1124-7B-Instruct", "olmo2", OLMO, {"rope_theta": 5e5}),
    Family(
        "OLMo 3",
        "Olmo-3-7B-Instruct",
        "olmo3",
        CHATML,
        {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL], "rope_theta": 5e5},
    ),
    Family(
        "Granite",
        "granite-3.3-2b-instruct",
        "granite",
        GRANITE,
        {
            **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
            **{"attention_multiplier": 0.0625, "tie_word_embeddings": True},
        },
    ),
    Family("Command R", "c4ai-command-r-v01", "cohere", COHERE, {"logit_scale": 0.0625, "tie_word_embeddings": True}),
    Family(
        "Command R7B",
        "c4ai-command-r7b-12-2024",
        "cohere2",
        COHERE,
        {
            **{**HEAD, "logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": [SLIDING, FULL]},
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "Falcon",
        "falcon-7b-instruct",
        "falcon",
        FALCON,
        {"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False, "alibi": False},
    ),
    Family("Falcon 3", "Falcon3-1B to 10B", "llama", FALCON, {**HEAD, "rope_theta": 1e6}),
)

CONVERSATION = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What does  this\n\tprint? `print(1 + 1)`"},
    {"role": "assistant", "content": "It prints 2.\n\n```\n2\n```"},
    {"role": "user", "content": "为什么?"},
    {"role": "assistant", "content": "因为 1 + 1 = 2。"},
]


def write_family(family: Family, folder: Path) -> None:
    """Write a model folder of a family: published config, tokenizer and template, random float32 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    numbers = _write_tokenizer(family.form, folder)
    end, begin = numbers[family.form.end], numbers.get(family.form.begin or "")
    config = {
        **{"model_type": family.kind, "vocab_size": len(numbers), "torch_dtype": "float32"},
        **{"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end, **SIZES, **family.config},
    }
    if family.kind == "internlm2":
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
    write_json(folder / "config.json", config)
    ends = [end, *(numbers[word] for word in family.form.ends)]
    if family.kind == "internlm2":
        return
    torch.manual_seed(0)
    loaded = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(loaded, dtype=torch.float32)
    model.save_pretrained(folder)
    write_json(folder / "config.json", {**config, "architectures": [type(model).__name__]})
    write_json(folder / "generation_config.json", {"bos_token_id": begin, "eos_token_id": ends, "do_sample": False})


def _write_tokenizer(form: Form, folder: Path) -> dict[str, int]:
    """Write a tokenizer whose tokens are bytes and the form's control words. Returns their numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = list(dict.fromkeys([*([form.begin] if form.begin else []), form.end, *form.words]))
    letters = [*words, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    numbers = {word: number for number, word in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if form.begin and form.adds_begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{form.begin} $A", pair=f"{form.begin} $A $B", special_tokens=[(form.begin, numbers[form.begin])]
        )
    thoughts = ("<think>", "</think>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=form.begin, eos_token=form.end, pad_token=form.end
    )
    fast.add_tokens([word for word in words if word in thoughts])
    fast.add_special_tokens({"additional_special_tokens": [word for word in words if word not in thoughts]})
    fast.chat_template = form.template
    fast.save_pretrained(folder)
    return numbers


def try_family(family: Family, folder: Path) -> dict[str, Any]:
    """Take a family through all steps. Returns its row, with the first line that went wrong as `fails`."""
    row: dict[str, Any] = {"family": family.name, "like": family.like, "architecture": family.kind}
    steps: dict[str, Callable[[Family, Path], dict[str, Any]]] = {
        **{"builds": _build, "renders": _render, "trains": _train, "answers": _answer, "exports": _export},
    }
    for step, function in steps.items():
        try:
            row |= {step: True, **function(family, folder)}
        except Exception as error:  # noqa: BLE001 - the row says what
            text = " ".join(f"{type(error).__name__}: {error}".split()).replace(str(folder), "MODEL")
            row |= {step: False, "fails": f"{step}: {text}"[:400]}
            break
    return row


def _build(family: Family, folder: Path) -> dict[str, Any]:
    """Write the model, and settle whether its Python files run: they do not."""
    from stages.models.remote_code import settle_remote_code

    write_family(family, folder / "model")
    settle_remote_code(folder / "model", trusted=False)
    return {}


def _render(family: Family, folder: Path) -> dict[str, Any]:
    """Compare what training learns with what inference asks, for each answer of the conversation."""
    from stages.models.rendering import UNLEARNT, Renderer

    renderer = Renderer(folder / "model")
    notes = renderer.check_template()
    sequences = renderer.training_sequences(CONVERSATION)
    for place, message in enumerate(CONVERSATION):
        if message["role"] != "assistant":
            continue
        asked = renderer.render("x", CONVERSATION[:place]).tokens
        same = [one for one in sequences if one.tokens[: len(asked)] == asked]
        if not any(one.labels[len(asked)] != UNLEARNT == one.labels[len(asked) - 1] for one in same):
            raise AssertionError(f"no sequence learns message {place} after the tokens of its prompt")
    ends = {renderer.tokenizer.convert_ids_to_tokens(one.tokens[_last_learnt(one.labels)]) for one in sequences}
    return {"sequences": len(sequences), "ends": sorted(ends), "notes": notes}


def _last_learnt(labels: Sequence[int]) -> int:
    """The place of the last learnt token."""
    from stages.models.rendering import UNLEARNT

    return max(place for place, label in enumerate(labels) if label != UNLEARNT)


def _train(family: Family, folder: Path) -> dict[str, Any]:
    """Train two steps, in this process, as the training process does."""
    from stages.contract.recipe import Adapter, Model, Train
    from stages.contract.stop import StopRequest
    from stages.train.job import Job, Progress
    from stages.train.worker import Worker

    samples = [
        {"id": str(number), "messages": CONVERSATION[:places], "images": [], "meta": {"source": "made"}}
        for number, places in enumerate((3, 5, 3, 5))
    ]
    write_jsonl(folder / "train.jsonl", samples)
    write_jsonl(folder / "validation.jsonl", [])
    mix = Adapter(name="tuned")
    job = Job(
        **{name: folder / name for name in ("model", "work", "scratch", "adapter")},
        run=folder,
        key="",
        mix=mix,
        train=[folder / "train.jsonl"],
        validation=[folder / "validation.jsonl"],
        **{"seed": 0, "dtype": "float32", "sharding": "none", "pass_tokens": 4096, "processes": 1},
        **{"evaluation_tokens": 4096, "evaluate": False, "use_cpu": True, "cards": []},
        model_settings=Model(path="model"),
        settings=Train(adapters=[mix], effective_batch=2, learning_rate=1e-2, log_every=1, rank=4, warmup_ratio=0.0),
        progress=-1,
    )
    with (folder / "messages.jsonl").open("w") as messages:
        Worker(Progress(os.dup(messages.fileno())), StopRequest()).train(job)
    trained = read_json(folder / "adapter" / "training.json")
    config = read_json(folder / "adapter" / "adapter_config.json")
    why = trained["attention"].get("one sample a pass")
    return {
        "losses": [round(entry["loss"], 3) for entry in trained["log"]],
        "adapted": config["target_modules"],
        **({"one sample a pass": why} if why else {}),
    }


def _answer(family: Family, folder: Path) -> dict[str, Any]:
    """Answer with base and adapter in the transformers engine."""
    base, tuned = _said(folder / "model", {"tuned": folder / "adapter"}, (None, "tuned"))
    return {"said": {"base": base[:40], "tuned": tuned[:40]}}


def _said(model: Path, adapters: dict[str, Path], names: Sequence[str | None]) -> list[str]:
    """What the engine says to the conversation's last question, with each of these adapters."""
    from stages.engines.engine import EngineSettings
    from stages.engines.transformers_engine import TransformersEngine
    from stages.models.rendering import Renderer

    prompt = Renderer(model).render("x", CONVERSATION[:-1])
    engine = TransformersEngine(EngineSettings(model, adapters, "float32", 12, 1, 1024, 0))
    try:
        return [engine.generate([prompt], name)[0].text for name in names]
    finally:
        engine.close()


def _export(family: Family, folder: Path) -> dict[str, Any]:
    """Merge, and compare logits and answers with those of base and adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from stages.models.gptq import patch_gptq_kernels
    from stages.models.merge import Merge
    from stages.models.rendering import Renderer

    Merge(folder / "model", folder / "adapter").write(folder / "merged")
    tokens = torch.tensor([Renderer(folder / "model").render("x", CONVERSATION[:-1]).tokens])
    load: Any = AutoModelForCausalLM.from_pretrained
    with torch.inference_mode():
        base = load(folder / "model")
        plain = base(tokens).logits
        with patch_gptq_kernels(folder / "model", on_card=False, training=False):  # else PEFT imports gptqmodel
            adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        tuned = adapted(tokens).logits
        merged = load(folder / "merged")(tokens).logits
    change, off = float((tuned - plain).abs().max()), float((tuned - merged).abs().max())
    if not change > 0 or off > 1e-3 * change:
        raise AssertionError(f"the merged model's logits are off by {off:.2g}, where the adapter changes {change:.2g}")
    (before,) = _said(folder / "model", {"tuned": folder / "adapter"}, ("tuned",))
    (after,) = _said(folder / "merged", {}, (None,))
    if before != after:
        raise AssertionError(f"the merged model says {after!r}, base and adapter {before!r}")
    return {"off": f"{off / change:.1e}"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """docs/models.md's table of these rows."""
    lines = ["| family | published models of this shape | architecture | tried | remarks |", "| --- " * 5 + "|"]
    for row in rows:
        done = [step for step in ("renders", "trains", "answers", "exports") if row.get(step)]
        tried = "all" if len(done) == 4 else f"only {', '.join(done)}" if done else "refused"
        lines.append(
            f"| {row['family']} | {row['like']} | `{row['architecture']}` | {tried} | {'; '.join(_remarks(row))} |"
        )
    return "\n".join(lines) + "\n"


def _remarks(row: dict[str, Any]) -> list[str]:
    """What a reader has to know of a family."""
    found = [f"`{row['fails']}`"] if "fails" in row else []
    if "one sample a pass" in row:
        found.append(f"one sample a pass: {row['one sample a pass']}")
    if row.get("sequences", 1) > 1:
        found.append("a conversation is a sequence for each answer")
    found += (note.split(": ", 1)[-1] for note in row.get("notes", []))
    return [text.replace("|", "\\|") for text in found]


START, STOP = "<!-- rows -->\n", "<!-- end of rows -->\n"
"""Marks of the table in the page."""


def page(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page with the table of these rows in it."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table(rows)}\n{STOP}{rest.partition(STOP)[2]}"


def main() -> None:
    """Try the families that the command line names, or all; with `table`, only write the page again."""
    wanted = sys.argv[1:]
    if wanted != ["table"]:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        rows = []
        for family in FAMILIES:
            if wanted and family.name not in wanted:
                continue
            with tempfile.TemporaryDirectory() as place:
                rows.append(try_family(family, Path(place)))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
        write_rows("families", rows, "python -m benchmarks.families", by="family")
    order = [family.name for family in FAMILIES]
    rows = sorted(read_json(RESULTS / "families.json")["rows"], key=lambda row: order.index(row["family"]))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
