"""Start and close infer's engine with the weights that are needed, and choose its batch size.

One engine runs at a time, and as few are started as the weights allow: one for base and all adapters together; with a
trained connector (`train.connector`), one for base and one for the adapters; with `infer.merged`, one for base and one
for each adapter.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.contract.files import read_json, remove, write_json
from stages.contract.recipe import Recipe
from stages.engines import engine_kind, start_engine
from stages.engines.engine import Engine, EngineSettings
from stages.engines.weights import plan_tensor_parallel, refuse_unserved, serving_target
from stages.infer.prompts import EngineLimits
from stages.models.connector import link_connector
from stages.models.merge import write_merged_copy
from stages.models.rendering import Prompt

BATCH_SIZE = "batch_size.json"
"""The file with the batch size that an engine found. Later starts read it, to batch the same samples together."""

Decide = Callable[[str, Any, str], None]
"""A function that records and shows a decision: what is decided, the value, and the reason."""


class Engines:
    """Starts the engine for the weights that are needed, and closes it when other weights are needed."""

    def __init__(
        self,
        recipe: Recipe,
        model: Path,
        adapters: Mapping[str, Path],
        connector: tuple[Path, str] | None,
        folder: Path,
        decide: Decide,
    ) -> None:
        """Prepare, without starting an engine.

        `adapters` has the folders of all trained adapters, by name. `connector` is the file of the trained connector
        and its sha256; None without one. `folder` is the stage's folder, for the batch size and for copies of the
        model while they are served.
        """
        self._recipe, self._model, self._adapters, self._connector = recipe, model, dict(adapters), connector
        self._folder, self._decide = folder, decide
        self._kind = engine_kind(recipe.infer.engine)
        self._engine: Engine | None = None
        self._serves: tuple[Path, tuple[str, ...]] | None = None
        self._limits = EngineLimits(0, 0, 0)
        self._connected: Path | None = None
        self.start_seconds: float | None = None
        """Seconds that all starts of engines took together; None before the first one."""

    def refuse_unserved(self, adapters: Sequence[str]) -> None:
        """Raise UsageError if the recipe's engine cannot serve the base here or one of these adapters."""
        wanted = {name: self._adapters[name] for name in adapters}
        refuse_unserved(self._kind, self._model, wanted, self._recipe.infer.merged)

    def serve(
        self, adapters: Sequence[str], asks_base: bool, limits: EngineLimits, longest: Callable[[], list[Prompt]]
    ) -> Iterator[tuple[Engine, set[str | None]]]:
        """Yield engines that together serve these adapters and, with `asks_base`, base. Each comes with the models that
        it serves (None: base), and is closed before the next one starts.

        `longest` returns the prompts with which the batch size is found, the longest first. Raises DoesNotFitError if
        the weights do not fit the GPUs or a merged copy does not fit the disk, and UsageError if the engine cannot
        serve the model or an adapter cannot be merged.
        """
        merged = self._recipe.infer.merged
        if not merged and self._connector is None:
            yield self._running_engine(self._model, self._adapters, limits, longest), {None, *self._adapters}
            return
        if asks_base:  # base first, because it answers the passes that all variants share
            yield self._running_engine(self._model, {}, limits, longest), {None}
        if not adapters:
            return
        model = self._model if self._connector is None else self._model_with_connector(self._connector)
        if not merged:
            yield self._running_engine(model, self._adapters, limits, longest), set(self._adapters)
            return
        for name in adapters:
            copy = write_merged_copy(
                model, self._adapters[name], self._folder / "merged" / name, serving_target().dtype
            )
            yield self._running_engine(copy, {}, limits, longest), {name}
            self.close()
            remove(copy)

    def record_batch_size(self) -> None:
        """Record the batch size that an earlier start found, if any. infer calls this if it needs no engine."""
        if found := read_json(self._folder / BATCH_SIZE):
            self._decide("batch size", found["batch_size"], found["why"])

    def close(self) -> None:
        """Close the running engine, if there is one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = self._serves = None

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running_engine(
        self, model: Path, adapters: dict[str, Path], limits: EngineLimits, longest: Callable[[], list[Prompt]]
    ) -> Engine:
        """Return an engine that serves these weights with at least these limits: the running one, or else a new one.

        A second round can need larger limits, if shards answered the longest prompts of the first.
        """
        limits_suffice = all(there >= needed for there, needed in zip(self._limits, limits, strict=True))
        if self._engine is None or self._serves != (model, tuple(adapters)) or not limits_suffice:
            self.close()
            self._engine = self._start(model, adapters, limits)
            self._serves, self._limits = (model, tuple(adapters)), limits
            if self._recipe.infer.batch_size == "auto":
                self._set_batch_size(self._engine, longest)
        return self._engine

    def _model_with_connector(self, connector: tuple[Path, str]) -> Path:
        """Return a folder of links to the base with the trained connector. Each start of the stage writes it again:
        another machine may have written the links before."""
        if self._connected is None:
            self._connected = link_connector(self._model, *connector, self._folder / "merged" / "with-connector")
        return self._connected

    def _start(self, model: Path, adapters: dict[str, Path], limits: EngineLimits) -> Engine:
        """Start an engine with these weights and limits, and record the decisions.

        Raises DoesNotFitError if the weights do not fit, UsageError if the engine cannot serve the model.
        """
        recipe, target = self._recipe, serving_target()
        size = recipe.infer.batch_size
        settings = EngineSettings(
            model=model,
            adapters=adapters,
            dtype=target.dtype,
            max_new_tokens=recipe.infer.max_new_tokens,
            batch_size=(read_json(self._folder / BATCH_SIZE) or {}).get("batch_size") if size == "auto" else size,
            max_length=limits.max_length,
            seed=recipe.seed,
            tensor_parallel=self._plan_tensor_parallel(model, target.dtype, limits.max_length),
            max_pictures=limits.pictures,
            max_pixels=limits.pixels,
            trust_remote_code=recipe.model.trust_remote_code,
            computes_losses=recipe.infer.losses,
        )
        self._decide("engine", self._kind.name, f"infer.engine; {target.dtype} on target {target.name}")
        why = "the longest prompt with its completion, at most infer.max_length"
        self._decide("longest", f"{limits.max_length} tokens", why)
        before = time.monotonic()
        engine = start_engine(self._kind.name, settings)
        started = round(time.monotonic() - before, 2)
        self.start_seconds = round((self.start_seconds or 0.0) + started, 2)
        return engine

    def _plan_tensor_parallel(self, model: Path, dtype: str, max_length: int) -> int:
        """Choose how many GPUs share the weights, and record it. Returns 1 without a record if there is no GPU or the
        engine cannot split weights. Raises DoesNotFitError if the weights do not fit."""
        count, why = plan_tensor_parallel(self._recipe, self._kind, model, dtype, max_length)
        if why is not None:
            self._decide("tensor parallel", count, why)
        return count

    def _set_batch_size(self, engine: Engine, longest: Callable[[], list[Prompt]]) -> None:
        """Let the engine find its batch size, unless an earlier start of the stage found one. Record it."""
        path = self._folder / BATCH_SIZE
        found = read_json(path)
        if found is None:
            found = dict(zip(("batch_size", "why"), engine.find_batch_size(longest()), strict=True))
            write_json(path, found)
        self._decide("batch size", found["batch_size"], found["why"])
