"""The image tree: what holds for a layer is tested in every image that has it."""

STAGES = ("preprocess", "train", "infer", "eval")

PARENTS = {
    "light": "system",
    "torch": "light",
    "preprocess": "torch",
    "train": "torch",
    "infer": "torch",
    "eval": "light",
}
"""Each layer's parent, as in images/docker-bake.hcl."""


def layers(stage: str) -> list[str]:
    """The layers of a stage's image, from its own down to `system`."""
    found = [stage]
    while found[-1] in PARENTS:
        found.append(PARENTS[found[-1]])
    return found


def having(layer: str) -> list[str]:
    """The stages whose image has this layer."""
    return [stage for stage in STAGES if layer in layers(stage)]
