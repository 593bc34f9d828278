"""ZeRO-3 by the train command: two processes on this machine's processors, each with half of the model."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.files import read_jsonl
from tests.conftest import REPOSITORY
from tests.train.conftest import Training
from tests.train.test_nodes import TwoNodes, ended

SITE = REPOSITORY / ".venv" / "zero"
"""Where `make test` puts DeepSpeed."""
STEPS = 12
ON_PROCESSORS = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{SITE}:{REPOSITORY}"}


@pytest.fixture(scope="module")
def wide_models(small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with weights large enough to be divided: 6 layers of 1,048,576 and norms, a vocabulary of 49,152."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert (SITE / "deepspeed").is_dir(), "no DeepSpeed; `make test` and `make kill-test` install it"
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(small_models / "random-llama", folder / "wide-llama")
    (folder / "all-MiniLM-L6-v2").symlink_to((small_models / "all-MiniLM-L6-v2").resolve())
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(small_models / "random-llama", **shape, **heads)
    LlamaForCausalLM(config).save_pretrained(folder / "wide-llama")
    return folder


def of(training: Training, models: Path, sharding: str) -> TwoNodes:
    """The training with a sharding, on the same run folder."""
    settings = {
        **{"model.path": "wide-llama", "train.epochs": "2", "train.checkpoint_every": "5"},
        "train.sharding": sharding,
    }
    overrides = tuple(f"{name}={value}" for name, value in settings.items())
    lorry = replace(training.lorry, models=models)
    return TwoNodes(Training(lorry, (*training.overrides, *overrides)))


def losses(training: Training) -> dict[int, float]:
    rows = read_jsonl(training.run.path("train", "metrics.jsonl"))
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return found | {-row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


@pytest.mark.kill
def test_it_trains_as_without_stops_and_goes_on_without(training: Training, wide_models: Path, tmp_path: Path) -> None:
    whole = of(training, wide_models, "none")
    whole.training.with_samples()
    codes, output = ended(whole.start())
    assert codes == [0, 0], output + whole.log()
    undisturbed = losses(whole.training)
    assert {-5, -10, -STEPS, STEPS} <= undisturbed.keys(), "evaluations are to be compared, too"

    other = replace(training.lorry, runs=tmp_path / "other")
    sharded = of(Training(other, training.overrides), wide_models, "zero3")
    sharded.training.with_samples()
    first, second = sharded.start(**ON_PROCESSORS)
    sharded.wait_for_steps(first, 4)
    first.terminate()
    codes, output = ended([first, second])
    assert codes == [75, 75], output + sharded.log()
    codes, output = ended(of(Training(other, training.overrides), wide_models, "none").start())
    assert codes == [0, 0], output + sharded.log()
    assert "resuming from checkpoint-" in output
    assert losses(sharded.training) == pytest.approx(undisturbed, abs=1e-5)
