"""Both phases of training on a tiny MGM, and what then answers."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from stages.contract.errors import UsageError
from stages.engines import start_engine
from stages.engines.engine import EngineSettings
from stages.models.connector import link_connector
from stages.models.rendering import Renderer
from tests.tiny_mgm import TOKENS, published_weights, write_clip, write_published
from tests.train.two_phases import TwoPhases, two_phases

MGM = ("model.path=tiny-mgm", "train.gradient_checkpointing=true")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stages.models.mgm.loading import convert

    folder = tmp_path_factory.mktemp("models")
    published = write_published(folder / "published", published_weights())
    convert(published, folder / "tiny-mgm", clip=write_clip(folder / "clip", {}))
    return folder


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> TwoPhases:
    training = two_phases(tmp_path_factory.mktemp("two"), *MGM)
    training.lorry = replace(training.lorry, models=models)
    training.prepared().done()
    return training


@pytest.mark.long
def test_both_phases_train_what_they_should(trained: TwoPhases, models: Path) -> None:
    weights, before = load_file(trained.connector), load_file(models / "tiny-mgm" / "model.safetensors")
    assert set(weights) == {name for name in before if name.startswith(("model.mm_projector.", "model.vlm_uni_"))}
    for name, weight in weights.items():
        # what is added to all keys moves all scores of a token alike, and softmax does not see that
        unseen = name in ("model.vlm_uni_aux_projector.0.bias", "model.vlm_uni_aux_projector.1.bias")
        assert (weight != before[name]).any() or unseen, name
    adapter = load_file(trained.adapter)
    assert len(adapter) == 2 * 2 * 7 and all(".language_model.layers." in name for name in adapter)
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)


@pytest.mark.long
def test_base_connector_and_adapter_answer_together(trained: TwoPhases, models: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from stages.contract.files import sha256_file
    from stages.engines.transformers_engine import TransformersEngine

    base = models / "tiny-mgm"
    folder = link_connector(base, trained.connector, sha256_file(trained.connector), tmp_path / "with")
    engine = TransformersEngine(EngineSettings(folder, {"tuned": trained.adapter.parent}, "float32", 6, 2, 256, 0))
    page = trained.run.path("preprocess", "pages", "red.png")
    messages = [{"role": "user", "content": "<image>\nWhat is 这? "}]
    renderer = Renderer(folder)
    prompts = [
        renderer.render("one", messages, [page]),  # type: ignore[arg-type]
        renderer.render("two", [{"role": "user", "content": "Hm?"}]),
    ]
    assert prompts[0].length == len(prompts[0].tokens) + TOKENS - 1
    answers = engine.generate(prompts, None)
    assert answers == [engine.generate([prompt], None)[0] for prompt in prompts]
    assert len(engine.generate(prompts, "tuned")) == 2

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(base)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[prompts[0].pictures[0].load()], add_special_tokens=False, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompts[0].repeat_placeholders([TOKENS], 7)
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    told = processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[0].text == told.rstrip("\ufffd")


def test_vllm_is_refused_before_it_starts(models: Path) -> None:
    with pytest.raises(UsageError, match=r"vllm cannot serve mgm models; set infer\.engine to transformers"):
        start_engine("vllm", EngineSettings(models / "tiny-mgm", {}, "float32", 8, 1, 256, 0))
