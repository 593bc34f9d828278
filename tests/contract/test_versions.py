"""A run is read by the Lorry that wrote it, or one of the same major.minor version."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.contract.errors import Exit, UsageError
from stages.contract.files import FileHashes
from stages.contract.part import Shard
from stages.contract.run import Run, is_same_series
from stages.host.runner import run_stage
from tests.conftest import Lorry
from tests.contract import some_stage

OURS = importlib.metadata.version("lorry")


@pytest.fixture
def preprocessed(run: Run) -> Run:
    assert run_stage(run, "preprocess", some_stage.write) == Exit.DONE
    return run


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def made_by(run: Run, version: str | None, image: str | None = None) -> None:
    """Have the manifest of preprocess say so."""
    edit(run.path("preprocess", "manifest.json"), lambda manifest: manifest.update(version=version, image=image))


@pytest.mark.parametrize(
    ("version", "reads"), [("0.1.0", True), ("0.1.7", True), ("0.2.0", False), ("1.1.0", False), ("None", False)]
)
def test_same_major_and_minor(version: str, reads: bool) -> None:
    assert is_same_series(version, "0.1.0") is reads


def test_a_stage_refuses_its_own_run_of_another_version(
    preprocessed: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_IMAGE", "lorry-preprocess:cpu")
    made_by(preprocessed, "99.0.0", "lorry-preprocess:99.0.0-a800")
    before = preprocessed.path("preprocess", "samples", "train.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert run_stage(preprocessed, "preprocess", some_stage.write) == Exit.USAGE
    line = capsys.readouterr().err.strip()
    assert line == (
        f"preprocess: {preprocessed.folder}: preprocess was done by Lorry 99.0.0 (lorry-preprocess:99.0.0-a800), but"
        f" this preprocess is Lorry {OURS} (lorry-preprocess:cpu); use the images of that version, give the run another"
        " name (--run), or run preprocess again with --force"
    )
    assert preprocessed.path("preprocess", "samples", "train.jsonl").stat().st_mtime_ns == before


def test_a_stage_refuses_an_earlier_one_of_another_version_even_by_force(
    preprocessed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by(preprocessed, "99.0.0")
    with pytest.raises(
        UsageError, match=r"preprocess was done by Lorry 99\.0\.0 \(a local process\), but this train is"
    ):
        preprocessed.inputs("train", FileHashes(preprocessed.folder / "none"))
    capsys.readouterr()
    assert run_stage(preprocessed, "train", some_stage.write, force=True) == Exit.USAGE
    assert "run preprocess again with --force" in capsys.readouterr().err


def test_force_replaces_ones_own(preprocessed: Run) -> None:
    made_by(preprocessed, "99.0.0")
    assert run_stage(preprocessed, "preprocess", some_stage.write, force=True) == Exit.DONE
    assert (preprocessed.manifest("preprocess") or {})["version"] == OURS


def test_a_patch_version_is_read(preprocessed: Run) -> None:
    made_by(preprocessed, f"{OURS}.post7")
    assert preprocessed.is_done("preprocess", FileHashes(preprocessed.folder / "none"))


def test_a_run_of_no_version_is_refused(preprocessed: Run) -> None:
    made_by(preprocessed, None)
    with pytest.raises(UsageError, match="done by Lorry None"):
        preprocessed.is_done("preprocess", FileHashes(preprocessed.folder / "none"))


def test_a_merge_refuses_a_shard_of_another_version(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    shard = Shard(0, 1)
    assert run_stage(run, "preprocess", some_stage.write, part=shard) == Exit.DONE
    manifest = run.stage_folder("preprocess", shard) / "manifest.json"
    edit(manifest, lambda values: values.update(version="99.0.0"))
    capfd.readouterr()
    for part in (None, shard):
        assert run_stage(run, "preprocess", some_stage.write, part=part) == Exit.USAGE
    assert capfd.readouterr().err.count("preprocess (shard 0/1) was done by Lorry 99.0.0 (a local process)") == 2


def test_status_shows_a_run_of_another_version(preprocessed: Run, small_mounts: Lorry) -> None:
    made_by(preprocessed, "99.0.0")
    done = small_mounts("entrypoints.lorry", "status")
    assert done.code == 0
    assert "preprocess done" in done.output
    edit(
        preprocessed.path("preprocess", "manifest.json"), lambda manifest: [manifest.pop(k) for k in ("end", "seconds")]
    )
    done = small_mounts("entrypoints.lorry", "status", "r")
    assert done.code == 0
    assert "Traceback" not in done.output
