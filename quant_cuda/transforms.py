"""Forward-mode AD, the transforms of torch.func, traces and modes, which kernels do not see."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from quant_cuda import reference
from quant_cuda.weight import PreparedWeight

__all__ = ["are_active", "matmul", "suspended"]

_current = torch._C._functorch.peek_interpreter_stack


def are_active() -> bool:
    """Whether there is a level of forward-mode AD or of a transform."""
    return forward_ad._current_level >= 0 or _current() is not None


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """For code that writes to a tensor by its address, which nothing could trace or transform.

    The tensors that it makes may be used for training.
    """
    trace = torch._C._get_tracing_state()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
    ):
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]


def matmul(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    int8: bool,
    dequantize: Callable[[torch.dtype], Tensor],
) -> Tensor:
    """x (..., in) times the weight by torch, in operations that all transforms take.

    dequantize: returns the dequantized weight (in, out) in a dtype.
    """
    y = (reference.to_int8(x, weight) if int8 else x) @ dequantize(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)
