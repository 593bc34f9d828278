"""Estimates the memory that training an adapter or a connector takes on each GPU, from the model's shape alone.

It counts one by one the tensors that a pass keeps in a decoder layer as `stages/train` runs it: fused norms, packed
attention, LoRA and a gated MLP in one autograd function each, and logits in chunks. Without a GPU, and before compute
capability 8.0, norms also keep float32 copies, which are not counted. Constants without a source were measured on an
H200 (docs/measurements.md). Sizes are in bytes.
"""

import re
from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache
from math import ceil, prod

from stages.contract.recipe import Recipe, Train
from stages.hardware.step import StepPlan, rounded_up
from stages.models.shape import ModelShape

FLOAT32 = 4

CACHED = 16
"""Results kept of each function that depends on a shape and few settings. A plan estimates hundreds of ways, and a
mixture of experts has 19,000 tensors."""

FRAMEWORK = 862_000_000
"""CUDA context with the kernels that training loads (795 MB), and cuBLAS' two workspaces (67 MB)."""
NCCL = 1_000_000_000
"""NCCL's buffers and channels for each process in a group; measured with a group of one."""

ZERO3_LIVE = 500_000_000
"""Weights that a GPU gathers at a time under ZeRO-3, if the current layer is smaller: 1 GB in 16 bits, two layers of a
7B model. DeepSpeed's default of 1 billion would take 2 GB."""
ZERO3_PREFETCH = 250_000_000
"""Weights that ZeRO-3 prefetches, 0.5 GB in 16 bits: one whole layer of a 7B model."""

LOGITS = 128 * 1024**2
"""Most logits that are computed at a time (stages/train/head.py)."""
LEAST_RANK = 16
"""Rank to which LoRA's products are padded at least (stages/train/kernels.py)."""

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
    mean: float | None = None
    """Mean length of a sample; None: all are as long as the longest."""
    deviation: float = 0.0
    """Standard deviation of the lengths."""
    shortest: int = 1
    """At most the length of the shortest sample."""

    def of_a_step(self, step: StepPlan) -> int:
        """The tokens that hardly a step exceeds on one process.

        The samples of a step exceed their mean by three standard deviations in one step of a thousand.
        """
        samples = step.samples_of_a_process
        together = samples * self.longest
        if self.mean is not None:
            together = min(together, ceil(samples * self.mean + 3 * samples**0.5 * self.deviation))
        return max(self.longest, together)

    def largest_pass(self, step: StepPlan) -> int:
        """The tokens that hardly a pass exceeds: as many as it may have, or those of a step.

        A pass has whole samples: if all are of about the same length, it is not full.
        """
        budget = max(step.pass_tokens, self.longest)
        most_samples = max(budget // self.shortest, 1)
        return min(budget, self.of_a_step(step), most_samples * self.longest)

    def samples(self, tokens: int) -> int:
        """The number of samples of mean length in a pass of so many tokens."""
        return max(round(tokens / min(self.mean or self.longest, self.longest)), 1)

    def learnt(self, tokens: int) -> int:
        """The most learnt tokens of such a pass."""
        return min(self.samples(tokens) * self.answer, tokens)


def max_lengths(recipe: Recipe) -> Lengths:
    """The longest samples that the recipe allows, for an estimate before preprocess has run.

    A sample has train.max_length tokens, of which infer.max_new_tokens are the answer.
    """
    longest = recipe.train.max_length
    return Lengths(longest, min(longest, recipe.infer.max_new_tokens))


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
    shape: ModelShape, settings: Train, step: StepPlan, dtype: str, sharding: str, lengths: Lengths
) -> Estimate:
    """The estimated peak memory of training on one GPU.

    `dtype` is the frozen base's; `sharding` is `none` or `zero3`. The peak is the maximum of four moments: the
    loss, with the activations of all layers and a chunk of logits; the backward pass of the last layer, and that of the
    last checkpointed one, each with a layer's working set; and the reading of MGM's pictures.
    """
    size = FLOAT32 if dtype == "float32" else 2
    tokens = rounded_up(lengths.largest_pass(step))
    adapter = trained_parameters(shape, settings)
    held = gradients = adapter * FLOAT32  # ZeRO-3 shards the base alone
    moments = adapter * FLOAT32 * 2

    connector = _connector_activations(shape, settings) * tokens
    of_pictures, reading = _large_map_bytes(shape, settings, step, lengths.samples(tokens))
    connector += of_pictures
    hidden = size * shape.hidden * tokens
    layer = _layer_activations(shape, settings, size) * tokens
    # autograd keeps the unpacked weights of quantised modules without LoRA, for any number of tokens
    without = _packed_without_lora(shape, settings.freeze_vision, _wanted_modules(settings))
    layer += size * without // shape.layers
    working = _layer_working_set(shape, settings, size) * tokens + _unpacked_module(shape, settings, dtype, size)
    checkpointed = min(step.checkpointed_layers, shape.layers)
    inputs = checkpointed * hidden  # a checkpointed layer keeps its input alone
    kept = inputs + (shape.layers - checkpointed) * layer
    # the input and the output of the last norm, and hidden states with their gradients where something is learnt
    learnt = lengths.learnt(tokens)
    of_logits = min(learnt * shape.vocabulary, max(LOGITS, shape.vocabulary)) * size
    at_loss = (kept + connector + 2 * hidden + 2 * size * shape.hidden * learnt, of_logits)
    in_last = (kept + connector + working, 0)
    # by then the other layers have given back what they kept
    in_checkpointed = (inputs + connector + layer - hidden + working if checkpointed else 0, 0)
    at_pictures = (connector + reading, 0)
    activations, of_logits = max(at_loss, in_last, in_checkpointed, at_pictures, key=sum)

    weights = _weight_bytes(shape, settings, size, sharding, step.processes)
    return Estimate(
        weights=weights,
        adapter=held,
        gradients=gradients,
        optimizer=moments,
        activations=activations,
        logits=of_logits,
        framework=FRAMEWORK + (NCCL if step.processes > 1 else 0),
        fragmentation=round(FRAGMENTS_SHARE * (held + moments + gradients + activations + of_logits)),
    )


def trained_parameters(shape: ModelShape, settings: Train) -> int:
    """The number of parameters that get gradients: those of LoRA, or in the first phase those of the connector."""
    if not settings.trains_connector:
        return adapter_parameters(shape, settings)
    return sum(weight.count for weight in shape.weights if is_connector(weight.name))


def adapter_parameters(shape: ModelShape, settings: Train) -> int:
    """The number of parameters that LoRA adds: rank x (inputs + outputs) for each adapted module (arXiv:2106.09685)."""
    if settings.trains_connector:
        return 0
    return settings.rank * _adapted_sums(shape, settings.freeze_vision, _wanted_modules(settings)).sizes


def adapted_modules(shape: ModelShape, settings: Train) -> list[str]:
    """Paths of the linear modules that get LoRA, by the rules of PEFT.

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
    linears = [name for name in shape.linears if not (freeze_vision and is_vision_or_connector(name))]
    if isinstance(wanted, str):
        return [name for name in linears if re.fullmatch(wanted, name)]
    if "all-linear" in wanted:
        return [name for name in linears if not is_connector(name) and not _is_head(name)]
    return [name for name in linears if any(name == one or name.endswith(f".{one}") for one in wanted)]


def gap_in_estimate(shape: ModelShape, settings: Train) -> str | None:
    """The part of the memory that the estimate of this training leaves out, as text; None if it leaves out nothing."""
    if settings.freeze_vision or not any(map(is_vision_or_connector, adapted_modules(shape, settings))):
        return None
    return "activations of the adapted vision tower (train.freeze_vision is false)"


def is_vision_or_connector(module: str) -> bool:
    """Whether a module is part of a vision tower or of a connector."""
    towers = {"visual", "vision_tower", "vision_tower_aux", "vision_model"}
    return bool(towers & set(module.split("."))) or is_connector(module)


def is_connector(module: str) -> bool:
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
    shares: dict[str, float]
    """By name of a module in a decoder layer, such as `q_proj`: the share of layers in which it has LoRA."""


_NO_SUMS = _Sums(0, 0, {})


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
    counts = Counter(name.rpartition(".")[2] for name in in_layers)
    return _Sums(
        sizes=sum(sum(shape.linears[name]) for name in adapted),
        passes=sum(shape.active_experts if ".experts." in name else 1.0 for name in in_layers),
        shares={name: min(count / shape.layers, 1.0) for name, count in counts.items()},
    )


@lru_cache(CACHED)
def _largest_module(shape: ModelShape, packed: bool) -> int:
    """Number of weights of the largest linear module in the decoder layers; of those that are stored as packed
    integers, with `packed`."""
    names = shape.packed_modules if packed else shape.linears
    return max((prod(shape.linears[name]) for name in names if _is_in_decoder_layer(name)), default=0)


@lru_cache(CACHED)
def _packed_without_lora(shape: ModelShape, freeze_vision: bool, wanted: str | tuple[str, ...]) -> int:
    """Number of weights of the packed modules in the decoder layers that get no LoRA."""
    others = shape.packed_modules - set(_matching_modules(shape, freeze_vision, wanted))
    return sum(prod(shape.linears[name]) for name in others if _is_in_decoder_layer(name))


def _unpacked_module(shape: ModelShape, settings: Train, dtype: str, size: int) -> int:
    """Bytes that unpacking the largest quantised module of a decoder layer takes: its weights, and what makes them.

    0 if the base is not quantised. `size` is the number of bytes of a weight in `dtype`.
    """
    if settings.load_in_4bit:
        return size * _largest_module(shape, packed=False)
    return (size + UNPACKING[dtype]) * _largest_module(shape, packed=True)


def _is_in_decoder_layer(linear: str) -> bool:
    """Whether a linear module is in a decoder layer: not the head, nor part of a vision tower or connector."""
    return not is_vision_or_connector(linear) and not _is_head(linear)


def _is_head(module: str) -> bool:
    """Whether a module is the language-model head, by its name."""
    return module.rpartition(".")[2] == "lm_head"


def _connector_activations(shape: ModelShape, settings: Train) -> int:
    """Bytes per token that the connector keeps for its backward pass: inputs and outputs of its modules in float32.

    Every token counts as a token of a picture. 0 if the connector is not trained.
    """
    if not settings.trains_connector:
        return 0
    return FLOAT32 * sum(sum(sizes) for name, sizes in shape.linears.items() if is_connector(name))


def _large_map_bytes(shape: ModelShape, settings: Train, step: StepPlan, pictures: int) -> tuple[int, int]:
    """Bytes that MGM keeps for the pictures of a pass, one per sample, and bytes that reading one picture takes.

    MGM reads them one by one. Both are 0 for other models, whose pictures are small compared with their tokens.
    """
    if shape.vision_aux is None:
        return 0, 0
    tower = shape.vision_aux
    size = (tower["image_size"] // tower["patch_size"]) ** 2 * sum(tower["hidden_sizes"])
    if not settings.trains_connector:
        return 0, MGM_READS * size
    return MGM_KEEPS[step.checkpointed_layers >= shape.layers] * pictures * size, MGM_READS_BACK * size


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
        if without_connector and is_connector(weight.name):
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


ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj")
"""Names of the linear modules that read a decoder layer's norms."""


def _layer_activations(shape: ModelShape, settings: Train, size: int) -> int:
    """Bytes per token that one decoder layer keeps for its backward pass; the mean over the layers.

    `size` is the number of bytes of a value in the base's data type.
    """
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sums = _layer_sums(shape, settings)
    share = sums.shares
    fused = _fused_share(shape, share)
    norms: float = 2 * shape.hidden  # what they read
    for readers in (ATTENTION_INPUTS, MLP_INPUTS):  # what they write is kept once for all LoRA modules that read it
        norms += shape.hidden * max(share.get(name, 0.0) for name in readers)
    attention = 2 * queries + 2 * keys  # query, key, value, output
    # gate and up; unless fused with LoRA, also the activated gate, and their product if `down_proj` has LoRA
    mlp = shape.intermediate * (2 + (1 - fused) + (share.get("down_proj", 0.0) - fused))
    inner = max(settings.rank, LEAST_RANK) * sums.passes / shape.layers  # products with LoRA's A
    in_float32 = 2 + shape.heads  # of each norm the scale, of each head the softmax's sum
    return round(size * (norms + attention + mlp + inner) + FLOAT32 * in_float32)


def _layer_working_set(shape: ModelShape, settings: Train, size: int) -> int:
    """Bytes per token that the backward pass of one layer needs besides the activations that the layer kept.

    Most are gradients in the MLP: if it is fused with LoRA, those of gate and up take the place of gate and up. The
    others are those of the layer's output, of the MLP's input and of the hidden states.
    """
    fused = _fused_share(shape, _layer_sums(shape, settings).shares)
    return size * (shape.intermediate * (1 if fused == 1 else 3) + 3 * shape.hidden)


def _fused_share(shape: ModelShape, share: dict[str, float]) -> float:
    """The share of decoder layers whose gated MLP is fused with the LoRA on its three modules (SwiGLU only)."""
    if shape.activation != "silu":
        return 0.0
    return min(share.get(name, 0.0) for name in ("gate_proj", "up_proj", "down_proj"))
