"""What `lorry serve` and `lorry chat` serve of a run: base and adapters by name, by which engine, with which limits."""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from stages.contract.errors import UsageError
from stages.contract.files import read_json
from stages.contract.records import BASE, Sample
from stages.contract.run import Run, lock_stage_folder
from stages.engines import EngineKind, engine_kind, refuse_unserved_model
from stages.engines.engine import EngineSettings
from stages.engines.weights import plan_tensor_parallel, refuse_unserved, serving_target, trained_adapters
from stages.models.chat_settings import ChatSettings, chat_settings
from stages.models.connector import link_connector, trained_connector
from stages.models.merge import write_merged_copy
from stages.models.pictures import PictureRules, family_rules
from stages.models.remote_code import settle_remote_code
from stages.models.rendering import Renderer

Say = Callable[[str], None]
"""A function that prints a line."""

BATCH = 16
"""Sequences that the transformers engine decodes together if `infer.batch_size` is auto."""

SAMPLED = 10_000
"""Training samples among which the commonest system message is found."""

PICTURES = 8
"""Largest number of pictures in a request to vLLM, which reserves memory for them."""


@dataclass(frozen=True)
class Weights:
    """Weights that one engine loads."""

    model: Path
    base: bool
    """Whether the model is the base; if not, it is served only with its adapters, or is itself one, merged."""
    adapters: dict[str, Path]
    """Folders of adapters by name."""
    merged: str | None = None
    """The adapter that is merged into the model."""

    @property
    def names(self) -> list[str]:
        """The names that clients use."""
        return [*([BASE] if self.base else []), *([self.merged] if self.merged else []), *self.adapters]


@dataclass(frozen=True)
class Served:
    """A run that can be served."""

    run: Run
    kind: EngineKind
    weights: list[Weights]
    """One entry for each engine."""
    chat: ChatSettings
    renderer: Renderer
    dtype: str
    max_length: int
    """Largest number of tokens of a prompt with its completion."""

    @property
    def names(self) -> list[str]:
        """The names that clients use: base first, then the adapters."""
        return [name for weights in self.weights for name in weights.names]

    @property
    def max_pixels(self) -> int | None:
        """Largest number of pixels that a model of the Qwen2-VL family gets of a picture: as in training, or as many as
        leave half of `max_length` for text. None for other models, which scale each picture to one size."""
        rules = family_rules(self.weights[0].model)
        if not isinstance(rules, PictureRules):
            return None
        return self.run.recipe.train.max_pixels or self.max_length // 2 * rules.factor**2

    @property
    def reads_pictures(self) -> bool:
        """Whether the base is a vision-language model."""
        config = read_json(self.weights[0].model / "config.json") or {}
        return "vision_config" in config or "mm_vision_tower" in config

    def engine_settings(self, weights: Weights, say: Say) -> EngineSettings:
        """What an engine needs to load these weights. Raises DoesNotFitError if they do not fit the GPUs."""
        recipe = self.run.recipe
        count, why = plan_tensor_parallel(recipe, self.kind, weights.model, self.dtype, self.max_length)
        if why is not None:
            say(f"tensor parallel: {count} ({why})")
        size = recipe.infer.batch_size
        return EngineSettings(
            model=weights.model,
            adapters=weights.adapters,
            dtype=self.dtype,
            max_new_tokens=recipe.infer.max_new_tokens,
            batch_size=BATCH if size == "auto" else size,
            max_length=self.max_length,
            seed=recipe.seed,
            tensor_parallel=count,
            max_pictures=PICTURES if self.reads_pictures else 0,
            max_pixels=self.max_pixels or 0,
            trust_remote_code=recipe.model.trust_remote_code,
        )

    def samples(self, split: str, most: int) -> list[Sample]:
        """The first samples of a split, at most `most`; none if preprocess has left no such file."""
        path = self.run.path("preprocess", "samples", f"{split}.jsonl")
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="\n") as file:
            return cast(list[Sample], [json.loads(line) for line in islice(file, most)])


def served_run(run: Run, engine: str | None, only: str | None, max_length: int | None, say: Say) -> Served:
    """Find out how a run can be served, without loading anything.

    `engine` None: the recipe's, or the transformers engine where that cannot serve the run, which `say` explains.
    `only` names the one model to serve, `base` or an adapter; None: all. `max_length` None: `infer.max_length`. It is
    never more than the model has positions. Raises UsageError for a run that is not trained, an unknown name, and
    what the engine cannot serve.
    """
    recipe = run.recipe
    if run.manifest("train") is None:
        raise UsageError(f"{run.folder}: train is not done, so there is nothing to serve; run train first")
    names = [adapter.name for adapter in trained_adapters(run)]
    if only is not None and only not in (BASE, *names):
        raise UsageError(f"{only}: no such model in {run.folder}; known models: {', '.join((BASE, *names))}")
    adapters = {name: run.path("train", "adapters", name) for name in names if only in (None, name)}
    model = run.model(recipe.model.path, "model.path")
    settle_remote_code(model, recipe.model.trust_remote_code)
    chat = chat_settings(run)
    renderer = Renderer(model, chat)
    for line in renderer.check_template():
        say(line)
    kind = engine_kind(engine or recipe.infer.engine)
    try:
        _refuse(run, kind, model, adapters, only)
    except UsageError as error:
        if engine is not None or kind.serves_adapted_vision:
            raise
        say(f"{error}: served by the transformers engine")
        kind = engine_kind("transformers")
        _refuse(run, kind, model, adapters, only)
    dtype = serving_target().dtype
    weights = _weights(run, kind, model, adapters, only, dtype)
    length = min(max_length or recipe.infer.max_length, _positions(model) or recipe.infer.max_length)
    return Served(run, kind, weights, chat, renderer, dtype, length)


def _refuse(run: Run, kind: EngineKind, model: Path, adapters: dict[str, Path], only: str | None) -> None:
    """Raise UsageError if an engine is not installed here, or cannot serve the base or all of the adapters."""
    missing = [library for library in kind.libraries if importlib.util.find_spec(library) is None]
    if missing:
        raise UsageError(f"infer.engine {kind.name}: needs {', '.join(missing)}, not installed here; run `make setup`")
    refuse_unserved_model(kind, model)
    merges = run.recipe.infer.merged and kind.has_server
    refuse_unserved(kind, model, adapters, merges)
    if not kind.has_server:
        return
    for key, several in (("infer.merged", merges), ("train.connector", run.recipe.train.connector is not None)):
        if several and only is None:
            raise UsageError(
                f"{key}: base and adapters have weights of their own, of which {kind.name} serves one at a time; name"
                " one model with --only, or use --engine transformers"
            )


def _weights(
    run: Run, kind: EngineKind, model: Path, adapters: dict[str, Path], only: str | None, dtype: str
) -> list[Weights]:
    """The weights to load, one entry for each engine. Writes copies and links to the run's folder `serve`."""
    connector, folder = trained_connector(run), run.folder / "serve"
    if only == BASE:
        return [Weights(model, True, {})]
    merges = kind.has_server and run.recipe.infer.merged and only is not None
    if connector is None and not merges:
        return [Weights(model, only is None, adapters)]
    with lock_stage_folder(folder):  # two servers may start at once
        connected = model if connector is None else link_connector(model, *connector, folder / "with-connector")
        if merges and only is not None:
            copy = write_merged_copy(connected, adapters[only], folder / "merged" / only, dtype)
            return [Weights(copy, False, {}, merged=only)]
    tuned = Weights(connected, False, adapters)
    return [*([Weights(model, True, {})] if only is None else []), tuned]


def _positions(model: Path) -> int | None:
    """The number of positions that a model's config names; None if it names none."""
    config: dict[str, Any] = read_json(model / "config.json") or {}
    return config.get("max_position_embeddings") or (config.get("text_config") or {}).get("max_position_embeddings")


def system_prompt(served: Served) -> str | None:
    """The commonest system message of the training samples; None if most have none."""
    found = Counter(
        sample["messages"][0]["content"] if sample["messages"] and sample["messages"][0]["role"] == "system" else None
        for sample in served.samples("train", SAMPLED) or served.samples("test", SAMPLED)
    )
    return found.most_common(1)[0][0] if found else None
