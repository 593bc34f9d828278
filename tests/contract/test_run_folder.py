"""A stage is done exactly when its manifest matches its inputs, its recipe sections and its outputs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.errors import Exit, InterruptedRunError, UsageError
from stages.contract.files import FileHashes, remove, write_json, write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.run import CONTRACT_VERSION, REUSABLE, Run
from stages.contract.stage import Stage
from stages.host import runner as runner_module
from stages.host.runner import run_stage, write_recipe
from tests.conftest import make_data, snapshot
from tests.contract import some_stage


def fresh(run: Run) -> FileHashes:
    return FileHashes(run.folder / "nothing remembered")


def key(run: Run, stage: str = "preprocess") -> str:
    return run.key(stage, run.inputs(stage, fresh(run)))


def with_override(run: Run, recipe_file: Path, override: str) -> Run:
    return replace(run, recipe=load_recipe(recipe_file, None, (override,)))


@pytest.fixture
def preprocessed(run: Run) -> Run:
    assert run_stage(run, "preprocess", some_stage.write) == Exit.DONE
    assert run.is_done("preprocess", fresh(run))
    return run


# -- the key -------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path], object]] = {
    "a question": lambda mounts: (mounts / "data/few/questions.jsonl").open("a").write("\n"),
    "a document": lambda mounts: (mounts / "data/few/documents/D1.pdf").open("ab").write(b" "),
    "one more file": lambda mounts: (mounts / "data/few/documents/D9.pdf").write_bytes(b""),
    "one file less": lambda mounts: (mounts / "data/few/documents/D1.pdf").unlink(),
    "a new name": lambda mounts: (mounts / "data/few/documents/D1.pdf").rename(mounts / "data/few/documents/E.pdf"),
    "the embedder": lambda mounts: (mounts / "models/all-MiniLM-L6-v2/model.safetensors").write_bytes(b"other"),
}

NO_CHANGES: dict[str, Callable[[Path], object]] = {
    "a time stamp": lambda mounts: (mounts / "data/few/documents/D1.pdf").touch(),
    "a hidden file": lambda mounts: (mounts / "data/few/.DS_Store").write_bytes(b"x"),
    "another data folder": lambda mounts: (mounts / "data/many").mkdir(),
    "the model to tune": lambda mounts: (mounts / "models/SmolLM2-135M-Instruct/model.safetensors").write_bytes(b"x"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_changes_the_key(run: Run, tmp_path: Path, change: str) -> None:
    before = key(run)
    CHANGES[change](tmp_path)
    assert key(run) != before


@pytest.mark.parametrize("linked", ["documents", "documents/more"])
def test_a_changed_document_in_a_linked_folder_changes_the_key(run: Run, tmp_path: Path, linked: str) -> None:
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "data" / "few" / linked
    elsewhere.mkdir()
    if link.is_dir():
        link.rename(elsewhere / "documents")
    (elsewhere / "E.pdf").write_bytes(b"before")
    link.symlink_to(elsewhere)
    before = key(run)
    (elsewhere / "E.pdf").write_bytes(b"after it")
    assert key(run) != before


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_is_no_input_does_not(run: Run, tmp_path: Path, change: str) -> None:
    before = key(run)
    NO_CHANGES[change](tmp_path)
    assert key(run) == before


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", {"preprocess", "train"}),
        ("data.test_fraction=0.5", {"preprocess"}),
        ("preprocess.retrieval.top_k=1", {"preprocess"}),
        ("train.rank=2", {"train"}),
        ("model.swift_type=qwen2", {"train"}),
        ("infer.batch_size=2", set()),
        ("eval.worst=1", set()),
        ("description=other", set()),
    ],
)
def test_a_changed_recipe_changes_the_keys_of_the_stages_that_read_it(
    preprocessed: Run, recipe_file: Path, override: str, changed: set[str]
) -> None:
    other = with_override(preprocessed, recipe_file, override)
    inputs = {stage: preprocessed.inputs(stage, fresh(preprocessed)) for stage in ("preprocess", "train")}
    assert {s for s in inputs if other.key(s, inputs[s]) != preprocessed.key(s, inputs[s])} == changed


def train_once(stage: Stage) -> None:
    """Writes its outputs unless an earlier start has: as training does."""
    for name in ("adapters/tuned", "metrics.jsonl"):
        if not stage.path(name).exists():
            write_jsonl(stage.path(name), [{"trained": True}])
        stage.outputs[name] = 1


def test_a_stage_made_with_another_recipe_is_refused(preprocessed: Run, recipe_file: Path) -> None:
    """Its samples may be split otherwise: what was trained on could be scored."""
    assert run_stage(preprocessed, "train", train_once) == Exit.DONE
    other = with_override(preprocessed, recipe_file, "data.test_fraction=0.5")
    with pytest.raises(UsageError, match="preprocess ran with another recipe; run preprocess again"):
        other.inputs("train", fresh(other))
    other = with_override(preprocessed, recipe_file, "train.rank=2")
    with pytest.raises(UsageError, match="train ran with another recipe"):
        other.inputs("infer", fresh(other))


def test_an_adapter_of_other_samples_is_refused(preprocessed: Run, tmp_path: Path) -> None:
    assert run_stage(preprocessed, "train", train_once) == Exit.DONE

    def other_samples(stage: Stage) -> None:
        some_stage.write(stage)
        write_jsonl(stage.path("samples/train.jsonl"), [{"id": "another"}])

    (tmp_path / "data/few/questions.jsonl").open("a").write("\n")
    assert run_stage(preprocessed, "preprocess", other_samples) == Exit.DONE
    with pytest.raises(UsageError, match="preprocess has changed since train used it; run train again"):
        preprocessed.inputs("infer", fresh(preprocessed))


def test_a_touched_output_is_made_again_and_not_blessed(preprocessed: Run) -> None:
    assert run_stage(preprocessed, "train", train_once) == Exit.DONE
    path = preprocessed.path("train", "metrics.jsonl")
    for harm in (lambda: path.write_text("harmed"), path.unlink):
        harm()
        assert run_stage(preprocessed, "train", train_once) == Exit.DONE
        assert "trained" in path.read_text()


def test_leftovers_of_a_kill_without_their_state_are_not_resumed(preprocessed: Run) -> None:
    path = preprocessed.path("train", "metrics.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text("of unknown inputs")
    assert run_stage(preprocessed, "train", train_once) == Exit.DONE
    assert "trained" in path.read_text()


def test_an_interrupted_force_goes_on(preprocessed: Run) -> None:
    def stopped(stage: Stage) -> None:
        train_once(stage)
        raise InterruptedRunError("stopped")

    path = preprocessed.path("train", "adapters", "tuned")
    assert run_stage(preprocessed, "train", train_once) == Exit.DONE
    path.parent.joinpath("old").write_text("x")
    assert run_stage(preprocessed, "train", stopped, force=True) == Exit.INTERRUPTED
    assert not path.parent.joinpath("old").exists()
    written = path.stat().st_mtime_ns
    assert run_stage(preprocessed, "train", train_once, force=True) == Exit.DONE
    assert path.stat().st_mtime_ns == written


def test_the_key_does_not_depend_on_where_the_mounts_are(run: Run, tmp_path: Path) -> None:
    before = key(run)
    (tmp_path / "elsewhere").mkdir()
    for mount in ("data", "models", "runs"):
        (tmp_path / mount).rename(tmp_path / "elsewhere" / mount)
    roots = type(run.roots)(*(tmp_path / "elsewhere" / mount for mount in ("data", "models", "runs")))
    assert key(replace(run, roots=roots)) == before


# -- outputs -------------------------------------------------------------------------------------------------------

TAMPERING: dict[str, Callable[[Path], object]] = {
    "a changed byte": lambda folder: (folder / "samples/train.jsonl").write_text('{"id": "Train"}\n'),
    "a shorter file": lambda folder: (folder / "samples/test.jsonl").write_text(""),
    "a missing file": lambda folder: (folder / "samples/test.jsonl").unlink(),
    "a missing picture": lambda folder: (folder / "pages/1.jpg").unlink(),
    "a changed picture": lambda folder: (folder / "pages/1.jpg").write_bytes(b"eno"),
    "one more picture": lambda folder: (folder / "pages/3.jpg").write_bytes(b""),
    "two pictures swapped": lambda folder: (folder / "pages/1.jpg").replace(folder / "pages/2.jpg"),
    "no pictures": lambda folder: remove(folder / "pages"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("tampering", TAMPERING)
def test_a_stage_whose_output_was_touched_is_not_done_and_is_mended(preprocessed: Run, tampering: str) -> None:
    run, folder = preprocessed, preprocessed.stage_folder("preprocess")
    TAMPERING[tampering](folder)
    assert not run.is_done("preprocess", fresh(run))

    def mend(stage: Stage) -> None:
        remove(stage.path("pages"))
        some_stage.write(stage)

    assert run_stage(run, "preprocess", mend) == Exit.DONE
    assert run.is_done("preprocess", fresh(run))


def test_a_later_stage_refuses_an_output_that_was_touched(preprocessed: Run) -> None:
    preprocessed.path("preprocess", "samples", "train.jsonl").write_text('{"id": "Train"}\n')
    with pytest.raises(UsageError, match=r"train\.jsonl: changed since preprocess wrote it; run preprocess again"):
        preprocessed.inputs("train", fresh(preprocessed))
    preprocessed.path("preprocess", "samples", "train.jsonl").unlink()
    with pytest.raises(UsageError, match=r"train\.jsonl: missing; run preprocess again"):
        preprocessed.inputs("train", fresh(preprocessed))


def test_a_manifest_of_another_contract_is_none(preprocessed: Run) -> None:
    path = preprocessed.path("preprocess", "manifest.json")
    path.write_text(path.read_text().replace(f'"contract": {CONTRACT_VERSION}', '"contract": 0'))
    assert preprocessed.manifest("preprocess") is None
    assert not preprocessed.is_done("preprocess", fresh(preprocessed))


def test_a_run_folder_may_be_moved(preprocessed: Run) -> None:
    preprocessed.folder.rename(preprocessed.roots.runs / "moved")
    moved = replace(preprocessed, name="moved")
    assert moved.is_done("preprocess", fresh(moved))


def test_the_manifest_says_what_was_made_from_what(preprocessed: Run) -> None:
    manifest = preprocessed.manifest("preprocess")
    assert manifest is not None
    assert manifest["status"] == "done"
    assert manifest["outputs"]["samples/train.jsonl"]["records"] == 1
    assert manifest["outputs"]["pages/"]["files"] == 2
    assert set(manifest["inputs"]) == {
        "data/questions.jsonl",
        "data/documents/D1.pdf",
        "data/documents/D2.pdf",
        "models/embedder",
    }
    assert manifest["skipped"] == [{"what": "q1", "reason": "empty question", "detail": "half a pair: \\ud800"}]
    assert manifest["recipe"] == preprocessed.recipe.digest()
    assert manifest["seed"] == 42
    assert manifest["peak_memory_bytes"] > 1 << 20


def skip_much(stage: Stage) -> None:
    """A document of which every page fails."""
    some_stage.write(stage)
    stage.skipped.clear()
    for number in range(100_000):
        stage.skip(f"a.pdf page {number}", "unreadable page", f"page cannot be rendered: no page {number}")
    stage.skip("b.pdf page 1", "blank page", "x" * 100_000)


def test_the_manifest_counts_all_that_is_skipped_and_names_some_of_each_reason(run: Run) -> None:
    assert run_stage(run, "preprocess", skip_much) == Exit.DONE
    manifest = run.manifest("preprocess")
    assert manifest is not None
    assert run.path("preprocess", "manifest.json").stat().st_size < 1_000_000
    assert manifest["skipped_counts"] == {"unreadable page": 100_000, "blank page": 1}
    named = [entry["what"] for entry in manifest["skipped"]]
    assert named[:2] == ["a.pdf page 0", "a.pdf page 1"] and named[-1] == "b.pdf page 1"
    assert max(len(entry["detail"]) for entry in manifest["skipped"]) < 1000


# -- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train", "infer", "eval"])
def test_a_stage_before_its_turn_exits_2_and_names_the_one_to_run(
    run: Run, stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(run, stage, some_stage.write) == Exit.USAGE
    message = capfd.readouterr().err.strip()
    assert "\n" not in message
    assert "which is not done; run preprocess first" in message


def test_a_missing_mount_names_folder_recipe_key_and_variable(run: Run, tmp_path: Path) -> None:
    (tmp_path / "models" / "all-MiniLM-L6-v2" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no \*\.safetensors in this folder"):
        run.inputs("preprocess", fresh(run))
    remove(tmp_path / "models" / "all-MiniLM-L6-v2")
    with pytest.raises(UsageError, match=r"all-MiniLM-L6-v2: no such model folder; .*embedder.* LORRY_MODELS"):
        run.inputs("preprocess", fresh(run))
    remove(tmp_path / "data" / "few")
    with pytest.raises(UsageError, match=r"few: no such data folder; set data\.path .* LORRY_DATA"):
        run.inputs("preprocess", fresh(run))


def test_the_data_path_may_be_a_file(run: Run, recipe_file: Path) -> None:
    """Its inputs are the file alone, and not what is beside it."""
    file = with_override(run, recipe_file, "data.path=few/questions.jsonl")
    before = file.inputs("preprocess", fresh(file))
    assert [name for name in before if name.startswith("data/")] == ["data/questions.jsonl"]
    (file.data.parent / "beside.jsonl").write_text("{}")
    assert file.inputs("preprocess", fresh(file)) == before
    with file.data.open("a") as data:
        data.write("\n")
    assert file.inputs("preprocess", fresh(file)) != before


# -- changed inputs ------------------------------------------------------------------------------------------------


def test_nothing_of_other_inputs_is_left_but_what_is_checked_piece_by_piece(
    preprocessed: Run, recipe_file: Path
) -> None:
    other = with_override(preprocessed, recipe_file, "seed=1")
    preprocessed.path("preprocess", "cache").mkdir()
    seen: list[str] = []

    def look(stage: Stage) -> None:
        seen.extend(path.name for path in stage.folder.iterdir() if not path.name.startswith("."))

    assert run_stage(other, "preprocess", look) == Exit.DONE
    own = {"state.json", "events.jsonl", "log.txt"}
    assert set(seen) - own == set(REUSABLE["preprocess"])


@pytest.mark.parametrize("deletions", range(8))
def test_a_kill_while_clearing_leaves_nothing_old_to_be_taken_for_new(
    run: Run, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    """The folder is cleared of what came from other inputs; the kill may come between any two deletions."""

    def leave_journals(stage: Stage) -> None:
        for name in ("a.jsonl", "m.jsonl", "z.jsonl"):
            write_jsonl(stage.path(name), [{"seed": stage.run.recipe.seed}])
        stage.outputs["a.jsonl"] = 1

    assert run_stage(run, "preprocess", leave_journals) == Exit.DONE
    other = with_override(run, recipe_file, "seed=1")
    done = 0

    def remove_until_killed(path: Path) -> None:
        nonlocal done
        if done == deletions:
            raise SystemExit
        done += 1
        remove(path)

    monkeypatch.setattr(runner_module, "remove", remove_until_killed)
    try:
        run_stage(other, "preprocess", lambda stage: None)
    except SystemExit:
        monkeypatch.setattr(runner_module, "remove", remove)
        found: list[str] = []

        def look(stage: Stage) -> None:
            found.extend(path.name for path in stage.folder.glob("?.jsonl"))

        assert run_stage(other, "preprocess", look) == Exit.DONE
        assert found == []


# -- another job ---------------------------------------------------------------------------------------------------

OTHER_JOBS = {
    "task": ("task=logic_choice", "holds results of task patent_qa, but this recipe has task logic_choice"),
    "data": ("data.path=more", "holds results of data.path few, but this recipe has data.path more"),
    "model": (
        "model.path=all-MiniLM-L6-v2",
        "holds results of model.path SmolLM2-135M-Instruct, but this recipe has model.path all-MiniLM-L6-v2",
    ),
}


@pytest.mark.parametrize("stage", ["preprocess", "train", "infer", "eval"])
@pytest.mark.parametrize("other", OTHER_JOBS)
def test_another_job_in_a_run_with_results_is_refused_and_changes_nothing(
    preprocessed: Run, recipe_file: Path, other: str, stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    override, found = OTHER_JOBS[other]
    make_data(preprocessed.roots.data / "more", documents=1, pages=1)
    before = snapshot(preprocessed.folder)
    capfd.readouterr()
    changed = with_override(preprocessed, recipe_file, override)
    for force in (False, True):
        assert run_stage(changed, stage, some_stage.write, force) == Exit.USAGE
        line = f"{stage}: {preprocessed.folder}: {found}; give this job a run of its own: --run NAME\n"
        assert capfd.readouterr().err == line
    assert snapshot(preprocessed.folder) == before


@pytest.mark.parametrize("path", ["./few", "more/../few", "absolute", "link"])
def test_another_name_for_the_same_data_is_not_another_job(preprocessed: Run, recipe_file: Path, path: str) -> None:
    data = preprocessed.roots.data
    (data / "more").mkdir()
    (data / "link").symlink_to(data / "few")
    name = str(data / "few") if path == "absolute" else path
    with_override(preprocessed, recipe_file, f"data.path={name}").refuse_other_job()


def test_a_run_without_results_is_free_for_another_job(run: Run, recipe_file: Path) -> None:
    assert run_stage(run, "preprocess", some_stage.unusable) == Exit.DATA
    make_data(run.roots.data / "more", documents=1, pages=1)
    assert run_stage(with_override(run, recipe_file, "data.path=more"), "preprocess", some_stage.write) == Exit.DONE


def test_an_adapter_alone_is_a_result(run: Run, recipe_file: Path) -> None:
    write_recipe(run)
    write_json(run.path("train", "adapters", "tuned", "made.json"), {})
    with pytest.raises(UsageError, match="holds results of task"):
        with_override(run, recipe_file, "task=logic_choice").refuse_other_job()


def test_a_container_knows_the_data_by_the_hosts_name(
    run: Run, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lorry launch --data` mounts any folder as `/data`."""
    mounted = replace(run, roots=replace(run.roots, data=run.roots.data / "few"))
    monkeypatch.setenv("LORRY_DATA_FROM", "/home/someone/few")
    here = with_override(mounted, recipe_file, "data.path=/home/someone/few")
    assert here.data == run.roots.data / "few"
    assert run_stage(here, "preprocess", some_stage.write) == Exit.DONE
    here.refuse_other_job()
    file = with_override(mounted, recipe_file, "data.path=/home/someone/few/questions.jsonl")
    assert file.data == run.roots.data / "few" / "questions.jsonl"
    monkeypatch.setenv("LORRY_DATA_FROM", "/home/someone/more")
    with pytest.raises(UsageError, match=r"results of data\.path /home/someone/few, but .* /home/someone/more; give"):
        with_override(mounted, recipe_file, "data.path=/home/someone/more").refuse_other_job()
