"""MGM-2B (Mini-Gemini): two vision towers and Gemma, as a transformers model.

No maintained library has it: transformers, ms-swift and vLLM do not support it, and the published code needs
transformers 4.38, DeepSpeed, open_clip and timm. Importing this package registers the model with the Auto classes.
"""

import transformers

AVAILABLE = int(transformers.__version__.partition(".")[0]) >= 5
"""False with transformers 4, which the image v100-gptq has: it scales embeddings elsewhere and lacks classes used here.
"""

if AVAILABLE:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

    from stages.models.mgm.configuration import MgmConfig
    from stages.models.mgm.modeling import CONNECTORS, MgmForConditionalGeneration

    AutoConfig.register(MgmConfig.model_type, MgmConfig)
    AutoModelForImageTextToText.register(MgmConfig, MgmForConditionalGeneration)
    AutoProcessor.register(MgmConfig, LlavaProcessor)

__all__ = ["AVAILABLE", "CONNECTORS", "MgmConfig", "MgmForConditionalGeneration"]
