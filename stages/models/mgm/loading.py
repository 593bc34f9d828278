"""Published MGM checkpoints, or what one is trained from, as one Hugging Face folder that this package reads.

A published folder (YanweiLi/MGM-2B) holds Gemma and the connector, and the towers only where they were saved along;
else these are in folders of their own: openai/clip-vit-large-patch14-336, and OpenCLIP's
CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup. Training begins with google/gemma-2b-it and a new connector, or
with the published one of the first phase (mm_projector.bin). Weights are read from safetensors, or from PyTorch's own
files, of which nothing but tensors is unpickled.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, CLIPVisionConfig, ConvNextConfig, GemmaConfig, GenerationConfig

from stages.contract.errors import UsageError
from stages.contract.files import read_json, write_json
from stages.models.mgm.configuration import CLIP_L_14_336, MgmConfig
from stages.models.mgm.modeling import CONNECTORS, MgmForConditionalGeneration
from stages.models.mgm.processing import IMAGE_TOKEN, RESERVED_TOKEN, make_processor

ONLY = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_grid": 1,
    "image_global": False,
}
"""Keys of a published config.json with the values that this definition has; a key that is not there says the same."""

CONVNEXT = (
    (r"^stem\.0\.", "stem.patch_embeddings."),
    (r"^stem\.1\.", "stem.layernorm."),
    (r"\.downsample\.", ".downsampling_layer."),
    (r"\.blocks\.(\d+)\.", r".layers.\1."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"\.conv_dw\.", ".dwconv."),
    (r"(\.layers\.\d+)\.norm\.", r"\1.layernorm."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
)
"""A ConvNeXt's tensors: timm's names, which OpenCLIP has, and transformers'. Each change is made after those above."""

WITHOUT_USE = {
    "MGM": r".*\.(position_ids|inv_freq)$",
    "CLIP": r"(text_model|text_projection|visual_projection)\.|logit_scale$|.*\.position_ids$",
    "OpenCLIP": r"visual\.(trunk\.(head|norm_pre)|head)\.|text\.|transformer\.|token_embedding\.|ln_final\."
    r"|(positional_embedding|text_projection|logit_scale|attn_mask)$",
}
"""Of a source's tensors, those that no part of MGM has: buffers that are computed anew, the side that reads texts, and
the heads."""

Tensors = dict[str, torch.Tensor]


def convert(
    published: Path,
    output: Path,
    clip: Path | None = None,
    convnext: Path | None = None,
    connector: Path | None = None,
    seed: int = 42,
) -> str:
    """Make a Hugging Face folder, `output`, of a published one; `clip` and `convnext` hold the towers.

    What the published folder has of a tower is taken from there, what the file `connector` has of a connector from that
    one. `published` may be Gemma's own folder: without such a file the connector is then a new one, by the seed. All
    tensors get Gemma's type. Returns where the connector is from, in words. Raises UsageError for a model of another
    kind, and where tensors are missing, unknown or of another shape: all by name.
    """
    values = _settings(published / "config.json")
    _refuse_others(published, values)
    only_gemma = values["model_type"] == "gemma"
    found: Tensors = {}
    unknown = _take(found, _tensors(connector), "MGM", mgm_name) if connector else []
    sources = ((published, "MGM", mgm_name), (clip, "CLIP", clip_name), (convnext, "OpenCLIP", openclip_name))
    for folder, source, rename in sources:
        unknown += _take(found, _all_tensors(folder), source, rename) if folder else []
    config = MgmConfig(
        text_config=_gemma(values),
        vision_config=_clip(clip),
        vision_config_aux=_convnext(found, int(values.get("image_size_aux", 768 if only_gemma else 320))),
        vision_feature_layer=int(values.get("mm_vision_select_layer", -2)),
    )
    dtype = getattr(torch, str(values.get("torch_dtype") or values.get("dtype") or "bfloat16"))
    config.dtype = dtype
    with torch.device("meta"):
        model = MgmForConditionalGeneration(config)
    new = only_gemma and connector is None
    if new:
        found |= _new_connector(model, seed)
    _drop_head(found, published)
    _check(model, found, unknown, published)
    config.image_token_id = _copy_tokenizer(published, output)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in found.items()}, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    processor = make_processor(config, tokenizer)
    processor.save_pretrained(output)
    processor.image_processor.save_pretrained(output)  # in a file of its own, too, where some look for it
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends
    ).save_pretrained(output)
    return f"new, by seed {seed}" if new else str(connector or published)


def mgm_name(name: str) -> str | None:
    """Our name of a tensor of a published MGM checkpoint; None for one that is none of its."""
    if name == "lm_head.weight" or re.match(rf"model\.({'|'.join(CONNECTORS)})\.", name):
        return name
    if re.match(r"model\.(embed_tokens|layers|norm)\.", name):
        return name.replace("model.", "model.language_model.", 1)
    if name.startswith("model.vision_tower.vision_tower."):
        return clip_name(name.removeprefix("model.vision_tower.vision_tower."))
    if name.startswith("model.vision_tower_aux.vision_"):
        return openclip_name("visual.trunk." + name.removeprefix("model.vision_tower_aux.vision_"))
    return None


def clip_name(name: str) -> str | None:
    """Our name of a tensor of a CLIP folder."""
    return f"model.vision_tower.{name.removeprefix('vision_model.')}" if name.startswith("vision_model.") else None


def openclip_name(name: str) -> str | None:
    """Our name of a tensor of an OpenCLIP folder with a ConvNeXt."""
    rest = name.removeprefix("visual.trunk.")
    if not re.match(r"(stem|stages)\.", rest) or rest == name:
        return None
    for pattern, ours in CONVNEXT:
        rest = re.sub(pattern, ours, rest)
    return f"model.vision_tower_aux.{rest}"


def _settings(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: not there, or no mapping; copy the whole published folder")
    return values


def _refuse_others(folder: Path, values: dict[str, Any]) -> None:
    if values.get("model_type") not in ("mgm_gemma", "gemma"):
        raise UsageError(
            f"{folder / 'config.json'}: model_type is {values.get('model_type')!r}; only MGM on Gemma, 'mgm_gemma', is"
            " built, and 'gemma' to train one"
        )
    for key, value in ONLY.items():
        if values.get(key, value) != value:
            raise UsageError(
                f"{folder / 'config.json'}: {key} is {values.get(key)!r}, and only {value!r} is built: MGM-2B's kind"
            )


def _take(
    found: Tensors, tensors: Iterable[tuple[str, torch.Tensor]], source: str, rename: Callable[[str], str | None]
) -> list[str]:
    """Add a source's tensors under our names; what is there already stays. Returns the names that we do not know."""
    unknown = []
    for name, tensor in tensors:
        ours = rename(name)
        if re.match(WITHOUT_USE[source], name):
            continue
        if ours is None:
            unknown.append(name)
        else:
            found.setdefault(ours, tensor)
    return unknown


def _all_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in _weight_files(folder):
        yield from _tensors(path)


def _tensors(path: Path) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors of a file; they stay on the disk until they are used."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118  # it is no mapping
        return list(torch.load(path, map_location="cpu", weights_only=True, mmap=True).items())
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: no file of tensors ({reason}); copy it again") from error


def _new_connector(model: MgmForConditionalGeneration, seed: int) -> Tensors:
    """Weights as PyTorch makes them for its modules, which is how the published code begins."""
    found: Tensors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in CONNECTORS:
            connector = getattr(model.model, name).to_empty(device="cpu")
            for part in connector:
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            found |= {f"model.{name}.{key}": weight for key, weight in connector.state_dict().items()}
    return found


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("model*.safetensors", "open_clip_model.safetensors", "pytorch_model*.bin", "open_clip_*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise UsageError(f"{folder}: holds no weights: model*.safetensors, pytorch_model*.bin or open_clip_*")


def _gemma(values: dict[str, Any]) -> GemmaConfig:
    """Gemma's part of a published config.json, in which all parts' keys stand side by side."""
    known = {*GemmaConfig().to_dict(), "rope_theta"} - {"model_type", "architectures", "transformers_version", "dtype"}
    return GemmaConfig(**{key: value for key, value in values.items() if key in known})


def _clip(folder: Path | None) -> CLIPVisionConfig:
    if folder is None:
        return CLIPVisionConfig(**CLIP_L_14_336)
    values = _settings(folder / "config.json")
    return CLIPVisionConfig(**{"projection_dim": 768, **values.get("vision_config", values)})


def _convnext(found: Tensors, side: int) -> ConvNextConfig | None:
    """The high-resolution tower's sizes, told by its tensors: OpenCLIP's folder only names it. None without them."""
    prefix = "model.vision_tower_aux."
    stem = found.get(f"{prefix}stem.patch_embeddings.weight")
    if stem is None:
        return None
    depths: list[int] = []
    sizes: list[int] = []
    while (first := found.get(f"{prefix}stages.{len(depths)}.layers.0.dwconv.weight")) is not None:
        layers = re.compile(rf"{re.escape(prefix)}stages\.{len(depths)}\.layers\.\d+\.dwconv\.weight")
        depths.append(sum(bool(layers.fullmatch(name)) for name in found))
        sizes.append(first.shape[0])
    return ConvNextConfig(
        hidden_sizes=sizes,
        depths=depths,
        num_stages=len(depths),
        patch_size=stem.shape[-1],
        image_size=side,
        drop_path_rate=0.0,
    )


def _drop_head(found: Tensors, folder: Path) -> None:
    """Gemma's head is its embedding; a checkpoint may hold it twice."""
    head, embedding = found.pop("lm_head.weight", None), found.get("model.language_model.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UsageError(f"{folder}: lm_head.weight is not model.embed_tokens.weight, and Gemma's are one")


def _check(model: MgmForConditionalGeneration, found: Tensors, unknown: list[str], folder: Path) -> None:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    unknown = unknown + [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    misshapen = [
        f"{name} {tuple(tensor.shape)} for {tuple(expected[name])}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name]
    ]
    kinds = (("unknown", unknown), ("missing", missing), ("of another shape", misshapen))
    wrong = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds if names]
    if not wrong:
        return
    advice = {
        "model.vision_tower.": "; CLIP's folder (openai/clip-vit-large-patch14-336) is given with --clip",
        "model.vision_tower_aux.": "; OpenCLIP's folder (CLIP-convnext_large_d_320) is given with --convnext",
    }
    hints = [hint for prefix, hint in advice.items() if any(name.startswith(prefix) for name in missing)]
    raise UsageError(f"{folder}: not MGM-2B's tensors; {'; '.join(wrong)}{''.join(hints)}")


def _listed(names: list[str]) -> str:
    more = len(names) - 6
    return ", ".join(names[:6]) + (f" and {more} more" if more > 0 else "")


def _copy_tokenizer(published: Path, output: Path) -> int:
    """Copy the tokenizer with its reserved token as the image token. Returns that token's number."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _settings(published / "tokenizer.json")
    settings = _settings(published / "tokenizer_config.json")
    vocabulary = tokenizer["model"]["vocab"]
    number = vocabulary.get(RESERVED_TOKEN)
    if number is None:
        raise UsageError(f"{published / 'tokenizer.json'}: has no {RESERVED_TOKEN}; it must be Gemma's")
    tokenizer["model"]["vocab"] = {IMAGE_TOKEN if word == RESERVED_TOKEN else word: i for word, i in vocabulary.items()}
    entry = {"content": IMAGE_TOKEN, "special": True, "normalized": False}
    entry |= {"single_word": False, "lstrip": False, "rstrip": False}
    others = [added for added in tokenizer["added_tokens"] if added["id"] != number]
    tokenizer["added_tokens"] = sorted([*others, {"id": number, **entry}], key=lambda added: int(added["id"]))
    settings.setdefault("added_tokens_decoder", {})[str(number)] = entry
    settings.pop("chat_template", None)
    write_json(output / "tokenizer.json", tokenizer)
    write_json(output / "tokenizer_config.json", settings)
    return int(number)
