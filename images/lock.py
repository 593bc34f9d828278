"""Locked requirements of the stage images: write them again, or check that they are what the inputs give.

    python images/lock.py           # after a change of an input (`make lock`)
    python images/lock.py --check   # compile again beside the locks and compare (CI)

Inputs, with a reason for each line: `<stage>/requirements.in`, `<stage>/{gpu,cpu}.in`, and the versions that the images
of one line agree on, `base/<line>.versions`. Needs `uv` (requirements/dev.txt has it) and the package index; the CPU
build of torch must be found too, through PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL as for `make setup`.

Outputs are exact versions with hashes, split so that images share layers:

    base/<line>.light.txt     what all four stages have in common
    base/<line>.torch.txt     what preprocess, train and infer have in common besides
    <stage>/<line>.txt        the rest of a stage
    train/<line>.source.txt   packages without a wheel for this platform, built in a builder stage
    train/kernels.txt         packages whose kernels can be compiled for one card, where the builder asks for them
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parent
LINES = {"cpu": "cpu", "cu128": "gpu", "cu130": "gpu"}
"""Lines of wheels, and which further input of a stage applies to them."""
STAGES = ("preprocess", "train", "infer", "eval")
HEAVY = ("preprocess", "train", "infer")
"""Stages that load torch."""
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_35"

WITHOUT_WHEEL = {"deepspeed", "gptqmodel", "defuser", "device-smi", "logbar", "pypcre", "tokenicer", "emoji", "wget"}

LEFT_OUT = {
    # cloud storage of one vendor, which ms-swift asks for and imports only when it is used; needs a C compiler
    "oss2": "cpu cu128 cu130 v100-gptq",
    "crcmod": "cpu cu128 cu130 v100-gptq",
    "aliyun-python-sdk-core": "cpu cu128 cu130 v100-gptq",
    "aliyun-python-sdk-kms": "cpu cu128 cu130 v100-gptq",
    "pycryptodome": "cpu cu128 cu130 v100-gptq",
    # of the first Qwen, imported nowhere; no wheel
    "transformers-stream-generator": "cpu cu128 cu130 v100-gptq",
    # of Data-Juicer: its web page, and what it would install missing packages with
    "streamlit": "cpu cu128 cu130",
    "altair": "cpu cu128 cu130",
    "pydeck": "cpu cu128 cu130",
    "watchdog": "cpu cu128 cu130",
    "itsdangerous": "cpu cu128 cu130",
    "gitpython": "cpu cu128 cu130",
    "gitdb": "cpu cu128 cu130",
    "smmap": "cpu cu128 cu130",
    "uv": "cpu cu128 cu130",
    # of qwen-vl-utils, for videos
    "av": "cpu v100-gptq",
    # have no CPU build, and vLLM's CPU build works without
    "torchvision": "cpu",
    "torchaudio": "cpu",
    "torchcodec": "cpu",
}
"""Never installed, though something asks for them: package, and the lines where it is left out."""

Lock = dict[str, str]
"""Package name to its entry: name==version and the hashes."""


def main() -> None:
    written = {path: text for line in [*LINES, "v100-gptq", "kernels"] for path, text in locks(line).items()}
    if "--check" not in sys.argv[1:]:
        for path, text in written.items():
            path.write_text(text, encoding="utf-8")
        return
    drifted = [path for path, text in written.items() if pins(path.read_text(encoding="utf-8")) != pins(text)]
    for path in drifted:
        print(f"{path.relative_to(IMAGES.parent)}: not what its inputs give; run `make lock`", file=sys.stderr)
    sys.exit(1 if drifted else 0)


def locks(line: str) -> dict[Path, str]:
    """The lock files of a line, by path."""
    if line not in LINES:
        return {IMAGES / "train" / f"{line}.txt": text(compile_lock(line, [f"train/{line}.in"]))}
    whole = {}
    for stage in STAGES:
        inputs = [f"{stage}/requirements.in", f"{stage}/{LINES[line]}.in"]
        whole[stage] = compile_lock(line, [name for name in inputs if (IMAGES / name).exists()])
    light = common([whole[stage] for stage in STAGES])
    torch = without(common([whole[stage] for stage in HEAVY]), light)
    found = {IMAGES / "base" / f"{line}.light.txt": text(light), IMAGES / "base" / f"{line}.torch.txt": text(torch)}
    for stage in STAGES:
        rest = without(whole[stage], light, torch if stage in HEAVY else {})
        source = {name: entry for name, entry in rest.items() if name in WITHOUT_WHEEL}
        found[IMAGES / stage / f"{line}.txt"] = text(without(rest, source))
        if source:
            found[IMAGES / stage / f"{line}.source.txt"] = text(source)
    return found


def compile_lock(line: str, inputs: list[str]) -> Lock:
    """What uv makes of the inputs. Versions of the present locks are kept where they still fit."""
    command = ["uv", "pip", "compile", "--python-version", PYTHON, "--python-platform", PLATFORM, "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--quiet", *inputs]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UV_")}
    command += ["--constraints", f"base/{line}.versions"] if line in LINES else []
    command += ["--no-deps"] if line == "kernels" else []
    if line == "cpu":  # only here: the other lines must not find a CPU build of torch
        environment |= {
            uv: environment[pip]
            for uv, pip in (("UV_FIND_LINKS", "PIP_FIND_LINKS"), ("UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL"))
            if pip in environment
        }
    stage = Path(inputs[0]).parent.name
    present = [IMAGES / "base" / f"{line}.light.txt", IMAGES / "base" / f"{line}.torch.txt"]
    present += [IMAGES / stage / f"{line}.txt", IMAGES / stage / f"{line}.source.txt"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "lock.txt"  # uv takes the versions in its output file as preferred
        output.write_text("".join(path.read_text(encoding="utf-8") for path in present if path.exists()))
        done = subprocess.run(
            [*command, "--output-file", str(output)],
            cwd=IMAGES,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{line} {stage}: uv finds no solution:\n{done.stderr}")
        lock = entries(output.read_text(encoding="utf-8"))
    return {name: entry for name, entry in lock.items() if line not in LEFT_OUT.get(name, "").split()}


def entries(lock: str) -> Lock:
    """A lock file's entries by package name."""
    found = re.findall(r"^(([A-Za-z0-9._-]+)==.*(?:\n    .*)*)", lock, flags=re.MULTILINE)
    return {name: entry for entry, name in found}


def pins(lock: str) -> set[str]:
    """The name==version of each entry. Hashes may grow when a release gets further files."""
    return {entry.split()[0] for entry in entries(lock).values()}


def common(several: list[Lock]) -> Lock:
    """The entries that all have."""
    return {name: entry for name, entry in several[0].items() if all(other.get(name) == entry for other in several)}


def without(lock: Lock, *others: Lock) -> Lock:
    return {name: entry for name, entry in lock.items() if not any(name in other for other in others)}


def text(lock: Lock) -> str:
    return "".join(f"{lock[name]}\n" for name in sorted(lock))


if __name__ == "__main__":
    main()
