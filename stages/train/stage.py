"""train: one LoRA adapter for each entry of `train.adapters`, one after the other.

    planning.py   how a phase trains on this machine
    trained.py    which adapters are finished, by the key of all that they depend on
    attempts.py   one adapter or the connector, with less memory after each shortage (`ladder.py`)
    facts.py      what the manifest, the summary and the console say of each
    torchrun.py   the training processes, which keep the base for the next adapter
    worker.py     what such a process does
    trackers.py   TensorBoard and others, which get each entry of the log

If training one adapter fails, Lorry still trains the others in new processes, except after a lost GPU or on several
nodes.

With `train.connector`, a first phase trains the connector in the same way. The adapters are then trained on the base
with that connector. If the connector changes, Lorry trains the adapters again.

An adapter or connector stays in its place until the one that replaces it is complete, and then in `superseded/`.
"""

from pathlib import Path
from typing import Any

from stages.contract.errors import InterruptedRunError, LorryError, UsageError
from stages.contract.files import read_json, write_jsonl
from stages.contract.part import Node
from stages.contract.recipe import CONNECTOR
from stages.contract.stage import Stage
from stages.contract.superseded import put_back
from stages.engines import engine_kind, refuse_unserved_rank
from stages.models.connector import FILE as CONNECTOR_FILE
from stages.models.connector import check_connector, refuse_quantised_connector, trained_connector
from stages.models.remote_code import settle_base
from stages.models.rendering import check_samples, checked_renderer
from stages.results.summary import training_facts
from stages.train.attempts import train_through_ladder
from stages.train.facts import add_outputs, earlier_results, note_result, raise_or_report_failures
from stages.train.job import TEMPLATE_FILE
from stages.train.nodes import announce_training, announced_adapters, folder_parts
from stages.train.planning import Plan, make_plan
from stages.train.torchrun import TrainingProcesses
from stages.train.trackers import missing_trackers
from stages.train.trained import Trained, adapter_keys, connector_key, copy_from_shard, read_mixes, remove_checkpoints


def work(stage: Stage) -> None:
    """Train the connector, if the recipe has one, and then the adapters. `run_stage` calls this.

    A shard trains only its own adapters. A node other than node 0 joins the trainings that node 0 announces.
    """
    node = stage.part if isinstance(stage.part, Node) else None
    with TrainingProcesses(stage, node) as processes:
        if node is not None and node.rank > 0:
            _train_with_node_0(stage, node, processes)
        elif not stage.has_nothing_to_do(len(stage.run.recipe.train.adapters), "adapters"):
            _train_all(stage, node, processes)


def _train_all(stage: Stage, node: Node | None, processes: TrainingProcesses) -> None:
    """Train what this process has to train and is not finished, and write the outputs."""
    recipe = stage.run.recipe
    _check_model(stage)
    for line in missing_trackers(recipe.train.report_to):
        stage.events.say(line)
    log: list[dict[str, Any]] = []
    adapters = [adapter for number, adapter in enumerate(recipe.train.adapters) if stage.does_piece(number)]
    renderer = checked_renderer(stage)
    mixes, failures = read_mixes(stage, adapters)
    check_samples(stage.run, renderer, (sample for parts in mixes.values() for part in parts for sample in part))
    connector = None
    plan: Plan | None = None  # made when something has to be trained: existing adapters need no GPU
    if recipe.train.connector is not None:
        connector, plan = _train_connector(stage, node, processes, log)
    trained = Trained(stage, adapter_keys(stage, mixes, connector))
    trained.put_back()
    results = earlier_results(stage, [adapter for adapter in adapters if trained.has(adapter.name)])
    for adapter in adapters:
        name = adapter.name
        folder = stage.path("adapters", name)
        if name in failures:
            stage.events.say(f"train {name}: {failures[name]}")
            note_result(stage, results, adapter, {"error": str(failures[name])})
            continue
        if not trained.has(name):
            copy_from_shard(stage, name)
        if not trained.has(name):
            plan = plan or make_plan(stage, node)
            try:
                with announce_training(stage, name, trained.keys[name], node):
                    train_through_ladder(stage, adapter, trained.keys[name], plan, processes, node, connector)
            except LorryError as error:
                # a stop, a lost GPU or a failure of another node concerns more than this adapter
                if isinstance(error, InterruptedRunError) or node is not None:
                    raise
                failures[name] = error
                if len(recipe.train.adapters) > 1:  # a single adapter's error ends the stage
                    stage.events.say(f"train {name}: {error}")
                note_result(stage, results, adapter, {"error": str(error)})
                continue
        note_result(stage, results, adapter, {"training": training_facts(stage.run, adapter, folder)})
        files = ("adapter_model.safetensors", "adapter_config.json", TEMPLATE_FILE)
        log += add_outputs(stage, name, tuple(file for file in files if (folder / file).is_file()))
        stage.stop.check()
    processes.end()
    raise_or_report_failures(stage, failures, len(adapters))
    stage.outputs["metrics.jsonl"] = write_jsonl(stage.path("metrics.jsonl"), log)
    trained.set_others_aside()
    remove_checkpoints(stage, failures)


def _check_model(stage: Stage) -> None:
    """Settle whether the base's Python files run, before anything loads it.

    Raises UsageError if they would have to run and may not, and if infer's engine could not serve the adapters.
    """
    settle_base(stage)
    recipe = stage.run.recipe
    if not recipe.infer.merged:
        refuse_unserved_rank(engine_kind(recipe.infer.engine), recipe.train.rank)


def _train_with_node_0(stage: Stage, node: Node, processes: TrainingProcesses) -> None:
    """Train the connector and the adapters that node 0 announces, together with node 0 and the other nodes."""
    recipe = stage.run.recipe
    by_name = {adapter.name: adapter for adapter in recipe.train.adapters}
    plans: dict[bool, Plan] = {}
    for name in announced_adapters(stage):
        first_phase = name == CONNECTOR
        settings = recipe.train.connector_settings() if first_phase else recipe.train
        # plan the second phase too: it must not turn out impossible only after the first
        for phase in (True, False) if first_phase else (False,):
            plans[phase] = plans.get(phase) or make_plan(stage, node, settings if phase else None)
        adapter = settings.adapters[0] if first_phase else by_name[name]
        connector = None if first_phase else trained_connector(stage.run)
        train_through_ladder(stage, adapter, "", plans[first_phase], processes, node, connector)


def _train_connector(
    stage: Stage, node: Node | None, processes: TrainingProcesses, log: list[dict[str, Any]]
) -> tuple[tuple[Path, str], Plan | None]:
    """Train the connector, unless an earlier start trained it. Returns ((file, sha256), plan of the second phase).

    The plan is None if this start trained no connector. Otherwise it is made before the connector is trained: the
    second phase must not turn out impossible after hours of training. Adds the connector's rows of metrics.jsonl to
    `log`. Raises UsageError if the connector's file has changed since it was trained, and for a shard or a quantised
    base.
    """
    if stage.shard is not None:
        raise UsageError(
            "train.connector: cannot be used with --shard, since each shard would train its own connector; leave out"
            " --shard, or train on several nodes"
        )
    settings = stage.run.recipe.train.connector_settings()
    refuse_quantised_connector(stage.run.model(stage.run.recipe.model.path, "model.path"))
    mix, folder = settings.adapters[0], stage.path(*folder_parts(CONNECTOR))
    key = connector_key(stage, settings)
    second: Plan | None = None
    if (read_json(folder / "made.json") or {}).get("key") != key and not stage.forced:
        put_back(folder, stage.folder, key)
    if (read_json(folder / "made.json") or {}).get("key") != key:
        first, second = make_plan(stage, node, settings), make_plan(stage, node)
        with announce_training(stage, CONNECTOR, key, node):
            train_through_ladder(stage, mix, key, first, processes, node, None)
    sha256 = str(read_json(folder / "made.json")["files"][CONNECTOR_FILE])
    check_connector(folder / CONNECTOR_FILE, sha256)
    log += add_outputs(stage, CONNECTOR, (CONNECTOR_FILE,))
    stage.facts["connector"] = {"sha256": sha256, "data": mix.mix}
    unused = read_json(folder / "training.json")
    for why in ("without_picture", "beyond_most_samples"):
        stage.counts[f"{CONNECTOR} samples {why.replace('_', ' ')}"] = unused[why]
    return (folder / CONNECTOR_FILE, sha256), second
