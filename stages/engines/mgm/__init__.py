"""MGM-2B (Mini-Gemini): two vision towers and Gemma, as a model of transformers' own kind.

Nothing maintained offers it: transformers, ms-swift and vLLM have no such model, and the published code needs
transformers 4.38, DeepSpeed, open_clip and timm. Importing this package makes the model known to the Auto classes.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from stages.engines.mgm.configuration import MgmConfig
from stages.engines.mgm.modeling import CONNECTORS, MgmForConditionalGeneration

AutoConfig.register(MgmConfig.model_type, MgmConfig)
AutoModelForImageTextToText.register(MgmConfig, MgmForConditionalGeneration)
AutoProcessor.register(MgmConfig, LlavaProcessor)

__all__ = ["CONNECTORS", "MgmConfig", "MgmForConditionalGeneration"]
