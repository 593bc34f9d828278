"""Write the locked requirements of the stage images, or check that they match their inputs.

    python images/lock.py           # after a change of an input (`make lock`)
    python images/lock.py --check   # compile again and compare, without writing (CI)

Inputs, with a reason for each line: `<stage>/requirements.in`, `<stage>/{gpu,cpu}.in`, `<stage>/<line>.in` for one line
alone, and `base/<line>.versions`, which all images of a line share. Needs `uv` (requirements/dev.txt has it) and a
package index. PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL must lead to the CPU build of torch, as for `make setup`.

Outputs are exact versions with hashes, split so that images share layers:

    base/<line>.light.txt     packages that all four stages have
    base/<line>.torch.txt     further packages that preprocess, train and infer have
    <stage>/<line>.txt        the other packages of a stage
    <stage>/<line>.source.txt packages without a wheel for this platform, built in a builder stage
    train/kernels.txt         packages whose kernels the builder can compile for one card
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parent
LINES = {"cpu": "cpu", "cu128": "gpu", "cu130": "gpu"}
"""Lines of wheels, and for each the further input of a stage, gpu.in or cpu.in."""
STAGES = ("preprocess", "train", "infer", "eval")
HEAVY = ("preprocess", "train", "infer")
"""Stages that load torch."""
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_35"

WITHOUT_WHEEL = {"deepspeed", "gptqmodel", "defuser", "device-smi", "logbar", "pypcre", "tokenicer", "emoji", "wget"}
"""Packages that have only sources for this platform."""

LEFT_OUT = {
    # one vendor's cloud storage: ms-swift requires it, and imports it only on use; needs a C compiler
    "oss2": "cpu cu128 cu130 v100-gptq",
    "crcmod": "cpu cu128 cu130 v100-gptq",
    "aliyun-python-sdk-core": "cpu cu128 cu130 v100-gptq",
    "aliyun-python-sdk-kms": "cpu cu128 cu130 v100-gptq",
    "pycryptodome": "cpu cu128 cu130 v100-gptq",
    # for the first Qwen, never imported; has no wheel
    "transformers-stream-generator": "cpu cu128 cu130 v100-gptq",
    # for Data-Juicer's web page, and to install missing packages
    "streamlit": "cpu cu128 cu130",
    "altair": "cpu cu128 cu130",
    "pydeck": "cpu cu128 cu130",
    "watchdog": "cpu cu128 cu130",
    "itsdangerous": "cpu cu128 cu130",
    "gitpython": "cpu cu128 cu130",
    "gitdb": "cpu cu128 cu130",
    "smmap": "cpu cu128 cu130",
    "uv": "cpu cu128 cu130",
    # for videos in qwen-vl-utils
    "av": "cpu v100-gptq",
    # no CPU build; vLLM's CPU build works without them
    "torchvision": "cpu",
    "torchaudio": "cpu",
    "torchcodec": "cpu",
}
"""Requirements that are not installed: the package, and the lines that leave it out."""

Lock = dict[str, str]
"""The entry of each package, by its name: name==version and the hashes."""


def main() -> None:
    """Write the locks; with --check compare them instead, and exit with 1 if one does not match its inputs."""
    written = {path: text for line in [*LINES, "v100-gptq", "kernels"] for path, text in lock_files(line).items()}
    if "--check" not in sys.argv[1:]:
        for path, text in written.items():
            path.write_text(text, encoding="utf-8")
        return
    drifted = [path for path, text in written.items() if pins(path.read_text(encoding="utf-8")) != pins(text)]
    for path in drifted:
        print(f"{path.relative_to(IMAGES.parent)}: does not match its inputs; run `make lock`", file=sys.stderr)
    sys.exit(1 if drifted else 0)


def lock_files(line: str) -> dict[Path, str]:
    """The text of each lock file of a line, by its path."""
    if line not in LINES:
        return {IMAGES / "train" / f"{line}.txt": lock_text(compile_lock(line, [f"train/{line}.in"]))}
    whole = {}
    for stage in STAGES:
        inputs = [f"{stage}/requirements.in", *(f"{stage}/{name}.in" for name in dict.fromkeys((LINES[line], line)))]
        whole[stage] = compile_lock(line, [name for name in inputs if (IMAGES / name).exists()])
    light = common_entries([whole[stage] for stage in STAGES])
    torch = remaining_entries(common_entries([whole[stage] for stage in HEAVY]), light)
    found = {
        IMAGES / "base" / f"{line}.light.txt": lock_text(light),
        IMAGES / "base" / f"{line}.torch.txt": lock_text(torch),
    }
    for stage in STAGES:
        rest = remaining_entries(whole[stage], light, torch if stage in HEAVY else {})
        source = {name: entry for name, entry in rest.items() if name in WITHOUT_WHEEL}
        found[IMAGES / stage / f"{line}.txt"] = lock_text(remaining_entries(rest, source))
        if source:
            found[IMAGES / stage / f"{line}.source.txt"] = lock_text(source)
    return found


def compile_lock(line: str, inputs: list[str]) -> Lock:
    """Compile the lock of a line from input files below images/. Versions of the present locks stay if they still fit.

    Exits with uv's message if there is no solution.
    """
    command = ["uv", "pip", "compile", "--python-version", PYTHON, "--python-platform", PLATFORM, "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--quiet", *inputs]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UV_")}
    command += ["--constraints", f"base/{line}.versions"] if line in LINES else []
    command += ["--no-deps"] if line == "kernels" else []
    if line == "cpu":  # not for other lines, which must not find the CPU build of torch
        environment |= {
            uv: environment[pip]
            for uv, pip in (("UV_FIND_LINKS", "PIP_FIND_LINKS"), ("UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL"))
            if pip in environment
        }
    stage = Path(inputs[0]).parent.name
    present = [IMAGES / "base" / f"{line}.light.txt", IMAGES / "base" / f"{line}.torch.txt"]
    present += [IMAGES / stage / f"{line}.txt", IMAGES / stage / f"{line}.source.txt"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "lock.txt"  # uv prefers the versions in its output file
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
            sys.exit(f"{stage} of line {line}: uv finds no solution; change one of {', '.join(inputs)}\n{done.stderr}")
        lock = entries(output.read_text(encoding="utf-8"))
    return {name: entry for name, entry in lock.items() if line not in LEFT_OUT.get(name, "").split()}


def entries(lock: str) -> Lock:
    """A lock file's entries by package name."""
    found = re.findall(r"^(([A-Za-z0-9._-]+)==.*(?:\n    .*)*)", lock, flags=re.MULTILINE)
    return {name: entry for entry, name in found}


def pins(lock: str) -> set[str]:
    """The name==version of each entry of a lock file, without hashes, as a release may get further files."""
    return {entry.split()[0] for entry in entries(lock).values()}


def common_entries(several: list[Lock]) -> Lock:
    """The entries that are the same in all locks."""
    return {name: entry for name, entry in several[0].items() if all(other.get(name) == entry for other in several)}


def remaining_entries(lock: Lock, *others: Lock) -> Lock:
    """The entries of a lock whose packages are in none of the others."""
    return {name: entry for name, entry in lock.items() if not any(name in other for other in others)}


def lock_text(lock: Lock) -> str:
    """The text of a lock file, sorted by package."""
    return "".join(f"{lock[name]}\n" for name in sorted(lock))


if __name__ == "__main__":
    main()
