"""Write the report: one self-contained HTML file, made from the scores and the manifests of the run.

The report does not contain the time of writing: the same inputs give the same bytes.
"""

import base64
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from stages.contract.errors import DataError
from stages.contract.files import open_atomically, read_jsonl
from stages.contract.recipe import Recipe
from stages.contract.records import BASE, Prediction, Sample
from stages.contract.run import STAGES, Run
from stages.contract.stage import Stage
from stages.eval.ablation import EVERYTHING, Ablation, ablated_adapter, seconds_per_question
from stages.eval.losses import HeldOut, changed_most
from stages.eval.measures import Measure
from stages.eval.scores import Scores, failure_reason, worst_rows
from stages.eval.votes import VoteOutcome
from stages.models.pictures import read_picture
from stages.results.held_out_table import loss_gain_text, range_text
from stages.results.intervals import Figures
from stages.results.uncertainty import documents_note, interval_text, is_clear, star_note
from stages.tasks import load_task

TEMPLATE = Path(__file__).with_name("report.html.jinja")

PICTURE_WIDTH = 500
"""Largest width, in pixels: enough to read a drawing's part numbers, small enough for twenty pages in one file."""

MOST_DRAWN = 200
"""Largest number of samples that one report shows as the task's drawings, not counting the worst answers."""

MOST_TEXT = 1000
"""Largest number of characters that a report shows of a plain text."""

ON_TRAINING_DATA = "Scored on training data: these figures say nothing about other data."

COLOURS = 6
"""Colours in the template's style sheet: `--model-0` for base, the others for adapters in turn."""

GIB = 1024**3


def write_report(
    stage: Stage,
    scores: Scores,
    figures: dict[str, Figures],
    differences: dict[str, Figures],
    groups: dict[str, dict[str, dict[str, Figures]]],
    ablated: list[Ablation],
    vote: VoteOutcome | None,
    measures: dict[str, dict[str, Measure]],
    held_out: HeldOut | None,
    predictions: Mapping[str, Sequence[Prediction]],
    notes: Sequence[str],
    suspicious: Sequence[str],
) -> None:
    """Write `report.html`. `figures` and `differences` are those of `scores.overall_figures`. `groups` has the result
    of `scores.breakdown` for `group` and for `kind`, `ablated` that of `ablation.ablations`, `held_out` that of
    `losses.read_held_out`, `notes` that of the task's `score_notes`, `suspicious` that of `comparison.suspicions`."""
    run, recipe = stage.run, stage.run.recipe
    adapters = [name for name in scores.models if name != "base"]
    task = load_task(recipe.task)
    trained = run.manifest("train") or {"decisions": []}
    curve = read_jsonl(metrics) if (metrics := run.path("train", "metrics.jsonl")).is_file() else []
    colours = {"base": 0} | {name: 1 + index % (COLOURS - 1) for index, name in enumerate(adapters)}
    tested = scores.samples or (held_out.samples if held_out else [])
    html = _load_template().render(
        run=run,
        recipe=recipe,
        scores=scores,
        figures=figures,
        differences=differences,
        adapters=adapters,
        not_run=[adapter.name for adapter in recipe.train.adapters if adapter.name not in scores.models],
        colours=colours,
        documents=len({str(sample["meta"].get("group", "")) for sample in tested}),
        documents_note=documents_note(figure["groups"] for each in figures.values() for figure in each.values()),
        held_out=held_out,
        loss_note=documents_note(figure["groups"] for figure in held_out.figures.values()) if held_out else None,
        beside=_side_by_side(run, held_out, predictions) if held_out else [],
        star_note=star_note,
        notes=notes,
        suspicious=suspicious,
        counts=stage.counts,
        losses=_loss_table(curve, trained),
        rungs=[made for made in trained["decisions"] if made["what"] == "out of memory"],
        loss_curve=loss_curve(curve, colours),
        groups=groups,
        ablated=ablated,
        ablated_adapter=ablated_adapter(recipe, scores.models),
        vote=vote,
        trained_on=ON_TRAINING_DATA if stage.counts["scored on training data"] else None,
        untrained=trained.get("untrained", {}),
        everything=EVERYTHING,
        seconds={name: seconds_per_question(run, name) for name in scores.models},
        measures=measures,
        worst=_worst_answers(run, scores, task),
        drawn=_other_drawings(recipe, scores, task),
        most_drawn=MOST_DRAWN,
        stages=[_stage_facts(run, name) for name in STAGES if name != stage.name],
    )
    with open_atomically(stage.path("report.html")) as file:
        file.write(html)


@cache
def _load_template() -> Template:
    """Return the report's template. It is loaded only once."""
    # adapter names and model output are untrusted: everything is escaped except Markup
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["interval"] = format_interval
    environment.filters["range"] = range_text
    environment.filters["loss_gain"] = loss_gain_text
    environment.tests["clear"] = is_clear
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def format_interval(figure: dict[str, Any], sign: str = "") -> str:
    """Format a figure as `34.4 [25.0, 43.8]`, or as `34.4 [too few]` if it has no interval. `sign` is that of a format
    specification: `+` for differences."""
    return interval_text(figure["value"], figure["low"], figure["high"], sign)


# -- the loss curve ----------------------------------------------------------------------------------------------

_INK = "#010203"  # placeholder for the text's colour, which differs on a dark page


def _colour_placeholder(index: int) -> str:
    """The placeholder for the colour that the style sheet gives a model."""
    return f"#0405{index:02x}"


def loss_curve(curve: list[dict[str, Any]], colours: dict[str, int]) -> Markup | None:
    """Return the adapters' curves of training loss (thin) and validation loss (dashed, with points) over steps, as
    inline SVG; None without losses.

    `curve` has the lines of train's metrics.jsonl, `colours` the index of each model's colour. The same lines give the
    same bytes.
    """
    if not any("loss" in entry or "eval_loss" in entry for entry in curve):
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot, matplotlib needs no display and keeps no figure in memory

    style: Any = {"svg.hashsalt": "lorry", "svg.fonttype": "none", "font.size": 10, "text.color": _INK}
    style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    text = io.StringIO()
    with mpl.rc_context(style):
        drawing = Figure(figsize=(7.6, 3.2), layout="constrained")
        axes = drawing.subplots()
        for adapter in dict.fromkeys(entry["adapter"] for entry in curve):
            own = [entry for entry in curve if entry["adapter"] == adapter]
            colour = _colour_placeholder(colours.get(adapter, 0))
            train = [(entry["step"], entry["loss"]) for entry in own if "loss" in entry]
            validation = [(entry["step"], entry["eval_loss"]) for entry in own if "eval_loss" in entry]
            axes.plot(*_coordinates(train), color=colour, linewidth=1.4, marker="." if len(train) == 1 else "")
            axes.plot(*_coordinates(validation), color=colour, linewidth=1.8, linestyle="--", marker="o", markersize=4)
        axes.set(xlabel="optimizer step", ylabel="loss")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.15, color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        drawing.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    for index in range(COLOURS):
        svg = svg.replace(_colour_placeholder(index), f"var(--model-{index})")
    return Markup(svg)  # safe: matplotlib's output has numbers and two fixed labels, no text from outside


def _coordinates(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The x and the y values of points."""
    return [x for x, _ in points], [y for _, y in points]


def _loss_table(curve: list[dict[str, Any]], trained: dict[str, Any]) -> list[dict[str, Any]]:
    """For each adapter the last step, the first and last training loss, the last and lowest validation loss, and, as
    texts, memory (GiB) and speed (tokens per second) from train's manifest. A value that was not measured is None."""
    rows = []
    for adapter in dict.fromkeys(entry["adapter"] for entry in curve):
        own = [entry for entry in curve if entry["adapter"] == adapter]
        train = [entry["loss"] for entry in own if "loss" in entry]
        validation = [entry["eval_loss"] for entry in own if "eval_loss" in entry]
        rows.append(
            {
                "adapter": adapter,
                "steps": max(entry["step"] for entry in own),
                "first": train[0] if train else None,
                "last": train[-1] if train else None,
                "validation": validation[-1] if validation else None,
                "lowest": min(validation) if validation else None,
                "memory": (peak := trained.get("gpu_memory", {}).get(adapter)) and f"{peak['reserved'] / GIB:.1f} GiB",
                "speed": _speed_text(trained, adapter),
            }
        )
    return rows


def _speed_text(trained: dict[str, Any], adapter: str) -> str | None:
    """An adapter's training speed in tokens per second, with its share of the GPUs' peak, from train's manifest.

    None if it was not measured.
    """
    speed = trained.get("tokens_per_second", {}).get(adapter)
    share = trained.get("share_of_peak", {}).get(adapter)
    return speed and f"{speed:,.0f}" + (f" ({share:.0%} of peak)" if share else "")


# -- the worst answers -------------------------------------------------------------------------------------------


def _worst_answers(run: Run, scores: Scores, task: Any) -> list[dict[str, Any]]:
    """The worst answers of the model that the report shows, each beside base's answer, as the template needs them."""
    name = _shown_model(scores)
    shown = []
    for row in worst_rows(scores, name, run.recipe.eval.worst):
        sample = scores.samples[row]
        answers = {
            model: {
                "answer": prediction["answer"] if (prediction := graded.predictions[row]) else None,
                "error": graded.errors[row],
                "passes": prediction.get("passes", {}) if prediction else {},
                "cut_off": bool(prediction and prediction["finish_reason"] == "length"),
                "values": {
                    metric: None if math.isnan(value) else value
                    for metric, value in zip(scores.metrics, graded.values[row].tolist(), strict=True)
                },
            }
            for model, graded in scores.models.items()
            if model in ("base", name)
        }
        shown.append(
            {
                "sample": sample,
                "question": question_text(sample),
                "answers": answers,
                "drawing": _drawing(run.recipe, scores, task, row),
                "pictures": [
                    {"page": page, "path": path, "data": picture_data(run.folder / path)}
                    for page, path in _pages_and_pictures(sample)
                ],
            }
        )
    return shown


def _side_by_side(
    run: Run, held_out: HeldOut, predictions: Mapping[str, Sequence[Prediction]]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """The samples for which the first adapter's loss changed most, each with the answers of base and that adapter, as
    the template needs them: a title, then the samples. Empty if no adapter has a loss."""
    if not held_out.adapters:
        return []
    adapter = held_out.adapters[0]
    answers = {name: {one["id"]: one for one in predictions.get(name, ())} for name in (BASE, adapter)}
    gained, lost = changed_most(held_out, adapter, run.recipe.eval.worst)
    return [
        (title, [_compared_sample(run, held_out, answers, sample) for sample in samples])
        for title, samples in ((f"Where {adapter} gained most", gained), (f"Where {adapter} lost most", lost))
    ]


def _compared_sample(
    run: Run, held_out: HeldOut, answers: Mapping[str, Mapping[str, Prediction]], sample: Sample
) -> dict[str, Any]:
    """One sample with the answers and losses of some models, as the template needs it."""
    name = sample["id"]
    models = {}
    for model, own in answers.items():
        prediction = own.get(name)
        models[model] = {
            "loss": held_out.losses[model][name].per_token,
            "text": prediction["text"] if prediction else None,
            "error": failure_reason(prediction) if prediction else None,
            "cut_off": bool(prediction and prediction["finish_reason"] == "length"),
        }
    return {
        "sample": sample,
        "question": question_text(sample),
        "reference": reference_text(sample),
        "tokens": held_out.losses[BASE][name].tokens,
        "models": models,
        "pictures": [
            {"page": page, "path": path, "data": picture_data(run.folder / path)}
            for page, path in _pages_and_pictures(sample)
        ],
    }


def reference_text(sample: Sample) -> str | None:
    """Return the text that answers a sample, with its tool calls as JSON; None if it has none, as plain text."""
    if sample["references"]:
        return " / ".join(sample["references"])
    if (answer := sample["meta"].get("answer")) is None:
        return None
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in answer.get("tool_calls") or ()]
    return "\n".join([text for text in (answer.get("content"), *calls) if text]) or None


def _shown_model(scores: Scores) -> str:
    """The model whose worst answers the report shows: the vote if there is one, else the first adapter, else base."""
    return next((model for model in scores.models if model != "base"), "base")


def _drawing(recipe: Recipe, scores: Scores, task: Any, row: int) -> Markup | None:
    """The task's drawing of a sample, with the answer of the model that the report shows unless that answer failed.
    None if the task draws none."""
    graded = scores.models[_shown_model(scores)]
    prediction = graded.predictions[row] if graded.errors[row] is None else None
    svg = task.picture(recipe, scores.samples[row], prediction)
    return None if svg is None else Markup(svg)  # safe: Task.picture escapes


def _other_drawings(recipe: Recipe, scores: Scores, task: Any) -> list[dict[str, Any]]:
    """The drawings of the first MOST_DRAWN samples that have one and are not among the worst answers."""
    taken = set(worst_rows(scores, _shown_model(scores), recipe.eval.worst))
    drawn: list[dict[str, Any]] = []
    for row, sample in enumerate(scores.samples):
        if row in taken or len(drawn) == MOST_DRAWN:
            continue
        drawing = _drawing(recipe, scores, task, row)
        if drawing is not None:
            drawn.append({"id": sample["id"], "drawing": drawing})
    return drawn


def _pages_and_pictures(sample: Sample) -> list[tuple[int | None, str]]:
    """The number and path of each picture of a prompt. The number is that of the document's page, None for a picture
    that is no page."""
    meta = sample["meta"]
    if "pages" in meta:
        return list(zip(meta["pages"], meta.get("page_images", []), strict=True))
    return [(None, path) for path in sample["images"]]


def question_text(sample: Sample) -> str:
    """Return the question alone if the task provides it, else the whole last message; of plain text the beginning."""
    if not sample["messages"]:
        text = sample.get("text") or ""
        return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"
    return str(sample["meta"].get("question") or sample["messages"][-1].get("content") or "")


def picture_data(path: Path) -> str | None:
    """Return a picture as the data URI of a JPEG, at most PICTURE_WIDTH pixels wide and 4 x PICTURE_WIDTH high. Returns
    None if the picture cannot be read: the report then lacks it."""
    content = io.BytesIO()
    try:
        picture = read_picture(path, (2 * PICTURE_WIDTH, 2 * PICTURE_WIDTH))
    except DataError:
        return None
    picture.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
    picture.save(content, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


# -- how the run went --------------------------------------------------------------------------------------------


def _stage_facts(run: Run, name: str) -> dict[str, Any]:
    """Facts about another stage from its manifest, for the template; `manifest` is None if that stage has not run."""
    manifest = run.manifest(name)
    if manifest is None:
        return {"name": name, "manifest": None}
    # a manifest of an earlier version names all that is skipped, and has no counts
    skipped = Counter(manifest.get("skipped_counts") or [entry["reason"] for entry in manifest["skipped"]])
    examples: dict[str, list[str]] = defaultdict(list)
    for entry in manifest["skipped"]:
        examples[entry["reason"]].append(entry["what"])
    return {
        "name": name,
        "manifest": manifest,
        "time": _format_duration(manifest["seconds"]),
        "memory": f"{manifest['peak_memory_bytes'] / GIB:.2f} GiB",
        "gpus": [f"{gpu['name']} ({gpu['uuid']}, driver {gpu['driver']})" for gpu in manifest["gpus"]],
        "skipped_records": skipped.total(),
        "skipped": [(reason, count, examples[reason][:5]) for reason, count in skipped.most_common()],
    }


def _format_duration(seconds: float) -> str:
    """Format a duration: `8.4 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02} min" if hours else f"{minutes} min {rest:02} s"
