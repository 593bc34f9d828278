"""Two phases on a tiny LLaVA: the connector alone, then LoRA on the base with it."""

import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from stages.contract.errors import Exit, UsageError
from stages.contract.events import Events
from stages.contract.files import FileHashes, read_json, read_jsonl, sha256_file, write_json
from stages.contract.recipe import Adapter, Connector, Recipe, Train, load_recipe
from stages.contract.run import describe_output
from stages.contract.stage import Stage
from stages.contract.stop import StopRequest
from stages.host.runner import run_stage
from stages.models.connector import LAST, check_connector, link_connector, tensor_files
from stages.train import stage as train
from stages.train.job import Job
from stages.train.torchrun import TrainingProcesses
from stages.train.trained import _picture_hashes
from tests.conftest import REPOSITORY, snapshot
from tests.tasks.stand_ins.worker import publish
from tests.train.test_nodes import TwoNodes, ended
from tests.train.two_phases import CONNECTOR, TwoPhases, two_phases


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TwoPhases:
    training = two_phases(tmp_path_factory.mktemp("two")).prepared()
    training.done()
    return training


def base(training: TwoPhases) -> Path:
    return training.lorry.models / "tiny-llava"


def test_the_first_phase_trains_the_connector_and_nothing_else(trained: TwoPhases) -> None:
    weights, before = load_file(trained.connector), load_file(base(trained) / "model.safetensors")
    assert set(weights) == {name for name in before if name.startswith("multi_modal_projector.")}
    for name, weight in weights.items():
        assert weight.dtype == np.float32
        assert (weight != before[name]).any(), f"{name} has learnt"
    facts = read_json(trained.connector.with_name("training.json"))
    assert facts["samples"]["train"] == 16, "the sample without a picture is not among them"
    assert facts["steps"] == 4
    rows = [row for row in read_jsonl(trained.run.path("train", "metrics.jsonl")) if row["adapter"] == "connector"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_the_second_phase_is_lora_on_the_language_model_with_that_connector(trained: TwoPhases) -> None:
    weights = load_file(trained.adapter)
    assert weights and all(".language_model." in name for name in weights)
    sha256 = sha256_file(trained.connector)
    assert read_json(trained.adapter.with_name("training.json"))["connector"] == sha256
    manifest = trained.manifest()
    assert manifest["connector"]["sha256"] == manifest["outputs"]["connector/connector.safetensors"]["sha256"] == sha256
    assert manifest["counts"]["connector samples"] == 16
    assert manifest["counts"]["connector samples without picture"] == 1
    decided = {made["what"]: made["value"] for made in manifest["decisions"]}
    assert decided["connector effective batch"].startswith("4 samples a step in passes of at most ")


@pytest.mark.long
def test_adapters_after_the_connector_share_one_base(tmp_path: Path) -> None:
    both = two_phases(tmp_path, "train.adapters=[{name: tuned, data: [questions]}, {name: again, data: [questions]}]")
    output = both.prepared().done()
    assert "train tuned: loads the base again, with the trained connector\n" in output
    assert "train tuned: 8 samples\n" in output
    assert "train again: 8 samples, on the base that is loaded\n" in output
    files = [snapshot(both.run.path("train", "adapters", name)) for name in ("tuned", "again")]
    assert all(one.pop("timing.json") for one in files) and files[0] == files[1]


@pytest.mark.long
def test_another_data_mix_for_adapters_keeps_the_connector(
    trained: TwoPhases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = trained.copied(tmp_path, "train.adapters=[{name: tuned, data: ['questions#4']}]")
    before, jobs = trained.adapter.read_bytes(), list[Job]()

    def train_adapter(_processes: TrainingProcesses, job: Job, *_: Any) -> None:
        jobs.append(job)
        publish(job)

    monkeypatch.setenv("LORRY_TARGET", "cpu")
    monkeypatch.setattr(TrainingProcesses, "train", train_adapter)
    assert run_stage(other.run, "train", train.work) == Exit.DONE
    (job,) = jobs
    assert (job.adapter.name, job.connector) == ("tuned", (other.connector, sha256_file(trained.connector)))
    assert other.connector.read_bytes() == trained.connector.read_bytes()
    assert other.adapter.read_bytes() != before


@pytest.mark.long
def test_another_data_mix_for_the_connector_trains_the_adapters_again(trained: TwoPhases, tmp_path: Path) -> None:
    """What captions say has an effect: the adapter's own data are the same."""
    fewer = CONNECTOR.replace("captions", "'captions#9'").replace("max_length", "most_samples: 4, max_length")
    other = trained.copied(tmp_path, fewer)
    other.done()
    counts = other.manifest()["counts"]
    assert counts["connector samples"] == 4
    assert 4 <= counts["connector samples beyond most samples"] <= 5
    unused = counts["connector samples beyond most samples"] + counts["connector samples without picture"]
    assert unused == 5, "each is counted once"
    assert other.connector.read_bytes() != trained.connector.read_bytes()
    assert other.adapter.read_bytes() != trained.adapter.read_bytes()
    losses = [
        [row["loss"] for row in read_jsonl(each.run.path("train", "metrics.jsonl")) if row["adapter"] == "tuned"]
        for each in (trained, other)
    ]
    assert losses[0][0] != losses[1][0], "before the first step of LoRA only the connectors differ"


def test_a_changed_connector_is_refused(trained: TwoPhases, tmp_path: Path) -> None:
    other = trained.copied(tmp_path, "train.learning_rate=0.002")  # the adapter is to be trained again
    content = bytearray(other.connector.read_bytes())
    content[-1] ^= 1
    other.connector.write_bytes(content)
    code, output = other()
    assert code == 2, output
    assert re.search(
        r"connector\.safetensors: has sha256 \w{16}, but train wrote it with sha256 \w{16}; restore it, or delete .* to"
        " train it again",
        output.splitlines()[-1],
    )


def test_shards_are_refused(trained: TwoPhases, tmp_path: Path) -> None:
    code, output = trained.copied(tmp_path)("--shard", "0/2")
    assert code == 2 and "leave out --shard, or train on several nodes" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "code", "told"),
    [
        ("train.load_in_4bit=true", 4, "train.load_in_4bit: bitsandbytes has no kernels for target cpu"),
        (
            "train.sharding=zero3",
            2,
            "train.sharding: zero3 needs a GPU, but there is none here; set it to none or auto",
        ),
    ],
)
def test_what_the_second_phase_cannot_do_is_found_before_the_first(
    tmp_path: Path, override: str, code: int, told: str
) -> None:
    other = two_phases(tmp_path, override).prepared()
    found, output = other()
    assert found == code, output
    assert told in output.splitlines()[-1]
    assert not other.run.path("train", "checkpoints").exists() and not other.connector.exists()


def test_what_is_there_needs_no_card(trained: TwoPhases, tmp_path: Path) -> None:
    other = trained.copied(tmp_path, "train.keep_checkpoints=5")
    before = {path: path.stat().st_ino for path in (other.connector, other.adapter)}
    other.run.path("train", "manifest.json").unlink()
    output = other.done(LORRY_TARGET="a800", CUDA_VISIBLE_DEVICES="")  # which it does not have
    assert "precision" not in output, "nothing is planned"
    assert {path: path.stat().st_ino for path in before} == before


def test_only_the_pictures_that_samples_show_are_in_the_keys(trained: TwoPhases, tmp_path: Path) -> None:
    other = trained.copied(tmp_path)
    pictures = other.run.path("preprocess", "pictures")
    pictures.mkdir()
    for name in ("shown", "of a test set"):
        Image.new("RGB", (80, 60), "red").save(pictures / f"{name}.png")
    shown_by_each: list[list[str]] = [["preprocess/pictures/shown.png"], [], ["preprocess/pages/red.png"]]
    rows: list[dict[str, Any]] = [{"images": names} for names in shown_by_each]

    def digest(samples: list[dict[str, Any]]) -> Any:
        manifest = read_json(other.run.path("preprocess", "manifest.json"))
        hashes = FileHashes(tmp_path / "none")
        manifest["outputs"]["pictures/"] = describe_output(pictures.parent, "pictures/", None, hashes)
        write_json(other.run.path("preprocess", "manifest.json"), manifest)
        stage = Stage(
            other.run, "train", Events(tmp_path / "events.jsonl", "train", io.StringIO()), StopRequest(), 0, 0
        )
        return _picture_hashes(stage, [samples], hashes)

    assert digest(rows[1:2]) is None
    before = digest(rows)
    Image.new("RGB", (80, 60), "blue").save(pictures / "of a test set.png")
    Image.new("RGB", (80, 60), "blue").save(pictures / "another.png")
    assert digest(rows) == before
    Image.new("RGB", (80, 60), "blue").save(pictures / "shown.png")
    assert digest(rows) != before


# -- base and connector in one folder ----------------------------------------------------------------------------


def sharded(model: Path, folder: Path) -> Path:
    """The model in three files with an index; the connector's tensors are in two of them."""
    from safetensors.numpy import save_file

    weights = load_file(model / "model.safetensors")
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    places = {name: names[number % 3] for number, name in enumerate(sorted(weights))}
    folder.mkdir()
    for file in names:
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["one file", "three files"])
def test_links_and_an_index_put_base_and_connector_together(trained: TwoPhases, tmp_path: Path, kind: str) -> None:
    import torch
    from safetensors.torch import load_file as load
    from transformers import AutoModelForImageTextToText

    model = base(trained) if kind == "one file" else sharded(base(trained), tmp_path / "base")
    sha256 = sha256_file(trained.connector)
    folder = link_connector(model, trained.connector, sha256, tmp_path / "both")
    assert sum(path.stat().st_size for path in folder.iterdir() if not path.is_symlink()) < 20_000, "no weights copied"
    places = tensor_files(folder)
    assert set(places) == set(tensor_files(model))
    assert max(path.name for path in places.values()) == LAST, "of two tensors of one name, the later file's stands"
    found = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    plain = AutoModelForImageTextToText.from_pretrained(base(trained), dtype=torch.float32).state_dict()
    learnt = load(trained.connector)
    for name, weight in found.items():
        expected = learnt.get(name.removeprefix("model."), plain[name])
        assert torch.equal(weight, expected), name


def test_another_model_s_connector_is_refused(trained: TwoPhases, tmp_path: Path) -> None:
    other = trained.lorry.models / "SmolLM2-135M-Instruct"
    with pytest.raises(UsageError, match=r"contains multi_modal_projector\.linear_1\.bias, which .* does not have"):
        link_connector(other, trained.connector, sha256_file(trained.connector), tmp_path / "both")
    with pytest.raises(UsageError, match=rf": has sha256 \w+, but train wrote it with sha256 {'0' * 16}; restore it"):
        check_connector(trained.connector, "0" * 64)
    with pytest.raises(UsageError, match=rf": is missing, but train wrote it with sha256 {'0' * 16}; restore it"):
        check_connector(tmp_path / "missing", "0" * 64)


# -- what it is trained on ---------------------------------------------------------------------------------------


def test_the_recipe_s_rules() -> None:
    adapters = [Adapter(name="tuned")]
    assert Connector().most_samples == 200_000
    assert Connector().effective_batch == 256
    settings = Train(adapters=adapters, connector=Connector(learning_rate=2e-3), load_in_4bit=True, lora_plus_ratio=4.0)
    first = settings.connector_settings()
    assert first.trains_connector and not settings.trains_connector
    assert (first.learning_rate, first.load_in_4bit, first.lora_plus_ratio) == (2e-3, False, None)
    assert Train.model_validate(first.model_dump()) == first, "as the training process reads it"
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny")
    named = {**recipe.model_dump(), "train": Train(adapters=[Adapter(name="connector")]).model_dump()}
    assert Recipe.model_validate(named).train.connector is None, "without a connector the name is free"
    named["train"]["connector"] = Connector().model_dump()
    with pytest.raises(ValueError, match="is the name of the first phase"):
        Recipe.model_validate(named)


def test_a_recipe_that_differs_in_room_alone_is_the_same(trained: TwoPhases) -> None:
    smaller = TwoPhases(trained.lorry, CONNECTOR, "train.gradient_checkpointing=true")
    assert smaller.run.recipe.digest() == trained.run.recipe.digest()
    faster = TwoPhases(trained.lorry, CONNECTOR.replace("max_length", "learning_rate: 0.1, max_length"))
    assert faster.run.recipe.digest() != trained.run.recipe.digest()


# -- kills -------------------------------------------------------------------------------------------------------


@pytest.mark.kill
def test_a_killed_first_phase_goes_on_to_the_same_bytes(trained: TwoPhases, tmp_path: Path) -> None:
    other = two_phases(tmp_path).prepared()
    code, output = other(HUNGER=json.dumps({"during": "saving", "from_step": 4}))
    assert (code, ": ended by SIGKILL (" in output) == (1, True), output
    assert not other.connector.exists()
    assert "resuming from checkpoint-2" in other.done()
    assert other.connector.read_bytes() == trained.connector.read_bytes()
    assert other.adapter.read_bytes() == trained.adapter.read_bytes()


@pytest.mark.kill
def test_a_stopped_first_phase_is_interrupted_and_goes_on(trained: TwoPhases, tmp_path: Path) -> None:
    other = two_phases(tmp_path).prepared()
    process = other.start()
    assert process.stdout is not None
    said = next(line for line in process.stdout if "train connector: 16 samples" in line)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the whole group
    rest = process.stdout.read()
    assert process.wait() == 75, said + rest
    assert "then stops (SIGINT); press Ctrl-C again to stop at once\n" in rest
    assert not other.connector.exists()
    other.done()
    assert other.connector.read_bytes() == trained.connector.read_bytes()


@pytest.mark.kill
def test_the_ladder_is_the_first_phase_s_too(trained: TwoPhases, tmp_path: Path) -> None:
    other = two_phases(tmp_path).prepared()
    output = other.done(HUNGER=json.dumps({"during": "training", "above": 2}))
    assert re.search(r"out of memory: passes of at most \d+ tokens, still 4 samples a step", output)
    taken = [made for made in other.manifest()["decisions"] if made["what"] == "out of memory"]
    assert any(made["why"].startswith("adapter connector") for made in taken)
    found, expected = load_file(other.connector), load_file(trained.connector)
    assert all(np.allclose(found[name], expected[name], atol=1e-4) for name in expected)


@pytest.mark.kill
def test_two_nodes_train_both_phases_as_one_does(trained: TwoPhases, tmp_path: Path) -> None:
    nodes = TwoNodes(two_phases(tmp_path).prepared())
    codes, output = ended(nodes.start())
    assert codes == [0, 0], output + nodes.log()
    for mine, theirs in ((nodes.training.connector, trained.connector), (nodes.training.adapter, trained.adapter)):
        found, expected = load_file(mine), load_file(theirs)
        assert all(np.allclose(found[name], expected[name], atol=1e-5) for name in expected)
