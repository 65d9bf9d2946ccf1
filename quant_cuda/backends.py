"""The table of backends: what can multiply, what it needs, and who is chosen.

To add one, write its functions and a row of `_table`.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quant_cuda import reference
from quant_cuda.cpu import library
from quant_cuda.cpu import product as cpu
from quant_cuda.cuda import operator as gpu
from quant_cuda.weight import AnyWeight, Facts, PackedWeight, PreparedWeight


@dataclass(frozen=True)
class Layout:
    """An order of a weight's integers that one or more backends read."""

    prepare: Callable[[PackedWeight], PreparedWeight]
    restore: Callable[[PreparedWeight], PackedWeight]
    rows: Callable[[PreparedWeight, Tensor], Tensor]
    """(weight, index) -> the weights of some outputs, (..., in), float32 at least."""
    traced: Callable[..., Tensor]
    """As `Backend.matmul`, by the best of those that read it, in operators that torch knows."""


@dataclass(frozen=True)
class Backend:
    name: str
    layout: str | None
    """A key of `LAYOUTS`; None for the checkpoint's own."""
    refuses: Callable[[Facts], str | None]
    """Why it cannot multiply; None if it can."""
    matmul: Callable[..., Tensor]
    """(x, weight in its layout, bias or None, int8) -> y, differentiable in x."""


LAYOUTS = {
    gpu.LAYOUT: Layout(gpu.prepare, gpu.restore, gpu.rows, gpu.traced),
    cpu.LAYOUT: Layout(cpu.prepare, cpu.restore, cpu.rows, cpu.traced),
}


@functools.cache
def table() -> dict[str, Backend]:
    """Backends that can run on this machine by name, the best first."""
    rows = [
        Backend(name, gpu.LAYOUT, gpu.refuses, functools.partial(gpu.matmul, engine=name))
        for name in gpu.engines()
    ]
    rows += [
        Backend(name, cpu.LAYOUT, cpu.refuses, functools.partial(cpu.matmul, instruction_set=index))
        for index, name in enumerate(library.compiled())
        if name in library.instruction_sets()
    ]
    rows.append(Backend("torch", None, lambda product: None, reference.matmul))
    return {row.name: row for row in rows}


@functools.lru_cache(maxsize=4096)
def choose(product: Facts, name: str | None = None) -> Backend:
    """The backend of that name, or the first that can.

    Falling back on plain torch is said in a warning, once for each reason.
    Raises ValueError where the one named is not there or cannot.
    """
    rows = table()
    if name is not None:
        if name not in rows:
            raise ValueError(f"backend {name!r} is not available; choose one of {tuple(rows)}")
        reason = rows[name].refuses(product)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot multiply here: {reason}")
        return rows[name]
    reasons: dict[str, None] = {}
    for row in rows.values():
        reason = row.refuses(product)
        if reason is None:
            break
        reasons[reason] = None
    if row.layout is None:
        if product.device == "cpu" and not library.compiled():
            reasons[cpu.NOT_BUILT] = None
        if product.device == "cuda" and not gpu.engines():
            reasons = {gpu.NOT_THERE: None}
        _warn("; ".join(reasons) or f"there is no kernel for a {product.device} device")
    return row


@functools.cache
def _warn(reasons: str) -> None:
    warnings.warn(
        f"slow: packed weights are unpacked on every call and multiplied by torch ({reasons})",
        stacklevel=4,
    )


def traced(
    x: Tensor, weight: AnyWeight, name: str | None, bias: Tensor | None, int8: bool
) -> Tensor:
    """`matmul` for torch.compile and export, which cannot look into the table: the weight's layout
    says who multiplies, and one that is not prepared is unpacked by torch."""
    if name not in (None, "torch"):
        raise ValueError(f"backend {name!r} cannot be named where torch traces; leave it out")
    if isinstance(weight, PackedWeight):
        return reference.matmul(x, weight, bias, int8)
    return LAYOUTS[weight.layout].traced(x, weight, bias, int8)


def to_layout(weight: AnyWeight, layout: str | None) -> AnyWeight:
    """The same weight in another order; itself where it has that order."""
    if isinstance(weight, PreparedWeight):
        if weight.layout == layout:
            return weight
        weight = LAYOUTS[weight.layout].restore(weight)
    return weight if layout is None else LAYOUTS[layout].prepare(weight)
