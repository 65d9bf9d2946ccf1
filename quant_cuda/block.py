"""One token through a transformer block of packed weights, in one call of compiled CPU code.

csrc/cpu/block.h has the arithmetic: RMS norm, attention with rotary positions over a cache of keys
and values, a gated feed-forward part with SiLU.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from quant_cuda import cpu, native
from quant_cuda.weight import PreparedWeight

WEIGHTS = ("query", "key", "value", "attended", "gate", "up", "down")


class _Args(ctypes.Structure):
    """The record of csrc/cpu/block_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p * len(WEIGHTS)) for name in ("data", "plan", "bias")),
        *native.fields("attention_norm mlp_norm x y cos sin keys values", ""),
        *((name, ctypes.c_float) for name in ("attention_epsilon", "mlp_epsilon", "scale")),
        *native.fields("", "hidden heads key_heads head_dim inner capacity length digits threads"),
    )


class Block:
    """A block's weights, for one token after another.

    weights: in the order of WEIGHTS, all in the CPU's layout; biases: float32 (out,) or None each.
    norms: of attention and of the feed-forward part, each a weight, float32 (hidden,), and an
        epsilon.
    scale: of a query's products with keys.
    """

    def __init__(
        self,
        weights: Sequence[PreparedWeight],
        biases: Sequence[Tensor | None],
        norms: Sequence[tuple[Tensor, float]],
        head_dim: int,
        scale: float,
        int8: bool = False,
    ) -> None:
        args = self._args = _Args()
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            args.data[index], args.plan[index] = (it.data_ptr() for it in weight.tensors)
            args.bias[index] = None if bias is None else bias.data_ptr()
        (first, args.attention_epsilon), (second, args.mlp_epsilon) = norms
        args.attention_norm, args.mlp_norm = first.data_ptr(), second.data_ptr()
        args.hidden, args.inner = len(first), weights[WEIGHTS.index("gate")].out_features
        args.heads = weights[0].out_features // head_dim
        args.key_heads = weights[1].out_features // head_dim
        args.head_dim, args.scale, args.digits = head_dim, scale, 1 if int8 else 2
        # What the record points to must live as long.
        self._held = (*weights, *biases, first, second)

    def step(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        length: int,
        backend: int = -1,
    ) -> Tensor:
        """x float32 (1, 1, hidden) to the block's output, of the same shape.

        cos, sin: float32 (1, 1, head_dim), of the token's position.
        keys, values: float32 (1, key heads, capacity, head_dim), contiguous, of which the first
            `length` < capacity tokens are known; this token's are written behind them.
        backend: index in `native.compiled()`; -1 for the best.
        """
        args = self._args
        y = torch.empty_like(x)
        args.x, args.y = x.data_ptr(), y.data_ptr()
        args.cos, args.sin = cos.data_ptr(), sin.data_ptr()
        args.keys, args.values = keys.data_ptr(), values.data_ptr()
        args.capacity, args.length = keys.shape[2], length
        args.threads = torch.get_num_threads()
        cpu.library().quant_cuda_block(cpu.best() if backend < 0 else backend, ctypes.byref(args))
        return y
