"""MGM-2B (Mini-Gemini): two vision towers and Gemma, as a model of transformers' own kind.

Nothing maintained offers it: transformers, ms-swift and vLLM have no such model, and the published code needs
transformers 4.38, DeepSpeed, open_clip and timm. Importing this package makes the model known to the Auto classes.
"""

import transformers

AVAILABLE = int(transformers.__version__.partition(".")[0]) >= 5
"""transformers 4, which trains on GPTQ bases on a V100, scales embeddings elsewhere and lacks parts that are used."""

if AVAILABLE:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

    from stages.models.mgm.configuration import MgmConfig
    from stages.models.mgm.modeling import CONNECTORS, MgmForConditionalGeneration

    AutoConfig.register(MgmConfig.model_type, MgmConfig)
    AutoModelForImageTextToText.register(MgmConfig, MgmForConditionalGeneration)
    AutoProcessor.register(MgmConfig, LlavaProcessor)

__all__ = ["AVAILABLE", "CONNECTORS", "MgmConfig", "MgmForConditionalGeneration"]
