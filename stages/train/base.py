"""Loading what is trained: the base in its precision, with LoRA as PEFT makes it or with a connector to train."""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import stages.models.mgm  # noqa: F401 - registers it with transformers
from stages.contract.errors import UsageError
from stages.contract.recipe import Train
from stages.hardware.memory import is_connector, is_vision_or_connector
from stages.hardware.targets import refuse_4bit_twice
from stages.models import gptq
from stages.models.pictures import PictureRules, family_rules
from stages.train.attention import own_attention
from stages.train.frozen import is_linear
from stages.train.job import Job
from stages.train.lora import put_module
from stages.train.passes import Vision
from stages.train.samples import TokenSequence
from stages.train.sharding import ShardedBase, sharded_loading
from stages.train.swift import SwiftReader
from stages.train.swift import load_base as load_swift_base
from stages.train.trainee import ConnectorTrainee, LoraTrainee, Trainee, has_own_dropout, hidden_alone
from stages.train.vision import PictureReader, decoder_layers, text_decoder

PartTest = Callable[[str], bool]


@dataclass(frozen=True)
class Base:
    """A loaded base, as it was before an adapter was put on it."""

    model: Any
    modules: dict[str, torch.nn.Module]
    """The model's own modules by name: LoRA and fused modules take the places of some."""

    @staticmethod
    def load(job: Job, device: torch.device) -> "Base":
        """Load the base of a job. Raises the errors of `load_base`."""
        with gptq.patch_gptq_kernels(job.model, on_card=not job.use_cpu, training=True):
            model = load_base(job, device)
        return Base(model, dict(model.named_modules()))

    def take_off(self) -> None:
        """Take off the adapter: give the model its own modules and attention, without checkpointing."""
        for name, module in self.modules.items():  # a module comes before its parts
            if name and self.model.get_submodule(name) is not module:
                put_module(self.model, name, module)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config  # else PEFT takes the next adapter for a second one
        self.model.gradient_checkpointing_disable()
        self.model.set_attn_implementation(own_attention(self.model.config))
        self.model.eval()


def load_trainee(
    job: Job,
    device: torch.device,
    probes: Sequence[TokenSequence],
    by_swift: bool = False,
    base: Base | None = None,
) -> Trainee:
    """Put LoRA on the base of a job, or free its connector to train.

    `probes` are some of the job's sequences, with which it is checked that the model may read packs. `by_swift`:
    whether pictures are read through ms-swift. `base` is the job's base if it is loaded already and no adapter is on
    it. Raises UsageError if train.load_in_4bit is set and the base is quantised already, if the base has no connector
    to train, or if LoRA is on a vision tower that the recipe freezes, or with a sharded base on a module outside of the
    layers.
    """
    with gptq.patch_gptq_kernels(job.model, on_card=not job.use_cpu, training=True):  # PEFT reads the patches too
        return _load_by_swift(job, device) if by_swift else _load(job, device, probes, base)


def _load(job: Job, device: torch.device, probes: Sequence[TokenSequence], base: Base | None) -> Trainee:
    """As `load_trainee`, through transformers."""
    model = base.model if base else load_base(job, device)
    sharded = ShardedBase(model, job.dtype) if job.is_sharded else None
    vision, layers = _vision(job, model), decoder_layers(text_decoder(model))
    if job.settings.trains_connector:
        connector = [name for name, _ in model.named_parameters() if is_connector(name)]
        if not connector or vision is None:
            raise UsageError(f"train.connector: {job.model} has no connector; use a vision-language model")
        alone = hidden_alone(model, vision, probes)
        trainee: Trainee = ConnectorTrainee(model, connector, job.model, vision)
    else:
        alone = hidden_alone(model, vision, probes, sharded)
        adapted = add_lora(model, job.settings, job.seed).eval()
        if sharded is not None:
            sharded.refuse_other_modules(adapted)
        trainee = LoraTrainee(adapted, job.settings.dropout, vision, sharded=sharded)
    trainee.pass_tokens = job.pass_tokens
    checkpoint_layers(trainee.model, job.checkpointed_layers or len(layers) * job.settings.gradient_checkpointing)
    trainee.check(alone, probes)
    trainee.why_one_by_one = trainee.why_one_by_one or _longest_decides(model)
    return trainee


def _load_by_swift(job: Job, device: torch.device) -> Trainee:
    """As `load_trainee`, for a model whose pictures are read through ms-swift."""
    reader = SwiftReader(job.model, job.model_settings, job.run, job.settings.max_pixels, job.dtype)
    model, sees, connects = load_swift_base(
        job.model, job.model_settings, getattr(torch, job.dtype), device, quantisation_options(job)
    )
    reader.attach(model)
    model.config.get_text_config().use_cache = False
    if job.settings.gradient_checkpointing or job.checkpointed_layers:
        _enable_checkpointing(model)
    vision = Vision(reader, None)
    if job.settings.trains_connector:
        connector = [name for name, _ in model.named_parameters() if connects(name)]
        if not connector:
            raise UsageError(f"train.connector: {job.model} has no connector; use another model")
        return ConnectorTrainee(model, connector, job.model, vision)
    return LoraTrainee(add_lora(model, job.settings, job.seed, sees, connects), job.settings.dropout, vision)


def _longest_decides(model: Any) -> str | None:
    """Why a model cannot read packs although a short one gave the right numbers; None if it can."""
    config = model.config.get_text_config()
    kinds = [getattr(config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    kinds += [kind for each in kinds for kind in each.values() if isinstance(kind, dict)]  # one for each kind of layer
    found = {kind.get("rope_type", kind.get("type")) for kind in kinds}
    if found & {"longrope", "dynamic"}:
        return "the longest sample of a pass decides how the model counts positions"
    return None


def load_base(job: Job, device: torch.device) -> Any:
    """Load the base in `job.dtype` on a device, with its own attention, or sharded over the processes.

    Raises UsageError for 4 bits twice.
    """
    config = AutoConfig.from_pretrained(
        job.model, local_files_only=True, trust_remote_code=job.model_settings.trust_remote_code
    )
    kind: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    options: dict[str, Any] = {} if job.is_sharded else {"device_map": {"": device}}  # transformers refuses both
    if job.settings.load_in_4bit:  # transformers 4 takes a None for the base's own quantisation
        options["quantization_config"] = quantisation_options(job)
    loading = sharded_loading(job.dtype) if job.is_sharded else nullcontext()
    with loading:
        return kind.from_pretrained(
            job.model,
            dtype=getattr(torch, job.dtype),
            **options,
            attn_implementation=own_attention(config),
            local_files_only=True,
            trust_remote_code=job.model_settings.trust_remote_code,
        )


def quantisation_options(job: Job) -> Any:
    """NF4 with double quantisation, computed in `job.dtype` (QLoRA, arXiv:2305.14314), if the recipe asks for 4 bits.

    Raises UsageError for 4 bits twice.
    """
    if not job.settings.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    refuse_4bit_twice(job.model, gptq.quantisation_method(job.model))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, job.dtype),
    )


def checkpoint_layers(model: Any, layers: int) -> None:
    """Compute the activations of a model's first decoder layers again in the backward pass; `layers` of them."""
    if not layers:
        return
    _enable_checkpointing(model)
    for number, layer in enumerate(decoder_layers(text_decoder(model))):
        layer.gradient_checkpointing = number < layers


def _enable_checkpointing(model: Any) -> None:
    """Compute the activations of all of a model's layers again in the backward pass.

    A random state is kept for that only if the base has dropout of its own: LoRA's does not depend on one
    (`dropout.py`).
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": has_own_dropout(model)})
    # transformers 5 has the embeddings of every tower require gradients, so a frozen tower would keep all activations;
    # transformers 4 adds no such hooks, and fails to remove them
    with suppress(AttributeError):
        model.disable_input_require_grads()


def _vision(job: Job, model: Any) -> Vision | None:
    """How a model reads pictures; None for a text-only model."""
    rules = family_rules(job.model)
    if rules is None or not hasattr(model.config, "image_token_id"):
        return None
    has_three_places = hasattr(model.base_model, "get_rope_index")
    factor = rules.factor if has_three_places and isinstance(rules, PictureRules) else None
    reader = PictureReader(job.model, rules, job.run, getattr(torch, job.dtype))
    return Vision(reader, int(model.config.image_token_id), factor)


def add_lora(
    model: Any, settings: Train, seed: int, sees: PartTest = is_vision_or_connector, connects: PartTest = is_connector
) -> PeftModel:
    """Add LoRA with float32 weights to a base, as the recipe says. The initial weights depend on `seed` alone.

    `sees` and `connects` say of a module's path whether it is part of a vision tower or connector, or of a connector.
    Raises UsageError if train.target_modules matches a module that is not linear, or a vision tower or connector that
    train.freeze_vision freezes.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_modules(model, settings, sees, connects),
    )
    adapted: Any = get_peft_model(model, config)
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer) and not {"in_features", "infeatures"} & {*dir(layer.get_base_layer())}:
            raise UsageError(
                f"train.target_modules: also matches {name}, which is no linear module; set it to [all-linear] or to a"
                " regular expression that does not match it"
            )
    if settings.freeze_vision:
        _refuse_adapted_vision(adapted, sees)
    return adapted  # type: ignore[no-any-return]


def target_modules(model: Any, settings: Train, sees: PartTest, connects: PartTest) -> list[str] | str:
    """The modules that get LoRA, for PEFT: names, or a regular expression for whole paths.

    `all-linear` means every linear module of the language model except its head, and of the vision tower unless the
    recipe freezes it; never the connector. The last two arguments are as in `add_lora`.
    """
    if isinstance(settings.target_modules, str) or "all-linear" not in settings.target_modules:
        return settings.target_modules
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
    excluded = sees if settings.freeze_vision else connects
    wanted = [name for name in linears if not excluded(name)]
    more = [name for name in settings.target_modules if name != "all-linear"]
    endings = sorted({*(name.rpartition(".")[2] for name in wanted), *more})
    others = {name for name, _ in model.named_modules()} - set(wanted)
    if not any(name.rpartition(".")[2] in endings for name in others):
        return endings
    parts = sorted({re.split(r"\.\d+\.", name)[0] for name in wanted})  # lists of layers
    return rf"^({'|'.join(map(re.escape, parts))})\..*\.({'|'.join(map(re.escape, endings))})$"


def _refuse_adapted_vision(model: PeftModel, sees: PartTest) -> None:
    """Raise UsageError if the vision tower or the connector got LoRA although the recipe freezes them.

    Plain module names in train.target_modules can match them too, and vLLM would ignore these weights with only a
    warning.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and sees(name):
            raise UsageError(
                f"train.target_modules: also matches {name}, in the vision tower or connector, which"
                " train.freeze_vision freezes; set it to [all-linear] or to a regular expression that matches only the"
                " language model, or set train.freeze_vision=false and infer.merged=true"
            )
