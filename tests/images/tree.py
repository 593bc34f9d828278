"""The tree of images and layers: a test of a layer runs in each image that has it."""

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
    """The stages whose images have this layer."""
    return [stage for stage in STAGES if layer in layers(stage)]
