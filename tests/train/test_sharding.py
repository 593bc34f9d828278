"""What DeepSpeed is told. That it trains so, test_zero.py shows on processors and `benchmarks.zero` on GPUs."""

import importlib.util
import json
import os

import pytest
import torch

from stages.contract.errors import UsageError
from stages.train.sharding import check_sharding, convert_trainable_weights, deepspeed_config
from stages.train.together import Together


@pytest.mark.parametrize(("sharding", "stage"), [("zero2", 2), ("zero3", 3)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_recipe_decides_batch_clipping_and_precision(sharding: str, stage: int, dtype: str) -> None:
    config = deepspeed_config(sharding, dtype, micro_batch=2, accumulation=5, max_grad_norm=0.5)
    assert config["zero_optimization"]["stage"] == stage
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 5)
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] == (dtype == "bfloat16")
    assert config["fp16"]["enabled"] == (dtype == "float16")
    assert "auto" not in json.dumps(config), "nothing is left to be filled in"


def test_the_optimizer_is_the_trainers_and_nothing_leaves_the_gpu() -> None:
    for sharding in ("zero2", "zero3"):
        config = deepspeed_config(sharding, "bfloat16", 1, 1, 1.0)
        assert not {"optimizer", "scheduler"} & config.keys()
        assert not [name for name in config["zero_optimization"] if "offload" in name]


def test_the_loss_scale_means_what_it_means_to_torch() -> None:
    fp16, torchs = deepspeed_config("zero2", "float16", 1, 1, 1.0)["fp16"], torch.amp.GradScaler("cpu")
    assert 2 ** fp16["initial_scale_power"] == torchs.get_scale()
    assert fp16["loss_scale_window"] == torchs.get_growth_interval()
    assert (fp16["loss_scale"], fp16["hysteresis"]) == (0, 1)  # dynamic, and halved at the first overflow


def test_sharding_without_gpus_or_deepspeed_is_one_clear_line() -> None:
    check_sharding("none", use_cpu=True, quantisation="gptq")
    with pytest.raises(UsageError, match=r"train.sharding: zero3 cannot shard a base quantised with gptq; set it to"):
        check_sharding("zero3", use_cpu=False, quantisation="gptq")
    with pytest.raises(
        UsageError, match=r"train.sharding: zero3 needs a GPU, but there is none here; set it to none or auto"
    ):
        check_sharding("zero3", use_cpu=True, quantisation=None)
    assert importlib.util.find_spec("deepspeed") is None, "this test is for where it is missing"
    with pytest.raises(
        UsageError, match=r"train.sharding: zero2 needs DeepSpeed, which is not installed here; set it to"
    ):
        check_sharding("zero2", use_cpu=False, quantisation="gptq")


def test_only_trainable_weights_take_the_type_of_the_base() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    convert_trainable_weights("bfloat16", model)
    assert [parameter.dtype for parameter in model.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_zero3_has_room_to_fetch_a_layer_of_a_7b_model_ahead() -> None:
    layer = 233_000_000
    zero = deepspeed_config("zero3", "bfloat16", 1, 1, 1.0)["zero_optimization"]
    assert zero["stage3_max_live_parameters"] - layer >= layer
    assert zero["stage3_prefetch_bucket_size"] >= layer
    assert "stage3_allgather_sequential" not in zero, "it would turn fetching ahead off"


def test_one_process_alone_has_a_group_where_deepspeed_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # set back afterwards
    together = Together(1, use_cpu=True, sharding="zero2")
    assert (torch.distributed.get_world_size(), os.environ["LOCAL_RANK"]) == (1, "0")
    assert together.is_first and together.gather("said") == ["said"] and not together.is_set_anywhere(False)
    together.leave()
    assert not torch.distributed.is_initialized()
