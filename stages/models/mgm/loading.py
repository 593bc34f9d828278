"""Convert a published MGM checkpoint, or the parts to train one, into one Hugging Face folder for this package.

A published folder (YanweiLi/MGM-2B) has Gemma and the connector. It has the towers only if they were saved too;
otherwise they come from their own folders: openai/clip-vit-large-patch14-336, and OpenCLIP's
CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup. Training starts from google/gemma-2b-it and a new connector, or
the published connector of the first phase (mm_projector.bin). Weights are read from safetensors files, or from PyTorch
files, of which only tensors are unpickled.
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
"""Keys of a published config.json for which Lorry supports only this value. A missing key has this value."""

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
"""Replacements that turn a ConvNeXt's tensor names from timm's, which OpenCLIP uses, into transformers'. Their order
matters."""

WITHOUT_USE = {
    "MGM": r".*\.(position_ids|inv_freq)$",
    "CLIP": r"(text_model|text_projection|visual_projection)\.|logit_scale$|.*\.position_ids$",
    "OpenCLIP": r"visual\.(trunk\.(head|norm_pre)|head)\.|text\.|transformer\.|token_embedding\.|ln_final\."
    r"|(positional_embedding|text_projection|logit_scale|attn_mask)$",
}
"""Patterns of the tensor names that MGM does not use, by source: computed buffers, text encoders, heads."""

Tensors = dict[str, torch.Tensor]


def convert(
    published: Path,
    output: Path,
    clip: Path | None = None,
    convnext: Path | None = None,
    connector: Path | None = None,
    seed: int = 42,
) -> str:
    """Write the Hugging Face folder `output` from a published folder. `clip` and `convnext` supply the towers.

    A tensor in `published` takes precedence over the same one in `clip` or `convnext`, and the file `connector` over
    the published connector. `published` may be Gemma's folder: without `connector`, a new connector is then
    initialised by `seed`. All tensors get Gemma's dtype. Returns the source of the connector, in words. Raises
    UsageError for another model, for a file that cannot be read, and for missing, unknown or misshapen tensors.
    """
    values = _read_object(published / "config.json")
    _refuse_other_models(published, values)
    only_gemma = values["model_type"] == "gemma"
    found: Tensors = {}
    unknown = _add_tensors(found, _read_tensors(connector), "MGM", model_name_from_mgm) if connector else []
    sources = (
        (published, "MGM", model_name_from_mgm),
        (clip, "CLIP", model_name_from_clip),
        (convnext, "OpenCLIP", model_name_from_openclip),
    )
    for folder, source, rename in sources:
        unknown += _add_tensors(found, _read_all_tensors(folder), source, rename) if folder else []
    config = MgmConfig(
        text_config=_gemma_config(values),
        vision_config=_clip_config(clip),
        vision_config_aux=_convnext_config(found, int(values.get("image_size_aux", 768 if only_gemma else 320))),
        vision_feature_layer=int(values.get("mm_vision_select_layer", -2)),
    )
    dtype = getattr(torch, str(values.get("torch_dtype") or values.get("dtype") or "bfloat16"))
    config.dtype = dtype
    with torch.device("meta"):
        model = MgmForConditionalGeneration(config)
    new = only_gemma and connector is None
    if new:
        found |= _new_connector(model, seed)
    _remove_head(found, published)
    _refuse_other_tensors(model, found, unknown, published)
    config.image_token_id = _copy_tokenizer(published, output)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in found.items()}, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    processor = make_processor(config, tokenizer)
    processor.save_pretrained(output)
    processor.image_processor.save_pretrained(output)  # some programs read it from a file of its own
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends
    ).save_pretrained(output)
    return f"new, by seed {seed}" if new else str(connector or published)


def model_name_from_mgm(name: str) -> str | None:
    """Return the MgmForConditionalGeneration name of a published MGM checkpoint's tensor; None if it has none."""
    if name == "lm_head.weight" or re.match(rf"model\.({'|'.join(CONNECTORS)})\.", name):
        return name
    if re.match(r"model\.(embed_tokens|layers|norm)\.", name):
        return name.replace("model.", "model.language_model.", 1)
    if name.startswith("model.vision_tower.vision_tower."):
        return model_name_from_clip(name.removeprefix("model.vision_tower.vision_tower."))
    if name.startswith("model.vision_tower_aux.vision_"):
        return model_name_from_openclip("visual.trunk." + name.removeprefix("model.vision_tower_aux.vision_"))
    return None


def model_name_from_clip(name: str) -> str | None:
    """Return the MgmForConditionalGeneration name of a CLIP checkpoint's tensor; None if it has none."""
    return f"model.vision_tower.{name.removeprefix('vision_model.')}" if name.startswith("vision_model.") else None


def model_name_from_openclip(name: str) -> str | None:
    """Return the MgmForConditionalGeneration name of a tensor of OpenCLIP's ConvNeXt; None if it has none."""
    rest = name.removeprefix("visual.trunk.")
    if not re.match(r"(stem|stages)\.", rest) or rest == name:
        return None
    for pattern, ours in CONVNEXT:
        rest = re.sub(pattern, ours, rest)
    return f"model.vision_tower_aux.{rest}"


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a published folder. Raises UsageError if the file is missing, is not JSON or
    holds no object."""
    values = read_json(path)
    if not isinstance(values, dict):
        found = "is not a JSON object" if path.is_file() else "is missing"
        raise UsageError(f"{path}: {found}; copy the whole published folder")
    return values


def _refuse_other_models(folder: Path, values: dict[str, Any]) -> None:
    """Raise UsageError if the values of a published config.json are those of another model than MGM-2B or Gemma."""
    if values.get("model_type") not in ("mgm_gemma", "gemma"):
        raise UsageError(
            f"{folder / 'config.json'}: model_type is {values.get('model_type')!r}; use a folder of 'mgm_gemma', or of"
            " 'gemma' to train MGM"
        )
    for key, value in ONLY.items():
        if values.get(key, value) != value:
            raise UsageError(
                f"{folder / 'config.json'}: {key} is {values.get(key)!r}, but only {value!r} is supported; use MGM-2B"
            )


def _add_tensors(
    found: Tensors, tensors: Iterable[tuple[str, torch.Tensor]], source: str, rename: Callable[[str], str | None]
) -> list[str]:
    """Add a source's tensors to `found` under their names in the model, unless it has them. Returns the names that the
    model does not know."""
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


def _read_all_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and tensor of each weight in a folder. Raises UsageError if it has none or a file is damaged."""
    for path in _weight_files(folder):
        yield from _read_tensors(path)


def _read_tensors(path: Path) -> list[tuple[str, torch.Tensor]]:
    """Return the names and tensors in a file, mapped into memory. Raises UsageError if it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118  # not a mapping
        return list(torch.load(path, map_location="cpu", weights_only=True, mmap=True).items())
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: cannot be read as tensors ({reason}); copy it again") from error


def _new_connector(model: MgmForConditionalGeneration, seed: int) -> Tensors:
    """Return the tensors of a new connector, initialised with torch's defaults as in the published code."""
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
    """Return the files with a published folder's weights. Raises UsageError if there are none."""
    for pattern in ("model*.safetensors", "open_clip_model.safetensors", "pytorch_model*.bin", "open_clip_*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise UsageError(
        f"{folder}: no weights; copy the published model*.safetensors, pytorch_model*.bin or open_clip_* there"
    )


def _gemma_config(values: dict[str, Any]) -> GemmaConfig:
    """Return Gemma's part of a published config.json, which has the keys of all parts on one level."""
    known = {*GemmaConfig().to_dict(), "rope_theta"} - {"model_type", "architectures", "transformers_version", "dtype"}
    return GemmaConfig(**{key: value for key, value in values.items() if key in known})


def _clip_config(folder: Path | None) -> CLIPVisionConfig:
    """Return the low-resolution tower's config from CLIP's folder; MGM-2B's if `folder` is None."""
    if folder is None:
        return CLIPVisionConfig(**CLIP_L_14_336)
    values = _read_object(folder / "config.json")
    return CLIPVisionConfig(**{"projection_dim": 768, **values.get("vision_config", values)})


def _convnext_config(found: Tensors, side: int) -> ConvNextConfig | None:
    """Return the high-resolution tower's config; None if its tensors are missing. `side` is the input's side in pixels.

    The config is read from the tensors' shapes, because OpenCLIP's folder has only the tower's name.
    """
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


def _remove_head(found: Tensors, folder: Path) -> None:
    """Remove Gemma's head from the tensors: it has the embedding's weights, but a checkpoint may hold both. Raises
    UsageError if they differ."""
    head, embedding = found.pop("lm_head.weight", None), found.get("model.language_model.embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UsageError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but Gemma shares them; copy the folder"
            " again"
        )


def _refuse_other_tensors(model: MgmForConditionalGeneration, found: Tensors, unknown: list[str], folder: Path) -> None:
    """Raise UsageError if tensors are unknown, missing or of another shape than the model's."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    unknown = unknown + [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    misshapen = [
        f"{name} {tuple(tensor.shape)} for {tuple(expected[name])}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name]
    ]
    kinds = (("unknown", unknown), ("missing", missing), ("of another shape", misshapen))
    wrong = [f"{len(names)} {kind} ({_name_list(names)})" for kind, names in kinds if names]
    if not wrong:
        return
    advice = {
        "model.vision_tower.": "; give CLIP's folder (openai/clip-vit-large-patch14-336) with --clip",
        "model.vision_tower_aux.": "; give OpenCLIP's folder (CLIP-convnext_large_d_320) with --convnext",
    }
    hints = [hint for prefix, hint in advice.items() if any(name.startswith(prefix) for name in missing)]
    cures = "".join(hints) or "; copy the published folder again"
    raise UsageError(f"{folder}: its tensors are not MGM-2B's: {', '.join(wrong)}{cures}")


def _name_list(names: list[str]) -> str:
    """Return up to six names, joined by commas, and the number of further names, if any."""
    more = len(names) - 6
    return ", ".join(names[:6]) + (f" and {more} more" if more > 0 else "")


def _copy_tokenizer(published: Path, output: Path) -> int:
    """Copy the tokenizer without its chat template and with RESERVED_TOKEN renamed to IMAGE_TOKEN. Returns the id of
    that token.

    Raises UsageError if the tokenizer is missing or has no RESERVED_TOKEN.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = _read_object(published / "tokenizer.json")
    settings = _read_object(published / "tokenizer_config.json")
    vocabulary = tokenizer["model"]["vocab"]
    number = vocabulary.get(RESERVED_TOKEN)
    if number is None:
        raise UsageError(f"{published / 'tokenizer.json'}: no {RESERVED_TOKEN}; copy Gemma's tokenizer there")
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
