"""Journals of completions and losses: a file for each model, with a line for each, written as soon as it is finished.

A completion is found by sample id, pass and a digest of the prompt. A later start therefore completes only the missing
prompts, and variants with the same prompt share its completion. A loss is found by sample id and a digest of the given
answer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.contract.files import FileHashes, JsonlJournal, digest_of, visible_files
from stages.contract.run import Run
from stages.engines.engine import Completion
from stages.models.chat_settings import chat_settings
from stages.models.connector import trained_connector

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files in an adapter's folder that decide its completions."""

Question = tuple[str, str, str]
"""A sample's id, the name of a pass, and the digest of the pass's prompt."""

Record = dict[str, Any]
"""A line of a journal: a completion, a loss or an error, with the fields that `Journals.add` or `add_loss` writes."""


class Journals:
    """The completions of all models. A model is an adapter's name; None: base."""

    def __init__(self, folder: Path, names: Mapping[str | None, str], key: str) -> None:
        """Open the files `names` in `folder`, one for each model. Other files there hold completions of other weights,
        settings or pages, and stay until `remove_others`.

        `key` is the stage's key. Errors recorded under another key are ignored: the recipe may have changed to avoid
        them.
        """
        self.completion_tokens = 0
        """Number of tokens in the completions that this start added."""
        self._key = key
        paths = {model: folder / name for model, name in names.items()}
        self._folder = folder
        self._files = {model: JsonlJournal(path) for model, path in paths.items()}
        self._known = {
            model: {
                (record["id"], record["pass"], record["asked"]): record
                for record in file.records
                if record["error"] is None or record["key"] == key
            }
            for model, file in self._files.items()
        }

    def find(self, model: str | None, question: Question) -> Record | None:
        """Return a model's record for a question, a completion or an error; None if it has none."""
        return self._known[model].get(question)

    def add(
        self,
        model: str | None,
        question: Question,
        completion: Completion | None,
        error: str | None,
        prompt_tokens: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Add a completion, or the error in its place, with the number of prompt tokens and the seconds it took.

        Once this returns, the record survives a SIGKILL.
        """
        record: Record = {
            **dict(zip(("id", "pass", "asked"), question, strict=True)),
            "text": completion.text if completion else None,
            "finish_reason": completion.finish_reason if completion else None,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion.tokens if completion else 0,
            "error": error,
            "key": self._key,
            "seconds": round(seconds, 4),
        }
        self.completion_tokens += record["completion_tokens"]
        self._append(model, question, record)

    def add_loss(
        self, model: str | None, question: Question, loss: float | None, tokens: int, error: str | None
    ) -> None:
        """Add the loss of a given answer, in nats, with the number of its tokens, or the error in its place.

        Once this returns, the record survives a SIGKILL.
        """
        key = dict(zip(("id", "pass", "asked"), question, strict=True))
        self._append(model, question, {**key, "loss": loss, "tokens": tokens, "error": error, "key": self._key})

    def _append(self, model: str | None, question: Question, record: Record) -> None:
        """Write a record to a model's file."""
        self._files[model].append([record])
        self._known[model][question] = record

    def remove_others(self) -> None:
        """Delete the files of other weights, settings or pages. Call it once the answers that replace them are
        written."""
        own = {file.path for file in self._files.values()}
        for path in visible_files(self._folder):
            if path not in own:
                path.unlink()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Journals":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def journal_names(run: Run, model: Path, adapters: list[str], hashes: FileHashes) -> dict[str | None, str]:
    """The file name of each model's journal, by the adapter's name (None: base).

    The name changes with the weights, the engine, `infer.merged`, the sizes of batches and chunks, the seed, the folder
    `pages/` of preprocess and what the run sets for the chat template. It does not depend on the rest of the recipe, so
    completions stay usable if that changes. `hashes` caches the sha256 of files.
    """
    infer = run.recipe.infer
    chat = chat_settings(run).facts
    pages = ((run.manifest("preprocess") or {}).get("outputs") or {}).get("pages/", {}).get("sha256")

    def journal_name(adapter: str | None) -> str:
        """The file name of one model's journal."""
        weights = [hashes.tree_digest(model)[0]]
        if adapter is not None:
            folder = run.path("train", "adapters", adapter)
            weights += [hashes.file_digest(folder / name) for name in ADAPTER_FILES if (folder / name).is_file()]
            connector = trained_connector(run)
            weights += [connector[1]] if connector else []
        made_from = [infer.engine, infer.merged, infer.batch_size, infer.chunk_size, run.recipe.seed, weights, pages]
        made_from += [chat] if chat else []
        return f"{adapter or 'base'}.{digest_of(made_from)[:16]}.jsonl"

    return {adapter: journal_name(adapter) for adapter in dict.fromkeys([None, *adapters])}
