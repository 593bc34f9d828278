"""What ZeRO-3 holds whole while it trains, by DeepSpeed's own account: one of two processes, for test_zero.py.

A small Llama, LoRA and gradient checkpointing, four steps with two batches of evaluation after the second, with what
stages.train.sharding sets up and no trainer. Prints numbers of elements as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from stages.train.sharding import deepspeed_config, fix_zero3_loading, free_whole_weights, gather_by_layer


def main(folder: Path) -> None:
    # else DeepSpeed compiles its shared-memory collectives: a minute of two cores, and gloo does as well here
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo", verbose=False)
    config = deepspeed_config("zero3", "float32", 1, 1, 1.0)
    # to this model's layers, of 1,048,576, as they are to those of a 7B model; else all of it would stay whole
    smaller = {"max_live_parameters": 2_200_000, "max_reuse_distance": 2_200_000, "prefetch_bucket_size": 1_100_000}
    config["zero_optimization"] |= {f"stage3_{name}": size for name, size in smaller.items()}
    fix_zero3_loading()
    kept = HfDeepSpeedConfig(config)  # transformers divides while it loads as long as this is there
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    gather_by_layer(model, whole_layers=True)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    divided = [one for one in engine.module.parameters() if not one.ds_persist]

    def whole() -> int:
        return sum(one.ds_numel for one in divided if one.ds_status.name != "NOT_AVAILABLE")  # or on their way

    most, fetches = [0], [0]
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counted(self: Any, module: Any, forward: bool) -> None:
        fetch(self, module, forward)
        fetches[0] += 1
        most[0] = max(most[0], whole())

    PartitionedParameterCoordinator.fetch_sub_module = counted
    together: list[Any] = []
    coalesced = partition_parameters.AllGatherCoalescedHandle.__init__

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        together.append(self)
        coalesced(self, *arguments, **named)

    partition_parameters.AllGatherCoalescedHandle.__init__ = noted
    generator = torch.Generator().manual_seed(deepspeed.comm.get_rank())
    found: dict[str, Any] = {"divided": sum(one.ds_numel for one in divided), "most": [], "fetches": []}
    for step in range(4):
        tokens = torch.randint(0, 1000, (1, 16), generator=generator)
        most[0] = fetches[0] = 0
        engine.train()
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        found["most"].append(most[0])
        found["fetches"].append(fetches[0])
        if step == 1:
            engine.eval()
            for _ in range(2):
                with torch.no_grad():
                    engine(input_ids=tokens, labels=tokens)
                free_whole_weights(engine.module)
            found["after evaluation"] = whole()
    found["through one buffer"] = len(together)
    if deepspeed.comm.get_rank() == 0:
        print("FOUND", json.dumps(found), flush=True)
    deepspeed.comm.barrier()
    del kept


if __name__ == "__main__":
    main(Path(sys.argv[1]))
