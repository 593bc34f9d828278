"""Reads which GPUs a CUDA library has code for. Images do not have NVIDIA's cuobjdump, which also does that.

A CUDA library has its device code in the ELF section `.nv_fatbin`: a sequence of fatbins, each a header and entries,
each entry a header and code for one architecture. Code may be compressed, headers are not. NVIDIA does not publish the
layout. This module reads what CUDA 11 to 13 write, and finds the same as `cuobjdump --list-elf --list-ptx`. Both leave
out relocatable code (`__nv_relfatbin`), which is linked into `.nv_fatbin`.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from stages.contract.errors import UsageError

FATBIN = struct.Struct("<IHHQ")
"""Header of a fatbin: magic, version, bytes of this header, bytes of the entries."""
MAGIC = 0xBA55ED50
ENTRY = struct.Struct("<HHIQ 12x I 8x Q")
"""Header of an entry: kind (1 PTX, 2 binary), version, bytes of this header, bytes of the code, architecture, flags."""
ARCHITECTURE_SPECIFIC = 0x100000
"""Flag of code that runs on one architecture only, such as sm_90a."""


def architectures(library: Path) -> set[str]:
    """The architectures that a shared library has code for, as nvcc names them.

    Binaries are `sm_80` or `sm_90a`, PTX is `compute_80`. Raises UsageError if the file is not a 64-bit ELF library.
    """
    found = set()
    with library.open("rb") as file:
        for offset, size in _sections(file, library, b".nv_fatbin"):
            for kind, architecture, flags in _entries(file, offset, offset + size):
                suffix = "a" if flags & ARCHITECTURE_SPECIFIC else ""
                found.add(f"{'compute' if kind == 1 else 'sm'}_{architecture}{suffix}")
    return found


def _sections(file: IO[bytes], path: Path, wanted: bytes) -> Iterator[tuple[int, int]]:
    """Yield offset and size, in bytes, of the sections named `wanted` in a 64-bit ELF file (System V ABI, chapter 4).

    Raises UsageError for any other file.
    """
    header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:
        raise UsageError(f"{path}: not a 64-bit ELF library; install the library again")
    (table,) = struct.unpack_from("<Q", header, 40)
    each, count, names = struct.unpack_from("<HHH", header, 58)
    file.seek(table)
    rows = [struct.unpack("<IIQQQQ", file.read(each)[:40]) for _ in range(count)]
    file.seek(rows[names][4])
    text = file.read(rows[names][5])
    for name, *_, offset, size in rows:
        if text[name : text.index(b"\0", name)] == wanted:
            yield offset, size


def _entries(file: IO[bytes], position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield kind, architecture and flags of each entry of the fatbins between two offsets of a file."""
    while position + FATBIN.size <= end:
        file.seek(position)
        magic, _, header, size = FATBIN.unpack(file.read(FATBIN.size))
        if magic != MAGIC:  # padding
            position += 8
            continue
        position += header
        stop = position + size
        while position + ENTRY.size <= stop:
            file.seek(position)
            kind, _, entry_header, code, architecture, flags = ENTRY.unpack(file.read(ENTRY.size))
            yield kind, architecture, flags
            position += entry_header + code
        position = stop


def has_code_for(compiled: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a library with code for these architectures runs on a GPU of this compute capability.

    A binary for X.y runs on X.z with z >= y, and on no other major version; one with a suffix, as in sm_90a, runs on
    X.y only. The driver compiles PTX for any GPU that is not older. Here PTX counts only for GPUs that are newer than
    all binaries: a library that dropped a GPU may still have one kernel as old PTX (vLLM has one for 5.2). PTX with a
    suffix never counts. Raises UsageError for a name that is not an architecture. Source: NVIDIA, CUDA C++ Programming
    Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    parsed = [_parse_architecture(name) for name in compiled]
    binaries = [(number, suffix) for kind, number, suffix in parsed if kind == "sm"]
    for number, suffix in binaries:
        if number == capability or (not suffix and number[0] == capability[0] and number <= capability):
            return True
    newer = all(number < capability for number, _ in binaries)
    return newer and any(kind == "compute" and not suffix and number <= capability for kind, number, suffix in parsed)


def _parse_architecture(name: str) -> tuple[str, tuple[int, int], str]:
    """Kind, compute capability and suffix of an architecture: `sm_90a` is ("sm", (9, 0), "a").

    Raises UsageError if the name has another form.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)(\D?)", name)
    if found is None:
        raise UsageError(f"{name}: not a CUDA architecture; name it as in sm_80")
    kind, major, minor, suffix = found.groups()
    return kind, (int(major), int(minor)), suffix
