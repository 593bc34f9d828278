"""What each component of the task is worth: the first adapter's answers with everything, and without each in turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from stages.contract.files import read_jsonl
from stages.contract.records import Prediction, Sample
from stages.contract.stage import Stage
from stages.eval.scores import Figures, overall, score_models


@dataclass(frozen=True)
class Without:
    """The answers without one component, beside those with everything."""

    component: str
    figures: Figures
    difference: Figures
    """By how much they are better than with everything, paired; below 0 the component is worth something."""
    changed: int
    """Samples that are answered otherwise."""
    seconds: float | None
    """A question, the engine's start left out; None where another machine answered."""


def ablated(
    stage: Stage, task: Any, samples: Sequence[Sample], predictions: dict[str, list[Prediction]]
) -> list[Without]:
    """What was ablated, in the order of the recipe; nothing where nothing was."""
    recipe = stage.run.recipe
    whole = predictions.get(recipe.train.adapters[0].name)
    if whole is None:
        return []
    found: dict[str, list[Prediction]] = {}
    for component in recipe.infer.ablate:
        path = stage.run.path("infer", "ablations", f"{component}.jsonl")
        if component == "adapter":
            found[component] = predictions["base"]
        elif path.is_file():
            found[component] = cast(list[Prediction], read_jsonl(path))
    if not found:
        return []
    # "base" is what the others are compared with
    scores = score_models(task, samples, {"base": whole, **found})
    figures, differences = overall(scores, recipe.eval.bootstrap, recipe.seed)
    return [
        Without(
            component,
            {metric: figure for metric, figure in figures[component].items() if metric not in scores.facts},
            differences[component],
            _changed(whole, records),
            seconds_a_question(stage, "base" if component == "adapter" else f"without {component}"),
        )
        for component, records in found.items()
    ]


def _changed(whole: list[Prediction], others: list[Prediction]) -> int:
    """How many samples are not answered in the same words."""
    texts = {prediction["id"]: prediction["text"] for prediction in whole}
    return sum(prediction["text"] != texts.get(prediction["id"]) for prediction in others)


def seconds_a_question(stage: Stage, variant: str) -> float | None:
    """What infer took for a question, as its manifest has it for a model, or for `without <component>`."""
    took = ((stage.run.manifest("infer") or {}).get("answering") or {}).get(variant)
    return None if not took else round(took["seconds"] / took["samples"], 3)
