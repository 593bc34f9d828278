"""The journals of answers: one file a model, one line a completion, written as soon as the completion is there.

An answer is found by sample, pass and a digest of what was asked. A later start therefore asks only what is missing,
and variants of the task share the answers to what they ask alike.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.contract.files import FileHashes, JsonlJournal, digest_of, visible_files
from stages.contract.run import Run
from stages.engines.engine import Completion
from stages.models.connector import trained_connector

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of an adapter's folder that its answers depend on."""

Question = tuple[str, str, str]
"""A sample's id, a pass, and the digest of what is asked in it."""

Record = dict[str, Any]
"""A line of a journal."""


class Journals:
    """The answers of all models, by their names; None is the base model."""

    def __init__(self, folder: Path, names: Mapping[str | None, str], key: str) -> None:
        """Open the files `names` of a folder and delete all others in it: they are of other weights or pictures.

        `key` is the stage's: failures of another key are forgotten, because the recipe may have changed to cure them.
        """
        self.completion_tokens = 0
        """Of the answers added since this start."""
        self._key = key
        paths = {model: folder / name for model, name in names.items()}
        for path in visible_files(folder):
            if path not in paths.values():
                path.unlink()
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
        """The record of a model's answer or failure; None where it was not asked."""
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
        """Keep a completion, or the error instead of one, and the seconds it took.

        Once this returns, a SIGKILL no longer loses it.
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
        self._files[model].append([record])
        self._known[model][question] = record

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Journals":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def journal_names(run: Run, model: Path, adapters: list[str], hashes: FileHashes) -> dict[str | None, str]:
    """File names of the journals of base and adapters, which differ for other weights, engines, batches or pictures.

    The rest of the recipe does not count, so that answers outlive a change of it. `hashes` knows the model's
    files from when the stage's inputs were hashed.
    """
    infer = run.recipe.infer
    pages = ((run.manifest("preprocess") or {}).get("outputs") or {}).get("pages/", {}).get("sha256")

    def name_of(adapter: str | None) -> str:
        weights = [hashes.tree_digest(model)[0]]
        if adapter is not None:
            folder = run.path("train", "adapters", adapter)
            weights += [hashes.file_digest(folder / name) for name in ADAPTER_FILES if (folder / name).is_file()]
            connector = trained_connector(run)
            weights += [connector[1]] if connector else []
        made_from = [infer.engine, infer.merged, infer.batch_size, infer.chunk_size, run.recipe.seed, weights, pages]
        return f"{adapter or 'base'}.{digest_of(made_from)[:16]}.jsonl"

    return {adapter: name_of(adapter) for adapter in dict.fromkeys([None, *adapters])}
