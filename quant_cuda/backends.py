"""The table of backends: what can multiply, what it needs, and who is chosen.

To add one, write its functions and a row of `_table`.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_cuda import cpu, native, reference
from quant_cuda.weight import AnyWeight, PackedWeight, PreparedWeight


@dataclass(frozen=True)
class Layout:
    """An order of a weight's integers that one or more backends read."""

    prepare: Callable[[PackedWeight], PreparedWeight]
    restore: Callable[[PreparedWeight], PackedWeight]


@dataclass(frozen=True)
class Backend:
    name: str
    layout: str | None
    """A key of `LAYOUTS`; None for the checkpoint's own."""
    refuses: Callable[[AnyWeight, torch.dtype], str | None]
    """Why it cannot multiply activations of this type by this weight; None if it can."""
    matmul: Callable[..., Tensor]
    """(x, weight in its layout, bias or None, int8) -> y, differentiable in x."""


LAYOUTS = {cpu.LAYOUT: Layout(cpu.prepare, cpu.restore)}


@functools.cache
def table() -> dict[str, Backend]:
    """Backends that can run on this machine by name, the best first."""
    rows = [
        Backend(
            name,
            cpu.LAYOUT,
            cpu.refuses,
            functools.partial(cpu.matmul, instruction_set=name),
        )
        for name in native.instruction_sets()
    ]
    rows.append(Backend("torch", None, lambda weight, dtype: None, reference.matmul))
    return {row.name: row for row in rows}


def choose(weight: AnyWeight, dtype: torch.dtype, name: str | None = None) -> Backend:
    """The backend of that name, or the first that can.

    Falling back on plain torch is said in a warning, once for each reason.
    Raises ValueError where the one named is not there or cannot.
    """
    rows = table()
    if name is not None:
        if name not in rows:
            raise ValueError(f"backend {name!r} is not available; choose one of {tuple(rows)}")
        reason = rows[name].refuses(weight, dtype)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot multiply here: {reason}")
        return rows[name]
    reasons: dict[str, str] = {}
    for row in rows.values():
        reason = row.refuses(weight, dtype)
        if reason is None:
            break
        reasons.setdefault(reason, row.name)
    if row.layout is None:
        if native.library() is None and weight.device.type == "cpu":
            reasons["the compiled CPU code was not built: pip install . with a C++ compiler"] = (
                "cpu"
            )
        _warn("; ".join(reasons) or f"no kernel for {weight.device.type}")
    return row


@functools.cache
def _warn(reasons: str) -> None:
    warnings.warn(
        f"slow: packed weights are unpacked on every call and multiplied by torch ({reasons})",
        stacklevel=4,
    )


def to_layout(weight: AnyWeight, layout: str | None) -> AnyWeight:
    """The same weight in another order; itself where it has that order."""
    if isinstance(weight, PreparedWeight):
        if weight.layout == layout:
            return weight
        weight = LAYOUTS[weight.layout].restore(weight)
    return weight if layout is None else LAYOUTS[layout].prepare(weight)
