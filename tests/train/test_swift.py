"""Models whose pictures only ms-swift reads: a tiny LLaVA-NeXT, which cuts a picture into tiles, and a tiny Gemma 3,
whose picture tokens see each other both ways."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch.nn import functional

from stages.contract.errors import DataError, UsageError
from stages.contract.files import read_json, write_json
from stages.contract.recipe import Model
from stages.models.pictures import family_rules
from stages.models.rendering import Renderer
from stages.train.encoding import Encoded, SampleEncoder
from stages.train.loop import Gradients
from stages.train.passes import Vision
from stages.train.samples import TokenSequence
from stages.train.swift import SwiftReader, load_base
from stages.train.trainee import LoraTrainee
from tests.conftest import Lorry, need_model
from tests.tiny_mgm import write_tokenizer
from tests.train.test_vision import LANGUAGE, adapted, gradient
from tests.train.two_phases import TwoPhases

NAMES = Model(path="tiny-llava-next", swift_type="llava_next_qwen_hf", swift_template="llava_next_qwen_hf")
PART = "part['text'] if part['type'] == 'text' else '<image>"
SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""


def write_llava_next(source: Path, folder: Path) -> Path:
    """Write a random LLaVA-NeXT with the tokenizer of tiny-llava. Its chat template has Qwen's system message and a
    line break after a picture, as ms-swift's."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    template = (source / "chat_template.jinja").read_text()
    assert PART in template
    (folder / "chat_template.jinja").write_text(SYSTEM + template.replace(PART, rf"{PART}\n"))
    llava = read_json(source / "config.json")
    tiles = [[56, 112], [112, 56], [112, 112]]
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=llava["vision_config"],
        text_config=llava["text_config"],
        image_token_index=llava["image_token_index"],
        image_grid_pinpoints=tiles,
        tie_word_embeddings=True,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    pictures = read_json(source / "preprocessor_config.json")
    pictures |= {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
    write_json(folder / "preprocessor_config.json", {**pictures, "image_grid_pinpoints": tiles})
    processor = read_json(source / "processor_config.json")
    write_json(folder / "processor_config.json", {**processor, "processor_class": "LlavaNextProcessor"})
    return folder


GEMMA_PICTURES = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
GEMMA_IDS = (255999, 256000, 262144)
"""Ids of these tokens, which ms-swift knows by number."""

GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else '<start_of_image>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""


def write_gemma3(folder: Path) -> Path:
    """Write a random Gemma 3 that sees, with Gemma's tokenizer without merges."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder.mkdir(parents=True)
    write_tokenizer(folder)
    tokenizer, settings = (read_json(folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, word in zip(GEMMA_IDS, GEMMA_PICTURES.values(), strict=True):
        tokenizer["added_tokens"].append({"id": number, "content": word, **flags})
        tokenizer["model"]["vocab"][word] = number
    del settings["added_tokens_decoder"]
    settings |= {"extra_special_tokens": GEMMA_PICTURES, "tokenizer_class": "PreTrainedTokenizerFast"}
    side = {"image_size": 56, "patch_size": 14}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 262208, "sliding_window": 16}
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={"model_type": "siglip_vision_model", **small, **side},
        mm_tokens_per_image=4,
        **dict(zip(("boi_token_index", "eoi_token_index", "image_token_index"), GEMMA_IDS, strict=True)),
    )
    gemma = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for weight in gemma.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1)  # so that the loss depends on who sees whom
    gemma.save_pretrained(folder)
    pictures = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}}
    files = {
        **{"tokenizer.json": tokenizer, "tokenizer_config.json": settings},
        "preprocessor_config.json": {**pictures, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        "generation_config.json": {"eos_token_id": [1, 9]},
    }
    for name, value in files.items():
        write_json(folder / name, value)
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_next(need_model("tiny-llava"), tmp_path_factory.mktemp("models") / "tiny-llava-next")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "wide.png")
    Image.effect_mandelbrot((60, 200), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "high.png")
    return folder


@pytest.fixture(scope="module")
def reader(model: Path, run: Path) -> SwiftReader:
    return SwiftReader(model, NAMES, run, None)


def encoded(reader: SwiftReader, *turns: str, files: tuple[str, ...] = ()) -> Encoded:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    encode = SampleEncoder(Renderer(reader.model), reader.run, 2048, None, reader)
    return encode({"id": "x", "messages": messages, "images": list(files)})


def sequences(reader: SwiftReader) -> list[TokenSequence]:
    """One picture, none, and two in a conversation of two turns."""
    several = ("<image>First 图 and <image>second?", "Two of them.", "Sure?", "Yes.")
    return [
        *encoded(reader, "<image>What is this?", "A set.", files=("wide.png",)).sequences,
        *encoded(reader, "No picture?", "None.").sequences,
        *encoded(reader, *several, files=("high.png", "wide.png")).sequences,
    ]


def test_tokens_are_those_of_the_model_s_own_processor_and_only_answers_are_learnt(
    model: Path, reader: SwiftReader
) -> None:
    from transformers import AutoProcessor

    assert family_rules(model) is None
    processor, renderer = AutoProcessor.from_pretrained(model), Renderer(model)
    first, text, talk = sequences(reader)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    wanted = processor(text=prompt, images=[Image.open(reader.run / "wide.png")])["input_ids"][0]
    assert first.tokens.tolist()[: len(wanted)] == list(wanted)
    decode = renderer.tokenizer.decode
    assert decode(first.tokens[first.learnt]) == "A set.<|im_end|>"
    assert decode(talk.tokens[talk.learnt]) == "Two of them.<|im_end|>Yes.<|im_end|>"
    assert (first.row is None, text.row is None) == (False, True)


def test_another_template_a_control_word_and_a_missing_picture_are_refused(
    model: Path, reader: SwiftReader, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"model\.swift_template: 'llava1_6_vicuna_hf' renders sample x differently"):
        other = Model(**{**NAMES.model_dump(), "swift_template": "llava1_6_vicuna_hf"})
        encoded(SwiftReader(model, other, reader.run, None), "<image>What?", "A set.", files=("wide.png",))
    with pytest.raises(DataError, match=r"sample x: says '<\|im_end\|>', which ms-swift's template would read as"):
        encoded(reader, "<image>What is <|im_end|>?", "A word.", files=("wide.png",))
    with pytest.raises(DataError, match=r"none\.png: missing or not a picture, but sample x needs it"):
        encoded(reader, "<image>What?", "None.", files=("none.png",))
    with pytest.raises(UsageError, match=r"model\.swift_template: found null, but .* reads pictures through ms-swift"):
        unnamed = Model(**{**NAMES.model_dump(), "swift_template": None})
        encoded(SwiftReader(model, unnamed, reader.run, None), "<image>What?", "A set.", files=("wide.png",))


def test_a_budget_of_pixels_makes_pictures_smaller(model: Path, reader: SwiftReader) -> None:
    sizes = []
    for one in (reader, SwiftReader(model, NAMES, reader.run, 30 * 30)):
        (sequence,) = encoded(one, "<image>What?", "A set.", files=("wide.png",)).sequences
        sizes += one.read([sequence])["image_sizes"].tolist()
    (whole, (height, width)) = sizes
    assert whole == [60, 90] and 800 < height * width <= 900
    assert width / height == pytest.approx(1.5, rel=0.05)


def loaded(model: Path) -> Any:
    return load_base(model, NAMES, torch.float32, torch.device("cpu"), None)[0].eval()


def test_losses_and_gradients_are_those_of_the_model_s_own_forward_pass(model: Path, reader: SwiftReader) -> None:
    """The other side is transformers alone: its model, its processor, its own loss."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    samples, files = sequences(reader), (["wide.png"], [], ["high.png", "wide.png"])
    processor = AutoProcessor.from_pretrained(model)
    alone = adapted(AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32), LANGUAGE)
    total = 0.0
    for sample, names in zip(samples, files, strict=True):
        tokens = torch.from_numpy(sample.tokens).long()
        opened = [Image.open(reader.run / name) for name in names]
        pictures = processor.image_processor(images=opened, return_tensors="pt") if names else {}
        labels = torch.where(torch.from_numpy(sample.learnt), tokens, -100)
        logits = alone(input_ids=tokens[None], **pictures, use_cache=False).logits[0]
        loss = functional.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        loss.backward()
        total += float(loss.detach())
    wanted = {name.replace(".default", ""): gradient(w) for name, w in alone.named_parameters() if w.requires_grad}
    base = loaded(model)
    reader.attach(base)
    trainee = LoraTrainee(adapted(base, LANGUAGE), 0.0, Vision(reader, None))
    assert (trainee.packs, trainee.kernel) == (False, "the model's own")
    Gradients(list(trainee.weights.values()))
    for sample in samples:
        trainee.add_gradients(trainee.prepare([sample], [1]), 1.0)
    assert float(trainee.sums[0]) == pytest.approx(total, rel=1e-5)
    for name, expected in wanted.items():
        found = trainee.weights[name].grad
        assert found is not None
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-6, name


def test_a_gemma_3_has_the_tokens_of_its_processor_and_the_loss_of_its_own_forward_pass(
    run: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = write_gemma3(tmp_path / "tiny-gemma3")
    names = Model(path="tiny-gemma3", swift_type="gemma3_vision", swift_template="gemma3_vision")
    reader = SwiftReader(folder, names, run, None)
    (sample,) = encoded(reader, "Is <image> wide?", "Yes.", files=("wide.png",)).sequences
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " wide?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    text = f"{prompt}Yes.<end_of_turn>"
    inputs = processor(
        text=text,
        images=[Image.open(run / "wide.png")],
        add_special_tokens=False,
        return_tensors="pt",
        return_mm_token_type_ids=True,
    )
    assert inputs["input_ids"][0].tolist() == sample.tokens.tolist()
    assert processor.tokenizer.decode(sample.tokens[sample.learnt]) == "Yes.<end_of_turn>"
    own = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    labels = torch.where(torch.from_numpy(sample.learnt), inputs["input_ids"][0], -100)
    wanted, blind = (
        float(functional.cross_entropy(logits[0, :-1], labels[1:], reduction="sum", ignore_index=-100))
        for logits in (own(**kept).logits.detach() for kept in (inputs, {**inputs, "token_type_ids": None}))
    )
    assert abs(wanted - blind) > 1e-3, "which tokens a picture's see matters"
    base = load_base(folder, names, torch.float32, torch.device("cpu"), None)[0].eval()
    reader.attach(base)
    trainee = LoraTrainee(adapted(base, LANGUAGE), 0.0, Vision(reader, None))
    with torch.no_grad():
        for name, weight in trainee.weights.items():
            if "lora_B" in name:
                weight.zero_()
    assert trainee.loss([sample])[0] == pytest.approx(wanted, rel=1e-6)


def test_the_modules_that_see_are_known_by_ms_swift_s_names(model: Path) -> None:
    base, sees, connects = load_base(model, NAMES, torch.float32, torch.device("cpu"), None)
    found = {name: (sees(name), connects(name)) for name, _ in base.named_parameters()}
    assert {kind for name, kind in found.items() if "language_model" in name} == {(False, False)}
    assert {kind for name, kind in found.items() if "vision_tower" in name} == {(True, False)}
    assert {kind for name, kind in found.items() if "multi_modal_projector" in name} == {(True, True)}


@pytest.mark.parametrize("path", ["swift.model.get_model_processor", "swift.model.get_processor"])
def test_ms_swift_has_the_loaders_that_lorry_calls(path: str) -> None:
    import swift.model

    parameters = inspect.signature(getattr(swift.model, path.rpartition(".")[2])).parameters
    assert {"model_id_or_path", "model_type", "download_model"} <= parameters.keys()
    if path.endswith("model_processor"):
        assert {"torch_dtype", "device_map", "quantization_config"} <= parameters.keys()


def test_ms_swift_has_the_template_that_lorry_calls() -> None:
    from swift.template import Template, get_template

    assert {"processor", "max_length", "template_type"} <= inspect.signature(get_template).parameters.keys()
    methods = {"encode": ["self", "inputs"], "data_collator": ["self", "batch"], "set_mode": ["self", "mode"]}
    methods |= {"register_post_encode_hook": ["self", "models"]}
    for name, first in methods.items():
        assert list(inspect.signature(getattr(Template, name)).parameters)[: len(first)] == first
    assert isinstance(Template.placeholder_tokens, list)


@pytest.mark.long
def test_a_training_goes_through_the_stage(model: Path, tmp_path: Path) -> None:
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
    training = TwoPhases(
        Lorry(tmp_path / "data", model.parent, tmp_path / "runs"),
        *("model.path=tiny-llava-next", f"model.swift_type={NAMES.swift_type}"),
        *(f"model.swift_template={NAMES.swift_template}", "train.gradient_checkpointing=true"),
        "train.connector=null",
    )
    training.prepared().done()
    weights = load_file(training.adapter)
    assert weights and all(".language_model." in name for name in weights)
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    facts = json.loads(training.adapter.with_name("training.json").read_text())
    assert facts["attention"]["one sample a pass"] == "ms-swift reads this model's pictures"
    assert facts["steps"] == 2 and facts["tokens"] > 8 * 60
