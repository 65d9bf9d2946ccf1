"""The table of backends: which can multiply what, and which is chosen.

To add one, write its functions and a row of `table`; from outside the package, `register` one.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from quant_cuda import reference, transforms
from quant_cuda.cpu import layout as cpu_layout
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
    """As `Backend.matmul`, by the best of those that read it, through a torch operator."""


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
    cpu_layout.LAYOUT: Layout(cpu_layout.prepare, cpu_layout.restore, cpu_layout.rows, cpu.traced),
}

_registered: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend that is tried before all others; the last one registered is tried first.

    Weights that were multiplied before keep the backend chosen then: prepare them again.
    Raises ValueError for a name that is taken or a layout that is not in LAYOUTS.
    """
    if backend.name in table():
        raise ValueError(f"there is a backend {backend.name!r} already; choose another name")
    if backend.layout is not None and backend.layout not in LAYOUTS:
        raise ValueError(f"layout {backend.layout!r} is not one of {tuple(LAYOUTS)}; add it there")
    _registered[backend.name] = backend
    forget()


def unregister(name: str) -> None:
    """Undo `register`. Raises KeyError for a name that was not registered."""
    del _registered[name]
    forget()


def forget() -> None:
    """Look at the machine again, at the next call: what runs here, and what is chosen."""
    for cached in (table, _rows, choose, _warn):
        cached.cache_clear()


@functools.cache
def table() -> dict[str, Backend]:
    """Backends that can run on this machine by name, the best first."""
    return _rows("cuda")


@functools.cache
def _rows(device: str) -> dict[str, Backend]:
    """Those that may take a weight on a device of this type.

    The GPU is asked for its own weights alone, because asking it makes a CUDA context.
    """
    rows = [*reversed(_registered.values())]
    rows += [
        Backend(name, gpu.LAYOUT, gpu.refuses, functools.partial(gpu.matmul, engine=name))
        for name in (gpu.engines() if device == "cuda" else ())
    ]
    rows += [
        Backend(
            name,
            cpu_layout.LAYOUT,
            cpu.refuses,
            functools.partial(cpu.matmul, instruction_set=index),
        )
        for index, name in enumerate(library.compiled())
        if name in library.instruction_sets()
    ]
    rows.append(Backend("torch", None, lambda product: None, reference.matmul))
    return {row.name: row for row in rows}


@functools.lru_cache(maxsize=4096)
def choose(product: Facts, name: str | None = None) -> Backend:
    """The backend of that name, or the first that can.

    Warns, once for each reason, if that is plain torch.
    Raises ValueError if the one named is not there or cannot.
    """
    rows = _rows(product.device)
    if name is not None:
        if name not in rows:
            rows = table()
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
            reasons[library.problem()] = None
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
    """`matmul` for torch.compile and export, which cannot trace a look-up in the table.

    The weight's layout decides; a weight that is not prepared is unpacked by torch.
    """
    if name not in (None, "torch"):
        raise ValueError(f"backend {name!r} cannot be named where torch traces; leave it out")
    if isinstance(weight, PackedWeight):
        return reference.matmul(x, weight, bias, int8)
    return LAYOUTS[weight.layout].traced(x, weight, bias, int8)


def to_layout(weight: AnyWeight, layout: str | None) -> AnyWeight:
    """The same weight in another layout; itself if it has that layout.

    Its tensors may be used for training, whatever mode it is called in.
    """
    if weight_layout(weight) == layout:
        return weight
    with transforms.suspended():
        if isinstance(weight, PreparedWeight):
            weight = LAYOUTS[weight.layout].restore(weight)
        if layout is None:
            return weight
        made = LAYOUTS[layout].prepare(weight)
        if not any(tensor.is_inference() for tensor in made.tensors):
            return made
        # A layout may keep tensors of the weight, which was then made in inference mode.
        tensors = tuple(t.clone() if t.is_inference() else t for t in made.tensors)
        return replace(made, tensors=tensors)


def weight_layout(weight: AnyWeight) -> str | None:
    """A key of LAYOUTS; None for the checkpoint's own."""
    return weight.layout if isinstance(weight, PreparedWeight) else None
