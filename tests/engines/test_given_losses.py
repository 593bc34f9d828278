"""The loss of given answers: what transformers' own logits give for the same tokens, for base and adapters."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, CohereConfig, Gemma2Config

from stages.engines import transformers_engine
from stages.engines.engine import EngineSettings, GivenAnswer
from stages.engines.transformers_engine import TransformersEngine
from stages.models.mgm.loading import convert
from stages.models.pictures import open_picture
from stages.models.rendering import UNLEARNT, Renderer, TrainingSequence
from tests.conftest import need_model
from tests.tiny_mgm import published_weights, write_clip, write_published

CONVERSATIONS = [
    [("user", "What is part 12?"), ("assistant", "A lever.")],
    [
        ("user", "部件3在哪里？"),
        ("assistant", "在第二页，靠近弹簧。"),
        ("user", "为什么？"),
        ("assistant", "图三写着。"),
    ],
    [("user", "Name " + "many " * 60 + "parts."), ("assistant", "A gear, a valve and a piston. " * 9)],
    [("user", "?"), ("assistant", "!")],
]


def given(model: Path) -> list[GivenAnswer]:
    """Conversations of one and two answers, and of very different lengths."""
    renderer = Renderer(model)
    return [
        GivenAnswer(str(number), sequence)
        for number, turns in enumerate(CONVERSATIONS)
        for sequence in renderer.training_sequences([{"role": role, "content": text} for role, text in turns])
    ]


def write_adapter(model: Path, folder: Path, kind: Any = AutoModelForCausalLM, modules: Any = "all-linear") -> Path:
    """An adapter with random weights, large enough to change losses."""
    torch.manual_seed(1)
    base = kind.from_pretrained(model)
    config = LoraConfig(r=8, target_modules=modules, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def plain_losses(model: Any, answers: list[GivenAnswer], placeholder: int = -1, inputs: Any = None) -> list[float]:
    """The losses by a model of transformers, each conversation alone, from all logits."""
    found = []
    for place, answer in enumerate(answers):
        whole = answer.whole_sequence(placeholder)
        tokens, labels = torch.tensor([whole.tokens]), torch.tensor(whole.labels)
        with torch.no_grad():
            logits = model(input_ids=tokens, **(inputs(place, tokens) if inputs else {})).logits[0]
        loss = functional.cross_entropy(logits[:-1].double(), labels[1:], ignore_index=UNLEARNT, reduction="sum")
        found.append(float(loss))
    return found


def engine(model: Path, adapters: dict[str, Path]) -> TransformersEngine:
    return TransformersEngine(EngineSettings(model, adapters, "float32", 4, 4, 512, 0))


def test_losses_are_those_of_transformers_for_base_and_adapter(
    small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_engine, "MOST_LOGITS", 7 * 49152)  # seven positions at a time
    model = small_models / "random-llama"
    adapter, answers = write_adapter(model, tmp_path / "one"), given(model)
    made, reported = engine(model, {"one": adapter}), dict[int, float]()
    base = AutoModelForCausalLM.from_pretrained(model)
    wanted = plain_losses(base, answers)
    found = made.losses(answers, None, reported.__setitem__)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert [reported[place] for place in range(len(answers))] == found
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    assert made.losses(answers, "one") == pytest.approx(plain_losses(tuned, answers), rel=1e-5)
    assert made.losses(answers, None) == found, "the base is untouched"
    assert made.losses(answers, "one") != pytest.approx(found, rel=1e-2), "the adapter has an effect"
    monkeypatch.setattr(transformers_engine, "LOSS_TOKENS", 1)
    assert made.losses(answers, None) == pytest.approx(wanted, rel=1e-5), "each alone"


def test_the_first_token_and_unlearnt_ones_do_not_count() -> None:
    nothing = GivenAnswer("a", TrainingSequence([5, 6, 7], [5, UNLEARNT, UNLEARNT]))
    assert nothing.learnt == 0
    assert GivenAnswer("b", TrainingSequence([5, 6, 7], [5, 6, UNLEARNT])).learnt == 1


def test_without_a_token_that_counts_the_loss_is_zero(small_models: Path) -> None:
    model = small_models / "random-llama"
    nothing = GivenAnswer("a", TrainingSequence([5, 6, 7], [5, UNLEARNT, UNLEARNT]))
    assert engine(model, {}).losses([nothing], None) == [0.0]


SMALL = {
    **{"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2},
}


@pytest.mark.parametrize(
    ("config", "is_known"),
    [
        (Gemma2Config(**SMALL, final_logit_softcapping=2.0), True),
        (CohereConfig(**SMALL, logit_scale=0.25), True),
        # its logits have a factor that no name of Head's tells
        (AutoConfig.for_model("falcon_h1", **SMALL, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4), False),
    ],
)
def test_logits_that_are_scaled_or_capped(tmp_path: Path, small_models: Path, config: Any, is_known: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # else no logit comes near to the cap
    model.save_pretrained(tmp_path)
    for path in (small_models / "random-llama").glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    answers = [
        GivenAnswer(str(length), TrainingSequence([*range(3, 3 + length)], [UNLEARNT] * 3 + [*range(6, 3 + length)]))
        for length in (4, 40, 11)
    ]
    made = engine(tmp_path, {})
    assert (made._head is not None) == is_known
    assert made.losses(answers, None) == pytest.approx(plain_losses(model, answers), rel=1e-5)


# -- pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mgm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("mgm")
    convert(write_published(here / "published", published_weights()), here / "mgm", clip=write_clip(here / "clip", {}))
    return here / "mgm"


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl", "mgm"])
def test_pictures_count_as_the_model_itself_reads_them(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue("mgm") if name == "mgm" else need_model(name)
    renderer = Renderer(model)
    answers = []
    for number, size in enumerate(((), ((200, 120),), ((90, 200), (120, 120)))):
        files = [tmp_path / f"{number}-{place}.png" for place in range(len(size))]
        for path, one in zip(files, size, strict=True):
            Image.effect_noise(one, 80).convert("RGB").save(path)
        pictures = tuple(open_picture(path, renderer.rules, 28 * 28 * 30) for path in files)
        turns = [
            {"role": "user", "content": "<image>" * len(size) + "a?"},
            {"role": "assistant", "content": "b" * (3 + 9 * number)},
        ]
        (sequence,) = renderer.training_sequences(turns, has_pictures=bool(size))
        answers.append(GivenAnswer(str(number), sequence, pictures))
    adapter = write_adapter(model, tmp_path / "a", AutoModelForImageTextToText, r".*language_model.*(q|v)_proj")
    made = engine(model, {"a": adapter})
    token = renderer.picture_token

    def inputs(place: int, tokens: torch.Tensor) -> dict[str, Any]:
        """The model's inputs of one conversation's pictures."""
        found = made._picture_inputs([answers[place]])
        return {**found, "mm_token_type_ids": tokens.eq(token).int()} if "image_grid_thw" in found else found

    base = AutoModelForImageTextToText.from_pretrained(model).eval()
    found = made.losses(answers, None)
    assert found == pytest.approx(plain_losses(base, answers, token, inputs), rel=1e-5)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    assert made.losses(answers, "a") == pytest.approx(plain_losses(tuned, answers, token, inputs), rel=1e-5)
    # other pictures, other losses
    swapped = [*answers[:1], GivenAnswer("x", answers[1].sequence, answers[2].pictures[:1]), answers[2]]
    assert made.losses(swapped, None)[0] == pytest.approx(found[0], rel=1e-6)
    assert made.losses(swapped, None)[1] != pytest.approx(found[1], rel=1e-6)


# -- vLLM --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_vllm_gives_the_same_losses(small_models: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from stages.engines import vllm_engine

    model = shutil.copytree(small_models / "random-llama", tmp_path / "model")
    config = AutoConfig.from_pretrained(model, head_dim=32)  # the least that its kernels for a CPU have
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    adapters = {"one": write_adapter(model, tmp_path / "one")}
    answers = [*given(model), *given(model)[:2]]  # a prefix that is cached would have no log probabilities
    settings = EngineSettings(model, adapters, "float32", 4, 4, 600, 0, computes_losses=True)
    made = vllm_engine.VllmEngine(settings)
    try:
        base = AutoModelForCausalLM.from_pretrained(model)
        reported: dict[int, float] = {}
        found = made.losses(answers, None, reported.__setitem__)
        assert found == pytest.approx(plain_losses(base, answers), rel=1e-4)
        assert [reported[place] for place in range(len(answers))] == found
        made.generate([Renderer(model).render("p", [{"role": "user", "content": "What is part 12?"}])], None)
        tuned = PeftModel.from_pretrained(base, adapters["one"]).eval()
        assert made.losses(answers, "one") == pytest.approx(plain_losses(tuned, answers), rel=1e-4)
        assert made.losses(answers, None) == pytest.approx(found, rel=1e-6)
    finally:
        made.close()
