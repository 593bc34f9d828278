"""The prompts of a task for one model. A sample has one prompt per pass; a later pass can use earlier completions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from stages.contract.errors import DataError
from stages.contract.files import digest_of
from stages.contract.recipe import Recipe
from stages.contract.records import Message, Sample
from stages.engines.engine import Completion
from stages.infer.journal import Journals, Question, Record
from stages.infer.rounds import Variant
from stages.models.chat_template import RefusedConversationError
from stages.models.control_words import count_said
from stages.models.cutting import cut_conversation
from stages.models.reasoning import opened_reasoning
from stages.models.rendering import Prompt, Renderer
from stages.tasks import load_task
from stages.tasks.task import Ask

LONGEST = 256
"""Number of prompts for trials of batch sizes: the largest batch that is tried."""


@dataclass(frozen=True)
class Step:
    """One pass over one sample."""

    sample_id: str
    name: str
    """Name of the pass."""
    ask: Ask
    model: str | None
    """The adapter that answers it; None: base."""
    asked: str
    """Digest of everything that the completion depends on, except the model."""
    record: Record | None
    """Its completion or error; None if it is unanswered."""

    @property
    def question(self) -> Question:
        """The key of the step's completion in the journals."""
        return self.sample_id, self.name, self.asked


class EngineLimits(NamedTuple):
    """The largest inputs that an engine must be able to process."""

    max_length: int
    """Largest number of tokens of a prompt with its completion."""
    pictures: int
    """Largest number of pictures in a prompt."""
    pixels: int
    """Number of pixels of the largest picture."""


class Prompts:
    """A task's prompts for one model, each rendered once."""

    def __init__(self, recipe: Recipe, run_folder: Path, renderer: Renderer) -> None:
        """Load the task's passes. `renderer` is that of the model. Pictures are relative to `run_folder`."""
        self._recipe, self._run_folder = recipe, run_folder
        self._task = load_task(recipe.task)
        self._renderer = renderer
        self._rendered: dict[str, Prompt | str] = {}
        self._shortened: dict[str, Ask] = {}
        self.cut: set[str] = set()
        """Ids of the samples of which a prompt was too long and begins at a later turn."""
        self.passes: tuple[str, ...] = self._task.passes(recipe)

    def answering_model(self, variant: Variant, name: str) -> str | None:
        """The adapter that answers a variant's pass `name`; None: base, which answers the task's shared passes."""
        return None if name in self._task.SHARED else variant.adapter

    def steps(self, variant: Variant, sample: Sample, journals: Journals) -> list[Step]:
        """The sample's passes in order, up to and including the first one that is unanswered or failed.

        Leaves out passes that the sample skips. Empty if preprocess put an error into the sample's `meta`.
        """
        steps: list[Step] = []
        texts: dict[str, str] = {}
        if "error" in sample["meta"]:
            return steps
        for name in self.passes:
            ask = self._task.ask(self._recipe, sample, name, texts, variant.left_out_components)
            if ask is None:
                continue
            ask = self._fitting(sample["id"], ask)
            model, asked = self.answering_model(variant, name), self._digest(ask)
            record = journals.find(model, (sample["id"], name, asked))
            steps.append(Step(sample["id"], name, ask, model, asked, record))
            if record is None or record["error"] is not None:
                break
            texts[name] = record["text"]
        return steps

    def complete_reasoning(self, prompt: Prompt, completion: Completion) -> Completion:
        """The completion with the mark that opens its reasoning, if the prompt ends with that mark. Without it,
        reasoning that the limit of tokens cut off would look like an answer."""
        opened = opened_reasoning(self._renderer.tokenizer, prompt.tokens)
        return replace(completion, text=opened + completion.text) if opened else completion

    def render(self, sample_id: str, ask: Ask) -> Prompt | str:
        """Render the prompt of a pass. Returns it, or a text that says why it cannot be used."""
        key = f"{sample_id} {self._digest(ask)}"
        if key not in self._rendered:
            self._rendered[key] = self._render(sample_id, ask)
        return self._rendered[key]

    def engine_limits(self, chunks: Mapping[Variant, list[list[Sample]]]) -> EngineLimits:
        """The limits that every prompt of these samples will stay within, known before any pass is answered.

        Prompts that leave no room for their completion in `infer.max_length` are never used and do not count.
        """
        length = pictures = pixels = 1
        for variant, members in chunks.items():
            for sample in (sample for chunk in members for sample in chunk):
                if "error" in sample["meta"]:
                    continue
                for ask, spare in self._task.possible_prompts(self._recipe, sample, variant.left_out_components):
                    prompt = self.render(sample["id"], self._fitting(sample["id"], ask))
                    if isinstance(prompt, str):
                        continue
                    length = max(length, prompt.length + spare + self._token_limit(ask))
                    pictures = max(pictures, len(prompt.pictures) + 1)
                    pixels = max([pixels, *(one.width * one.height for one in prompt.pictures)])
        return EngineLimits(min(length, self._recipe.infer.max_length), pictures - 1, pixels)

    def control_words(self, samples: Iterable[Sample]) -> dict[str, int]:
        """How often control words occur in the samples' messages, in the form that `count_said` returns."""
        return count_said(self._renderer.control_words_in(sample) for sample in samples)

    def longest_prompts(self) -> list[Prompt]:
        """At most LONGEST of the prompts rendered so far: those with the most tokens, the longest first."""
        return sorted(self._prompts(), key=lambda prompt: (-prompt.length, prompt.id))[:LONGEST]

    def shortest_other_prompts(self, sample_id: str, count: int) -> list[Prompt]:
        """The `count` shortest prompts rendered so far, without those of the sample `sample_id`."""
        others = [prompt for prompt in self._prompts() if prompt.id != sample_id]
        return sorted(others, key=lambda prompt: prompt.length)[:count]

    def _prompts(self) -> list[Prompt]:
        """All usable prompts rendered so far."""
        return [prompt for prompt in self._rendered.values() if isinstance(prompt, Prompt)]

    def _digest(self, ask: Ask) -> str:
        """The digest of everything that a completion depends on, except the model."""
        limit, tools = self._token_limit(ask), [ask.tools] if ask.tools else []
        return digest_of([ask.messages, ask.images, ask.max_pixels, limit, ask.temperature, ask.seed, *tools])

    def _token_limit(self, ask: Ask) -> int:
        """The largest number of tokens in the completion of a prompt."""
        return ask.max_new_tokens or self._recipe.infer.max_new_tokens

    def _fitting(self, sample_id: str, ask: Ask) -> Ask:
        """The prompt of a pass; with train.too_long `cut`, from a later turn on if it is too long otherwise."""
        if self._recipe.train.too_long != "cut":
            return ask
        key = f"{sample_id} {self._digest(ask)}"
        if key not in self._shortened:
            self._shortened[key] = self._cut(sample_id, ask)
        return self._shortened[key]

    def _cut(self, sample_id: str, ask: Ask) -> Ask:
        """A prompt from a later turn on; as it is if that makes it no prompt that can be used."""
        if isinstance(self.render(sample_id, ask), Prompt):
            return ask

        def with_turns(messages: list[Message], images: list[str]) -> Ask:
            return replace(ask, messages=messages, images=images)

        found = cut_conversation(
            ask.messages,
            ask.images,
            lambda messages, images: isinstance(self._render(sample_id, with_turns(messages, images)), Prompt),
        )
        if found is None:
            return ask
        self.cut.add(sample_id)
        return with_turns(*found)

    def _render(self, sample_id: str, ask: Ask) -> Prompt | str:
        """Render a prompt, bypassing the cache. Returns what `render` returns."""
        pictures = [self._run_folder / name for name in ask.images]
        try:
            prompt = self._renderer.render(
                sample_id, ask.messages, pictures, ask.max_pixels, ask.max_new_tokens, ask.tools
            )
        except (DataError, RefusedConversationError) as error:
            return str(error)
        prompt = replace(prompt, temperature=ask.temperature, seed=ask.seed)
        if prompt.length + self._token_limit(ask) > self._recipe.infer.max_length:
            limit = self._recipe.infer.max_length
            return (
                f"infer.max_length: {limit} leaves no room for an answer after a prompt of {prompt.length} tokens;"
                " raise it"
            )
        return prompt
