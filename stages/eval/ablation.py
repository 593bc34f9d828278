"""What each component of the task is worth: the first trained adapter's answers with everything, and without each in
turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from stages.contract.files import read_jsonl
from stages.contract.recipe import Recipe
from stages.contract.records import Prediction, Sample
from stages.contract.stage import Stage
from stages.eval.scores import Asked, Model, overall, score_models
from stages.results.intervals import Figures

EVERYTHING = "everything"


@dataclass(frozen=True)
class Ablation:
    """The answers without one component, beside those with everything."""

    component: str
    """What is left out; EVERYTHING for the answers that the others are compared with."""
    figures: Figures
    difference: Figures
    """By how much they are better than with everything, paired; below 0 the component is worth something."""
    changed: int
    """Scored samples with another answer."""
    seconds: float | None
    """A question, the engine's start left out; None where another machine answered."""


def ablated_adapter(recipe: Recipe, predictions: Mapping[str, Any]) -> str | None:
    """The adapter whose answers are compared: the first that has any. None where no adapter has."""
    return next((adapter.name for adapter in recipe.train.adapters if adapter.name in predictions), None)


def ablations(
    stage: Stage, task: Any, samples: Sequence[Sample], predictions: Mapping[str, list[Prediction]], asked: Asked
) -> list[Ablation]:
    """Everything, then what was ablated in the order of the recipe; empty where nothing was.

    `samples` are those with references, `predictions` all models'; what the adapter was not asked counts nowhere.
    """
    recipe = stage.run.recipe
    whole = ablated_adapter(recipe, predictions)
    samples = [sample for sample in samples if whole is not None and asked(whole, sample)]
    if not recipe.infer.ablate or whole is None or not samples:
        return []
    without = {component: _answers_without(stage, component, predictions) for component in recipe.infer.ablate}
    scores = score_models(
        task, recipe, samples, {"base": predictions[whole], **without}
    )  # differences are those from "base"
    figures, differences = overall(scores, recipe.eval.bootstrap, recipe.seed)
    everything = scores.models["base"]
    return [
        Ablation(
            component=EVERYTHING if name == "base" else name,
            figures={metric: figure for metric, figure in figures[name].items() if metric not in scores.facts},
            difference=differences.get(name, {}),
            changed=_changed(model, everything),
            seconds=seconds_a_question(stage, whole if name == "base" else _variant(name)),
        )
        for name, model in scores.models.items()
    ]


def _answers_without(stage: Stage, component: str, predictions: Mapping[str, list[Prediction]]) -> Sequence[Prediction]:
    """Without the adapter they are the base model's, which infer does not write again."""
    if component == "adapter":
        return predictions["base"]
    return cast(list[Prediction], read_jsonl(stage.run.path("infer", "ablations", f"{component}.jsonl")))


def _variant(component: str) -> str:
    """Its name in infer's manifest."""
    return "base" if component == "adapter" else f"without {component}"


def _changed(model: Model, everything: Model) -> int:
    answers, others = (
        [prediction and prediction["answer"] for prediction in each.predictions] for each in (model, everything)
    )
    return sum(answer != other for answer, other in zip(answers, others, strict=True))


def seconds_a_question(stage: Stage, variant: str) -> float | None:
    """What infer took for a question, as its manifest has it for a model, or for `without <component>`."""
    took = ((stage.run.manifest("infer") or {}).get("answering") or {}).get(variant)
    return None if not took else round(took["seconds"] / took["samples"], 3)
