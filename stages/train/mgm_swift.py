"""MGM for ms-swift. Importing this module registers `model.swift_type: mgm` and `model.swift_template: mgm`."""

from typing import Any

from swift.model.model_arch import MultiModelKeys, register_model_arch
from swift.model.model_meta import ModelMeta
from swift.model.register import ModelLoader, register_model
from swift.template.register import TemplateMeta, register_template

from stages.models.mgm import CONNECTORS, MgmForConditionalGeneration
from stages.train.llava_templates import _InPlace


class _Loader(ModelLoader):  # type: ignore[misc]
    """Loads MGM with Lorry's model class."""

    default_trust_remote_code = False  # the model is defined in Lorry; its folder holds no code

    def get_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model as ms-swift does, but with Lorry's class. Returns it."""
        self.auto_model_cls = MgmForConditionalGeneration
        return super().get_model(*args, **kwargs)


register_model_arch(
    MultiModelKeys(
        "mgm",
        language_model=["model.language_model", "lm_head"],
        aligner=[f"model.{name}" for name in CONNECTORS],
        vision_tower=["model.vision_tower", "model.vision_tower_aux"],
    ),
    exist_ok=True,
)
register_template(
    TemplateMeta(
        "mgm",
        prefix=["<bos>"],
        prompt=["<start_of_turn>user\n{{QUERY}}<end_of_turn>\n<start_of_turn>model\n"],
        chat_sep=["<end_of_turn>\n<eos>"],
        suffix=["<end_of_turn>\n<eos>"],
        template_cls=_InPlace,
    ),
    exist_ok=True,
)
register_model(
    ModelMeta(
        "mgm",
        [],
        _Loader,
        template="mgm",
        model_arch="mgm",
        architectures=[MgmForConditionalGeneration.__name__],
        is_multimodal=True,
    ),
    exist_ok=True,
)
