"""Which of a run's weights an engine serves, with which data type, and on how many GPUs."""

from collections.abc import Mapping
from pathlib import Path

from stages.contract.files import read_json
from stages.contract.recipe import Adapter, Recipe
from stages.contract.run import Run
from stages.engines import EngineKind, engine_kind, engine_names, refuse_unserved_pictures, refuse_unserved_rank
from stages.hardware.probe import probe
from stages.hardware.serve import plan_serving
from stages.hardware.targets import Target, load_targets, working_target
from stages.models.merge import refuse_adapted_vision
from stages.models.shape import UnknownShapeError, read_shape


def trained_adapters(run: Run) -> list[Adapter]:
    """The recipe's adapters, except those whose training failed."""
    untrained = (run.manifest("train") or {}).get("untrained", {})
    return [adapter for adapter in run.recipe.train.adapters if adapter.name not in untrained]


def serving_target() -> Target:
    """The target of this machine and image, which sets the data type. Raises the errors of `working_target`."""
    return working_target(probe(), load_targets())


def refuse_unserved(kind: EngineKind, model: Path, adapters: Mapping[str, Path], merged: bool) -> None:
    """Raise UsageError if an engine cannot serve the base here or one of these adapters (folder by name): its rank is
    too high, or it has LoRA weights of a vision tower or connector that the engine would ignore.

    With `merged`, the adapters do not count: they are merged before the engine starts.
    """
    if not probe().gpus:
        refuse_unserved_pictures(kind, model)
    if merged:
        return
    for folder in adapters.values():
        config = read_json(folder / "adapter_config.json") or {}
        refuse_unserved_rank(kind, int(config.get("r", 1)))
    if not kind.serves_adapted_vision:
        others = [name for name in engine_names() if engine_kind(name).serves_adapted_vision]
        refuse_adapted_vision(dict(adapters), kind.name, others)


def plan_tensor_parallel(
    recipe: Recipe, kind: EngineKind, model: Path, dtype: str, max_length: int
) -> tuple[int, str | None]:
    """The number of GPUs that share the weights, and the reason for it; without a reason if there is no GPU or the
    engine cannot split weights. Raises DoesNotFitError if the weights do not fit."""
    gpus, asked = probe().gpus, recipe.infer.tensor_parallel
    if not gpus or not kind.shares_weights:
        return 1, None
    try:
        plan = plan_serving(read_shape(model), [gpu.memory_free for gpu in gpus], asked, dtype, max_length)
    except UnknownShapeError as error:
        return asked or 1, f"not planned ({error})"
    return plan.tensor_parallel, plan.why
