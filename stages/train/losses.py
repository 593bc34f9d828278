"""The losses of ms-swift's trainer as means over learnt tokens, and the end of a training that diverges.

On their own, ms-swift 4.6 and transformers 4.57 to 5.19 take means of means: of batches in a validation, of steps in a
log entry. They log a loss that is NaN as 0, and skip the update of a step whose gradient norm is NaN.
"""

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerState

from stages.contract.errors import UsageError
from stages.train.job import Job
from stages.train.optimizer_state import read_loss_scale
from stages.train.sharding import free_whole_weights
from stages.train.together import Together


@dataclass
class TokenMean:
    """A mean over learnt tokens."""

    losses: float = 0.0
    """Sum of the tokens' losses."""
    tokens: float = 0.0

    @property
    def value(self) -> float:
        """The mean loss per token. Raises ZeroDivisionError if no token was added."""
        return self.losses / self.tokens

    def add(self, losses: float, tokens: float) -> None:
        """Add tokens: the sum of their losses, and their number."""
        self.losses += losses
        self.tokens += tokens


class Losses:
    """Measures the losses of training and validation as means over learnt tokens, for the trainer's log.

    Create it before training starts, because it replaces methods of the trainer. It adds up losses where the template
    computes a batch's loss, before the trainer scales it for accumulation and for the number of processes.
    """

    def __init__(self, trainer: Any, job: Job, together: Together) -> None:
        self._trainer, self._job, self._together = trainer, job, together
        self._batches = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
        """Sum of the losses and number of learnt tokens in this process's batches since the last `take_sums`."""
        self._since_log, self._since_start = TokenMean(), TokenMean()
        self._norm: Any = None
        self._rate = 0.0
        self._scale: float | None = None
        self._compute, trainer.template.compute_sft_loss = trainer.template.compute_sft_loss, self._compute_and_add
        accelerator = trainer.accelerator
        self._clip, accelerator.clip_grad_norm_ = accelerator.clip_grad_norm_, self._clip_and_keep_norm
        self._log, trainer.log = trainer.log, self._log_token_means

    def _compute_and_add(self, model: Any, inputs: Any, num_items_in_batch: Any = None, trainer: Any = None) -> Any:
        """Compute a batch's loss as the template does, and add it to the sums. Returns what the template returns."""
        outputs = self._compute(model, inputs, num_items_in_batch=num_items_in_batch, trainer=trainer)
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        # the template divides by the tokens of the whole step if it gets their number
        losses = outputs.loss.detach().double() * (tokens if num_items_in_batch is None else num_items_in_batch)
        self._batches += torch.stack([torch.where(tokens > 0, losses, 0.0), tokens.double()])
        return outputs

    def _clip_and_keep_norm(self, *arguments: Any, **named: Any) -> Any:
        """Clip the gradients as the trainer does, and keep their norm. Returns the norm."""
        self._norm = self._clip(*arguments, **named)
        return self._norm

    def _log_token_means(self, logs: dict[str, Any], *rest: Any) -> None:
        """Log an entry as the trainer does, but with means over tokens as losses, with the learning rate of the last
        step, and without a gradient norm that is not finite."""
        if "loss" in logs:
            logs |= {"loss": self._since_log.value, "learning_rate": self._rate}
            self._since_log = TokenMean()
            if not math.isfinite(logs.get("grad_norm") or 0.0):  # float16's loss scale skipped this step
                del logs["grad_norm"]
        if "train_loss" in logs:
            del logs["train_loss"]
            if self._since_start.tokens:  # there are none if this start only publishes the adapter
                logs["train_loss"] = self._since_start.value
        self._log(logs, *rest)

    def begin(self) -> None:
        """Keep the learning rate and float16's loss scale that training starts or resumes with. Call it once before the
        first step.

        Also lets DeepSpeed's loss scale fall to 0.5.
        """
        self.note_learning_rate()
        self._scale = self._loss_scale()
        if self._trainer.is_deepspeed_enabled:  # else DeepSpeed fails before `step_problem` sees a scale below 1
            self._trainer.model_wrapped.optimizer.loss_scaler.min_scale = 0.5

    def note_learning_rate(self) -> None:
        """Keep this step's learning rate for the log: the schedule moves on before the step is logged."""
        self._rate = float(self._trainer.optimizer.param_groups[0]["lr"])

    def take_sums(self) -> tuple[float, float]:
        """Return the sum of losses and the number of learnt tokens in this process's batches since the last call."""
        losses, tokens = self._batches.tolist()
        self._batches.zero_()
        return losses, tokens

    def end_step(self, losses: float, tokens: float, state: TrainerState) -> None:
        """Add a step's losses to the means. Raises UsageError if `step_problem` finds that training diverges.

        `losses` is the sum of the losses, `tokens` the number of learnt tokens, both over all processes.
        """
        self._since_log.add(losses, tokens)
        self._since_start.add(losses, tokens)
        before, self._scale = self._scale, self._loss_scale()
        # a fused optimizer skips the update itself, and accelerate does not notice
        skipped = (before or 0.0) > (self._scale or 0.0) or self._trainer.accelerator.optimizer_step_was_skipped
        problem = step_problem(losses / tokens, None if self._norm is None else float(self._norm), skipped, self._scale)
        if problem:
            raise self._divergence_error(problem, state)

    def _loss_scale(self) -> float | None:
        """float16's current loss scale; None without one, or if it is fixed."""
        scale = read_loss_scale(self._trainer)
        return None if scale is None else float(scale["scale"])

    def check_weights(self, state: TrainerState) -> None:
        """Raise UsageError in every process if a trained weight is not finite. Call it before saving a checkpoint."""
        trained = (weight for weight in self._trainer.model.parameters() if weight.requires_grad)
        # ZeRO-3 keeps this process's part of a weight in `ds_tensor`
        broken = any(not bool(getattr(weight, "ds_tensor", weight).isfinite().all()) for weight in trained)
        if self._together.is_set_anywhere(broken):
            raise self._divergence_error("weights are not finite after the update", state)

    def validate(self) -> dict[str, float]:
        """Compute and log the mean loss per token of the validation set. Returns it as `eval_loss`.

        All processes must call this. Raises UsageError if the loss is not finite.
        """
        trainer, samples = self._trainer, self._trainer.eval_dataset
        model = trainer.model
        model.eval()
        job = self._job
        for own in process_batches(len(samples), job.eval_micro_batch, self._together.rank, job.processes):
            batch = trainer.data_collator([samples[number] for number in own or [0]])
            if not own:  # other processes have a batch, and ZeRO-3 needs a forward pass of each process
                batch["labels"] = torch.full_like(batch["labels"], -100)
            trainer.prediction_step(model, batch, prediction_loss_only=True)
            if job.sharding == "zero3":
                free_whole_weights(model)
        losses, tokens = self._together.sums(*self.take_sums())
        mean = losses / tokens
        if not math.isfinite(mean):
            raise self._divergence_error(f"the validation loss is {_nonfinite_name(mean)}", trainer.state)
        metrics = {"eval_loss": mean}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        gc.collect()
        torch.cuda.empty_cache()  # free the memory of the evaluation's larger batches; does nothing on a CPU
        return metrics

    def _divergence_error(self, problem: str, state: TrainerState) -> UsageError:
        """The error for a training in which something is not finite. `problem` says what."""
        settings = self._job.settings
        cure = f"lower {settings.full_key('learning_rate')} or raise {settings.full_key('warmup_ratio')}"
        if self._job.dtype == "float16":
            cure = f"set train.precision to bfloat16 or float32, or {cure}"
        return UsageError(
            f"step {state.global_step} of {state.max_steps}: {problem} at learning rate {self._rate:.3g}; {cure};"
            f" if that does not help, check the files in {self._job.model}"
        )


def process_batches(samples: int, micro_batch: int, rank: int, processes: int) -> Iterator[list[int]]:
    """Yield the sample numbers of each batch of one process. Each sample is in one batch of one process.

    All processes get the same number of batches. A process's last batch may be smaller, or empty.
    """
    for first in range(0, samples, micro_batch * processes):
        own = first + rank * micro_batch
        yield list(range(own, min(own + micro_batch, samples)))


def step_problem(loss: float, norm: float | None, skipped: bool, scale: float | None) -> str | None:
    """Describe the value that ends training because it is not finite; None if training goes on. Call it after each
    optimizer step.

    `norm` is that of the gradients, None if it was not computed. `scale` is float16's loss scale after the step, None
    without one. It is normal that a step is `skipped` because its scaled gradients overflowed: the scale is halved each
    time. It is not normal at a scale below 1, where the gradients would overflow even without a scale.
    """
    if not math.isfinite(loss):
        return f"the loss is {_nonfinite_name(loss)}"
    if skipped and scale is not None and scale >= 1:
        return None
    if skipped or (norm is not None and not 0 <= norm < math.inf):  # DeepSpeed writes -1 for a norm that is not finite
        return "the gradient norm is not finite"
    return None


def _nonfinite_name(number: float) -> str:
    """The word for a number that is not finite: NaN or infinite."""
    return "NaN" if math.isnan(number) else "infinite"
