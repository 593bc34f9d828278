"""What the manifest, the summary and the console say of trained adapters and of those that failed."""

from typing import Any

from stages.contract.errors import LorryError
from stages.contract.files import read_json, write_json
from stages.contract.recipe import CONNECTOR, Adapter
from stages.contract.stage import Stage
from stages.models.control_words import said_note
from stages.results.summary import SUMMARY, build_summary, dataset_result, training_facts
from stages.train.nodes import folder_parts

OTHERS = (
    "; the others are finished; run the same command again to train only these, or continue without them with --set"
    " train.keep_going=true"
)


def add_outputs(stage: Stage, name: str, files: tuple[str, ...]) -> list[dict[str, Any]]:
    """Add a trained adapter or connector to the stage's outputs, counts and decisions. Returns its rows of
    metrics.jsonl."""
    place = folder_parts(name)
    training = read_json(stage.path(*place, "training.json"))
    stage.counts[f"{name} samples"] = training["samples"]["train"]
    stage.counts[f"{name} steps"] = training["steps"]
    if "skipped_steps" in training:
        stage.counts[f"{name} steps skipped by the loss scale"] = training["skipped_steps"]
    _add_training_facts(stage, name, training)
    for file in (*files, "training.json"):
        stage.outputs["/".join((*place, file))] = None
    return [{"adapter": name, **entry} for entry in training["log"]]


def _add_training_facts(stage: Stage, name: str, training: dict[str, Any]) -> None:
    """Add the facts in the training.json of an adapter or the connector to the manifest: samples that were too long or
    cut, control words, the attention, GPU memory, and what changed when memory ran out. Also prints what was cut, and
    the control words.

    An earlier start or a shard may have written the file.
    """
    settings, what = stage.run.recipe.train, f"adapter {name}"
    if name == CONNECTOR:
        settings, what = settings.connector_settings(), name
    wanted, used = settings.max_length, training["max_length"]
    reason = f"longer than {settings.full_key('max_length')}" + (
        "" if used == wanted else f", which was lowered to {used} to fit the memory"
    )
    for split, samples in training["left_out"].items():
        for sample in samples:
            stage.skip(sample, reason, f"{split}, {what}")
    limit = f"{settings.full_key('max_length')}" + ("" if used == wanted else f", lowered to {used},")
    if cut := training.get("cut"):
        number = stage.counts[f"{name} conversations cut"] = sum(cut.values())
        stage.events.say(f"{what}: {number} conversations are longer than {limit} and begin at a later turn")
    if texts := training.get("in_pieces"):
        number = stage.counts[f"{name} texts in pieces"] = texts["train"] + texts["validation"]
        stage.counts[f"{name} pieces of texts"] = texts["pieces"]
        stage.events.say(f"{what}: {number} texts are longer than {limit} and are cut into {texts['pieces']} pieces")
    if "control_words" in training:
        stage.facts.setdefault("control_words", {})[name] = training["control_words"]
        stage.events.say(f"{what}: {said_note(training['control_words'])}")
    if "attention" in training:
        stage.facts.setdefault("attention", {})[name] = training["attention"]
    if "memory" in training:
        stage.facts.setdefault("gpu_memory", {})[name] = training["memory"]
    for rung in training.get("out_of_memory", []):
        # the list already has a shard's decisions, whose `why` ends with the shard's name
        if not any(made["value"] == rung["value"] and made["why"].startswith(rung["why"]) for made in stage.decisions):
            stage.decisions.append(rung)


def earlier_results(stage: Stage, adapters: list[Adapter]) -> dict[str, dict[str, Any]]:
    """The results of the adapters that earlier starts trained, by name, for this start's summaries."""
    return {
        adapter.name: dataset_result(stage.run, adapter, {"training": training_facts(stage.run, adapter, folder)})
        for adapter in adapters
        if (folder := stage.path("adapters", adapter.name)).is_dir()
    }


def note_result(stage: Stage, results: dict[str, dict[str, Any]], adapter: Adapter, result: dict[str, Any]) -> None:
    """Add an adapter's result and write the summary of all results so far, in case a later adapter fails."""
    results[adapter.name] = dataset_result(stage.run, adapter, result)
    so_far = sorted(results.values(), key=lambda one: one["dataset_index"])
    write_json(stage.path(SUMMARY), build_summary(stage.run, so_far, stage.starts[0]))


def raise_or_report_failures(stage: Stage, failures: dict[str, LorryError], adapters: int) -> None:
    """Raise LorryError if an adapter failed, with the exit code of the first failure.

    `adapters` is the number of adapters that this process trains. If train.keep_going is set and one of them was
    trained, records and prints the failures instead.
    """
    if not failures:
        return
    if len(stage.run.recipe.train.adapters) == 1:
        raise next(iter(failures.values()))
    errors = "; ".join(f"{name}: {error}" for name, error in failures.items())
    if len(failures) == adapters or not stage.run.recipe.train.keep_going:
        others = "" if len(failures) == adapters else OTHERS
        failure = LorryError(f"train.adapters: {len(failures)} of {adapters} failed: {errors}{others}")
        failure.exit_code = next(iter(failures.values())).exit_code
        raise failure
    stage.facts["untrained"] = {name: str(error) for name, error in failures.items()}
    stage.counts["untrained"] = len(failures)
    stage.events.say(f"{len(failures)} of {adapters} adapters failed; run the same command again to retry them")
