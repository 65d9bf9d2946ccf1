"""One quantization divided among processes: calibration windows, and the outputs of each layer.

Every process runs its own batches of windows. Hessian statistics are summed over all of them, so
that all processes have the same. Each solves some outputs, and all receive the whole solution.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gptq import torchrun
from gptq.errors import UserError
from gptq.solver.hessian import Hessian
from gptq.solver.solution import Solution

# Longer than any process computes between two exchanges: one that is silent this long is lost.
TIMEOUT = timedelta(minutes=30)
# The axis of outputs in a Solution's tensors; the rest is the same for all.
_OUTPUT_AXES = {
    "q": 1,
    "scales": 1,
    "zeros": 1,
    "loss": 0,
    "rtn_loss": 0,
    "energy": 0,
    "kept_rtn": 0,
}
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that share a run. Alone, every method hands back what it is given."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where tensors must be to be exchanged."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's own of items that are shared out."""
        return list(items[self.rank :: self.size])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            with _exchange():
                dist.all_reduce(torch.zeros(1, device=self.device))

    def from_leader(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, known to all: what JSON can hold.

        A UserError there is one everywhere.
        """
        if self.size == 1:
            return make()
        told: dict[str, Any] = {}
        if self.leads:
            try:
                told = {"value": make()}
            except UserError as error:
                self._spread({"error": str(error)})
                raise
        told = self._spread(told)
        if "error" in told:
            raise UserError(told["error"])
        return told["value"]

    def everyones(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks, known to all: what JSON can hold."""
        if self.size == 1:
            return [value]
        return [self._spread({"value": value}, rank)["value"] for rank in range(self.size)]

    def tensors_from_leader(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, on the CPU, known to all; the others' own are not looked at.

        The others may be on machines that have not the first one's files.
        """
        if self.size == 1:
            return dict(tensors)
        kinds = self.from_leader(
            lambda: {
                name: [str(it.dtype).removeprefix("torch."), list(it.shape)]
                for name, it in tensors.items()
            }
        )
        received = {}
        for name, (dtype, shape) in kinds.items():
            tensor = (
                tensors[name] if self.leads else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            data = tensor.contiguous().view(-1).view(torch.uint8).to(self.device)
            with _exchange():
                dist.broadcast(data, 0)
            received[name] = data.cpu().view(tensor.dtype).view(shape)
        return received

    def mean(self, hessian: Hessian | None, tokens: int) -> Hessian | None:
        """Statistics over the tokens of all processes; `hessian`: over the `tokens` of this one."""
        if self.size == 1:
            return hessian
        parts = vars(hessian) if hessian is not None else {}
        mine = {name: part for name, part in parts.items() if part is not None}
        # A process without windows learns here what there is to add nothing to.
        shapes = self.from_leader(lambda: {name: list(it.shape) for name, it in mine.items()})
        if not shapes:
            return None
        with _exchange():
            total = torch.tensor([float(tokens)], dtype=torch.float64, device=self.device)
            dist.all_reduce(total)
            for name, shape in shapes.items():
                own = mine.get(name)
                part = torch.zeros(shape, device=self.device) if own is None else own
                dist.all_reduce(part.mul_(tokens))
                mine[name] = part.div_(float(total))
        return Hessian(**mine)

    def outputs(self, count: int) -> slice:
        """This process's share of a layer's outputs; all if there are fewer than processes."""
        if self.size == 1 or count < self.size:
            return slice(0, count)
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def join(self, mine: Solution, count: int) -> Solution:
        """The solution of all `count` outputs, of which each process solved its own `outputs`."""
        if self.size == 1 or count < self.size:
            return mine
        cuts = [count * rank // self.size for rank in range(self.size + 1)]
        joined: dict[str, Any] = {}
        for name, axis in _OUTPUT_AXES.items():
            joined[name] = self._join(getattr(mine, name), axis, cuts)
        return replace(mine, **joined)

    def _join(self, mine: Tensor, axis: int, cuts: Sequence[int]) -> Tensor:
        parts = []
        for rank in range(self.size):
            shape = list(mine.shape)
            shape[axis] = cuts[rank + 1] - cuts[rank]
            part = mine.contiguous() if rank == self.rank else mine.new_empty(shape)
            if part.numel():
                with _exchange():
                    dist.broadcast(
                        part.view(torch.uint8) if part.dtype == torch.bool else part, rank
                    )
            parts.append(part)
        return torch.cat(parts, axis)

    def _spread(self, told: dict[str, Any], source: int = 0) -> dict[str, Any]:
        """The dict of the process of rank `source`, as JSON: nothing that arrives is unpickled."""
        data = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        with _exchange():
            length = torch.tensor([len(data)], device=self.device)
            dist.broadcast(length, source)
            if self.rank != source:
                data = torch.empty(int(length), dtype=torch.uint8)
            data = data.to(self.device)
            dist.broadcast(data, source)
        return json.loads(bytes(data.tolist()))


ALONE = Team()


@contextlib.contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started, or this one alone.

    A process that ends or falls silent, or that torchrun ends since another did, makes each of the
    others raise UserError.
    """
    if torchrun.size() == 1:
        yield ALONE
        return
    started = not dist.is_initialized()
    with _ended_by_signal():
        if started:
            with _exchange():
                backend = "nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=TIMEOUT)
        yield Team(dist.get_rank(), dist.get_world_size(), device)
    # Not after an error: a process that is gone cannot answer.
    if started:
        dist.destroy_process_group()


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    # What a backend raises for a peer that is gone is a RuntimeError of one kind or another.
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"another process of this run was lost ({first}); start it again"
        ) from error


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """torchrun sends SIGTERM to the rest when one process has ended: say so, and leave in order."""

    def stop(_number: int, _frame: object) -> None:
        raise UserError(
            "another process of this run was lost, or the run was ended; start it again"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
