"""What each stage needs of a host: libraries and GPUs."""

from stages.engines import engine_libraries

LIBRARIES = {
    "preprocess": ("pymupdf", "torch", "sentence_transformers", "data_juicer", "ray"),
    "train": ("torch", "transformers", "peft", "swift"),
    "infer": tuple(engine_libraries()),
    "eval": ("numpy", "matplotlib", "jinja2"),
}
"""The libraries that a stage cannot do without, in the order of import."""

STAGES = tuple(LIBRARIES)
"""In the order they run."""

OPTIONAL_LIBRARIES = {"train": ("bitsandbytes", "deepspeed", "gptqmodel", "auto_gptq", "flash_attn")}
"""Libraries that only some targets have."""

GPU_STAGES = ("train", "infer")
"""The stages whose torch must compute on the target's GPU."""
