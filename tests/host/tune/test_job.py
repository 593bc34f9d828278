"""`lorry tune` finds model and data, writes the recipe that it runs, and says in one line what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from entrypoints.lorry import main
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import STAGES
from stages.host.runs import open_run
from stages.host.tune.job import Wanted, prepare
from tests.conftest import REPOSITORY
from tests.host.hub_server import Hub, serving
from tests.host.tune.test_base import with_weight
from tests.models.chat_models import BASE, CHATML, HYBRID, chat_model

CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 49200},
    **{"max_position_embeddings": 1024, "tie_word_embeddings": True, "torch_dtype": "float32"},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the data `chats.jsonl`, beside the mounts."""
    for name in ("data", "models", "runs"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"LORRY_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("LORRY_TARGET", "cpu")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # other tests may have set it before
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_chats(Path("chats.jsonl"))
    return tmp_path


def write_chats(path: Path, count: int = 30, thought: str = "", **others: Any) -> None:
    """Write conversations about numbers, with this thought in each answer."""
    turns = [("How many are {}?", "There are {}."), ("多少？", "一共 {} 个。\n\n  好")]
    lines = []
    for number in range(count):
        messages = [{"role": "system", "content": f"Count to {number * 7919 % 1000}."}]
        for asked, said in turns:
            words = " ".join(str(number * 104729 % modulus) for modulus in (97, 89, 83, 79, 73, 71, 67))
            messages.append({"role": "user", "content": asked.format(words)})
            messages.append({"role": "assistant", "content": thought + said.format(words)})
        lines.append(json.dumps({"messages": messages, **others}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def model(place: Path, kind: Any = CHATML, **config: Any) -> Path:
    """Write a small model without usable weights into the models mount."""
    folder = chat_model(place / "models" / "Tiny", kind)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    with_weight(folder)
    return folder


def prepared(**options: Any) -> tuple[dict[str, Any], list[str]]:
    """What `prepare` returns and says for these options."""
    given = {"data": "chats.jsonl", "model": "Tiny", **dict.fromkeys(("run_name", "gpus", "target", "form", "epochs"))}
    lines = prepare(Wanted(**{**given, "overrides": (), **options}), Roots.from_environment())
    said = []
    while True:
        try:
            said.append(str(next(lines)))
        except StopIteration as end:
            return end.value[0], said


def test_the_recipe_is_written_valid_and_for_this_job(place: Path) -> None:
    model(place)
    options, lines = prepared()
    run = open_run(**options)
    assert (run.name, options["recipe"]) == ("chats-Tiny", "chats-Tiny.yaml")
    recipe = run.recipe
    assert (recipe.task, recipe.model.path, recipe.data.path) == ("chat", "Tiny", str(Path("chats.jsonl").absolute()))
    assert recipe.train.max_length >= 100
    assert recipe.infer.engine == "transformers"
    assert lines[0] == "chats.jsonl: messages, 30 conversations"
    assert "chats-Tiny.yaml: written; keep it and edit it" in lines
    assert any(line.startswith("  train.epochs 5: ") for line in lines)
    assert all(line.partition(": ")[2] for line in lines)


def test_data_below_the_mount_are_named_as_there(place: Path) -> None:
    model(place)
    write_chats(place / "data" / "more.jsonl")
    options, _ = prepared(data="more.jsonl")
    assert (options["data"], open_run(**options).recipe.data.path) == (None, "more.jsonl")


def test_what_is_set_is_in_the_recipe_that_runs(place: Path) -> None:
    model(place)
    options, _ = prepared(epochs=2, form="messages", overrides=("train.rank=4", "infer.batch_size=auto"))
    recipe = open_run(**options).recipe
    assert (recipe.train.epochs, recipe.train.rank, recipe.train.alpha) == (2, 4, 8)
    assert (recipe.infer.batch_size, recipe.preprocess.samples["form"]) == ("auto", "messages")
    assert options["overrides"] == ()


def test_a_recipe_that_is_here_is_used_as_it_is(place: Path) -> None:
    model(place)
    prepared()
    file = Path("chats-Tiny.yaml")
    edited = file.read_text(encoding="utf-8").replace("epochs: 5", "epochs: 4")
    file.write_text(edited, encoding="utf-8")
    for options in ({}, {"epochs": 4}):
        _, lines = prepared(**options)
        assert lines == ["chats-Tiny.yaml: here already, and used as it is; delete it for new values"]
    assert file.read_text(encoding="utf-8") == edited


@pytest.mark.parametrize(
    ("thought", "kind", "expected"),
    [
        ("<think>\nhm\n</think>\n\n", HYBRID, True),
        ("", HYBRID, False),
        ("<think>\n\n</think>\n\n", HYBRID, False),
        ("", CHATML, None),
    ],
)
def test_a_hybrid_thinks_if_the_data_do(place: Path, thought: str, kind: Any, expected: bool | None) -> None:
    model(place, kind)
    write_chats(Path("chats.jsonl"), thought=thought)
    options, _ = prepared()
    assert open_run(**options).recipe.model.enable_thinking is expected


def test_a_base_model_gets_a_template_and_a_line_says_so(place: Path) -> None:
    model(place, BASE)
    options, lines = prepared()
    assert open_run(**options).recipe.model.chat_template == "chatml"
    assert "  model.chat_template chatml: a base model without a chat template; its tokenizer has <|im_end|>" in lines


def test_long_conversations_are_counted_by_the_tokenizer(place: Path) -> None:
    model(place)
    turns = [{"role": "user", "content": "word " * 600}, {"role": "assistant", "content": "yes"}]
    with Path("chats.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    options, _ = prepared()
    assert 640 <= open_run(**options).recipe.train.max_length <= 704


# -- mistakes ------------------------------------------------------------------------------------------------------


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", *arguments])


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("chats.jsonl", "--model", "Tinny"), 2, "--model Tinny: no such folder, neither here nor in"),
        (("chats.jsonl", "--model", "Tiny", "--run", "a/b"), 2, "--run a/b: not a name for one folder"),
        (("none.jsonl", "--model", "Tiny"), 2, "none.jsonl: no such file or folder, neither here nor in"),
        (("empty.jsonl", "--model", "Tiny"), 2, "empty.jsonl: an empty file; name a file of chats"),
        (("asked.jsonl", "--model", "Tiny"), 3, "no usable conversation"),
        (("chats.jsonl", "--model", "Tiny", "--gpus", "auto"), 2, "--gpus auto: this machine has no GPU"),
        (("one.jsonl", "--model", "Tiny"), 3, "one.jsonl: one conversation alone; add others"),
        (("chats.jsonl", "--model", "Tiny", "--data-form", "chatty"), 2, "chatty"),
        (("chats.jsonl", "--model", "Tiny", "--set", "train.epoch=3"), 2, "--set train.epoch=3: unknown key"),
        (("chats.jsonl", "--model", "Tiny", "--set", "train"), 2, "--set train: not section.key=value"),
        (("seen.jsonl", "--model", "Tiny"), 2, "--model Tiny: sees no pictures, but the data show some"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_recipe(
    place: Path, arguments: tuple[str, ...], code: int, line: str
) -> None:
    model(place)
    Path("empty.jsonl").touch()
    Path("asked.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    write_chats(Path("one.jsonl"), 1)
    Image.new("RGB", (40, 40)).save("one.png")
    write_chats(Path("seen.jsonl"), 4, images=["one.png"])
    result = tune(*arguments)
    assert result.exit_code == code, result.output
    errors = [one for one in result.stderr.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert not list(Path().glob("*.yaml"))


def test_another_job_needs_another_name(place: Path) -> None:
    model(place)
    prepared()
    write_chats(Path("others.jsonl"))
    result = tune("others.jsonl", "--model", "Tiny", "--run", "chats-Tiny")
    assert (result.exit_code, "give this job a name of its own: --run NAME" in result.stderr) == (2, True)
    result = tune("chats.jsonl", "--model", "Tiny", "--epochs", "9")
    assert result.exit_code == 2
    assert "chats-Tiny.yaml: here already, without train.epochs=9.0; set that there" in result.stderr


def test_a_model_too_large_for_this_machine_is_refused_at_once(place: Path) -> None:
    folder = model(place)
    header = json.dumps({"x": {"dtype": "F16", "shape": [10**6, 5 * 10**5], "data_offsets": [0, 10**12]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 10**12)  # a hole: no block of the disk
    result = tune("chats.jsonl", "--model", "Tiny")
    assert result.exit_code == 4
    assert "--model Tiny: 500.0 billion parameters take 1863 GiB in float32, as on a CPU" in result.stderr


# -- a model on a hub ----------------------------------------------------------------------------------------------


def test_a_model_that_is_not_here_is_downloaded_after_a_look_at_the_data(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(place)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    Path("asked.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with serving(Hub(files={"Some/Small": files})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        assert tune("asked.jsonl", "--model", "Some/Small").exit_code == 3
        assert hub.asked == []
        options, lines = prepared(model="Some/Small")
    assert open_run(**options).recipe.model.path == "Some/Small"
    assert (place / "models" / "Some" / "Small" / "config.json").is_file()
    assert f"Some/Small: not in {place / 'models'}, so it is downloaded first" in lines


def test_without_a_hub_one_line_says_so(place: Path) -> None:
    result = tune("chats.jsonl", "--model", "Some/Small")
    assert result.exit_code == 75
    assert "error: Some/Small: no connection to http://127.0.0.1:9 (" in result.stderr


# -- a whole job ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_whole_job_runs_from_the_recipe_and_is_then_up_to_date(place: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = chat_model(place / "models" / "Tiny", CHATML)
    values = {key: value for key, value in CONFIG.items() if key not in ("architectures", "torch_dtype")}
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(folder)

    def lorry(*arguments: str) -> tuple[int, list[str]]:
        """Run a command of `lorry` in the current folder. Returns its exit code and its lines."""
        done = subprocess.run(
            [sys.executable, "-m", "entrypoints.lorry", *arguments],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.splitlines()

    command = ("tune", "chats.jsonl", "--model", "../models/Tiny", "--epochs", "1")
    code, lines = lorry(*command)
    assert code == 0, lines
    assert lines[-3].startswith("lorry chat chats-Tiny ")
    assert any(line.startswith("report: ") for line in lines)
    settled = open_run("chats-Tiny.yaml").recipe
    assert load_recipe(place / "runs" / "chats-Tiny" / "recipe.yaml") == settled
    done = [*(f"{name}: up to date" for name in STAGES), "all four stages are up to date"]
    assert lorry("run", "chats-Tiny.yaml")[1][:5] == done
    code, lines = lorry(*command)
    assert code == 0
    assert "chats-Tiny.yaml: here already, and used as it is; delete it for new values" in lines
    assert [line for line in lines if "up to date" in line] == done
