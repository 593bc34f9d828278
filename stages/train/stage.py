"""train: one LoRA adapter for each entry of `train.adapters`, each trained in a process of its own.

The process is ended with its memory before anything else is tried on the card, and a crash of it is not ours.
"""

from dataclasses import dataclass
from typing import Any

from stages.contract.files import place_same, read_json, remove, visible_files, write_jsonl
from stages.contract.part import Node
from stages.contract.stage import Stage
from stages.hardware.batch import BatchPlan, plan_batch
from stages.hardware.probe import probe
from stages.hardware.targets import Target, load_targets, working_target
from stages.train.launch import train_adapter
from stages.train.nodes import adapters_announced_by_the_first, announced
from stages.train.worker import Job


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe = stage.run.recipe
    plan: _Plan | None = None  # only once something is to be trained: taking over what is there needs no card
    node = stage.part if isinstance(stage.part, Node) else None
    if node is not None and node.rank > 0:
        for name in adapters_announced_by_the_first(stage):
            plan = plan or _plan(stage, node)
            _train(stage, name, plan, node)
        return
    if stage.nothing_to_do(len(recipe.train.adapters), "adapters"):
        return
    log: list[dict[str, Any]] = []
    for name in [adapter.name for number, adapter in enumerate(recipe.train.adapters) if stage.has(number)]:
        folder = stage.path("adapters", name)
        if not folder.is_dir():
            _take_over(stage, name)
        if not folder.is_dir():
            plan = plan or _plan(stage, node)
            with announced(stage, name, node):
                _train(stage, name, plan, node)
        training = read_json(folder / "training.json")
        stage.counts[f"{name} samples"] = training["samples"]["train"]
        stage.counts[f"{name} steps"] = training["steps"]
        for split, samples in training["left_out"].items():
            for sample in samples:
                stage.skip(sample, "longer than train.max_length", f"{split}, adapter {name}")
        log += [{"adapter": name, **entry} for entry in training["log"]]
        for file in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
            stage.outputs[f"adapters/{name}/{file}"] = None
        stage.stop.check()
    stage.outputs["metrics.jsonl"] = write_jsonl(stage.path("metrics.jsonl"), log)
    remove(stage.path("checkpoints"))  # everything of them that is used from here on is in the adapters


def _take_over(stage: Stage, name: str) -> None:
    """Take an adapter that a shard has trained; it appears once it is whole."""
    for shard in stage.finished_shards:
        source = shard / "adapters" / name
        if source.is_dir():
            partial = stage.path("adapters", f".{name}")
            remove(partial)
            for path in visible_files(source):
                place_same(path, partial / path.relative_to(source))
            partial.rename(stage.path("adapters", name))
            return


@dataclass(frozen=True)
class _Plan:
    target: Target
    batch: BatchPlan
    here: int
    """Training processes on this machine."""
    use_cpu: bool


def _plan(stage: Stage, node: Node | None) -> _Plan:
    """How to train on this machine's cards, and with the other machines'; they must fit the image."""
    machine, settings = probe(), stage.run.recipe.train
    target = working_target(machine, load_targets())
    stage.decide("precision", target.dtype, f"target {target.name}")
    here = max(len(machine.gpus), 1)
    processes = here * (node.count if node else 1)
    if processes > 1:
        where = f"{node.count} nodes with {here} each, meeting at {node.rendezvous}" if node else "one for each GPU"
        stage.decide("training processes", processes, where)
    batch = plan_batch(settings.effective_batch, settings.micro_batch, processes)
    stage.decide("effective batch", str(batch), f"train.effective_batch is {settings.effective_batch}")
    return _Plan(target, batch, here, use_cpu=not machine.gpus)


def _train(stage: Stage, name: str, plan: _Plan, node: Node | None) -> None:
    """Train one adapter. With several machines, this one's part of it: checkpoints and adapter are node 0's."""
    run, recipe = stage.run, stage.run.recipe
    own = stage.path("checkpoints", name)
    job = Job(
        model=run.model(recipe.model.path, "model.path"),
        work=run.path("train", "checkpoints", name) if node else own,
        scratch=own / "scratch",
        adapter=run.path("train", "adapters", name) if node else stage.path("adapters", name),
        train=[run.path("preprocess", "samples", "train.jsonl")],
        validation=[run.path("preprocess", "samples", "validation.jsonl")],
        seed=recipe.seed,
        dtype=plan.target.dtype,
        micro_batch=plan.batch.micro_batch,
        accumulation=plan.batch.accumulation,
        processes=plan.batch.gpus,
        use_cpu=plan.use_cpu,
        model_settings=recipe.model,
        settings=recipe.train,
        reports=-1,
    )
    train_adapter(stage, job, plan.here, node, plan.target.environment)
