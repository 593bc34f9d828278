"""What a task asks about each sample: its passes in turn, and their prompts for one model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from stages.contract.errors import DataError
from stages.contract.files import digest_of
from stages.contract.recipe import Recipe
from stages.contract.records import Sample
from stages.infer.journal import Journals, Question, Record
from stages.infer.rounds import Variant
from stages.models.rendering import Prompt, Renderer
from stages.tasks import load_task
from stages.tasks.task import Ask

LONGEST = 256
"""Prompts to try batch sizes with: as many as are ever decoded together."""


@dataclass(frozen=True)
class Step:
    """A pass of a sample."""

    sample_id: str
    name: str
    ask: Ask
    model: str | None
    """The adapter that answers it; None: the base model."""
    asked: str
    """Digest of all that the answer depends on, beside the model."""
    record: Record | None
    """Its answer or failure; None where it is still to be asked."""

    @property
    def question(self) -> Question:
        """What the journals keep the answer under."""
        return self.sample_id, self.name, self.asked


class Room(NamedTuple):
    """What an engine must have room for."""

    max_length: int
    """Tokens of the longest prompt with its completion."""
    pictures: int
    """Pictures of the prompt with the most."""
    pixels: int
    """Pixels of the largest picture."""


class Prompts:
    """A task's prompts for one model, each rendered once."""

    def __init__(self, recipe: Recipe, model: Path, run_folder: Path) -> None:
        """Prompts for the model in a folder. The samples' pictures are relative to the run's folder."""
        self._recipe, self._run_folder = recipe, run_folder
        self._task = load_task(recipe.task)
        self._renderer = Renderer(model)
        self._rendered: dict[str, Prompt | str] = {}
        self.passes: tuple[str, ...] = self._task.passes(recipe)

    def model_of(self, variant: Variant, name: str) -> str | None:
        """The model that answers a pass: some passes are asked of the base model for all variants."""
        return None if name in self._task.SHARED else variant.adapter

    def steps(self, variant: Variant, sample: Sample, journals: Journals) -> list[Step]:
        """The sample's passes in turn, up to the first that is unanswered or has failed."""
        steps: list[Step] = []
        texts: dict[str, str] = {}
        if "error" in sample["meta"]:
            return steps
        for name in self.passes:
            ask = self._task.ask(self._recipe, sample, name, texts, variant.left_out)
            if ask is None:
                continue
            model, asked = self.model_of(variant, name), self._digest(ask)
            record = journals.find(model, (sample["id"], name, asked))
            steps.append(Step(sample["id"], name, ask, model, asked, record))
            if record is None or record["error"] is not None:
                break
            texts[name] = record["text"]
        return steps

    def render(self, sample_id: str, ask: Ask) -> Prompt | str:
        """The prompt, or the reason why there is none."""
        key = f"{sample_id} {self._digest(ask)}"
        if key not in self._rendered:
            self._rendered[key] = self._render(sample_id, ask)
        return self._rendered[key]

    def room_for(self, chunks: Mapping[Variant, list[list[Sample]]]) -> Room:
        """The room for all that can be asked about these samples, before any of it is answered.

        A prompt that leaves no room for its answer in `infer.max_length` is never asked and does not count.
        """
        length = pictures = pixels = 1
        for variant, members in chunks.items():
            for sample in (sample for chunk in members for sample in chunk):
                if "error" in sample["meta"]:
                    continue
                for ask, spare in self._task.rehearsal(self._recipe, sample, variant.left_out):
                    prompt = self.render(sample["id"], ask)
                    if isinstance(prompt, str):
                        continue
                    length = max(length, prompt.length + spare + self._limit(ask))
                    pictures = max(pictures, len(prompt.pictures) + 1)
                    pixels = max([pixels, *(one.width * one.height for one in prompt.pictures)])
        return Room(min(length, self._recipe.infer.max_length), pictures - 1, pixels)

    def longest(self) -> list[Prompt]:
        """The longest prompts rendered so far, longest first."""
        return sorted(self._prompts(), key=lambda prompt: (-prompt.length, prompt.id))[:LONGEST]

    def shortest_without(self, sample_id: str, count: int) -> list[Prompt]:
        """The shortest prompts rendered so far, those of one sample left out."""
        others = [prompt for prompt in self._prompts() if prompt.id != sample_id]
        return sorted(others, key=lambda prompt: prompt.length)[:count]

    def _prompts(self) -> list[Prompt]:
        return [prompt for prompt in self._rendered.values() if isinstance(prompt, Prompt)]

    def _digest(self, ask: Ask) -> str:
        return digest_of([ask.messages, ask.images, ask.max_pixels, self._limit(ask), ask.temperature, ask.seed])

    def _limit(self, ask: Ask) -> int:
        return ask.max_new_tokens or self._recipe.infer.max_new_tokens

    def _render(self, sample_id: str, ask: Ask) -> Prompt | str:
        pictures = [self._run_folder / name for name in ask.images]
        try:
            prompt = self._renderer.render(sample_id, ask.messages, pictures, ask.max_pixels, ask.max_new_tokens)
        except DataError as error:
            return str(error)
        prompt = replace(prompt, temperature=ask.temperature, seed=ask.seed)
        if prompt.length + self._limit(ask) > self._recipe.infer.max_length:
            return f"prompt of {prompt.length} tokens leaves no room for an answer in infer.max_length"
        return prompt
