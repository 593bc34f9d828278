"""What each stage needs: libraries that must be there, and cards."""

from stages.engines import engine_libraries

LIBRARIES = {
    "preprocess": ("pymupdf", "torch", "sentence_transformers", "data_juicer", "ray"),
    "train": ("torch", "transformers", "peft", "swift"),
    "infer": tuple(engine_libraries()),
    "eval": ("numpy", "matplotlib", "jinja2"),
}
"""What a stage cannot do without, in the order of import."""

WHERE_INSTALLED = {"train": ("bitsandbytes", "deepspeed", "gptqmodel", "auto_gptq", "flash_attn")}
"""What only some targets have."""

ON_CARDS = ("train", "infer")
"""The stages whose torch must compute on the target's card."""
