"""Measure what each component of the task is worth: the first adapter's scores with everything, and without each
component in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from stages.contract.files import read_jsonl
from stages.contract.recipe import Recipe
from stages.contract.records import Prediction, Sample
from stages.contract.run import Run
from stages.eval.scores import Asked, Model, overall_figures, score_models
from stages.results.intervals import Figures

EVERYTHING = "everything"


@dataclass(frozen=True)
class Ablation:
    """The scores without one component, or with EVERYTHING."""

    component: str
    """The component left out; EVERYTHING if none is."""
    figures: Figures
    difference: Figures
    """Paired difference from the scores with everything, in percentage points: negative if the component helps. Empty
    for EVERYTHING."""
    changed: int
    """Number of scored samples whose answer is not the same as with everything."""
    seconds: float | None
    """Seconds per question, without the engine's start; None if not recorded."""


def ablated_adapter(recipe: Recipe, predictions: Mapping[str, Any]) -> str | None:
    """Return the adapter that infer ablates: the first that has predictions; None if none has."""
    return next((adapter.name for adapter in recipe.train.adapters if adapter.name in predictions), None)


def ablations(
    run: Run, task: Any, samples: Sequence[Sample], predictions: Mapping[str, list[Prediction]], asked: Asked
) -> list[Ablation]:
    """Return the scores with EVERYTHING, then without each ablated component, in the recipe's order. Empty if the
    recipe ablates nothing, no adapter has predictions, or the adapter was asked none of the samples.

    `samples` are those with references, `predictions` those of all models. Samples that the adapter was not asked do
    not count.
    """
    recipe = run.recipe
    whole = ablated_adapter(recipe, predictions)
    samples = [sample for sample in samples if whole is not None and asked(whole, sample)]
    if not recipe.infer.ablate or whole is None or not samples:
        return []
    without = {component: _answers_without(run, component, predictions) for component in recipe.infer.ablate}
    # `overall_figures` takes differences from "base": here the answers with everything
    scores = score_models(task, recipe, samples, {"base": predictions[whole], **without})
    figures, differences = overall_figures(scores)
    everything = scores.models["base"]
    return [
        Ablation(
            component=EVERYTHING if name == "base" else name,
            figures={metric: figure for metric, figure in figures[name].items() if metric not in scores.facts},
            difference=differences.get(name, {}),
            changed=_count_changed_answers(model, everything),
            seconds=seconds_per_question(run, whole if name == "base" else _variant_name(name)),
        )
        for name, model in scores.models.items()
    ]


def _answers_without(run: Run, component: str, predictions: Mapping[str, list[Prediction]]) -> Sequence[Prediction]:
    """The predictions without a component. Without the adapter, these are base's: infer does not write them twice."""
    if component == "adapter":
        return predictions["base"]
    return cast(list[Prediction], read_jsonl(run.path("infer", "ablations", f"{component}.jsonl")))


def _variant_name(component: str) -> str:
    """The name under which infer's manifest records the answers without a component."""
    return "base" if component == "adapter" else f"without {component}"


def _count_changed_answers(model: Model, everything: Model) -> int:
    """Count the samples for which a model's answer is not the one with everything."""
    answers, others = (
        [prediction and prediction["answer"] for prediction in each.predictions] for each in (model, everything)
    )
    return sum(answer != other for answer, other in zip(answers, others, strict=True))


def seconds_per_question(run: Run, variant: str) -> float | None:
    """Return infer's seconds per question, from its manifest, for a model or for `without <component>`; None if not
    recorded."""
    took = ((run.manifest("infer") or {}).get("answering") or {}).get(variant)
    return None if not took else round(took["seconds"] / took["samples"], 3)
