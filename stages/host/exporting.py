"""Does the work of `lorry export`: writes a trained adapter as a folder that other programs load.

A folder is written beside its place, as `.NAME.partial`, and gets its name when it is whole. It has a file `lorry.json`
that lists what it holds: only a folder with that file, and without further ones, is ever replaced.
"""

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import FileHashes, flush, read_json, remove, write_json
from stages.contract.roots import Roots
from stages.contract.run import Run, lock_stage_folder
from stages.contract.superseded import trained_key
from stages.host.outcome import Lines, Note
from stages.models.chat_settings import chat_settings
from stages.models.connector import link_connector, trained_connector
from stages.models.merge import Merge, refuse_full_disk, refuse_merging_quantised
from stages.models.remote_code import settle_remote_code
from stages.models.saved_template import put_template, saved_template
from stages.results.run_reader import DamagedError, RunReader, read_recipe, select_runs, suggestion
from stages.train.model_card import HUB_NAME, MODELFILE, MODELFILE_TEXT, Export, base_name, export_card

MARK = "lorry.json"
"""The file that marks a folder as written by `lorry export`."""

TOKENIZER = ("tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab.", "merges.txt", "chat_template.jinja")
"""How the names of a tokenizer's files begin."""

MERGING_LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Request:
    """What a user wants of one run."""

    run: str
    adapter: str | None
    """None: the run's only adapter."""
    every: bool
    """All adapters, each in a folder of its own name."""
    merged: Path | None
    """Where a merged model goes; None: none is written."""
    alone: Path | None
    """Where the adapter goes; None: it is not written."""
    base: str | None
    """The base's name for libraries; None: Lorry finds it."""


def export(request: Request) -> Lines:
    """Export adapters of a run. Yields the folders, each with the commands that use it.

    Raises UsageError for an unknown run or adapter, one that has changed since it was trained, a base that no adapter
    can be merged into, and a folder that is not an earlier export; DoesNotFitError if the disk is too full.
    """
    if request.merged is None and request.alone is None:
        raise UsageError("lorry export: neither --merged nor --adapter; give one of them a folder")
    if (
        request.merged is not None
        and request.alone is not None
        and request.merged.absolute() == request.alone.absolute()
    ):
        raise UsageError(f"{request.merged}: given for --merged and --adapter; give each a folder of its own")
    roots = Roots.from_environment()
    (name,) = select_runs((request.run,), roots.runs)
    try:
        run = Run(name, read_recipe(roots.runs / name), roots)
    except DamagedError as error:
        raise UsageError(f"{roots.runs / name}: {error}; name another run") from error
    reader, model = RunReader(run), run.model(run.recipe.model.path, "model.path")
    names = _wanted_adapters(run, request)
    _refuse_changed_base(run, reader, model)
    places = [
        (adapter, folder / adapter if request.every else folder, merged)
        for adapter in names
        for folder, merged in ((request.merged, True), (request.alone, False))
        if folder is not None
    ]
    for _, folder, _ in places:
        _refuse_foreign_folder(folder.absolute())
    if request.merged is not None:
        _check_merging(run, model)
    if request.alone is not None and run.recipe.train.connector is not None:
        raise UsageError(
            f"{run.folder}: its adapters were trained on the base with the run's connector, which an adapter alone"
            " lacks; export with --merged"
        )
    for adapter, folder, merged in places:
        yield Note(f"export: {adapter}: {'merging' if merged else 'copying'} into {folder}")
        written = _export_one(_description(reader, adapter, merged, model, request.base), folder.absolute())
        yield f"{'merged model' if merged else 'adapter'} {adapter}: {folder.absolute()}"
        for note in written.notes:
            yield Note(f"export: {note}")
        for what, command in written.commands(str(folder)).items():
            yield f"  to {what}: {command}"
    return None


def _wanted_adapters(run: Run, request: Request) -> list[str]:
    """The names of the adapters to export. Raises UsageError if one is unknown, not trained or changed, or if the run
    has several and none is named."""
    trained = sorted(path.parent.name for path in run.folder.glob("train/adapters/[!.]*/made.json"))
    if not trained:
        raise UsageError(f"{run.folder}: no adapter is trained; run `lorry run --run {run.name}` first")
    if request.adapter is not None and request.every:
        raise UsageError(f"lorry export {request.adapter} --all: name an adapter or give --all, not both")
    if request.adapter is not None and request.adapter not in trained:
        hint = suggestion(request.adapter, trained, "adapters")
        raise UsageError(f"{run.folder}: no trained adapter {request.adapter!r}; {hint}")
    if request.adapter is None and not request.every and len(trained) > 1:
        raise UsageError(f"{run.folder}: has {len(trained)} adapters ({', '.join(trained)}); name one, or give --all")
    names = [request.adapter] if request.adapter else trained
    for name in names:
        folder = run.path("train", "adapters", name)
        if trained_key(folder) is None:
            raise UsageError(f"{folder}: has changed since train wrote it; run train again")
    return names


def _refuse_changed_base(run: Run, reader: RunReader, model: Path) -> None:
    """Raise UsageError if the base is not the one that train read."""
    trained = (reader.manifests.get("train") or {}).get("inputs", {}).get("models/base")
    hashes = FileHashes(run.path("train", ".hashes.json"))  # train's own: reads only what has changed since
    if trained is not None and hashes.tree_digest(model)[0] != trained:
        raise UsageError(f"{model}: has changed since {run.name} was trained; restore it, or run train again")


def _check_merging(run: Run, model: Path) -> None:
    """Raise UsageError if adapters of a run cannot be merged into their base here."""
    refuse_merging_quantised(
        model,
        "export with --adapter instead: vLLM and transformers load it on that base. Adapters trained with"
        " train.load_in_4bit on a base in 16 bits can be merged",
    )
    missing = [name for name in MERGING_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"lorry export --merged: needs {', '.join(missing)}, not installed here; run `make setup`, or this command"
            " in the train image"
        )
    settle_remote_code(model, run.recipe.model.trust_remote_code)


def _description(reader: RunReader, adapter: str, merged: bool, model: Path, base: str | None) -> Export:
    """What one folder is to hold. `base` is the base's name as given."""
    run = reader.run
    config: dict[str, Any] = read_json(run.path("train", "adapters", adapter, "adapter_config.json"))
    name, revision = base_name(model, run.recipe.model.path)
    if not HUB_NAME.fullmatch(name):
        name = str(model.absolute())
    notes = []
    if run.recipe.train.load_in_4bit and merged:
        notes.append(
            "trained on the base in 4 bits (NF4) and merged into its own weights, whose rounding differs: scores may"
            " differ a little"
        )
    if base is None and not HUB_NAME.fullmatch(name):
        notes.append("the card names no base, as its name on a hub is not known; give it with --base OWNER/NAME")
    config = {**config, "base_model_name_or_path": base or name, "revision": None if base else revision}
    if (read_json(model / "config.json") or {}).get("model_type") == "mgm":
        notes.append("MGM is an architecture that only Lorry loads")
    if "train" in reader.troubles:
        notes.append(f"{reader.troubles['train']}; the adapter is the one that is there")
    return Export(reader, adapter, merged, model, base or name, config, tuple(notes))


def _export_one(export: Export, folder: Path) -> Export:
    """Write one folder. Returns what it holds, for the lines about it."""
    run, model = export.reader.run, export.model
    template = saved_template(model, chat_settings(run))
    source = run.path("train", "adapters", export.adapter)
    with _replaced_when_whole(folder) as partial:
        if export.merged:
            _write_merged(run, model, source, folder, partial)
            (partial / MODELFILE).write_text(MODELFILE_TEXT, encoding="utf-8")
        else:
            size = (source / "adapter_model.safetensors").stat().st_size
            refuse_full_disk(folder, size, "the adapter", "free some space")
            _copy_into(source / "adapter_model.safetensors", partial)
            write_json(partial / "adapter_config.json", dict(export.config))
            if template is not None:
                for path in (one for one in model.iterdir() if one.name.startswith(TOKENIZER) and one.is_file()):
                    _copy_into(path, partial)
        if template is not None:
            put_template(partial, template)
        (partial / "README.md").write_text(export_card(export), encoding="utf-8")
        write_json(partial / MARK, _mark(export, partial))
        flush(partial)
    return export


def _write_merged(run: Run, model: Path, adapter: Path, folder: Path, partial: Path) -> None:
    """Write the merged model into `partial`, which will be `folder`; with the run's connector, if it has one."""
    connector = trained_connector(run)
    links = folder.with_name(f".{folder.name}.connector")
    try:
        merge = Merge(model if connector is None else link_connector(model, *connector, links), adapter)
        refuse_full_disk(folder, merge.bytes, "the merged model", "free some space, or name a folder on another disk")
        merge.write(partial)
    finally:
        remove(links)


def _copy_into(path: Path, folder: Path) -> None:
    """Copy a file into a folder, under its own name."""
    shutil.copyfile(path, folder / path.name)


def _mark(export: Export, folder: Path) -> dict[str, Any]:
    """The content of `lorry.json`."""
    made = read_json(export.reader.run.path("train", "adapters", export.adapter, "made.json"))
    return {
        "run": export.reader.run.name,
        "adapter": export.adapter,
        "key": made["key"],
        "merged": export.merged,
        "base": export.base,
        "version": importlib.metadata.version("lorry"),
        "files": sorted([*_names_in(folder), MARK]),
    }


def _names_in(folder: Path) -> list[str]:
    """The files below a folder, relative to it, without the lock."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def _refuse_foreign_folder(folder: Path) -> None:
    """Raise UsageError if a path cannot become an export: something is there that no export wrote."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder}: exists and is no folder; name another")
    found = _names_in(folder)
    mark = read_json(folder / MARK) if (folder / MARK).is_file() else {"files": []}
    others = sorted({*found} - {*mark.get("files", [])})
    if others:
        raise UsageError(f"{folder}: has {others[0]}, which no export wrote; name another folder, or move it away")


@contextmanager
def _replaced_when_whole(folder: Path) -> Iterator[Path]:
    """Within this context, an empty folder beside `folder` is filled. It then gets this name, and replaces an earlier
    export. After an error it is deleted.

    Raises InterruptedRunError if another process exports to the same place.
    """
    partial, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "replaced"))
    with lock_stage_folder(partial):
        for path in partial.iterdir():
            if path.name != ".lock":
                remove(path)
        try:
            yield partial
            _refuse_foreign_folder(folder)  # it may have come since
            remove(replaced)
            (partial / ".lock").unlink()
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
            remove(replaced)
        except BaseException:
            remove(partial)
            raise
