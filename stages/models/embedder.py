"""Says what an embedder is before it is loaded: whether it reads pictures, and whether it needs a GPU."""

from pathlib import Path

from stages.contract.files import read_json

GIB = 2**30

SMALL = 5 * GIB // 2
"""Bytes of weights up to which a CPU will do for an embedder of texts: half a billion parameters in float32."""


def reads_pictures(folder: Path) -> bool:
    """Whether an embedder is a GME-Qwen2-VL, which embeds a page's picture; else it embeds the page's text."""
    return (read_json(folder / "config.json") or {}).get("model_type") == "qwen2_vl"


def needs_gpu(folder: Path) -> bool:
    """Whether an embedder needs a GPU: it reads pictures or is not small. True also if its weights are not here."""
    return reads_pictures(folder) or not 0 < weights_bytes(folder) <= SMALL


def weights_bytes(folder: Path) -> int:
    """Bytes of the weight files in a model folder; 0 if there are none. Of two formats, only safetensors count."""
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(path.stat().st_size for path in files)
