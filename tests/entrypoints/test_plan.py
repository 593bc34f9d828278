"""`lorry plan`: a table and a verdict for cards that are not here, from headers alone."""

from pathlib import Path

import pytest

from tests.conftest import Lorry
from tests.hardware.shapes import make_shape


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_shape(folder / "Qwen2.5-7B-Instruct", "Qwen2.5-7B")
    make_shape(folder / "Qwen2.5-14B", "Qwen2.5-14B")
    return folder


@pytest.fixture
def lorry(tmp_path: Path, models: Path) -> Lorry:
    return Lorry(tmp_path, models, tmp_path / "runs", {"CUDA_VISIBLE_DEVICES": ""})


def test_the_table_adds_up_and_the_verdict_is_in_the_exit_code(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "plan", "patent-qa", "--target", "rtx4090")
    assert done.code == 0, done.output
    assert "Qwen2.5-7B-Instruct, 7.62 billion parameters, on rtx4090 of 24 GiB, in bfloat16" in done.lines[0]
    rows = {line.split()[0]: float(line.split()[1]) for line in done.lines if len(line.split()) == 2}
    total = rows.pop("total")
    assert list(rows) == [
        *("weights", "adapter", "gradients", "optimizer", "activations", "logits", "framework", "fragmentation")
    ]
    assert total == pytest.approx(sum(rows.values()), abs=0.05)
    assert f"fits: {total:.1f} of 23.6 GiB" in done.lines[-1]


def test_what_does_not_fit_gets_the_smallest_change(lorry: Lorry) -> None:
    done = lorry(
        "entrypoints.lorry",
        "plan",
        "patent-qa",
        "--set",
        "model.path=Qwen2.5-14B",
        "--memory",
        "24",
        "--target",
        "a800",
    )
    assert done.code == 4
    assert "as asked it does not fit: " in done.output
    assert "the smallest change that fits: 2 GPUs and train.sharding=zero3" in done.output
    assert "or: train.load_in_4bit=true" in done.output


def test_what_train_changes_by_itself_is_shown_beside_what_was_asked(lorry: Lorry) -> None:
    asked = ("--set", "train.micro_batch=16", "--set", "train.gradient_checkpointing=false")
    done = lorry("entrypoints.lorry", "plan", "patent-qa", *asked, "--target", "a800")
    assert done.code == 0, done.output
    assert "as asked" in done.output
    assert "changed" in done.output
    assert "which train does by itself and which keeps the result" in done.lines[-1]


def test_a_v100_computes_in_float16_and_takes_no_other(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "plan", "patent-qa", "--target", "v100", "--gpus", "2")
    assert "on 2 x v100 of 32 GiB, in float16" in done.lines[0]
    refused = lorry("entrypoints.lorry", "plan", "patent-qa", "--target", "v100", "--set", "train.precision=bfloat16")
    assert refused.code == 4
    assert "needs compute capability 8.0" in refused.lines[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "rtx9090"), "no target 'rtx9090'"),
        (("--gpus", "3"), "name their --target"),
        (("--gpus", "0"), "is not in the range"),
        (("--memory", "0"), "is not in the range"),
        (("--target", "a800", "--set", "model.path=nowhere"), "no such model folder"),
        (("--target", "a800", "--set", "train.sharding=zero9"), "train.sharding"),
        (("--target", "a800", "--set", "train.load_in_4bit=true", "--set", "train.sharding=zero3"), "zero3 cannot"),
    ],
)
def test_wrong_use_is_one_line(lorry: Lorry, arguments: tuple[str, ...], says: str) -> None:
    done = lorry("entrypoints.lorry", "plan", "patent-qa", *arguments)
    assert done.code == 2, done.output
    assert says in done.lines[-1]


def test_a_damaged_model_is_told(lorry: Lorry, models: Path) -> None:
    folder = make_shape(models / "cut", "Qwen2.5-0.5B")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    done = lorry("entrypoints.lorry", "plan", "patent-qa", "--target", "a800", "--set", "model.path=cut")
    assert done.code == 2
    assert "damaged: copy it again" in done.lines[-1]
