"""`lorry-<stage> selftest`, with the real libraries and with stand-ins that have, or lack, code for a card."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Finished, Lorry
from tests.hardware.libraries import cuda_library, fatbin


def selftest(lorry: Lorry, stage: str, **variables: str) -> Finished:
    return replace(lorry, extra={"LORRY_TARGET": "", **variables})(f"entrypoints.{stage}", "selftest")


def test_what_a_stage_has_is_shown(lorry: Lorry) -> None:
    done = selftest(lorry, "eval", LORRY_IMAGE="lorry-eval:1-cpu", LORRY_TARGET="cpu", LORRY_REVISION="abc")
    assert done.code == 0, done.output
    for words in (
        "revision abc",
        "image lorry-eval:1-cpu, target cpu",
        "python 3.",
        "numpy ",
        "matplotlib ",
        "jinja2 ",
    ):
        assert words in done.output
    assert f"{lorry.runs} writable for uid {os.getuid()}" in done.output
    assert "/caches does not exist" in done.output


def test_the_embedders_stage_asks_for_a_gpu(lorry: Lorry) -> None:
    done = selftest(lorry, "preprocess", CUDA_VISIBLE_DEVICES="")
    assert done.code == 0, done.output
    assert "sentence_transformers " in done.output
    assert "no GPU visible" in done.output


def test_it_needs_no_recipe_and_minds_none_from_the_environment(lorry: Lorry) -> None:
    assert selftest(lorry, "eval", LORRY_RECIPE="patent-qa", LORRY_RUN="r").code == 0
    assert list(lorry.runs.iterdir()) == []


def test_a_target_that_is_unknown(lorry: Lorry) -> None:
    done = selftest(lorry, "eval", LORRY_TARGET="a100")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "target 'a100': no such target; known targets: cpu, v100" in done.output


# -- stand-ins for libraries that this machine has not -------------------------------------------------------------

TORCH = """
class version:
    cuda = {cuda!r}
class _C:
    def _cuda_getArchFlags():
        return {flags!r}
class cuda:
    def is_available():
        return False
__version__ = "2.10.0"
"""

CU128 = "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of importable stand-ins for what a CUDA image of infer and train has."""
    folder = tmp_path / "site"
    for name in ("transformers", "peft", "swift", "vllm", "bitsandbytes", "gptqmodel"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("__version__ = '1'\n")
    give_torch(folder, CU128)
    for name in ("vllm/_C.abi3.so", "vllm/_moe_C.abi3.so", "bitsandbytes/libbitsandbytes_cuda128.so"):
        cuda_library(folder / name, fatbin(("sm", 70), ("sm", 80), ("sm", 90)))
    return folder


def give_torch(site: Path, flags: str, cuda: str | None = "12.8") -> None:
    (site / "torch.py").write_text(TORCH.format(flags=flags, cuda=cuda))


def in_image(lorry: Lorry, site: Path, stage: str, target: str) -> Finished:
    return selftest(lorry, stage, LORRY_TARGET=target, PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE="1")


@pytest.mark.parametrize("target", ["v100", "a800", "rtx4090", "h100"])
@pytest.mark.parametrize("stage", ["train", "infer"])
def test_an_image_with_code_for_its_card(lorry: Lorry, site: Path, stage: str, target: str) -> None:
    done = in_image(lorry, site, stage, target)
    assert done.code == 0, done.output
    assert f"code in torch: compute_120 {CU128.removesuffix(' compute_120')}" in done.output
    library = "vllm/_C.abi3.so" if stage == "infer" else "bitsandbytes/libbitsandbytes_cuda128.so"
    assert f"code in {library}: sm_70 sm_80 sm_90" in done.output


def lacks(done: Finished, library: str, code: str) -> None:
    assert done.code == 4, done.output
    errors = [line for line in done.lines if line.startswith("error: ")]
    assert errors == [f"error: {library}: no code for target v100, {code}; install another build"]
    assert "Traceback" not in done.output


def test_a_torch_that_dropped_the_card(lorry: Lorry, site: Path) -> None:
    give_torch(site, "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120")
    lacks(in_image(lorry, site, "train", "v100"), "torch", "sm_70")
    assert in_image(lorry, site, "train", "a800").code == 0


def test_a_torch_for_the_cpu_in_an_image_for_cards(lorry: Lorry, site: Path) -> None:
    give_torch(site, "", cuda=None)
    lacks(in_image(lorry, site, "train", "v100"), "torch", "sm_70")


@pytest.mark.parametrize(
    ("stage", "library"),
    [("infer", "vllm/_moe_C.abi3.so"), ("train", "bitsandbytes/libbitsandbytes_cuda128.so")],
)
def test_a_library_that_dropped_the_card(lorry: Lorry, site: Path, stage: str, library: str) -> None:
    cuda_library(site / library, fatbin(("sm", 52), ("compute", 52), ("sm", 80)))
    lacks(in_image(lorry, site, stage, "v100"), library, "sm_70")
    assert in_image(lorry, site, stage, "a800").code == 0


def test_a_library_without_a_build_for_this_cuda(lorry: Lorry, site: Path) -> None:
    (site / "bitsandbytes" / "libbitsandbytes_cuda128.so").rename(site / "bitsandbytes" / "libbitsandbytes_cuda130.so")
    lacks(in_image(lorry, site, "train", "v100"), "bitsandbytes/libbitsandbytes_cuda128.so", "sm_70")


def test_a_library_that_cannot_be_imported_is_named(lorry: Lorry, site: Path) -> None:
    (site / "vllm" / "__init__.py").write_text("raise OSError('libnuma.so.1: cannot open shared object file')\n")
    done = in_image(lorry, site, "infer", "a800")
    assert done.code == 2
    why = "OSError: libnuma.so.1: cannot open shared object file"
    assert done.lines[-1] == f"error: vllm: cannot be imported ({why}); install it again, or build the image again"
