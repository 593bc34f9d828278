"""Trainings without the stage, for test_sharding.py: a small Llama and a small vision-language model, alone or by two
processes with the base sharded.

The command is `python -m torch.distributed.run ... -m tests.train.sharded_training FOLDER TRAINING...`; a training is
`<model>/<name>`, or `<model>/<name>/<other>` to go on from the middle of another.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stages.contract.files import write_json
from stages.contract.recipe import Adapter, load_recipe
from stages.contract.stop import StopRequest
from stages.train import sharding
from stages.train.base import load_trainee
from stages.train.job import Job, Progress
from stages.train.loop import Loop
from stages.train.samples import Facts, Samples, SizedPicture, TokenSequence, write_samples
from stages.train.together import Together
from tests.conftest import REPOSITORY, need_model

PICTURE, PLACEHOLDER = SizedPicture("picture.png", 56, 28, 2), 151655
MIDDLE = 3
"""Step of the first checkpoint; there are six steps."""
LIVE, PREFETCH = 64_000, 32_000
"""Weights that are whole at a time, two layers, and that are fetched ahead, one layer."""


def make_inputs(folder: Path) -> None:
    """Write models and samples: 11 in steps of 5, 5 and 1, so that processes have unequal passes, and in the last step
    one has none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "head_dim": 16,
    }
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(
        folder / "llama" / "model"
    )
    (folder / "vl").mkdir()
    (folder / "vl" / "model").symlink_to(need_model("tiny-qwen2.5-vl"))
    numbers = np.random.RandomState(0)
    Image.fromarray(numbers.randint(0, 255, (28, 56, 3), np.uint8)).save(folder / "vl" / PICTURE.path)

    def sequence(length: int, seeing: bool) -> list[TokenSequence]:
        tokens = numbers.randint(1, 300, length).astype(np.int32)
        tokens[2 : 2 + 2 * seeing] = PLACEHOLDER
        return [TokenSequence(tokens, np.arange(length) > length // 2, (PICTURE,) * seeing)]

    lengths = [60, 9, 31, 12, 30, 8, 58, 11, 29, 14, 40]
    for model in ("llama", "vl"):
        for split, chosen in (("train", lengths), ("validation", lengths[:3])):
            samples = [sequence(length, model == "vl" and length > 30) for length in chosen]
            write_samples(folder / model / split, samples, Facts())


def job(folder: Path, name: str, processes: int) -> Job:
    """A training of the model in a folder."""
    settings = ("train.effective_batch=5", "train.epochs=2", "train.dropout=0.1", "train.target_modules=[all-linear]")
    more = (f"train.checkpoint_every={MIDDLE}", "train.log_every=1", "train.lora_plus_ratio=4", "train.rank=4")
    # LoRA in the vision tower too
    seeing = ("train.freeze_vision=false", "infer.merged=true") if folder.name == "vl" else ()
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", (*settings, *more, *seeing))
    return Job(
        model=folder / "model",
        work=folder / name,
        scratch=folder / "scratch",
        adapter=folder / "adapters" / name,
        run=folder,
        key="",
        mix=Adapter(name="tuned"),
        train=[],
        validation=[],
        seed=7,
        dtype="float32",
        sharding="zero3" if processes > 1 else "none",
        pass_tokens=64,
        processes=processes,
        evaluation_tokens=64,
        evaluate=True,
        use_cpu=True,
        cards=[],
        model_settings=recipe.model,
        settings=recipe.train,
        progress=0,
        checkpointed_layers=1,
    )


def train(folder: Path, training: str, together: Together, processes: int) -> Loop:
    """Train to the end; write the log."""
    model, name, *other = training.split("/")
    made = job(folder / model, name, processes)
    samples, validation = (Samples(folder / model / split) for split in ("train", "validation"))
    trainee = load_trainee(made, torch.device("cpu"), samples.probes())
    assert trainee.packs, trainee.why_one_by_one
    progress, stop = Progress(os.open(os.devnull, os.O_WRONLY)), StopRequest()
    loop = Loop(made, trainee, samples, validation, together, progress, stop)
    for one in other:
        begun = folder / model / one / f"checkpoint-{MIDDLE}"
        if together.is_first:
            shutil.copytree(begun, made.work / begun.name)
        loop.resume(begun)
    loop.run()
    if together.is_first:
        write_json(folder / model / f"{name}.json", loop.state.log)
    return loop


def count_whole_weights(figures: dict[str, Any]) -> None:
    """Have DeepSpeed count, from now on, how many elements are whole at once, and what it gathers."""
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    fetch = PartitionedParameterCoordinator.fetch_sub_module
    coalesced = partition_parameters.AllGatherCoalescedHandle.__init__

    def counted(self: Any, module: Any, forward: bool) -> None:
        fetch(self, module, forward)
        figures["fetches"] += 1
        figures["most"] = max(figures["most"], figures["whole"]())

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        figures["through one buffer"] += 1
        coalesced(self, *arguments, **named)

    PartitionedParameterCoordinator.fetch_sub_module = counted
    partition_parameters.AllGatherCoalescedHandle.__init__ = noted


def main() -> None:
    """Run the trainings that the command line names, with a sharded base."""
    import deepspeed

    # else DeepSpeed compiles its shared-memory collectives: a minute of two cores, and gloo does as well here
    deepspeed.ops.__compatible_ops__ = {}
    # else all of these small models stays whole
    vars(sharding).update(UNDIVIDED_ELEMENTS=100, ZERO3_LIVE=LIVE, ZERO3_PREFETCH=PREFETCH)
    folder, together = Path(sys.argv[1]), Together(2, use_cpu=True)
    figures: dict[str, Any] = {"whole": lambda: 0, "fetches": 0, "most": 0, "through one buffer": 0}
    count_whole_weights(figures)
    for training in sys.argv[2:]:
        loop = train(folder, training, together, 2)
        weights = [one for one in loop._trainee.model.parameters() if not one.ds_persist]

        def whole(weights: Any = weights) -> int:
            return sum(one.ds_numel for one in weights if one.ds_status.name != "NOT_AVAILABLE")  # or on their way

        if training == "llama/sharded":  # once more, as each pass is by now
            figures |= {"whole": whole, "fetches": 0, "most": 0, "divided": sum(one.ds_numel for one in weights)}
            passes = list(loop._own_passes([one for sample in loop._samples for one in sample], 64))
            for places, sequences in passes:
                loop._trainee.add_gradients(loop._trainee.prepare(sequences, places), 1.0)
            figures["after a backward pass"] = whole()
            loop._trainee.loss(passes[0][1])
            found = {name: value for name, value in figures.items() if name != "whole"}
            write_json(folder / f"figures-{together.rank}.json", {**found, "passes": len(passes)})
            figures["whole"] = lambda: 0
        assert whole() == 0, "after an evaluation"
    together.leave()


if __name__ == "__main__":
    main()
