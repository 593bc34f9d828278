"""Estimates the memory that training an adapter or a connector takes on each GPU, from the model's shape alone.

It counts one by one the tensors that autograd keeps in a decoder layer as transformers runs it: RMSNorm in float32,
scaled dot-product attention, a gated MLP, and PEFT's LoRA in float32 under autocast. Constants without a source were
measured on an H200 with torch 2.11 (benchmarks/memory.py; docs/measurements.md). Sizes are in bytes.
"""

import re
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod

from stages.contract.recipe import Recipe, Train
from stages.hardware.batch import BatchPlan
from stages.models.shape import ModelShape

FLOAT32 = 4

CACHED = 16
"""Results kept of each function that depends on a shape and few settings. A plan estimates hundreds of ways, and a
mixture of experts has 19,000 tensors."""

FRAMEWORK = 862_000_000
"""CUDA context with the kernels that training loads (795 MB), and cuBLAS' two workspaces (67 MB)."""
NCCL = 1_000_000_000
"""NCCL's buffers and channels for each process in a group; measured with a group of one (under ZeRO-2)."""

ZERO_BUCKET = 20_000_000
"""Elements that ZeRO reduces or gathers at a time, in a buffer of 40 to 80 MB. DeepSpeed's default of 500 million would
take 1 GB or more for gradients that LoRA does not have."""
ZERO3_LIVE = 500_000_000
"""Weights that a GPU gathers at a time under ZeRO-3, if the current layer is smaller: 1 GB in 16 bits, two layers of a
7B model. DeepSpeed's default of 1 billion would take 2 GB."""
ZERO3_PREFETCH = 250_000_000
"""Weights that ZeRO-3 prefetches, 0.5 GB in 16 bits: one whole layer of a 7B model."""

LOSS_PER_LOGIT = 12.05
"""Bytes per logit when the backward pass of the loss begins: log-softmax and its gradient in float32, with copies."""
SAVED_PER_LOGIT = 4
"""Bytes per logit that stay after the forward pass: its log-softmax."""
FRAGMENTS_PER_LOGIT = 3.55
"""Bytes per logit that fragmentation costs: these tensors are larger than all others, fit in no free block, and the
allocator takes new memory."""
FRAGMENTS_SHARE = 0.01
"""What fragmentation adds, with expandable segments, as a share of adapter, optimizer state and activations."""

NF4_BYTES = 0.5 + 1 / 64
"""Bytes per weight in bitsandbytes' NF4 with double quantisation: 4 bits, and a byte for each block of 64."""

UNPACKING = {"bfloat16": 2, "float16": 7, "float32": 7}
"""Bytes per weight that unpacking a module of a GPTQ base takes besides the result: gptqmodel's Triton kernel writes
float16, which becomes bfloat16; auto-gptq (V100, float16) and the CPU kernel shift 32-bit integers, and keep bytes and
products of them. Read from their source; not measured."""

MGM_READS = 16
"""Bytes per channel and position of MGM's large feature map (2880 x 192 x 192) while one picture is read: the map, its
reordered parts and their normalised copy in float32, the last in 16 bits too, and the projections. Traced in float32,
read from the source for autocast; not measured on a GPU."""
MGM_READS_BACK = 20
"""Bytes per channel and position in the backward pass of one picture, if the connector is trained."""
MGM_KEEPS = {True: 5, False: 15}
"""Bytes per channel and position that each picture keeps for that backward pass, by gradient checkpointing."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the samples, in tokens."""

    longest: int
    """Length of the longest sample, with its images."""
    answer: int
    """Length of the longest answer: only tokens with a loss get logits."""
    shortest_prompt: int | None = None
    """Length of the shortest prompt before an answer; None: all samples are alike."""

    def logit_positions(self, micro_batch: int) -> int:
        """The maximum number of positions in a micro-batch that get logits.

        With several samples, ms-swift computes them from the first answer's start to the longest sample's end.
        """
        if micro_batch == 1 or self.shortest_prompt is None:
            return micro_batch * self.answer
        return micro_batch * (self.longest - min(self.shortest_prompt, self.longest - self.answer))


def max_lengths(recipe: Recipe) -> Lengths:
    """The longest samples that the recipe allows, for an estimate before preprocess has run.

    A sample has train.max_length tokens, of which infer.max_new_tokens are the answer. In a micro-batch of several,
    one sample has an empty prompt.
    """
    longest = recipe.train.max_length
    return Lengths(longest, min(longest, recipe.infer.max_new_tokens), shortest_prompt=0)


@dataclass(frozen=True)
class Estimate:
    """The peak memory on one GPU, in bytes, split into what takes it at that moment."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    framework: int
    fragmentation: int

    def parts(self) -> dict[str, int]:
        """Bytes of each part, by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> int:
        """Bytes of all parts together: the peak."""
        return sum(self.parts().values())


def estimate_memory(
    shape: ModelShape, settings: Train, batch: BatchPlan, dtype: str, sharding: str, lengths: Lengths
) -> Estimate:
    """The estimated peak memory of training on one GPU.

    `dtype` is the frozen base's; `sharding` is `none`, `zero2` or `zero3`. The peak is the maximum of four moments: the
    loss, with the activations of all layers and the logits; the backward pass of the last layer and that of the first,
    each with a layer's working set; and the reading of MGM's pictures.
    """
    size = FLOAT32 if dtype == "float32" else 2
    tokens = batch.micro_batch * lengths.longest
    adapter = trained_parameters(shape, settings)
    shards = batch.gpus if sharding != "none" else 1
    # under ZeRO the adapter is in the base's precision, with a float32 master copy beside the optimizer's moments
    held = adapter * (FLOAT32 if sharding == "none" else size)
    moments = adapter * FLOAT32 * (2 if sharding == "none" else 3) // shards
    gradients = adapter * FLOAT32 if sharding == "none" else adapter * size + ZERO_BUCKET * FLOAT32

    connector = _connector_activations(shape, settings) * tokens
    of_pictures, reading = _large_map_bytes(shape, settings, batch.micro_batch)
    connector += of_pictures
    layer = _layer_activations(shape, settings, size, batch.micro_batch, lengths.longest) * tokens
    # with a GPTQ base autograd also keeps each module's unpacked weights, for any number of tokens
    layer += size * sum(_quantised_layer_sizes(shape)) // shape.layers
    unpacking = UNPACKING[dtype] * max(_quantised_layer_sizes(shape), default=0)
    working = max(_layer_working_set(shape, settings, sharding) * tokens, unpacking)
    kept = shape.layers * (2 * shape.hidden * size // 2 * tokens if settings.gradient_checkpointing else layer)
    logits = (lengths.logit_positions(batch.micro_batch) + batch.micro_batch) * shape.vocabulary
    earlier = gradients if batch.accumulation > 1 else 0  # of earlier micro-batches
    at_loss = (kept + connector, round(LOSS_PER_LOGIT * logits), earlier)
    recomputed = layer if settings.gradient_checkpointing else 0
    in_first = (kept + connector + recomputed + working, SAVED_PER_LOGIT * logits // 2, earlier)
    in_last = (layer + connector + working, 0, gradients)
    at_pictures = (connector + reading, 0, gradients if settings.trains_connector else earlier)
    activations, of_logits, alive = max(at_loss, in_first, in_last, at_pictures, key=sum)

    weights = _weight_bytes(shape, settings, size, sharding, batch.gpus)
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
    """The number of parameters that get gradients: those of LoRA, or in the first phase those of the connector."""
    if not settings.trains_connector:
        return adapter_parameters(shape, settings)
    return sum(weight.count for weight in shape.weights if _is_connector(weight.name))


def adapter_parameters(shape: ModelShape, settings: Train) -> int:
    """The number of parameters that LoRA adds: rank x (inputs + outputs) for each adapted module (arXiv:2106.09685)."""
    if settings.trains_connector:
        return 0
    return settings.rank * _adapted_sums(shape, settings.freeze_vision, _wanted_modules(settings)).sizes


def adapted_modules(shape: ModelShape, settings: Train) -> list[str]:
    """Paths of the linear modules that get LoRA, by the rules of ms-swift and PEFT.

    A frozen vision tower with its connector never gets LoRA; `all-linear` always leaves out the head and the connector.
    In the first phase, which trains the connector, no module gets LoRA.
    """
    if settings.trains_connector:
        return []
    return _matching_modules(shape, settings.freeze_vision, _wanted_modules(settings))


def _wanted_modules(settings: Train) -> str | tuple[str, ...]:
    """The value of `train.target_modules` as a key of a cache."""
    wanted = settings.target_modules
    return wanted if isinstance(wanted, str) else tuple(wanted)


@lru_cache(CACHED)
def _matching_modules(shape: ModelShape, freeze_vision: bool, wanted: str | tuple[str, ...]) -> list[str]:
    """Paths of the linear modules that `train.target_modules` matches."""
    linears = [name for name in shape.linears if not (freeze_vision and _is_vision_or_connector(name))]
    if isinstance(wanted, str):
        return [name for name in linears if re.fullmatch(wanted, name)]
    if "all-linear" in wanted:
        return [name for name in linears if not _is_connector(name) and not _is_head(name)]
    return [name for name in linears if any(name == one or name.endswith(f".{one}") for one in wanted)]


def gap_in_estimate(shape: ModelShape, settings: Train) -> str | None:
    """The part of the memory that the estimate of this training leaves out, as text; None if it leaves out nothing."""
    if settings.freeze_vision or not any(map(_is_vision_or_connector, adapted_modules(shape, settings))):
        return None
    return "activations of the adapted vision tower (train.freeze_vision is false)"


def _is_vision_or_connector(module: str) -> bool:
    """Whether a module is part of a vision tower or of a connector."""
    towers = {"visual", "vision_tower", "vision_tower_aux", "vision_model"}
    return bool(towers & set(module.split("."))) or _is_connector(module)


def _is_connector(module: str) -> bool:
    """Whether a module is part of the connector of LLaVA, Qwen2-VL or MGM."""
    names = ("multi_modal_projector", "mm_projector")
    return any(part in names or "merger" in part or part.startswith("vlm_uni_") for part in module.split("."))


@dataclass(frozen=True)
class _Sums:
    """Sums over the modules that get LoRA. Those in decoder layers count as often as a token passes them: of a mixture
    of experts, a token passes a few only."""

    sizes: int
    """Inputs and outputs of all adapted modules, each counted once."""
    passes: float
    """Adapted modules in decoder layers that one token passes."""
    inputs: float
    """Inputs of those."""
    adapts_mlp: bool
    """Whether they include an MLP's last module."""


_NO_SUMS = _Sums(0, 0, 0, False)


def _layer_sums(shape: ModelShape, settings: Train) -> _Sums:
    """The sums over the modules that get LoRA with these settings."""
    if settings.trains_connector:
        return _NO_SUMS
    return _adapted_sums(shape, settings.freeze_vision, _wanted_modules(settings))


@lru_cache(CACHED)
def _adapted_sums(shape: ModelShape, freeze_vision: bool, wanted: str | tuple[str, ...]) -> _Sums:
    """The sums over the modules that `_matching_modules` returns."""
    adapted = _matching_modules(shape, freeze_vision, wanted)
    in_layers = [name for name in adapted if _is_in_decoder_layer(name)]
    shares = {name: shape.active_experts if ".experts." in name else 1.0 for name in in_layers}
    widths = {shape.intermediate, shape.expert_intermediate}
    return _Sums(
        sizes=sum(sum(shape.linears[name]) for name in adapted),
        passes=sum(shares.values()),
        inputs=sum(share * shape.linears[name][0] for name, share in shares.items()),
        adapts_mlp=any(shape.linears[name][0] in widths for name in in_layers),
    )


@lru_cache(CACHED)
def _quantised_layer_sizes(shape: ModelShape) -> list[int]:
    """Number of weights of each quantised module in the decoder layers."""
    return [prod(shape.linears[name]) for name in shape.packed_modules if _is_in_decoder_layer(name)]


def _is_in_decoder_layer(linear: str) -> bool:
    """Whether a linear module is in a decoder layer: not the head, nor part of a vision tower or connector."""
    return not _is_vision_or_connector(linear) and not _is_head(linear)


def _is_head(module: str) -> bool:
    """Whether a module is the language-model head, by its name."""
    return module.rpartition(".")[2] == "lm_head"


def _connector_activations(shape: ModelShape, settings: Train) -> int:
    """Bytes per token that the connector keeps for its backward pass: inputs and outputs of its modules in float32.

    Every token counts as a token of a picture. 0 if the connector is not trained.
    """
    if not settings.trains_connector:
        return 0
    return FLOAT32 * sum(sum(sizes) for name, sizes in shape.linears.items() if _is_connector(name))


def _large_map_bytes(shape: ModelShape, settings: Train, micro_batch: int) -> tuple[int, int]:
    """Bytes that MGM keeps for the pictures of a micro-batch, one per sample, and bytes that reading one picture takes.

    MGM reads them one by one. Both are 0 for other models, whose pictures are small compared with their tokens.
    """
    if shape.vision_aux is None:
        return 0, 0
    tower = shape.vision_aux
    size = (tower["image_size"] // tower["patch_size"]) ** 2 * sum(tower["hidden_sizes"])
    if not settings.trains_connector:
        return 0, MGM_READS * size
    return MGM_KEEPS[settings.gradient_checkpointing] * micro_batch * size, MGM_READS_BACK * size


def _weight_bytes(shape: ModelShape, settings: Train, size: int, sharding: str, gpus: int) -> int:
    """Bytes of the frozen base on one GPU; under ZeRO-3, its share and the weights that the GPU gathers at a time.

    `size` is the number of bytes of a weight in the base's data type. Weights that are stored as integers (GPTQ) keep
    their stored size. The connector is not counted if it is trained.
    """
    in_4bit = settings.load_in_4bit and shape.quantisation is None
    total = _base_bytes(shape, size, in_4bit, settings.trains_connector)
    if sharding != "zero3" or gpus == 1:
        return round(total)
    # ZeRO-3 gathers a layer at a time, together with the head, the embeddings or the next layers
    layer, largest = _gathered_sizes(shape)
    return round(total / gpus) + size * (max(ZERO3_LIVE, largest) + max(ZERO3_PREFETCH, layer))


@lru_cache(CACHED)
def _base_bytes(shape: ModelShape, size: int, in_4bit: bool, without_connector: bool) -> float:
    """Bytes of the frozen base on one GPU that has all of it; `size` as in `_weight_bytes`."""
    packed = {name for name in shape.linears if not _is_head(name)} if in_4bit else set()
    total = 0.0
    for weight in shape.weights:
        if without_connector and _is_connector(weight.name):
            continue  # in float32, with the trained parameters
        if weight.name.rpartition(".")[0] in packed and len(weight.shape) == 2:
            total += weight.count * NF4_BYTES
        elif weight.dtype.startswith(("F", "BF")):
            total += weight.count * size
        else:
            total += weight.stored_bytes
    return total


@lru_cache(CACHED)
def _gathered_sizes(shape: ModelShape) -> tuple[int, int]:
    """Number of weights of the linear modules of an average decoder layer, and of the largest tensor."""
    in_layers = sum(prod(sizes) for name, sizes in shape.linears.items() if _is_in_decoder_layer(name))
    return in_layers // shape.layers, max(weight.count for weight in shape.weights)


def _layer_activations(shape: ModelShape, settings: Train, size: int, micro_batch: int, length: int) -> int:
    """Bytes per token that one decoder layer keeps for its backward pass.

    `size` is the number of bytes of a value in the base's data type.
    """
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norms = 2 * FLOAT32 * shape.hidden  # two, each keeps its input in float32
    attention = size * (2 * queries + 2 * keys)  # query, key, value, output
    if micro_batch > 1:
        # samples of different lengths need a mask, with which keys and values are repeated for each head
        attention += size * 2 * (queries - keys)
    mlp = 3 * size * shape.intermediate  # gate, its activation, up
    adapted = _layer_sums(shape, settings)
    # LoRA casts its input to float32 and autocast casts it back: a copy per module; dropout keeps a mask of one byte
    copies = (size + bool(settings.dropout)) * int(adapted.inputs) // shape.layers
    return norms + attention + mlp + copies + int(2 * size * settings.rank * adapted.passes) // shape.layers


def _layer_working_set(shape: ModelShape, settings: Train, sharding: str) -> int:
    """Bytes per token that the backward pass of one layer needs besides the activations that the layer kept.

    The tensors of the MLP take most of them.
    """
    # without sharding LoRA is in float32, and so are the gradients through it
    in_float32 = _layer_sums(shape, settings).adapts_mlp and sharding == "none"
    return 12 * shape.intermediate if in_float32 else 6 * shape.intermediate + 4 * shape.hidden
