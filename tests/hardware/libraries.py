"""Makes CUDA libraries of a few hundred bytes, with the headers of real ones and zeros as code."""

import struct
from pathlib import Path


def fatbin(*codes: tuple[str, int | str], size: int = 200) -> bytes:
    """The bytes of a fatbin with an entry for each `("sm" or "compute", number)`, where the number may be `"90a"`."""
    entries = b""
    for kind, name in codes:
        number, specific = int(str(name).rstrip("a")), str(name).endswith("a")
        header = 96 if number >= 100 else 64  # as CUDA 12.8 writes them
        fields = struct.pack("<HHIQ", 1 if kind == "compute" else 2, 0x101, header, size)
        fields += struct.pack("<12xI8xQ", number, 0x11 | (0x100000 if specific else 0))
        entries += fields.ljust(header, b"\0") + bytes(size)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def cuda_library(path: Path, code: bytes, section: str = ".nv_fatbin") -> Path:
    """The bytes of a 64-bit ELF file with one section of this content, and the table of names."""
    names = b"\0.shstrtab\0" + section.encode() + b"\0"
    content, table = 64 + len(names), 64 + len(names) + len(code)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 1)

    def row(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)

    rows = row(0, 0, 0, 0) + row(1, 3, 64, len(names)) + row(11, 1, content, len(code))
    path.write_bytes(header + names + code + rows)
    return path
