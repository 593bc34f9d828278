"""What train says of losses: means over learnt tokens, and an end where a loss is not a number. By the stage's outputs
alone: each test trains with the command, on the real small model's tokenizer."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stages.contract.files import read_json, read_jsonl
from tests.train.conftest import Training, sample
from tests.train.test_nodes import TwoNodes, ended
from tests.train.test_recovery import make, metrics
from tests.train.two_phases import two_phases

ZEBRA = " zebra"
"""A word whose embedding the damaged model lacks."""


def uneven(split: str, number: int) -> list[dict[str, Any]]:
    """Samples whose answers are of very different lengths."""
    return [sample(f"{split}{i}", answer=f"It is {split}{i}." + " Really." * (i * i * 3)) for i in range(number)]


def token_mean(model: Path, samples: list[dict[str, Any]]) -> float:
    """Mean loss of all learnt tokens, each sample computed alone."""
    tokenizer, llama = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    losses = []
    for each in samples:
        text, asked = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            for messages, prompt in ((each["messages"], False), (each["messages"][:-1], True))
        )
        # the line break after the end token is not learnt
        tokens, prompt = (torch.tensor(tokenizer.encode(part)) for part in (text.removesuffix("\n"), asked))
        with torch.no_grad():
            logits = llama(tokens[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")[len(prompt) - 1 :])
    return float(torch.cat(losses).double().mean())


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, 2])
def test_losses_are_means_over_tokens_whatever_the_batches_and_processes(
    tmp_path: Path, small_models: Path, nodes: int
) -> None:
    """Five validation samples make an uneven last batch, and no two processes share them evenly. The log entry at step
    4 is of the second epoch."""
    still = ("train.learning_rate=1e-30", "train.epochs=2", "train.log_every=2")
    splits = {"train": uneven("train", 8), "validation": uneven("validation", 5)}
    training = make(tmp_path / "t", small_models, *still).with_splits(splits)
    codes, output = ended(TwoNodes(training).start()) if nodes == 2 else ([training.start().wait(300)], "")
    assert set(codes) == {0}, output
    learnt, validated = (token_mean(small_models / "random-llama", samples) for samples in splits.values())
    assert metrics(training, "eval_loss") == {step: pytest.approx(validated, rel=1e-6) for step in (2, 4)}
    assert metrics(training, "loss")[4] == pytest.approx(learnt, rel=1e-6)
    timing = read_json(training.run.path("train", "adapters", "tuned", "timing.json"))
    assert timing["train_loss"] == pytest.approx(learnt, rel=1e-6)


def check_numbers(folder: Path) -> None:
    """Every file is JSON, which has no word for NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path}: {word}")

    for path in folder.rglob("*.json*"):
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)


def losses_on_the_way(training: Training) -> list[float]:
    return [event["loss"] for event in read_jsonl(training.run.path("train", "events.jsonl")) if "loss" in event]


@pytest.mark.long
def test_a_training_that_diverges_ends_in_one_line_and_a_lower_rate_starts_anew(
    tmp_path: Path, small_models: Path
) -> None:
    every = ("train.checkpoint_every=1", "train.warmup_ratio=0")
    wild = make(tmp_path / "t", small_models, "train.learning_rate=1e18", *every).with_samples(validation=0)
    code, output = wild()
    assert code == 2, output
    last = output.splitlines()[-1]
    assert "training tuned failed: step " in last and " at learning rate " in last
    assert "lower train.learning_rate or raise train.warmup_ratio; if that does not help, check" in last
    assert "loss 0" not in output
    assert all(math.isfinite(loss) and loss > 0 for loss in losses_on_the_way(wild))
    folder = wild.run.path("train")
    check_numbers(folder)
    assert not (folder / "manifest.json").exists() and not (folder / "adapters" / "tuned").exists()
    (failed,) = read_json(folder / "summary.json")["dataset_results"]
    assert "at learning rate" in failed["error"]
    kept = [path.parent for path in folder.glob("checkpoints/tuned/checkpoint-*/complete.json")]
    assert kept, "a step before was good"
    for path in kept:
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert all(weight.isfinite().all() for weight in load_file(path / name).values())

    calm = Training(wild.lorry, tuple(one.replace("1e18", "1e-3") for one in wild.overrides)).with_samples()
    code, output = calm()
    assert code == 0, output
    assert "resuming" not in output
    assert list(metrics(calm, "loss")) == [1, 2, 3, 4, 5, 6]
    rates = [row["learning_rate"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert rates[0] == 1e-3 and rates[-1] > 0, "of the step itself, not of the one after it"


@pytest.mark.long
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, small_models: Path) -> None:
    """Each step's loss is a number: that of the first is computed before the update, and no other step follows."""
    once = ("train.learning_rate=1e39", "train.warmup_ratio=0", "train.effective_batch=24")
    training = make(tmp_path / "t", small_models, *once).with_samples(validation=0)
    code, output = training()
    assert code == 2, output
    assert "step 1 of 1: weights are not finite after the update at learning rate 1e+39" in output.splitlines()[-1]
    folder = training.run.path("train")
    assert not (folder / "adapters" / "tuned").exists()
    assert not list(folder.glob("checkpoints/tuned/checkpoint-*"))


@pytest.fixture(scope="module")
def damaged_models(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama with an embedding that is NaN: no loss of a sample with that word is a number."""
    folder = tmp_path_factory.mktemp("damaged")
    model = folder / "random-llama"
    tokenizer = AutoTokenizer.from_pretrained(small_models / "random-llama")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig.from_pretrained(small_models / "random-llama", tie_word_embeddings=False))
    with torch.no_grad():
        llama.get_input_embeddings().weight[tokenizer.encode(ZEBRA)[0]] = math.nan
    llama.save_pretrained(model)
    tokenizer.save_pretrained(model)
    (folder / "all-MiniLM-L6-v2").symlink_to((small_models / "all-MiniLM-L6-v2").resolve())
    return folder


@pytest.mark.long
def test_an_adapter_whose_loss_is_no_number_fails_and_leaves_the_others(tmp_path: Path, damaged_models: Path) -> None:
    mixes = [{"name": name, "data": [name]} for name in ("fine", "broken", "blind")]
    training = make(
        tmp_path / "t", damaged_models, f"train.adapters={json.dumps(mixes)}", "train.keep_going=true"
    ).with_splits(
        {
            "train": [
                *(sample(f"train{i}", source=mix["name"]) for mix in mixes for i in range(15)),
                sample("the" + ZEBRA, source="broken"),
            ],
            "validation": [
                *(sample(f"validation{i}", source=mix["name"]) for mix in mixes for i in range(2)),
                sample("the" + ZEBRA, source="blind"),
            ],
        }
    )
    code, output = training()
    assert code == 0, output
    folder, manifest = training.run.path("train"), training.manifest()
    assert {path.name for path in (folder / "adapters").iterdir()} == {"fine"}
    untrained = manifest["untrained"]
    assert ": the loss is NaN at learning rate " in untrained["broken"]
    assert "step 2 of 4: the validation loss is NaN; lower train.learning_rate or raise" in untrained["blind"]
    assert "loss 0" not in output
    check_numbers(folder)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert {row["adapter"] for row in rows} == {"fine"}
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert all(math.isfinite(row.get("loss", row.get("eval_loss"))) for row in rows)


def test_a_sample_without_an_answer_is_named(tmp_path: Path, small_models: Path) -> None:
    """A validation set of such samples has no loss at all."""
    silent = sample("nothing")
    del silent["messages"][-1]
    training = make(tmp_path / "t", small_models).with_splits({"train": [sample("gear")] * 4, "validation": [silent]})
    code, output = training()
    assert code == 3, output
    assert "sample nothing: has no answer to learn; run preprocess again" in output.splitlines()[-1]


@pytest.mark.long
def test_steps_that_float16_s_loss_scale_skips_are_counted_and_training_goes_on(
    tmp_path: Path, small_models: Path
) -> None:
    """With a scale at which float32's gradients overflow, as float16's do at a smaller one."""
    training = make(tmp_path / "t", small_models, "train.epochs=6", "train.warmup_ratio=0")
    code, output = training(HUNGER=json.dumps({"during": "scaling", "scale": 2.0**130}))
    assert code == 0, output
    losses = metrics(training, "loss")
    assert list(losses) == list(range(1, 37))
    rows = [row for row in read_jsonl(training.run.path("train", "metrics.jsonl")) if "loss" in row]
    skipped = [row["step"] for row in rows if "grad_norm" not in row]
    assert skipped[:3] == [1, 2, 3] and len(skipped) < 18, "the first ones, until the scale fits, and few after that"
    assert training.manifest()["counts"]["tuned steps skipped by the loss scale"] == len(skipped)
    assert losses[36] < losses[1]


@pytest.mark.kill
def test_where_one_of_two_processes_meets_it_both_end_with_the_line(tmp_path: Path, damaged_models: Path) -> None:
    training = make(tmp_path / "t", damaged_models).with_splits(
        {"train": [*(sample(f"train{i}") for i in range(15)), sample("the" + ZEBRA)], "validation": []}
    )
    nodes = TwoNodes(training)
    codes, output = ended(nodes.start())
    assert codes == [2, 2], output + nodes.log()
    assert output.count(": the loss is NaN at learning rate ") == 2
    assert not training.run.path("train", "adapters", "tuned").exists()


@pytest.mark.kill
def test_the_connector_s_line_names_its_own_rate(tmp_path: Path) -> None:
    phase = "train.connector={data: [captions], effective_batch: 4, max_length: 256, learning_rate: %s}"
    training = two_phases(tmp_path, phase % "1e30", "train.log_every=1").prepared()
    code, output = training()
    assert code == 2, output
    last = output.splitlines()[-1]
    assert "training connector failed: step " in last and "lower train.connector.learning_rate or raise" in last
    assert not training.connector.exists()
