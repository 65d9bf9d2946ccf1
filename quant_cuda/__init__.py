"""Arithmetic on packed GPTQ weights. Knows nothing of models or of how they were quantized."""

from collections.abc import Callable

from torch import Tensor

from quant_cuda import reference
from quant_cuda.weight import PackedWeight

__all__ = ["PackedWeight", "available", "matmul"]

_BACKENDS: dict[str, Callable[[Tensor, PackedWeight], Tensor]] = {"torch": reference.matmul}


def available() -> tuple[str, ...]:
    """Names of the backends that can run here, the one used by default first."""
    return tuple(_BACKENDS)


def matmul(x: Tensor, weight: PackedWeight, backend: str | None = None) -> Tensor:
    """Multiply activations by a packed weight.

    x: float16, bfloat16, float32 or float64 (..., in), any strides, on the weight's device.
    backend: one of `available()`; None takes the first.
    Returns x's dtype (..., out); differentiable in x.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or backend.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of {weight.in_features} inputs"
        )
    if x.device != weight.qweight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.qweight.device}")
    name = available()[0] if backend is None else backend
    if name not in _BACKENDS:
        raise ValueError(f"backend {name!r} is not available; choose one of {available()}")
    return _BACKENDS[name](x, weight)
