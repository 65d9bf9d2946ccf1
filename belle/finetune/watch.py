"""What happens beside the steps of a Trainer: progress, an end at NaN, Ctrl-C, snapshots."""

import math
import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gptq.errors import UserError


class Watch(TrainerCallback):
    """Shows each step. Raises UserError at the first loss or gradient that is no finite number."""

    def __init__(self, show: Callable[[int, int, str], None]) -> None:
        self.show = show

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        for name, key in (("loss", "loss"), ("gradient", "grad_norm")):
            value = float(logs.get(key, 0.0))
            if not math.isfinite(value):
                raise UserError(
                    f"step {state.global_step}: the {name} is {value} at learning rate "
                    f"{logs['learning_rate']:.3g}; lower --rate, or check the model's weights"
                )
        if state.is_world_process_zero:
            self.show(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")


class Snapshots(TrainerCallback):
    """Calls a function after some steps, with the step, and saves a state to resume from."""

    def __init__(self, steps: set[int], call: Callable[[int], None]) -> None:
        self.steps, self.call = steps, call

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step in self.steps:
            self.call(state.global_step)
            control.should_save = True


class Interrupts(TrainerCallback):
    """Lets Ctrl-C and SIGTERM end a run after its step, with a state to resume from; a second
    Ctrl-C ends it at once.

    A context manager: it is in effect inside.
    """

    stopped = False

    def __enter__(self) -> "Interrupts":
        # torchrun sends SIGTERM to its processes if it gets Ctrl-C; so do schedulers.
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        signal.signal(number, self._before[signal.Signals(number)])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.world_size > 1:
            # All processes have to stop after the same step.
            flag = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(flag)
        if self.stopped:
            control.should_save = control.should_training_stop = True
