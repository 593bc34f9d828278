"""`lorry fetch` downloads what Lorry reads, checks it, goes on after a cut, and says in one line what is wrong."""

import fcntl
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from click.testing import CliRunner, Result

from entrypoints.lorry import main
from stages.contract.errors import UsageError
from stages.host import fetching
from stages.host.fetching import needed_files
from stages.host.hubs import HubFile
from tests.conftest import REPOSITORY
from tests.host.hub_server import Hub, serving

MODEL = "Some/Model-7B"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": '{"中": 1}'.encode(),
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"card",
    "LICENSE": b"free",
    "model.safetensors.index.json": INDEX,
    SHARDS[0]: b"a" * 12_000_000,
    SHARDS[1]: b"b" * 2_000_000,
    "consolidated.safetensors": b"copy",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "model.gguf": b"other",
    "picture.png": b"png",
    "modeling_own.py": b"code",
    ".gitattributes": b"x",
    "original/consolidated.00.pth": b"copy",
    "onnx/config.json": b"other",
}
WANTED = {name for name in FILES if name not in list(FILES)[8:]}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has MODEL, and a models folder below the test's."""
    for name, value in {"LORRY_MODELS": "models", "MODELSCOPE_HOME": "home", "MODELSCOPE_CACHE": "cache"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    # it is read once, and other tests of this process may have set the variable before
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "models").mkdir()
    with serving(Hub(files={MODEL: dict(FILES)})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.address)
        yield running


def fetch(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["fetch", *arguments])


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_what_lorry_reads_is_downloaded_once(hub: Hub, tmp_path: Path, name: str) -> None:
    result = fetch(MODEL, "--from", name)
    folder = tmp_path / "models" / "Some" / "Model-7B"
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n"), result.output
    assert names_in(folder) == WANTED
    assert all((folder / one).read_bytes() == FILES[one] for one in WANTED)
    assert f"{len(WANTED)} files, 14.0 MB" in result.stderr
    hub.asked.clear()
    again = fetch(MODEL, "--from", name)
    assert (again.exit_code, hub.asked) == (0, [])
    assert "all here and intact" in again.stderr


def test_code_is_downloaded_only_if_asked_for(hub: Hub, tmp_path: Path) -> None:
    assert fetch(MODEL, "--code").exit_code == 0
    assert names_in(tmp_path / "models" / MODEL) == WANTED | {"modeling_own.py"}


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_a_cut_connection_goes_on_where_it_was(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.cut[SHARDS[0]] = 11_000_000
    result = fetch(MODEL, "--from", name)
    assert result.exit_code == 0, result.output
    asked = [at for one, at in hub.asked if one == SHARDS[0]]
    assert len(asked) == 2
    start = int(asked[1].removeprefix("bytes=").partition("-")[0])
    assert 10_000_000 < start <= 11_000_000
    assert (tmp_path / "models" / MODEL / SHARDS[0]).read_bytes() == FILES[SHARDS[0]]


def test_a_killed_download_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.stalled[SHARDS[0]] = 11_000_000
    process = subprocess.Popen(
        [sys.executable, "-m", "entrypoints.lorry", "fetch", MODEL], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    parts = tmp_path / "models" / MODEL / fetching.PARTS
    while not any(path.stat().st_size > 10_000_000 for path in parts.glob("*/*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    hub.goes_on.set()
    hub.asked.clear()
    assert fetch(MODEL).exit_code == 0
    (asked,) = [at for one, at in hub.asked if one == SHARDS[0]]
    assert asked is not None and int(asked.removeprefix("bytes=").partition("-")[0]) > 10_000_000
    assert names_in(tmp_path / "models" / MODEL) == WANTED


def test_two_downloads_of_a_model_do_not_mix(hub: Hub, tmp_path: Path) -> None:
    lock = tmp_path / "models" / MODEL / fetching.PARTS / ".lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = fetch(MODEL)
    assert result.exit_code == 75
    assert "another process is downloading this model; wait until it ends" in result.stderr
    assert fetch(MODEL).exit_code == 0


@pytest.mark.parametrize("name", ["tokenizer.json", SHARDS[0]])
def test_damaged_content_is_not_kept_and_leaves_no_config(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.damaged.add(name)
    result = fetch(MODEL)
    assert result.exit_code == 75
    assert f"{MODEL}: {name} arrived damaged; run the same command again" in result.stderr
    folder = tmp_path / "models" / MODEL
    assert not (folder / name).exists()
    assert not (folder / "config.json").exists()  # so no other command takes the folder for a whole model
    hub.damaged.clear()
    assert fetch(MODEL).exit_code == 0
    assert names_in(folder) == WANTED


def test_a_changed_file_is_replaced_and_named(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "models" / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b'{"model_type": "other"}')
    result = fetch(MODEL)
    assert f"{folder / 'config.json'} differs from the hub's and is replaced" in result.stderr
    assert (folder / "config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("Some/Other",), 2, "Some/Other: no such model on {hub}, or a private one; check the name, set HF_TOKEN"),
        (("Some/Other", "--from", "modelscope"), 2, "Some/Other: no such model on {hub} with revision master"),
        ((MODEL, "--revision", "v9"), 2, f"--revision v9: {MODEL} has no such revision on {{hub}}; name a branch"),
        (("./here",), 2, "./here: not a model's name on a hub; write OWNER/NAME, such as"),
        (("gpt",), 2, "gpt: not a model's name on a hub; write OWNER/NAME"),
        (("Some/Gated",), 2, "Some/Gated: gated on {hub}; accept its terms at {hub}/Some/Gated, then set HF_TOKEN"),
        (("Some/Pickle",), 2, "Some/Pickle: no *.safetensors on the hub (it has pytorch_model.bin); name a model"),
    ],
)
def test_a_mistake_is_one_line_with_a_cure(hub: Hub, arguments: tuple[str, ...], code: int, line: str) -> None:
    hub.files |= {"Some/Gated": FILES, "Some/Pickle": {"config.json": b"{}", "pytorch_model.bin": b"x"}}
    hub.gated.add("Some/Gated")
    result = fetch(*arguments)
    assert result.exit_code == code
    (written,) = result.stderr.splitlines()
    assert line.format(hub=hub.address) in written


def test_a_token_opens_a_gated_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(MODEL)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert fetch(MODEL).exit_code == 0


@pytest.mark.parametrize(
    ("name", "variable", "cure"),
    [
        ("huggingface", "HF_ENDPOINT", "set HF_ENDPOINT to a mirror"),
        pytest.param("modelscope", "MODELSCOPE_ENDPOINT", "--from", marks=pytest.mark.long),  # retries for 7 s
    ],
)
def test_without_a_network_one_line_says_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, variable: str, cure: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    result = fetch(MODEL, "--from", name)
    assert result.exit_code == 75
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {MODEL}: no connection to http://127.0.0.1:9 (")
    assert cure in line


def test_a_full_disk_is_found_before_the_download(hub: Hub, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_MODELS", str(small_disk))
    result = fetch(MODEL)
    assert result.exit_code == 4
    assert "free; free some, or set LORRY_MODELS to a folder on another disk" in result.stderr
    assert [name for name, _ in hub.asked] == ["model.safetensors.index.json"]


def files(*names: str) -> dict[str, HubFile]:
    return {name: HubFile(name, 1, None) for name in names}


def test_a_single_weight_file_is_taken_before_its_copies() -> None:
    listed = files("config.json", "model.safetensors", "model.fp16.safetensors", "1_Pooling/config.json")
    found = needed_files("a/b", listed, None, code=False)
    assert [file.name for file in found] == ["1_Pooling/config.json", "model.safetensors", "config.json"]


def test_an_index_that_names_a_missing_file_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^a/b: no x.safetensors on the hub; name a model in transformers' format"):
        needed_files("a/b", files("config.json", "y.safetensors"), ["x.safetensors", "y.safetensors"], code=False)


def test_no_file_is_written_outside_the_folder(hub: Hub, tmp_path: Path) -> None:
    hub.files[MODEL] |= {"../escaped.json": b"{}"}
    assert fetch(MODEL).exit_code == 0
    assert not list(tmp_path.rglob("escaped.json"))


def test_the_function_that_resumes_has_the_parameters_that_are_used() -> None:
    from huggingface_hub.file_download import http_get

    named = inspect.signature(http_get).parameters
    assert list(named)[:2] == ["url", "temp_file"]
    assert {"resume_size", "headers", "expected_size"} <= named.keys()
