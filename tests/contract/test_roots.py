"""Where data, models and runs are. Unusable mounts are one line, with the exit code of a wrong setting."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from entrypoints.lorry import main
from stages.contract import roots
from stages.contract.errors import Exit, UsageError
from stages.contract.roots import Roots
from tests.conftest import REPOSITORY, Lorry
from tests.other_user import folder_for_all, run_as_other_user


def test_the_defaults_are_the_checkouts_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    default = Roots(REPOSITORY / "recipes" / "data", REPOSITORY / "models", REPOSITORY / "runs")
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.delenv(name, raising=False)
    assert Roots.from_environment() == default
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.setenv(name, "")
    assert Roots.from_environment() == default, "an empty variable is none, as for the other settings"


def test_a_folder_of_ones_own_is_relative_to_the_present_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.setenv(name, f"my/{name}")
    assert Roots.from_environment() == Roots(*(tmp_path / f"my/LORRY_{name}" for name in ("DATA", "MODELS", "RUNS")))


def test_without_a_checkout_the_defaults_are_in_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(roots, "CHECKOUT", tmp_path / "site-packages")
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.delenv(name, raising=False)
    assert Roots.from_environment() == Roots(tmp_path / "recipes" / "data", tmp_path / "models", tmp_path / "runs")


def make(place: Path, kind: str) -> Path:
    """A path that cannot be a mount."""
    if kind == "file":
        (place / "file").write_text("")
        return place / "file"
    if kind == "below a file":
        return make(place, "file") / "runs"
    (place / "link").symlink_to("gone")
    return place / "link" if kind == "dangling link" else place / "link" / "runs"


KINDS = {
    "file": "file: a file, not a folder; set {} to a folder",
    "below a file": "file: a file, not a folder; set {} to a folder",
    "dangling link": "link: a link to nothing (gone), not a folder; mend the link, or set {} to a folder",
    "below a dangling link": "link: a link to nothing (gone), not a folder; mend the link, or set {} to a folder",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variable", ["LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"])
@pytest.mark.parametrize("command", [("run", "patent-qa"), ("status",), ("plan", "patent-qa"), ("doctor",)])
def test_a_mount_that_is_no_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, variable: str, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv(variable, str(make(tmp_path, kind)))
    done = CliRunner().invoke(main, [*command])
    assert (done.exit_code, done.output) == (2, f"error: {tmp_path}/{KINDS[kind].format(variable)}\n")


def test_an_empty_variable_is_the_default_and_not_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.setenv(name, "")
    assert Roots.from_environment() == Roots(Path.cwd() / "recipes/data", Path.cwd() / "models", Path.cwd() / "runs")


def test_a_missing_runs_folder_is_made_but_not_the_one_above_it(tmp_path: Path) -> None:
    Roots(tmp_path, tmp_path, tmp_path / "runs").refuse_unwritable_runs()
    message = (
        f"{tmp_path}/disk/runs: no such folder, and no {tmp_path}/disk to create it in; create {tmp_path}/disk, or"
    )
    with pytest.raises(UsageError) as caught:
        Roots(tmp_path, tmp_path, tmp_path / "disk" / "runs").refuse_unwritable_runs()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("kind", "found"), [("file", "a file"), ("dangling link", "a link to nothing (gone)")])
def test_a_stages_folder_that_is_none_is_one_line(
    small_mounts: Lorry, recipe_file: Path, kind: str, found: str
) -> None:
    (small_mounts.runs / "r").mkdir()
    make(small_mounts.runs / "r", kind).rename(small_mounts.runs / "r" / "preprocess")
    done = small_mounts("tests.contract.some_stage", "write", str(recipe_file))
    assert (done.code, len(done.lines)) == (Exit.USAGE, 1), done.output
    assert f"{small_mounts.runs}/r/preprocess: {found}, not a folder; " in done.output
    assert "name another --run, or move it away" in done.output


def test_runs_that_may_not_be_written_are_one_line_before_the_first_stage() -> None:
    with folder_for_all() as folder:
        (folder / "runs").mkdir(mode=0o755)
        environment = Lorry(folder / "data", folder / "models", folder / "runs").environment
        done = run_as_other_user({**environment, "LORRY_TARGET": "cpu"}, "entrypoints.lorry", "run", "patent-qa")
    assert (done.code, "Traceback" in done.output) == (Exit.USAGE, False), done.output
    assert [line.partition(", ")[0] for line in done.lines] == [
        f"error: {folder}/runs: not permitted (Permission denied); {folder}/runs belongs to uid 0",
        f"error: {folder}/data/patent-qa: no such data folder; set data.path to a folder below LORRY_DATA"
        f" ({folder}/data)",
        f"error: {folder}/models/gme-Qwen2-VL-7B-Instruct: no such model folder; set"
        f" preprocess.retrieval.embedder to a folder below LORRY_MODELS ({folder}/models)",
        f"error: {folder}/models/Qwen2.5-VL-32B-Instruct: no such model folder; set model.path to a folder below"
        f" LORRY_MODELS ({folder}/models)",
    ]
