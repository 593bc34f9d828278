"""MGM's configuration: its language model and its two vision towers."""

from typing import Any

from transformers import CLIPVisionConfig, ConvNextConfig, GemmaConfig, PreTrainedConfig

GEMMA_2B: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8},
    **{"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000},
}
CLIP_L_14_336: dict[str, Any] = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"patch_size": 14, "image_size": 336, "projection_dim": 768},
}
CONVNEXT_L: dict[str, Any] = {
    **{"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "patch_size": 4, "num_stages": 4},
    # the published code drops blocks of the frozen tower at random (drop path); Lorry keeps a frozen tower fixed
    **{"image_size": 768, "drop_path_rate": 0.0},
}


class MgmConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of an MGM model. A part that is None gets MGM-2B's values.

    `vision_config` configures the low-resolution tower, a CLIP. `vision_config_aux` configures the high-resolution
    tower, a ConvNeXt; its `image_size` is the side of the input pictures in pixels. Raises ValueError if a token of the
    CLIP does not cover a whole number of positions of the ConvNeXt's map.
    """

    model_type = "mgm"
    sub_configs = {  # noqa: RUF012  # transformers' own form
        "text_config": GemmaConfig,
        "vision_config": CLIPVisionConfig,
        "vision_config_aux": ConvNextConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        vision_config_aux: Any = None,
        image_token_id: int = 7,
        vision_feature_layer: int = -2,
        **others: Any,
    ) -> None:
        self.text_config = _part_config(GemmaConfig, text_config, GEMMA_2B)
        self.vision_config = _part_config(CLIPVisionConfig, vision_config, CLIP_L_14_336)
        self.vision_config_aux = _part_config(ConvNextConfig, vision_config_aux, CONVNEXT_L)
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        others.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**others)
        high = self.vision_config_aux
        if high.image_size % (high.patch_size * self.tokens_across):
            raise ValueError(
                f"vision_config_aux.image_size: {high.image_size} is not a multiple of"
                f" {high.patch_size * self.tokens_across}, patch_size times {self.tokens_across} tokens along a side;"
                " set it to one"
            )

    @property
    def tokens_across(self) -> int:
        """Number of tokens along a picture's side: 24 in MGM-2B, so 576 for a picture."""
        return int(self.vision_config.image_size // self.vision_config.patch_size)

    @property
    def pixels_across(self) -> int:
        """Number of pixels of the input picture along a token's side: 32 in MGM-2B."""
        return int(self.vision_config_aux.image_size // self.tokens_across)


def _part_config(kind: Any, given: Any, default: dict[str, Any]) -> Any:
    """Return a part's config, of class `kind`. `given` is such a config or its values; None: `default`."""
    if isinstance(given, kind):
        return given
    return kind(**(default if given is None else given))
