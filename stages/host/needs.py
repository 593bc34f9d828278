"""The libraries and GPUs that each stage needs on a host."""

from stages.engines import engine_libraries

LIBRARIES = {
    "preprocess": ("pymupdf", "torch", "sentence_transformers", "data_juicer", "ray"),
    "train": ("torch", "transformers", "peft", "swift"),
    "infer": tuple(engine_libraries()),
    "eval": ("numpy", "matplotlib", "jinja2"),
}
"""The libraries that each stage requires, in the order of import."""

STAGES = tuple(LIBRARIES)
"""The stages in the order in which they run."""

OPTIONAL_LIBRARIES = {"train": ("bitsandbytes", "deepspeed", "gptqmodel", "auto_gptq", "flash_attn")}
"""Libraries that only some targets have."""

GPU_STAGES = ("train", "infer")
"""The stages that need a GPU, unless the target is cpu."""
