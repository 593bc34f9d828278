"""MGM read from a checkpoint under the published names, against the same weights computed by hand."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
)

from stages.contract.errors import UsageError
from stages.engines.engine import EngineSettings
from stages.models.mgm import CONNECTORS, MgmConfig, MgmForConditionalGeneration
from stages.models.mgm.loading import convert
from tests.conftest import need_model
from tests.tiny_mgm import (
    ACROSS,
    CLIP,
    DEPTHS,
    GEMMA,
    IMAGE,
    SIDE,
    SIZES,
    TOKENS,
    Weights,
    published_weights,
    write_clip,
    write_published,
)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return published_weights()


@pytest.fixture(scope="module")
def folder(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted folder, of a published one that has the towers with it."""
    here = tmp_path_factory.mktemp("mgm")
    clip = write_clip(here / "clip", {})
    convert(write_published(here / "published", weights), here / "converted", clip=clip)
    return here / "converted"


@pytest.fixture
def model(folder: Path) -> Any:
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def picture(seed: int, width: int = 128, height: int = 128) -> Image.Image:
    torch.manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy())


def mined_by_hand(low: torch.Tensor, high: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Patch info mining of one picture, token by token, as section 3.2 of the paper has it."""

    def projected(name: str, vector: torch.Tensor) -> torch.Tensor:
        get = {kind: weights[f"model.vlm_uni_{name}_projector.{kind}"] for kind in ("0.weight", "0.bias", "1.weight")}
        normed = functional.layer_norm(vector, vector.shape, get["0.weight"], get["0.bias"])
        return get["1.weight"] @ normed + weights[f"model.vlm_uni_{name}_projector.1.bias"]

    window = high.shape[-1] // ACROSS
    found = []
    for row in range(ACROSS):
        for column in range(ACROSS):
            query = projected("query", low[row * ACROSS + column])
            places = [(row * window + i, column * window + j) for i in range(window) for j in range(window)]
            scores = [query @ projected("aux", high[:, i, j]) / math.sqrt(len(query)) for i, j in places]
            shares = torch.stack(scores).softmax(0)
            found.append(
                sum(share * projected("val", high[:, i, j]) for share, (i, j) in zip(shares, places, strict=True))
            )
    return torch.stack(found)


def test_the_engine_keeps_both_towers_on_one_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put on several, as other models are, the towers' maps would meet on different cards."""
    from stages.engines import transformers_engine as engine

    asked: list[Any] = []

    def loaded(*_: Any, **options: Any) -> Any:
        asked.append(options["device_map"])
        raise InterruptedError

    monkeypatch.setattr(engine.AutoModelForImageTextToText, "from_pretrained", loaded)
    monkeypatch.setattr(engine, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for model in (folder, need_model("tiny-llava")):
        with pytest.raises(InterruptedError):
            engine.TransformersEngine(EngineSettings(model, {}, "float32", 4, 1, 256, 0))
    assert asked == [None, "auto"]


def convnext_by_hand(pixels: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The map of a ConvNeXt's four stages, with timm's names (eps 1e-6, exact GELU)."""

    def get(name: str) -> torch.Tensor:
        return weights[f"model.vision_tower_aux.vision_{name}"]

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        last = x.permute(0, 2, 3, 1)
        return functional.layer_norm(last, last.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-6)

    x = functional.conv2d(pixels, get("stem.0.weight"), get("stem.0.bias"), stride=4)
    x = normed(x, "stem.1").permute(0, 3, 1, 2)
    maps = []
    for stage, depth in enumerate(DEPTHS):
        here = f"stages.{stage}"
        if stage:
            x = normed(x, f"{here}.downsample.0").permute(0, 3, 1, 2)
            x = functional.conv2d(x, get(f"{here}.downsample.1.weight"), get(f"{here}.downsample.1.bias"), stride=2)
        for block in (f"{here}.blocks.{i}" for i in range(depth)):
            size = x.shape[1]
            y = functional.conv2d(
                x, get(f"{block}.conv_dw.weight"), get(f"{block}.conv_dw.bias"), padding=3, groups=size
            )
            y = normed(y, f"{block}.norm") @ get(f"{block}.mlp.fc1.weight").T + get(f"{block}.mlp.fc1.bias")
            y = functional.gelu(y) @ get(f"{block}.mlp.fc2.weight").T + get(f"{block}.mlp.fc2.bias")
            x = x + (y * get(f"{block}.gamma")).permute(0, 3, 1, 2)
        maps.append(x)
    side = maps[0].shape[-1]
    return torch.cat([maps[0], *(functional.interpolate(m, (side, side), mode="bilinear") for m in maps[1:])], dim=1)


def logits_by_hand(tokens: list[int], pixels: torch.Tensor, weights: Weights) -> torch.Tensor:
    """A prompt's logits from published weights: transformers' CLIP and Gemma, and everything between by hand."""
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    prefix = "model.vision_tower.vision_tower."
    names = {name: name.removeprefix("vision_model.") for name in clip.state_dict()}
    clip.load_state_dict({name: weights[f"{prefix}vision_model.{short}"] for name, short in names.items()})
    small = functional.interpolate(pixels, (56, 56), mode="bilinear", align_corners=False)
    low = clip(small, output_hidden_states=True).hidden_states[-2][:, 1:]
    high = convnext_by_hand(pixels, weights)
    seen = torch.stack([low[i] + mined_by_hand(low[i], high[i], weights) for i in range(len(pixels))])
    for layer in (0, 2):
        seen = functional.gelu(seen) if layer else seen
        seen = seen @ weights[f"model.mm_projector.{layer}.weight"].T + weights[f"model.mm_projector.{layer}.bias"]
    gemma = GemmaForCausalLM(GemmaConfig(**GEMMA)).eval()
    gemma.load_state_dict(
        {name: weights[name] for name in gemma.state_dict() if name != "lm_head.weight"}, strict=False
    )
    gemma.tie_weights()
    embedded = gemma.get_input_embeddings()(torch.tensor([tokens]))
    # Gemma multiplies what goes into its layers by the root of its size, and published MGM lets it do so with pictures
    embedded[0, torch.tensor(tokens) == IMAGE] = seen.flatten(0, 1) * math.sqrt(32)
    logits: torch.Tensor = gemma(inputs_embeds=embedded).logits[0]
    return logits


def test_every_published_tensor_is_converted(weights: Weights, folder: Path, model: Any) -> None:
    saved = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert len(saved) == len(weights)
    held = sorted(tensor.flatten().tolist() for tensor in model.state_dict().values())
    assert (
        sorted(
            [*(t.flatten().tolist() for t in weights.values()), weights["model.embed_tokens.weight"].flatten().tolist()]
        )
        == held
    )


@torch.no_grad()
def test_logits_are_what_the_published_weights_give(weights: Weights, model: Any, processor: Any) -> None:
    inputs = processor(
        text="<bos>a<image>b<image>c", images=[picture(1), picture(2)], add_special_tokens=False, return_tensors="pt"
    )
    tokens = inputs["input_ids"][0].tolist()
    assert tokens.count(IMAGE) == 2 * TOKENS
    expected = logits_by_hand(tokens, inputs["pixel_values"], weights)
    torch.testing.assert_close(model(**inputs).logits[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mining_looks_at_the_region_under_each_token(weights: Weights, model: Any) -> None:
    torch.manual_seed(3)
    low, high = torch.randn(2, TOKENS, 24), torch.randn(2, sum(SIZES), 32, 32)
    expected = torch.stack([mined_by_hand(low[i], high[i], weights) for i in range(2)])
    mined = model.model.mine_patches(low, high)
    torch.testing.assert_close(mined, expected, rtol=1e-4, atol=1e-5)
    high[:, :, 8:16, 24:32].neg_()  # under the token of row 1 and column 3
    changed = (model.model.mine_patches(low, high) - mined).abs().amax(-1) > 1e-6
    assert changed.nonzero().tolist() == [[0, 7], [1, 7]]


def test_pictures_become_squares_and_conversations_turns(processor: Any) -> None:
    question = [{"type": "image"}, {"type": "text", "text": "\n图里有什么？"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A bus."}]
    turns += [{"role": "user", "content": "Red?"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\n<image>\n图里有什么？<end_of_turn>\n<start_of_turn>model\nA bus.<end_of_turn>\n<eos>"
        "<start_of_turn>user\nRed?<end_of_turn>\n<start_of_turn>model\n"
    )
    wide = Image.new("RGB", (128, 64), (255, 0, 0))
    inputs = processor(text=text, images=[wide], add_special_tokens=False, return_tensors="pt")
    tokens = inputs["input_ids"][0].tolist()
    assert tokens.count(IMAGE) == TOKENS and tokens.count(8) == 4 and tokens.count(9) == 3 and tokens.count(2) == 1
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    red = inputs["pixel_values"][0, 0]
    assert red[:32].abs().max() < 0.02 and red[96:].abs().max() < 0.02 and red[33:95].min() > 1.5  # grey, red, grey
    assert "图里有什么？" in processor.tokenizer.decode(tokens)


@torch.no_grad()
def test_a_cache_changes_no_generated_text(model: Any, processor: Any) -> None:
    inputs = processor(text="<bos>?<image>!", images=[picture(4)], add_special_tokens=False, return_tensors="pt")
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**inputs, **how)
    assert cached.tolist() == model.generate(**inputs, **how, use_cache=False).tolist()
    other = processor(text="<bos>?<image>!", images=[picture(5)], add_special_tokens=False, return_tensors="pt")
    assert cached.tolist() != model.generate(**other, **how).tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_answer(model: Any, processor: Any, side: str) -> None:
    texts = ["<bos><image>a", "<bos>long and longer <image> and <image> again", "<bos>no picture"]
    images = [[picture(6)], [picture(7), picture(8, 60, 90)], []]
    processor.tokenizer.padding_side = side
    together = processor(
        text=texts,
        images=[one for shown in images for one in shown],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    logits = model(**together).logits
    for row, (text, shown) in enumerate(zip(texts, images, strict=True)):
        alone = processor(text=text, images=shown or None, add_special_tokens=False, return_tensors="pt")
        mine = logits[row][together["attention_mask"][row].bool()]
        torch.testing.assert_close(mine, model(**alone).logits[0], rtol=1e-3, atol=1e-3)


def trained_step(model: Any, processor: Any) -> torch.Tensor:
    inputs = processor(
        text=["<bos><image>a", "<bos>b<image>c"],
        images=[picture(9), picture(10)],
        **{"add_special_tokens": False, "padding": True, "return_tensors": "pt"},
    )
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    loss: torch.Tensor = model(**inputs, labels=labels).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_connector_alone_is_trained(model: Any, processor: Any, checkpointing: dict[str, Any] | None) -> None:
    """The parameters of the first phase, by their names; every one of them gets a gradient, and the towers none."""
    model.train().requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    for name in CONNECTORS:
        getattr(model.model, name).requires_grad_(True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = [f"{place}.{kind}" for place in (0, 1) for kind in ("weight", "bias")]
    queries = {f"model.vlm_uni_{name}_projector.{kind}" for name in ("query", "aux", "val") for kind in kinds}
    assert trained == queries | {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    trained_step(model, processor)
    # what is added to all keys moves all scores of a token alike, and softmax does not see that
    without = {"model.vlm_uni_aux_projector.0.bias", "model.vlm_uni_aux_projector.1.bias"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        assert name not in trained - without or parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_gradient(model: Any, processor: Any) -> None:
    model.train()
    trained_step(model, processor)
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert any(name.startswith("model.vision_tower_aux.stages.3") for name in expected)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    trained_step(model, processor)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_lora_with_checkpointing_keeps_nothing_of_frozen_towers(model: Any, processor: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    wanted = r"model\.language_model\..*(q_proj|v_proj|down_proj)"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=wanted, init_lora_weights=False)).train()
    asked: list[bool] = []
    model.model.mm_projector.register_forward_hook(lambda _, given, output: asked.append(output.requires_grad))
    before = trained_step(adapted, processor)
    assert asked == [False, False]  # once for each picture
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == 12 and all(grad is not None and grad.abs().max() > 0 for grad in gradients.values())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
    assert trained_step(adapted, processor) < before


def test_a_folder_reads_back_what_it_saved(model: Any, processor: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = MgmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


def split(weights: Weights, *beginnings: str) -> list[Weights]:
    """The weights whose names begin so, without that beginning, for each; and last what begins otherwise."""
    parts = [{name.removeprefix(b): t for name, t in weights.items() if name.startswith(b)} for b in beginnings]
    return [*parts, {name: t for name, t in weights.items() if not name.startswith(beginnings)}]


def test_towers_may_be_in_separate_folders(weights: Weights, folder: Path, tmp_path: Path) -> None:
    """CLIP's in PyTorch's form, with the side that reads texts; OpenCLIP's likewise."""
    clip, seeing, rest = split(weights, "model.vision_tower.vision_tower.", "model.vision_tower_aux.vision_")
    rest["lm_head.weight"] = rest["model.embed_tokens.weight"].clone()  # as some savers keep it
    rest["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    one = torch.ones(1)
    clip |= {"text_model.final_layer_norm.bias": one, "visual_projection.weight": one, "logit_scale": one}
    clip["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    openclip = {f"visual.trunk.{name}": t for name, t in seeing.items()}
    openclip |= dict.fromkeys(("visual.trunk.head.norm.weight", "visual.head.mlp.fc1.weight", "logit_scale"), one)
    openclip |= dict.fromkeys(("positional_embedding", "transformer.resblocks.0.ln_1.bias", "text_projection"), one)
    (tmp_path / "convnext").mkdir()
    torch.save(openclip, tmp_path / "convnext" / "open_clip_pytorch_model.bin")
    published = write_published(tmp_path / "published", rest)
    command = [sys.executable, "-m", "stages.models.mgm", published, tmp_path / "out"]
    command += ["--clip", write_clip(tmp_path / "clip", clip), "--convnext", tmp_path / "convnext"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def renamed(weights: Weights, old: str, new: str) -> Weights:
    return {name.replace(old, new): tensor for name, tensor in weights.items()}


def without(weights: Weights, beginning: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(beginning)}


def test_gemma_gets_towers_and_a_connector(weights: Weights, folder: Path, tmp_path: Path) -> None:
    """What training begins with: a new connector, or the published one of the first phase."""
    clip, convnext, rest = split(weights, "model.vision_tower.vision_tower.", "model.vision_tower_aux.vision_")
    gemma = {name: t for name, t in rest.items() if not name.startswith(("model.mm_", "model.vlm_"))}
    towers = (write_clip(tmp_path / "clip", clip), tmp_path / "convnext")
    towers[1].mkdir()
    torch.save({f"visual.trunk.{name}": t for name, t in convnext.items()}, towers[1] / "open_clip_pytorch_model.bin")
    published = write_published(tmp_path / "gemma", gemma, model_type="gemma")
    torch.save({name: t for name, t in rest.items() if name not in gemma}, tmp_path / "mm_projector.bin")
    whole = load_file(folder / "model.safetensors")

    source = convert(published, tmp_path / "out", *towers, connector=tmp_path / "mm_projector.bin")
    assert source.endswith("mm_projector.bin")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)

    new = []
    for number, seed in enumerate((1, 1, 2)):
        assert convert(published, tmp_path / f"new{number}", *towers, seed=seed) == f"new, by seed {seed}"
        new.append(load_file(tmp_path / f"new{number}" / "model.safetensors"))
    for name in whole:
        alike = [torch.equal(new[0][name], other[name]) for other in (whole, new[1], new[2])]
        connects = name.startswith(("model.mm_projector.", "model.vlm_uni_"))
        normalises = connects and re.search("vlm_uni_.*[.]0[.]", name)  # it begins with ones and zeros
        assert alike == [not connects, True, not connects or bool(normalises)], name


@pytest.mark.parametrize(
    ("spoilt", "settings", "words"),
    [
        (
            lambda w: renamed(w, "vlm_uni_val_projector.1.bias", "vlm_uni_value_projector.1.bias"),
            {},
            ["1 unknown (model.vlm_uni_value_projector.1.bias)", "1 missing (model.vlm_uni_val_projector.1.bias)"],
        ),
        (
            lambda w: without(w, "model.vision_tower.vision_tower."),
            {},
            [
                "missing (model.vision_tower.",
                "more",
                "; give CLIP's folder (openai/clip-vit-large-patch14-336) with --clip",
            ],
        ),
        (
            lambda w: without(w, "model.vision_tower_aux."),
            {},
            ["missing", "; give OpenCLIP's folder (CLIP-convnext_large_d_320) with --convnext"],
        ),
        (lambda w: w | {"model.mm_projector.0.bias": torch.ones(5)}, {}, ["model.mm_projector.0.bias (5,) for (32,)"]),
        (
            lambda w: w | {"lm_head.weight": torch.ones(300, 32)},
            {},
            ["lm_head.weight differs from model.embed_tokens.weight"],
        ),
        (lambda w: w, {"model_type": "mgm_llama"}, ["model_type is 'mgm_llama'", "'mgm_gemma'"]),
        (lambda w: without(w, "model.mm_projector."), {}, ["4 missing (model.mm_projector.0.weight"]),
        (lambda w: w, {"image_grid": 2}, ["image_grid is 2"]),
    ],
)
def test_a_model_that_is_no_mgm_is_refused_with_the_reason(
    weights: Weights, spoilt: Callable[[Weights], Weights], settings: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    published = write_published(tmp_path / "published", spoilt(dict(weights)), **settings)
    with pytest.raises(UsageError) as caught:
        convert(published, tmp_path / "out", clip=write_clip(tmp_path / "clip", {}))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_never_run(weights: Weights, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip", {"vision_model.x": Path("evil")})  # type: ignore[dict-item]
    published = write_published(tmp_path / "published", weights)
    with pytest.raises(UsageError, match=r"pytorch_model\.bin"):
        convert(published, tmp_path / "out", clip=clip)


def test_image_tokens_and_pictures_must_agree(model: Any, processor: Any) -> None:
    inputs = processor(text="<bos><image>a", images=[picture(11)], add_special_tokens=False, return_tensors="pt")
    twice = torch.cat([inputs["pixel_values"]] * 2)
    with pytest.raises(ValueError, match="16 image tokens for 2 pictures of 16 tokens each"):
        model(input_ids=inputs["input_ids"], pixel_values=twice)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_trainers_choice(folder: Path, attention: str) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=attention, local_files_only=True)
    assert loaded.model.language_model.config._attn_implementation == attention


def test_mgm_2b_has_its_parameters() -> None:
    with torch.device("meta"):
        model = MgmForConditionalGeneration(MgmConfig())
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_019_166_144
    assert model.config.tokens_across == 24 and model.config.pixels_across == 32


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vision_config_aux\.image_size: 700 is not a multiple of 96, patch_size"):
        MgmConfig(vision_config_aux={"image_size": 700})
