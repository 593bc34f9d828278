"""The training loop: steps of packed passes, one all-reduce of the gradients a step, AdamW.

A step's loss is the mean over the learnt tokens of all its samples, whatever the number of passes and processes. Every
process knows all samples of a step, so it knows that number without asking. Processes meet twice a step: to add up the
gradients, and to exchange losses and stop requests. Nothing is random but what the seed, the step and the sample decide
(`dropout.py`), so a checkpoint needs no random states.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from stages.contract.errors import UsageError
from stages.contract.stop import StopRequest
from stages.train.ahead import ahead
from stages.train.checkpoints import Checkpoints, State
from stages.train.dropout import sample_key
from stages.train.job import Job, Progress
from stages.train.packing import Steps, level, pack
from stages.train.samples import Samples, TokenSequence
from stages.train.schedule import rate_factor
from stages.train.together import Together
from stages.train.trainee import Prepared, Trainee


@dataclass
class TokenMean:
    """A mean over learnt tokens."""

    losses: float = 0.0
    """Sum of the tokens' losses."""
    tokens: float = 0.0
    right: float = 0.0
    """Number of tokens that the model would have chosen."""

    def add(self, losses: float, tokens: float, right: float) -> None:
        """Add tokens: the sum of their losses, their number, and the number of those that the model would choose."""
        self.losses += losses
        self.tokens += tokens
        self.right += right

    @property
    def loss(self) -> float:
        """The mean loss per token. Raises ZeroDivisionError if no token was added."""
        return self.losses / self.tokens

    @property
    def accuracy(self) -> float:
        """The share of right tokens. Raises ZeroDivisionError if no token was added."""
        return self.right / self.tokens


@dataclass
class Gradients:
    """The gradients of all trained weights, in one float32 tensor: one all-reduce, one norm, one reset."""

    weights: Sequence[torch.nn.Parameter]
    flat: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Make each weight's gradient a part of the flat tensor, in which the backward pass adds up."""
        self.flat = torch.zeros(sum(weight.numel() for weight in self.weights), device=self.weights[0].device)
        parts = self.flat.split([weight.numel() for weight in self.weights])
        for weight, part in zip(self.weights, parts, strict=True):
            weight.grad = part.view(weight.shape)

    def reduce(self, processes: int) -> None:
        """Add up the gradients of all processes, in each of them."""
        if processes > 1:
            dist.all_reduce(self.flat)

    def clip(self, largest: float) -> float:
        """Scale the gradients down to a norm of at most `largest`. Returns the norm before that."""
        norm = self.flat.norm()
        self.flat.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
        return float(norm)


@dataclass
class LossScale:
    """The factor that keeps float16's small gradients from vanishing; as torch's GradScaler with its defaults."""

    value: float = 2.0**16
    good_steps: int = 0
    """Steps without an overflow since the last change."""

    def update(self, overflowed: bool) -> None:
        """Halve the scale after an overflow; double it after 2,000 steps without one."""
        if overflowed:
            self.value, self.good_steps = self.value / 2, 0
            return
        self.good_steps += 1
        if self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0


@dataclass(frozen=True)
class _Planned:
    """A pass of one process, or the end of a step."""

    targets: int
    """Tokens with a loss in the whole step, over all processes."""
    tokens: int
    """Tokens in the whole step."""
    sequences: list[TokenSequence] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


class Loop:
    """One training, from its first or its last saved step to its end."""

    def __init__(
        self,
        job: Job,
        trainee: Trainee,
        samples: Samples,
        validation: Samples,
        together: Together,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        """`samples` and `validation` are all samples of the adapter; every process gets the same."""
        self._job, self._trainee = job, trainee
        self._samples, self._validation = samples, validation
        self._together, self._progress, self._stop = together, progress, stop
        settings = job.settings
        self.steps = Steps(len(samples), settings.effective_batch, settings.epochs, job.seed)
        self.state = State()
        self._gradients = Gradients(list(trainee.weights.values()))
        self._optimizer = make_optimizer(trainee, settings.learning_rate, settings)
        self._scale = LossScale() if job.dtype == "float16" else None
        self._checkpoints = Checkpoints(job, together)
        self._since_log, self._since_start = TokenMean(), TokenMean()

    def resume(self, checkpoint: Any) -> None:
        """Restore weights, optimizer and state from a checkpoint's folder."""
        self.state = self._checkpoints.load(checkpoint, self._trainee, self._optimizer)
        if self._scale is not None and self.state.loss_scale:
            self._scale = LossScale(*self.state.loss_scale)

    def run(self) -> None:
        """Train until the last step. Raises InterruptedRunError after a stop, when a checkpoint is saved.

        Raises UsageError if training diverges.
        """
        settings, job = self._job.settings, self._job
        self._progress.during, self._progress.step = "training", self.state.step
        if self._is_evaluation_due() and not self._was_evaluated():
            self._evaluate()  # the last start ended between the checkpoint and its evaluation
        self._trainee.model.train()
        passes = ahead(self._read, self._passes())
        while self.state.step < self.steps.total:
            began = time.monotonic()
            rate = settings.learning_rate * rate_factor(self.state.step, self.steps.total, settings.warmup_ratio)
            losses, learnt, right, tokens = self._accumulate(passes)
            norm, skipped = self._update(rate)
            self.state.step += 1
            stops, losses, right = self._together.sums(int(self._stop.signal is not None), losses, right)
            self._end_step(TokenMean(losses, learnt, right), norm, rate, skipped, tokens, time.monotonic() - began)
            last = self.state.step >= self.steps.total
            if stops or last or self.state.step % settings.checkpoint_every == 0:
                self._refuse_broken_weights(rate)
                self._checkpoints.save(self.state, self._trainee, self._optimizer)
            if stops:  # there may be no time for an evaluation; the next start evaluates
                break
            if self._is_evaluation_due():
                self._evaluate()
                self._trainee.model.train()
        job.adapter.parent.mkdir(parents=True, exist_ok=True)
        self._together.check_stop(self._stop)

    def _passes(self) -> Iterator["_Planned"]:
        """Yield this process's passes of all steps that are left, and after each step a None in place of a pass."""
        for step in range(self.state.step, self.steps.total):
            chosen = [sequence for number in self.steps.samples_of(step) for sequence in self._samples[number]]
            figures = sum(sequence.targets for sequence in chosen), sum(sequence.length for sequence in chosen)
            for places, sequences in self._own_passes(chosen, self._job.pass_tokens):
                keys = [sample_key(self._job.seed, step, place) for place in places]
                yield _Planned(*figures, sequences, keys)
            yield _Planned(*figures)

    def _own_passes(
        self, sequences: list[TokenSequence], tokens: int
    ) -> Iterator[tuple[list[int], list[TokenSequence]]]:
        """Yield this process's passes over sequences that all processes share, each with the places of its sequences.
        A pass has at most `tokens`, unless one sequence has more.

        With a sharded base, all processes get the same number of passes: in an additional one nothing is learnt.
        """
        lengths = [sequence.length for sequence in sequences]
        shares = pack(lengths, tokens if self._trainee.packs else 0, self._job.processes)
        own = [(places, True) for places in shares[self._together.rank]]
        if self._trainee.sharded is not None:
            own = level(shares, lengths, [bool(sequence.pictures) for sequence in sequences])[self._together.rank]
        for places, counts in own:
            chosen = [sequences[place] for place in places]
            yield places, chosen if counts else [sequence.unlearnt() for sequence in chosen]

    def _read(self, planned: "_Planned") -> "tuple[_Planned, Prepared | None]":
        """A planned pass with its tensors; None at the end of a step."""
        return planned, self._trainee.prepare(planned.sequences, planned.keys) if planned.sequences else None

    def _accumulate(self, passes: "Iterator[tuple[_Planned, Prepared | None]]") -> tuple[float, int, float, int]:
        """Run the passes of this process for the next step. Returns the sum of losses, the learnt tokens of the whole
        step, this process's right tokens, and the tokens of the whole step."""
        self._gradients.flat.zero_()
        self._trainee.sums.zero_()
        scale = self._scale.value if self._scale else 1.0
        for planned, prepared in passes:
            if prepared is None:
                losses, right = self._trainee.sums.tolist()
                return losses, planned.targets, right, planned.tokens
            torch.manual_seed(planned.keys[0] + 2**31)  # for dropout of the base itself, which few models have
            self._trainee.add_gradients(prepared, scale / planned.targets)
        raise AssertionError("no step is left")

    def _update(self, rate: float) -> tuple[float, bool]:
        """Reduce and clip the gradients, and update the weights. Returns the gradient norm, and whether float16's loss
        scale skipped the update."""
        self._gradients.reduce(self._job.processes)
        if self._scale is not None:
            self._gradients.flat.div_(self._scale.value)
        norm = self._gradients.clip(self._job.settings.max_grad_norm)
        skipped = self._scale is not None and not math.isfinite(norm)
        if self._scale is not None:
            self._scale.update(overflowed=skipped)
            self.state.loss_scale = (self._scale.value, self._scale.good_steps)
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            self._optimizer.step()
        self.state.skipped_steps += skipped
        return norm, skipped

    def _end_step(self, step: TokenMean, norm: float, rate: float, skipped: bool, tokens: int, seconds: float) -> None:
        """Send the step's progress and log it. Raises UsageError if a value is not finite."""
        state, settings = self.state, self._job.settings
        for mean in (self._since_log, self._since_start):
            mean.add(step.losses, step.tokens, step.right)
        state.tokens += tokens
        scale = self._scale.value if self._scale else None
        problem = step_problem(step.loss, norm, skipped, scale)
        if problem:
            raise self._divergence_error(problem, rate)
        self._progress.step = state.step
        memory = None if self._job.use_cpu else torch.cuda.max_memory_reserved()
        self._progress.send(
            event="step", step=state.step, total=self.steps.total, tokens=tokens, seconds=seconds, memory=memory
        )
        if state.step % settings.log_every and state.step < self.steps.total:
            return
        entry: dict[str, Any] = {
            "step": state.step,
            "epoch": state.step / self.steps.in_epoch,
            "loss": self._since_log.loss,
            "learning_rate": rate,
            "token_acc": self._since_log.accuracy,
        }
        if not skipped:
            entry["grad_norm"] = norm
        self._add_entry(entry)
        self._since_log = TokenMean()

    def _add_entry(self, entry: dict[str, Any]) -> None:
        """Add an entry to the log, and send it."""
        self.state.log.append(entry)
        self._progress.send(event="entry", entry=entry)

    def _is_evaluation_due(self) -> bool:
        """Whether the step that training is at comes with an evaluation."""
        step = self.state.step
        due = step % self._job.settings.checkpoint_every == 0 or step >= self.steps.total
        return bool(self._validation) and self._job.evaluate and step > 0 and due

    def _was_evaluated(self) -> bool:
        """Whether the log has an evaluation of the step that training is at."""
        return any("eval_loss" in entry and entry["step"] == self.state.step for entry in self.state.log)

    def _evaluate(self) -> None:
        """Add the mean loss per token of the validation samples to the log. Raises UsageError if it is not finite."""
        self._progress.during = "evaluation"
        self._trainee.model.eval()
        mean = TokenMean()
        sequences = [sequence for sample in self._validation for sequence in sample]
        for _, chosen in self._own_passes(sequences, self._job.evaluation_tokens):
            loss, right = self._trainee.loss(chosen)
            mean.add(loss, sum(sequence.targets for sequence in chosen), right)
        mean = TokenMean(*self._together.sums(mean.losses, mean.tokens, mean.right))
        if not math.isfinite(mean.loss):
            raise self._divergence_error(f"the validation loss is {nonfinite_name(mean.loss)}", None)
        epoch = self.state.step / self.steps.in_epoch
        entry = {"step": self.state.step, "epoch": epoch, "eval_loss": mean.loss, "eval_token_acc": mean.accuracy}
        self._add_entry(entry)
        if not self._job.use_cpu:
            torch.cuda.empty_cache()
        self._progress.during = "training"

    @property
    def mean_loss(self) -> float | None:
        """The mean loss per token of the steps of this start; None if it made no step."""
        return self._since_start.loss if self._since_start.tokens else None

    def _refuse_broken_weights(self, rate: float) -> None:
        """Raise UsageError in every process if a trained weight is not finite: such weights are never saved."""
        broken = any(not bool(weight.isfinite().all()) for weight in self._trainee.weights.values())
        if self._together.is_set_anywhere(broken):
            raise self._divergence_error("weights are not finite after the update", rate)

    def _divergence_error(self, problem: str, rate: float | None) -> UsageError:
        """The error for a training in which something is not finite. `problem` says what."""
        settings = self._job.settings
        cure = f"lower {settings.full_key('learning_rate')} or raise {settings.full_key('warmup_ratio')}"
        if self._job.dtype == "float16":
            cure = f"set train.precision to bfloat16 or float32, or {cure}"
        at = "" if rate is None else f" at learning rate {rate:.3g}"
        return UsageError(
            f"step {self.state.step} of {self.steps.total}: {problem}{at}; {cure};"
            f" if that does not help, check the files in {self._job.model}"
        )


def make_optimizer(trainee: Trainee, rate: float, settings: Any) -> torch.optim.AdamW:
    """AdamW over the trained weights, in groups: with LoRA+, each B has a higher rate; biases have no weight decay.

    Each group's `factor` is its rate divided by that of the others.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, weight in trainee.weights.items():
        factor = (settings.lora_plus_ratio or 1.0) if "lora_B" in name else 1.0
        decay = 0.0 if name.endswith(".bias") else settings.weight_decay
        groups.setdefault((factor, decay), []).append(weight)
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay, "factor": factor} for (factor, decay), weights in groups.items()],
        lr=rate,
        betas=(0.9, settings.adam_beta2),
        eps=1e-8,
        # one kernel for all weights, and on a CPU the same steps as on a GPU; older torch has none for a CPU
        fused=trainee.device.type != "cpu" or torch.__version__ >= "2.4",
    )


def step_problem(loss: float, norm: float, skipped: bool, scale: float | None) -> str | None:
    """Describe the value that ends training because it is not finite; None if training goes on. Call it after each
    optimizer step.

    `norm` is that of the gradients, `scale` float16's loss scale after the step, None without one. It is normal that a
    step is `skipped` because its scaled gradients overflowed: the scale is halved each time. It is not normal at a
    scale below 1, where the gradients would overflow even without a scale.
    """
    if not math.isfinite(loss):
        return f"the loss is {nonfinite_name(loss)}"
    if skipped and scale is not None and scale >= 1:
        return None
    if skipped or not math.isfinite(norm):
        return "the gradient norm is not finite"
    return None


def nonfinite_name(number: float) -> str:
    """The word for a number that is not finite: NaN or infinite."""
    return "NaN" if math.isnan(number) else "infinite"
