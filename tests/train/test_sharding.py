"""A base sharded by ZeRO-3, on processors: two processes train as one alone, and either goes on from the other's
checkpoints. benchmarks.zero shows the same on GPUs."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages.contract.errors import UsageError
from stages.contract.files import read_json
from stages.train.sharding import check_sharding, deepspeed_config
from stages.train.together import Together
from tests.conftest import REPOSITORY
from tests.train.sharded_training import LIVE, MIDDLE, PREFETCH, make_inputs, train

SITE = REPOSITORY / ".venv" / "zero"
"""Where `make test` puts DeepSpeed."""


def test_sharding_without_gpus_or_deepspeed_is_one_clear_line() -> None:
    check_sharding("none", use_cpu=True, quantisation="gptq")
    check_sharding("auto", use_cpu=True, quantisation="gptq")
    with pytest.raises(UsageError, match=r"zero3 cannot shard a base quantised with gptq; set it to none or auto"):
        check_sharding("zero3", use_cpu=False, quantisation="gptq")
    with pytest.raises(UsageError, match=r"train.sharding: zero3 needs a GPU, but there is none here; set it to none"):
        check_sharding("zero3", use_cpu=True, quantisation=None)
    assert importlib.util.find_spec("deepspeed") is None, "this test is for where it is missing"
    with pytest.raises(UsageError, match=r"train.sharding: zero3 needs DeepSpeed, which is not installed here; set it"):
        check_sharding("zero3", use_cpu=False, quantisation=None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zero3_has_room_to_fetch_a_layer_of_a_7b_model_ahead(dtype: str) -> None:
    config, layer = deepspeed_config(dtype), 233_000_000
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (dtype == "bfloat16", dtype == "float16")
    assert not {"optimizer", "scheduler"} & config.keys(), "they are the loop's"
    zero = config["zero_optimization"]
    assert zero["stage3_max_live_parameters"] - layer >= layer
    assert zero["stage3_prefetch_bucket_size"] >= layer
    assert not [name for name in zero if "offload" in name]


def in_two_processes(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a module in two processes that find DeepSpeed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    path = {"PYTHONPATH": f"{SITE}:{REPOSITORY}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", module, *arguments],
        env={**os.environ, **path},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.long
def test_what_is_changed_in_deepspeed_is_there() -> None:
    """`sharded_loading` sets an argument of it, and transformers calls it by this name."""
    code = "import deepspeed, inspect; print(*inspect.signature(deepspeed.zero.Init).parameters)"
    environment = {**os.environ, "PYTHONPATH": str(SITE), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "tensor_overrides" in done.stdout.splitlines()[-1].split(), done.stdout + done.stderr
    assert "deepspeed.zero.Init(config" in inspect.getsource(transformers.PreTrainedModel)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models trained alone and sharded, and half in each way, in both orders."""
    assert (SITE / "deepspeed").is_dir(), "no DeepSpeed; `make test` and `make kill-test` install it"
    folder, alone = tmp_path_factory.mktemp("sharded"), Together(1, use_cpu=True)
    make_inputs(folder)
    for model in ("llama", "vl"):
        train(folder, f"{model}/alone", alone, 1)
    trainings = ("llama/sharded", "llama/then-sharded/alone", "vl/sharded")
    done = in_two_processes("tests.train.sharded_training", str(folder), *trainings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    train(folder, "llama/then-alone/sharded", alone, 1)
    return folder


def weights(folder: Path, name: str = "adapter_model.safetensors", step: int = 6) -> dict[str, torch.Tensor]:
    """A file of a checkpoint."""
    return load_file(folder / f"checkpoint-{step}" / name)


@pytest.mark.long
@pytest.mark.parametrize("training", ["llama/sharded", "llama/then-sharded", "llama/then-alone", "vl/sharded"])
def test_a_sharded_base_trains_as_a_whole_one_and_either_goes_on(trained: Path, training: str) -> None:
    found, wanted = (read_json(trained / f"{one}.json") for one in (training, f"{Path(training).parent}/alone"))
    assert [entry["step"] for entry in wanted if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in wanted if "eval_loss" in entry] == [MIDDLE, 6]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    mine, theirs = trained / training, trained / Path(training).parts[0] / "alone"
    files = [sorted(path.name for path in (one / "checkpoint-6").iterdir()) for one in (mine, theirs)]
    assert files[0] == files[1]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        own, others = weights(mine, name), weights(theirs, name)
        assert own.keys() == others.keys()
        assert all(value.dtype == torch.float32 for value in own.values())
        assert max(float((own[key] - others[key]).abs().max()) for key in own) < 1e-5
    before = weights(theirs, step=MIDDLE)
    assert max(float((value - before[key]).abs().max()) for key, value in weights(mine).items()) > 1e-4


@pytest.mark.long
def test_few_layers_are_whole_at_a_time_and_each_is_gathered_at_once(trained: Path) -> None:
    layer, head = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96, 300 * 64
    for figures in (read_json(trained / f"figures-{rank}.json") for rank in range(2)):
        assert figures["divided"] == 4 * layer + 2 * head
        assert layer < figures["most"] <= LIVE + PREFETCH, "as the plan of memory counts"
        assert figures["after a backward pass"] == 0
        assert figures["through one buffer"] == 0, "all would be there twice"
        # the pass, embeddings, decoder, rotations, 4 layers and norm; backwards all but embeddings and rotations, and
        # the checkpointed layer forward once more: not module by module. At the end there is an evaluation
        assert figures["fetches"] == figures["passes"] * (9 + 8) + 9


@pytest.mark.long
def test_peft_loads_what_was_trained_sharded(trained: Path) -> None:
    checkpoint = trained / "llama" / "sharded" / "checkpoint-6"
    base = AutoModelForCausalLM.from_pretrained(trained / "llama" / "model")
    loaded: Any = get_peft_model_state_dict(PeftModel.from_pretrained(base, checkpoint))
    saved = weights(trained / "llama" / "sharded")
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
