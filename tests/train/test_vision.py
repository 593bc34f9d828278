"""Pictures in packs: places of their tokens, losses and gradients by transformers' own models, graphs of towers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn import functional

from stages.contract.errors import UsageError
from stages.contract.recipe import Adapter, Train
from stages.hardware.memory import is_connector, is_vision_or_connector
from stages.models.pictures import PictureRules, family_rules
from stages.models.rendering import Renderer
from stages.train.base import add_lora, checkpoint_layers
from stages.train.encoding import SampleEncoder
from stages.train.loop import Gradients
from stages.train.passes import Vision
from stages.train.samples import SizedPicture, TokenSequence
from stages.train.trainee import ConnectorTrainee, LoraTrainee, Trainee, hidden_alone
from stages.train.vision import PictureReader, three_places
from tests.conftest import need_model
from tests.tiny_mgm import published_weights, write_clip, write_published

LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|up_proj|gate_proj|down_proj)"
TOWER = r".*(visual|vision_tower)\..*\.(q_proj|k_proj|v_proj|qkv|up_proj)"
FAMILIES = ("tiny-llava", "tiny-qwen2.5-vl", "tiny-mgm")


@pytest.fixture(scope="module")
def mgm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stages.models.mgm.loading import convert

    folder = tmp_path_factory.mktemp("models")
    published = write_published(folder / "published", published_weights())
    convert(published, folder / "tiny-mgm", clip=write_clip(folder / "clip", {}))
    return folder / "tiny-mgm"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with three pictures."""
    folder = tmp_path_factory.mktemp("run")
    numbers = np.random.RandomState(0)
    for number, (width, height) in enumerate([(80, 60), (60, 90), (150, 56)]):
        pixels = numbers.randint(0, 255, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def sequences(model: Path, run: Path) -> list[TokenSequence]:
    """Samples with one, no and two pictures."""
    encode = SampleEncoder(Renderer(model), run, 1024, None)
    found = []
    for files in (["0.png"], [], ["1.png", "2.png"]):
        question = "<image>" * len(files) + "What is 这?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{len(files)} of them."}]
        encoded = encode({"id": "x", "messages": messages, "images": files}).sequences
        found += encoded
    return found


def loaded(model: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    import stages.models.mgm  # noqa: F401 - registers it

    return AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()


def vision(model: Path, base: Any, run: Path) -> Vision:
    rules = family_rules(model)
    assert rules is not None
    factor = rules.factor if isinstance(rules, PictureRules) else None
    return Vision(PictureReader(model, rules, run, torch.float32), int(base.config.image_token_id), factor)


def adapted(base: Any, modules: str) -> Any:
    """A base with LoRA that has learnt something, the same numbers each time."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return model.eval()


def add_gradients_alone(model: Any, seeing: Vision, samples: list[TokenSequence]) -> float:
    """The summed loss of the samples, one at a time by transformers' own forward pass with its own attention and its
    own places; adds up the gradients."""
    total = 0.0
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        inputs = {"input_ids": tokens, **seeing.reader.read([sample])}
        if seeing.factor is not None:
            inputs["mm_token_type_ids"] = tokens.eq(seeing.placeholder).int()
        labels = torch.where(torch.from_numpy(sample.learnt), tokens[0], -100)
        logits = model(**inputs, use_cache=False).logits[0]
        loss = functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum", ignore_index=-100)
        loss.backward()
        total += float(loss.detach())
    return total


def gradient(weight: torch.Tensor) -> torch.Tensor:
    """A weight's gradient; zero where nothing depends on it, as in the last layer of a tower that no picture needs."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def folder_of(family: str, mgm: Path) -> Path:
    return mgm if family == "tiny-mgm" else need_model(family)


def compare(trainee: Trainee, samples: list[TokenSequence], loss: float, wanted: dict[str, Any]) -> None:
    """Whether a pack has this loss and these gradients."""
    Gradients(list(trainee.weights.values()))
    trainee.add_gradients(trainee.prepare(samples, list(range(len(samples)))), 1.0)
    assert float(trainee.sums[0]) == pytest.approx(loss, rel=1e-5)
    largest = max(float(one.norm()) for one in wanted.values())
    assert largest > 0 and trainee.weights.keys() == wanted.keys()
    for name, expected in wanted.items():
        found = trainee.weights[name].grad
        assert found is not None
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize("modules", [LANGUAGE, f"({LANGUAGE}|{TOWER})"], ids=["language model", "tower too"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_with_pictures_has_the_losses_and_gradients_of_its_samples_alone(
    family: str, modules: str, mgm: Path, run: Path
) -> None:
    folder = folder_of(family, mgm)
    samples = sequences(folder, run)
    assert [len(sample.pictures) for sample in samples] == [1, 0, 2]
    alone = adapted(loaded(folder), modules)
    seeing = vision(folder, alone.get_base_model(), run)
    loss = add_gradients_alone(alone, seeing, samples)
    wanted = {name.replace(".default", ""): gradient(w) for name, w in alone.named_parameters() if w.requires_grad}
    if modules != LANGUAGE:
        assert any(is_vision_or_connector(name) for name in wanted)
    trainee = LoraTrainee(adapted(loaded(folder), modules), 0.0, seeing)
    checkpoint_layers(trainee.model, 1)
    trainee.model.train()
    compare(trainee, samples, loss, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_has_the_connector_s_gradients_of_its_samples_alone(family: str, mgm: Path, run: Path) -> None:
    folder = folder_of(family, mgm)
    samples = [sample for sample in sequences(folder, run) if sample.pictures]
    alone = loaded(folder)
    seeing = vision(folder, alone, run)
    for name, weight in alone.named_parameters():
        weight.requires_grad_(is_connector(name))
    loss = add_gradients_alone(alone, seeing, samples)
    model = loaded(folder)
    connector = [name for name, _ in model.named_parameters() if is_connector(name)]
    trainee = ConnectorTrainee(model, connector, folder, seeing)
    checkpoint_layers(trainee.model, 1)
    trainee.model.train()
    own = dict(alone.named_parameters())
    wanted = {saved: gradient(own[name]) for saved, name in zip(trainee.weights, connector, strict=True)}
    compare(trainee, samples, loss, wanted)


def recorded_graphs(trainee: Trainee, samples: list[TokenSequence]) -> tuple[set[bool], bool, int]:
    """Whether the outputs of the tower's modules have a graph, whether the pictures' embeddings have one, and the
    number of calls that made these."""
    base, towers, embedded = trainee.model.base_model, set(), []
    for name, module in base.named_modules():
        if is_vision_or_connector(name) and not is_connector(name) and not list(module.children()):
            module.register_forward_hook(
                lambda *found: towers.add(isinstance(found[-1], torch.Tensor) and found[-1].requires_grad)
            )
    get = base.get_image_features

    def spied(**pictures: Any) -> Any:
        """The model's own features, kept."""
        found = get(**pictures)
        features = getattr(found, "pooler_output", found)
        embedded.append(torch.cat(tuple(features)) if isinstance(features, list | tuple) else features)
        return found

    base.get_image_features = spied
    trainee.add_gradients(trainee.prepare(samples, list(range(len(samples)))), 1.0)
    return towers, any(one.requires_grad for one in embedded), len(embedded)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_has_a_graph_only_where_something_in_it_or_before_it_is_trained(
    family: str, mgm: Path, run: Path
) -> None:
    folder = folder_of(family, mgm)
    samples = sequences(folder, run)
    for trains in ("language model", "tower", "connector"):
        base = loaded(folder)
        seeing = vision(folder, base, run)
        if trains == "connector":
            connector = [name for name, _ in base.named_parameters() if is_connector(name)]
            trainee: Trainee = ConnectorTrainee(base, connector, folder, seeing)
        else:
            trainee = LoraTrainee(adapted(base, LANGUAGE if trains == "language model" else TOWER), 0.1, seeing)
        checkpoint_layers(trainee.model, 2)
        trainee.model.train()
        towers, embedded, calls = recorded_graphs(trainee, samples)
        assert calls == 1, "all pictures of the pass at once"
        assert (True in towers, embedded) == (trains == "tower", trains != "language model"), trains


def test_of_a_tower_linear_modules_alone_are_adapted() -> None:
    """Qwen2.5-VL's first module is a convolution that has the name of a linear one."""
    settings = Train(adapters=[Adapter(name="a")], target_modules=["all-linear"], freeze_vision=False)
    model = add_lora(loaded(need_model("tiny-qwen2.5-vl")), settings, 0)
    found = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(".visual.blocks.0.attn.proj." in name for name in found)
    assert not any("patch_embed" in name or is_connector(name) for name in found)
    named = settings.model_copy(update={"target_modules": ["q_proj", "proj"]})
    with pytest.raises(
        UsageError, match=r"also matches .*patch_embed\.proj, which is no linear module; set it to \[all"
    ):
        add_lora(loaded(need_model("tiny-qwen2.5-vl")), named, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_with_pictures_passes_the_check_before_training(family: str, mgm: Path, run: Path) -> None:
    folder = folder_of(family, mgm)
    samples = sequences(folder, run)
    base = loaded(folder)
    seeing = vision(folder, base, run)
    alone = hidden_alone(base, seeing, samples)
    trainee = LoraTrainee(get_peft_model(base, LoraConfig(r=2, target_modules=LANGUAGE)), 0.0, seeing)
    assert trainee.check(alone, samples) is None and trainee.packs


@pytest.mark.parametrize("pictures", [[(3, 5)], [(2, 2), (4, 1)], [(1, 1)], [(6, 2), (1, 7), (3, 3)]])
def test_rows_and_columns_are_those_of_the_model(pictures: list[tuple[int, int]]) -> None:
    model = loaded(need_model("tiny-qwen2.5-vl"))
    placeholder, merge = model.config.image_token_id, model.config.vision_config.spatial_merge_size
    factor = merge * model.config.vision_config.patch_size
    tokens = [1, 2, 3]
    for rows, columns in pictures:
        tokens += [placeholder] * (rows * columns) + [5, 6]
    sizes = tuple(SizedPicture("x", columns * factor, rows * factor, rows * columns) for rows, columns in pictures)
    sequence = TokenSequence(np.array(tokens, np.int32), np.ones(len(tokens), bool), sizes)
    ids = torch.tensor(tokens)[None]
    grid = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in pictures])
    wanted, _ = model.model.get_rope_index(ids, ids.eq(placeholder).int(), grid)
    assert torch.equal(three_places(sequence, placeholder, factor), wanted[:, 0])
