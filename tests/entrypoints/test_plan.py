"""`lorry plan`: a table and a verdict for cards that are not here, from headers alone."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Finished, Lorry
from tests.hardware.recorded import Box
from tests.hardware.shapes import CONFIGS, make_llava_shape, make_shape, write_safetensors

RECIPE = ("patent-qa", "--profile", "text")
"""Qwen2.5-7B on text."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_shape(folder / "Qwen2.5-7B-Instruct", "Qwen2.5-7B")
    make_shape(folder / "Qwen2.5-14B", "Qwen2.5-14B")
    make_llava_shape(folder / "llava-1.5-7b-hf")
    return folder


@pytest.fixture
def lorry(tmp_path: Path, models: Path) -> Lorry:
    return Lorry(tmp_path, models, tmp_path / "runs", {"CUDA_VISIBLE_DEVICES": ""})


def test_the_table_adds_up_and_the_verdict_is_in_the_exit_code(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "rtx4090")
    assert done.code == 0, done.output
    assert "Qwen2.5-7B-Instruct, 7.62 billion parameters, on rtx4090 of 24 GiB, in bfloat16" in done.lines[0]
    assert done.lines[2].startswith("effective batch: 16 samples a step in passes of at most 4,096 tokens, with 14 ")
    # two columns: the fastest way, and the one chosen for so small a card
    table = {line.split()[0]: line.split()[1:] for line in done.lines if re.fullmatch(r"\w+( +[0-9.]+){2}", line)}
    assert "fastest      chosen" in done.output
    rows = {name: float(values[-1]) for name, values in table.items()}
    total = rows.pop("total")
    assert list(rows) == [
        *("weights", "adapter", "gradients", "optimizer", "activations", "logits", "framework", "fragmentation")
    ]
    assert total == pytest.approx(sum(rows.values()), abs=0.05)
    assert done.lines[-1].startswith("fits with passes of at most 4,096 tokens for 16,384 and 14 checkpointed layers, ")
    assert f"affect the result: {total:.1f} of 23.6 GiB on each GPU" in done.lines[-1]


def test_either_phase_is_reported_where_a_connector_is_trained_first(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "plan", "better-synth", "--target", "rtx4090")
    assert done.code == 0, done.output
    assert "llava-1.5-7b-hf, 7.06 billion parameters, on rtx4090" in done.lines[0]
    first, second = done.output.split("phase 2, LoRA on the base with that connector: trains 40.0 million parameters")
    assert "phase 1, the connector alone: trains 21.0 million parameters" in first
    assert "effective batch: 256 samples a step in passes" in first and "fits" in first.strip().splitlines()[-1]
    assert "effective batch: 128 samples a step in passes" in second and "fits" in second.strip().splitlines()[-1]


def test_any_number_of_gpus_has_the_recipes_effective_batch(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "plan", "better-synth", "--target", "rtx4090", "--gpus", "3")
    assert done.code == 0, done.output
    steps = [line for line in done.lines if line.startswith("effective batch: ")]
    assert [line.split()[2] for line in steps] == ["256", "128"] and all("by 3 processes" in line for line in steps)


def test_keys_that_were_replaced_are_ignored_with_a_line_each(lorry: Lorry) -> None:
    gone = ("train.micro_batch=4", "train.exact_batch=true", "train.connector={micro_batch: 2}")
    done = lorry("entrypoints.lorry", "plan", "better-synth", "--target", "a800", *(f"--set={one}" for one in gone))
    assert done.code == 0, done.output
    assert [line.partition(": ")[0] for line in done.lines if "' is ignored: " in line] == [
        "--set train.micro_batch=4",
        "--set train.connector={micro_batch",
        "--set train.exact_batch=true",
    ]


def test_what_does_not_fit_gets_the_smallest_change(lorry: Lorry) -> None:
    done = lorry(
        "entrypoints.lorry",
        "plan",
        *RECIPE,
        "--set",
        "model.path=Qwen2.5-14B",
        "--memory",
        "24",
        "--target",
        "a800",
    )
    assert done.code == 4
    assert "does not fit: at least " in done.output
    assert "the smallest change that fits: 2 GPUs and train.sharding=zero3" in done.output
    assert "or: train.load_in_4bit=true" in done.output


def test_what_train_chooses_by_itself_is_shown_beside_the_fastest(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", "--memory", "45")
    assert done.code == 0, done.output
    assert "fastest" in done.output
    assert "chosen" in done.output
    assert "the fastest way does not fit: 6" in done.lines[-2]
    assert "which train chooses on its own and which does not affect the result" in done.lines[-1]
    large = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800")
    assert "chosen" not in large.output and large.lines[-1].startswith("fits: 6")


def test_how_inference_fits_the_same_cards_is_beside_it(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", "--gpus", "8")
    assert done.code == 0, done.output
    (told,) = [line for line in done.lines if line.startswith("inference")]
    assert told.startswith("inference fits: tensor parallel 4 (as many of 8 GPU(s) as heads allow; room for ")
    assert told.endswith(
        " tokens of all sequences), 3.5 GiB of weights on each GPU, in bfloat16, infer.max_length 8192"
    )
    cpu = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "cpu")
    assert "inference: by vllm on a CPU; its memory is not estimated" in cpu.lines
    other = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", "--set", "infer.engine=transformers")
    assert "inference: by transformers; its memory is not estimated" in other.lines


def test_inference_that_does_not_fit_leaves_the_exit_code_to_training(lorry: Lorry) -> None:
    """It may have other cards."""
    done = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", "--memory", "19")
    assert done.code == 0, done.output
    told = (
        "inference does not fit: infer.max_length 8192: inference takes 19.6 GiB on each of 1 GPU(s) for one such"
        " sequence, but 18.7 GiB"
    )
    assert any(line.startswith(told) for line in done.lines), done.output
    asked = ("--gpus", "3", "--set", "infer.tensor_parallel=3")
    odd = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", *asked)
    assert odd.code == 0, odd.output
    assert "inference cannot be split like this: infer.tensor_parallel 3: 28 heads and 4 KV heads" in odd.output


def test_an_adapted_tower_is_counted_and_what_is_not_estimated_is_reported(lorry: Lorry, models: Path) -> None:
    shape = {"model.embed_tokens.weight": [152064, 3584]}
    shape |= {f"visual.blocks.{block}.attn.qkv.weight": [3840, 1280] for block in range(32)}
    shape |= {"visual.merger.mlp.0.weight": [5120, 5120], "model.layers.0.self_attn.q_proj.weight": [3584, 3584]}
    folder = make_shape(models / "seeing", "Qwen2.5-7B")
    write_safetensors(folder / "model.safetensors", shape)
    frozen, adapted = (
        lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", *sets, "--set", "train.rank=1024")
        for sets in (
            ("--set", "model.path=seeing"),
            ("--set", "model.path=seeing", "--set", "train.freeze_vision=false"),
        )
    )
    found = [next(float(line.split()[1]) for line in done.lines if line[:7] == "adapter") for done in (frozen, adapted)]
    of_tower = 32 * 1024 * (3840 + 1280) * 4 / 2**30  # the merger is left as it is
    assert found[1] - found[0] == pytest.approx(of_tower, abs=0.011)
    note = "not in the estimate: activations of the adapted vision tower (train.freeze_vision is false)"
    assert note in adapted.output and "not in the estimate" not in frozen.output


def test_a_config_is_enough_before_a_download(lorry: Lorry, models: Path) -> None:
    whole = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "rtx4090")
    folder = models / "later" / "Qwen2.5-7B-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS["Qwen2.5-7B"]))
    done = replace(lorry, models=models / "later")("entrypoints.lorry", "plan", *RECIPE, "--target", "rtx4090")
    assert done.code == 0, done.output
    assert done.lines[1] == "its weights are missing: the plan takes the model's tensors from its config.json"
    with_path = "preprocess: its memory is not estimated ("  # the embedder is not here
    of_done, of_whole = (
        [line for line in lines if not line.startswith(with_path)] for lines in (done.lines, whole.lines)
    )
    assert [of_done[0], *of_done[2:]] == of_whole and len(of_whole) == len(whole.lines) - 1


def test_what_inference_cannot_serve_is_said_before_anything_runs(lorry: Lorry, models: Path) -> None:
    """A rank that vLLM refuses, and a vision-language model on a CPU: after the table, and before the first stage."""
    ranked = ("--set", "train.rank=513", "--set", "train.target_modules=[q_proj]")  # of few, for the disk
    done = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", *ranked)
    says = "error: train.rank 513: vllm serves adapters up to rank 512; lower it, set infer.merged to true, or"
    assert done.code == 2 and done.lines[-1].startswith(says), done.output
    merged = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", *ranked, "--set", "infer.merged=true")
    assert merged.code == 0, merged.output
    run = lorry("entrypoints.lorry", "run", *RECIPE, *ranked)
    assert run.code == 2 and run.lines[-1:] == done.lines[-1:], run.output
    assert all(line.startswith("error: ") for line in run.lines), "nothing has run"
    seeing = ("--set", "model.path=llava-1.5-7b-hf")
    for done in (
        lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "cpu", *seeing),
        lorry("entrypoints.lorry", "run", *RECIPE, *seeing),
    ):
        assert done.code == 2, done.output
        assert done.lines[-1] == (
            f"error: {models / 'llava-1.5-7b-hf'}: is a vision-language model, which vllm cannot serve on a CPU; set"
            " infer.engine to transformers"
        )


def test_a_v100_computes_in_float16_and_takes_no_other(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "v100", "--gpus", "2")
    assert "on 2 x v100 of 32 GiB, in float16" in done.lines[0]
    refused = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "v100", "--set", "train.precision=bfloat16")
    assert refused.code == 4
    assert (
        "train.precision bfloat16: needs compute capability 8.0 or higher, but v100 has 7.0 and only emulates it"
        in refused.lines[-1]
    )


def test_zero_and_fewer_cards_are_proposed_before_more_and_what_is_tight_is_reported(lorry: Lorry) -> None:
    asked = ("--target", "a800", "--gpus", "2", "--memory", "17.1", "--set", "train.sharding=none")
    done = lorry("entrypoints.lorry", "plan", *RECIPE, *asked)
    assert done.code == 4, done.output
    assert "does not fit: at least 17.7 of 16.8 GiB on each GPU" in done.lines
    assert any(
        re.fullmatch(r"the smallest change that fits: train.sharding=zero3 \(1[1-6]\.\d of 16.8 GiB: tight\)", line)
        for line in done.lines
    )
    assert "or: 1 GPU (16.7 of 16.8 GiB: tight)" in done.lines
    one = lorry("entrypoints.lorry", "plan", *RECIPE, *asked[:2], "--gpus", "1", *asked[4:])
    assert one.code == 0
    assert "affect the result: 16.7 of 16.8 GiB on each GPU: tight; estimates may be up to 3 % too low" in one.lines[-1]


def test_what_the_targets_software_has_not_is_refused_and_not_proposed(lorry: Lorry) -> None:
    for target in ("v100-gptq", "cpu"):
        done = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", target, "--set", "train.load_in_4bit=true")
        told = f"bitsandbytes has no kernels for target {target}; set it to false"
        assert (done.code, told in done.lines[-1]) == (4, True), done.output
    gptq = ("--target", "v100-gptq", "--gpus", "2")
    small = lorry("entrypoints.lorry", "plan", *RECIPE, *gptq, "--memory", "14")
    assert small.code == 4
    assert "4bit" not in small.output and "zero" not in small.output, small.output
    named = lorry("entrypoints.lorry", "plan", *RECIPE, *gptq, "--set", "train.sharding=zero3")
    assert (named.code, "target v100-gptq has no DeepSpeed" in named.lines[-1]) == (2, True), named.output


# -- the cards that are here -----------------------------------------------------------------------------------------


@pytest.fixture
def here(box: Box, tmp_path: Path, models: Path) -> Lorry:
    """`lorry plan` on the recorded box."""
    paths = [box.variables["PYTHONPATH"], *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
    return Lorry(tmp_path, models, tmp_path / "runs", {**box.variables, "PYTHONPATH": os.pathsep.join(paths)})


def test_the_freest_card_here_is_planned_for(here: Lorry) -> None:
    done = here("entrypoints.lorry", "plan", *RECIPE)
    assert done.code == 0, done.output
    assert "on the freest GPU of this machine, GPU 1 (a800), in bfloat16" in done.lines[0]
    assert "of 72.5 GiB on each GPU" in done.lines[-1]


def test_cards_that_no_launch_would_take_are_not_planned_for(here: Lorry, box: Box) -> None:
    def plan(deny: str, *arguments: str) -> Finished:
        return replace(here, extra={**here.extra, "LORRY_GPU_DENY": deny})(
            "entrypoints.lorry", "plan", *RECIPE, *arguments
        )

    assert "GPU 3 (a800)" in plan("1").lines[0]
    box.slice(3)
    assert "GPU 1,2 (a800)" in plan("5,6,7", "--gpus", "2").lines[0]
    unknown = plan("1,9")
    assert (unknown.code, "LORRY_GPU_DENY=1,9: no GPU 9; this machine has: " in unknown.lines[-1]) == (2, True)
    none = plan("0,1,2,4,5,6,7")
    assert (none.code, len(none.lines)) == (4, 1)
    assert "this machine's GPUs: Lorry may use none (GPU 0: in LORRY_GPU_DENY; " in none.output
    assert "GPU 3: in MIG mode; " in none.output and "name a --target" in none.output
    few = plan("0,1,2,5,6,7", "--gpus", "2")
    assert few.code == 2, few.output
    assert "--gpus 2: this machine has 1 that Lorry may use; ask for fewer, or name a --target" in few.lines[-1]


def test_where_cards_are_merely_busy_it_says_that_freeing_one_would_do(here: Lorry, box: Box) -> None:
    box.free(*[2.0] * 8)
    done = here("entrypoints.lorry", "plan", *RECIPE)
    assert done.code == 4
    told = "fits on a free GPU: 16.7 of 80.0 GiB; GPU 0 (NVIDIA A800-SXM4-80GB): 2.0 GiB free of 80.0, "
    assert f"{told}held by pid 41120, not visible from here, 67.4" in done.lines
    assert "no change that Lorry knows" not in done.output
    model = (
        "--set",
        "model.path=Qwen2.5-14B",
        "--set",
        "train.max_length=32768",
        "--set",
        "infer.max_new_tokens=32000",
    )
    large = here("entrypoints.lorry", "plan", *RECIPE, *model, "--set", "infer.max_length=65536")
    assert (large.code, "fits on a GPU" in large.output) == (4, False), large.output


def test_a_box_of_mixed_cards_has_to_name_a_target(here: Lorry, box: Box) -> None:
    box.cards[0]["cuda_compute_capability"] = [7, 0]
    box.save()
    done = here("entrypoints.lorry", "plan", *RECIPE)
    assert done.code == 2
    assert "choose GPUs of one kind (GPUS=...), or name a --target" in done.lines[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "rtx9090"), "target 'rtx9090': no such target; known targets: cpu, v100"),
        (("--gpus", "3"), "--gpus 3: target cpu has no GPUs; leave it out, or name the GPUs' --target"),
        (("--gpus", "0"), "is not in the range"),
        (("--memory", "0"), "is not in the range"),
        (("--target", "a800", "--set", "model.path=nowhere"), "no such model folder"),
        (("--target", "a800", "--set", "train.sharding=zero9"), "train.sharding"),
        (
            ("--target", "a800", "--set", "train.load_in_4bit=true", "--set", "train.sharding=zero3"),
            "train.sharding zero3: cannot",
        ),
    ],
)
def test_wrong_use_is_one_line(lorry: Lorry, arguments: tuple[str, ...], says: str) -> None:
    done = lorry("entrypoints.lorry", "plan", *RECIPE, *arguments)
    assert done.code == 2, done.output
    assert says in done.lines[-1]


def test_a_damaged_model_is_reported(lorry: Lorry, models: Path) -> None:
    folder = make_shape(models / "cut", "Qwen2.5-0.5B")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    done = lorry("entrypoints.lorry", "plan", *RECIPE, "--target", "a800", "--set", "model.path=cut")
    assert done.code == 2
    assert "model.safetensors: damaged (" in done.lines[-1] and done.lines[-1].endswith("; copy it again")
