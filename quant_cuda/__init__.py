"""Matmul with packed GPTQ weights, on CPUs and GPUs.

It must not know models, checkpoints or how weights were quantized.
"""

import torch
from torch import Tensor

from quant_cuda import backends, reference
from quant_cuda.weight import AnyWeight, PackedWeight, PreparedWeight, facts

_LEGACY = ("vecquant2matmul", "vecquant3matmul", "vecquant4matmul", "vecquant8matmul")
__all__ = [
    "PackedWeight",
    "PreparedWeight",
    "available",
    "backend_for",
    "matmul",
    "prepare",
    "restore",
    "rows",
]


def available() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the best first; "torch" is the last."""
    return tuple(backends.table())


def prepare(weight: PackedWeight, backend: str | None = None) -> AnyWeight:
    """The weight in the layout that a backend's kernels read, for many calls of `matmul`.

    The original need not be kept: `restore` makes it again.
    backend: one of `available()`; None takes the best for the weight's device. For "torch" the
        weight itself comes back.
    Raises ValueError for a backend that is not available or cannot multiply this weight.
    """
    return backends.to_layout(weight, backends.choose(facts(weight, torch.float32), backend).layout)


def restore(weight: AnyWeight) -> PackedWeight:
    """The weight in the checkpoint's layout, the same bits that `prepare` was given."""
    plain = backends.to_layout(weight, None)
    assert isinstance(plain, PackedWeight)
    return plain


def matmul(
    x: Tensor,
    weight: AnyWeight,
    backend: str | None = None,
    *,
    bias: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """Multiply activations by a packed weight.

    x: float16, bfloat16, float32 or float64 (..., in), any strides, on the weight's device.
    weight: as `prepare` gives it; one in the checkpoint's layout is prepared for this call alone.
    backend: one of `available()`; None takes the best that can, see `backend_for`.
    bias: floating (out,), added before the result is rounded to x's dtype.
    int8: round activations to 8 bits, with a scale for each group of the weight and 512 inputs at
        most. Faster if the processor multiplies bytes; the result is as exact as that rounding.
    Returns x's dtype (..., out); differentiable in x.
    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or backend.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of {weight.in_features} inputs"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}")
    if bias is not None:
        _check_bias(bias, weight)
    if torch.compiler.is_compiling():
        return backends.traced(x, weight, backend, bias, int8)
    if isinstance(weight, PackedWeight):
        chosen = backends.choose(facts(weight, x.dtype), backend)
        return chosen.matmul(x, backends.to_layout(weight, chosen.layout), bias, int8)
    # The choice is cached: a token takes hundreds of small layers, so that making it would show.
    cached = weight.chosen.get((x.dtype, backend))
    if cached is None:
        cached = backends.choose(facts(weight, x.dtype), backend)
        weight.chosen[x.dtype, backend] = cached
    if cached.layout != weight.layout:
        return cached.matmul(x, backends.to_layout(weight, cached.layout), bias, int8)
    return cached.matmul(x, weight, bias, int8)


def _check_bias(bias: Tensor, weight: AnyWeight) -> None:
    if bias.dim() != 1 or bias.shape[0] != weight.out_features:
        raise ValueError(
            f"bias of shape {tuple(bias.shape)} does not fit a weight of {weight.out_features} "
            "outputs"
        )
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, not {bias.dtype}")
    if bias.device != weight.device:
        raise ValueError(f"bias is on {bias.device}, the weight on {weight.device}")


def rows(weight: AnyWeight, index: Tensor) -> Tensor:
    """The weights of some outputs, as an embedding looks them up.

    index: integer (...), each in 0..out - 1, on the weight's device.
    Returns float32 (..., in), or float64 if the scales are; nothing is multiplied.
    """
    if isinstance(weight, PackedWeight):
        return reference.rows(weight, index)
    return backends.LAYOUTS[weight.layout].rows(weight, index)


def backend_for(weight: AnyWeight, dtype: torch.dtype) -> str:
    """Name of the backend that `matmul` chooses for activations of this dtype."""
    return backends.choose(facts(weight, dtype)).name


def __getattr__(name: str):
    """The functions of the older extension of this name, for code that was written for it."""
    if name not in _LEGACY:
        raise AttributeError(f"module 'quant_cuda' has no attribute {name!r}")
    from quant_cuda import legacy

    return getattr(legacy, name)
