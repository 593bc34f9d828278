"""A task's passes over the test samples: what is asked of whom, and what is known of it already.

Every completion is written to a journal as soon as it is there, under the sample, the pass and a digest of what was
asked. A later start asks only for what is missing; so does a variant of the task that asks some of it alike.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stages.contract.errors import DataError
from stages.contract.files import FileHashes, JsonlJournal, digest_of, machine_error, visible_files
from stages.contract.records import Prediction, Sample, failed_prediction
from stages.contract.stage import Stage
from stages.engines.engine import Completion, Engine
from stages.models.connector import trained_connector
from stages.models.rendering import Prompt, Renderer
from stages.tasks import load_task
from stages.tasks.task import Ask

NO_ANSWER = "no valid answer in the completion"
"""Error of a prediction whose completion the task cannot read an answer in: the model abstains."""


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Of an adapter's folder, what its answers depend on."""


@dataclass(frozen=True)
class Variant:
    """One way to answer all samples: a model, perhaps with a component of the task left out."""

    adapter: str | None
    """None: the base model."""
    without: str | None = None
    asks: Literal["test", "validation", "second round"] = "test"
    """Which samples: those of the test set, those that adapters are compared on, or those to vote on again."""

    @property
    def name(self) -> str:
        if self.asks != "test":
            return f"{self.adapter or 'base'}, {self.asks}"
        return f"without {self.without}" if self.without else self.adapter or "base"

    @property
    def left_out(self) -> tuple[str, ...]:
        return (self.without,) if self.without else ()

    @property
    def output(self) -> str:
        """Its predictions, relative to the stage's folder."""
        if self.asks != "test":
            return f"{self.asks.replace(' ', '_')}/{self.adapter or 'base'}.jsonl"
        return f"ablations/{self.without}.jsonl" if self.without else f"predictions/{self.name}.jsonl"

    @property
    def submission(self) -> str:
        return f"submission/{self.name}.jsonl"


@dataclass(frozen=True)
class _Step:
    """A pass that a sample goes through."""

    name: str
    ask: Ask
    model: str | None
    record: dict[str, Any] | None
    """What came of it; None where it is still to be asked."""


class Asking:
    """The journals of all models, and the passes over them."""

    def __init__(self, stage: Stage, model: Path, variants: list[Variant]) -> None:
        self._stage, self._recipe = stage, stage.run.recipe
        self._task = load_task(self._recipe.task)
        self._passes: tuple[str, ...] = self._task.passes(self._recipe)
        self._renderer = Renderer(model)
        self._prompts: dict[str, Prompt | str] = {}
        self._tokens = 0
        models = dict.fromkeys([None, *(variant.adapter for variant in variants)])
        paths = {name: stage.path("partial", _journal_name(stage, model, name)) for name in models}
        for path in visible_files(stage.path("partial")):  # of other weights or pictures
            if path not in paths.values():
                path.unlink()
        self._journals = {name: JsonlJournal(path) for name, path in paths.items()}
        # answers outlive a change of the recipe; failures do not, as it may have been made for their sake
        self._known = {
            name: {
                (record["id"], record["pass"], record["asked"]): record
                for record in journal.records
                if record["error"] is None or record["key"] == stage.key
            }
            for name, journal in self._journals.items()
        }

    def close(self) -> None:
        for journal in self._journals.values():
            journal.close()

    # -- what is known ---------------------------------------------------------------------------------------

    def _model_of(self, variant: Variant, name: str) -> str | None:
        return None if name in self._task.SHARED else variant.adapter

    def _steps(self, variant: Variant, sample: Sample) -> list[_Step]:
        """The sample's passes in turn, up to the first that is to be asked or has failed."""
        steps: list[_Step] = []
        texts: dict[str, str] = {}
        if "error" in sample["meta"]:
            return steps
        for name in self._passes:
            ask = self._task.ask(self._recipe, sample, name, texts, variant.left_out)
            if ask is None:
                continue
            model = self._model_of(variant, name)
            record = self._known[model].get((sample["id"], name, self._asked(ask)))
            steps.append(_Step(name, ask, model, record))
            if record is None or record["error"] is not None:
                break
            texts[name] = record["text"]
        return steps

    def prediction(self, variant: Variant, sample: Sample) -> Prediction:
        """What came of a sample whose passes are all done."""
        if "error" in sample["meta"]:
            return failed_prediction(sample["id"], sample["meta"]["error"])
        records = {step.name: step.record for step in self._steps(variant, sample)}
        found = [record for record in records.values() if record is not None]
        assert len(found) == len(records), f"{sample['id']} of {variant.name} was not asked everything"
        last = found[-1]
        prompt_tokens = sum(record["prompt_tokens"] for record in found)
        if last["error"] is not None:
            return failed_prediction(sample["id"], last["error"], prompt_tokens)
        answer = self._task.read_answer(last["text"], sample)
        asked = f", asked {len(found)} times" if len(found) > 1 else ""
        return {
            "id": sample["id"],
            "answer": answer,
            "text": last["text"],
            "finish_reason": last["finish_reason"],
            "prompt_tokens": prompt_tokens,
            "completion_tokens": sum(record["completion_tokens"] for record in found),
            "error": None if answer is not None else f"{NO_ANSWER}{asked}",
            "passes": {name: record["text"] for name, record in records.items() if record is not last and record},
        }

    def is_done(self, variant: Variant, samples: list[Sample]) -> bool:
        """Whether nothing is left to ask of these samples."""
        return all(step.record is not None for sample in samples for step in self._steps(variant, sample))

    def asks_base(self, chunks: Mapping[Variant, list[list[Sample]]]) -> bool:
        """Whether anything is to be asked of the base: its own answers, or passes that it answers for all."""
        samples = ((variant, sample) for variant, members in chunks.items() for chunk in members for sample in chunk)
        steps = (step for variant, sample in samples for step in self._steps(variant, sample))
        return any(step.record is None and step.model is None for step in steps)

    def seconds(self, variant: Variant, samples: list[Sample]) -> float:
        """Time that the answers to these samples took, over all starts, the engine's own start left out."""
        steps = [step for sample in samples for step in self._steps(variant, sample)]
        return round(sum(float(step.record["seconds"]) for step in steps if step.record is not None), 3)

    # -- how long it may get ---------------------------------------------------------------------------------

    def most(self, variants: Mapping[Variant, list[Sample]]) -> tuple[int, int, int]:
        """Tokens of the longest prompt with its completion; pictures of the prompt with the most; pixels of the
        largest picture.

        Of what can be asked at all: a prompt without room in infer.max_length is none.
        """
        length = pictures = pixels = 1
        for variant, samples in variants.items():
            for sample in samples:
                if "error" in sample["meta"]:
                    continue
                for ask, spare in self._task.rehearsal(self._recipe, sample, variant.left_out):
                    prompt = self._prompt(sample["id"], ask)
                    if isinstance(prompt, str):
                        continue
                    length = max(length, prompt.length + spare + self._limit(ask))
                    pictures = max(pictures, len(prompt.pictures) + 1)
                    pixels = max([pixels, *(one.width * one.height for one in prompt.pictures)])
        return min(length, self._recipe.infer.max_length), pictures - 1, pixels

    def longest(self) -> list[Prompt]:
        """The longest prompts of those that `most` has looked at, as many as are ever decoded together."""
        prompts = [prompt for prompt in self._prompts.values() if isinstance(prompt, Prompt)]
        return sorted(prompts, key=lambda prompt: (-prompt.length, prompt.id))[:256]

    def _asked(self, ask: Ask) -> str:
        """Digest of all that an answer depends on, beside the model."""
        return digest_of([ask.messages, ask.images, ask.max_pixels, self._limit(ask), ask.temperature, ask.seed])

    def _limit(self, ask: Ask) -> int:
        return ask.max_new_tokens or self._recipe.infer.max_new_tokens

    def _prompt(self, sample_id: str, ask: Ask) -> Prompt | str:
        """The prompt, or why there is none."""
        key = f"{sample_id} {self._asked(ask)}"
        if key not in self._prompts:
            self._prompts[key] = self._rendered(sample_id, ask)
        return self._prompts[key]

    def _rendered(self, sample_id: str, ask: Ask) -> Prompt | str:
        pictures = [self._stage.run.folder / name for name in ask.images]
        try:
            prompt = self._renderer.render(sample_id, ask.messages, pictures, ask.max_pixels, ask.max_new_tokens)
        except DataError as error:
            return str(error)
        prompt = replace(prompt, temperature=ask.temperature, seed=ask.seed)
        if prompt.length + self._limit(ask) > self._recipe.infer.max_length:
            return f"prompt of {prompt.length} tokens leaves no room for an answer in infer.max_length"
        return prompt

    # -- asking ----------------------------------------------------------------------------------------------

    def answer(self, engine: Engine, served: set[str | None], chunks: Mapping[Variant, list[list[Sample]]]) -> None:
        """Ask for what is missing of these chunks, as far as the engine serves the models that have to be asked.

        Pass by pass over all chunks of a variant, chunk by chunk: the same samples are always submitted together,
        whatever is known of them, where the engine computes in batches.
        """
        for variant, members in chunks.items():
            for name in self._passes:
                model = self._model_of(variant, name)
                if model not in served:
                    continue
                done, total = 0, sum(map(len, members))
                for chunk in members:
                    before, tokens = time.monotonic(), self._tokens
                    asked = self._answer_chunk(engine, variant, name, chunk)
                    done += len(chunk)
                    if asked:
                        rate = round((self._tokens - tokens) / (time.monotonic() - before), 1)
                        activity = f"{name} {'' if variant.without else 'with '}{variant.name}"
                        self._stage.events.progress(activity, done, total, "samples", tokens_per_second=rate)
                    self._stage.stop.check()

    def _answer_chunk(self, engine: Engine, variant: Variant, name: str, chunk: list[Sample]) -> bool:
        """Ask what is missing of a chunk in a pass. Returns whether anything was."""
        missing: dict[str, _Step] = {}
        prompts: list[Prompt] = []
        for sample in chunk:
            step = next((step for step in self._steps(variant, sample) if step.name == name), None)
            if step is None or (step.record is not None and (engine.continuous or step.record["error"] is not None)):
                continue
            prompt = self._prompt(sample["id"], step.ask)
            if isinstance(prompt, str):
                self._note(step, sample["id"], None, prompt)
                continue
            prompts.append(prompt)
            if step.record is None:
                missing[sample["id"]] = step
        if missing:
            self._generate(engine, prompts, missing)
            return True
        return False

    def _generate(self, engine: Engine, prompts: list[Prompt], missing: dict[str, _Step]) -> None:
        """Ask these prompts and note those that were missing. If the engine fails on them, they are tried one by one
        and those that fail again are noted as failed; but what is the machine's or the engine's fault is raised, and no
        sample bears it."""
        (model,) = {step.model for step in missing.values()}
        clock = time.monotonic()

        def note(place: int, completion: Completion) -> None:
            nonlocal clock
            before, clock = clock, time.monotonic()
            step = missing.pop(prompts[place].id, None)
            if step is not None:
                self._note(step, prompts[place].id, completion, None, prompts[place].length, clock - before)
            if engine.continuous:
                self._stage.stop.check()

        try:
            engine.generate(prompts, model, note)
        except Exception as error:
            self._raise_if_not_the_samples_fault(error)
            left = [prompt for prompt in prompts if prompt.id in missing]
            if len(prompts) > 1:
                for prompt in left:
                    self._generate(engine, [prompt], {prompt.id: missing.pop(prompt.id)})
                return
            for prompt in left:
                print(f"sample {prompt.id} failed: {error!r}")  # into the log
                if not self._answers_another(engine, model, prompt):
                    raise
                why = f"{type(error).__name__}: {error}"
                self._note(missing.pop(prompt.id), prompt.id, None, why, prompt.length)

    def _note(
        self,
        step: _Step,
        sample_id: str,
        completion: Completion | None,
        error: str | None,
        prompt_tokens: int = 0,
        seconds: float = 0.0,
    ) -> None:
        record: dict[str, Any] = {
            "id": sample_id,
            "pass": step.name,
            "asked": self._asked(step.ask),
            "text": completion.text if completion else None,
            "finish_reason": completion.finish_reason if completion else None,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion.tokens if completion else 0,
            "error": error,
            "key": self._stage.key,
            "seconds": round(seconds, 4),
        }
        self._tokens += record["completion_tokens"]
        self._journals[step.model].append([record])
        self._known[step.model][sample_id, step.name, record["asked"]] = record

    def _raise_if_not_the_samples_fault(self, error: Exception) -> None:
        self._stage.stop.check()  # a Ctrl-C reaches an engine's own processes too
        explained = machine_error(error)
        if explained is not None:
            raise explained from error

    def _answers_another(self, engine: Engine, model: str | None, failed: Prompt) -> bool:
        """Whether the engine still answers something: the shortest other prompt."""
        others = [p for p in self._prompts.values() if isinstance(p, Prompt) and p.id != failed.id]
        for prompt in sorted(others, key=lambda p: p.length)[:3]:
            try:
                engine.generate([prompt], model)
            except Exception as error:  # noqa: BLE001 - any failure means: not this one
                print(f"after {failed.id}, {prompt.id} failed too: {error!r}")
            else:
                return True
        return False


def _journal_name(stage: Stage, model: Path, adapter: str | None) -> str:
    """A name that tells answers of other weights, engines or pictures apart: journals outlive a change of recipe."""
    hashes = FileHashes(stage.path(".hashes.json"))  # knows them from when the stage's inputs were hashed
    infer = stage.run.recipe.infer
    weights = [hashes.tree(model)[0]]
    if adapter is not None:
        folder = stage.run.path("train", "adapters", adapter)
        weights += [hashes.file(folder / name) for name in ADAPTER_FILES if (folder / name).is_file()]
        connector = trained_connector(stage.run)
        weights += [connector[1]] if connector else []
    pages = ((stage.run.manifest("preprocess") or {}).get("outputs") or {}).get("pages/", {}).get("sha256")
    made_from = [infer.engine, infer.merged, infer.batch_size, infer.chunk_size, stage.run.recipe.seed, weights, pages]
    return f"{adapter or 'base'}.{digest_of(made_from)[:16]}.jsonl"
