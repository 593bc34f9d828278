"""What is trained: a base with LoRA or with its connector, the trained weights by name, and the passes that add up
their gradients."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from stages.contract.errors import LorryError
from stages.models.connector import FILE as CONNECTOR_FILE
from stages.models.connector import names_in_files
from stages.models.head import Head
from stages.train.attention import PLAIN, choose_kernel, own_attention, use_packed_attention, warn_of_order
from stages.train.dropout import Dropout
from stages.train.lora import ADAPTER, LoraLinear, Pass, fuse, has_kernels
from stages.train.passes import PassTensors, Vision, hidden_states, own_sums, padded, pass_sums, pass_tensors
from stages.train.samples import TokenSequence
from stages.train.sharding import ShardedBase, gathered
from stages.train.vision import text_decoder

T = TypeVar("T")

OWN = "the model's own"
"""In place of an attention kernel's name."""

WEIGHTS = "adapter_model.safetensors"

MOST_GRAPHS = 64
"""Shapes of passes that are kept captured: those used last."""

CAPTURED_TOKENS = 6144
"""Passes are captured if none has more tokens than this. In a longer one the card computes longer than the host
launches: measured on an H200 with a 7B's shape, passes of 2,500 tokens take 0.12 s captured and 0.20 to 0.28 s
launched; of 8,000, 0.43 s both."""

CAPTURED = ("flash-attn-4", "flash-attn", "varlen")
"""Attention kernels whose passes are captured."""

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Prepared:
    """A pass that is ready to run: its tensors on the CPU, and the length of its longest sequence in tokens."""

    tensors: PassTensors
    longest: int
    sequences: int


class Trainee:
    """A model of transformers with some trained weights, ready to train on packs."""

    def __init__(
        self,
        model: Any,
        weights: dict[str, torch.nn.Parameter],
        vision: Vision | None = None,
        dropout: float = 0.0,
        autocast: torch.dtype | None = None,
        sharded: ShardedBase | None = None,
    ) -> None:
        """Choose the attention of a model. Its layers are those that training computes with.

        `weights` are the trained weights by their names in the finished file. `vision`: how a vision-language model
        reads pictures. `dropout` is LoRA's probability. `autocast`: the type to compute in, if the trained weights have
        another. `sharded`: the base, if its weights are sharded over the processes.
        """
        self.sharded = sharded
        self.model, self.weights, self.vision = model, weights, vision
        self.device = next(iter(weights.values())).device
        self.layers, self._dropout, self._autocast = Pass(), dropout, autocast
        self.kernel, self._why_not_faster = self._choose_attention()
        """The name of the attention kernel."""
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        """Sum of the losses and number of right tokens in the passes of this step."""
        self.why_one_by_one = "ms-swift reads this model's pictures" if self._is_read_by_swift else None
        """Why each pass has one sequence; None if it may have several. `check` decides it."""
        self.pass_tokens = 0
        """Most tokens of a pass: passes are captured if all are short."""
        self._graphs: dict[Shape, _Captured] = {}
        self._pads = self.kernel in CAPTURED and sharded is None and not has_own_dropout(model)
        self._captures = self._pads
        self._is_warm = False  # whether the first pass has compiled the kernels, which a capture cannot do
        self._pool: Any = None
        self._attention = use_packed_attention(model, self.kernel) if self.packs else None
        if self.device.type == "cuda":
            warn_of_order()
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    @property
    def _is_read_by_swift(self) -> bool:
        """Whether each sample goes through the model's own forward pass."""
        return self.vision is not None and self.vision.placeholder is None

    @property
    def packs(self) -> bool:
        """Whether a pass may have several sequences."""
        return self.why_one_by_one is None

    @property
    def attention_facts(self) -> dict[str, Any]:
        """For the manifest: the attention kernel, why not a faster one, what is computed without a kernel, and why
        samples are not packed. What is empty is left out."""
        facts = {
            "kernel": self.kernel,
            "not faster": self._why_not_faster,
            "without a kernel": sorted(self._attention.without_kernel) if self._attention else [],
            "one sample a pass": self.why_one_by_one,
        }
        return {what: value for what, value in facts.items() if value}

    @property
    def _placeholder(self) -> int | None:
        """The token of a picture; None for a text-only model."""
        return self.vision.placeholder if self.vision else None

    def _choose_attention(self) -> tuple[str, list[str]]:
        """The name of the attention kernel, and why each faster one is not used."""
        if self._is_read_by_swift:
            return OWN, []
        if self.device.type == "cpu":
            return PLAIN, []
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        dtype = self._autocast or self.model.dtype
        has_window = bool(getattr(config, "sliding_window", None))
        return choose_kernel(torch.cuda.get_device_capability(self.device), heads, key_heads, size, dtype, has_window)

    def check(self, alone: Sequence[torch.Tensor], probes: Sequence[TokenSequence]) -> None:
        """Compare a pack of these sequences with the model's own outputs, `alone`, which `hidden_alone` returned for
        each before this object was made. If they differ, from now on each pass has one sequence and the model's own
        attention. Raises LorryError if its layers give other outputs even then.

        They differ for layers that carry a state from token to token, and for attention with a mask of its own. Windows
        that are longer than the probes count as a difference if the model has them only in its masks.
        """
        self.why_one_by_one = self._pack_problem(alone, probes)
        if not self.packs:
            self.kernel, self._why_not_faster = OWN, []
            self.model.set_attn_implementation(own_attention(self.model.config))
            off = largest_difference([self._hidden([probe]) for probe in probes], alone)
            if off > most_difference(alone[0].dtype):
                raise LorryError(
                    f"{self.model.config.name_or_path}: its layers compute something else in training (off by"
                    f" {off:.1%}), which is a fault of Lorry; report it with the model's config.json"
                )

    def _pack_problem(self, alone: Sequence[torch.Tensor], probes: Sequence[TokenSequence]) -> str | None:
        """Why a pass may not have several sequences, for `check`; None if it may."""
        forward = inspect.signature(text_decoder(self.model).forward).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in forward):
            return "the model does not pass on where samples begin"
        mine = [self._hidden([probe]) for probe in probes]
        packed = self._hidden(probes).split([probe.length for probe in probes])
        noise, worst = largest_difference(mine, alone), largest_difference(packed, alone)
        most = most_difference(alone[0].dtype)
        if noise > most or worst > max(most / 8, 1.5 * noise):  # a pack may not add to what 16 bits differ by
            return f"a pack of samples differs by {worst:.1%} from the samples alone ({noise:.1%} in packs of one)"
        lost = self._attention.lost_windows if self._attention else set()
        return f"only the model's masks know its window of {min(lost)} tokens" if lost else None

    @torch.no_grad()
    def _hidden(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """The last hidden states of packed sequences, without dropout; shape [tokens, size]."""
        self.layers.dropout = None
        prepared = self.prepare(sequences, None)
        context = torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()
        with context:
            tensors = prepared.tensors.to(self.device)
            longest = prepared.longest if self.packs else None
            return run_pass(self.sharded, lambda: hidden_states(self.model, tensors, longest, self._placeholder))

    def prepare(self, sequences: Sequence[TokenSequence], keys: Sequence[int] | None) -> Prepared:
        """Read a pass of packed sequences, with their pictures; a thread of its own may do it ahead.

        `keys` are the sequences' keys for dropout; None: nothing is dropped. Raises DataError for a picture that cannot
        be read.
        """
        longest = max(sequence.length for sequence in sequences)
        return Prepared(pass_tensors(sequences, keys, self.vision), longest, len(sequences))

    def add_gradients(self, prepared: Prepared, factor: float) -> None:
        """Add the gradients of a pass's summed loss, times `factor`, to those of the weights, and its figures to
        `sums`."""
        tensors, longest = prepared.tensors, prepared.longest
        # what the kernel does not know is computed sequence by sequence, whose number cannot be read in a capture
        knows_all = self.packs and not (self._attention and self._attention.without_kernel)
        if self._pads and knows_all and self.pass_tokens <= CAPTURED_TOKENS:
            if tensors.pictures or len(tensors.tokens) > CAPTURED_TOKENS:
                self._stop_capturing()  # such a pass is launched, in memory besides that of the graphs
            else:
                # few shapes: room for longer sequences costs nothing, nor does room for more of them, but for
                # FlashAttention 2's backward pass. A pass that is not captured is padded too, for the same bits
                room = max(32 if self.kernel == "flash-attn-4" else 2, 1 << prepared.sequences.bit_length())
                tensors, longest = padded(tensors, room), CAPTURED_TOKENS
                shape = len(tensors.tokens), len(tensors.targets), room
                if self._captures and self._is_warm and (shape in self._graphs or self._capture(shape, tensors)):
                    self._replay(shape, tensors, factor)
                    return
        self._run(tensors.to(self.device), longest, torch.full((), factor, device=self.device))
        self._is_warm = True

    def _run(self, tensors: PassTensors, longest: int, factor: torch.Tensor) -> None:
        """Run a pass forward and backward."""
        self.layers.dropout = Dropout(self._dropout, tensors.rows) if self._dropout else None
        loss, right = self._forward(tensors, longest)
        (loss * factor).backward()
        self.sums += torch.stack([loss.detach(), right])

    def _forward(self, tensors: PassTensors, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a pass forward. Returns the sum of its losses and the number of right tokens."""
        context = torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()
        with context:
            if self._is_read_by_swift:
                return own_sums(self.model, tensors)
            # the head is read each time: LoRA may replace it after this object is made
            head, most = Head.of(self.model, self.sharded is not None), longest if self.packs else None
            return run_pass(self.sharded, lambda: pass_sums(self.model, head, tensors, most, self._placeholder))

    def _replay(self, shape: Shape, tensors: PassTensors, factor: float) -> None:
        """Run a pass as the graph of its shape."""
        captured = self._graphs.pop(shape)
        self._graphs[shape] = captured  # the last one, as the one used last
        captured.tensors.copy_from(tensors.to(self.device))
        captured.factor.fill_(factor)
        captured.graph.replay()

    def _capture(self, shape: Shape, tensors: PassTensors) -> bool:
        """Capture a pass of a shape, without running it. Returns whether it could be: without the memory, or with a
        model that reads numbers back from the GPU, it cannot, and then no pass is captured from here on.

        All graphs share one memory, that of the longest. `torch.cuda.graph` first frees what launched passes have left.
        """
        captured = _Captured(torch.cuda.CUDAGraph(), tensors.to(self.device), torch.ones((), device=self.device))
        torch.cuda.synchronize()
        stream, problem = torch.cuda.current_stream(self.device), ""
        try:
            # other threads, such as NCCL's, may call the driver meanwhile
            with torch.cuda.graph(captured.graph, pool=self._pool, capture_error_mode="thread_local"):
                self._run(captured.tensors, CAPTURED_TOKENS, captured.factor)
        except RuntimeError as error:
            problem = " ".join(str(error).split())[:300]
        if problem:  # out here the failed pass is freed, which the error's traceback held
            print(f"passes are launched kernel by kernel, as one could not be captured: {problem}", flush=True)
            torch.cuda.set_stream(stream)  # torch leaves its own only after a capture that ended well
            del captured
            self._stop_capturing()
            return False
        self._pool = self._pool or captured.graph.pool()
        self._graphs[shape] = captured
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return True

    def _stop_capturing(self) -> None:
        """Launch all passes from here on, kernel by kernel."""
        if self._captures:
            self._captures = False
            self._graphs.clear()
            torch.cuda.empty_cache()

    @torch.no_grad()
    def loss(self, sequences: Sequence[TokenSequence]) -> tuple[float, float]:
        """The sum of the losses of the learnt tokens of packed sequences, and the number of right tokens, without
        dropout."""
        self.layers.dropout = None
        prepared = self.prepare(sequences, None)
        loss, right = self._forward(prepared.tensors.to(self.device), prepared.longest)
        if self.sharded is not None:
            self.sharded.release()
        return float(loss), float(right)

    def save(self, folder: Path) -> None:
        """Write the trained weights into a folder, in the form of the finished file."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Read the weights that `save` wrote."""
        raise NotImplementedError


class LoraTrainee(Trainee):
    """A base with LoRA."""

    def __init__(
        self,
        model: PeftModel,
        dropout: float,
        vision: Vision | None = None,
        sharded: ShardedBase | None = None,
    ) -> None:
        """Fuse the layers of a model that `peft.get_peft_model` returned. `dropout` is LoRA's probability."""
        self._peft = model
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        weights = {name.replace(f".{ADAPTER}", ""): weight for name, weight in trained.items()}
        super().__init__(model.get_base_model(), weights, vision, dropout, sharded=sharded)
        fuse(model, self.layers)
        if sharded is not None:
            for module in list(model.modules()):
                if isinstance(module, LoraLinear):
                    module.hide_weights()
        if has_kernels(self.device) and self.packs:
            from stages.train.fused import fuse_elementwise  # imports Triton, which a CPU need not have

            for part in [model] if sharded is None else sharded.layers:
                with nullcontext() if sharded is None else gathered(part):
                    fuse_elementwise(part, self.layers)

    def save(self, folder: Path) -> None:
        """Write the adapter into a folder, as PEFT does."""
        _write_weights(self.weights, folder / WEIGHTS)
        config: Any = self._peft.peft_config[ADAPTER]
        config.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Read the adapter that `save` wrote."""
        _read_weights(self.weights, folder / WEIGHTS)


class ConnectorTrainee(Trainee):
    """A vision-language model whose connector is trained in float32, and nothing else."""

    def __init__(self, model: Any, connector: list[str], folder: Path, vision: Vision) -> None:
        """`connector` has the names of the model's connector weights, `folder` its files. Raises UsageError if a
        weight is in none of them."""
        dtype = model.dtype
        model.requires_grad_(False)
        in_files = names_in_files(folder, connector)
        parameters = dict(model.named_parameters())
        for name in connector:
            parameters[name].data = parameters[name].data.float()
            parameters[name].requires_grad_(True)
        weights = {in_files[name]: parameters[name] for name in connector}
        super().__init__(model, weights, vision, autocast=None if dtype == torch.float32 else dtype)

    def save(self, folder: Path) -> None:
        """Write the connector into a folder, its weights in float32 and named as in the base's own files."""
        _write_weights(self.weights, folder / CONNECTOR_FILE, {"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read the connector that `save` wrote."""
        _read_weights(self.weights, folder / CONNECTOR_FILE)


def _write_weights(weights: dict[str, torch.nn.Parameter], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write weights by name to a safetensors file."""
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path, metadata)


def most_difference(dtype: torch.dtype) -> float:
    """How far `largest_difference` may be between two kernels of the same model: in 16 bits, over many layers, some
    percent (5.9% were measured with 28 random layers in bfloat16)."""
    return 1e-3 if dtype == torch.float32 else 0.15


def largest_difference(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest norm of a difference between two tensors, as a share of the wanted one's."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one.float() - other.float()).norm() / other.float().norm()) for one, other in pairs)


def has_own_dropout(model: Any) -> bool:
    """Whether a base drops something itself in training, by the names in its config (`attention_dropout`,
    `resid_pdrop`)."""
    config: dict[str, Any] = model.config.get_text_config().to_dict()
    return any(bool(value) for name, value in config.items() if "dropout" in name or name.endswith("pdrop"))


@torch.no_grad()
def _read_weights(weights: dict[str, torch.nn.Parameter], path: Path) -> None:
    """Set weights to those that `_write_weights` wrote."""
    saved = load_file(path)
    for name, weight in weights.items():
        weight.copy_(saved[name])


def run_pass(sharded: ShardedBase | None, compute: Callable[[], T]) -> T:
    """Do the work of one pass over a model, forward. `sharded` is its base, if that is sharded."""
    return compute() if sharded is None else sharded.run(compute)


@torch.no_grad()
def hidden_alone(
    model: Any, vision: Vision | None, probes: Sequence[TokenSequence], sharded: ShardedBase | None = None
) -> list[torch.Tensor]:
    """The last hidden states of each sequence alone, [length, size], by the model's own attention.

    `sharded` is the model's base, if that is sharded.
    """
    device = next(model.parameters()).device
    found = []
    for probe in probes:
        tensors = pass_tensors([probe], None, vision).to(device)
        placeholder = vision.placeholder if vision else None
        found.append(run_pass(sharded, partial(hidden_states, model, tensors, None, placeholder)))
    return found


class _Captured:
    """A captured pass with the tensors that it reads."""

    def __init__(self, graph: Any, tensors: PassTensors, factor: torch.Tensor) -> None:
        self.graph, self.tensors, self.factor = graph, tensors, factor
