"""The architectures in a CUDA library, read from a small one made here; real ones were compared with cuobjdump."""

from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.hardware.fatbin import architectures, has_code_for
from tests.hardware.libraries import cuda_library, fatbin


def test_binaries_and_ptx_are_distinguished(tmp_path: Path) -> None:
    library = cuda_library(tmp_path / "lib.so", fatbin(("sm", 70), ("sm", 80), ("compute", 80)))
    assert architectures(library) == {"sm_70", "sm_80", "compute_80"}


def test_every_fatbin_of_a_library_is_read_and_padding_between_them_skipped(tmp_path: Path) -> None:
    code = fatbin(("sm", 75)) + bytes(24) + fatbin(("sm", 90)) + fatbin(("sm", 120))
    assert architectures(cuda_library(tmp_path / "lib.so", code)) == {"sm_75", "sm_90", "sm_120"}


def test_code_for_one_card_alone_carries_its_letter(tmp_path: Path) -> None:
    assert architectures(cuda_library(tmp_path / "lib.so", fatbin(("sm", "90a"), ("sm", 90)))) == {"sm_90a", "sm_90"}


def test_a_library_without_device_code_has_none(tmp_path: Path) -> None:
    assert architectures(cuda_library(tmp_path / "lib.so", fatbin(("sm", 80)), section=".text")) == set()


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x01\x01" + bytes(100)])
def test_a_file_that_is_no_library_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"lib\.so: not a 64-bit ELF library"):
        architectures(path)


VLLM_0_19_1 = {"sm_52", "sm_70", "sm_75", "sm_80", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120"}
"""In vllm/_C.abi3.so of the wheel 0.19.1, which also has PTX for 5.2, 8.0, 8.9 and 9.0, as cuobjdump lists it."""

PTX = {"compute_52", "compute_80", "compute_89", "compute_90"}


@pytest.mark.parametrize(
    ("compiled", "capability", "runs"),
    [
        ({"sm_80"}, (8, 0), True),
        ({"sm_80"}, (8, 9), True),  # binaries run on a higher minor version
        ({"sm_89"}, (8, 0), False),  # and on no lower one
        ({"sm_80"}, (9, 0), False),  # and on no other major version
        ({"sm_90a"}, (9, 0), True),
        ({"sm_100a"}, (10, 3), False),  # `a` is for that card alone
        ({"sm_80", "compute_80"}, (9, 0), True),  # the driver compiles PTX for newer cards
        ({"sm_80", "compute_90"}, (8, 9), True),
        ({"compute_90"}, (8, 0), False),  # but not for older ones
        ({"compute_90a"}, (12, 0), False),
        (VLLM_0_19_1 | PTX, (7, 0), True),
        (VLLM_0_19_1 | PTX, (8, 9), True),
        ((VLLM_0_19_1 - {"sm_70"}) | PTX, (7, 0), False),  # though one kernel has PTX for 5.2
        (set(), (8, 0), False),
    ],
)
def test_what_runs_where(compiled: set[str], capability: tuple[int, int], runs: bool) -> None:
    assert has_code_for(compiled, capability) is runs


def test_a_name_that_is_no_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match="gfx90a: not a CUDA architecture"):
        has_code_for({"gfx90a"}, (9, 0))
