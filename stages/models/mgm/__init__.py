"""MGM-2B (Mini-Gemini): two vision towers and Gemma, as a transformers model.

No maintained library supports it: transformers, ms-swift and vLLM do not, and the published code needs transformers
4.38, DeepSpeed, open_clip and timm. Importing this package registers the model with transformers' Auto classes.
"""

import transformers

AVAILABLE = int(transformers.__version__.partition(".")[0]) >= 5
"""Whether MGM can be used. With transformers 4 (image v100-gptq) it cannot: that scales embeddings elsewhere and lacks
classes that MGM needs."""

if AVAILABLE:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

    from stages.models.mgm.configuration import MgmConfig
    from stages.models.mgm.modeling import CONNECTORS, MgmForConditionalGeneration

    AutoConfig.register(MgmConfig.model_type, MgmConfig)
    AutoModelForImageTextToText.register(MgmConfig, MgmForConditionalGeneration)
    AutoProcessor.register(MgmConfig, LlavaProcessor)

__all__ = ["AVAILABLE", "CONNECTORS", "MgmConfig", "MgmForConditionalGeneration"]
