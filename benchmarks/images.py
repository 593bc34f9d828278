"""Sizes of the stage images, alone and together, the output of their self-tests, and seconds of an unchanged build.

    python -m benchmarks.images cpu a800 v100 v100-gptq

The arguments are targets. Builds their images from the current code first (images/build.sh says what that needs). Sizes
are those of the unpacked layers, in GB of 1e9 bytes, as in `docker image ls`.
"""

import importlib.metadata
import subprocess
import sys
import time
from typing import Any

import docker

from benchmarks.rows import write_rows

VERSION = importlib.metadata.version("lorry")
STAGES = ("preprocess", "train", "infer", "eval")


def main() -> None:
    """Build and measure the images of the targets that the arguments name.

    Writes a row for each target and one for each image. Raises CalledProcessError if a build fails.
    """
    client = docker.from_env(timeout=600)
    rows: list[dict[str, Any]] = []
    for target in sys.argv[1:]:
        stages = ("train",) if target == "v100-gptq" else STAGES
        build = ["images/build.sh", target]
        subprocess.run(build, check=True, capture_output=True)  # rebuild with the current code
        images = {stage: client.images.get(f"lorry-{stage}:{VERSION}-{target}") for stage in stages}
        before = time.monotonic()
        subprocess.run(build, check=True, capture_output=True)
        again = round(time.monotonic() - before, 1)
        rows.append({"target": target, "unchanged build s": again, "together GB": _size_together(client, images)})
        for stage, image in images.items():
            test = client.containers.run(image, ["selftest"], remove=True, network_mode="none", stderr=True).decode()
            shown = [line for line in test.splitlines() if line.startswith(("code in", "torch ", "vllm ", "swift "))]
            size = round(image.attrs["Size"] / 1e9, 2)
            rows.append({"target": target, "stage": stage, "GB": size, "selftest": shown})
    write_rows("images", rows, f"python -m benchmarks.images {' '.join(sys.argv[1:])}")


def _size_together(client: docker.DockerClient, images: dict[str, Any]) -> float:
    """Return the size of these images together, in GB of 1e9 bytes.

    A layer counts once for all images that share it and every layer before it.
    """
    layers: dict[str, int] = {}
    for image in images.values():
        chain = ""
        for step in reversed(client.api.history(image.id)):
            chain += f"{step['CreatedBy']} {step['Created']}\n"
            layers[chain] = step["Size"]
    return round(sum(layers.values()) / 1e9, 2)


if __name__ == "__main__":
    main()
