"""The optimizer's state in a checkpoint, stored by weight name. Training resumes from it on any number of GPUs, with or
without ZeRO.

    adapter_model.safetensors   the optimizer's LoRA weights, in float32
    optimizer.safetensors       `<name>.exp_avg`, `<name>.exp_avg_sq` and `<name>.step` for each of these weights
    optimizer.json              the schedule's position and, with float16, the loss scale

DeepSpeed's own checkpoints are pickles and fit only one number of GPUs and one ZeRO stage. The names `exp_avg`,
`exp_avg_sq` and `step` are those of torch's AdamW (https://arxiv.org/abs/1711.05101).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import transformers.trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from stages.contract.files import write_json
from stages.train.together import Together

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's tensors with the shape of the weight. The third part of its state, `step`, is one number."""


def patch_state_saving(trainer: Any, together: Together) -> None:
    """Patch a transformers Trainer to save and load the state of optimizer and schedule by weight name.

    With DeepSpeed, the trainer then also saves the adapter in float32, and transformers no longer looks for DeepSpeed's
    own checkpoints. Call it before training.
    """
    saving = _Saving(trainer, together)
    trainer._save_optimizer_and_scheduler = saving.save
    trainer._load_optimizer_and_scheduler = saving.load
    trainer._save_scaler = trainer._load_scaler = lambda checkpoint: None  # optimizer.json holds the scale
    if trainer.is_deepspeed_enabled:
        trainer.save_model = saving.save_model
        # transformers calls this function before it loads the optimizer; it would require DeepSpeed's own folders
        vars(transformers.trainer)["deepspeed_load_checkpoint"] = lambda *_, **__: None


def name_in_file(parameter: str) -> str:
    """A LoRA parameter's name in PEFT's files: without the adapter's name, `default`."""
    return re.sub(r"\.default(?=\.|$)", "", parameter)


class States(Protocol):
    """Reads and restores an optimizer's state by weight name."""

    def read(self) -> dict[str, Tensor]:
        """Return the whole state: `<name>.exp_avg` and `<name>.exp_avg_sq` in the weight's shape, and the
        scalar `<name>.step`.

        All processes must call this, and each gets the whole state, with ZeRO too.
        """

    def write(self, states: Mapping[str, Tensor]) -> None:
        """Restore a state that `read` returned. The number of processes may have been another."""


class TorchStates:
    """The state of a torch optimizer. Each process holds all of it."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[Parameter, str]) -> None:
        self._optimizer, self._names = optimizer, names

    def read(self) -> dict[str, Tensor]:
        """Return the whole state by weight name. Empty before the first step."""
        found: dict[str, Tensor] = {}
        for parameter, name in self._names.items():
            for what, value in self._optimizer.state.get(parameter, {}).items():
                found[f"{name}.{what}"] = value
        return found

    def write(self, states: Mapping[str, Tensor]) -> None:
        """Restore a whole state by weight name. A weight without a saved state has none afterwards."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state = {}
        for number, parameter in enumerate(parameters):
            name = self._names[parameter]
            found = {what: states[f"{name}.{what}"] for what in (*MOMENTS, "step") if f"{name}.{what}" in states}
            if found:
                state[number] = found
        # torch moves each tensor to the device where its own step would create it
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


@dataclass(frozen=True)
class Fragment:
    """Where this process's part of a weight lies. All fields are numbers of elements."""

    in_flat: int
    """Start of the part in the flat tensor of the weight's group."""
    in_weight: int
    """Start of the part in the flattened weight."""
    size: int
    """Length of the part."""


class ZeroStates:
    """The state of DeepSpeed's ZeRO-2 or ZeRO-3 optimizer.

    ZeRO-2 joins each group of weights into one flat float32 tensor, ZeRO-3 into one or several. Each process holds a
    part of every flat tensor. The functions `deepspeed.utils.safe_*` are not usable here: with ZeRO-2 they return only
    the first group's moments before the second step, and with ZeRO-3 they fail if the number of GPUs does not divide a
    weight's size.
    """

    def __init__(self, zero: Any, names: Mapping[Parameter, str]) -> None:
        self._optimizer, self._names = zero.optimizer, names
        self._zero, self._is_3 = zero, hasattr(zero, "fp32_partitioned_groups_flat")
        self._flats: list[Tensor] = zero.fp32_partitioned_groups_flat if self._is_3 else _zero2_flat_tensors(zero)
        self._groups: list[list[Parameter]] = zero.fp16_groups if self._is_3 else zero.bit16_groups

    def read(self) -> dict[str, Tensor]:
        """Return the whole state by weight name, gathered from all processes. Empty before the first step.

        All processes must call this.
        """
        found: dict[str, Tensor] = {}
        for flat, group in zip(self._flats, self._groups, strict=True):
            state = self._optimizer.state.get(flat, {})
            for parameter in group if state else ():
                name = self._names[parameter]
                found |= {f"{name}.{what}": self._gather_weight(parameter, state[what]) for what in MOMENTS}
                found[f"{name}.step"] = state["step"].clone()
        return found

    def write(self, states: Mapping[str, Tensor]) -> None:
        """Restore this process's parts of a whole state by weight name. A group without saved state stays as it is."""
        for number, (flat, group) in enumerate(zip(self._flats, self._groups, strict=True)):
            steps = [states[f"{self._names[p]}.step"] for p in group if f"{self._names[p]}.step" in states]
            if not steps:
                continue
            # a group has one step count; the weights' counts differ only if some had no gradient in some steps
            step = torch.stack(steps).max().to(flat.device if self._counts_on_gpu(number) else "cpu")
            state = {what: torch.zeros_like(flat, requires_grad=False) for what in MOMENTS}
            self._optimizer.state[flat] = {"step": step, **state}
            for parameter in group:
                for what in MOMENTS:
                    self._scatter_weight(parameter, state[what], states.get(f"{self._names[parameter]}.{what}"))

    def gather_weights(self) -> dict[str, Tensor]:
        """Return the optimizer's float32 weights by name, in their shapes. All processes must call this."""
        pairs = zip(self._flats, self._groups, strict=True)
        return {
            self._names[parameter]: self._gather_weight(parameter, flat) for flat, group in pairs for parameter in group
        }

    def write_weights(self, weight: Callable[[str], Tensor]) -> None:
        """Set this process's parts of the optimizer's float32 weights. The model's 16-bit weights stay unchanged.

        `weight` returns a whole weight by its name.
        """
        for flat, group in zip(self._flats, self._groups, strict=True):
            for parameter in group:
                self._scatter_weight(parameter, flat, weight(self._names[parameter]))

    def _counts_on_gpu(self, number: int) -> bool:
        """Whether the optimizer keeps the step count of flat tensor `number` on the GPU."""
        group = self._zero.sub_group_to_group_id[number] if self._is_3 else number
        settings = self._optimizer.param_groups[group]
        return bool(settings.get("fused") or settings.get("capturable"))

    def _fragment(self, parameter: Any) -> Fragment | None:
        """This process's part of a weight; None if it holds no part."""
        if self._is_3:
            _, start, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            first = size * dist.get_rank()
            size = min(size, parameter.ds_numel - first)  # the last processes' parts are padded, or only padding
            return Fragment(start, first, size) if size > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.hp_fragment_address
        return Fragment(address.start, mapping.lp_fragment_address.start, address.numel)

    @torch.no_grad()
    def _gather_weight(self, parameter: Any, flat: Tensor) -> Tensor:
        """Gather a weight from all processes' parts of a flat tensor. Returns it in the weight's shape, on the CPU."""
        shape = parameter.ds_shape if self._is_3 else parameter.shape
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=flat.device)
        fragment = self._fragment(parameter)
        if fragment is not None:
            part = flat.narrow(0, fragment.in_flat, fragment.size)
            whole.narrow(0, fragment.in_weight, fragment.size).copy_(part)
        dist.all_reduce(whole)  # each element comes from one process and is 0 in the others
        return whole.view(shape).cpu()

    @torch.no_grad()
    def _scatter_weight(self, parameter: Any, flat: Tensor, whole: Tensor | None) -> None:
        """Copy this process's part of a weight's values into a flat tensor. Does nothing if `whole` is None."""
        fragment = self._fragment(parameter)
        if fragment is not None and whole is not None:
            part = whole.flatten().narrow(0, fragment.in_weight, fragment.size)
            flat.narrow(0, fragment.in_flat, fragment.size).copy_(part)


def _zero2_flat_tensors(zero: Any) -> list[Tensor]:
    """This process's part of each flat tensor of a ZeRO-2 optimizer."""
    flats: list[Tensor] = zero.single_partition_of_fp32_groups
    return flats


class _Saving:
    """Methods that replace those of a transformers Trainer for saving and loading."""

    def __init__(self, trainer: Any, together: Together) -> None:
        self._trainer, self._together = trainer, together

    def _parameter_names(self) -> dict[Parameter, str]:
        """Each trainable parameter with its name in files."""
        named = self._trainer.model.named_parameters()
        return {parameter: name_in_file(name) for name, parameter in named if parameter.requires_grad}

    def _zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer; None without DeepSpeed."""
        return self._trainer.model_wrapped.optimizer if self._trainer.is_deepspeed_enabled else None

    def _optimizer_states(self) -> States:
        """The object that reads and restores the state of the trainer's optimizer."""
        zero = self._zero_optimizer()
        if zero is not None:
            return ZeroStates(zero, self._parameter_names())
        optimizer = self._trainer.optimizer
        # accelerate wraps the optimizer
        return TorchStates(getattr(optimizer, "optimizer", optimizer), self._parameter_names())

    def save(self, checkpoint: str) -> None:
        """Save optimizer, schedule and loss scale to a checkpoint.

        All processes must call this; only the first one writes.
        """
        states, folder = self._optimizer_states().read(), Path(checkpoint)
        if self._together.is_first:
            save_file({name: value.detach().cpu().contiguous() for name, value in states.items()}, folder / STATES)
            schedule, scale = read_schedule(self._trainer.lr_scheduler), read_loss_scale(self._trainer)
            write_json(folder / POSITION, {"schedule": schedule, "loss_scale": scale})

    def load(self, checkpoint: str | None) -> None:
        """Restore optimizer, schedule and loss scale from a checkpoint. Does nothing if `checkpoint` is None.

        With ZeRO, also restores the optimizer's float32 weights. Raises ValueError if the checkpoint has other learning
        rates than this training.
        """
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        states = self._optimizer_states()
        states.write(load_file(folder / STATES))
        if isinstance(states, ZeroStates):
            with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
                states.write_weights(weights.get_tensor)
        position = json.loads((folder / POSITION).read_text(encoding="utf-8"))
        write_schedule(self._trainer.lr_scheduler, position["schedule"])
        if position["loss_scale"] is not None:
            self._write_loss_scale(position["loss_scale"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter in float32, from the optimizer's weights. Training without ZeRO saves float32 too.

        The trainer's own method would save the 16-bit weights and, with ZeRO-2, copy the whole base in each process.
        All processes must call this; only the first one writes.
        """
        zero = self._zero_optimizer()
        weights = ZeroStates(zero, {p: n for n, p in self._trainer.model.named_parameters()}).gather_weights()
        if self._together.is_first:
            self._trainer._save(output_dir, state_dict=weights)

    def _write_loss_scale(self, saved: Mapping[str, Any]) -> None:
        """Restore what `read_loss_scale` returned. Does nothing if there is no loss scale, as with bfloat16."""
        zero = self._zero_optimizer()
        if zero is not None:
            write_zero_loss_scale(zero.loss_scaler, saved)
            return
        scaler = self._trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            now = {"scale": saved["scale"], "_growth_tracker": saved["steps"]}
            scaler.load_state_dict({**scaler.state_dict(), **now})


STATES = "optimizer.safetensors"
POSITION = "optimizer.json"


def read_schedule(schedule: Any) -> dict[str, Any]:
    """The position of a torch LambdaLR, `last_epoch` and `step_count`, and each group's base rate, `learning_rates`."""
    rates = [float(rate) for rate in schedule.base_lrs]
    return {"last_epoch": schedule.last_epoch, "step_count": schedule._step_count, "learning_rates": rates}


def write_schedule(schedule: Any, saved: Mapping[str, Any]) -> None:
    """Set a torch LambdaLR to the position that `read_schedule` returned, and the optimizer to its learning rates.

    Raises ValueError if the base learning rates differ from the saved rates.
    """
    if saved["learning_rates"] != schedule.base_lrs:
        raise ValueError(
            f"checkpoint: its learning rates are {saved['learning_rates']}, but {schedule.base_lrs} are set"
        )
    schedule.last_epoch, schedule._step_count = saved["last_epoch"], saved["step_count"]
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def read_loss_scale(trainer: Any) -> dict[str, Any] | None:
    """Read a trainer's loss scale: `scale`, and as `steps` the number of steps since its last change.

    Returns None if there is no loss scale, or it is fixed.
    """
    if trainer.is_deepspeed_enabled:
        return read_zero_loss_scale(trainer.model_wrapped.optimizer.loss_scaler)
    scaler = trainer.accelerator.scaler
    if scaler is None or not scaler.is_enabled():
        return None
    state = scaler.state_dict()
    return {"scale": state["scale"], "steps": state["_growth_tracker"]}


def read_zero_loss_scale(scaler: Any) -> dict[str, Any] | None:
    """DeepSpeed's loss scale as `scale` and the number of steps since its last change as `steps`; None if it is fixed.

    DeepSpeed counts steps from the start of training and records the last step whose gradients overflowed.
    """
    if not scaler.dynamic:
        return None
    steps = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {"scale": float(scaler.cur_scale), "steps": steps % scaler.scale_window}


def write_zero_loss_scale(scaler: Any, saved: Mapping[str, Any]) -> None:
    """Set DeepSpeed's loss scale to what `read_zero_loss_scale` returned. Does nothing if the scale is fixed."""
    if scaler.dynamic:
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = saved["scale"], saved["steps"], -1
