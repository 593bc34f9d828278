"""How much memory training an adapter, or a connector, takes on each GPU, estimated from the model's shape alone.

What autograd keeps is counted tensor by tensor for a decoder layer as transformers runs it: RMSNorm in float32, scaled
dot-product attention, a gated MLP, and PEFT's LoRA in float32 under autocast. The constants that no source states were
measured on an H200 with torch 2.11 (benchmarks/memory.py; README, "Measured"). Sizes are in bytes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import prod

from stages.contract.recipe import Recipe, Train
from stages.hardware.batch import BatchPlan
from stages.models.shape import ModelShape

FLOAT32 = 4

FRAMEWORK = 862_000_000
"""The CUDA context with the kernels that training loads (795 MB), and cuBLAS' two workspaces (67 MB)."""
NCCL = 1_000_000_000
"""Its buffers and channels, for each process that has a group; measured with a group of one (under ZeRO-2)."""

ZERO_BUCKET = 20_000_000
"""Elements that ZeRO reduces or gathers at a time: a buffer of 40 to 80 MB. DeepSpeed's own 500 million would hold 1 GB
or more for gradients that LoRA never has."""
ZERO3_LIVE = 500_000_000
"""Weights that a GPU keeps whole at a time under ZeRO-3, where the layer at work is smaller: 1 GB in 16 bits, room for
two layers of a 7B model. DeepSpeed's own 1 billion would hold 2 GB."""
ZERO3_PREFETCH = 250_000_000
"""Weights fetched under ZeRO-3 while those before them are computed with, 0.5 GB: a layer of a 7B model, whole."""

LOSS_PER_LOGIT = 12.05
"""Bytes for each logit when the loss's backward begins: log-softmax and its gradient in float32, and copies of them."""
SAVED_PER_LOGIT = 4
"""What stays of a logit after the forward pass: its log-softmax."""
FRAGMENTS_PER_LOGIT = 3.55
"""The allocator finds no hole for one of these tensors, which are larger than everything else, and takes new memory."""
FRAGMENTS_SHARE = 0.01
"""What it loses on everything else, with expandable segments."""

NF4_BYTES = 0.5 + 1 / 64
"""A weight in bitsandbytes' NF4 with double quantisation: 4 bits, and a byte for each block of 64."""

UNPACKING = {"bfloat16": 2, "float16": 7, "float32": 7}
"""Bytes for each weight of a module of a GPTQ base while it is unpacked, beside the result: gptqmodel's Triton kernel
writes float16, which becomes bfloat16; auto-gptq (a V100, in float16) and the kernel for CPUs shift integers of 32 bits
and keep bytes and products of them. Read from their source; not measured."""

MGM_READS = 16
"""Bytes for each channel of each position of MGM's large map (2880 x 192 x 192) while one picture is read: the map, its
parts in order and their normalised copy in float32, the last in 16 bits too, and the projections. Traced in float32,
read from the source for autocast; not measured on a card."""
MGM_READS_BACK = 20
"""The same while gradients go back through one picture to the connector in training."""
MGM_KEEPS = {True: 5, False: 15}
"""What stays of each picture for that, with and without gradient checkpointing."""


@dataclass(frozen=True)
class Lengths:
    """What the samples are like, in tokens."""

    longest: int
    """Of the longest sample, images included."""
    answer: int
    """Of the longest answer: logits are made where a token carries a loss."""
    shortest_prompt: int | None = None
    """What stands before the answer, of the sample where that is shortest; None: all samples are alike."""

    def logits(self, micro_batch: int) -> int:
        """Positions of a micro-batch that get logits, at most. Of several samples, ms-swift takes every position from
        where the first answer begins to the end of the longest sample."""
        if micro_batch == 1 or self.shortest_prompt is None:
            return micro_batch * self.answer
        return micro_batch * (self.longest - min(self.shortest_prompt, self.longest - self.answer))


def lengths_at_most(recipe: Recipe) -> Lengths:
    """What the recipe allows, before there are samples: its longest, with an answer as long as it asks of inference;
    in a micro-batch of several, beside one with next to no prompt."""
    longest = recipe.train.max_length
    return Lengths(longest, min(longest, recipe.infer.max_new_tokens), shortest_prompt=0)


@dataclass(frozen=True)
class Estimate:
    """The peak on one GPU, by what takes it at that moment."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    framework: int
    fragmentation: int

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> int:
        return sum(self.parts().values())


def estimate(
    shape: ModelShape, settings: Train, batch: BatchPlan, dtype: str, sharding: str, lengths: Lengths
) -> Estimate:
    """The peak on one GPU.

    There are two moments that can be it, and it is the larger: the loss, with the layers' activations and the logits;
    and the backward pass through a layer, with what that layer makes and, at the end of it, all gradients.
    """
    size = FLOAT32 if dtype == "float32" else 2
    tokens = batch.micro_batch * lengths.longest
    adapter = trained_parameters(shape, settings)
    shards = batch.gpus if sharding != "none" else 1
    # under ZeRO the adapter is kept in the base's precision, its master copy in float32 with the optimizer's moments
    held = adapter * (FLOAT32 if sharding == "none" else size)
    moments = adapter * FLOAT32 * (2 if sharding == "none" else 3) // shards
    gradients = adapter * FLOAT32 if sharding == "none" else adapter * size + ZERO_BUCKET * FLOAT32

    connector = _connector_activations(shape, settings) * tokens
    of_pictures, reading = _large_maps(shape, settings, batch.micro_batch)
    connector += of_pictures
    layer = _layer_activations(shape, settings, size, batch.micro_batch, lengths.longest) * tokens
    # of a GPTQ base autograd keeps each module's unpacked weights, too, whatever the tokens
    layer += size * sum(map(prod, _packed_in_layers(shape))) // shape.layers
    unpacking = UNPACKING[dtype] * max(map(prod, _packed_in_layers(shape)), default=0)
    working = max(_layer_working_set(shape, settings, sharding) * tokens, unpacking)
    kept = shape.layers * (2 * shape.hidden * size // 2 * tokens if settings.gradient_checkpointing else layer)
    logits = (lengths.logits(batch.micro_batch) + batch.micro_batch) * shape.vocabulary
    earlier = gradients if batch.accumulation > 1 else 0  # of the micro-batches before
    at_loss = (kept + connector, round(LOSS_PER_LOGIT * logits), earlier)
    recomputed = layer if settings.gradient_checkpointing else 0
    in_first = (kept + connector + recomputed + working, SAVED_PER_LOGIT * logits // 2, earlier)
    in_last = (layer + connector + working, 0, gradients)
    at_pictures = (connector + reading, 0, gradients if settings.trains_connector else earlier)
    activations, of_logits, alive = max(at_loss, in_first, in_last, at_pictures, key=sum)

    weights = _weights(shape, settings, size, sharding, batch.gpus)
    grouped = batch.gpus > 1 or sharding != "none"
    parts = weights + held + moments + activations
    return Estimate(
        weights=weights,
        adapter=held,
        gradients=alive,
        optimizer=moments,
        activations=activations,
        logits=of_logits,
        framework=FRAMEWORK + (NCCL if grouped else 0),
        fragmentation=round(FRAGMENTS_PER_LOGIT * logits + FRAGMENTS_SHARE * (parts - weights)),
    )


def trained_parameters(shape: ModelShape, settings: Train) -> int:
    """How many parameters get gradients: LoRA's, or in the first phase all of the connector's."""
    if not settings.trains_connector:
        return adapter_parameters(shape, settings)
    return sum(weight.count for weight in shape.weights if _is_connector(weight.name))


def adapter_parameters(shape: ModelShape, settings: Train) -> int:
    """How many parameters LoRA adds: rank x (inputs + outputs) for each module that it adapts."""
    return sum(settings.rank * sum(shape.linears[name]) for name in adapted_modules(shape, settings))


def adapted_modules(shape: ModelShape, settings: Train) -> list[str]:
    """The linear modules that get LoRA, as ms-swift and PEFT choose them: never the head, and of a vision tower none
    while it is frozen; none at all while the connector is trained."""
    if settings.trains_connector:
        return []
    linears = [name for name in shape.linears if name.rpartition(".")[2] != "lm_head"]
    if settings.freeze_vision:
        linears = [name for name in linears if not _is_vision(name)]
    wanted = settings.target_modules
    if isinstance(wanted, str):
        return [name for name in linears if re.fullmatch(wanted, name)]
    if "all-linear" in wanted:
        return [name for name in linears if not _is_connector(name)]
    return [name for name in linears if any(name == one or name.endswith(f".{one}") for one in wanted)]


def not_estimated(shape: ModelShape, settings: Train) -> str | None:
    """What of this training's memory is not in the estimate, in words."""
    if settings.freeze_vision or not any(map(_is_vision, adapted_modules(shape, settings))):
        return None
    return "what an adapted vision tower keeps of its pictures for the backward pass (train.freeze_vision is false)"


def _is_vision(module: str) -> bool:
    towers = {"visual", "vision_tower", "vision_tower_aux", "vision_model"}
    return bool(towers & set(module.split("."))) or _is_connector(module)


def _is_connector(module: str) -> bool:
    """Between the tower and the language model: LLaVA's, Qwen2-VL's, MGM's."""
    names = ("multi_modal_projector", "mm_projector")
    return any(part in names or "merger" in part or part.startswith("vlm_uni_") for part in module.split("."))


def _adapted_in_layers(shape: ModelShape, settings: Train) -> list[str]:
    """The adapted modules of the decoder layers."""
    return [name for name in adapted_modules(shape, settings) if not _is_vision(name)]


def _packed_in_layers(shape: ModelShape) -> list[tuple[int, int]]:
    """Inputs and outputs of the decoder layers' modules that are stored quantised."""
    return [shape.linears[name] for name in shape.packed if _is_in_a_layer(name)]


def _is_in_a_layer(linear: str) -> bool:
    """Of the decoder: neither the head nor of a vision tower."""
    return not _is_vision(linear) and linear.rpartition(".")[2] != "lm_head"


def _connector_activations(shape: ModelShape, settings: Train) -> int:
    """Bytes that a connector in training keeps for each token, as if all were a picture's: of each of its linear
    modules the input and the output, as large as in float32."""
    if not settings.trains_connector:
        return 0
    return FLOAT32 * sum(sum(sizes) for name, sizes in shape.linears.items() if _is_connector(name))


def _large_maps(shape: ModelShape, settings: Train, micro_batch: int) -> tuple[int, int]:
    """Bytes that stay of MGM's pictures, one in each sample, and those at work while one of them is read: it reads them
    one by one. None for other models: their pictures are small beside their tokens."""
    if shape.vision_aux is None:
        return 0, 0
    tower = shape.vision_aux
    size = (tower["image_size"] // tower["patch_size"]) ** 2 * sum(tower["hidden_sizes"])
    if not settings.trains_connector:
        return 0, MGM_READS * size
    return MGM_KEEPS[settings.gradient_checkpointing] * micro_batch * size, MGM_READS_BACK * size


def _weights(shape: ModelShape, settings: Train, size: int, sharding: str, gpus: int) -> int:
    """The frozen base on one GPU. What a file keeps in integers (GPTQ) stays as it is."""
    total = 0.0
    in_4bit = (
        {name for name in shape.linears if name.rpartition(".")[2] != "lm_head"}
        if settings.load_in_4bit and shape.quantisation is None
        else set()
    )
    for weight in shape.weights:
        if settings.trains_connector and _is_connector(weight.name):
            continue  # in float32, with what is trained
        if weight.name.rpartition(".")[0] in in_4bit and len(weight.shape) == 2:
            total += weight.count * NF4_BYTES
        elif weight.dtype.startswith(("F", "BF")):
            total += weight.count * size
        else:
            total += weight.stored_bytes
    if sharding != "zero3" or gpus == 1:
        return round(total)
    # whole at a time: a layer, and beside it the head, the embeddings or the layers to come
    layer = sum(prod(sizes) for name, sizes in shape.linears.items() if _is_in_a_layer(name)) // shape.layers
    largest = max(weight.count for weight in shape.weights)
    return round(total / gpus) + size * (max(ZERO3_LIVE, largest) + max(ZERO3_PREFETCH, layer))


def _inputs_of(shape: ModelShape, modules: Iterable[str]) -> int:
    return sum(shape.linears[name][0] for name in modules)


def _layer_activations(shape: ModelShape, settings: Train, size: int, micro_batch: int, length: int) -> int:
    """Bytes that one decoder layer keeps for its backward pass, for each token."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norms = 2 * FLOAT32 * shape.hidden  # two of them, each keeps its input in float32
    attention = size * (2 * queries + 2 * keys)  # query, key, value, output
    if micro_batch > 1:  # samples of other lengths need a mask, and then keys and values are repeated for each head
        attention += size * 2 * (queries - keys)
    mlp = 3 * size * shape.intermediate  # gate, its activation, up
    adapted = _adapted_in_layers(shape, settings)
    # LoRA casts its input to float32 and autocast back: a copy for each module; dropout keeps a mask of a byte
    copies = (size + bool(settings.dropout)) * _inputs_of(shape, adapted) // shape.layers
    return norms + attention + mlp + copies + 2 * size * settings.rank * len(adapted) // shape.layers


def _layer_working_set(shape: ModelShape, settings: Train, sharding: str) -> int:
    """Bytes for each token that one layer's backward pass needs beside what was kept; most in the MLP."""
    adapts_mlp = any(shape.linears[name][0] == shape.intermediate for name in _adapted_in_layers(shape, settings))
    # without sharding LoRA is in float32, and so is what goes back through it
    in_float32 = adapts_mlp and sharding == "none"
    return 12 * shape.intermediate if in_float32 else 6 * shape.intermediate + 4 * shape.hidden
