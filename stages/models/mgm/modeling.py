"""MGM's network (Li et al. 2024, 'Mini-Gemini: Mining the Potential of Multi-modality Vision Language Models',
arXiv:2403.18814, section 3), built from transformers' CLIP, ConvNeXt and Gemma.

The ConvNeXt reads a picture of 768 x 768 pixels. CLIP reads it scaled down to 336 x 336 and returns 24 x 24 tokens.
Each token attends to the 8 x 8 positions of the ConvNeXt's map that it covers (patch info mining). The result is added
to the token, and an MLP turns the sum into a token of the language model.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextPreTrainedModel, ConvNextStage
from transformers.utils.generic import ModelOutput

from stages.models.mgm.configuration import MgmConfig

CONNECTORS = ("mm_projector", "vlm_uni_query_projector", "vlm_uni_aux_projector", "vlm_uni_val_projector")
"""Published names of the modules between towers and language model. The first phase trains only these."""


class MgmConvNext(ConvNextPreTrainedModel):  # type: ignore[misc]
    """The high-resolution tower: a ConvNeXt without its head (arXiv:2201.03545). It returns the maps of all stages."""

    # it has no attention, so every kind of attention that the other parts use is supported
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes = config.hidden_sizes
        self.stem = ConvNextEmbeddings(config)
        self.stages = nn.ModuleList(
            ConvNextStage(config, sizes[max(i - 1, 0)], sizes[i], stride=2 if i else 1, depth=config.depths[i])
            for i in range(len(sizes))
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the maps of all stages: (pictures, channels of all stages, side / 4, side / 4).

        `pixel_values`: (pictures, 3, side, side). The smaller maps of later stages are interpolated to the size of the
        first stage's map.
        """
        features = self.stem(pixel_values)
        maps = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        size = maps[0].shape[-2:]
        stretched = [functional.interpolate(one.float(), size, mode="bilinear").to(one.dtype) for one in maps[1:]]
        return torch.cat([maps[0], *stretched], dim=1)


class MgmPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """The settings of MGM's models that transformers reads from their class."""

    config: MgmConfig
    config_class = MgmConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012  # transformers' own form
    supports_gradient_checkpointing = True
    _no_split_modules = ["GemmaDecoderLayer", "CLIPEncoderLayer", "ConvNextStage"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class MgmModel(MgmPreTrainedModel):
    """Towers, connectors and the language model without its head."""

    def __init__(self, config: MgmConfig) -> None:
        super().__init__(config)
        low, high = config.vision_config.hidden_size, sum(config.vision_config_aux.hidden_sizes)
        clip = AutoModel.from_config(config.vision_config)
        # transformers before about 5.6 has the tower one level deeper; this keeps the weights' names the same
        self.vision_tower = getattr(clip, "vision_model", clip)
        self.vision_tower_aux = MgmConvNext(config.vision_config_aux)
        self.vlm_uni_query_projector = nn.Sequential(nn.LayerNorm(low), nn.Linear(low, low))
        self.vlm_uni_aux_projector = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.vlm_uni_val_projector = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        hidden = config.text_config.hidden_size
        self.mm_projector = nn.Sequential(nn.Linear(low, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.language_model = AutoModel.from_config(config.text_config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """Return Gemma's word embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace Gemma's word embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the pictures as input for Gemma's layers: (pictures, tokens, hidden).

        `pixel_values`: (pictures, 3, side, side), normalised. In published MGM, Gemma multiplies the embeddings of
        words and pictures by the square root of the hidden size. In transformers 5, the word embedding multiplies only
        its own output, so this method does it for pictures.
        """
        # one by one: a single picture keeps a GPU busy, and each needs a gigabyte of memory
        tokens = torch.cat([self._picture_tokens(picture) for picture in pixel_values.split(1)])
        return tokens * math.sqrt(self.config.text_config.hidden_size)

    def _picture_tokens(self, pixel_values: torch.Tensor) -> Any:
        """Return the pictures as (pictures, tokens, hidden), without Gemma's factor. `pixel_values`: (pictures, 3,
        side, side)."""
        low, high = self._run_towers(pixel_values)
        if self.gradient_checkpointing and self.training:
            # else mining stores three maps of 2880 channels per picture for the connectors' gradients. Always
            # non-reentrant: reentrant checkpointing computes no gradients if no input requires them
            mined = checkpoint(self.mine_patches, low, high, use_reentrant=False)
        else:
            mined = self.mine_patches(low, high)
        return self.mm_projector(low + mined)

    def _run_towers(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of CLIP, (pictures, tokens, channels), and of the ConvNeXt, (pictures, channels, rows,
        columns). `pixel_values`: (pictures, 3, side, side).

        A frozen tower runs without gradients. With gradient checkpointing, trainers make the embeddings of every tower
        require gradients, and torch would store all activations of a frozen tower for nothing.
        """
        size, dtype = self.config.vision_config.image_size, self.vision_tower_aux.dtype
        # scale in float32, as the published code does
        small = functional.interpolate(pixel_values.float(), (size, size), mode="bilinear").to(dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision_tower)):
            states = self.vision_tower(pixel_values=small, output_hidden_states=True, return_dict=True).hidden_states
            low = states[self.config.vision_feature_layer][:, 1:]  # without the class token
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision_tower_aux)):
            high = self.vision_tower_aux(pixel_values.to(dtype))
        return low, high

    def mine_patches(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return what patch info mining (section 3.2) adds to each token, in the shape of `low`.

        Each token attends to the part of the high-resolution map that it covers. `low`: (pictures, tokens, channels);
        `high`: (pictures, more channels, rows, columns).
        """
        pictures, channels = high.shape[:2]
        across = self.config.tokens_across
        window = high.shape[-1] // across
        parts = high.reshape(pictures, channels, across, window, across, window)
        parts = parts.permute(0, 2, 4, 3, 5, 1).reshape(pictures, across**2, window**2, channels)
        found = functional.scaled_dot_product_attention(
            self.vlm_uni_query_projector(low)[:, :, None],
            self.vlm_uni_aux_projector(parts),
            self.vlm_uni_val_projector(parts),
        )
        return found[:, :, 0]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return Gemma's output, whose `last_hidden_state` is (samples, length, hidden). Pictures replace the image
        tokens, in order.

        `input_ids`: (samples, length), with `config.image_token_id` once for each token of a picture. `pixel_values`:
        (pictures of all samples, 3, side, side). Raises ValueError if there are pictures without `input_ids`, or if
        the number of image tokens does not match.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError(
                    "input_ids: missing, but pixel_values replace its image tokens; pass input_ids, not inputs_embeds"
                )
            seen = self.get_image_features(pixel_values).to(inputs_embeds.device, inputs_embeds.dtype)
            places = input_ids == self.config.image_token_id
            if int(places.sum()) != seen.shape[0] * seen.shape[1]:
                raise ValueError(
                    f"input_ids: {int(places.sum())} image tokens for {seen.shape[0]} pictures of"
                    f" {seen.shape[1]} tokens each; repeat the image token once per token of each picture"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], seen)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **others,
        )


@dataclass
class MgmOutput(ModelOutput):  # type: ignore[misc]
    """What MgmForConditionalGeneration returns. `logits`: (samples, positions, vocabulary); `loss` needs labels."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class MgmForConditionalGeneration(MgmPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """MGM with the language-model head, which shares the weights of Gemma's embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MgmConfig) -> None:
        super().__init__(config)
        self.model = MgmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """Return Gemma's word embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace Gemma's word embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """Return the language-model head."""
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MgmOutput:
        """Return the logits and, if there are labels, their loss. The other inputs are those of MgmModel.forward.

        `labels`: (samples, length), -100 at positions without loss. `logits_to_keep`: how many of the last positions
        get logits (0: all), or the indices of the positions.
        """
        output = self.model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return MgmOutput(loss, logits, output.past_key_values, output.hidden_states, output.attentions)

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return `forward`'s inputs for one step of `generate`. With a cache, only the first step has pictures.

        transformers requires the name `kwargs`, by which it recognises the arguments of `forward`.
        """
        pixel_values = kwargs.pop("pixel_values", None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs


def _is_trained(tower: nn.Module) -> bool:
    """Whether any of a tower's weights is trained."""
    return any(parameter.requires_grad for parameter in tower.parameters())
